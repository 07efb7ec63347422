"""Paged attention on a GPU: one kernel rotates and stores, one attends, both over the blocks where they lie.

Importing this module needs Triton, which torch brings where it brings CUDA.

T tokens in the step, H_q / H_kv query / key-value heads, D head size.
"""
from __future__ import annotations

from torch import Tensor

from m0_basics.attention import AttentionMetadata, ScheduledSequence
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv.block_tables import BlockTables
from m4_flash_attn.layers import FusedAttention, Rotary
from m4_flash_attn.metadata import FlashMetadata, flash_metadata

from ..flash_attn import Attend
from . import attention as triton_attention
from .rotary import rotary_and_store, store_kv


class GpuAttention(FusedAttention):
    """Stores by Triton's kernels, attends by `attend`: Triton's, or a library's behind the same signature."""

    def __init__(self, cache: SlotCache, tables: BlockTables, attend: Attend = triton_attention.attend,
                 window: int | None = None, num_sinks: int = 0) -> None:
        """A query sees `window` keys and the first `num_sinks`; all where it is None. No plugin stands in between."""
        assert not cache.plugins, "kernels read the cache itself"
        self.cache, self.tables, self.attend = cache, tables, attend
        self.window, self.num_sinks = window, num_sinks
        # Some libraries load whole blocks and multiply what lies behind the end by 0: it must not be NaN.
        cache.kv_cache.k.zero_()
        cache.kv_cache.v.zero_()

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> FlashMetadata:
        return flash_metadata(scheduled, self.tables, self.cache.device)

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, FlashMetadata)
        store_kv(k, v, metadata.slot_mapping, *self._caches(layer_idx))
        return self._attend(layer_idx, q, metadata)

    def forward_qkv(self, layer_idx: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
                    rotary: Rotary, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, FlashMetadata)
        q = rotary_and_store(qkv, *rotary, metadata.slot_mapping, *self._caches(layer_idx), norms, eps)
        return self._attend(layer_idx, q, metadata).flatten(1)

    def _attend(self, layer_idx: int, q: Tensor, metadata: FlashMetadata) -> Tensor:
        return self.attend(q, *self._caches(layer_idx), metadata, q.shape[-1] ** -0.5, self.window, self.num_sinks)

    def _caches(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.cache.kv_cache.k[layer_idx], self.cache.kv_cache.v[layer_idx]
