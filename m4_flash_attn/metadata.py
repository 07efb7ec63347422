"""The step's metadata as kernels take it: what m3 has in several tensors, cut from one.

    [ query starts | lengths | slots | block table ]      one list, one array, one copy to the device

Most of what a small tensor costs is making it. In a decode step of one sequence all of this is a dozen numbers.

B sequences in the step, T tokens.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m0_basics.attention import ScheduledSequence, query_start_loc
from m3_paged_kv.block_tables import BlockTables
from m3_paged_kv.metadata import PagedMetadata

IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class FlashMetadata(PagedMetadata):
    """m3's metadata. The two maxima are host numbers: grids are chosen by them, and reading a GPU stops it."""

    query_starts: Tensor            # B + 1, int32: `query_start_loc` on the device
    block_size: int
    max_seq_len: int                # no sequence is longer; under a CUDA graph: can ever be
    num_decodes: int                # sequences in front of all others that have one new token each


def num_decodes(query_start_loc: list[int]) -> int:
    """Of B + 1 query starts: how many sequences in front have one new token."""
    return next((i for i, (a, b) in enumerate(pairwise(query_start_loc)) if b - a != 1), len(query_start_loc) - 1)


class StepNumbers(NamedTuple):
    """The step in one array: B + 1 query starts, B lengths, T slots, B rows of the block table."""

    numbers: IntArray
    seq_lens_at: int                # where the lengths begin
    slots_at: int
    block_table_at: int
    num_blocks: int                 # in a row of the block table


def flash_metadata(scheduled: list[ScheduledSequence], block_tables: BlockTables,
                   device: torch.device) -> FlashMetadata:
    """The step's metadata; the sequences' slots are allocated already."""
    starts, num_sequences = query_start_loc(scheduled), len(scheduled)
    step = step_numbers(starts, scheduled, block_tables)
    flat = torch.from_numpy(step.numbers).to(device)
    return FlashMetadata(starts, flat[step.seq_lens_at:step.seq_lens_at + num_sequences],
                         flat[step.block_table_at:].view(-1, step.num_blocks),
                         flat[step.slots_at:step.slots_at + starts[-1]], max(s.num_tokens for s in scheduled),
                         flat[:num_sequences + 1], block_tables.block_size, max(s.end for s in scheduled),
                         num_decodes(starts))


def step_numbers(starts: list[int], scheduled: list[ScheduledSequence], block_tables: BlockTables) -> StepNumbers:
    """The step's metadata in one array; `starts` is its query_start_loc.

    Loops go over sequences and blocks, never over tokens. Each part begins at a multiple of 16 bytes: Triton compiles
    a kernel once for pointers that do, and once more for each combination of those that do not.
    """
    tables = [block_tables[s.sequence] for s in scheduled]
    num_blocks = max(map(len, tables))
    seq_lens, slots, rows = list[int](), list[int](), list[int]()
    for s, table in zip(scheduled, tables, strict=True):
        first = block_tables.place(s.sequence, s.start)
        seq_lens.append(first + s.num_tokens)
        _add_slots(slots, table, first, first + s.num_tokens, block_tables.block_size)
        rows += table
        rows += [-1] * (num_blocks - len(table))
    numbers = starts.copy()
    places = [_append(numbers, part) for part in (seq_lens, slots, rows)]
    return StepNumbers(np.array(numbers, dtype=np.int32), places[0], places[1], places[2], num_blocks)


def _append(numbers: list[int], part: list[int]) -> int:
    """Put a part behind the others; returns where it begins."""
    numbers += [0] * (-len(numbers) % 4)
    place = len(numbers)
    numbers += part
    return place


def _add_slots(slots: list[int], table: list[int], start: int, end: int, size: int) -> None:
    """The slots of places [start, end) of a table, block by block."""
    while start < end:
        block, offset = divmod(start, size)
        count = min(size - offset, end - start)
        first = table[block] * size + offset
        slots += range(first, first + count)
        start += count
