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
from itertools import pairwise

import torch
from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv.block_tables import BlockTables
from m3_paged_kv.metadata import PagedMetadata, paged_metadata

from .online_softmax import tiled_attention
from .reference import masked_attention, visible

AttendOne = Callable[[Tensor, Tensor, Tensor], Tensor]      # q [n, H_q, D]; k, v [L, H_kv, D] -> [n, H_q, D]


class ReadableAttention(AttentionBackend):
    """For reading: each sequence by itself, its keys and values gathered, then any function that attends."""

    def __init__(self, cache: SlotCache, tables: BlockTables, attend: AttendOne) -> None:
        self.cache, self.tables, self.attend = cache, tables, attend

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> PagedMetadata:
        return paged_metadata(scheduled, self.tables, self.cache.device)

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, PagedMetadata)
        self.cache.store(layer_idx, k, v, metadata.slot_mapping.long())
        size = self.tables.block_size
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
