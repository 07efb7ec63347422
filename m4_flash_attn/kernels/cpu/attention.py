"""The C++ kernels as an attention backend: one call for the whole step, over the blocks where they lie.

The kernels take the step as addresses in one array, so a plugin that reads m3's tensors needs another backend.

T tokens in the step, B sequences, H_q / H_kv query / key-value heads, D head size.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from m0_basics.attention import AttentionMetadata, ScheduledSequence, query_start_loc
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv.block_tables import BlockTables
from m4_flash_attn.layers import FusedAttention, Rotary
from m4_flash_attn.metadata import step_numbers

from .bindings import PagedKernels, Step, packed_step


@dataclass(frozen=True)
class CpuMetadata(AttentionMetadata):
    """The step as the C++ kernels take it: memory and addresses, no tensors that a plugin could read."""

    step: Step


class CpuAttention(FusedAttention):
    """The C++ kernels. The cache holds the model's dtype, and no plugin stands before it."""

    def __init__(self, cache: SlotCache, tables: BlockTables, kernels: PagedKernels) -> None:
        assert not cache.plugins, "kernels read the cache itself"
        self.cache, self.tables, self.kernels = cache, tables, kernels

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> CpuMetadata:
        starts = query_start_loc(scheduled)
        packed = step_numbers(starts, scheduled, self.tables)
        return CpuMetadata(starts, packed_step(starts[-1], len(scheduled), packed))

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, CpuMetadata)
        caches = self._caches(layer_idx)
        self.kernels.store_kv(metadata.step, k, v, *caches)
        return self.kernels.attend(metadata.step, q, *caches).view(q.shape)

    def forward_qkv(self, layer_idx: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
                    rotary: Rotary, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, CpuMetadata)
        caches = self._caches(layer_idx)
        self.kernels.rotate_store_kv(metadata.step, qkv, norms, eps, rotary, *caches)
        return self.kernels.attend(metadata.step, qkv, *caches)

    def _caches(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.cache.kv_cache.k[layer_idx], self.cache.kv_cache.v[layer_idx]
