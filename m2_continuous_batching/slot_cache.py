"""The KV cache as this milestone's attention sees it: write to slots, read from slots, with plugins in between."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from m0_basics.model_spec import ModelSpec
from m1_offline.kv_cache import KVCache, kv_cache_bytes

from .kv_cache_manager import SlotCopy
from .plugins.base import CachePlugin


class SlotCache:
    """Keys and values of all layers in `num_slots` slots. Without plugins it is m1's `KVCache` and nothing more."""

    def __init__(self, spec: ModelSpec, num_slots: int, dtype: torch.dtype, device: torch.device,
                 plugins: Sequence[CachePlugin] = (), block_size: int = 1) -> None:
        """Slots are handed out `block_size` at a time, from a multiple of it on: here, a row."""
        self.plugins = tuple(plugins)
        *incoming, stored = storage_formats(spec, dtype, self.plugins)
        self.kv_cache = KVCache(replace(spec, head_dim=stored[1]), num_slots, stored[0], device)
        for plugin, (vector_dtype, _) in zip(self.plugins, incoming, strict=True):
            plugin.attach(self.kv_cache, vector_dtype, block_size)

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


def storage_formats(spec: ModelSpec, dtype: torch.dtype,
                    plugins: Sequence[CachePlugin]) -> list[tuple[torch.dtype, int]]:
    """Element type and length of a head's vector: as it comes to each plugin, and at last as it is stored."""
    formats = [(dtype, spec.head_dim)]
    for plugin in plugins:
        formats.append(plugin.storage_format(*formats[-1]))
    return formats


def slot_cache_bytes(spec: ModelSpec, num_slots: int, dtype: torch.dtype, plugins: Sequence[CachePlugin] = ()) -> int:
    """Bytes of a `SlotCache`, and of what its plugins keep beside it, without making one."""
    *incoming, (stored, head_dim) = storage_formats(spec, dtype, plugins)
    beside = sum(plugin.extra_bytes(num_slots, spec.num_key_value_heads, length)
                 for plugin, (_, length) in zip(plugins, incoming, strict=True))
    return kv_cache_bytes(replace(spec, head_dim=head_dim), num_slots, stored) + spec.num_hidden_layers * beside
