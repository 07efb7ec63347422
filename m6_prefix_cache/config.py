"""Configuration of this milestone: whether blocks outlive their sequences, and how they are found."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import m3_paged_kv.config as m3
import m5_chunked_prefill.config as m5
from m0_basics.config import ConfigError, check_int, option, reject
from m2_continuous_batching.policies import SchedulingPolicy

from .policy import LONGEST_MATCH, POLICIES

INDEXES = ("radix", "hash")


@dataclass(frozen=True)
class CacheConfig(m3.CacheConfig):
    """m3's blocks, kept for whoever begins alike."""

    enable_prefix_caching: bool = option(True, "Compute what prompts share once; off: m5's engine.")
    prefix_index: str = option("radix", "How blocks are found: radix (also by a part of a block), or hash.")
    max_cached_blocks: int | None = option(None, "Most blocks that nobody uses and that are kept (default: all).")
    prefix_cache_dir: str | None = option(None, "A folder that keeps blocks when the process ends.")
    prefix_cache_disk: float = option(4.0, "GiB that the blocks in prefix_cache_dir may take.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_index not in INDEXES:
            raise reject("prefix_index", self.prefix_index, ", ".join(INDEXES))
        check_int("max_cached_blocks", self.max_cached_blocks, 0, optional=True)
        size = self.prefix_cache_disk
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 < size <= 2**20:
            raise reject("prefix_cache_disk", size, "GiB above 0")
        if self.prefix_cache_dir is not None and not (self.enable_prefix_caching and self.swap_space):
            raise ConfigError("prefix_cache_dir brings blocks back by the host's memory; allowed: with "
                              "enable_prefix_caching and swap_space above 0")


@dataclass(frozen=True)
class SchedulerConfig(m5.SchedulerConfig):
    """m5's, with an order that knows what is cached."""

    policies: ClassVar[Mapping[str, Callable[[str], SchedulingPolicy]]] = POLICIES
    policy: str = option(LONGEST_MATCH, "Who goes first: " + ", ".join(POLICIES) + "; with parameters as in ageing:5.")


@dataclass(frozen=True)
class EngineConfig(m5.EngineConfig):
    """m5's layers, with this milestone's cache."""

    cache_config: CacheConfig = field(default_factory=CacheConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
