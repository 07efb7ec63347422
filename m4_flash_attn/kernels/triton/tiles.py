"""FlashAttention's inner loop over a paged cache: one tile of queries against its keys, tile by tile.

    for each tile of keys and values:            scores of a [BLOCK_M, BLOCK_N] tile live in registers only
        S = scale * Q K^T, -inf where hidden
        m' = max(m, rowmax(S))                   the running maximum
        P = exp(S - m')
        l = l * exp(m - m') + rowsum(P)          what was summed under the old maximum is scaled to the new one
        O = O * exp(m - m') + P V
        m = m'
    result: O / l                                (algorithm 1 of FlashAttention-2, arXiv 2307.08691)

The query heads of one KV head share its keys, so they are rows of one tile: row r is query r // GROUP of the tile,
head r % GROUP of the group. Each key is then read once for all of them. A decoding sequence is a tile of one query.

BLOCK_M rows (query, head of the group), BLOCK_N keys per tile, GROUP = H_q / H_kv, HEAD_DIM D, BLOCK_D the next power
of two (Triton's tiles have such sides), BLOCK_SIZE tokens per block of the cache.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible_tiles(first_position, last_position, WINDOW: tl.constexpr, NUM_SINKS: tl.constexpr,
                  BLOCK_N: tl.constexpr):
    """Which tiles of keys the queries at [first_position, last_position] see.

        tiles  [ sinks ][ behind every window: skipped ][ visible ... last_position ]

    Returns (number of tiles to visit, how many of them hold sinks, how many are skipped after those).
    """
    num_tiles = tl.cdiv(last_position + 1, BLOCK_N)
    if WINDOW == 0:
        return num_tiles, num_tiles, 0
    oldest = tl.maximum(first_position - WINDOW + 1, 0)             # of the keys that the first query's window holds
    num_sink_tiles = tl.cdiv(NUM_SINKS, BLOCK_N)
    num_skipped = tl.maximum(oldest // BLOCK_N - num_sink_tiles, 0)
    return num_tiles - num_skipped, num_sink_tiles, num_skipped


@triton.jit
def attend_tiles(q, positions, first, stop, num_sink_tiles, num_skipped, seq_len, k_ptr, v_ptr, table_ptr, slot_stride,
                 scale_log2, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, NUM_SINKS: tl.constexpr,
                 COMPUTE: tl.constexpr):
    """Visits [first, stop) of the visible tiles; returns m and l [BLOCK_M] and O [BLOCK_M, BLOCK_D], float32.

    q [BLOCK_M, BLOCK_D] at `positions` [BLOCK_M]; k_ptr, v_ptr: slot 0 of this KV head; table_ptr: this sequence's row
    of the block table. `scale_log2` is scale * log2(e): the GPU has exp2, and 2^(x log2(e)) = e^x.
    """
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dims = tl.arange(0, BLOCK_D)
    for visit in range(first, stop):
        # 1. The keys of this tile, by their positions in the sequence. Past the sinks comes the gap.
        tile = visit + tl.where(visit >= num_sink_tiles, num_skipped, 0)
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = keys < seq_len

        # 2. Paging: position -> block -> slot. 64 bits, because a large cache has more than 2^31 elements.
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=stored, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
        offsets = slots[:, None] * slot_stride + dims[None, :]
        # Slots past the end were never written, and 0 * NaN is NaN: they are not read at all.
        readable = stored[:, None] & (dims[None, :] < HEAD_DIM)

        # 3. Scores of the tile.
        k = tl.load(k_ptr + offsets, mask=readable, other=0.0).to(COMPUTE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2

        # 4. Causality, the window, the sinks.
        distance = positions[:, None] - keys[None, :]
        visible = (distance >= 0) & stored[None, :]
        if WINDOW > 0:
            visible = visible & ((distance < WINDOW) | (keys[None, :] < NUM_SINKS))
        scores = tl.where(visible, scores, float("-inf"))

        # 5. The online softmax. A row that has seen no key yet keeps -inf as its maximum; it is shifted by 0, for
        #    -inf - -inf is not a number.
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(p, axis=1)

        # 6. The values of the tile, weighted.
        v = tl.load(v_ptr + offsets, mask=readable, other=0.0).to(COMPUTE)
        acc = acc * correction[:, None] + tl.dot(p.to(COMPUTE), v, input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit
def normalise(acc, row_sum):
    """O / l, and 0 for a row that has seen no key: the padding of a CUDA graph's batch."""
    return acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
