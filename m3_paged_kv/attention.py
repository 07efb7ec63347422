"""Paged attention by gathering: look up the slots in the block table, copy keys and values together, attend.

    block table   [ 4 | 1 | 7 ]   ->   slots  64 .. 79 | 16 .. 31 | 112 .. 117      (blocks of 16, 38 tokens)

The tokens are the same as with one row per sequence; only their addresses are looked up. Copying what was just
addressed is the price of plain PyTorch: a kernel reads the blocks where they lie.

T tokens in the step, B sequences, b sequences of one group, L tokens of the longest of them,
H_q / H_kv query / key-value heads, G = H_q / H_kv, D head size.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence
from m1_offline.attention import attend
from m2_continuous_batching.attention import DecodeGroup, attend_padded, group_decodes, padding_mask
from m2_continuous_batching.slot_cache import SlotCache

from .block_tables import BlockTables
from .metadata import PagedMetadata, paged_metadata


@dataclass(frozen=True)
class Prefill:
    """A sequence with more than one new token: attended to by itself."""

    rows: slice                     # its tokens in the packed batch
    slots: Tensor                   # L: slots of its keys, in order


@dataclass(frozen=True)
class GatherMetadata(PagedMetadata):
    """The paged metadata, and what the gathers need."""

    store_slots: Tensor             # T: slot_mapping in int64, the only type that `index_copy_` takes
    prefills: list[Prefill]
    decode_groups: list[DecodeGroup]


class PagedAttention(AttentionBackend):
    """Store, then gather and attend."""

    def __init__(self, cache: SlotCache, tables: BlockTables, dtype: torch.dtype) -> None:
        """`dtype` is the model's; the cache may store another one."""
        self.cache = cache
        self.tables = tables
        self.dtype = dtype

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> GatherMetadata:
        paged = paged_metadata(scheduled, self.tables, self.cache.device)
        starts = paged.query_start_loc
        lengths = [self.tables.place(s.sequence, s.end) for s in scheduled]
        prefills = [Prefill(slice(starts[i], starts[i + 1]), self._gather_slots(paged, [i], lengths[i])[0])
                    for i, s in enumerate(scheduled) if s.num_tokens > 1]
        groups = [self._group(paged, members, max(lengths[i] for i in members)) for members in group_decodes(scheduled)]
        return GatherMetadata(**vars(paged), store_slots=paged.slot_mapping.long(), prefills=prefills,
                              decode_groups=groups)

    def _group(self, paged: PagedMetadata, members: list[int], longest: int) -> DecodeGroup:
        slots, padding = self._gather_slots(paged, members, longest)
        rows = torch.tensor([paged.query_start_loc[i] for i in members], device=self.cache.device)
        return DecodeGroup(rows, slots, padding_mask(padding, self.dtype))

    def _gather_slots(self, paged: PagedMetadata, members: list[int], longest: int) -> tuple[Tensor, Tensor]:
        """Slots [b * longest] of the members' keys, and [b, longest] which of them are padding."""
        size = self.tables.block_size
        chosen = torch.tensor(members, device=self.cache.device)
        blocks = paged.block_table[chosen, :self.tables.num_blocks_of(longest)]
        offsets = torch.arange(size, device=self.cache.device, dtype=torch.int32)
        slots = (blocks.unsqueeze(-1) * size + offsets).flatten(1)[:, :longest]
        padding = torch.arange(longest, device=self.cache.device) >= paged.seq_lens[chosen].unsqueeze(1)
        # Slots of padding were never written, and 0 * NaN is NaN: read the first one, which surely was.
        return torch.where(padding, slots[:, :1], slots).flatten(), padding

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, GatherMetadata)
        self.cache.store(layer_idx, k, v, metadata.store_slots)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for prefill in metadata.prefills:
            keys, values = self.cache.read(layer_idx, prefill.slots, q.dtype)
            out[prefill.rows] = attend(q[prefill.rows], keys, values)
        for group in metadata.decode_groups:
            keys, values = self.cache.read(layer_idx, group.slots, q.dtype)
            out[group.rows] = attend_padded(q[group.rows], keys, values, group.mask)
        return out
