"""How many blocks the memory of a device holds."""
from __future__ import annotations

import psutil
import torch

from m0_basics.config import ConfigError

from .config import CacheConfig

_CPU_SHARE = 0.25           # of the memory that is available: a laptop has other things to do


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
