"""The memory behind the blocks: slots on the device, slots on the host, and copies between any two of them.

    slot   0 ............ num_slots .................... num_slots + num_host_slots
           [ device: attention reads and writes ][ host: swapped-out sequences wait ]

On a CPU the host's slots are a second region of the same memory: the mechanism is the same, the distance is not.
"""
from __future__ import annotations

import psutil
import torch

from m0_basics.config import ConfigError
from m2_continuous_batching.kv_cache_manager import SlotCopy
from m2_continuous_batching.slot_cache import SlotCache

from .config import CacheConfig

_CPU_SHARE = 0.25           # of the memory that is available: a laptop has other things to do


class HostCache:
    """Keys and values of swapped-out sequences, where the device is a CPU. `swap` has what a GPU needs."""

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

    def _view(self, slot: int, num_slots: int, device: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
        pool, first = (device, slot) if slot < self.num_slots else (host, slot - self.num_slots)
        return pool[:, first:first + num_slots]


def num_blocks_for(config: CacheConfig, block_bytes: int, device: torch.device, longest: int,
                   max_num_seqs: int) -> int:
    """Blocks of `block_bytes` that the memory holds, at most as many as `max_num_seqs` longest sequences could use.

    Raises ConfigError where not one block fits, and where more are asked for than the device has memory. A CPU's pages
    are handed out as they are written, so its whole memory counts; a GPU's have to be free at once.
    """
    per_sequence = -(-longest // config.block_size)
    if config.num_blocks is not None:
        num_blocks, source = config.num_blocks, f"num_blocks={config.num_blocks:,}"
    else:
        budget, source = _budget(config, device)
        num_blocks = min(budget // block_bytes, per_sequence * max_num_seqs)
    if num_blocks < 1:
        raise ConfigError(f"{source} is too small: not one block of {block_bytes:,} bytes fits")
    is_gpu = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[0] if is_gpu else psutil.virtual_memory().total
    if num_blocks * block_bytes > memory:
        raise ConfigError(f"{source} is too large: {num_blocks:,} blocks take {num_blocks * block_bytes:,} bytes, and "
                          f"this {'GPU has' if is_gpu else 'machine has'} {memory:,}; allowed: at most "
                          f"{memory // block_bytes:,} blocks")
    return num_blocks


def _budget(config: CacheConfig, device: torch.device) -> tuple[int, str]:
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes, f"kv_cache_memory_bytes={config.kv_cache_memory_bytes:,}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)       # the weights are loaded: they are not free any more
        return (int(free - (1 - config.gpu_memory_utilization) * total),
                f"gpu_memory_utilization={config.gpu_memory_utilization}")
    return int(_CPU_SHARE * psutil.virtual_memory().available), "the memory of this machine"
