"""The prefix cache's last tier: blocks go from the device to disk as their sequences leave, and come back by the host.

    leaves    device blocks ──one copy──> a thread ──> disk                     nobody waits for the disk
    waits     disk ──a thread──> host blocks                                    others run meanwhile
    starts    host blocks, held as a swapped sequence holds its own ──> device, with the step's other copies

A prefix is read only where that is quicker than computing it. What reading takes is measured when the tier opens and
corrected by each read; what computing takes is known from steps that ran, at first from those of the process before.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from m0_basics.request import Sequence
from m2_continuous_batching.plugins.base import CounterValue
from m3_paged_kv.block_pool import Pool
from m3_paged_kv.swap import HostCache, PinnedHostCache

from .block_hash import BlockHash, BlockHasher
from .block_store import BlockStore
from .lower_tier import LowerTier
from .prefix_index import Tokens

_MOST_WAITING = 256             # blocks on their way to the disk; more are not kept
_MOST_AT_ONCE = 256             # blocks that are read for one sequence
_NEWEST = 0.5                   # how much the newest read counts in what a read is expected to take
_PACE_TOKENS = 256              # tokens of the prompt whose time is written down
_FEW = 8                        # blocks: what so few took says more about the noise

Block = tuple[BlockHash, Tokens, int]           # its name, its tokens, and a block of the host


@dataclass
class _Reading:
    """Blocks of a sequence, from `first` on, that a thread brings into blocks of the host."""

    first: int
    blocks: list[int]
    found: Future[tuple[int, float]]            # how many were whole, from the first on; seconds


class DiskTier(LowerTier):
    """Between a store of files, the host's blocks, and the device's."""

    def __init__(self, store: BlockStore, hasher: BlockHasher, host_pool: Pool, cache: HostCache | PinnedHostCache,
                 shape: tuple[int, int, int], dtype: torch.dtype,
                 seconds_to_compute: Callable[[int, int], float | None], leave_out: Callable[[float], None]) -> None:
        """`shape` [2, L, E] and `dtype` of a block. `seconds_to_compute(start, n)`: n tokens behind `start` others,
        None if unknown. `leave_out`: is told of seconds of a step that were spent on waiting for the disk."""
        self.store, self.hasher, self.host_pool, self.cache = store, hasher, host_pool, cache
        self.shape, self.dtype = shape, dtype
        self.num_bytes = torch.empty(shape, dtype=dtype).nbytes
        self.seconds_to_compute, self.leave_out = seconds_to_compute, leave_out
        self.seconds_to_read = store.seconds_per_block(self.num_bytes)
        self.num_read_blocks = 0
        self._earlier_pace, self._has_pace = store.pace, False
        self._readings: WeakKeyDictionary[Sequence, _Reading] = WeakKeyDictionary()
        self._given_up: list[_Reading] = []
        self._writing: dict[BlockHash, Future[bool]] = {}
        # Python lets the threads of these end their work before it ends itself: what was handed over is kept.
        self._reader, self._writer = (ThreadPoolExecutor(1, f"prefix-cache-{what}") for what in ("read", "write"))

    # ---- from the disk

    def prefetch(self, sequence: Sequence, first: int, last: int) -> None:
        self._collect()
        if sequence in self._readings:
            return
        hashes = self.hasher.hashes(sequence, last)
        room = min(self.host_pool.num_free, _MOST_AT_ONCE)
        count = 0
        while first + count < last and count < room and hashes[first + count] in self.store:
            count += 1
        if count and self._pays(first, count):
            wanted = [(hashes[n], self._tokens(sequence, n), self.host_pool.allocate())
                      for n in range(first, first + count)]
            found = self._reader.submit(_read, self.store, self.cache, wanted, self.shape, self.dtype, self.num_bytes,
                                        self.hasher.block_size)
            self._readings[sequence] = _Reading(first, [block for _, _, block in wanted], found)

    def is_reading(self, sequence: Sequence) -> bool:
        reading = self._readings.get(sequence)
        return reading is not None and not reading.found.done()

    def wait(self, sequence: Sequence) -> None:
        if (reading := self._readings.get(sequence)) is not None:
            start = time.perf_counter()
            wait([reading.found])
            self.leave_out(time.perf_counter() - start)

    def take(self, sequence: Sequence) -> tuple[int, list[int]]:
        reading = self._readings.get(sequence)
        if reading is None or not reading.found.done():
            return 0, []
        del self._readings[sequence]
        count, seconds = reading.found.result()
        if count >= _FEW:
            self.seconds_to_read += _NEWEST * (seconds / count - self.seconds_to_read)
        for block in reading.blocks[count:]:
            self.host_pool.release(block)
        self.num_read_blocks += count
        return reading.first, reading.blocks[:count]

    def give_up(self, sequence: Sequence) -> None:
        if (reading := self._readings.pop(sequence, None)) is not None:
            self._given_up.append(reading)              # the thread may be writing into the blocks
        self._collect()

    def _collect(self) -> None:
        for reading in [r for r in self._given_up if r.found.done()]:
            self._given_up.remove(reading)
            for block in reading.blocks:
                self.host_pool.release(block)

    def _pays(self, first: int, num_blocks: int) -> bool:
        """Reading against computing. While nothing is known of computing, reading is tried."""
        start, num_tokens = first * self.hasher.block_size, num_blocks * self.hasher.block_size
        computing = self.seconds_to_compute(start, num_tokens)
        if computing is None and self._earlier_pace is not None:
            computing = self._earlier_pace * num_tokens
        return computing is None or num_blocks * self.seconds_to_read < computing

    # ---- to the disk

    def keep(self, sequence: Sequence, blocks: list[int]) -> None:
        hashes, new = self.hasher.hashes(sequence, len(blocks)), list[int]()
        room = _MOST_WAITING - len(self._writing) if self.store.is_writable else 0
        for number in range(len(blocks)):
            if len(new) < room and hashes[number] not in self.store and hashes[number] not in self._writing:
                new.append(number)
        if new:
            data, is_there = self.cache.device_blocks([blocks[n] for n in new], self.hasher.block_size)
            # The tail first, as in the pool: the store lets go of what it was told of first.
            for place, number in reversed(list(enumerate(new))):
                self._write(hashes[number], self._tokens(sequence, number), data[place], is_there)
        # Behind the writes, for all: those that are there by now alone would seem newer than what they stand on.
        self._writer.submit(self.store.touch, hashes[:len(blocks)][::-1])
        if not self._has_pace and (seconds := self.seconds_to_compute(0, _PACE_TOKENS)) is not None:
            self._has_pace = True
            self._writer.submit(self.store.write_pace, seconds / _PACE_TOKENS)

    def counters(self) -> list[CounterValue]:
        return [CounterValue("prefix_cache_disk_read_blocks", "Blocks that were brought from disk.",
                             self.num_read_blocks)]

    def flush(self) -> None:
        """Wait until all that was handed over is on disk."""
        self._writer.submit(int).result()

    def _write(self, block_hash: BlockHash, tokens: Tokens, data: Tensor, is_there: Callable[[], None]) -> None:
        writing, put = self._writing, self._writer.submit(_put, self.store, block_hash, tokens, data, is_there)
        writing[block_hash] = put
        put.add_done_callback(lambda _: writing.pop(block_hash, None))

    def _tokens(self, sequence: Sequence, number: int) -> Tokens:
        size = self.hasher.block_size
        return tuple(sequence.data.token_slice(number * size, (number + 1) * size))


def _put(store: BlockStore, block_hash: BlockHash, tokens: Tokens, data: Tensor, is_there: Callable[[], None]) -> bool:
    is_there()
    return store.put(block_hash, tokens, data.contiguous().view(torch.uint8).numpy().tobytes())


def _read(store: BlockStore, cache: HostCache | PinnedHostCache, wanted: list[Block], shape: tuple[int, int, int],
          dtype: torch.dtype, num_bytes: int, block_size: int) -> tuple[int, float]:
    """Fill blocks of the host, up to the first that is not whole on disk. Returns how many, and the seconds."""
    start, count = time.perf_counter(), 0
    for block_hash, tokens, block in wanted:
        data = store.get(block_hash, tokens, num_bytes)
        if data is None:
            break
        cache.fill_host_block(block, block_size, torch.frombuffer(bytearray(data), dtype=dtype).view(shape))
        count += 1
    store.touch([block_hash for block_hash, _, _ in reversed(wanted[:count])])
    return count, time.perf_counter() - start
