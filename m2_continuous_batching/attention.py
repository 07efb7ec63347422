"""Attention over a ragged batch: sequences of any length side by side, without padding the model sees.

    tokens   a a a a | b b | c          packed: every linear layer runs over all T of them at once
    keys     A A A A | B B | C C C C C  where each sequence's keys and values lie: its own row of the cache

    visible(i, j)  =  same sequence  and  pos(j) <= pos(i)

`NaiveRaggedAttention` is this definition: one boolean [T, S] mask over everything. `RaggedAttention` computes the
same without the mask's zeros: prompts one by one, decoding sequences in groups of similar length.

T tokens in the step, S keys of all its sequences, B sequences, n new tokens of one sequence, L its length,
H_q / H_kv query / key-value heads, G = H_q / H_kv, D head size.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence, query_start_loc
from m1_offline.attention import ContiguousMetadata, attend

from .kv_cache_manager import RowKVCacheManager
from .slot_cache import SlotCache

GROUP_SIZE = 8          # decoding sequences in one padded call: fewer calls against less padding; 4 to 8 was fastest


@dataclass(frozen=True)
class DecodeGroup:
    """Decoding sequences of similar length, padded to the longest of them."""

    rows: Tensor                    # b: their rows of the packed batch
    slots: Tensor                   # b * L: slots of their keys, padding included
    mask: Tensor | None             # [b, 1, 1, L] added to the scores: 0, or -inf for padding; None without padding


@dataclass(frozen=True)
class RaggedMetadata(ContiguousMetadata):
    """m1's metadata, and the groups in which decoding sequences are run."""

    decode_groups: list[DecodeGroup]
    prefills: list[int]             # indices of the sequences with more than one new token


class RaggedAttention(AttentionBackend):
    """Store, then attend: one call for each prompt, one for each group of decoding sequences."""

    def __init__(self, cache: SlotCache, manager: RowKVCacheManager, dtype: torch.dtype) -> None:
        """`dtype` is the model's; the cache may store another one."""
        self.cache = cache
        self.manager = manager
        self.dtype = dtype

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> RaggedMetadata:
        base = contiguous_metadata(scheduled, self.manager, self.cache.device)
        groups = [self._group(members, base) for members in group_decodes(scheduled)]
        return RaggedMetadata(**vars(base), decode_groups=groups,
                              prefills=[i for i, s in enumerate(scheduled) if s.num_tokens > 1])

    def _group(self, members: list[int], base: ContiguousMetadata) -> DecodeGroup:
        lengths = torch.tensor([base.seq_lens[i] for i in members], device=self.cache.device)
        longest = int(lengths[-1])                                  # they are sorted
        columns = torch.arange(longest, device=self.cache.device)
        padding = columns >= lengths.unsqueeze(1)                   # [b, L]
        first = torch.tensor([base.first_slots[i] for i in members], device=self.cache.device).unsqueeze(1)
        # Padding reads the sequence's first key once more: a slot that is surely written, so no NaN gets in.
        slots = torch.where(padding, first, first + columns).flatten()
        rows = torch.tensor([base.query_start_loc[i] for i in members], device=self.cache.device)
        return DecodeGroup(rows, slots, padding_mask(padding, self.dtype))

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, RaggedMetadata)
        self.cache.store(layer_idx, k, v, metadata.slot_mapping)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for i in metadata.prefills:
            tokens = slice(metadata.query_start_loc[i], metadata.query_start_loc[i + 1])
            first = metadata.first_slots[i]
            keys, values = self.cache.read(layer_idx, slice(first, first + metadata.seq_lens[i]), q.dtype)
            out[tokens] = attend(q[tokens], keys, values)
        for group in metadata.decode_groups:
            keys, values = self.cache.read(layer_idx, group.slots, q.dtype)
            out[group.rows] = attend_padded(q[group.rows], keys, values, group.mask)
        return out


def group_decodes(scheduled: list[ScheduledSequence]) -> list[list[int]]:
    """Indices of the sequences with one new token, in groups of similar length, the longest of each group last."""
    decodes = sorted((i for i, s in enumerate(scheduled) if s.num_tokens == 1), key=lambda i: scheduled[i].end)
    return [decodes[i:i + GROUP_SIZE] for i in range(0, len(decodes), GROUP_SIZE)]


def padding_mask(padding: Tensor, dtype: torch.dtype) -> Tensor | None:
    """padding [b, L], True where a place is padding -> [b, 1, 1, L] to add to scores; None where nothing is."""
    if not bool(padding.any()):
        return None
    mask = torch.zeros(padding.shape, dtype=dtype, device=padding.device)
    return mask.masked_fill_(padding, float("-inf")).view(padding.shape[0], 1, 1, padding.shape[1])


def attend_padded(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """q [b, H_q, D], one new token of each of b sequences; keys, values [b * L, H_kv, D] -> [b, H_q, D]."""
    b, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    # Padded to [b, H_kv, L, D].
    keys, values = (x.view(b, -1, num_kv_heads, head_dim).transpose(1, 2) for x in (keys, values))
    # As in m1: the G query heads that share a key-value head take the place of the query dimension.
    grouped = q.view(b, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(b, num_heads, head_dim)


@dataclass(frozen=True)
class NaiveMetadata(ContiguousMetadata):
    """m1's metadata, and the mask."""

    slots: Tensor                   # S: slots of the keys of all sequences, one after the other
    mask: Tensor                    # [T, S] bool


class NaiveRaggedAttention(AttentionBackend):
    """The definition, as it stands: every token against every key of the step, and a mask. For reading."""

    def __init__(self, cache: SlotCache, manager: RowKVCacheManager) -> None:
        self.cache = cache
        self.manager = manager

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> NaiveMetadata:
        base = contiguous_metadata(scheduled, self.manager, self.cache.device)
        slots = [first + i for first, length in zip(base.first_slots, base.seq_lens, strict=True)
                 for i in range(length)]
        queries = [(b, s.start + i) for b, s in enumerate(scheduled)
                   for i in range(s.num_tokens)]
        keys = [(b, i) for b, length in enumerate(base.seq_lens) for i in range(length)]
        return NaiveMetadata(**vars(base), slots=torch.tensor(slots, device=self.cache.device),
                             mask=ragged_mask(queries, keys).to(self.cache.device))

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, NaiveMetadata)
        self.cache.store(layer_idx, k, v, metadata.slot_mapping)
        keys, values = self.cache.read(layer_idx, metadata.slots, q.dtype)
        group = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)     # [S, H_q, D]
        scores = torch.einsum("thd,shd->hts", q.float(), keys.float()) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~metadata.mask, float("-inf"))
        return torch.einsum("hts,shd->thd", scores.softmax(dim=-1), values.float()).to(q.dtype)


def ragged_mask(queries: list[tuple[int, int]], keys: list[tuple[int, int]]) -> Tensor:
    """(sequence, position) of each query [T] and key [S] -> [T, S]: which key each query may see."""
    query, key = torch.tensor(queries).view(-1, 1, 2), torch.tensor(keys).view(1, -1, 2)
    same_sequence = query[..., 0] == key[..., 0]
    not_later = key[..., 1] <= query[..., 1]
    return same_sequence & not_later


def contiguous_metadata(scheduled: list[ScheduledSequence], manager: RowKVCacheManager,
                        device: torch.device) -> ContiguousMetadata:
    """Where the sequences lie in the packed batch and in the cache."""
    first_slots = [manager.first_slot(s.sequence) for s in scheduled]
    slots: list[int] = []
    for s, first in zip(scheduled, first_slots, strict=True):
        slots += range(first + s.start, first + s.end)
    return ContiguousMetadata(query_start_loc(scheduled), [s.end for s in scheduled], first_slots,
                              torch.tensor(slots, device=device))


def make_backend(name: str, cache: SlotCache, manager: RowKVCacheManager, dtype: torch.dtype) -> AttentionBackend:
    """The backend that `attention_backend` names, for a model in `dtype`."""
    return NaiveRaggedAttention(cache, manager) if name == "naive" else RaggedAttention(cache, manager, dtype)
