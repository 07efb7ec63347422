"""The host's memory behind the blocks: preempted sequences wait there, and a swap is a copy like any other.

    slot   0 ............ num_slots .................... num_slots + num_host_slots
           [ device: attention reads and writes ][ host: swapped-out sequences wait ]

On a CPU the host's slots are a second region of the same memory: the mechanism is the same, the distance is not.
On a GPU copies go in batches, on a stream of their own, while the model computes:

    compute   ... step n ...|             |... step n + 1 overwrites the freed blocks ...
    side                    '->[gather ]--'[ to host memory        ][ back ]->... before they are read

To gather blocks on the device is quick, to send them to the host is slow: the next step waits for the gather alone.
On the host a block is one piece of pinned memory, all layers together, so that neighbours travel as one copy.
On a CPU copying slices one by one is faster than gathering (`HostCache`): there is no launch to save.

L layers, n blocks of a batch, E elements of a block in one layer.
"""
from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import psutil
import torch
from torch import Tensor

from m0_basics.config import ConfigError
from m2_continuous_batching.kv_cache_manager import SlotCopy
from m2_continuous_batching.slot_cache import SlotCache

_STAGED_BYTES = 64 * 2**20          # of a batch on its way: memory of the device that the cache's budget leaves free


class HostCache:
    """Keys and values of swapped-out sequences, where the device is a CPU."""

    def __init__(self, device_cache: SlotCache, num_host_slots: int) -> None:
        self.device_cache = device_cache
        k = device_cache.kv_cache.k
        self.num_slots = k.shape[1]
        self.k, self.v = (k.new_empty(k.shape[0], num_host_slots, *k.shape[2:]) for _ in range(2))

    def copy_slots(self, copies: list[SlotCopy]) -> None:
        """Make the copies in order; slots from `num_slots` on are the host's."""
        for c in copies:                        # one by one: a slice is copied once, a batch by index twice
            if max(c.source, c.target) < self.num_slots:
                self.device_cache.copy_slots([c])
            else:
                self._copy(c)

    def _copy(self, c: SlotCopy) -> None:
        pools = ((self.device_cache.kv_cache.k, self.k), (self.device_cache.kv_cache.v, self.v))
        for device, host in pools:
            source, target = (self._view(slot, c.num_slots, device, host) for slot in (c.source, c.target))
            target.copy_(source)

    def _view(self, slot: int, num_slots: int, device: Tensor, host: Tensor) -> Tensor:
        pool, first = (device, slot) if slot < self.num_slots else (host, slot - self.num_slots)
        return pool[:, first:first + num_slots]


class PinnedHostCache:
    """Keys and values of swapped-out sequences. Without a GPU it does the same in the one order there is."""

    def __init__(self, device_cache: SlotCache, block_size: int, num_host_blocks: int) -> None:
        self.device_cache = device_cache
        self.block_size = block_size
        k = device_cache.kv_cache.k
        self.num_blocks = k.shape[1] // block_size
        self.on_gpu = k.device.type == "cuda"
        self.blocks = torch.empty(num_host_blocks, 2, k.shape[0], block_size * k.shape[2] * k.shape[3], dtype=k.dtype,
                                  pin_memory=self.on_gpu and num_host_blocks > 0)
        self.stream = torch.cuda.Stream(k.device) if self.on_gpu else None
        self.most = max(1, _STAGED_BYTES // (k.nbytes * 2 // self.num_blocks))

    def copy_slots(self, copies: list[SlotCopy]) -> None:
        """Enqueue the copies, in order; slots after the device's are the host's. Whole blocks go from and to the host.

        What is enqueued on the current stream afterwards finds them made.
        """
        for batch in independent(copies, self.block_size, self.num_blocks, self.most):
            source, target = (slot // self.block_size for slot in (batch[0].source, batch[0].target))
            if max(source, target) < self.num_blocks:
                self._within_device(batch)
                continue
            pairs = sorted((sorted((c.source // self.block_size, c.target // self.block_size)) for c in batch),
                           key=lambda pair: pair[1])           # the device's blocks come first; by the host's
            ids = self._to_device([device for device, _ in pairs])
            runs = consecutive([host - self.num_blocks for _, host in pairs])
            if source < self.num_blocks:
                self._swap_out(ids, runs)
            else:
                self._swap_in(ids, runs)

    def _within_device(self, batch: list[SlotCopy]) -> None:
        if self.device_cache.plugins:
            self.device_cache.copy_slots(batch)
            return
        sources, targets = (self._to_device([first + i for first, n in ends for i in range(n)])
                            for ends in ([(c.source, c.num_slots) for c in batch],
                                         [(c.target, c.num_slots) for c in batch]))
        for pool in (self.device_cache.kv_cache.k, self.device_cache.kv_cache.v):
            pool.index_copy_(1, targets, pool.index_select(1, sources))

    def _swap_out(self, ids: Tensor, runs: list[tuple[int, int]]) -> None:
        """Blocks `ids` [n] of the device to the host's, given as runs (first block, number of blocks)."""
        compute = self._compute_stream()
        self._wait(self.stream, compute)                        # for the last write to the blocks, and for `ids`
        with torch.cuda.stream(self.stream):
            staged = self._staging(len(ids))
            for i, pool in enumerate(self._pools()):
                staged[:, i] = pool.index_select(1, ids).transpose(0, 1)
            gathered = None if self.stream is None else self.stream.record_event()
            for (first, n), part in zip(runs, staged.split([n for _, n in runs]), strict=True):
                self.blocks[first:first + n].copy_(part, non_blocking=True)
        if compute is not None and gathered is not None:
            compute.wait_event(gathered)                        # from here on the blocks may be overwritten

    def _swap_in(self, ids: Tensor, runs: list[tuple[int, int]]) -> None:
        """The other way round."""
        compute = self._compute_stream()
        with torch.cuda.stream(self.stream):
            staged = self._staging(len(ids))
            for (first, n), part in zip(runs, staged.split([n for _, n in runs]), strict=True):
                part.copy_(self.blocks[first:first + n], non_blocking=True)
            self._wait(self.stream, compute)                    # for the last read of the blocks, and for `ids`
            for i, pool in enumerate(self._pools()):
                pool.index_copy_(1, ids, staged[:, i].transpose(0, 1))
        self._wait(compute, self.stream)                        # attention is about to read them

    def _staging(self, n: int) -> Tensor:
        """[n, 2, L, E]. Allocated on the side stream, which alone uses it: freed, it is used again in order."""
        return torch.empty(n, *self.blocks.shape[1:], dtype=self.blocks.dtype, device=self.device_cache.device)

    def _pools(self) -> tuple[Tensor, Tensor]:
        """Keys and values [L, num_blocks, E]."""
        cache = self.device_cache.kv_cache
        return cache.k.view(cache.k.shape[0], self.num_blocks, -1), cache.v.view(cache.v.shape[0], self.num_blocks, -1)

    def _to_device(self, numbers: list[int]) -> Tensor:
        """[n]; from pinned memory, so that nobody waits for it."""
        return torch.tensor(numbers, pin_memory=self.on_gpu).to(self.device_cache.device, non_blocking=True)

    def _compute_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device_cache.device) if self.on_gpu else None

    @staticmethod
    def _wait(stream: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
        """What `stream` is given from now on runs after what `other` has been given so far."""
        if stream is not None and other is not None:
            stream.wait_stream(other)


def make_host_cache(device_cache: SlotCache, block_size: int, num_host_blocks: int) -> HostCache | PinnedHostCache:
    """Where swapped-out sequences of this device go. Raises ConfigError where the host's memory has no room for it."""
    k, available = device_cache.kv_cache.k, psutil.virtual_memory().available
    needed = num_host_blocks * block_size * (2 * k.nbytes // k.shape[1])
    if needed > available:
        raise ConfigError(f"swap_space is too large: {needed:,} bytes of host memory, and {available:,} are available; "
                          f"allowed: at most {available / 2**30:.2f} (GiB), or 0 to recompute instead")
    if device_cache.device.type == "cuda":
        return PinnedHostCache(device_cache, block_size, num_host_blocks)
    return HostCache(device_cache, block_size * num_host_blocks)


def independent(copies: list[SlotCopy], block_size: int, num_blocks: int, most: int) -> Iterator[list[SlotCopy]]:
    """Cut `copies` into batches of at most `most`, in each of which all reads may go before all writes.

    All of a batch go the same way, and none reads or writes a block that an earlier one of it has written. Blocks
    from `num_blocks` on are the host's.
    """
    batch: list[SlotCopy] = []
    written: set[int] = set()
    way = (False, False)
    for copy in copies:
        ends = copy.source // block_size, copy.target // block_size
        this_way = ends[0] >= num_blocks, ends[1] >= num_blocks
        if batch and (this_way != way or len(batch) == most or not written.isdisjoint(ends)):
            yield batch
            batch, written = [], set()
        way = this_way
        batch.append(copy)
        written.add(ends[1])
    if batch:
        yield batch


def consecutive(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers -> runs of neighbours, as (first, how many): 3 4 5 9 -> (3, 3) (9, 1)."""
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1), len(numbers)]
    return [(numbers[a], b - a) for a, b in pairwise(starts)]
