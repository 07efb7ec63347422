"""What finding a prefix costs: bookkeeping alone, for caches of a thousand to a million blocks, and its memory.

A cache is filled with texts of their own; then a prompt is looked up that it holds whole.
"""
from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Sequence
from statistics import median
from typing import Any

from m0_basics.request import Sequence as TokenSequence
from m0_basics.request import SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams

from ..block_hash import BlockHasher, HashIndex
from ..prefix_index import PrefixIndex
from ..radix_tree import RadixTree

BLOCK_SIZE = 16
SIZES = (1_000, 10_000, 100_000, 1_000_000)
PROMPTS = (256, 1024, 4096)
_PER_TEXT = 64                          # blocks


def make_index(kind: str) -> PrefixIndex:
    return RadixTree(BLOCK_SIZE) if kind == "radix" else HashIndex(BlockHasher(BLOCK_SIZE, "lookup"))


def measure(sizes: Sequence[int] = SIZES, prompts: Sequence[int] = PROMPTS, repeats: int = 20) -> list[dict[str, Any]]:
    """For each index and size: microseconds of a look-up by the prompt's length, and bytes of a cached block."""
    entries = []
    for kind in ("radix", "hash"):
        for size in sizes:
            rng = random.Random(size)
            tracemalloc.start()
            index, known = make_index(kind), list[list[int]]()
            for first in range(0, size, _PER_TEXT):
                text = [rng.randrange(50_000) for _ in range(_PER_TEXT * BLOCK_SIZE)]
                _insert(index, text, first)
                if len(known) < 8:
                    known.append(text)
            num_bytes = tracemalloc.get_traced_memory()[0] / len(index)
            tracemalloc.stop()
            long = [token for text in known for token in text][:max(prompts)]
            _insert(index, long, size)
            entry: dict[str, Any] = {"index": kind, "blocks": size, "bytes_per_block": num_bytes}
            for length in prompts:
                entry[f"lookup_us_{length}"] = 1e6 * median(_time(index, long[:length]) for _ in range(repeats))
            entries.append(entry)
    return entries


def _insert(index: PrefixIndex, text: list[int], first: int) -> None:
    sequence, parent = _sequence(text), None
    for number in range(len(text) // BLOCK_SIZE):
        parent = index.insert(sequence, number, parent, first + number)


def _time(index: PrefixIndex, prompt: list[int]) -> float:
    """Seconds of a first look-up: hashes are not known yet."""
    sequence = _sequence(prompt)
    start = time.perf_counter()
    match = index.match(sequence, len(prompt) - 1)
    seconds = time.perf_counter() - start
    assert match.num_tokens(BLOCK_SIZE) == len(prompt) - 1
    return seconds


def _sequence(tokens: list[int]) -> TokenSequence:
    return TokenSequence(next_seq_id(), SequenceData(tokens), SamplingParams(), seed=0)
