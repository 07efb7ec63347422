"""F3.10: sequences that forget: what is left is attended to rightly, the memory is free, and nobody loses a block."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import m2_continuous_batching
from m0_basics.attention import AttentionMetadata, ScheduledSequence
from m0_basics.config import ConfigError
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import mixed_length_prompts, reference_greedy, reference_model
from m2_continuous_batching.kv_cache_manager import SlotCopy
from m2_continuous_batching.plugins import KVCompressionPlugin, SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv import LLM
from m3_paged_kv.attention import PagedAttention
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager, paged_manager
from m3_paged_kv.plugins.eviction import AttentionSinks, HeavyHitters, attention_mass

BLOCK = 4
LONG = list(range(20, 50))


def make(tiny_model: TinyModels, *plugins: Any, **options: Any) -> LLM:
    options = {"dtype": "float32", "max_model_len": 256, "num_blocks": 128, "block_size": BLOCK, **options}
    return LLM(str(tiny_model("qwen3")), plugins=plugins, **options)


class Watch(SchedulerPlugin):
    """After each step: the most blocks of any sequence, and of all; how often somebody had to give way."""

    def __init__(self) -> None:
        self.longest = self.most = self.preempted = 0

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        manager = scheduler.kv_cache_manager
        assert isinstance(manager, PagedKVCacheManager)
        tables = [manager.tables[e.sequence] for e in scheduler.running]
        self.longest = max([self.longest, *map(len, tables)])
        self.most = max(self.most, manager.pool.num_used)
        self.preempted += stats.num_preempted


class Log(HeavyHitters):
    """Notes what leaves."""

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.chosen: list[list[int]] = []

    def choose(self, manager: PagedKVCacheManager, sequence: Sequence) -> Iterable[int]:
        self.chosen.append(list(super().choose(manager, sequence)))
        return self.chosen[-1]


def masked_logits(folder: Path, ids: list[int], num_prompt: int, sinks: int, window: int) -> torch.Tensor:
    """transformers over all tokens at once; the mask says what each of them would find in its cache.

    Token p finds the blocks of the sinks, and those with a token among the `window` before it; a prompt finds all.
    """
    p, key = torch.arange(len(ids)).view(-1, 1), torch.arange(len(ids)).view(1, -1)
    is_sink = key < -(-sinks // BLOCK) * BLOCK
    end_of_block = (key // BLOCK + 1) * BLOCK
    visible = (key <= p) & (is_sink | (end_of_block > p - window) | (p < num_prompt))
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    with torch.inference_mode():
        logits: torch.Tensor = reference_model(folder)(torch.tensor([ids]), attention_mask=mask[None, None],
                                                       use_cache=False).logits
    return logits[0]


@pytest.mark.parametrize(("sinks", "window"), [(4, 9), (1, 1), (0, 16), (7, 12), (4, 200)])
def test_equals_attention_with_a_mask(tiny_model: TinyModels, sinks: int, window: int) -> None:
    """F3.10: after every step's evictions, the next token is that of full attention with the same keys masked out."""
    llm = make(tiny_model, AttentionSinks(sinks, window))
    prompts = [LONG, [7, 8, 9], [5]]
    outputs = ids_of(llm.generate(prompts, greedy(50), use_tqdm=False))
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = masked_logits(tiny_model("qwen3"), prompt + output, len(prompt), sinks, window)
        assert logits[len(prompt) - 1:-1].argmax(dim=-1).tolist() == output
    if window < 50:
        assert outputs != ids_of(make(tiny_model).generate(prompts, greedy(50), use_tqdm=False)), "something is missed"


@pytest.mark.parametrize("new", [1, 3, 9])
def test_new_tokens_after_what_is_left(new: int) -> None:
    """F3.10: a decode and a continued prompt see the kept keys and those of their own step, and nothing else.

    Beside them a sequence that was younger and has kept more: padding is by what is kept, not by age.
    """
    spec = ModelSpec("LlamaForCausalLM", 8, 8, 8, 1, 4, 2, 8, 64, rms_norm_eps=1e-5, rope_theta=1e4,
                     tie_word_embeddings=False)
    manager, cache = paged_manager(32, BLOCK), SlotCache(spec, 32 * BLOCK, torch.float32, torch.device("cpu"))
    cache.kv_cache.k.fill_(float("nan"))
    cache.kv_cache.v.fill_(float("nan"))
    backend, generator = PagedAttention(cache, manager.tables, torch.float32), torch.Generator().manual_seed(new)
    old, young = (Sequence(next_seq_id(), SequenceData([1] * 64), SamplingParams(), 0) for _ in range(2))
    steps = [[ScheduledSequence(old, 0, 29), ScheduledSequence(young, 0, 17)],
             [ScheduledSequence(old, 29, new), ScheduledSequence(young, 17, 1)]]
    keys, values = [torch.randn(2, 64, 2, 8, generator=generator) for _ in range(2)]
    q = torch.randn(2, 64, 4, 8, generator=generator)
    for step in steps:
        parts = [slice(s.sequence.num_computed_tokens, s.end) for s in step]
        assert all(manager.allocate_slots(s.sequence, s.sequence.num_computed_tokens, s.num_tokens) for s in step)
        out = backend.forward(0, *(torch.cat([x[i, part] for i, part in enumerate(parts)]) for x in (q, keys, values)),
                              backend.build_metadata(step))
        for s in step:
            s.sequence.num_computed_tokens = s.end
        if step is steps[0]:
            manager.tables.drop(old, [1, 2, 5])                           # tokens 4 to 11 and 20 to 23
    kept = [t for t in range(29) if t // BLOCK not in (1, 2, 5)]
    for sequence, rows, visible in ((0, range(29, 29 + new), kept), (1, range(17, 18), range(17))):
        for token in rows:
            seen = [*visible, *range(rows[0], token + 1)]
            for head in range(4):
                scores = keys[sequence, seen, head // 2] @ q[sequence, token, head] / 8 ** 0.5
                expected = scores.softmax(dim=0) @ values[sequence, seen, head // 2]
                row = token - 29 if sequence == 0 else new
                torch.testing.assert_close(out[row, head], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plugin", [AttentionSinks(4, 120), HeavyHitters(160, 100)])
def test_a_window_for_all_changes_nothing(tiny_model: TinyModels, plugin: Any) -> None:
    """F3.10: transformers' tokens, where everything fits."""
    prompts = mixed_length_prompts(250, 6, seed=1, longest=40)
    outputs = ids_of(make(tiny_model, plugin).generate(prompts, greedy(24), use_tqdm=False))
    assert outputs == reference_greedy(tiny_model("qwen3"), prompts, 24)


@pytest.mark.slow
@pytest.mark.parametrize(("plugin", "bound"), [
    (lambda: AttentionSinks(4, 16), 1 + 4 + 1), (lambda: AttentionSinks(5, 17), 2 + 5 + 1),
    (lambda: HeavyHitters(32, 8), 8), (lambda: HeavyHitters(30, 9), 7)])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_bound_holds(tiny_model: TinyModels, plugin: Any, bound: int, ahead: bool) -> None:
    """F3.10: no sequence holds more blocks than its policy says, after any step, also with the next step chosen.

    One step ahead, a sequence holds the block that its next token goes into, too.
    """
    watch, prompts = Watch(), [LONG, [7, 8, 9], [5] * 17]
    llm = make(tiny_model, plugin(), watch, async_scheduling=ahead)
    outputs = ids_of(llm.generate(prompts, greedy(60), use_tqdm=False))
    assert all(len(output) == 60 for output in outputs)
    assert 0 < watch.longest <= bound + ahead
    assert llm.manager.usage == 0
    again = make(tiny_model, plugin(), async_scheduling=not ahead)
    assert ids_of(again.generate(prompts, greedy(60), use_tqdm=False)) == outputs, "the same, ahead or not"


def test_four_times_the_length_without_giving_way(tiny_model: TinyModels) -> None:
    """F3.10: in 40 blocks, two sequences of 130 tokens get into each other's way, unless they forget."""
    def run(*plugins: Any) -> Watch:
        watch = Watch()
        llm = make(tiny_model, *plugins, watch, num_blocks=40, max_model_len=160)
        outputs = ids_of(llm.generate([[7, 8], [9, 10]], greedy(128), use_tqdm=False))
        assert [len(output) for output in outputs] == [128, 128]
        assert llm.manager.usage == 0
        return watch

    plain, sinks, heavy = run(), run(AttentionSinks(4, 24)), run(HeavyHitters(32, 16))
    assert plain.preempted > 0
    assert (sinks.preempted, heavy.preempted) == (0, 0)
    assert max(sinks.most, heavy.most) <= 2 * 8, "a quarter of what they would hold"


@pytest.mark.parametrize("plugin", [lambda: AttentionSinks(4, 16), lambda: HeavyHitters(24, 8)])
def test_forks_forget_like_their_parent(tiny_model: TinyModels, plugin: Any) -> None:
    """F3.5, F3.10: three outputs from a prompt that has lost blocks already, each of them the most probable tokens."""
    params = SamplingParams(n=3, temperature=1.0, top_k=1, max_tokens=30, ignore_eos=True)
    llm = make(tiny_model, plugin())
    outputs = [o.token_ids for o in llm.generate([LONG], params, use_tqdm=False)[0].outputs]
    assert outputs[0] == outputs[1] == outputs[2]
    alone = ids_of(make(tiny_model, AttentionSinks(4, 16)).generate([LONG], greedy(30), use_tqdm=False))
    assert outputs[0] == alone[0] or isinstance(plugin(), HeavyHitters), "its blocks get attention from three"
    assert llm.manager.usage == 0


def test_swapped_sequences_come_back_as_they_left(tiny_model: TinyModels) -> None:
    """F3.6, F3.10: forgetting and giving way, in turns, change no token; recomputed ones do see everything again."""
    prompts = [[7 + i, 30, 4 * i] * 4 for i in range(5)]

    def run(**options: Any) -> tuple[list[list[int]], Watch]:
        watch = Watch()
        llm = make(tiny_model, AttentionSinks(4, 20), watch, max_model_len=64, **options)
        outputs = ids_of(llm.generate(prompts, greedy(48), use_tqdm=False))
        assert (llm.manager.usage, len(llm.manager.swapped), llm.manager.swapped.host_pool.num_used) == (0.0, 0, 0)
        return outputs, watch

    expected, roomy = run()
    turns = {"policy": "round-robin:6", "max_num_seqs": 2, "num_blocks": 20}
    swapped, tight = run(**turns, swap_space=0.01)
    assert roomy.preempted == 0 < tight.preempted
    assert swapped == expected
    recomputed, tight = run(**turns, swap_space=0)
    assert tight.preempted > 0
    assert [len(output) for output in recomputed] == [48] * 5
    assert recomputed != expected


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(st.integers(1, 30), min_size=1, max_size=6), outputs=st.integers(1, 3),
       num_blocks=st.integers(16, 24), swap_space=st.sampled_from([0.0, 0.00002, 0.01]), window=st.integers(1, 20),
       sinks=st.integers(0, 9), policy=st.sampled_from(["fcfs", "round-robin:3"]), ahead=st.booleans())
def test_it_always_ends(tiny_model: TinyModels, prompts: list[int], outputs: int, num_blocks: int, swap_space: float,
                        window: int, sinks: int, policy: str, ahead: bool) -> None:
    """F3.8, F3.10: forgetting, forking, giving way, in tiny pools: all tokens are there, all blocks come back."""
    llm = make(tiny_model, AttentionSinks(sinks, window), num_blocks=num_blocks, swap_space=swap_space, policy=policy,
               max_model_len=60, async_scheduling=ahead, skip_tokenizer_init=True)
    params = SamplingParams(n=outputs, seed=1, max_tokens=30, ignore_eos=True)
    for output in llm.generate([{"prompt_token_ids": [9] * n} for n in prompts], params, use_tqdm=False):
        assert [len(part.token_ids) for part in output.outputs] == [30] * outputs
    assert (llm.manager.usage, len(llm.manager.swapped), llm.manager.swapped.host_pool.num_used) == (0.0, 0, 0)
    assert not llm.manager.tables._num_dropped


def test_attention_mass_by_hand() -> None:
    """Two queries of a sequence of three, one of a sequence of one; places beyond the end were never written."""
    q, keys = torch.zeros(2, 1, 2, 4), torch.zeros(2, 4, 1, 4)
    keys[0, 3] = keys[1, 1:] = float("nan")
    keys[0, 1] = torch.tensor([2.0, 0, 0, 0])
    q[0, 0, 1] = torch.tensor([1.0, 0, 0, 0])               # scores 0, 2 / sqrt(4) = 1, 0 in one of the two heads
    e = float(torch.tensor(1.0).exp())
    expected = torch.tensor([[1 / 3 + 1 / (e + 2), 1 / 3 + e / (e + 2), 1 / 3 + 1 / (e + 2), 0], [2, 0, 0, 0]])
    torch.testing.assert_close(attention_mass(q, keys, torch.tensor([3, 1])), expected)
    both = torch.cat((q[:1], q[:1]), dim=1)                 # the same query twice: the first does not see the third key
    first = torch.tensor([1 / 2 + 1 / (e + 1), 1 / 2 + e / (e + 1), 0, 0])
    torch.testing.assert_close(attention_mass(both, keys[:1], torch.tensor([3]))[0], expected[0] + first)


def test_the_lightest_blocks_leave(tiny_model: TinyModels) -> None:
    """F3.10: the first to leave are those that transformers' attention, over all layers and heads, weighs least.

    A second request in the same blocks starts from nothing; a prompt longer than the chunks of queries is the same.
    """
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model("qwen3")), dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    plugin = Log(40, 12)
    llm = make(tiny_model, plugin, num_blocks=100, max_model_len=400)
    for prompt in (LONG * 2, [9, 3, 44, 100, 7] * 10, LONG * 10):
        plugin.chosen.clear()
        llm.generate([prompt], greedy(2), use_tqdm=False)
        with torch.inference_mode():
            attentions = model(torch.tensor([prompt]), output_attentions=True).attentions
        mass = sum(layer[0].sum(dim=(0, 1)) for layer in attentions)
        num_old = (len(prompt) - 12) // BLOCK
        by_block = mass[:num_old * BLOCK].view(-1, BLOCK).sum(dim=1)
        too_many = -(-len(prompt) // BLOCK) - 10
        assert too_many > 0
        assert set(plugin.chosen[0]) == set(by_block.argsort()[:too_many].tolist())


@pytest.mark.parametrize(("policy", "arguments", "message"), [
    (AttentionSinks, (-1, 8), "num_sink_tokens=-1"), (AttentionSinks, (4, 0), "window=0"),
    (HeavyHitters, (0, 8), "budget=0"), (HeavyHitters, (64, True), "recent=True")])
def test_bad_options_are_refused(policy: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(*arguments)


def test_what_does_not_fit_the_engine_is_refused(tiny_model: TinyModels) -> None:
    with pytest.raises(ConfigError, match=r"budget=19 is not valid; allowed: at least 20"):
        make(tiny_model, HeavyHitters(19, 13))
    with pytest.raises(ConfigError, match=r"stored as torch\.int8"):
        make(tiny_model, HeavyHitters(), KVCompressionPlugin())
    plugin = HeavyHitters()
    make(tiny_model, plugin)
    with pytest.raises(ConfigError, match="this HeavyHitters serves an engine already"):
        make(tiny_model, plugin)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("plugin", [AttentionSinks, lambda: HeavyHitters(64, 1)])
def test_rows_are_refused_before_anything_runs(tiny_model: TinyModels, plugin: Any, ahead: bool) -> None:
    """F3.10: an engine without blocks says so itself: no request fails, and none has run."""
    rows = m2_continuous_batching.LLM(str(tiny_model("qwen3")), plugins=[plugin()], dtype="float32", max_model_len=32,
                                      async_scheduling=ahead)
    request = rows.input_processor.process({"prompt_token_ids": [7, 8]}, greedy(1))
    rows.engine.add_request(request)
    with pytest.raises(ConfigError, match=r"\w+ takes blocks; allowed: an engine whose cache consists of blocks"):
        rows.engine.step()
    assert (request.sequences[0].num_computed_tokens, request.sequences[0].output_token_ids) == (0, [])


def test_attention_without_blocks_is_refused() -> None:
    """F3.10: before the attention that it is wrapped around has stored anything."""
    stored: list[int] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        stored.append(len(k))
        return q

    x = torch.zeros(1, 1, 4)
    with pytest.raises(ConfigError, match="HeavyHitters takes blocks"):
        HeavyHitters().forward(0, x, x, x, AttentionMetadata([0, 1]), attend)
    assert stored == []


def test_a_copied_block_takes_its_attention_along() -> None:
    """F3.5, F3.10: copy-on-write leaves both with what the block has got so far; then each gets its own."""
    plugin = HeavyHitters(64, 1)
    spec = ModelSpec("LlamaForCausalLM", 8, 8, 8, 1, 4, 2, 8, 64, rms_norm_eps=1e-5, rope_theta=1e4,
                     tie_word_embeddings=False)
    cache = SlotCache(spec, 4 * BLOCK, torch.float32, torch.device("cpu"), [plugin], BLOCK)
    plugin._mass[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    cache.copy_slots([SlotCopy(BLOCK, 3 * BLOCK, 2)])
    assert plugin._mass.tolist() == [1, 2, 3, 2]
    x = torch.zeros(1, 2, 8)
    cache.store(0, x, x, torch.tensor([3 * BLOCK + 2]))
    assert plugin._mass.tolist() == [1, 2, 3, 2], "its first slot is older than the copy"
    cache.store(0, x, x, torch.tensor([BLOCK]))
    assert plugin._mass.tolist() == [1, 0, 3, 2], "a new owner starts from nothing"
