"""Configuration of this milestone: blocks, how many there are, and where preempted sequences go."""
from __future__ import annotations

import sys
from dataclasses import dataclass, field

import m0_basics.config as m0
import m2_continuous_batching.config as m2
from m0_basics.config import ConfigError, check_int, option, reject

_MOST_GIB = sys.float_info.max / 2**30          # so that it is finite in bytes as well


@dataclass(frozen=True)
class CacheConfig(m0.CacheConfig):
    """The KV cache in blocks."""

    block_size: int = option(16, "Tokens per block of the KV cache.")
    num_blocks: int | None = option(None, "Blocks of the KV cache (default: as many as the memory budget holds).")
    gpu_memory_utilization: float = option(0.9, "Share of a GPU's memory that weights and KV cache may take.")
    swap_space: float = option(0.5, "GiB of host memory for preempted sequences; 0: they are recomputed.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("block_size", self.block_size, 1)
        check_int("num_blocks", self.num_blocks, 1, optional=True)
        for name, high in (("gpu_memory_utilization", 1.0), ("swap_space", _MOST_GIB)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
                raise reject(name, value, "a number from 0 to 1" if high == 1.0 else "GiB, 0 or more, and finite")
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(f"num_blocks={self.num_blocks} and kv_cache_memory_bytes={self.kv_cache_memory_bytes} "
                              "both say how large the cache is; allowed: one of them, or none")


@dataclass(frozen=True)
class SchedulerConfig(m2.SchedulerConfig):
    """m2's; a sequence costs no row any more, so more of them run side by side."""

    max_num_seqs: int = option(64, "Sequences that run side by side, as far as the blocks go.")


@dataclass(frozen=True)
class EngineConfig(m2.BatchingConfig):
    """The layers of m0, with m2's scheduler and this milestone's cache."""

    cache_config: CacheConfig = field(default_factory=CacheConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
