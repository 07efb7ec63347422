"""F6.2, F6.4, F6.6, F6.7: what users see of the prefix cache, and that no token changes by it."""
from __future__ import annotations

from typing import Any

import pytest

import m5_chunked_prefill as m5
from m0_basics import ConfigError, SamplingParams
from m0_basics.base_llm import BaseLLM
from m0_basics.sampling_params import BeamSearchParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m2_continuous_batching.policies import SchedulingParams
from m3_paged_kv.plugins.kv_quant import BlockQuantisation
from m6_prefix_cache import LLM
from m6_prefix_cache.prefix_stats import PrefixCacheStats

BASE: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "block_size": 8, "num_blocks": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = list(range(20, 52))


@pytest.fixture(scope="module")
def model(tiny_model: TinyModels) -> str:
    return str(tiny_model("qwen3"))


def ask(llm: BaseLLM, prompts: list[list[int]], params: SamplingParams = GREEDY, salt: str | None = None,
        ) -> tuple[list[list[int]], list[int]]:
    """The answers, and how many tokens of each prompt were in the cache."""
    outputs = llm.generate([{"prompt_token_ids": p, "cache_salt": salt} for p in prompts], params, use_tqdm=False)
    return [list(c.token_ids) for o in outputs for c in o.outputs], [o.num_cached_tokens for o in outputs]


def stats_of(llm: LLM) -> PrefixCacheStats:
    return next(p for p in engine_of(llm).plugins if isinstance(p, PrefixCacheStats))


@pytest.mark.parametrize("index", ["radix", "hash"])
def test_a_conversation_hits_by_itself(model: str, index: str) -> None:
    """Each turn finds the whole blocks of the one before it, answers included."""
    llm, plain = LLM(model, prefix_index=index, **BASE), m5.LLM(model, **BASE)
    text, found = PROMPT, list[int]()
    for turn in range(3):
        [answer], [cached] = ask(llm, [text])
        assert [answer] == ask(plain, [text])[0]
        found.append(cached)
        text = [*text, *answer, 90 + turn, 91, 92]
    assert found == [0, 32, 48]
    assert stats_of(llm).num_hit_tokens == sum(found)


def test_an_edited_text_finds_what_is_before_the_edit(model: str) -> None:
    """vllm#49449. The tree finds the first tokens of the block that was edited as well."""
    edited = [*PROMPT[:21], 99, *PROMPT[22:]]
    for index, expected in (("radix", 21), ("hash", 16)):
        llm = LLM(model, prefix_index=index, **BASE)
        ask(llm, [PROMPT])
        assert ask(llm, [edited]) == (ask(m5.LLM(model, **BASE), [edited])[0], [expected])


def test_the_same_prompt_again_runs_one_token(model: str) -> None:
    """nano-vllm#144, #199: a full hit has no tokens to run, or the wrong one."""
    llm, collector = LLM(model, **BASE), MetricsCollector()
    first, _ = ask(llm, [PROMPT])
    engine_of(llm).plugins.append(collector)
    again, cached = ask(llm, [PROMPT])
    assert again == first
    assert cached == [31]
    assert collector.totals.num_prompt_tokens == 1


def test_equal_prompts_of_one_batch_are_computed_once(model: str) -> None:
    """vLLM computes both (#7414, #9643)."""
    prompts = [[*PROMPT, 60 + i, 61] for i in range(6)]
    llm, collector = LLM(model, **BASE), MetricsCollector()
    engine_of(llm).plugins.append(collector)
    answers, cached = ask(llm, prompts)
    assert answers == ask(m5.LLM(model, **BASE), prompts)[0]
    assert sorted(cached) == [0, 32, 32, 32, 32, 32]
    assert collector.totals.num_prompt_tokens == 34 + 5 * 2


def test_off_is_the_engine_before(model: str) -> None:
    llm = LLM(model, enable_prefix_caching=False, **BASE)
    assert ask(llm, [PROMPT]) == ask(llm, [PROMPT]) == (ask(m5.LLM(model, **BASE), [PROMPT])[0], [0])
    assert not any(isinstance(p, PrefixCacheStats) for p in engine_of(llm).plugins)


def test_salts_share_nothing(model: str) -> None:
    llm = LLM(model, **BASE)
    assert [ask(llm, [PROMPT], salt=salt)[1] for salt in (None, "a", "b", "a", None)] == [[0], [0], [0], [31], [31]]


@pytest.mark.parametrize("salt", ["", 5, "\ud800"])
def test_a_salt_is_text(model: str, salt: Any) -> None:
    with pytest.raises(ConfigError, match="cache_salt"):
        LLM(model, **BASE).generate({"prompt_token_ids": PROMPT, "cache_salt": salt}, GREEDY)


def test_several_outputs_and_beams(model: str) -> None:
    llm, plain = LLM(model, **BASE), m5.LLM(model, **BASE)
    sampled = SamplingParams(n=3, temperature=0.9, seed=4, max_tokens=12, ignore_eos=True)
    expected, _ = ask(plain, [PROMPT], sampled)
    for found in ([0], [31]):
        assert ask(llm, [PROMPT], sampled) == (expected, found)
    beams = BeamSearchParams(beam_width=3, max_tokens=6)
    prompt = {"prompt_token_ids": PROMPT}
    assert ([[b.tokens for b in o.sequences] for o in llm.beam_search([prompt], beams)]
            == [[b.tokens for b in o.sequences] for o in plain.beam_search([prompt], beams)])
    assert llm.manager.usage == 0


def test_prompt_logprobs_are_whole_behind_a_known_prefix(model: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)
    llm = LLM(model, **BASE)
    ask(llm, [PROMPT])
    [ours] = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    [theirs] = m5.LLM(model, **BASE).generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    assert ours.prompt_logprobs == theirs.prompt_logprobs
    assert ours.num_cached_tokens == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failed_step_leaves_nothing_to_find(model: str, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model, async_scheduling=ahead, **BASE)
    expected, _ = ask(m5.LLM(model, **BASE), [PROMPT])
    engine = engine_of(llm)
    execute, calls = engine.runner.execute, list[int]()

    def fail_once(inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            llm.cache.kv_cache.k.fill_(7)                            # what it has written until then is rubbish
            raise RuntimeError("out of luck")
        return execute(inputs)

    monkeypatch.setattr(engine.runner, "execute", fail_once)
    [failed] = llm.generate({"prompt_token_ids": PROMPT}, GREEDY, use_tqdm=False)
    assert failed.outputs[0].finish_reason == "abort"
    assert ask(llm, [PROMPT]) == (expected, [0])
    assert ask(llm, [PROMPT])[0] == expected


def test_wrong_guesses_are_never_found(model: str) -> None:
    """Slots of refused drafts hold keys and values of tokens that were never said."""
    llm = LLM(model, speculative_method="suffix", adaptive_drafts=False, **BASE)
    plain = m5.LLM(model, **BASE)
    prompt = [30, 31, 32, 33] * 8
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=30, ignore_eos=True)
    for _ in range(2):
        assert ask(llm, [prompt], params)[0] == ask(plain, [prompt], params)[0]
    [answer], _ = ask(llm, [prompt], params)
    again = [*prompt, *answer]
    assert ask(llm, [again])[0] == ask(plain, [again])[0]


def test_cache_plugins_are_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="enable_prefix_caching=False"):
        LLM(model, plugins=[BlockQuantisation(8, block_size=8)], **BASE)
    LLM(model, plugins=[BlockQuantisation(8, block_size=8)], enable_prefix_caching=False, **BASE)


@pytest.mark.parametrize(("options", "named"), [({"prefix_index": "btree"}, "radix, hash"),
                                                ({"max_cached_blocks": -1}, "max_cached_blocks"),
                                                ({"policy": "longest"}, "longest-match")])
def test_options_are_checked(model: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LLM(model, **BASE, **options)


def test_when_everything_is_held_the_engine_goes_on(model: str) -> None:
    """Nothing can be evicted, and nobody may starve for it."""
    llm = LLM(model, **BASE | {"num_blocks": 16}, swap_space=0)
    prompts = [[*PROMPT, 60 + i] for i in range(8)]
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    assert ask(llm, prompts, long)[0] == ask(m5.LLM(model, **BASE), prompts, long)[0]
    assert llm.manager.pool.num_free == 16


def test_recomputed_tokens_are_no_hits(model: str) -> None:
    """vllm#25780, #25787: a sequence that was sent back finds its own tokens; that is nobody's hit."""
    collector = MetricsCollector()
    llm = LLM(model, plugins=[collector], **BASE | {"num_blocks": 16}, swap_space=0)
    prompts = [[60 + i, *PROMPT[1:]] for i in range(4)]
    ask(llm, prompts, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    assert collector.totals.num_preemptions > 0
    assert stats_of(llm).num_hit_tokens == 0
    assert stats_of(llm).num_queried_tokens == 4 * 32


def test_the_cache_can_be_emptied(model: str) -> None:
    """vLLM's `reset_prefix_cache`: not while requests are unfinished."""
    llm = LLM(model, **BASE)
    ask(llm, [PROMPT])
    request = llm.input_processor.process({"prompt_token_ids": [1, 2]}, GREEDY)
    llm.engine.add_request(request)
    llm.engine.step()
    assert not llm.reset_prefix_cache()
    llm.engine.abort_request(request.request_id)
    assert ask(llm, [PROMPT])[1] == [31]
    assert llm.reset_prefix_cache()
    assert ask(llm, [PROMPT])[1] == [0]


@pytest.mark.parametrize("num_cached", [0, 2])
def test_a_cap_with_a_policy_that_displaces(model: str, num_cached: int) -> None:
    """What a newcomer has found by one who leaves for it stays until it has started."""
    llm = LLM(model, policy="priority", max_num_seqs=1, max_cached_blocks=num_cached, **BASE)
    for length in (32, 30):
        long = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        first, urgent = (llm.input_processor.process({"prompt_token_ids": PROMPT[:length]}, long) for _ in range(2))
        llm.engine.add_request(first, SchedulingParams(priority=5))
        for _ in range(3):
            llm.engine.step()
        llm.engine.add_request(urgent, SchedulingParams(priority=0))
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
        [expected] = ask(m5.LLM(model, **BASE), [PROMPT[:length]], long)[0]
        assert [r.sequences[0].output_token_ids for r in (first, urgent)] == [expected, expected]
        assert llm.manager.pool.num_cached <= num_cached
