"""Linear layers whose weights are packed once, in the order in which the product reads them.

A decode step multiplies few rows by every weight of the model: it is as fast as the weights come from memory.
`torch.nn.functional.linear` reads them row by row and, in bf16, converts or copies them on every call; the packed
order lets the product stream through them (linear.hpp), and find the next ones fetched when it gets there.
"""
from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .build import BuildError, library

Kind = Literal["native", "onednn", "torch"]
Product = Callable[[Tensor], Tensor]
_STEP = {torch.float32: 1, torch.bfloat16: 2}       # elements of K that lie side by side in a panel
_FUNCTIONS = {(torch.float32, torch.float32): "linear_f32",
              (torch.bfloat16, torch.bfloat16): "linear_bf16",
              (torch.bfloat16, torch.float32): "linear_bf16_f32"}
_GATED_FUNCTIONS = {torch.float32: "linear_gated_f32", torch.bfloat16: "linear_gated_bf16"}
_TYPICAL_ROWS = 32      # oneDNN chooses a layout for a number of rows; any number works with it


class Weights(Structure):
    """`struct Weights` of linear.hpp: a layer, for the kernels."""

    _fields_ = [("packed", c_void_p), ("bias", c_void_p), ("columns", c_int32), ("depth", c_int32)]


class PackedLinear(nn.Module):
    """y = x W^T + b for inference on the CPU. It keeps its own, packed copy of the weights and no other."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None,
                 kind: Kind | None = None) -> None:
        """weight [N, K], bias [N] or None. `out_dtype`: y's, the weight's unless given. `kind`: see `choose`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.out_dtype = weight.dtype, out_dtype or weight.dtype
        self.kind = kind or choose(self.dtype, self.out_dtype)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        self.weights: Weights | None = None     # for kernels that call linear.hpp themselves; None unless native
        if self.kind == "native":
            self.weights, self.nbytes, self._product = _native(weight, bias, self.out_dtype)
        elif self.kind == "onednn":
            self.nbytes, self._product = _onednn(weight, bias, self.out_dtype)
        else:
            self.nbytes, self._product = weight.nbytes, lambda x: F.linear(x, weight, bias).to(self.out_dtype)

    @classmethod
    def of(cls, linear: nn.Linear, out_dtype: torch.dtype | None = None) -> Self:
        """The packed form of a layer. The caller drops the layer, where nothing else shares its weight."""
        return cls(linear.weight, linear.bias, out_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] of the weight's dtype, rows may be apart -> [T, N] in `out_dtype`."""
        if x.dtype is not self.dtype or x.dim() != 2 or x.shape[1] != self.in_features:     # C++ cannot notice
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, not {self.dtype} [T, {self.in_features}]")
        return self._product(x)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.kind}, {self.nbytes:,} bytes"


class PackedGatedLinear(nn.Module):
    """silu(x A^T) * (x B^T): gate and up are packed by turns, so that one tile computes both and writes the result."""

    def __init__(self, weight: Tensor) -> None:
        """weight [2 N, K]: the N rows of the gate, then those of up. `choose` says native for its dtype."""
        super().__init__()
        self.dtype, self.in_features, self.out_features = weight.dtype, weight.shape[1], weight.shape[0] // 2
        self.weights, self.nbytes, self._product = _native(weight.detach(), None, weight.dtype, gated=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] of the weight's dtype -> [T, N]."""
        if x.dtype is not self.dtype or x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, not {self.dtype} [T, {self.in_features}]")
        return self._product(x)


@cache
def choose(dtype: torch.dtype, out_dtype: torch.dtype) -> Kind:
    """Which product to use on this machine, by what was measured with `linear_bench`.

    native  fp32 and bf16: ahead of both others from 1 row to 2048, with AVX-512 and with AVX2, so the number of rows
            does not come into it
    onednn  bf16 on a processor with matrix tiles (AMX), which linear.hpp does not use; or where nothing compiles. With
            tiles it is more than twice as fast from some 32 rows on; up to 8 rows linear.hpp would be, by up to twice
    torch   everything else: fp16, and what oneDNN cannot do on this processor
    """
    if (dtype, out_dtype) not in _FUNCTIONS:
        return "torch"
    onednn: Kind = "onednn" if _reorder(torch.zeros(16, 16, dtype=dtype)) is not None else "torch"
    if dtype is torch.bfloat16 and onednn == "onednn" and _has_matrix_tiles():
        return onednn
    try:
        library()
    except BuildError:
        return onednn
    return "native"


def kernels() -> ctypes.CDLL:
    """The library that layers are packed for. Raises BuildError."""
    return library()


def pack(weight: Tensor, panel: int) -> Tensor:
    """weight [N, K] -> [ceil(N / panel), ceil(K / s), panel, s], filled up with zeros; s is 2 in bf16, else 1."""
    step = _STEP[weight.dtype]
    columns, depth = weight.shape
    padded = F.pad(weight, (0, -depth % step, 0, -columns % panel))
    panels = padded.view(padded.shape[0] // panel, panel, padded.shape[1] // step, step)
    return panels.permute(0, 2, 1, 3).contiguous()


def interleave(weight: Tensor, width: int) -> Tensor:
    """weight [2 N, K], gate above up -> `width` rows of the gate, as many of up, and so on; zeros fill N up."""
    halves = F.pad(weight.unflatten(0, (2, -1)), (0, 0, 0, -(weight.shape[0] // 2) % width))
    return halves.unflatten(1, (-1, width)).transpose(0, 1).flatten(0, 2)


def multiply_packed(x: Tensor, packed: Tensor, columns: int) -> Tensor:
    """The readable twin of linear.hpp: x [T, K] times what `pack` returns -> [T, columns] in fp32."""
    panels, steps, panel, step = packed.shape
    x = F.pad(x, (0, steps * step - x.shape[1])).view(-1, steps, step)
    y = torch.einsum("tks,pkcs->tpc", x.float(), packed.float())
    return y.reshape(-1, panels * panel)[:, :columns]


def _native(weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
            gated: bool = False) -> tuple[Weights, int, Product]:
    kernels = library()
    panel, (columns, depth) = kernels.linear_panel(), weight.shape
    if gated:
        function, columns = _function(kernels, _GATED_FUNCTIONS[weight.dtype]), columns // 2
        packed = pack(interleave(weight, panel // 2), panel)
    else:
        function, packed = _function(kernels, _FUNCTIONS[weight.dtype, out_dtype]), pack(weight, panel)
    padded_bias = None if bias is None else F.pad(bias.float(), (0, -columns % panel))
    weights = Weights(packed.data_ptr(), None if padded_bias is None else padded_bias.data_ptr(), columns, depth)
    reference = byref(weights)
    tensors = (packed, padded_bias)
    widens = weight.dtype is torch.bfloat16 and bool(kernels.linear_widens())

    def product(x: Tensor, keep: Any = tensors) -> Tensor:      # `weights` points into them
        x = x.float() if widens else x
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        y = torch.empty(rows, columns, dtype=out_dtype)
        function(reference, x.data_ptr(), x.stride(0), y.data_ptr(), columns, rows)
        return y

    return weights, packed.nbytes + (0 if padded_bias is None else padded_bias.nbytes), product


def _onednn(weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> tuple[int, Product]:
    packed = _reorder(weight)
    if packed is None:
        raise ValueError(f"this torch has no packed oneDNN product for {weight.dtype} on this processor")
    multiply = torch.ops.mkldnn._linear_pointwise
    return weight.nbytes, lambda x: multiply(x, packed, bias, "none", [], "").to(out_dtype)


def _reorder(weight: Tensor) -> Tensor | None:
    """`weight` in oneDNN's own order, through the function that torch's compiler calls; None where there is none."""
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    except (AttributeError, RuntimeError):
        return None


def _has_matrix_tiles() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@cache
def _function(kernels: ctypes.CDLL, name: str) -> ctypes._NamedFuncPointer:
    function = getattr(kernels, name)
    function.argtypes = [POINTER(Weights), c_void_p, c_int64, c_void_p, c_int64, c_int64]
    function.restype = None
    return function
