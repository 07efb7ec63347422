"""The KV cache in 8 bits: each head's vector of a token is stored as integers and one scale.

    scale = max |x| / 127        stored = round(x / scale)        read back: stored * scale, off by scale / 2 at most

A vector of D numbers takes D + 2 bytes instead of 2 D in 16 bits. The scales are the plugin's own tensors, with the
slots of the cache as their index, so that they are read, and copied for a fork, along with them.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m1_offline.kv_cache import KVCache

from .base import CachePlugin, check_floating_point, check_unused

if TYPE_CHECKING:
    from ..kv_cache_manager import SlotCopy

_SMALLEST_SCALE = 2.0 ** -14            # float16's smallest normal number: a vector of zeros still has a scale


class KVCompressionPlugin(CachePlugin):
    """int8 per token and head, with float16 scales. Has to be the last of several cache plugins: it changes the type.

    One before it that hands over integers is refused; one after it gets them, and what it does to them is not checked.
    An object serves one engine. Vectors with a number above 65504 * 127 are beyond float16's scale.
    """

    def __init__(self) -> None:
        self._scales: Tensor | None = None          # [2, layers, num_slots, H_kv]: of keys, of values
        self._restored = torch.float32              # type of what is read

    @property
    def scales(self) -> Tensor:
        assert self._scales is not None, "the plugin is not attached to a cache"
        return self._scales

    @property
    def nbytes(self) -> int:
        return 0 if self._scales is None else self._scales.nbytes

    def storage_format(self, dtype: torch.dtype, head_dim: int) -> tuple[torch.dtype, int]:
        check_floating_point(self, dtype)
        return torch.int8, head_dim

    def extra_bytes(self, num_slots: int, num_kv_heads: int, head_dim: int) -> int:
        return 2 * num_slots * num_kv_heads * torch.float16.itemsize

    def attach(self, kv_cache: KVCache, dtype: torch.dtype, block_size: int) -> None:
        check_unused(self, self._scales is None)
        self._scales = torch.empty(2, *kv_cache.k.shape[:3], dtype=torch.float16, device=kv_cache.k.device)
        self._restored = dtype

    def before_append(self, layer_idx: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
        stored = []
        for which, x in enumerate((k, v)):
            quantised, scale = quantise(x)
            self.scales[which, layer_idx].index_copy_(0, slot_mapping, scale)
            stored.append(quantised)
        return stored[0], stored[1]

    def on_read(self, layer_idx: int, k: Tensor, v: Tensor, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        return self._restore(k, self.scales[0, layer_idx], slots), self._restore(v, self.scales[1, layer_idx], slots)

    def _restore(self, x: Tensor, scales: Tensor, slots: Tensor | slice) -> Tensor:
        scale = scales[slots] if isinstance(slots, slice) else scales.index_select(0, slots)
        return (x.float() * scale.float().unsqueeze(-1)).to(self._restored)

    def on_copy(self, copies: list[SlotCopy]) -> None:
        for c in copies:
            self.scales[:, :, c.target:c.target + c.num_slots] = self.scales[:, :, c.source:c.source + c.num_slots]


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> int8 [..., D] and float16 scales [...]."""
    # The scale as it is stored decides the integers, so that its rounding does not add to theirs.
    scale = (x.float().abs().amax(dim=-1) / 127).clamp(_SMALLEST_SCALE).half()
    return (x.float() / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scale
