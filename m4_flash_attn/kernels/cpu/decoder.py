"""The decoder layers, the norm behind them and, in decode, the output matrix as one call: see decoder.hpp.

What the linear layers are made of is a policy, as it is in C++: their weights' structure and the library that was
compiled for it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import CDLL, POINTER, Structure, c_float, c_int32, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from m0_basics.attention import AttentionBackend, AttentionMetadata
from m4_flash_attn.layers import FusedDecoderLayer, FusedRMSNorm, Rotary

from .attention import CpuAttention, CpuMetadata
from .bindings import NativeDecoder
from .linear import PackedGatedLinear, PackedLinear, Weights, kernels


@dataclass(frozen=True)
class Products:
    """What the call multiplies with."""

    structure: type[Structure]                              # of a layer's weights; it has `columns`
    weights_of: Callable[[nn.Module], Structure | None]     # of a linear layer; None where it has none for the call
    kernels: Callable[[], CDLL]                             # the library that the layers were packed for


def weights_of(layer: nn.Module) -> Weights | None:
    """A linear layer's weights, where they are packed for linear.hpp."""
    return layer.weights if isinstance(layer, PackedLinear | PackedGatedLinear) else None


PACKED = Products(Weights, weights_of, kernels)


@cache
def _structures(weights: type[Structure]) -> tuple[Any, Any]:
    """`struct Layer` and `struct Decoder` of decoder.hpp, for a kind of weights."""
    class Layer(Structure):
        _fields_ = [*((name, weights) for name in ("qkv", "o", "gate_up", "down")),
                    *((name, c_void_p) for name in ("input_norm", "post_attention_norm", "q_norm", "k_norm"))]

    class Decoder(Structure):
        _fields_ = [("layers", POINTER(Layer)), ("norm", c_void_p), ("head", weights), ("num_layers", c_int32),
                    ("hidden_size", c_int32), ("eps", c_float)]

    return Layer, Decoder


class CpuDecoder(nn.Module):
    """All layers in one call where the C++ attention runs by itself; with anything around it, one by one."""

    def __init__(self, layers: Sequence[FusedDecoderLayer], norm: FusedRMSNorm, head: nn.Module | None = None,
                 products: Products = PACKED) -> None:
        """Layers that `can_stack`, the norm behind the last of them, and an output matrix that it `can_end_with`."""
        super().__init__()
        self.layers, self.norm, self.has_head = nn.ModuleList(layers), norm, head is not None
        assert all(layer.eps == norm.eps for layer in layers)
        layer_type, decoder_type = _structures(products.structure)
        array = (layer_type * len(layers))(*(_layer(layer_type, layer, products) for layer in layers))
        weights: Any = products.structure() if head is None else products.weights_of(head)
        structure = decoder_type(array, _address(norm.weight, layers[0]), weights, len(layers), norm.weight.numel(),
                                 norm.eps)
        self._native, self._vocab = NativeDecoder(structure, products.kernels()), weights.columns
        self._logits = torch.empty(0, weights.columns, dtype=torch.float32)

    def forward(self, x: Tensor, rotary: Rotary, backend: AttentionBackend, metadata: AttentionMetadata) -> Tensor:
        """x [T, hidden], which may be overwritten -> [T, hidden], through all layers, normed."""
        if isinstance(backend, CpuAttention) and isinstance(metadata, CpuMetadata):
            self._run(x, rotary, backend, metadata, None)
            return x
        for layer in self.layers:
            x = layer(x, rotary, backend, metadata)
        return self.norm(x)

    def decode(self, x: Tensor, rotary: Rotary, backend: CpuAttention, metadata: CpuMetadata) -> Tensor:
        """The same and through the output matrix, which it has: x [T, hidden] -> logits [T, vocab], float32.

        They are valid until the next call: fresh memory for each step would cost a page fault for every 4 KB.
        """
        assert self.has_head
        if x.shape[0] > self._logits.shape[0]:
            self._logits = torch.empty(x.shape[0], self._vocab, dtype=torch.float32)
        logits = self._logits[:x.shape[0]]
        self._run(x, rotary, backend, metadata, logits)
        return logits

    def _run(self, x: Tensor, rotary: Rotary, backend: CpuAttention, metadata: CpuMetadata,
             logits: Tensor | None) -> None:
        kv_cache = backend.cache.kv_cache
        backend.kernels.decoder_layers(metadata.step, self._native, x, rotary, kv_cache.k, kv_cache.v, logits)


def can_end_with(head: nn.Module, layers: Sequence[FusedDecoderLayer], products: Products = PACKED) -> bool:
    """Whether the decoder's call can end with this output matrix."""
    return (products.weights_of(head) is not None and getattr(head, "out_dtype", None) is torch.float32
            and getattr(head, "dtype", None) is layers[0].input_norm.dtype)


def can_stack(layers: Sequence[nn.Module], products: Products = PACKED) -> bool:
    """Whether the layers are what `CpuDecoder` takes."""
    return all(isinstance(layer, FusedDecoderLayer)
               and all(products.weights_of(part) is not None for part in _linear(layer)) for layer in layers)


def _linear(layer: FusedDecoderLayer) -> tuple[nn.Module, ...]:
    return layer.qkv_proj, layer.o_proj, layer.gated, layer.down_proj


def _layer(layer_type: Any, layer: FusedDecoderLayer, products: Products) -> Any:
    norms = (layer.input_norm, layer.post_attention_norm, *(layer.norms or (None, None)))
    return layer_type(*map(products.weights_of, _linear(layer)), *(_address(norm, layer) for norm in norms))


def _address(norm: Tensor | None, layer: FusedDecoderLayer) -> int | None:
    """Where a norm's weight lies: in the layer's dtype, and kept by the module."""
    if norm is None:
        return None
    assert norm.dtype is layer.input_norm.dtype and norm.is_contiguous()
    return norm.data_ptr()
