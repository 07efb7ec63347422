"""Weights in large pages: copies on cache lines, in slabs on pages, that live as long as they are needed."""
from __future__ import annotations

import gc
import mmap
from itertools import pairwise

import pytest
import torch

from m7_gptq.kernels.cpu.large_pages import PAGE, LargePages


def test_copies_and_their_places() -> None:
    memory = LargePages()
    drawn = [torch.randint(0, 256, (n, 100), dtype=torch.uint8) for n in (1, 7, 30, 2)]
    kept = [memory.keep(x) for x in drawn]
    for x, copy in zip(drawn, kept, strict=True):
        assert torch.equal(copy, x) and copy.data_ptr() % 64 == 0
    starts = [copy.data_ptr() for copy in kept]
    assert [b - a for a, b in pairwise(starts)] == [128, 704, 3008]
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert starts[0] % PAGE == 0


def test_a_matrix_larger_than_a_slab_has_its_own() -> None:
    memory = LargePages()
    small, large = torch.full((10,), 3, dtype=torch.uint8), torch.full((33 << 20,), 7, dtype=torch.uint8)
    first, second, third = memory.keep(small), memory.keep(large), memory.keep(small)
    assert torch.equal(second, large) and torch.equal(first, small) and torch.equal(third, small)
    assert second.nbytes == large.nbytes


def test_memory_outlives_whom_it_came_from() -> None:
    memory = LargePages()
    kept = memory.keep(torch.arange(200, dtype=torch.uint8))
    del memory
    gc.collect()
    assert torch.equal(kept, torch.arange(200, dtype=torch.uint8))


def test_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    x = torch.arange(100, dtype=torch.uint8)
    assert torch.equal(LargePages().keep(x), x)
