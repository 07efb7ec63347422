"""The memory behind the blocks: how many a device and its host hold, and the cache that they are cut from."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from m0_basics.config import DTYPES, ConfigError
from m0_basics.model import CausalLM
from m2_continuous_batching.plugins import CachePlugin
from m2_continuous_batching.slot_cache import SlotCache, slot_cache_bytes

from .config import CacheConfig, EngineConfig
from .swap import HostCache, PinnedHostCache, make_host_cache

_CPU_SHARE = 0.25           # of the memory that is available: a laptop has other things to do


@dataclass(frozen=True)
class PagedMemory:
    """The blocks of an engine, on the device and on the host; who holds which, a KV cache manager knows."""

    cache: SlotCache
    host_cache: HostCache | PinnedHostCache
    num_blocks: int
    num_host_blocks: int


def allocate_memory(config: EngineConfig, model: CausalLM, plugins: Sequence[CachePlugin],
                    other_bytes: int = 0) -> PagedMemory:
    """The memory that `config` asks for, behind a loaded model. Raises ConfigError where it does not fit.

    `other_bytes`: what somebody else will allocate on the device for each block.
    """
    memory, limits, spec = config.cache_config, config.scheduler_config, model.spec
    dtype = DTYPES.get(memory.kv_cache_dtype, model.dtype)
    block_bytes = slot_cache_bytes(spec, memory.block_size, dtype, plugins)
    num_blocks = num_blocks_for(memory, block_bytes + other_bytes, model.device, limits.longest, limits.max_num_seqs)
    # What a cache plugin keeps for a slot stays on the device: such sequences are recomputed instead of swapped.
    num_host_blocks = 0 if plugins else int(memory.swap_space * 2**30) // block_bytes
    cache = SlotCache(spec, num_blocks * memory.block_size, dtype, model.device, plugins, memory.block_size)
    return PagedMemory(cache, make_host_cache(cache, memory.block_size, num_host_blocks), num_blocks, num_host_blocks)


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
