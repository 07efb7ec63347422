"""Which KV cache manager an engine's options ask for."""
from __future__ import annotations

from collections.abc import Sequence

from m0_basics.config import ConfigError
from m0_basics.model_spec import ModelSpec
from m2_continuous_batching.plugins import CachePlugin
from m3_paged_kv.block_pool import BlockPool
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager, paged_manager
from m3_paged_kv.paged_memory import PagedMemory

from .block_hash import BlockHasher, HashIndex
from .block_pool import CachedBlockPool
from .config import EngineConfig
from .kv_cache_manager import PrefixKVCacheManager
from .prefix_index import PrefixIndex
from .radix_tree import RadixTree


def make_manager(config: EngineConfig, spec: ModelSpec, memory: PagedMemory, block_size: int,
                 cache_plugins: Sequence[CachePlugin]) -> PrefixKVCacheManager | PagedKVCacheManager:
    """The manager over `memory`, with a prefix cache or without. Raises ConfigError for what cannot be."""
    options = config.cache_config
    if not options.enable_prefix_caching:
        return paged_manager(memory.num_blocks, block_size, memory.num_host_blocks)
    if cache_plugins:
        names = ", ".join(type(plugin).__name__ for plugin in cache_plugins)
        raise ConfigError(f"{names} may keep something of a sequence beside its blocks, and enable_prefix_caching "
                          "hands blocks to others; allowed: enable_prefix_caching=False, or no cache plugin")
    hasher = BlockHasher(block_size, f"{config.model_config.model} {spec} {memory.cache.kv_cache.k.dtype}")
    index: PrefixIndex = RadixTree(block_size) if options.prefix_index == "radix" else HashIndex(hasher)
    pool = CachedBlockPool(memory.num_blocks, index, options.max_cached_blocks)
    return PrefixKVCacheManager(pool, hasher, BlockPool(memory.num_host_blocks),
                                steps_ahead=config.scheduler_config.async_scheduling)
