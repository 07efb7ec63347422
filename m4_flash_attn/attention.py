"""Flash attention over the paged cache: kernels that read the blocks where they lie, behind one backend each.

    m3      look up slots -> copy keys and values together, padded -> SDPA over the copy
    here    one call for the whole step: every sequence, prefill and decode, each at its own length

What a kernel needs is what m3's metadata says: where each sequence's rows begin, how long it is, its block table.

T tokens in the step, B sequences, H_q / H_kv query / key-value heads, D head size.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m0_basics.attention import AttentionMetadata, ScheduledSequence
from m0_basics.model_spec import ModelSpec
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager
from m3_paged_kv.metadata import PagedMetadata, paged_metadata

from .kernels.cpu.ops import CpuOps, Step, make_step
from .layers import FusedAttention, Rotary


@dataclass(frozen=True)
class CpuMetadata(PagedMetadata):
    """m3's metadata, and the same as the C++ kernels take it."""

    step: Step


class CpuAttention(FusedAttention):
    """The C++ kernels. The cache holds the model's dtype, and no plugin stands before it."""

    def __init__(self, cache: SlotCache, manager: PagedKVCacheManager, ops: CpuOps) -> None:
        self.cache = cache
        self.manager = manager
        self.ops = ops

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> CpuMetadata:
        paged = paged_metadata(scheduled, self.manager, self.cache.device)
        starts = torch.tensor(paged.query_start_loc, dtype=torch.int32)
        return CpuMetadata(**vars(paged), step=make_step(starts, paged.seq_lens, paged.block_table, paged.slot_mapping))

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, CpuMetadata)
        k_cache, v_cache = self.cache.kv_cache.k[layer_idx], self.cache.kv_cache.v[layer_idx]
        self.ops.store_kv(metadata.step, k, v, k_cache, v_cache)
        return self.ops.attend(metadata.step, q, q.stride(0), k_cache, v_cache).view(q.shape)

    def forward_qkv(self, layer_idx: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
                    rotary: Rotary, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, CpuMetadata)
        k_cache, v_cache = self.cache.kv_cache.k[layer_idx], self.cache.kv_cache.v[layer_idx]
        self.ops.rotate_store_kv(metadata.step, qkv, norms, eps, *rotary, k_cache, v_cache)
        return self.ops.attend(metadata.step, qkv, qkv.stride(0), k_cache, v_cache)


def cpu_ops(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> CpuOps:
    """The kernels for a model. Raises BuildError."""
    return CpuOps(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, block_size, dtype,
                  spec.head_dim ** -0.5)
