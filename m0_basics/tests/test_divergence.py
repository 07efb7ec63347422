"""FX.6: where two engines part, how close the decision was, and whether rounding can explain it."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from m0_basics import LLM, SamplingParams
from m0_basics.config import ConfigError
from m0_basics.tools.divergence import (
    Divergence,
    compare_with_transformers,
    explain_divergence,
    run_engine,
    run_transformers,
    ulp,
)
from m0_basics.tools.testing.parity import mixed_length_prompts, reference_greedy, reference_logits, reference_model
from m0_basics.tools.testing.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.slow

PROMPTS = mixed_length_prompts(VOCAB_SIZE, 4, seed=21)


@pytest.mark.parametrize("value", [1.0, 1.5, -1.0, 3.999, 4.0, 22.875, -127.9, 1e-3, 65000.0])
def test_ulp_is_the_step_to_the_next_number(value):
    as_float32 = float(np.float32(abs(value)))
    assert ulp(value, torch.float32) == float(np.spacing(np.float32(as_float32)))
    assert ulp(value, torch.float16) == float(np.spacing(np.float16(abs(value)).astype(np.float16)))
    # bfloat16 is the upper half of a float32: its next number is one more in those sixteen bits.
    bits = np.float32(abs(value)).view(np.uint32) & np.uint32(0xFFFF0000)
    below, above = (np.uint32(b).view(np.float32) for b in (bits, bits + np.uint32(0x10000)))
    assert ulp(value, torch.bfloat16) == float(above - below)


def test_ulp_of_zero_is_a_number():
    assert 0 < ulp(0.0, torch.bfloat16) < 1e-30


def explain(a: list[float], b: list[float], dtype=torch.bfloat16, tokens_a=(4, 0), tokens_b=(4, 1)) -> Divergence:
    seen = []

    def logits_fn(values):
        def fn(token_ids):
            seen.append(token_ids)
            return torch.tensor(values)
        return fn

    found = explain_divergence([7, 8], tokens_a, tokens_b, logits_fn(a), logits_fn(b), dtype, lambda ids: f"<{ids[0]}>")
    assert seen == [[7, 8, 4], [7, 8, 4]], "each engine is asked once, after what both outputs share"
    return found


def test_the_record_of_a_divergence():
    found = explain([16.25, 16.0, 3.0], [16.0, 16.125, 4.5])
    assert (found.step, found.position) == (1, 3)
    assert (found.token_a.token_id, found.token_a.text) == (0, "<0>")
    assert (found.token_a.logit_a, found.token_a.logit_b) == (16.25, 16.0)
    assert (found.token_b.token_id, found.token_b.text) == (1, "<1>")
    assert (found.token_b.logit_a, found.token_b.logit_b) == (16.0, 16.125)
    assert (found.gap_a, found.gap_b) == (0.25, -0.125)
    assert (found.ulp, found.max_logit_difference, found.dtype) == (0.125, 1.5, torch.bfloat16)
    assert found.within_resolution


@pytest.mark.parametrize(("a", "b", "dtype", "within"), [
    ([16.25, 16.0], [16.0, 16.0], torch.bfloat16, True),            # two units of 1/8
    ([16.375, 16.0], [16.0, 16.0], torch.bfloat16, False),          # three
    ([16.0, 16.0], [15.75, 16.125], torch.bfloat16, False),         # three, in the other engine
    ([16.25, 16.0], [16.0, 16.0], torch.float16, False),            # 16 units of 1/64
    ([1.0 + 2.0 ** -22, 1.0], [1.0, 1.0], torch.float32, True),
    ([1.0 + 2.0 ** -21, 1.0], [1.0, 1.0], torch.float32, False),
])
def test_the_verdict(a, b, dtype, within):
    """At most two units in the last place, in both engines."""
    found = explain(a, b, dtype)
    assert found.within_resolution is within
    assert f"{'within' if within else 'beyond'} the resolution of {str(dtype)[6:]}" in found.report()


def test_the_report_shows_every_number():
    report = explain([16.25, 16.0, 3.0], [16.0, 16.125, 4.5]).report()
    for text in ("output token 1 (position 3)", "'<0>'", "'<1>'", "16.250000", "16.125000", "0.250000", "-0.125000",
                 "2.00", "-1.00", "one ulp of bfloat16 here is 0.125", "at most 1.5 (12.0 ulp)"):
        assert text in report
    assert len(report.splitlines()) == 8
    assert max(map(len, report.splitlines())) <= 120


def test_equal_outputs_are_no_divergence():
    def unasked(token_ids):
        raise AssertionError("nothing differs, so nothing has to be explained")

    assert explain_divergence([1], [2, 3], [2, 3], unasked, unasked, torch.float32) is None
    with pytest.raises(ValueError, match=r"2 and 1 tokens .*stop by different rules"):
        explain_divergence([1], [2, 3], [2], unasked, unasked, torch.float32)


@pytest.mark.parametrize("variant", ["qwen3", "llama3_rope"])
def test_recorded_logits_are_those_that_decided(variant, tiny_model):
    folder = tiny_model(variant)
    llm = LLM(str(folder), dtype="float32")
    prompt = PROMPTS[0]
    ours = run_engine(llm, prompt, 12)
    theirs = run_transformers(reference_model(folder), prompt, 12, llm.spec.eos_token_ids)
    assert ours.token_ids == theirs.token_ids == reference_greedy(folder, [prompt], 12, eos=llm.spec.eos_token_ids)[0]
    expected = reference_logits(folder, prompt + ours.token_ids)[len(prompt) - 1:-1]
    for run in (ours, theirs):
        torch.testing.assert_close(torch.stack(run.logits), expected, rtol=1e-4, atol=1e-4)
        assert run.logits_fn(prompt + run.token_ids[:3]) is run.logits[3]
        with pytest.raises(AssertionError, match="did not pass here"):
            run.logits_fn([*prompt, (run.token_ids[0] + 1) % VOCAB_SIZE])
    # The recorder is gone afterwards.
    assert "execute" not in vars(llm.engine.runner)


@pytest.mark.parametrize("variant", ["qwen3", "qwen2_tied", "llama"])
def test_in_float32_nothing_diverges(variant, tiny_model):
    llm = LLM(str(tiny_model(variant)), dtype="float32")
    assert compare_with_transformers(llm, PROMPTS, 24) == [None] * 4


def test_a_sequence_that_reaches_max_model_len(tiny_model):
    """transformers has no such limit, so it is asked for as many tokens as fit."""
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=max(map(len, PROMPTS)) + 3)
    assert compare_with_transformers(llm, PROMPTS, 24) == [None] * 4


def test_a_wrong_engine_is_found_out(tiny_model, tmp_path):
    """Another rotary base is no rounding: the gap is far beyond the precision's resolution."""
    folder = tiny_model("llama")
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 9000.0
    (wrong / "config.json").write_text(json.dumps(config))
    llm = LLM(str(wrong), dtype="float32")
    found = [d for d in compare_with_transformers(llm, PROMPTS, 24, folder=folder) if d]
    assert found
    for divergence in found:
        assert not divergence.within_resolution
        assert divergence.max_logit_difference > 1e-3
        assert divergence.gap_a >= 0 >= divergence.gap_b, "each engine prefers its own token"


def test_bfloat16_divergences_are_described_by_what_really_ran(tiny_model):
    """Whether engines part in 16 bits depends on the machine; every record has to fit the tokens of both runs."""
    folder = tiny_model("llama")
    llm = LLM(str(folder), dtype="bfloat16")
    prompts = mixed_length_prompts(VOCAB_SIZE, 12, seed=2)
    found = compare_with_transformers(llm, prompts, 32)
    eos = llm.spec.eos_token_ids
    for prompt, divergence in zip(prompts, found, strict=True):
        out = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)[0].outputs[0].token_ids
        [theirs] = reference_greedy(folder, [prompt], 32, torch.bfloat16, eos=eos)
        if divergence is None:
            assert out == theirs
            continue
        step = divergence.step
        assert out[:step] == theirs[:step]
        assert (divergence.token_a.token_id, divergence.token_b.token_id) == (out[step], theirs[step])
        assert divergence.position == len(prompt) + step
        assert divergence.gap_a >= 0 >= divergence.gap_b
        assert divergence.dtype == torch.bfloat16


def test_what_transformers_cannot_load(tiny_model, tmp_path):
    llm = LLM(str(tiny_model("llama")), dtype="float32")
    with pytest.raises(ConfigError, match="transformers cannot load"):
        compare_with_transformers(llm, PROMPTS[:1], 4, folder=tmp_path)
