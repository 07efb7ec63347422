"""The prefix cache's last tier: blocks go from the device to disk as their sequences leave, and come back by the host.

    leaves    device block ──copy──> a thread ──> disk                       nobody waits for the disk
    starts    disk ──> host block, held as a swapped sequence holds its own ──> device, with the next step's copies

A block is read only where that is quicker than computing it: what reading takes is measured when the tier opens, what
computing takes is known from the steps that ran.
"""
from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

from m0_basics.request import Sequence
from m3_paged_kv.block_pool import Pool
from m3_paged_kv.block_tables import Place
from m3_paged_kv.swap import HostCache, PinnedHostCache

from .block_hash import BlockHash, BlockHasher
from .block_store import BlockStore
from .prefix_index import Tokens

_MOST_WAITING = 256             # blocks on their way to the disk; more are not kept
_MOST_AT_ONCE = 256             # blocks that are read for one sequence: others wait meanwhile


class DiskTier:
    """Between a store of files, the host's blocks, and the device's."""

    def __init__(self, store: BlockStore, hasher: BlockHasher, host_pool: Pool, cache: HostCache | PinnedHostCache,
                 shape: tuple[int, int, int], dtype: torch.dtype,
                 seconds_to_compute: Callable[[int], float | None]) -> None:
        """`shape` [2, L, E] and `dtype` of a block; `seconds_to_compute(n)`: n tokens of a prompt, None if unknown."""
        self.store, self.hasher, self.host_pool, self.cache = store, hasher, host_pool, cache
        self.shape, self.dtype = shape, dtype
        self.num_bytes = torch.empty(shape, dtype=dtype).nbytes
        self.seconds_to_compute = seconds_to_compute
        self.seconds_to_read = store.seconds_per_block(self.num_bytes)
        self.num_read_blocks = self.num_written_blocks = 0
        self._to_write: queue.Queue[tuple[BlockHash, Tokens, torch.Tensor] | None] = queue.Queue(_MOST_WAITING)
        self._known = set[BlockHash]()                      # on their way to the disk, or there
        self._thread = threading.Thread(target=self._write, name="prefix-cache-disk", daemon=True)
        self._thread.start()

    def num_found(self, sequence: Sequence, first: int, last: int) -> int:
        """Of a sequence's blocks [first, last), how many from the first on are worth reading."""
        hashes = self.hasher.hashes(sequence, last)
        room = min(self.host_pool.num_free, _MOST_AT_ONCE)
        count = 0
        while first + count < last and count < room and hashes[first + count] in self.store:
            count += 1
        return count if count and self._pays(count) else 0

    def read(self, sequence: Sequence, first: int, count: int) -> list[Place]:
        """Bring blocks [first, first + count) into the host's memory, up to the first that is not whole on disk."""
        places, hashes = list[Place](), self.hasher.hashes(sequence, first + count)
        for number in range(first, first + count):
            size = self.hasher.block_size
            tokens = tuple(sequence.data.token_slice(number * size, (number + 1) * size))
            data = self.store.get(hashes[number], tokens, self.num_bytes)
            if data is None:
                break
            block = self.host_pool.allocate()
            self.cache.fill_host_block(block, size, torch.frombuffer(bytearray(data), dtype=self.dtype)
                                       .view(self.shape))
            places.append(("host", block))
        self.num_read_blocks += len(places)
        return places

    def keep(self, sequence: Sequence, number: int, block: int) -> None:
        """A block of the device holds a sequence's block `number`: write it, unless it is there already."""
        block_hash = self.hasher.hashes(sequence, number + 1)[number]
        if block_hash in self.store or block_hash in self._known or not self.store.is_writable \
                or self._to_write.full():
            return
        size = self.hasher.block_size
        tokens = tuple(sequence.data.token_slice(number * size, (number + 1) * size))
        self._known.add(block_hash)
        self._to_write.put((block_hash, tokens, self.cache.device_block(block, size)))

    def flush(self) -> None:
        """Wait until all that was handed over is on disk."""
        self._to_write.join()

    def close(self) -> None:
        """Write what is left, and end."""
        self._to_write.put(None)
        self._thread.join()

    def _pays(self, num_blocks: int) -> bool:
        computing = self.seconds_to_compute(num_blocks * self.hasher.block_size)
        return computing is None or num_blocks * self.seconds_to_read < computing

    def _write(self) -> None:
        while (item := self._to_write.get()) is not None:
            block_hash, tokens, data = item
            self.num_written_blocks += self.store.put(block_hash, tokens, data.contiguous().view(torch.uint8).numpy()
                                                      .tobytes())
            self._known.discard(block_hash)
            self._to_write.task_done()
        self._to_write.task_done()
