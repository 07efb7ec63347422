"""Memory for weights in pages of 2 MB, where the system has them.

A decode step reads all weights once. In pages of 4 KB it looks up an address for every 64 lines, and the processor's
prefetching stops at each page's end; in pages of 2 MB neither is noticed. On one machine with fast memory that was 20 %
of the time of the products of one row.

    slab   [ matrix | matrix | matrix | .. not touched yet, so not in memory ]

What is not asked for from the system costs nothing: where it has no such pages, these are ordinary ones.
"""
from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 2 << 20
_SLAB = 32 << 20                # bytes that are reserved at a time
_LINE = 64                      # bytes: every matrix begins on a cache line


class LargePages:
    """Hands out memory for the matrices of one model. It is freed with the last tensor in it."""

    def __init__(self) -> None:
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0

    def keep(self, x: Tensor) -> Tensor:
        """A copy of x, uint8, in this memory."""
        assert x.dtype is torch.uint8
        if self._used + x.nbytes > self._slab.nbytes:
            self._slab, self._used = _new_slab(max(_SLAB, x.nbytes)), 0
        place = self._slab[self._used:self._used + x.nbytes].view(x.shape)
        self._used += -(-x.nbytes // _LINE) * _LINE
        return place.copy_(x)


def _new_slab(num_bytes: int) -> Tensor:
    """uint8 [num_bytes], from the beginning of a large page on."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):             # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)         # keeps the mapping alive
    first = -whole.data_ptr() % PAGE
    return whole[first:first + num_bytes]
