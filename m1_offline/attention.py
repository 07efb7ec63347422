"""Attention over the contiguous cache: store the new keys and values, then read the whole row back.

T tokens in the step, B sequences, H_q / H_kv query / key-value heads, G = H_q / H_kv, D head size.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence, query_start_loc

from .kv_cache import CacheRows, KVCache


@dataclass(frozen=True)
class ContiguousMetadata(AttentionMetadata):
    """Where each sequence's keys and values lie, and where this step's new ones go."""

    seq_lens: list[int]             # B: length of each sequence once the step's tokens are stored
    first_slots: list[int]          # B: slot of each sequence's token 0
    slot_mapping: Tensor            # T: slot of each new token


class ContiguousAttention(AttentionBackend):
    """One row of the cache per sequence; one SDPA call per sequence."""

    def __init__(self, kv_cache: KVCache, rows: CacheRows) -> None:
        self.kv_cache = kv_cache
        self.rows = rows

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> ContiguousMetadata:
        first_slots = [self.rows.first_slot(s.sequence) for s in scheduled]
        slots: list[int] = []
        for s, first in zip(scheduled, first_slots, strict=True):
            slots += range(first + s.start, first + s.end)
        return ContiguousMetadata(query_start_loc(scheduled), [s.end for s in scheduled], first_slots,
                                  torch.tensor(slots, device=self.kv_cache.k.device))

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, ContiguousMetadata)
        self.kv_cache.store(layer_idx, k, v, metadata.slot_mapping)
        keys, values = self.kv_cache.k[layer_idx], self.kv_cache.v[layer_idx]
        outputs = []
        start = 0
        for stop, length, first in zip(metadata.query_start_loc[1:], metadata.seq_lens, metadata.first_slots,
                                       strict=True):
            row = slice(first, first + length)
            outputs.append(attend(q[start:stop], keys[row].to(q.dtype), values[row].to(q.dtype)))
            start = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [n, H_q, D], the newest n of the L tokens in k, v [L, H_kv, D] -> [n, H_q, D], causal."""
    n, num_heads, head_dim = q.shape
    length, num_kv_heads, _ = k.shape
    k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)       # [1, H_kv, L, D]
    if n == 1:
        # The G query heads that share a key-value head become the query dimension: no copy of k and v, no mask.
        grouped = q.view(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, k, v).reshape(1, num_heads, head_dim)
    q = q.transpose(0, 1).unsqueeze(0)
    # With earlier tokens in the cache, query i is token L - n + i; SDPA's own causal mask would start at 0.
    mask = None if n == length else torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
