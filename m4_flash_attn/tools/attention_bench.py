"""Attention alone, one layer of it, over the paged cache: the kernel against what a library offers.

    kernel   this milestone's, over the blocks where they lie
    loop     for each sequence: gather its keys and values, one call of SDPA
    padded   gather everybody's, padded to the longest, one call of SDPA
    naive    for each sequence: gather, all scores, a mask, a softmax

All sequences of a batch are equally long, so the padded batch pads nothing: that is the best that it can do. In decode
SDPA gets the query heads of a key-value head together, which is much faster on a CPU than to let it find them. What
a step works out once for all layers, such as slots, is worked out beforehand.

B sequences, n new tokens of each and L in all, H_q / H_kv query / key-value heads, D head size.
"""
from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m0_basics.model_spec import ModelSpec
from m0_basics.tools.analysis.microbench import Effort, compare
from m1_offline.attention import attend
from m2_continuous_batching.attention import attend_padded

from ..attention import AttendOne, attend_naive
from ..kernels.cpu.bindings import PagedKernels, make_step
from ..reference import random_paged_batch

BATCHES = (1, 4, 16, 64)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
PREFILL_TOKENS = 8192               # in one step at most
NAIVE_KEYS = 32768                  # in one call at most: beyond, it takes seconds
BLOCK_SIZE = 16
_M_MMAP_THRESHOLD = -3              # of malloc.h
Way = Callable[[], Tensor]
Entries = list[dict[str, Any]]


class AttentionCase:
    """One layer's attention over a random batch in a paged cache, and the ways to compute it."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, batch: int, context: int, prefill: bool) -> None:
        """Every sequence has `context` tokens: all of them new in prefill, the last one in decode."""
        self.num_sequences, self.new = batch, context if prefill else 1
        self.batch = random_paged_batch([(context - self.new, self.new)] * batch, spec.num_attention_heads,
                                        spec.num_key_value_heads, spec.head_dim, BLOCK_SIZE, dtype)
        tokens = torch.arange(context)
        tables = self.batch.block_table.long()
        self.slots = tables[:, tokens // BLOCK_SIZE] * BLOCK_SIZE + tokens % BLOCK_SIZE         # [B, L]

    def ways(self) -> dict[str, Way]:
        """Name -> a call that returns [T, H_q * D]. Raises BuildError where the kernels cannot be built."""
        b = self.batch
        _, num_heads, head_dim = b.q.shape
        kernels = PagedKernels(num_heads, b.k_cache.shape[1], head_dim, b.block_size, b.q.dtype, b.scale)
        step = make_step(b.query_start_loc, b.seq_lens, b.block_table, b.slot_mapping)
        ways: dict[str, Way] = {"kernel": lambda: kernels.attend(step, b.q, b.k_cache, b.v_cache),
                                "loop": partial(self._each, attend), "padded": self._padded}
        return ways | ({"naive": partial(self._each, attend_naive)} if self.slots.numel() <= NAIVE_KEYS else {})

    def _gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self.batch.k_cache.index_select(0, slots), self.batch.v_cache.index_select(0, slots)

    def _each(self, attend_one: AttendOne) -> Tensor:
        outputs = [attend_one(q, *self._gather(slots))
                   for q, slots in zip(self.batch.q.split(self.new), self.slots, strict=True)]
        return torch.cat(outputs).flatten(1)

    def _padded(self) -> Tensor:
        keys, values = self._gather(self.slots.flatten())
        q = self.batch.q
        if self.new == 1:
            return attend_padded(q, keys, values, None).flatten(1)
        # Padding would stand to the right of a prompt, where the causal mask hides it: no other mask is needed.
        q, keys, values = (x.view(self.num_sequences, self.new, *x.shape[1:]).transpose(1, 2)
                           for x in (q, keys, values))
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])


@torch.inference_mode()
def attention_times(spec: ModelSpec, dtype: torch.dtype, batches: Iterable[int] = BATCHES,
                    contexts: Iterable[int] = CONTEXTS, effort: Effort | None = None) -> dict[str, Entries]:
    """"decode" and "prefill" -> for each batch and context: seconds per call of each way.

    The ways take turns; the numbers are medians.
    """
    effort, contexts = effort or Effort(rounds=5), tuple(contexts)
    times: dict[str, Entries] = {"decode": [], "prefill": []}
    for kind, entries in times.items():
        for batch in batches:
            for context in contexts:
                if kind == "decode" or batch * context <= PREFILL_TOKENS:
                    case = AttentionCase(spec, dtype, batch, context, kind == "prefill")
                    measured = compare(case.ways(), effort)
                    seconds = {f"{name}_s": float(fact.value) * 1e-9 for name, fact in measured.items()}
                    entries.append({"batch": batch, "context": context, **seconds})
    return times


def prefill_memory(spec: ModelSpec, dtype: torch.dtype, lengths: Iterable[int] = CONTEXTS) -> Entries:
    """For each length of one prompt: bytes that each way needs at its peak, output included, queries and cache not.

    Measured in a process of its own, whose malloc keeps nothing in reserve. Empty where the system does not tell.
    """
    if sys.platform != "linux":
        return []
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_return_pages_at_once) as pool:
        return pool.submit(_prefill_peaks, spec, dtype, tuple(lengths)).result()


@torch.inference_mode()
def _prefill_peaks(spec: ModelSpec, dtype: torch.dtype, lengths: tuple[int, ...]) -> Entries:
    entries = []
    for length in lengths:
        ways = AttentionCase(spec, dtype, 1, length, prefill=True).ways()
        for run in ways.values():
            run()                       # what a library keeps from its first call on is no peak of this one
        entries.append({"context": length, **{f"{name}_bytes": peak_bytes(run) for name, run in ways.items()}})
    return entries


def _return_pages_at_once() -> None:
    """Tensors in pages of their own. Left alone, glibc raises its threshold up to 32 MB, and keeps what is freed."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def peak_bytes(run: Callable[[], object]) -> int:
    """Resident memory at the highest while `run` runs, less that before: also what C++ allocates. Linux only.

    The kernel's own high-water mark is set back (proc(5), clear_refs), so that no peak is missed, and what malloc
    holds in reserve is given back first, so that reused pages count as well.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    lines: Mapping[str, str] = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
