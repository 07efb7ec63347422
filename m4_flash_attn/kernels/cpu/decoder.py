"""The decoder layers, the norm behind them and, in decode, the output matrix as one call: see decoder.hpp."""
from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from typing import TypeGuard

import torch
from torch import Tensor, nn

from m0_basics.attention import AttentionBackend, AttentionMetadata
from m4_flash_attn.layers import FusedDecoderLayer, FusedRMSNorm, Rotary

from .attention import CpuAttention, CpuMetadata
from .linear import PackedGatedLinear, PackedLinear, Weights


class Layer(Structure):
    """`struct Layer` of decoder.hpp."""

    _fields_ = [("qkv", Weights), ("o", Weights), ("gate_up", Weights), ("down", Weights),
                ("input_norm", c_void_p), ("post_attention_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p)]


class Decoder(Structure):
    """`struct Decoder` of decoder.hpp."""

    _fields_ = [("layers", POINTER(Layer)), ("norm", c_void_p), ("head", Weights), ("num_layers", c_int32),
                ("hidden_size", c_int32), ("eps", c_float)]


class CpuDecoder(nn.Module):
    """All layers in one call where the C++ attention runs by itself; with anything around it, one by one."""

    def __init__(self, layers: Sequence[FusedDecoderLayer], norm: FusedRMSNorm,
                 head: PackedLinear | None = None) -> None:
        """Layers that `can_stack`, the norm behind the last of them, and an output matrix that it `can_end_with`."""
        super().__init__()
        self.layers, self.norm, self.has_head = nn.ModuleList(layers), norm, head is not None
        assert all(layer.eps == norm.eps for layer in layers)
        array = (Layer * len(layers))(*(_layer(layer) for layer in layers))
        weights = Weights() if head is None or head.weights is None else head.weights
        self._decoder = Decoder(array, _address(norm.weight, layers[0]), weights, len(layers), norm.weight.numel(),
                                norm.eps)
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
            self._logits = torch.empty(x.shape[0], self._decoder.head.columns, dtype=torch.float32)
        logits = self._logits[:x.shape[0]]
        self._run(x, rotary, backend, metadata, logits)
        return logits

    def _run(self, x: Tensor, rotary: Rotary, backend: CpuAttention, metadata: CpuMetadata,
             logits: Tensor | None) -> None:
        kv_cache = backend.cache.kv_cache
        backend.kernels.decoder_layers(metadata.step, self._decoder, x, rotary, kv_cache.k, kv_cache.v, logits)


def can_end_with(head: nn.Module, layers: Sequence[FusedDecoderLayer]) -> TypeGuard[PackedLinear]:
    """Whether the decoder's call can end with this output matrix."""
    return (isinstance(head, PackedLinear) and head.weights is not None and head.out_dtype is torch.float32
            and head.dtype is layers[0].input_norm.dtype)


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
