"""Block table and slot mapping of a step as tensors, built without a Python loop over tokens.

B sequences in the step, T tokens.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m0_basics.attention import AttentionMetadata, ScheduledSequence, query_start_loc

from .block_tables import BlockTables


@dataclass(frozen=True)
class PagedMetadata(AttentionMetadata):
    """Where each sequence's keys and values lie, and where this step's new ones go. All tensors are int32."""

    seq_lens: Tensor                # B: keys of each sequence once the step's tokens are stored, less what was evicted
    block_table: Tensor             # [B, max_blocks]: blocks in order, -1 beyond the last
    slot_mapping: Tensor            # T: slot of each new token
    max_query_len: int


def paged_metadata(scheduled: list[ScheduledSequence], block_tables: BlockTables,
                   device: torch.device) -> PagedMetadata:
    """The step's metadata; the sequences' slots are allocated already."""
    tables = [block_tables[s.sequence] for s in scheduled]
    widths = np.array([len(table) for table in tables])
    block_table = np.full((len(tables), widths.max()), -1, dtype=np.int32)
    # One assignment fills all rows: the mask picks the first `width` places of each, in order.
    block_table[np.arange(widths.max()) < widths[:, None]] = np.concatenate(tables)
    starts = query_start_loc(scheduled)
    counts = np.diff(starts)
    first = np.array([block_tables.place(s.sequence, s.start) for s in scheduled])      # B: of the first new token
    sequence = np.repeat(np.arange(len(tables)), counts)                            # T: whose token it is
    place = np.arange(starts[-1]) - np.repeat(np.array(starts[:-1]) - first, counts)    # T: in its table
    size = block_tables.block_size
    slots = block_table[sequence, place // size] * size + place % size
    return PagedMetadata(starts, torch.from_numpy((first + counts).astype(np.int32)).to(device),
                         torch.from_numpy(block_table).to(device),
                         torch.from_numpy(slots.astype(np.int32)).to(device), int(counts.max()))
