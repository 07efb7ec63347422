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
from m4_flash_attn.backends import Situation
from m5_chunked_prefill.step_cost import StepCost, StepShape

from .block_hash import BlockHasher, HashIndex
from .block_pool import CachedBlockPool
from .block_store import BlockStore
from .config import EngineConfig
from .disk_tier import DiskTier
from .kv_cache_manager import PrefixKVCacheManager
from .prefix_index import PrefixIndex
from .radix_tree import RadixTree


def make_manager(config: EngineConfig, weights: str, memory: PagedMemory, situation: Situation, backend: str,
                 cache_plugins: Sequence[CachePlugin], cost: StepCost) -> PrefixKVCacheManager | PagedKVCacheManager:
    """The manager over `memory`, with a prefix cache or without. Raises ConfigError for what cannot be.

    `weights`: what `fingerprint_of` says, where blocks go to the disk. `cost` knows what computing takes: whether it
    pays to read them.
    """
    options, block_size = config.cache_config, situation.block_size
    if not options.enable_prefix_caching:
        return paged_manager(memory.num_blocks, block_size, memory.num_host_blocks)
    if cache_plugins:
        names = ", ".join(type(plugin).__name__ for plugin in cache_plugins)
        raise ConfigError(f"{names} may keep something of a sequence beside its blocks, and enable_prefix_caching "
                          "hands blocks to others; allowed: enable_prefix_caching=False, or no cache plugin")
    k = memory.cache.kv_cache.k
    # All that the bits of a block depend on: another kernel sums in another order.
    about = [weights, block_size, k.dtype, k.device.type, backend, config.attention_config.fused_layers,
             torch.__version__, torch.backends.cpu.get_cpu_capability()]
    hasher = BlockHasher(block_size, sha256(" ".join(map(str, about)).encode()).hexdigest()[:32])
    host_pool = BlockPool(memory.num_host_blocks)
    index: PrefixIndex = RadixTree(block_size) if options.prefix_index == "radix" else HashIndex(hasher)
    pool = CachedBlockPool(memory.num_blocks, index, options.max_cached_blocks)
    disk = None
    if options.prefix_cache_dir is not None:
        if not host_pool.num_blocks:
            raise ConfigError("prefix_cache_dir brings blocks back by the host's memory, and swap_space is too small "
                              "for one block; allowed: a larger swap_space")
        store = BlockStore(Path(options.prefix_cache_dir), hasher.fingerprint, int(options.prefix_cache_disk * 2**30))
        layers, _, heads, width = k.shape
        disk = DiskTier(store, hasher, host_pool, memory.host_cache, (2, layers, block_size * heads * width), k.dtype,
                        partial(seconds_to_compute, cost), cost.leave_out)
    return PrefixKVCacheManager(pool, hasher, host_pool, steps_ahead=config.scheduler_config.async_scheduling,
                                below=disk)


def fingerprint_of(model: CausalLM) -> str:
    """Of a model's shapes, type and every weight. To be asked before layers are fused."""
    digest = sha256(f"{model.spec} {model.dtype}".encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def seconds_to_compute(cost: StepCost, start: int, num_tokens: int) -> float | None:
    """What a prompt's tokens [start, start + num_tokens) add to the step that runs the one behind them.

    None until steps ran.
    """
    whole, rest = StepShape(), StepShape()
    whole.add(start, num_tokens + 1, 1)
    rest.add(start + num_tokens, 1, 1)
    if (seconds := cost.predict(whole)) is None:
        return None
    return max(0.0, seconds - cost.time(rest))
