"""F1.2: a contiguous KV cache gives the tokens of the cache-free engine for a fraction of its work."""
from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

import m0_basics
from m0_basics.config import CacheConfig, ConfigError
from m0_basics.loading.loader import load_spec
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.analysis import calculators
from m0_basics.tools.analysis.flop_count import count_flops
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens
from m1_offline import LLM
from m1_offline.attention import ContiguousAttention
from m1_offline.engine import OfflineEngine
from m1_offline.kv_cache import CacheRows, KVCache, check_memory, kv_cache_bytes

CPU = torch.device("cpu")


def make(model: Any, **options: Any) -> tuple[LLM, OfflineEngine, KVCache]:
    llm = LLM(str(model), **{"dtype": "float32", "max_model_len": 96, **options})
    assert isinstance(llm.engine, OfflineEngine)
    backend = llm.engine.runner.backend
    assert isinstance(backend, ContiguousAttention)
    return llm, llm.engine, backend.kv_cache


def new_sequence(num_tokens: int = 4) -> Sequence:
    return Sequence(next_seq_id(), SequenceData(list(range(num_tokens))), SamplingParams(), 0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen3", "qwen2", "llama", "llama3_rope"])
def test_same_tokens_with_and_without_cache(tiny_model: TinyModels, variant: str) -> None:
    """F1.2: m0 recomputes everything, m1 nothing."""
    folder = tiny_model(variant)
    without = m0_basics.LLM(str(folder), dtype="float32").generate(PROMPTS, greedy(24), use_tqdm=False)
    with_cache = make(folder)[0].generate(PROMPTS, greedy(24), use_tqdm=False)
    assert_same_tokens(ids_of(with_cache), ids_of(without))


def step_flops(llm: Any, prompt: list[int], num_steps: int) -> list[int]:
    """FLOPs of each step of one request."""
    llm.engine.add_request(llm.input_processor.process(prompt, greedy(num_steps)))
    flops = [count_flops(llm.engine.step) for _ in range(num_steps)]
    assert not llm.engine.has_unfinished_requests()
    return flops


def test_flops_per_step(tiny_model: TinyModels) -> None:
    """F1.2, counted: a cached step costs a constant and a little per token before it; without a cache, a whole prefill.

    After the prompt of n tokens, cached steps grow by the same few FLOPs each (O(n) in all for a step, from attention
    alone); uncached ones grow with n and their growth grows too, so that a token costs O(n^2) of attention.
    """
    folder, prompt, steps = tiny_model("qwen3"), [5] * 20, 12
    spec = load_spec(folder)
    cached = step_flops(make(folder)[0], prompt, steps)
    uncached = step_flops(m0_basics.LLM(str(folder), dtype="float32"), prompt, steps)

    lengths = range(len(prompt), len(prompt) + steps)
    assert cached == [calculators.step_flops(spec, [calculators.Work(n if n == len(prompt) else 1, n)]).total
                      for n in lengths]
    assert uncached == [calculators.prefill_flops(spec, n).total for n in lengths]

    per_token = 4 * spec.num_hidden_layers * spec.num_attention_heads * spec.head_dim
    assert {b - a for a, b in pairwise(cached[1:])} == {per_token}
    growth = [b - a for a, b in pairwise(uncached)]
    assert {b - a for a, b in pairwise(growth)} == {2 * per_token}, "n^2, so 2 n + 1 per step"
    assert cached[0] == uncached[0]
    assert sum(uncached) > 10 * sum(cached[1:])


class CacheRowsMachine(RuleBasedStateMachine):
    """F1.2: no row is held twice, and free rows and used ones make up all of them, whatever comes and goes."""

    sequences: Bundle[Sequence] = Bundle("sequences")
    NUM_ROWS, ROW_SIZE = 5, 3

    def __init__(self) -> None:
        super().__init__()
        spec = ModelSpec("LlamaForCausalLM", 8, 4, 4, 2, 1, 1, 2, 16, 1e-6, 1e4, False)
        self.cache = KVCache(spec, self.NUM_ROWS * self.ROW_SIZE, torch.float32, CPU)
        self.rows = CacheRows(self.cache, self.NUM_ROWS, self.ROW_SIZE)
        self.held: dict[int, tuple[Sequence, float]] = {}           # seq_id -> sequence, what its row was filled with
        self.count = 0.0

    def fill(self, sequence: Sequence) -> None:
        """Write a number of its own all over the sequence's row."""
        self.count += 1
        first = self.rows.first_slot(sequence)
        self.cache.k[:, first:first + self.ROW_SIZE] = self.count
        self.cache.v[:, first:first + self.ROW_SIZE] = -self.count
        self.held[sequence.seq_id] = (sequence, self.count)

    @precondition(lambda self: self.rows.num_free > 0)
    @rule(target=sequences)
    def allocate(self) -> Sequence:
        sequence = new_sequence()
        self.rows.allocate(sequence)
        self.fill(sequence)
        return sequence

    @precondition(lambda self: self.rows.num_free > 0)
    @rule(target=sequences, parent=sequences, computed=st.integers(0, ROW_SIZE))
    def fork(self, parent: Sequence, computed: int) -> Sequence:
        parent.num_computed_tokens = computed
        child = parent.fork(next_seq_id(), 1)
        self.rows.fork(parent, child)
        first, value = self.rows.first_slot(child), self.held[parent.seq_id][1]
        assert (self.cache.k[:, first:first + computed] == value).all(), "what the parent has computed is copied"
        assert (self.cache.v[:, first:first + computed] == -value).all()
        self.fill(child)                                            # and is the child's own from then on
        return child

    @rule(sequence=consumes(sequences))
    def free(self, sequence: Sequence) -> None:
        self.rows.free(sequence)
        del self.held[sequence.seq_id]

    @invariant()
    def rows_are_disjoint_and_complete(self) -> None:
        firsts = [self.rows.first_slot(sequence) for sequence, _ in self.held.values()]
        assert len(set(firsts)) == len(firsts)
        assert all(first % self.ROW_SIZE == 0 and first < self.NUM_ROWS * self.ROW_SIZE for first in firsts)
        assert self.rows.num_free + len(firsts) == self.NUM_ROWS

    @invariant()
    def nobody_wrote_into_anothers_row(self) -> None:
        for sequence, value in self.held.values():
            row = slice(first := self.rows.first_slot(sequence), first + self.ROW_SIZE)
            assert (self.cache.k[:, row] == value).all()
            assert (self.cache.v[:, row] == -value).all()


TestCacheRows = CacheRowsMachine.TestCase
TestCacheRows.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.fixture
def cache(tiny_model: TinyModels) -> KVCache:
    """Ten slots, the value of each element its own index."""
    cache = KVCache(load_spec(tiny_model("qwen3")), 10, torch.float32, CPU)
    cache.k.copy_(torch.arange(cache.k.numel(), dtype=torch.float32).view_as(cache.k))
    cache.v.copy_(-cache.k)
    return cache


def test_store_writes_the_named_slots_of_one_layer(cache: KVCache) -> None:
    """F1.2: `store` scatters by slot; every other slot and layer stays as it was."""
    before_k, before_v = cache.k.clone(), cache.v.clone()
    k, v = torch.randn(3, *cache.k.shape[2:]), torch.randn(3, *cache.k.shape[2:])
    cache.store(1, k, v, torch.tensor([7, 0, 4]))
    for before, after, new in ((before_k, cache.k, k), (before_v, cache.v, v)):
        expected = before.clone()
        for i, slot in enumerate((7, 0, 4)):
            expected[1, slot] = new[i]
        assert torch.equal(after, expected)


def test_copy_moves_slots_of_all_layers(cache: KVCache) -> None:
    """F1.2: `copy` is what a fork pays."""
    before_k, before_v = cache.k.clone(), cache.v.clone()
    cache.copy(source=5, target=1, num_slots=3)
    for before, after in ((before_k, cache.k), (before_v, cache.v)):
        assert torch.equal(after[:, 1:4], before[:, 5:8])
        assert torch.equal(after[:, [0, *range(4, 10)]], before[:, [0, *range(4, 10)]])


@pytest.mark.slow
@pytest.mark.parametrize("params", [greedy(24), SamplingParams(n=3, seed=1, max_tokens=24, ignore_eos=True)])
def test_nothing_outside_the_stored_slots_is_read(tiny_model: TinyModels, params: SamplingParams) -> None:
    """F1.2: with NaN in every slot before each request the tokens are the same: NaN times 0 would be NaN."""
    llm, _, cache = make(tiny_model("qwen3"))
    expected = [[part.token_ids for part in o.outputs] for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
        poisoned = llm.generate(prompt, params, use_tqdm=False)[0]
        assert [part.token_ids for part in poisoned.outputs] == tokens
    used = ~cache.k.isnan().all(dim=-1).all(dim=-1)                 # [layers, slots]
    assert (used.sum(dim=1) == len(PROMPTS[-1]) * params.n + 23 * params.n).all(), "and no more slots are written"


@pytest.mark.parametrize(("name", "dtype", "tolerance"), [
    ("auto", torch.float32, 0.0), ("float32", torch.float32, 0.0), ("float16", torch.float16, 2e-2),
    ("bfloat16", torch.bfloat16, 2e-1)])
def test_precision_of_the_cache(tiny_model: TinyModels, name: str, dtype: torch.dtype, tolerance: float) -> None:
    """F1.2: the cache may be coarser than the model. The distribution of the next token moves by its rounding only."""
    exact = make(tiny_model("qwen3"))[0]
    llm, _, cache = make(tiny_model("qwen3"), kv_cache_dtype=name)
    assert cache.k.dtype == cache.v.dtype == dtype
    ours, theirs = (engine.generate(PROMPTS, greedy(2, logprobs=288), use_tqdm=False) for engine in (llm, exact))
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        first, second = a.outputs[0].logprobs[1], b.outputs[0].logprobs[1]      # the second token read the cache
        assert a.outputs[0].token_ids[0] == b.outputs[0].token_ids[0]
        largest = max(largest, *(abs(first[i].logprob - second[i].logprob) for i in second))
    assert largest <= tolerance
    assert (largest > 0) == (tolerance > 0), "a coarser cache is really used"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes(tiny_model: TinyModels, dtype: str) -> None:
    """F1.2: the formula is what is allocated."""
    llm, engine, cache = make(tiny_model("qwen3"), kv_cache_dtype=dtype, max_num_seqs=3, max_model_len=50)
    expected = 2 * 3 * (3 * 50) * 2 * 32 * (4 if dtype == "float32" else 2)
    assert cache.nbytes == expected == kv_cache_bytes(llm.spec, 3 * 50, cache.k.dtype)
    assert expected == calculators.kv_bytes(llm.spec, 50, batch=3, dtype=dtype)
    assert cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes() == expected
    assert engine.rows.num_free == 3


def test_memory_budget(tiny_model: TinyModels) -> None:
    """F1.2: a cache above the budget is refused before it is allocated; the message says what to change."""
    with pytest.raises(ConfigError, match=r"kv_cache_memory_bytes=115,199 is too small: 3 rows of 50 tokens take "
                                          r"115,200 bytes; lower max_num_seqs or max_model_len, or raise the budget"):
        make(tiny_model("qwen3"), max_num_seqs=3, max_model_len=50, kv_cache_memory_bytes=115_199,
             kv_cache_dtype="float16")
    make(tiny_model("qwen3"), max_num_seqs=3, max_model_len=50, kv_cache_memory_bytes=115_200,
         kv_cache_dtype="float16")
    with pytest.raises(ConfigError, match=r"the memory of this machine=.* lower max_num_seqs or max_model_len"):
        check_memory(10 ** 15, CacheConfig(), 1, 1, torch.device("cpu"))        # no budget: the machine is the limit
