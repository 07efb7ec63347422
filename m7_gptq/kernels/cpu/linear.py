"""Linear layers on packed codes: the matrix stays at its 4 or 8 bits, in memory and on its way to the processor.

    activations="exact"     x as it is (bf16 or fp32) times whole numbers, sums in fp32, then scales and offsets
    activations="int8"      x rounded to 8 bits, a scale for each token and group of inputs; integer products

Both equal `QuantizedLinear`, the second within the rounding of x. See cpu/packed.hpp and group_tiles.hpp.

T tokens, N outputs, K inputs.
"""
from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4_flash_attn.kernels.cpu.linear import interleave

from ...grid import QuantizedMatrix
from ..packed import PackedMatrix, pack
from .build import library
from .large_pages import LargePages

Activations = Literal["exact", "int8"]
DTYPES = (torch.float32, torch.bfloat16)
_FUNCTIONS = {(torch.float32, torch.float32): "quantized_f32",
              (torch.bfloat16, torch.bfloat16): "quantized_bf16",
              (torch.bfloat16, torch.float32): "quantized_bf16_f32"}
_GATED_FUNCTIONS = {torch.float32: "quantized_gated_f32", torch.bfloat16: "quantized_gated_bf16"}


class Weights(Structure):
    """`struct Weights` of packed.hpp: a layer, for the kernels."""

    _fields_ = [("packed", c_void_p), ("bias", c_void_p), ("order", c_void_p),
                *((name, c_int32) for name in ("columns", "depth", "inner", "group", "bits", "scale_bytes", "offsets",
                                               "zero", "int8"))]


class _PackedLinear(nn.Module):
    """What plain and gated layers share: the packed matrix, and the call."""

    def __init__(self, packed: PackedMatrix, bias: Tensor | None, dtype: torch.dtype, out_dtype: torch.dtype,
                 activations: Activations, function: str, memory: LargePages | None) -> None:
        super().__init__()
        if memory is not None:
            packed = replace(packed, packed=memory.keep(packed.packed))
        assert activations in ("exact", "int8")
        self.packed, self.dtype, self.out_dtype, self.activations = packed, dtype, out_dtype, activations
        self.out_features, self.in_features = packed.columns, packed.depth
        self._kernels = library()
        self._bias = bias       # float32, of all columns of all panels
        self.weights = _weights(packed, bias, activations)
        self.nbytes = packed.nbytes + (0 if bias is None else bias.nbytes)
        self._function, self._scratch = _functions(self._kernels)[function], _functions(self._kernels)["scratch"]
        self._widens = dtype is torch.bfloat16 and bool(self._kernels.quantized_widens())

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] of the layer's dtype, rows may be apart -> [T, N] in `out_dtype`."""
        if x.dtype is not self.dtype or x.dim() != 2 or x.shape[1] != self.in_features:     # C++ cannot notice
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, not {self.dtype} [T, {self.in_features}]")
        x = x.float() if self._widens else x
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        y = torch.empty(rows, self.out_features, dtype=self.out_dtype)
        reference = byref(self.weights)
        needed = self._scratch(reference, rows, self.dtype is torch.bfloat16)
        scratch = torch.empty(needed, dtype=torch.uint8)
        self._function(reference, x.data_ptr(), x.stride(0), y.data_ptr(), self.out_features, rows, scratch.data_ptr())
        return y

    def extra_repr(self) -> str:
        return (f"{self.in_features} -> {self.out_features}, {self.packed.bits} bits, groups of {self.packed.group}, "
                f"{self.activations}, {self.nbytes:,} bytes")


class CpuQuantizedLinear(_PackedLinear):
    """y = x W^T + b, with W packed."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype, activations: Activations,
                 out_dtype: torch.dtype | None = None, memory: LargePages | None = None) -> None:
        """bias [N] or None; `dtype`: of x, float32 or bfloat16; `out_dtype`: of y, the same unless given.

        `memory`: the model's, for the packed matrix; its own if None. Raises BuildError where there are no kernels.
        """
        panel = library().quantized_panel()
        if bias is not None:
            bias = F.pad(bias.detach().float(), (0, -matrix.shape[0] % panel))
        out_dtype = out_dtype or dtype
        super().__init__(pack(matrix, panel), bias, dtype, out_dtype, activations, _FUNCTIONS[dtype, out_dtype],
                         memory)


class CpuQuantizedGatedLinear(_PackedLinear):
    """silu(x A^T) * (x B^T): gate and up are packed by turns, so that one tile computes both and writes the result."""

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype, activations: Activations,
                 bias: Tensor | None = None, memory: LargePages | None = None) -> None:
        """matrix [2 N, K]: the N rows of the gate, then those of up; so is bias [2 N]. Raises BuildError."""
        panel = library().quantized_panel()
        if bias is not None:
            bias = interleave(bias.detach().float().unsqueeze(1), panel // 2).squeeze(1).contiguous()
        super().__init__(pack(matrix, panel, gated=True), bias, dtype, dtype, activations, _GATED_FUNCTIONS[dtype],
                         memory)


class CpuQuantizedEmbedding(nn.Module):
    """Rows of a packed matrix: the output matrix's own memory, where a model has one for both."""

    def __init__(self, packed: PackedMatrix, dtype: torch.dtype) -> None:
        """packed [vocabulary, hidden], not gated; `dtype`: the model's."""
        super().__init__()
        self.packed, self.dtype = packed, dtype
        self._weights = _weights(packed, None, "exact")
        self._function = _functions(library())["lookup"]

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [T], int64 -> [T, hidden]. Raises IndexError for an id that is no row."""
        ids = input_ids.contiguous()
        assert ids.dtype is torch.int64 and ids.dim() == 1
        rows = torch.empty(ids.numel(), self.packed.depth, dtype=self.dtype)
        wrong = self._function(byref(self._weights), ids.data_ptr(), ids.numel(), rows.data_ptr(),
                               self.dtype is torch.bfloat16)
        if wrong >= 0:
            raise IndexError(f"token {int(ids[wrong])} is not one of {self.packed.columns}")
        return rows


def kernels() -> ctypes.CDLL:
    """The library that layers are packed for. Raises BuildError."""
    return library()


def _weights(packed: PackedMatrix, bias: Tensor | None, activations: Activations) -> Weights:
    """The structure; the caller keeps what it points to."""
    addresses = [None if x is None else x.data_ptr() for x in (packed.packed, bias, packed.order)]
    return Weights(*addresses, packed.columns, packed.depth, packed.inner, packed.group, packed.bits,
                   packed.scale_bytes, packed.offsets, packed.zero, activations == "int8")


@cache
def _functions(kernels: ctypes.CDLL) -> dict[str, ctypes._NamedFuncPointer]:
    product: list[Any] = [POINTER(Weights), c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p]
    signatures: dict[str, tuple[str, list[Any], Any]] = {
        name: (name, product, None) for name in (*_FUNCTIONS.values(), *_GATED_FUNCTIONS.values())}
    signatures["scratch"] = ("quantized_scratch_bytes", [POINTER(Weights), c_int64, c_int32], c_int64)
    signatures["lookup"] = ("quantized_lookup", [POINTER(Weights), c_void_p, c_int64, c_void_p, c_int32], c_int64)
    functions = {}
    for key, (name, argtypes, restype) in signatures.items():
        functions[key] = getattr(kernels, name)
        functions[key].argtypes, functions[key].restype = argtypes, restype
    return functions
