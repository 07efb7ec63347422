"""Bytes that attention moves between slow and fast memory: counted while it runs, and as a formula.

Slow memory is a GPU's HBM, or a CPU's DRAM; fast memory is what a kernel works in: SRAM, or a cache. Both algorithms
run here over a memory that counts every element that crosses. They read queries, keys and values alike, in the same
tiles. Their whole difference is that the naive one writes the scores S and the probabilities P and reads them again:
4 x rows x keys elements. Tiling saves these, and the room for S and P; it saves no reading of keys and values.
Sources: FlashAttention, arXiv 2205.14135, theorem 2 (Theta(n^2 d^2 / M) for fast memory of M elements);
FlashAttention-2, 2307.08691 (queries in the outer loop).

No causal mask: it halves all that grows with n^2, on both sides.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m0_basics.config import reject

from ..online_softmax import empty_state, finish, tiles, update


@dataclass(frozen=True)
class Heads:
    """Attention of the query heads that share one key-value head."""

    num_queries: int            # n in prefill, 1 in decode
    num_keys: int
    head_dim: int
    group: int = 1              # query heads that share the keys

    @property
    def rows(self) -> int:
        """One per query and head: they all meet the same keys."""
        return self.num_queries * self.group


@dataclass(frozen=True)
class Traffic:
    """Bytes of one run."""

    loads: int                  # from slow memory to fast
    stores: int                 # from fast memory to slow
    peak: int                   # most that lay in slow memory at a time, inputs and output included

    @property
    def total(self) -> int:
        return self.loads + self.stores


class CountingMemory:
    """Slow memory of named matrices. What is computed with has to be loaded, and is counted, in elements."""

    def __init__(self, fast_elements: int) -> None:
        self.fast_elements = fast_elements
        self.loads = self.stores = self.peak = 0
        self._matrices: dict[str, Tensor] = {}

    def place(self, name: str, matrix: Tensor) -> None:
        """Put a matrix here that somebody else has made: it takes room, and no traffic."""
        self._matrices[name] = matrix
        self.peak = max(self.peak, sum(m.numel() for m in self._matrices.values()))

    def free(self, name: str) -> None:
        del self._matrices[name]

    def load(self, name: str, rows: range, columns: range | None = None) -> Tensor:
        """A tile, as a copy: what fast memory does to it stays there."""
        tile = self._tile(name, rows, columns).clone()
        self.loads += tile.numel()
        return tile

    def store(self, name: str, tile: Tensor, rows: range, columns: range | None = None) -> None:
        self._tile(name, rows, columns).copy_(tile)
        self.stores += tile.numel()

    def hold(self, *held: Tensor) -> None:
        """These lie in fast memory at the same time: make sure that they fit."""
        assert sum(tile.numel() for tile in held) <= self.fast_elements, "more than the fast memory holds"

    def _tile(self, name: str, rows: range, columns: range | None) -> Tensor:
        part = self._matrices[name][rows.start:rows.stop]
        return part if columns is None else part[:, columns.start:columns.stop]


def tile_sizes(head_dim: int, sram_elements: int) -> tuple[int, int]:
    """Rows and keys of a tile: the most rows that fit with q, o, k, v, the scores, m and l, at most D keys at a time.

    q and o take rows x D each, k and v keys x D each, the scores rows x keys: at most rows x (5 D + 2) in all. Few
    rows mean that the keys are read often, once for each tile of rows.
    """
    rows = sram_elements // (5 * head_dim + 2)
    if rows < 1:
        raise reject("sram_elements", sram_elements, f"at least {5 * head_dim + 2} for heads of {head_dim}")
    return rows, min(rows, head_dim)


def naive(memory: CountingMemory, shape: Heads) -> None:
    """S = q k^T, then P = softmax(S), then o = P v: three programs, each of which leaves its result in slow memory."""
    tile_q, tile_k = tile_sizes(shape.head_dim, memory.fast_elements)
    every_key = range(shape.num_keys)
    memory.place("S", torch.empty(shape.rows, shape.num_keys))
    for rows in tiles(range(shape.rows), tile_q):
        q = memory.load("q", rows)
        for keys in tiles(every_key, tile_k):
            k = memory.load("k", keys)
            scores = q @ k.T * shape.head_dim ** -0.5
            memory.hold(q, k, scores)
            memory.store("S", scores, rows, keys)
    memory.place("P", torch.empty(shape.rows, shape.num_keys))
    for rows in tiles(range(shape.rows), _softmax_rows(shape, memory.fast_elements)):
        scores = memory.load("S", rows)
        memory.hold(scores)
        memory.store("P", torch.softmax(scores, -1), rows)
    memory.free("S")
    for rows in tiles(range(shape.rows), tile_q):
        o = torch.zeros(len(rows), shape.head_dim)
        for keys in tiles(every_key, tile_k):
            p, v = memory.load("P", rows, keys), memory.load("v", keys)
            memory.hold(p, v, o)
            o += p @ v
        memory.store("o", o, rows)
    memory.free("P")


def tiled(memory: CountingMemory, shape: Heads) -> None:
    """One program: scores live and die in fast memory, and what is remembered of them is m, l and o."""
    tile_q, tile_k = tile_sizes(shape.head_dim, memory.fast_elements)
    for rows in tiles(range(shape.rows), tile_q):
        q = memory.load("q", rows)
        state = empty_state((len(rows),), shape.head_dim, q)
        for keys in tiles(range(shape.num_keys), tile_k):
            k, v = memory.load("k", keys), memory.load("v", keys)
            scores = q @ k.T * shape.head_dim ** -0.5
            memory.hold(q, k, v, scores, state.m, state.l, state.o)
            state = update(state, scores, v)
        memory.store("o", finish(state), rows)


ALGORITHMS: dict[str, Callable[[CountingMemory, Heads], None]] = {"naive": naive, "tiled": tiled}


def run(algorithm: str, q: Tensor, k: Tensor, v: Tensor, sram_elements: int,
        group: int = 1) -> tuple[Tensor, CountingMemory]:
    """q [rows, D] of the `group` heads that share k, v [keys, D] -> output [rows, D], and the memory that counted."""
    shape = Heads(q.shape[0] // group, k.shape[0], q.shape[1], group)
    memory = CountingMemory(sram_elements)
    o = torch.zeros_like(q)
    for name, matrix in {"q": q, "k": k, "v": v, "o": o}.items():
        memory.place(name, matrix)
    ALGORITHMS[_known(algorithm)](memory, shape)
    return o, memory


def counted(algorithm: str, shape: Heads, sram_elements: int, element_bytes: int = 2) -> Traffic:
    """Run the algorithm ("naive" or "tiled") on random numbers, and count. `element_bytes`: 2 for bfloat16.

    Raises ConfigError where fast memory of `sram_elements` holds no tile (or, for "naive", no row of scores).
    """
    q, k, v = (torch.randn(n, shape.head_dim) for n in (shape.rows, shape.num_keys, shape.num_keys))
    _, memory = run(algorithm, q, k, v, sram_elements, shape.group)
    return Traffic(*(count * element_bytes for count in (memory.loads, memory.stores, memory.peak)))


def formula(algorithm: str, shape: Heads, sram_elements: int, element_bytes: int = 2) -> Traffic:
    """What `counted` counts, without running anything.

    Loads: q once, k and v once for each tile of rows; stores: o. The naive algorithm adds S and P, each stored and
    loaded once. With tile_q = M / (5 D + 2) the keys and values are 2 n (n / tile_q) D, about 10 n^2 D^2 / M.
    """
    tile_q, _ = tile_sizes(shape.head_dim, sram_elements)
    queries, keys = shape.rows * shape.head_dim, shape.num_keys * shape.head_dim
    passes = -(-shape.rows // tile_q)
    loads, stores, peak = queries + 2 * passes * keys, queries, 2 * queries + 2 * keys
    if _known(algorithm) == "naive":
        _softmax_rows(shape, sram_elements)
        scores = 2 * shape.rows * shape.num_keys                # S and P
        loads, stores, peak = loads + scores, stores + scores, peak + scores
    return Traffic(loads * element_bytes, stores * element_bytes, peak * element_bytes)


def _softmax_rows(shape: Heads, sram_elements: int) -> int:
    """Rows of scores that fast memory holds at a time."""
    if sram_elements < shape.num_keys:
        raise reject("sram_elements", sram_elements, f"at least {shape.num_keys}: the softmax takes whole rows of keys")
    return sram_elements // shape.num_keys


def _known(algorithm: str) -> str:
    if algorithm not in ALGORITHMS:
        raise reject("algorithm", algorithm, " or ".join(ALGORITHMS))
    return algorithm
