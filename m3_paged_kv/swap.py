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

from collections.abc import Callable, Iterator
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

    def device_blocks(self, blocks: list[int], block_size: int) -> tuple[Tensor, Callable[[], None]]:
        """A copy of blocks of the device on the host, [n, 2, L, E], and what to call before it is read."""
        cache = self.device_cache.kv_cache
        width = block_size * cache.k.shape[2] * cache.k.shape[3]
        data = cache.k.new_empty(len(blocks), 2, cache.k.shape[0], width)
        for one, block in zip(data, blocks, strict=True):
            for half, pool in zip(one, (cache.k, cache.v), strict=True):
                half.copy_(pool[:, block * block_size:(block + 1) * block_size].flatten(1))
        return data, lambda: None

    def fill_host_block(self, block: int, block_size: int, data: Tensor) -> None:
        """Write data [2, L, E] into one of the host's blocks, as if a block of the device had been swapped out."""
        slots = slice(block * block_size, (block + 1) * block_size)
        for pool, half in zip((self.k, self.v), data, strict=True):
            pool[:, slots] = half.view_as(pool[:, slots])

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
        first_host_slot = self.num_blocks * self.block_size
        for batch in independent(copies, self.block_size, self.num_blocks, self.most):
            if batch[0].target >= first_host_slot:
                self._swap_out(batch)
            elif batch[0].source >= first_host_slot:
                self._swap_in(batch)
            else:
                self._within_device(batch)

    def device_blocks(self, blocks: list[int], block_size: int) -> tuple[Tensor, Callable[[], None]]:
        """A copy of blocks of the device on the host, [n, 2, L, E], and what to call before it is read."""
        numbers = self._to_device(blocks)
        staged = torch.stack([pool.index_select(1, numbers).transpose(0, 1) for pool in self._pools()], dim=1)
        if not self.on_gpu:
            return staged, lambda: None
        data = torch.empty(staged.shape, dtype=staged.dtype, pin_memory=True)
        data.copy_(staged, non_blocking=True)
        return data, torch.cuda.current_stream(self.device_cache.device).record_event().synchronize

    def fill_host_block(self, block: int, block_size: int, data: Tensor) -> None:
        """Write data [2, L, E] into one of the host's blocks, as if a block of the device had been swapped out."""
        if self.stream is not None:
            self.stream.synchronize()                   # an earlier copy from this block may be on its way
        self.blocks[block] = data

    def _within_device(self, batch: list[SlotCopy]) -> None:
        """Copies of copy-on-write: the first slots of a block into another block."""
        if self.device_cache.plugins:
            self.device_cache.copy_slots(batch)
            return
        sources = self._to_device([slot for c in batch for slot in range(c.source, c.source + c.num_slots)])
        targets = self._to_device([slot for c in batch for slot in range(c.target, c.target + c.num_slots)])
        for pool in (self.device_cache.kv_cache.k, self.device_cache.kv_cache.v):
            pool.index_copy_(1, targets, pool.index_select(1, sources))

    def _swap_out(self, batch: list[SlotCopy]) -> None:
        """Whole blocks, from the device to the host."""
        device_blocks, host_runs = self._in_host_order([(c.source, c.target) for c in batch])
        compute = self._compute_stream()
        self._wait(self.stream, compute)                # for the last write to the blocks, and for `device_blocks`
        with torch.cuda.stream(self.stream):
            staged = self._staging(len(batch))
            for i, pool in enumerate(self._pools()):
                staged[:, i] = pool.index_select(1, device_blocks).transpose(0, 1)
            gathered = None if self.stream is None else self.stream.record_event()
            for on_host, part in self._parts(host_runs, staged):
                on_host.copy_(part, non_blocking=True)
        if compute is not None and gathered is not None:
            compute.wait_event(gathered)                        # from here on the blocks may be overwritten

    def _swap_in(self, batch: list[SlotCopy]) -> None:
        """Whole blocks, from the host to the device."""
        device_blocks, host_runs = self._in_host_order([(c.target, c.source) for c in batch])
        compute = self._compute_stream()
        with torch.cuda.stream(self.stream):
            staged = self._staging(len(batch))
            for on_host, part in self._parts(host_runs, staged):
                part.copy_(on_host, non_blocking=True)
            self._wait(self.stream, compute)            # for the last read of the blocks, and for `device_blocks`
            for i, pool in enumerate(self._pools()):
                pool.index_copy_(1, device_blocks, staged[:, i].transpose(0, 1))
        self._wait(compute, self.stream)                        # attention is about to read them

    def _in_host_order(self, slots: list[tuple[int, int]]) -> tuple[Tensor, list[tuple[int, int]]]:
        """First slots (device's, host's) of n blocks -> the device's blocks [n], the host's as (first, how many).

        Ordered by the host's blocks: those that lie side by side there travel as one copy.
        """
        blocks = sorted((host // self.block_size - self.num_blocks, device // self.block_size)
                        for device, host in slots)
        return self._to_device([device for _, device in blocks]), consecutive([host for host, _ in blocks])

    def _parts(self, host_runs: list[tuple[int, int]], staged: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each run of the host's blocks: those blocks, and the part of staged [n, 2, L, E] that goes with them."""
        parts = staged.split([count for _, count in host_runs])
        for (first, count), part in zip(host_runs, parts, strict=True):
            yield self.blocks[first:first + count], part

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

    All of a batch go in one direction, and none reads or writes a block that an earlier one of it has written. Blocks
    from `num_blocks` on are the host's.
    """
    batch: list[SlotCopy] = []
    batch_direction = (False, False)
    written: set[int] = set()
    for copy in copies:
        source, target = copy.source // block_size, copy.target // block_size
        direction = source >= num_blocks, target >= num_blocks          # whether the host is read, and written
        depends = source in written or target in written
        if batch and (direction != batch_direction or depends or len(batch) == most):
            yield batch
            batch, written = [], set()
        batch.append(copy)
        batch_direction = direction
        written.add(target)
    if batch:
        yield batch


def consecutive(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers -> runs of neighbours, as (first, how many): 3 4 5 9 -> (3, 3) (9, 1)."""
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1), len(numbers)]
    return [(numbers[a], b - a) for a, b in pairwise(starts)]
