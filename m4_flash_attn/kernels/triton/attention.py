"""Attention by the Triton kernels, behind the signature that all of this milestone's kernels share."""
from __future__ import annotations

from torch import Tensor

from m4_flash_attn.metadata import FlashMetadata

from .decode import paged_decode
from .prefill import paged_prefill


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: FlashMetadata, scale: float,
           window: int | None = None, num_sinks: int = 0) -> Tensor:
    """q [T, H_q, D] over one layer's caches [num_slots, H_kv, D] -> [T, H_q, D]; keys and values are stored already.

    A step of decodes alone takes the split-KV kernel. In a mixed step the decodes are prefills of one token.
    """
    if metadata.max_query_len == 1:
        return paged_decode(q, k_cache, v_cache, metadata.seq_lens, metadata.block_table, metadata.block_size,
                            metadata.max_seq_len, scale, window, num_sinks)
    return paged_prefill(q, k_cache, v_cache, metadata.query_starts, metadata.seq_lens, metadata.block_table,
                         metadata.block_size, metadata.max_query_len, scale, window, num_sinks)
