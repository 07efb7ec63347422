"""Attention by the Triton kernels, behind the signature that all of this milestone's kernels share."""
from __future__ import annotations

import torch
from torch import Tensor

from m4_flash_attn.metadata import FlashMetadata

from .decode import paged_decode
from .prefill import paged_prefill


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: FlashMetadata, scale: float,
           window: int | None = None, num_sinks: int = 0) -> Tensor:
    """q [T, H_q, D] over one layer's caches [num_slots, H_kv, D] -> [T, H_q, D]; keys and values are stored already.

    Sequences in front that have one new token take the split-KV kernel, all behind them the other: what a decode
    gives does not depend on whether somebody's prompt runs in the same step.
    """
    n, out = metadata.num_decodes, torch.empty_like(q, memory_format=torch.contiguous_format)
    if n > 0:
        paged_decode(q[:n], k_cache, v_cache, metadata.seq_lens[:n], metadata.block_table[:n], metadata.block_size,
                     metadata.max_seq_len, scale, window, num_sinks, out=out[:n])
    if n < len(metadata.seq_lens):
        paged_prefill(q, k_cache, v_cache, metadata.query_starts[n:], metadata.seq_lens[n:], metadata.block_table[n:],
                      metadata.block_size, metadata.max_query_len, scale, window, num_sinks, out=out)
    return out
