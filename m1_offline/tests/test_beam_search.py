"""F1.4: beam search against brute force, against transformers, and against greedy decoding."""
from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m0_basics.config import ConfigError
from m0_basics.tools.testing.conformance import PROMPTS, greedy
from m0_basics.tools.testing.fixtures import PARROT_TEXT, TinyModels
from m0_basics.tools.testing.parity import mixed_length_prompts, reference_logits, reference_model
from m0_basics.tools.testing.tiny_models import BOS, save_tiny_model
from m1_offline import LLM, BeamSearchParams
from m1_offline.beam_search import BeamSearchSequence, score
from m1_offline.engine import OfflineEngine


def make(folder: Path, **options: Any) -> tuple[LLM, OfflineEngine]:
    llm = LLM(str(folder), **{"dtype": "float32", "max_model_len": 128, **options})
    assert isinstance(llm.engine, OfflineEngine)
    return llm, llm.engine


def continuations(prompt: list[int], sequences: list[BeamSearchSequence]) -> list[list[int]]:
    for s in sequences:
        assert s.tokens[:len(prompt)] == prompt
    return [s.tokens[len(prompt):] for s in sequences]


@pytest.fixture(scope="module")
def small_vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, list[int]]]:
    """Name -> (folder, vocabulary, end-of-sequence tokens): so small that outputs often end."""
    root = tmp_path_factory.mktemp("small")
    made = {}
    for family, vocab, eos in (("qwen3", 4, [3]), ("llama", 12, [3]), ("qwen2", 20, [3, 7, 9])):
        folder = save_tiny_model(root / family, family, vocab_size=vocab, eos_token_id=eos)
        made[family] = (folder, vocab, eos)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_wide_enough_beam_is_exhaustive(small_vocabularies: dict[str, Any], length_penalty: float,
                                          ignore_eos: bool) -> None:
    """F1.4: four tokens, four steps, room for all: every possible output comes, with its exact score, in order."""
    folder, vocab, eos = small_vocabularies["qwen3"]
    prompt, steps = [0, 2, 1, 1, 2], 4
    expected: dict[tuple[int, ...], tuple[float, str]] = {}
    for tokens in itertools.product(range(vocab), repeat=steps):
        end = next((i + 1 for i, t in enumerate(tokens) if t in eos), None) if not ignore_eos else None
        output = tokens[:end]
        if output not in expected:
            rows = reference_logits(folder, [*prompt, *output])[len(prompt) - 1:-1].log_softmax(-1)
            total = sum(row[token].item() for row, token in zip(rows, output, strict=True))
            expected[output] = (total / len(output) ** length_penalty, "stop" if end else "length")
    assert len(expected) == (vocab ** steps if ignore_eos else 121)

    llm, _ = make(folder, skip_tokenizer_init=True, max_num_seqs=256)
    found = llm.beam_search([prompt], BeamSearchParams(256, steps, ignore_eos=ignore_eos,
                                                       length_penalty=length_penalty))[0].sequences
    assert len(found) == len(expected)
    for tokens, s in zip(continuations(prompt, found), found, strict=True):
        value, reason = expected.pop(tuple(tokens))
        assert (s.score, s.finish_reason) == (pytest.approx(value, abs=2e-3), reason)
        assert s.score == score(s.cum_logprob, len(tokens), length_penalty)
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", ["llama", "qwen2", "tiny"])
def test_equals_transformers(small_vocabularies: dict[str, Any], tiny_model: TinyModels, name: str,
                             length_penalty: float) -> None:
    """F1.4: the same sequences in the same order, with one end-of-sequence token and with three.

    Semantics: `early_stopping=False`, which stops where the best running beam at its present length is no better
    than the worst of `num_beams` finished ones; score = log-probability / (new tokens, EOS too) ** length_penalty.
    """
    folder, vocab, eos = small_vocabularies.get(name) or (tiny_model("qwen3_tied"), 288, [267])
    llm, engine = make(folder, skip_tokenizer_init=True)
    reasons = set()
    for prompt in mixed_length_prompts(vocab, 4, seed=3, longest=12):
        for width in (2, 5):
            found = llm.beam_search([prompt], BeamSearchParams(width, 10, length_penalty=length_penalty))[0].sequences
            theirs = transformers_beams(folder, prompt, width, 10, eos, length_penalty)
            assert continuations(prompt, found) == [tokens for tokens, _ in theirs]
            assert [s.score for s in found] == pytest.approx([value for _, value in theirs], abs=1e-3)
            reasons |= {s.finish_reason for s in found}
            assert all((s.tokens[-1] in eos) == (s.finish_reason == "stop") for s in found)
    assert reasons == ({"length"} if name == "tiny" else {"length", "stop"})
    assert engine.rows.num_free == 8


def transformers_beams(folder: Path, prompt: list[int], width: int, steps: int, eos: list[int],
                       length_penalty: float) -> list[tuple[list[int], float]]:
    """(new tokens up to the end-of-sequence token, score), best first."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = reference_model(folder).generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width, do_sample=False,
            max_new_tokens=steps, eos_token_id=eos, pad_token_id=0, length_penalty=length_penalty,
            early_stopping=False, return_dict_in_generate=True, output_scores=True)
    rows = [row[len(prompt):] for row in output.sequences.tolist()]
    ends = [next((i + 1 for i, t in enumerate(row) if t in eos), len(row)) for row in rows]
    return [(row[:end], value) for row, end, value in zip(rows, ends, output.sequences_scores.tolist(), strict=True)]


@pytest.mark.parametrize("variant", ["qwen3", "qwen2", "llama", "llama3_rope"])
def test_one_beam_is_greedy_decoding(tiny_model: TinyModels, variant: str) -> None:
    """F1.4."""
    llm, _ = make(tiny_model(variant))
    outputs = llm.generate(PROMPTS, greedy(12, logprobs=0), use_tqdm=False)
    for output, found in zip(outputs, llm.beam_search(PROMPTS, BeamSearchParams(1, 12, ignore_eos=True)), strict=True):
        part, prompt = output.outputs[0], output.prompt_token_ids
        assert continuations(prompt, found.sequences) == [part.token_ids]
        assert found.sequences[0].cum_logprob == pytest.approx(part.cumulative_logprob, abs=1e-3)
        assert found.sequences[0].text == part.text


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen3", "llama3_rope"])
def test_score_is_at_least_that_of_greedy(tiny_model: TinyModels, variant: str) -> None:
    """F1.4: wherever the greedy output's beginnings stay in the beam, as they mostly do.

    Without that condition it is no theorem: of eight beginnings that all beat the greedy one, each may go on worse.
    """
    llm, _ = make(tiny_model(variant), skip_tokenizer_init=True)
    steps, better, stayed = 8, 0, 0
    for output in llm.generate(PROMPTS, greedy(steps, logprobs=0), use_tqdm=False):
        part, prompt = output.outputs[0], output.prompt_token_ids
        # The beam after t steps is what a search of t steps returns.
        beams = [llm.beam_search([prompt], BeamSearchParams(8, t, ignore_eos=True))[0].sequences
                 for t in range(1, steps + 1)]
        if all(part.token_ids[:t] in continuations(prompt, beam) for t, beam in enumerate(beams[:-1], start=1)):
            stayed += 1
            assert beams[-1][0].cum_logprob >= part.cumulative_logprob - 1e-3
            better += beams[-1][0].cum_logprob > part.cumulative_logprob + 1e-3
    assert stayed >= 4
    assert better >= 1


def test_end_of_sequence(tiny_model: TinyModels) -> None:
    """F1.4: an output that ends is kept aside, its EOS token counted and its text without it."""
    llm, engine = make(tiny_model("parrot_eos"))
    length = len(PARROT_TEXT.encode())
    ended = llm.beam_search([BOS], BeamSearchParams(3, 2 * length))[0].sequences[0]
    assert (ended.text, ended.finish_reason, len(ended.tokens)) == (PARROT_TEXT, "stop", 1 + length + 1)
    assert ended.tokens[-1] == llm.spec.eos_token_ids[0]
    for s in llm.beam_search([BOS], BeamSearchParams(3, 2 * length, ignore_eos=True))[0].sequences:
        assert (s.finish_reason, len(s.tokens)) == ("length", 1 + 2 * length)
    assert engine.rows.num_free == 8


def test_max_model_len(tiny_model: TinyModels) -> None:
    """F1.4: outputs end where the row of the cache does."""
    llm, engine = make(tiny_model("qwen3"), max_model_len=20)
    for s in llm.beam_search([[4] * 17], BeamSearchParams(8, 50, ignore_eos=True))[0].sequences:
        assert (len(s.tokens), s.finish_reason) == (20, "length")
    assert engine.rows.num_free == 8


@pytest.mark.parametrize("length_penalty", [-10, -10.0, 10, 10.0])
def test_the_score_at_the_bounds_of_the_penalty(length_penalty: float) -> None:
    """F1.4: longer than any model's output, and as unlikely, it is a number still."""
    BeamSearchParams(2, 4, length_penalty=length_penalty)
    for length in (1, 10 ** 3, 10 ** 9):
        value = score(-100.0 * length, length, length_penalty)
        assert math.isfinite(value)
        assert value < 0


def test_a_beam_wider_than_the_cache(tiny_model: TinyModels) -> None:
    """F1.4: refused; rows that a stream holds are not free either. Bad parameters name themselves."""
    llm, engine = make(tiny_model("qwen3"), max_num_seqs=4)
    with pytest.raises(ConfigError, match="beam_width=5 is not valid; allowed: at most 4, the free rows"):
        llm.beam_search(PROMPTS, BeamSearchParams(5, 4))
    stream = llm.stream(PROMPTS[0], greedy())
    next(stream)
    with pytest.raises(ConfigError, match="beam_width=4 is not valid; allowed: at most 3"):
        llm.beam_search(PROMPTS, BeamSearchParams(4, 4))
    before = [i for part in stream for i in part.outputs[0].token_ids]
    assert before == llm.generate(PROMPTS[0], greedy(), use_tqdm=False)[0].outputs[0].token_ids[1:]
    with pytest.raises(ConfigError, match=r"prompts\[1\]: .*288 is not valid"):
        llm.beam_search([[1], [288]], BeamSearchParams(2, 4))
    for bad, message in (((0, 4), "beam_width=0 is not valid"), ((2, 0), "max_tokens=0 is not valid"),
                         ((2, 4, False, float("nan")), "length_penalty=nan is not valid; allowed: a number from")):
        with pytest.raises(ConfigError, match=message):
            BeamSearchParams(*bad)
    assert engine.rows.num_free == 4


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_failure_frees_the_rows(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """F1.4: whatever step the model fails in."""
    llm, engine = make(tiny_model("qwen3"))
    expected = llm.beam_search(PROMPTS[:1], BeamSearchParams(6, 6))
    execute, calls = engine.runner.execute_model, 0

    def fail(scheduled: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise RuntimeError("broken")
        return execute(scheduled)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "execute_model", fail)
        with pytest.raises(RuntimeError, match="broken"):
            llm.beam_search(PROMPTS[:1], BeamSearchParams(6, 6))
    assert engine.rows.num_free == 8
    assert llm.beam_search(PROMPTS[:1], BeamSearchParams(6, 6)) == expected


def test_the_prompt_is_run_once(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """F1.4: one prefill, then a token per beam and step."""
    llm, engine = make(tiny_model("qwen3"))
    execute, counts = engine.runner.execute_model, list[int]()

    def count(scheduled: Any) -> Tensor:
        counts.append(sum(s.num_tokens for s in scheduled))
        return execute(scheduled)

    monkeypatch.setattr(engine.runner, "execute_model", count)
    llm.beam_search([[3] * 25], BeamSearchParams(4, 5, ignore_eos=True))
    assert counts == [25, 4, 4, 4, 4]
