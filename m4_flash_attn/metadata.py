"""The step's metadata as kernels take it: what m3 has in several tensors, cut from one.

    [ query starts | lengths | slots | block table ]      one list, one array, one copy to the device

Most of what a small tensor costs is making it. In a decode step of one sequence all of this is a dozen numbers.

B sequences in the step, T tokens.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m0_basics.attention import ScheduledSequence, query_start_loc
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager
from m3_paged_kv.metadata import PagedMetadata

IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class FlashMetadata(PagedMetadata):
    """m3's metadata. The two maxima are host numbers: grids are chosen by them, and reading a GPU stops it."""

    query_starts: Tensor            # B + 1, int32: `query_start_loc` on the device
    block_size: int
    max_seq_len: int                # no sequence is longer; under a CUDA graph: can ever be


def flash_metadata(scheduled: list[ScheduledSequence], manager: PagedKVCacheManager,
                   device: torch.device) -> FlashMetadata:
    """The step's metadata; the sequences' slots are allocated already."""
    starts = query_start_loc(scheduled)
    numbers, num_blocks = step_numbers(starts, scheduled, manager)
    sizes = (len(starts), len(scheduled), starts[-1], len(scheduled) * num_blocks)
    query_starts, seq_lens, slot_mapping, block_table = torch.from_numpy(numbers).to(device).split(sizes)
    return FlashMetadata(starts, seq_lens, block_table.view(-1, num_blocks), slot_mapping,
                         max(s.num_tokens for s in scheduled), query_starts, manager.block_size,
                         max(s.end for s in scheduled))


def step_numbers(starts: list[int], scheduled: list[ScheduledSequence],
                 manager: PagedKVCacheManager) -> tuple[IntArray, int]:
    """B + 1 query starts (given), B lengths, T slots, B rows of the block table; and how long a row is.

    Loops go over sequences and blocks, never over tokens.
    """
    tables = [manager.block_table(s.sequence) for s in scheduled]
    num_blocks = max(map(len, tables))
    seq_lens, slots, rows = list[int](), list[int](), list[int]()
    for (sequence, num_tokens), table in zip(scheduled, tables, strict=True):
        kept = manager.num_kept(sequence)
        seq_lens.append(kept + num_tokens)
        _add_slots(slots, table, kept, kept + num_tokens, manager.block_size)
        rows += table
        rows += [-1] * (num_blocks - len(table))
    return np.array([*starts, *seq_lens, *slots, *rows], dtype=np.int32), num_blocks


def _add_slots(slots: list[int], table: list[int], start: int, end: int, size: int) -> None:
    """The slots of places [start, end) of a table, block by block."""
    while start < end:
        block, offset = divmod(start, size)
        count = min(size - offset, end - start)
        first = table[block] * size + offset
        slots += range(first, first + count)
        start += count

