"""The decoder layers as one call: see decoder.cpp."""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_void_p

from torch import Tensor, nn

from m0_basics.attention import AttentionBackend, AttentionMetadata

from ...attention import CpuAttention, CpuMetadata
from ...layers import FusedDecoderLayer, Rotary
from .linear import PackedGatedLinear, PackedLinear, Weights


class Layer(Structure):
    """`struct Layer` of decoder.cpp."""

    _fields_ = [("qkv", Weights), ("o", Weights), ("gate_up", Weights), ("down", Weights),
                ("input_norm", c_void_p), ("post_attention_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p)]


class CpuDecoder(nn.Module):
    """All layers in one call where the C++ attention runs by itself; with anything around it, one by one."""

    def __init__(self, layers: Sequence[FusedDecoderLayer]) -> None:
        """The layers' linear parts are native `PackedLinear`s."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.eps = layers[0].eps
        self._array = (Layer * len(layers))(*(_layer(layer) for layer in layers))

    def forward(self, x: Tensor, rotary: Rotary, backend: AttentionBackend, metadata: AttentionMetadata) -> Tensor:
        """x [T, hidden] -> the same tensor, through all layers."""
        if isinstance(backend, CpuAttention) and isinstance(metadata, CpuMetadata):
            kv_cache = backend.cache.kv_cache
            backend.kernels.decoder_layers(metadata.step, self._array, self.eps, x, rotary, kv_cache.k, kv_cache.v)
            return x
        for layer in self.layers:
            x = layer(x, rotary, backend, metadata)
        return x


def can_stack(layers: Sequence[nn.Module]) -> bool:
    """Whether the layers are what `CpuDecoder` takes."""
    return all(isinstance(layer, FusedDecoderLayer) and _is_native(layer) for layer in layers)


def _linear(layer: FusedDecoderLayer) -> tuple[nn.Module, ...]:
    return layer.qkv_proj, layer.o_proj, layer.gated, layer.down_proj


def _is_native(layer: FusedDecoderLayer) -> bool:
    return all(isinstance(part, PackedLinear | PackedGatedLinear) and part.weights is not None
               for part in _linear(layer))


def _layer(layer: FusedDecoderLayer) -> Layer:
    norms = (layer.input_norm, layer.post_attention_norm, *(layer.norms or (None, None)))
    dtype = layer.input_norm.dtype
    assert all(norm is None or (norm.dtype is dtype and norm.is_contiguous()) for norm in norms)
    pointers = (None if norm is None else ctypes.c_void_p(norm.data_ptr()) for norm in norms)
    return Layer(*(part.weights for part in _linear(layer)), *pointers)
