"""F2.3: ragged attention, against a mask made by two loops and a softmax written out in double precision."""
from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m0_basics.attention import AttentionBackend, ScheduledSequence
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.attention import NaiveRaggedAttention, RaggedAttention, ragged_mask
from m2_continuous_batching.kv_cache_manager import RowKVCacheManager
from m2_continuous_batching.slot_cache import SlotCache

ROW_SIZE, HEAD_DIM, LAYERS = 40, 8, 2
CPU = torch.device("cpu")
positions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=12)


@given(queries=positions, keys=positions)
def test_mask_is_its_definition(queries: list[tuple[int, int]], keys: list[tuple[int, int]]) -> None:
    mask = ragged_mask(queries, keys)
    assert (mask.shape, mask.dtype) == ((len(queries), len(keys)), torch.bool)
    for i, (query_sequence, query_position) in enumerate(queries):
        for j, (key_sequence, key_position) in enumerate(keys):
            assert bool(mask[i, j]) == (query_sequence == key_sequence and key_position <= query_position)


class Bench:
    """A batch with random history in rows of no order; every slot that holds nothing holds NaN."""

    def __init__(self, sequences: list[tuple[int, int]], num_heads: int, num_kv_heads: int, seed: int,
                 dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(n: int, heads: int) -> Tensor:
            return torch.randn(LAYERS, n, heads, HEAD_DIM, generator=generator).to(dtype)

        self.spec = ModelSpec("LlamaForCausalLM", 8, 8, 8, LAYERS, num_heads, num_kv_heads, HEAD_DIM, ROW_SIZE,
                              rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False)
        self.dtype = dtype
        self.manager = RowKVCacheManager(len(sequences) + 2, ROW_SIZE)
        self.scheduled = [self._schedule(computed, new) for computed, new in sequences]
        for i in random.Random(seed).sample(range(len(sequences)), len(sequences)):
            assert self.manager.allocate_slots(*self.scheduled[i][:3])
        lengths = [computed + new for computed, new in sequences]
        self.queries = [draw(new, num_heads) for _, new in sequences]
        self.keys, self.values = ([draw(n, num_kv_heads) for n in lengths] for _ in range(2))

    @staticmethod
    def _schedule(computed: int, new: int) -> ScheduledSequence:
        sequence = Sequence(next_seq_id(), SequenceData([1] * (computed + new)), SamplingParams(), seed=0)
        sequence.num_computed_tokens = computed
        return ScheduledSequence(sequence, sequence.num_computed_tokens, new)

    def cache(self) -> SlotCache:
        cache = SlotCache(self.spec, self.manager.num_rows * ROW_SIZE, self.dtype, CPU)
        for tensor, source in ((cache.kv_cache.k, self.keys), (cache.kv_cache.v, self.values)):
            tensor.fill_(float("nan"))
            for s, x in zip(self.scheduled, source, strict=True):
                first, computed = self.manager.first_slot(s.sequence), s.sequence.num_computed_tokens
                tensor[:, first:first + computed] = x[:, :computed]
        return cache

    def run(self, backend: AttentionBackend) -> list[Tensor]:
        """Output [T, H_q, D] of each layer, with one metadata for all of them."""
        metadata = backend.build_metadata(self.scheduled)
        outputs = []
        for layer in range(LAYERS):
            k, v = (torch.cat([x[layer, s.sequence.num_computed_tokens:] for s, x in
                               zip(self.scheduled, source, strict=True)]) for source in (self.keys, self.values))
            outputs.append(backend.forward(layer, torch.cat([q[layer] for q in self.queries]), k, v, metadata))
        return outputs

    def expected(self, layer: int) -> Tensor:
        """Token by token and head by head: softmax(q k / sqrt(D)) v over the tokens up to its own."""
        rows = []
        for s, q, k, v in zip(self.scheduled, self.queries, self.keys, self.values, strict=True):
            for i in range(s.num_tokens):
                visible = s.sequence.num_computed_tokens + i + 1
                heads = []
                for h in range(q.shape[2]):
                    kv_head = h // (q.shape[2] // k.shape[2])
                    scores = k[layer, :visible, kv_head].double() @ q[layer, i, h].double() / HEAD_DIM ** 0.5
                    weights = (scores - scores.max()).exp()
                    heads.append(weights / weights.sum() @ v[layer, :visible, kv_head].double())
                rows.append(torch.stack(heads))
        return torch.stack(rows)

    def backends(self) -> list[AttentionBackend]:
        return [RaggedAttention(self.cache(), self.manager, self.dtype),
                NaiveRaggedAttention(self.cache(), self.manager)]

    def check(self, tolerance: float) -> None:
        for backend in self.backends():
            for layer, out in enumerate(self.run(backend)):
                assert out.dtype == self.dtype
                torch.testing.assert_close(out.double(), self.expected(layer), rtol=tolerance, atol=tolerance)
            assert isinstance(backend, (RaggedAttention, NaiveRaggedAttention))
            for s, k in zip(self.scheduled, self.keys, strict=True):
                first = self.manager.first_slot(s.sequence)
                stored = backend.cache.kv_cache.k[:, first:first + ROW_SIZE]
                torch.testing.assert_close(stored[:, :s.end], k, rtol=0, atol=0)
                assert stored[:, s.end:].isnan().all(), "nothing is written behind the end"


BATCHES = {
    "prompts": [(0, 5), (0, 1), (0, 13)],
    "decodes": [(7, 1), (30, 1), (1, 1)],
    "decodes of equal length": [(9, 1), (9, 1), (9, 1)],
    "more decodes than two groups hold": [((7 * i) % 38, 1) for i in range(19)],
    "continued prompts": [(4, 6), (20, 3), (1, 2)],
    "mixed": [(5, 1), (0, 8), (3, 4), (12, 1), (0, 1), (30, 9), (2, 1)],
    "one": [(0, 1)],
}


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["own key heads", "grouped", "one key head"])
@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
def test_both_equal_each_sequence_alone(sequences: list[tuple[int, int]], heads: tuple[int, int]) -> None:
    Bench(sequences, *heads, seed=len(sequences)).check(1e-5)


@settings(max_examples=40, deadline=None)
@given(sequences=st.lists(st.tuples(st.integers(0, 30), st.sampled_from([1, 1, 1, 2, 5, 9])), min_size=1, max_size=20),
       heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]), seed=st.integers(0, 1000))
def test_both_on_random_batches(sequences: list[tuple[int, int]], heads: tuple[int, int], seed: int) -> None:
    Bench(sequences, *heads, seed=seed).check(1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The inputs are rounded before the reference sees them, so only the arithmetic and the result are rounded."""
    Bench(BATCHES["mixed"], 4, 2, seed=3, dtype=dtype).check(3e-2 if dtype == torch.bfloat16 else 4e-3)


def test_metadata_by_hand() -> None:
    """Three sequences in rows 2, 0 and 1 of 40 slots: a continued prompt, and two that decode."""
    bench = Bench([(3, 2), (4, 1), (1, 1)], 2, 1, seed=0)
    a, b, c = (s.sequence for s in bench.scheduled)
    bench.manager._row_of = {a.seq_id: 2, b.seq_id: 0, c.seq_id: 1}
    metadata = RaggedAttention(bench.cache(), bench.manager, torch.float32).build_metadata(bench.scheduled)
    assert metadata.query_start_loc == [0, 2, 3, 4]
    assert metadata.seq_lens == [5, 5, 2]
    assert metadata.first_slots == [80, 0, 40]
    assert metadata.slot_mapping.tolist() == [83, 84, 4, 41]
    assert metadata.prefills == [0]
    (group,) = metadata.decode_groups
    assert group.rows.tolist() == [3, 2], "the shorter one first"
    assert group.slots.view(2, 5).tolist() == [[40, 41, 40, 40, 40], [0, 1, 2, 3, 4]], "padding reads the first slot"
    assert group.mask is not None
    assert group.mask[:, 0, 0].tolist() == [[0, 0] + [float("-inf")] * 3, [0] * 5]

    naive = NaiveRaggedAttention(bench.cache(), bench.manager).build_metadata(bench.scheduled)
    assert naive.slots.tolist() == [80, 81, 82, 83, 84, 0, 1, 2, 3, 4, 40, 41]
    assert naive.mask.int().tolist() == [[1, 1, 1, 1, 0, *[0] * 7], [1] * 5 + [0] * 7, [0] * 5 + [1] * 5 + [0, 0],
                                         [0] * 10 + [1, 1]]


def test_groups_are_of_similar_length_and_unpadded_where_they_can_be() -> None:
    bench = Bench([(i, 1) for i in (20, 3, 20, 3, 20, 3, 20, 3, 20, 3, 20, 3, 20, 3, 20, 3)], 2, 2, seed=0)
    metadata = RaggedAttention(bench.cache(), bench.manager, torch.float32).build_metadata(bench.scheduled)
    assert [sorted(g.rows.tolist()) for g in metadata.decode_groups] == [list(range(1, 16, 2)), list(range(0, 16, 2))]
    assert [g.mask for g in metadata.decode_groups] == [None, None]


def test_a_neighbour_changes_nothing() -> None:
    """A sequence's output is the same with other neighbours, or none."""
    together = Bench(BATCHES["mixed"], 4, 2, seed=1)
    ragged = together.backends()[0]
    out, metadata = together.run(ragged)[0], ragged.build_metadata(together.scheduled)
    for i, s in enumerate(together.scheduled):
        starts = metadata.query_start_loc
        alone = Bench([BATCHES["mixed"][i]], 4, 2, seed=1)
        alone.scheduled, alone.manager = [s], together.manager
        alone.queries, alone.keys, alone.values = ([x[i]] for x in (together.queries, together.keys, together.values))
        torch.testing.assert_close(alone.run(alone.backends()[0])[0], out[starts[i]:starts[i + 1]],
                                   rtol=1e-6, atol=1e-6)
