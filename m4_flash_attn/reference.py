"""Attention over the paged cache by definition: scores, a mask, a softmax. Slow, and what every kernel must equal.

Query i of a sequence's n newest tokens, of L in all, stands at position p = L - n + i. It sees the keys j with

    j <= p   and   (p - j < window   or   j < num_sinks)          (no window: j <= p alone)

Nothing is tiled here and nothing is skipped, so that a kernel's mistake cannot be repeated.

T tokens in the step, B sequences, n new tokens of one of them and L in all, H_q / H_kv query / key-value heads,
D head size.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

# (tokens in the cache before the step, tokens of the step): whole prompts, chunks behind a prefix, decodes.
MIXED = ((0, 7), (20, 1), (5, 3), (0, 1), (31, 1), (16, 17), (0, 33), (47, 2))


def visible(queries: Tensor, keys: Tensor, window: int | None = None, num_sinks: int = 0) -> Tensor:
    """Mask [n, t], True where the query at position `queries[i]` sees the key at `keys[j]`.

    `window` counts a query's own token, as `sliding_window` does in Mistral's configuration; the first `num_sinks`
    tokens are seen from everywhere (StreamingLLM, arXiv 2309.17453).
    """
    distance = queries.unsqueeze(1) - keys
    mask = distance >= 0
    return mask if window is None else mask & ((distance < window) | (keys < num_sinks))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [n, H_q, D]; k, v [L, H_kv, D]; mask [n, L] -> [n, H_q, D]. A query that sees nothing gets 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q, k) * scale
    probabilities = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    # A row of -inf alone has become NaN. Only masked places are set to 0, so a NaN that was read stays visible.
    return torch.einsum("hnl,lhd->nhd", probabilities.masked_fill(~mask, 0), v)


def paged_attention_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, query_start_loc: Tensor | Sequence[int],
                              seq_lens: Tensor, block_table: Tensor, block_size: int, scale: float,
                              window: int | None = None, num_sinks: int = 0,
                              compute_dtype: torch.dtype = torch.float64) -> Tensor:
    """q [T, H_q, D] over caches [num_slots, H_kv, D] -> [T, H_q, D] in `compute_dtype` (float64 or float32).

    query_start_loc [B + 1], seq_lens [B] (with the step's tokens, which are stored already) and block_table
    [B, max_blocks] as in `m3_paged_kv.metadata`. A row whose sequence has no keys (seq_len 0: padding) gets 0.
    """
    out = torch.zeros(q.shape, dtype=compute_dtype, device=q.device)
    for i, (start, stop) in enumerate(pairwise(map(int, query_start_loc))):
        length = int(seq_lens[i])
        tokens = torch.arange(length, device=q.device)
        slots = block_table[i].long()[tokens // block_size] * block_size + tokens % block_size
        positions = torch.arange(length - (stop - start), length, device=q.device)
        mask = visible(positions, tokens, window, num_sinks)
        queries, keys, values = (x.to(compute_dtype) for x in (q[start:stop], k_cache[slots], v_cache[slots]))
        out[start:stop] = masked_attention(queries, keys, values, mask, scale)
    return out


@dataclass(frozen=True)
class PagedBatch:
    """One step's attention over a paged cache in which its keys and values are stored already."""

    q: Tensor                   # [T, H_q, D]; q, k, v are strided views of one tensor, as a fused projection gives them
    k: Tensor                   # [T, H_kv, D]: the new tokens' keys, equal to k_cache[slot_mapping]
    v: Tensor                   # [T, H_kv, D]
    k_cache: Tensor             # [num_slots, H_kv, D]; NaN in every slot that belongs to no token
    v_cache: Tensor             # [num_slots, H_kv, D]
    query_start_loc: Tensor     # [B + 1] int32
    seq_lens: Tensor            # [B] int32
    block_table: Tensor         # [B, max_blocks] int32, -1 beyond the last
    slot_mapping: Tensor        # [T] int32
    block_size: int
    max_query_len: int
    scale: float

    def expected(self, window: int | None = None, num_sinks: int = 0) -> Tensor:
        """What attention over this batch must give: [T, H_q, D] in float64."""
        return paged_attention_reference(self.q, self.k_cache, self.v_cache, self.query_start_loc, self.seq_lens,
                                         self.block_table, self.block_size, self.scale, window, num_sinks)


def random_paged_batch(sequences: Sequence[tuple[int, int]] = MIXED, num_heads: int = 4, num_kv_heads: int = 2,
                       head_dim: int = 16, block_size: int = 16, dtype: torch.dtype = torch.float32,
                       device: torch.device | str = "cpu", seed: int = 0) -> PagedBatch:
    """A batch of (tokens computed before, new tokens) per sequence, in blocks scattered over the cache.

    Values are normal. The same seed gives the same values on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [computed + new for computed, new in sequences]
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 3                # some blocks are nobody's
    blocks = torch.randperm(num_blocks, generator=generator, dtype=torch.int32).split([*counts, 3])[:-1]
    block_table = torch.full((len(sequences), max(counts)), -1, dtype=torch.int32)
    for row, own in zip(block_table, blocks, strict=True):
        row[:len(own)] = own
    slots = [own.repeat_interleave(block_size)[:length] * block_size + torch.arange(length) % block_size
             for own, length in zip(blocks, lengths, strict=True)]
    caches = torch.full((2, num_blocks * block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    used = torch.cat(slots)
    caches[:, used] = torch.randn(2, len(used), num_kv_heads, head_dim, generator=generator).to(dtype)
    slot_mapping = torch.cat([s[computed:] for s, (computed, _) in zip(slots, sequences, strict=True)]).int()
    queries = torch.randn(len(slot_mapping), num_heads, head_dim, generator=generator).to(dtype)
    qkv = torch.cat([queries, caches[0, slot_mapping], caches[1, slot_mapping]], dim=1).to(device)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    new = [n for _, n in sequences]
    starts, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, *accumulate(new)], lengths))
    return PagedBatch(q, k, v, caches[0].to(device), caches[1].to(device), starts, ends, block_table.to(device),
                      slot_mapping.to(device), block_size, max(new), head_dim ** -0.5)
