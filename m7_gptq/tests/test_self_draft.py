"""F7.6: a model drafts for itself with packed weights, in one cache, and every token is the full model's."""
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import m6_prefix_cache as m6
from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError
from m0_basics.sampling_params import SamplingParams, StructuredOutputsParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m5_chunked_prefill.speculation_stats import SpeculationStats
from m7_gptq import LLM
from m7_gptq.self_draft import SelfDrafter

from .packed_models import pack_gguf, pack_gptq, use_cache

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "block_size": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[30 + i, *range(20, 24 + 3 * i)] for i in range(4)]


def ask(llm: BaseLLM, prompts: list[list[int]], params: Any = GREEDY) -> list[Any]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [(list(c.token_ids), c.text, c.finish_reason, c.logprobs, c.cumulative_logprob)
            for o in outputs for c in o.outputs]


def stats_of(llm: LLM) -> SpeculationStats:
    return next(p for p in engine_of(llm).plugins if isinstance(p, SpeculationStats))


def drafter_of(llm: LLM) -> SelfDrafter:
    return next(p for p in engine_of(llm).plugins if isinstance(p, SelfDrafter))


def drafting(model: Path | str, **options: Any) -> LLM:
    return LLM(str(model), speculative_method="self", **{**OPTIONS, "adaptive_drafts": False, **options})


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tokens_are_the_full_models(tiny_model: TinyModels, bits: int) -> None:
    """With fewer bits more guesses are wrong, and no token is."""
    model = tiny_model("qwen3")
    llm = drafting(model, quantization_bits=bits, quantization_group_size=32, num_speculative_tokens=4)
    assert ask(llm, PROMPTS) == ask(m6.LLM(str(model), **OPTIONS), PROMPTS)
    stats = stats_of(llm)
    share = stats.num_accepted_tokens / stats.num_draft_tokens
    assert {2: 0, 4: 0.3, 8: 0.8}[bits] < share < {2: 0.3, 4: 0.9, 8: 1.01}[bits], share
    assert llm.manager.usage == 0


def test_no_cache_of_its_own(tiny_model: TinyModels) -> None:
    """Drafts write into the target's cache, and it has the bytes that it has without them."""
    model = tiny_model("qwen3")
    llm, plain = drafting(model, num_blocks=64), m6.LLM(str(model), **OPTIONS, num_blocks=64)
    drafter = drafter_of(llm)
    assert drafter.tables is llm.manager.tables
    assert drafter.runner.backend.cache is llm.cache                                # type: ignore[attr-defined]
    assert llm.cache.kv_cache.k.nbytes == plain.cache.kv_cache.k.nbytes


def test_the_cache_holds_what_the_full_weights_computed(tiny_model: TinyModels) -> None:
    """What a draft has written is overwritten: the keys of every token that was said are the full model's."""
    model = tiny_model("llama")
    llm = drafting(model, quantization_bits=2, quantization_group_size=32, num_speculative_tokens=3, num_blocks=32)
    plain = m6.LLM(str(model), **OPTIONS, num_blocks=32)
    kept = []
    for engine in (llm, plain):
        request = engine.input_processor.process({"prompt_token_ids": PROMPTS[2]}, GREEDY)
        engine.engine.add_request(request)
        while len(request.sequences[0].output_token_ids) < 20:
            engine.engine.step()
        sequence = request.sequences[0]
        table, size = engine.manager.tables[sequence], OPTIONS["block_size"]
        slots = [table[i // size] * size + i % size for i in range(len(PROMPTS[2]) + 18)]
        kept.append((engine.cache.kv_cache.k[:, slots].clone(), engine.cache.kv_cache.v[:, slots].clone()))
    for ours, theirs in zip(*kept, strict=True):
        assert torch.equal(ours, theirs)


def test_a_file_drafts_for_its_own_values(tiny_model: TinyModels, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model's case: the packed blocks and the dequantised weights have the same values: all are right."""
    use_cache(tmp_path / "cache", monkeypatch)
    model = pack_gguf(tmp_path / "model", tiny_model("llama"), "Q4_1")
    llm = drafting(model.packed)
    for ours, theirs in zip(ask(llm, PROMPTS), ask(m6.LLM(str(model.plain), **OPTIONS), PROMPTS), strict=True):
        assert ours[0] == theirs[0]                                 # the file names its padded tokens, the folder not
    assert stats_of(llm).num_accepted_tokens >= 0.95 * stats_of(llm).num_draft_tokens > 0


def test_a_folder_that_is_named(tiny_model: TinyModels, tmp_path: Path) -> None:
    model = pack_gptq(tmp_path / "m", tiny_model("qwen2"), bits=8, desc_act=True)
    llm = drafting(tiny_model("qwen2"), speculative_model=str(model.packed))
    assert ask(llm, PROMPTS) == ask(m6.LLM(str(tiny_model("qwen2")), **OPTIONS), PROMPTS)
    assert stats_of(llm).num_accepted_tokens > 0.7 * stats_of(llm).num_draft_tokens > 0


def test_a_packed_folder_checks_with_its_values(tiny_model: TinyModels, tmp_path: Path) -> None:
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    assert ask(drafting(model.packed), PROMPTS) == ask(m6.LLM(str(model.plain), **OPTIONS), PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_changes_a_token(tiny_model: TinyModels, dtype: str) -> None:
    """Batches, chunks, preemption, shared prefixes, several outputs, penalties, grammars, aborted neighbours."""
    model = str(tiny_model("qwen3"))
    base = OPTIONS | {"dtype": dtype}
    plain = m6.LLM(model, **base, num_blocks=512)
    params = st.builds(
        SamplingParams, temperature=st.sampled_from([0.0, 0.8]), seed=st.integers(0, 4),
        max_tokens=st.integers(1, 16), logprobs=st.sampled_from([None, 2]), ignore_eos=st.just(True),
        presence_penalty=st.sampled_from([0.0, 1.5]), repetition_penalty=st.sampled_from([1.0, 1.3]),
        prompt_logprobs=st.sampled_from([None, None, 1]))

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(jobs=st.lists(st.tuples(st.lists(st.integers(20, 23), min_size=1, max_size=20), params), min_size=1,
                         max_size=5),
           bits=st.sampled_from([2, 4]), budget=st.none() | st.integers(1, 20), num_blocks=st.integers(24, 40),
           swap_space=st.sampled_from([0, 0.01]), depth=st.integers(1, 6), prefix=st.booleans(), adaptive=st.booleans())
    def check(jobs: list[tuple[list[int], SamplingParams]], bits: int, budget: int | None, num_blocks: int,
              swap_space: float, depth: int, prefix: bool, adaptive: bool) -> None:
        llm = LLM(model, speculative_method="self", quantization_bits=bits, quantization_group_size=16,
                  max_num_batched_tokens=budget, num_blocks=num_blocks, swap_space=swap_space, adaptive_drafts=adaptive,
                  num_speculative_tokens=depth, enable_prefix_caching=prefix, max_num_seqs=4, **base)
        prompts, wanted = [p for p, _ in jobs], [w for _, w in jobs]
        for _ in range(2):
            assert ask(llm, prompts, wanted) == ask(plain, prompts, wanted)
        assert llm.manager.usage == 0

    check()


@pytest.mark.parametrize("n", [2, 4])
def test_forks_that_share_a_block(tiny_model: TinyModels, n: int) -> None:
    """Their first own block is still to be copied when drafts are asked for."""
    model = tiny_model("qwen3")
    params = SamplingParams(n=n, temperature=0.9, seed=3, max_tokens=14, ignore_eos=True)
    assert ask(drafting(model), PROMPTS, params) == ask(m6.LLM(str(model), **OPTIONS), PROMPTS, params)


@pytest.mark.parametrize("swap_space", [0, 0.01], ids=["recomputed", "swapped"])
def test_sequences_that_are_sent_back(tiny_model: TinyModels, swap_space: float) -> None:
    """Drafts may be written into the blocks of one who was sent back in the same step: it is swapped out before."""
    model, collector = tiny_model("qwen3"), MetricsCollector()
    llm = drafting(model, num_blocks=24, swap_space=swap_space, plugins=[collector], max_num_seqs=4)
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    assert ask(llm, PROMPTS, long) == ask(m6.LLM(str(model), **OPTIONS), PROMPTS, long)
    assert collector.totals.num_preemptions > 0
    assert stats_of(llm).num_draft_tokens > 0


def test_a_grammar(tiny_model: TinyModels) -> None:
    """Drafts know nothing of it; the step that checks them does."""
    model = tiny_model("qwen3")
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=StructuredOutputsParams(regex="(ab|cd)+"))
    assert ask(drafting(model), PROMPTS, params) == ask(m6.LLM(str(model), **OPTIONS), PROMPTS, params)


def test_a_draft_that_costs_too_much_is_not_made(tiny_model: TinyModels) -> None:
    """A draft slower than the step itself cannot pay: once that is known it is only probed now and then."""
    drafted = []
    for adaptive in (True, False):
        llm = drafting(tiny_model("qwen3"), adaptive_drafts=adaptive, num_speculative_tokens=3)
        drafter_of(llm)._write = slowed(drafter_of(llm)._write)                     # type: ignore[method-assign]
        ask(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
        drafted.append(stats_of(llm).num_draft_tokens)
    assert 0 < drafted[0] < drafted[1] / 3, drafted


def slowed(write: Callable[[list[Any]], None]) -> Callable[[list[Any]], None]:
    def run(sequences: list[Any]) -> None:
        time.sleep(0.02)
        write(sequences)

    return run


@pytest.mark.parametrize(("options", "message"), [
    ({"quantization": "rtn"}, "speculative_method=self .*allowed: quantization=auto or none"),
    ({"async_scheduling": True}, "async_scheduling"),
    ({"speculative_model": "PLAIN"}, "has plain weights"),
    ({"speculative_model": "OTHER"}, "has head_dim=16, and the model 32: it is no packed form of it"),
    ({"speculative_model": "/nowhere"}, "does not exist")])
def test_what_cannot_draft(tiny_model: TinyModels, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    if options.get("speculative_model") == "PLAIN":
        options = {"speculative_model": str(tiny_model("qwen3"))}
    if options.get("speculative_model") == "OTHER":
        options = {"speculative_model": str(pack_gptq(tmp_path / "m", tiny_model("qwen3_tied")).packed)}
    with pytest.raises(ConfigError, match=message):
        LLM(str(tiny_model("qwen3")), speculative_method="self", **OPTIONS, **options)


def test_a_model_is_named_for_those_who_take_one(tiny_model: TinyModels) -> None:
    with pytest.raises(ConfigError, match="speculative_model='x' is for speculative_method=draft_model or self"):
        LLM(str(tiny_model("qwen3")), speculative_method="ngram", speculative_model="x")
