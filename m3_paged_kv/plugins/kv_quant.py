"""The paged cache in 8 or 4 bits: integers, and one scale for the numbers of a whole block.

    scale of a block  =  max |x| / 127 (8 bits) or 7 (4 bits)         stored = round(x / scale)

    block  [ t0 t1 t2 . . ]  scale 0.02      t3 is larger than 127 * 0.02:
    block  [ t0 t1 t2 t3 . ] scale 0.03      t0 .. t2 are written again, as round(stored * 0.02 / 0.03)

Tokens come one at a time, so a block's scale can only be known when it is full: until then it grows. A block starts
anew, from scale 0, when its first slot is written. Keys have channels that are large in every token; KIVI
(arXiv 2402.02750, section 3) gives each channel of a key a scale of its own. KIVI rounds to 2 bits, with a zero point,
and keeps the newest tokens in 16 bits; here there is a scale alone, and all tokens are rounded.

T tokens in the step, n slots, U blocks written to, G slots of a block, H_kv heads, D head size, P elements stored.
"""
from __future__ import annotations

import torch
from torch import Tensor

from m0_basics.config import check_int, reject
from m1_offline.kv_cache import KVCache
from m2_continuous_batching.kv_cache_manager import SlotCopy
from m2_continuous_batching.plugins.base import CachePlugin, check_floating_point, check_unused

_SMALLEST_SCALE = 2.0 ** -14            # float16's smallest normal number: a block of zeros still has a scale


class BlockQuantisation(CachePlugin):
    """int8 or int4 with float16 scales, one for each block and head. Has to be the last of several cache plugins.

    One before it that hands over integers is refused; one after it gets them, and has to store them as they are: they
    are read and written again when their block's scale grows. That is not checked.
    An object serves one engine. Numbers above 65504 * 127 (8 bits) or 65504 * 7 (4 bits) are beyond float16's scale.
    """

    def __init__(self, bits: int = 8, block_size: int = 16, per_channel_keys: bool = False) -> None:
        """`block_size` tokens share a scale: the engine's block size, or a divisor of it.

        `per_channel_keys`: a scale for each of the D channels of a block's keys, instead of one for all of them.
        """
        if isinstance(bits, bool) or bits not in (4, 8):
            raise reject("bits", bits, "8 or 4")
        check_int("block_size", block_size, 1)
        self.bits = bits
        self.block_size = block_size
        self.per_channel_keys = per_channel_keys
        self._halves: tuple[BlockScaled, BlockScaled] | None = None       # keys, values
        self._restored = torch.float32                      # type of what is read

    @property
    def halves(self) -> tuple[BlockScaled, BlockScaled]:
        """Keys and values."""
        assert self._halves is not None, "the plugin is not attached to a cache"
        return self._halves

    @property
    def nbytes(self) -> int:
        return 0 if self._halves is None else sum(half.scales.nbytes for half in self._halves)

    def storage_format(self, dtype: torch.dtype, head_dim: int) -> tuple[torch.dtype, int]:
        check_floating_point(self, dtype)
        if self.bits == 8:
            return torch.int8, head_dim
        if head_dim % 2:
            raise reject("bits", 4, f"8 where the head size is odd (it is {head_dim}): two numbers share a byte")
        return torch.uint8, head_dim // 2

    def extra_bytes(self, num_slots: int, num_kv_heads: int, head_dim: int) -> int:
        scales_per_head = 1 + (head_dim if self.per_channel_keys else 1)
        return -(-num_slots // self.block_size) * num_kv_heads * scales_per_head * torch.float16.itemsize

    def attach(self, kv_cache: KVCache, dtype: torch.dtype, block_size: int) -> None:
        check_unused(self, self._halves is None)
        if block_size % self.block_size:
            raise reject("block_size", self.block_size, f"a divisor of the engine's block size, {block_size}")
        channels = kv_cache.k.shape[-1] * (8 // self.bits) if self.per_channel_keys else 1
        self._halves = (BlockScaled(kv_cache.k, self.bits, self.block_size, channels),
                        BlockScaled(kv_cache.v, self.bits, self.block_size, 1))
        self._restored = dtype

    def before_append(self, layer_idx: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
        blocks, block_of = (slot_mapping // self.block_size).unique(return_inverse=True)
        is_first = slot_mapping % self.block_size == 0
        starts_anew = torch.zeros_like(blocks, dtype=torch.bool).index_put_((block_of[is_first],), is_first[is_first])
        keys, values = self.halves
        return (keys.quantise(layer_idx, k, blocks, block_of, starts_anew),
                values.quantise(layer_idx, v, blocks, block_of, starts_anew))

    def on_read(self, layer_idx: int, k: Tensor, v: Tensor, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=k.device)
        keys, values = self.halves
        blocks = slots // self.block_size
        return (keys.restore(layer_idx, k, blocks).to(self._restored),
                values.restore(layer_idx, v, blocks).to(self._restored))

    def on_copy(self, copies: list[SlotCopy]) -> None:
        for c in copies:                        # from the start of a block to the start of another
            source, target = c.source // self.block_size, c.target // self.block_size
            count = -(-c.num_slots // self.block_size)
            for half in self.halves:
                half.scales[:, target:target + count] = half.scales[:, source:source + count]


class BlockScaled:
    """Keys, or values: the integers in the cache, and the scales of their blocks."""

    def __init__(self, stored: Tensor, bits: int, block_size: int, channels: int) -> None:
        """`stored` [layers, num_slots, H_kv, P] is the cache's; `channels` is D for a scale for each, else 1."""
        num_layers, num_slots, num_heads, _ = stored.shape
        self.stored = stored
        self.bits = bits
        self.largest = 2 ** (bits - 1) - 1                  # the integers are -largest to largest
        self.block_size = block_size
        self.scales = torch.empty(num_layers, -(-num_slots // block_size), num_heads, channels, dtype=torch.float16,
                                  device=stored.device)

    def quantise(self, layer_idx: int, x: Tensor, blocks: Tensor, block_of: Tensor, starts_anew: Tensor) -> Tensor:
        """x [T, H_kv, D] on their way into `blocks` [U], token t into blocks[block_of[t]] -> integers [T, H_kv, P].

        What the blocks hold already is written again where their scale has grown; `starts_anew` [U] says which of
        them hold nothing.
        """
        x = x.float()
        largest = x.abs() if self.scales.shape[-1] > 1 else x.abs().amax(dim=-1, keepdim=True)      # [T, H_kv, 1 or D]
        index = block_of.view(-1, 1, 1).expand_as(largest)
        largest = largest.new_zeros(len(blocks), *largest.shape[1:]).scatter_reduce_(0, index, largest, "amax")
        # The scale as it is stored decides the integers, so that its rounding does not add to theirs.
        wanted = (largest / self.largest).clamp(_SMALLEST_SCALE).half()
        old = self.scales[layer_idx].index_select(0, blocks)
        new = torch.where(starts_anew.view(-1, 1, 1), wanted, wanted.maximum(old))
        grown = (new > old).flatten(1).any(dim=1) & ~starts_anew
        self._rescale(layer_idx, blocks[grown], old[grown].float() / new[grown].float())
        self.scales[layer_idx].index_copy_(0, blocks, new)
        return pack(self._round(x / new.float().index_select(0, block_of)), self.bits)

    def restore(self, layer_idx: int, stored: Tensor, blocks: Tensor) -> Tensor:
        """Integers [n, H_kv, P] as they were stored in `blocks` [n] -> float32 [n, H_kv, D]."""
        return unpack(stored, self.bits) * self.scales[layer_idx].index_select(0, blocks)

    def _rescale(self, layer_idx: int, blocks: Tensor, ratio: Tensor) -> None:
        """Write the integers of some blocks again; `ratio` [U, H_kv, 1 or D] is old scale over new scale."""
        slots = (blocks.unsqueeze(1) * self.block_size + torch.arange(self.block_size, device=blocks.device)).flatten()
        integers = unpack(self.stored[layer_idx].index_select(0, slots), self.bits)
        ratio = ratio.repeat_interleave(self.block_size, dim=0)
        self.stored[layer_idx].index_copy_(0, slots, pack(self._round(integers * ratio), self.bits))

    def _round(self, x: Tensor) -> Tensor:
        return x.round().clamp(-self.largest, self.largest)


def pack(integers: Tensor, bits: int) -> Tensor:
    """Whole numbers [..., D], as floats -> int8 [..., D]; in 4 bits uint8 [..., D / 2], numbers j and j + D / 2 in one.

    The numbers of 4 bits are -7 to 7, stored as 1 to 15: a byte that was never written may hold the sixteenth.
    """
    if bits == 8:
        return integers.to(torch.int8)
    low, high = (integers + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: [..., P] -> float32 [..., D]."""
    if bits == 8:
        return packed.float()
    return torch.cat((packed & 15, packed >> 4), dim=-1).float() - 8
