"""The milestone's idea in 80 lines gives what its engine gives, and runs by itself."""
from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from m0_basics.attention import ScheduledSequence
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.idea import run_idea
from m1_offline.attention import attend
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv import idea
from m3_paged_kv.attention import PagedAttention
from m3_paged_kv.kv_cache_manager import paged_manager

NUM_BLOCKS, HEADS, HEAD_DIM = 60, 2, 8
SHAPE = (2, HEADS, HEAD_DIM)            # what is kept for a token: a key and a value of each head


@pytest.mark.slow
def test_it_runs_by_itself() -> None:
    assert "32 tokens in 7 blocks, 28 slots" in run_idea("m3_paged_kv")


class Both:
    """The idea's cache and the engine's, told the same."""

    def __init__(self, block_size: int) -> None:
        self.small = idea.PagedCache(NUM_BLOCKS, block_size, 2 * HEADS * HEAD_DIM)
        spec = ModelSpec("LlamaForCausalLM", 8, 8, 8, 1, HEADS, HEADS, HEAD_DIM, 64, rms_norm_eps=1e-5, rope_theta=1e4,
                         tie_word_embeddings=False)
        self.manager = paged_manager(NUM_BLOCKS, block_size)
        self.cache = SlotCache(spec, NUM_BLOCKS * block_size, torch.float32, torch.device("cpu"))
        self.backend = PagedAttention(self.cache, self.manager.tables, torch.float32)
        self.generator = torch.Generator().manual_seed(block_size)
        self.pairs = [self._new()]

    def _new(self) -> tuple[idea.Sequence, Sequence]:
        return idea.Sequence(), Sequence(next_seq_id(), SequenceData([1] * 200), SamplingParams(), seed=0)

    def step(self, chosen: list[int]) -> Tensor:
        """One more token for some -> [b, H, D]: the engine's attention less that over what the idea keeps."""
        scheduled, news = [], [torch.randn(SHAPE, generator=self.generator) for _ in chosen]
        for i, new in zip(chosen, news, strict=True):
            small, sequence = self.pairs[i]
            assert self.manager.allocate_slots(sequence, small.length, 1)
            self.cache.copy_slots(self.manager.take_copies())
            scheduled.append(ScheduledSequence(sequence, small.length, 1))
            self.small.append(small, new.flatten())
        q = torch.randn(len(chosen), HEADS, HEAD_DIM, generator=self.generator)
        k, v = torch.stack(news).unbind(1)
        out = self.backend.forward(0, q, k, v, self.backend.build_metadata(scheduled))
        kept = [self.small.gather(self.pairs[i][0]).view(-1, *SHAPE) for i in chosen]
        expected = torch.cat([attend(q[n:n + 1], x[:, 0], x[:, 1]) for n, x in enumerate(kept)])
        return out - expected

    def fork(self, i: int) -> None:
        small, parent = self.pairs[i]
        child = self._new()[1]
        parent.num_computed_tokens = small.length
        assert self.manager.fork(parent, child)
        self.pairs.append((self.small.fork(small), child))

    def release(self, i: int) -> None:
        small, sequence = self.pairs.pop(i)
        self.small.release(small)
        self.manager.free(sequence)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_same_sharing_and_same_attention_as_the_engine(block_size: int) -> None:
    """Sequences that start, grow, fork and end, in random order: the same blocks shared, the same numbers read."""
    both, dice, num_copies = Both(block_size), random.Random(block_size), 0
    for _ in range(150):
        action = dice.choice(["step", "step", "step", "fork", "new", "release"])
        if action == "release" and len(both.pairs) > 3:
            both.release(dice.randrange(len(both.pairs)))
        elif action == "new" and len(both.pairs) < 4:
            both.pairs.append(both._new())
        elif action == "fork" and len(both.pairs) < 5 and both.pairs[0][0].length:
            both.fork(0)
        before = [small.table.copy() for small, _ in both.pairs]
        difference = both.step(dice.sample(range(len(both.pairs)), dice.randint(1, len(both.pairs))))
        assert difference.abs().max() < 1e-5
        num_copies += sum(a != small.table[:len(a)] for a, (small, _) in zip(before, both.pairs, strict=True))
        if max(small.length for small, _ in both.pairs) >= NUM_BLOCKS * block_size // 6:
            both.release(max(range(len(both.pairs)), key=lambda i: both.pairs[i][0].length))
            both.pairs = both.pairs or [both._new()]
        grown = [(small, sequence) for small, sequence in both.pairs if small.length]
        ours, theirs = [small.table for small, _ in grown], [both.manager.tables[s] for _, s in grown]
        assert sharing(ours) == sharing(theirs)
        assert NUM_BLOCKS - len(both.small.free) == both.manager.pool.num_used
        assert [[both.small.holders[block] for block in table] for table in ours] == (
            [[both.manager.pool.ref_count(block) for block in table] for table in theirs])
    assert num_copies > 5 or block_size == 1, "copy-on-write has happened"


def sharing(tables: list[list[int]]) -> list[list[int]]:
    """The tables with their blocks renamed in the order in which they appear: who shares what, wherever it lies."""
    names: dict[int, int] = {}
    return [[names.setdefault(block, len(names)) for block in table] for table in tables]
