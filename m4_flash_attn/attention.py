"""Flash attention over the paged cache: kernels that read the blocks where they lie, behind one backend each.

    m3      look up slots -> copy keys and values together, padded -> SDPA over the copy
    here    one call for the whole step: every sequence, prefill and decode, each at its own length

What a kernel needs is what m3's metadata says: where each sequence's rows begin, how long it is, its block table. The
C++ kernels take it as addresses in one array, so a plugin that reads m3's tensors needs another backend.

T tokens in the step, B sequences, n new tokens of one of them and L in all, H_q / H_kv query / key-value heads,
D head size.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence, query_start_loc
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager
from m3_paged_kv.metadata import PagedMetadata, paged_metadata

from .kernels.cpu.ops import PagedKernels, Step, packed_step
from .layers import FusedAttention, Rotary
from .metadata import step_numbers
from .online_softmax import tiled_attention
from .reference import masked_attention, visible

AttendOne = Callable[[Tensor, Tensor, Tensor], Tensor]      # q [n, H_q, D]; k, v [L, H_kv, D] -> [n, H_q, D]


@dataclass(frozen=True)
class CpuMetadata(AttentionMetadata):
    """The step as the C++ kernels take it: memory and addresses, no tensors that a plugin could read."""

    step: Step


class CpuAttention(FusedAttention):
    """The C++ kernels. The cache holds the model's dtype, and no plugin stands before it."""

    def __init__(self, cache: SlotCache, manager: PagedKVCacheManager, kernels: PagedKernels) -> None:
        assert not cache.plugins, "kernels read the cache itself"
        self.cache, self.manager, self.kernels = cache, manager, kernels

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> CpuMetadata:
        starts = query_start_loc(scheduled)
        numbers = step_numbers(starts, scheduled, self.manager)
        return CpuMetadata(starts, packed_step(starts[-1], len(scheduled), *numbers))

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


class ReadableAttention(AttentionBackend):
    """For reading: each sequence by itself, its keys and values gathered, then any function that attends."""

    def __init__(self, cache: SlotCache, manager: PagedKVCacheManager, attend: AttendOne) -> None:
        self.cache, self.manager, self.attend = cache, manager, attend

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> PagedMetadata:
        return paged_metadata(scheduled, self.manager, self.cache.device)

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, PagedMetadata)
        self.cache.store(layer_idx, k, v, metadata.slot_mapping.long())
        size = self.manager.block_size
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for i, (start, stop) in enumerate(pairwise(metadata.query_start_loc)):
            tokens = torch.arange(int(metadata.seq_lens[i]), device=q.device)
            slots = metadata.block_table[i].long()[tokens // size] * size + tokens % size
            out[start:stop] = self.attend(q[start:stop], *self.cache.read(layer_idx, slots, q.dtype))
        return out


def attend_naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: all scores, a mask, a softmax."""
    length = k.shape[0]
    mask = visible(torch.arange(length - q.shape[0], length, device=q.device), torch.arange(length, device=q.device))
    return masked_attention(q, k, v, mask, q.shape[-1] ** -0.5)


def attend_tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The online softmax, tile by tile, in plain PyTorch."""
    return tiled_attention(q, k, v).to(q.dtype)
