"""The step's metadata as kernels take it: m3's, and what a kernel needs without asking the device for it.

B sequences in the step.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m0_basics.attention import ScheduledSequence
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager
from m3_paged_kv.metadata import PagedMetadata, paged_metadata


@dataclass(frozen=True)
class FlashMetadata(PagedMetadata):
    """m3's metadata. The two maxima are host numbers: grids are chosen by them, and reading a GPU stops it."""

    query_starts: Tensor            # B + 1, int32: `query_start_loc` on the device
    block_size: int
    max_seq_len: int                # no sequence is longer; under a CUDA graph: can ever be


def flash_metadata(scheduled: list[ScheduledSequence], manager: PagedKVCacheManager,
                   device: torch.device) -> FlashMetadata:
    """The step's metadata; the sequences' slots are allocated already."""
    paged = paged_metadata(scheduled, manager, device)
    starts = torch.tensor(paged.query_start_loc, dtype=torch.int32, device=device)
    return FlashMetadata(**vars(paged), query_starts=starts, block_size=manager.block_size,
                         max_seq_len=max(s.end for s in scheduled))
