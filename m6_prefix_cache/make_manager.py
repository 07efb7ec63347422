"""Which KV cache manager an engine's options ask for."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch

from m0_basics.config import ConfigError
from m0_basics.model import CausalLM
from m2_continuous_batching.plugins import CachePlugin
from m3_paged_kv.block_pool import BlockPool
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager, paged_manager
from m3_paged_kv.paged_memory import PagedMemory
from m5_chunked_prefill.step_cost import StepCost, StepShape

from .block_hash import BlockHasher, HashIndex
from .block_pool import CachedBlockPool
from .block_store import BlockStore
from .config import EngineConfig
from .disk_tier import DiskTier
from .kv_cache_manager import PrefixKVCacheManager
from .prefix_index import PrefixIndex
from .radix_tree import RadixTree


def make_manager(config: EngineConfig, fingerprint: str, memory: PagedMemory, block_size: int,
                 cache_plugins: Sequence[CachePlugin], cost: StepCost) -> PrefixKVCacheManager | PagedKVCacheManager:
    """The manager over `memory`, with a prefix cache or without. Raises ConfigError for what cannot be.

    `fingerprint`: what the numbers in the cache depend on. `cost` knows what computing takes: whether it pays to read
    a block from the disk.
    """
    options = config.cache_config
    if not options.enable_prefix_caching:
        return paged_manager(memory.num_blocks, block_size, memory.num_host_blocks)
    if cache_plugins:
        names = ", ".join(type(plugin).__name__ for plugin in cache_plugins)
        raise ConfigError(f"{names} may keep something of a sequence beside its blocks, and enable_prefix_caching "
                          "hands blocks to others; allowed: enable_prefix_caching=False, or no cache plugin")
    cache = memory.cache.kv_cache
    layers, _, heads, width = cache.k.shape
    fingerprint = f"{fingerprint}-{block_size}-{str(cache.k.dtype).removeprefix('torch.')}"
    hasher, host_pool = BlockHasher(block_size, fingerprint), BlockPool(memory.num_host_blocks)
    index: PrefixIndex = RadixTree(block_size) if options.prefix_index == "radix" else HashIndex(hasher)
    pool = CachedBlockPool(memory.num_blocks, index, options.max_cached_blocks)
    disk = None
    if options.prefix_cache_dir is not None:
        store = BlockStore(Path(options.prefix_cache_dir), fingerprint, int(options.prefix_cache_disk * 2**30))
        disk = DiskTier(store, hasher, host_pool, memory.host_cache, (2, layers, block_size * heads * width),
                        cache.k.dtype, partial(seconds_to_compute, cost))
    return PrefixKVCacheManager(pool, hasher, host_pool, steps_ahead=config.scheduler_config.async_scheduling,
                                disk=disk)


def fingerprint_of(model: CausalLM) -> str:
    """Of all that keys and values depend on: shapes, type, and every weight. To be asked before layers are fused."""
    digest = sha256(f"{model.spec} {model.dtype}".encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def seconds_to_compute(cost: StepCost, num_tokens: int) -> float | None:
    """A prompt's tokens in a step of their own; None until steps ran."""
    shape = StepShape()
    shape.add(0, num_tokens, 0)
    return cost.predict(shape)
