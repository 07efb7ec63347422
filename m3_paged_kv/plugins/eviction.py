"""Sequences that forget: whole blocks leave the middle of a sequence's table, and others may have them.

    before    [ 4 | 1 | 7 | 2 | 9 ]        a table of five blocks, the last one half full
    after     [ 4 |     7 | 2 | 9 ]        block 1 is free; the tokens after it lie one place further to the left

What is kept: the first tokens and the newest (`AttentionSinks`), or those that were attended to most and the newest
(`HeavyHitters`). A key keeps the rotary position that it was stored with, so distances stay true and positions go on
growing up to max_model_len; StreamingLLM numbers the kept keys anew and may run for ever. A prompt runs whole, then
forgets. A preempted sequence that is recomputed sees everything again; one that was swapped comes back as it left.

T tokens in the step, B sequences, b sequences with n new tokens each, L places in their tables, H_q / H_kv query /
key-value heads, G = H_q / H_kv, D head size.
"""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from m0_basics.attention import AttentionMetadata
from m0_basics.config import ConfigError, check_int, reject
from m0_basics.request import Sequence
from m1_offline.kv_cache import KVCache
from m2_continuous_batching.kv_cache_manager import SlotCopy
from m2_continuous_batching.plugins.base import (
    Attend,
    AttentionPlugin,
    CachePlugin,
    SchedulerPlugin,
    StepStats,
    check_unused,
)
from m2_continuous_batching.scheduler import Scheduler

from ..block_tables import BlockTables, HasBlocks
from ..metadata import PagedMetadata

_QUERY_ROWS = 256           # queries of a prompt whose attention is held at once


class EvictionPlugin(SchedulerPlugin):
    """After each step, takes from every running sequence the blocks that `choose` names."""

    def before_step(self, scheduler: Scheduler) -> None:
        """Raises ConfigError, before anything runs, where the engine's cache does not consist of blocks."""
        self._blocks_of(scheduler)

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        tables = self._blocks_of(scheduler)
        for entry in scheduler.running:
            if entry.sequence.num_computed_tokens < entry.sequence.num_prompt_tokens:
                continue                            # its prompt is still running
            tables.drop(entry.sequence, self.choose(tables, entry.sequence))

    @abstractmethod
    def choose(self, tables: BlockTables, sequence: Sequence) -> Iterable[int]:
        """Places in the sequence's block table, without the newest token's."""

    def _blocks_of(self, scheduler: Scheduler) -> BlockTables:
        if not isinstance(scheduler.kv_cache_manager, HasBlocks):
            raise self._no_blocks()
        return scheduler.kv_cache_manager.tables

    def _no_blocks(self) -> ConfigError:
        return ConfigError(f"{type(self).__name__} takes blocks; allowed: an engine whose cache consists of blocks")


class AttentionSinks(EvictionPlugin):
    """Keeps the first tokens and the newest (StreamingLLM, arXiv 2309.17453, section 3.2).

    The first tokens get much of the attention, whatever they say: softmax has to put it somewhere. Both numbers of
    tokens are rounded up to whole blocks, so a sequence holds at most
    ceil(num_sink_tokens / block_size) + ceil(window / block_size) + 1 blocks once its prompt has run. Under async
    scheduling it is one more: the block that the next step's token goes into is taken before the last step's leave.
    """

    def __init__(self, num_sink_tokens: int = 4, window: int = 1024) -> None:
        check_int("num_sink_tokens", num_sink_tokens, 0)
        check_int("window", window, 1)
        self.num_sink_tokens = num_sink_tokens
        self.window = window

    def choose(self, tables: BlockTables, sequence: Sequence) -> Iterable[int]:
        num_kept = tables.place(sequence, sequence.num_computed_tokens)
        return range(tables.num_blocks_of(self.num_sink_tokens), (num_kept - self.window) // tables.block_size)


class HeavyHitters(EvictionPlugin, AttentionPlugin, CachePlugin):
    """Keeps the newest tokens, and of the others those that got most attention (H2O, arXiv 2306.14048, section 4).

    H2O chooses tokens, for each head and layer by themselves. A block is shared by all of them, so what is compared
    here is the attention that a block's tokens got in sum: over layers, heads and all queries so far. To know it the
    scores are computed a second time, in plain PyTorch: this measures a policy, it does not save time. An object
    serves one engine, and that engine recomputes what it preempts.
    """

    def __init__(self, budget: int = 1024, recent: int = 256) -> None:
        """Keeps `budget` tokens (whole blocks), among them the `recent` newest."""
        check_int("recent", recent, 1)
        check_int("budget", budget, 1)
        self.budget = budget
        self.recent = recent
        self._kv_cache: KVCache | None = None
        self._mass = torch.zeros(0)                 # by block: attention that its tokens got since it was taken
        self._block_size = 1

    def attach(self, kv_cache: KVCache, dtype: torch.dtype, block_size: int) -> None:
        check_unused(self, self._kv_cache is None)
        if not kv_cache.k.dtype.is_floating_point:
            raise ConfigError(f"HeavyHitters reads keys as they are stored, and they are stored as {kv_cache.k.dtype}; "
                              "allowed: a cache without compression")
        protected = -(-self.recent // block_size) + 1               # the newest tokens may begin inside a block
        if self.budget // block_size < protected:
            raise reject("budget", self.budget, f"at least {protected * block_size}, the blocks of {block_size} that "
                                                f"{self.recent} recent tokens touch")
        self._kv_cache, self._block_size = kv_cache, block_size
        self._mass = torch.zeros(kv_cache.k.shape[1] // block_size, device=kv_cache.k.device)

    def after_append(self, layer_idx: int, slot_mapping: Tensor) -> None:
        if layer_idx == 0:                          # a block whose first slot is written has a new owner
            self._mass[slot_mapping[slot_mapping % self._block_size == 0] // self._block_size] = 0.0

    def on_copy(self, copies: list[SlotCopy]) -> None:
        for c in copies:
            self._mass[c.target // self._block_size] = self._mass[c.source // self._block_size]

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata,
                attend: Attend) -> Tensor:
        if not isinstance(metadata, PagedMetadata):
            raise self._no_blocks()
        out = attend(q, k, v)                       # which stores the new keys
        starts = torch.tensor(metadata.query_start_loc, device=q.device)
        counts = [stop - start for start, stop in pairwise(metadata.query_start_loc)]
        for n in set(counts):                       # all that decode at once, prompts by their length
            members = torch.tensor([i for i, count in enumerate(counts) if count == n], device=q.device)
            rows = starts[members].unsqueeze(1) + torch.arange(n, device=q.device)
            self._observe(layer_idx, q[rows], metadata.block_table[members], metadata.seq_lens[members])
        return out

    def _observe(self, layer_idx: int, q: Tensor, block_table: Tensor, lengths: Tensor) -> None:
        """Add what q [b, n, H_q, D] attends to in the blocks [b, L / block_size] that hold `lengths` [b] tokens."""
        assert self._kv_cache is not None
        blocks = block_table.long().clamp(min=0)    # padding: some block, which gets no attention
        slots = blocks.unsqueeze(-1) * self._block_size + torch.arange(self._block_size, device=q.device)
        keys = self._kv_cache.k[layer_idx].index_select(0, slots.flatten()).unflatten(0, (len(blocks), -1))
        mass = attention_mass(q, keys, lengths).view(*blocks.shape, self._block_size).sum(dim=-1)
        self._mass.index_add_(0, blocks.flatten(), mass.flatten())

    def choose(self, tables: BlockTables, sequence: Sequence) -> Iterable[int]:
        kept, table = tables.place(sequence, sequence.num_computed_tokens), tables[sequence]
        too_many = tables.num_blocks_of(kept) - self.budget // tables.block_size
        if too_many <= 0:
            return []
        old = table[:(kept - self.recent) // tables.block_size]
        mass = self._mass[torch.tensor(old, device=self._mass.device)].tolist()
        return sorted(range(len(old)), key=mass.__getitem__)[:too_many]


def attention_mass(q: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    """Attention that each key gets, summed over queries and heads: [b, L], float32. Causal.

    q [b, n, H_q, D] are the newest n of `lengths` [b] tokens, whose keys lie first in keys [b, L, H_kv, D].
    """
    b, n, _, head_dim = q.shape
    places = torch.arange(keys.shape[1], device=q.device)
    mass = torch.zeros(b, keys.shape[1], device=q.device)
    for first in range(0, n, _QUERY_ROWS):
        part = q[:, first:first + _QUERY_ROWS].float()
        grouped = part.unflatten(2, (keys.shape[2], -1))                                # [b, rows, H_kv, G, D]
        scores = torch.einsum("bnhgd,blhd->bhgnl", grouped, keys.float()) * head_dim ** -0.5
        position = lengths.unsqueeze(1) - n + first + torch.arange(part.shape[1], device=q.device)
        hidden = places > position.unsqueeze(-1)                                        # [b, rows, L]
        # Slots beyond a sequence's end were perhaps never written: the mask replaces what they give, also NaN.
        mass += scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(dim=-1).sum(dim=(1, 2, 3))
    return mass
