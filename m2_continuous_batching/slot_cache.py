"""The KV cache as this milestone's attention sees it: write to slots, read from slots, with plugins in between."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m0_basics.model_spec import ModelSpec
from m1_offline.kv_cache import KVCache

from .kv_cache_manager import SlotCopy
from .plugins.base import CachePlugin


class SlotCache:
    """Keys and values of all layers in `num_slots` slots. Without plugins it is m1's `KVCache` and nothing more."""

    def __init__(self, spec: ModelSpec, num_slots: int, dtype: torch.dtype, device: torch.device,
                 plugins: Sequence[CachePlugin] = ()) -> None:
        self.plugins = tuple(plugins)
        stored = dtype
        for plugin in self.plugins:
            plugin.attach(spec.num_hidden_layers, num_slots, spec.num_key_value_heads, stored, device)
            stored = plugin.storage_dtype(stored)
        self.kv_cache = KVCache(spec, num_slots, stored, device)

    @property
    def device(self) -> torch.device:
        return self.kv_cache.k.device

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and of what plugins keep beside it."""
        return self.kv_cache.nbytes + sum(p.nbytes for p in self.plugins)

    def store(self, layer_idx: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Write k, v [T, H_kv, D] of one layer into the slots that `slot_mapping` [T] names."""
        for plugin in self.plugins:
            k, v = plugin.before_append(layer_idx, k, v, slot_mapping)
        self.kv_cache.store(layer_idx, k, v, slot_mapping)
        for plugin in self.plugins:
            plugin.after_append(layer_idx, slot_mapping)

    def read(self, layer_idx: int, slots: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [n, H_kv, D] of the given slots, as `dtype`; a slice of them is a view, not a copy."""
        k, v = self.kv_cache.k[layer_idx], self.kv_cache.v[layer_idx]
        # index_select copies whole slots, several times faster than indexing with a tensor.
        k, v = (x[slots] if isinstance(slots, slice) else x.index_select(0, slots) for x in (k, v))
        for plugin in reversed(self.plugins):
            k, v = plugin.on_read(layer_idx, k, v, slots)
        return k.to(dtype), v.to(dtype)

    def copy_slots(self, copies: list[SlotCopy]) -> None:
        """Make the copies that the KV cache manager has asked for, in order."""
        for c in copies:
            self.kv_cache.copy(c.source, c.target, c.num_slots)
        if copies:
            for plugin in self.plugins:
                plugin.on_copy(copies)
