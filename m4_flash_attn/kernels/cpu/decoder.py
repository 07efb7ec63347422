"""The decoder layers and the norm behind them as one call: see decoder.cpp."""
from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p

from torch import Tensor, nn

from m0_basics.attention import AttentionBackend, AttentionMetadata

from ...attention import CpuAttention, CpuMetadata
from ...layers import FusedDecoderLayer, FusedRMSNorm, Rotary
from .linear import PackedGatedLinear, PackedLinear, Weights


class Layer(Structure):
    """`struct Layer` of decoder.cpp."""

    _fields_ = [("qkv", Weights), ("o", Weights), ("gate_up", Weights), ("down", Weights),
                ("input_norm", c_void_p), ("post_attention_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p)]


class Decoder(Structure):
    """`struct Decoder` of decoder.cpp."""

    _fields_ = [("layers", POINTER(Layer)), ("norm", c_void_p), ("num_layers", c_int32), ("hidden_size", c_int32),
                ("eps", c_float)]


class CpuDecoder(nn.Module):
    """All layers in one call where the C++ attention runs by itself; with anything around it, one by one."""

    def __init__(self, layers: Sequence[FusedDecoderLayer], norm: FusedRMSNorm) -> None:
        """The layers' linear parts are native `PackedLinear`s. `norm`: the one behind the last layer."""
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm
        assert all(layer.eps == norm.eps for layer in layers)
        array = (Layer * len(layers))(*(_layer(layer) for layer in layers))
        self._decoder = Decoder(array, _address(norm.weight, layers[0]), len(layers), norm.weight.numel(), norm.eps)

    def forward(self, x: Tensor, rotary: Rotary, backend: AttentionBackend, metadata: AttentionMetadata) -> Tensor:
        """x [T, hidden], which may be overwritten -> [T, hidden], through all layers, normed."""
        if isinstance(backend, CpuAttention) and isinstance(metadata, CpuMetadata):
            kv_cache = backend.cache.kv_cache
            backend.kernels.decoder_layers(metadata.step, self._decoder, x, rotary, kv_cache.k, kv_cache.v)
            return x
        for layer in self.layers:
            x = layer(x, rotary, backend, metadata)
        return self.norm(x)


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
    return Layer(*(part.weights for part in _linear(layer)), *(_address(norm, layer) for norm in norms))


def _address(norm: Tensor | None, layer: FusedDecoderLayer) -> int | None:
    """Where a norm's weight lies: in the layer's dtype, and kept by the module."""
    if norm is None:
        return None
    assert norm.dtype is layer.input_norm.dtype and norm.is_contiguous()
    return norm.data_ptr()
