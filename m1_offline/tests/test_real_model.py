"""F1.1, F1.2, F1.8, FX.6: SmolLM2-135M gives transformers' tokens, which read and dequantised the file by itself."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from m0_basics.attention import ScheduledSequence
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.divergence import compare_with_transformers
from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.real_model import NUM_TOKENS, RealReference
from m1_offline import LLM, BeamSearchParams
from m1_offline.engine import OfflineEngine
from m1_offline.static_batching import StaticBatchLLM

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module", params=["gguf", "safetensors"])
def llm(request: pytest.FixtureRequest, default_model_reference: RealReference) -> LLM:
    """The default model in float32, from its GGUF file and from the folder that transformers saved."""
    options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8}
    return LLM(**options) if request.param == "gguf" else LLM(str(default_model_reference.folder), **options)


@pytest.fixture
def rows_of_the_reference(llm: LLM, default_model_reference: RealReference) -> Iterator[list[Sequence]]:
    """A sequence per prompt, each with a row of the cache."""
    assert isinstance(llm.engine, OfflineEngine)
    prompts = default_model_reference.prompt_token_ids
    sequences = [Sequence(next_seq_id(), SequenceData(prompt), SamplingParams(temperature=0), 0) for prompt in prompts]
    for sequence in sequences:
        llm.engine.rows.allocate(sequence)
    yield sequences
    for sequence in sequences:
        llm.engine.rows.free(sequence)
    assert llm.engine.rows.num_free == 8


def run(llm: LLM, sequences: list[Sequence]) -> list[int]:
    """One step of the engine over all sequences: what is not computed yet is; the best next token of each."""
    engine = llm.engine
    assert isinstance(engine, OfflineEngine)
    scheduled = [ScheduledSequence.rest(s) for s in sequences]
    logits = engine.runner.execute_model(scheduled)
    for s in scheduled:
        s.sequence.num_computed_tokens = s.end
    return engine.sampler(logits, sequences).token_ids


def test_prompts_have_the_same_tokens(llm: LLM, default_model_reference: RealReference) -> None:
    """F1.1: English and Chinese."""
    assert_same_tokens([llm.get_tokenizer().encode(prompt) for prompt in default_model_reference.prompts],
                       default_model_reference.prompt_token_ids)


def test_100_tokens_of_8_prompts(llm: LLM, default_model_reference: RealReference,
                                 rows_of_the_reference: list[Sequence]) -> None:
    """F1.1, F1.2: prefill, then 99 steps through the cache, all eight prompts side by side.

    The engine's own runner, cache and sampler, but for its queue: one request at a time would take minutes.
    """
    assert default_model_reference.smallest_gap > 1e-4, "a tie would be decided by rounding"
    for _ in range(NUM_TOKENS):
        for sequence, token in zip(rows_of_the_reference, run(llm, rows_of_the_reference), strict=True):
            sequence.append_token_id(token)
    ours = [sequence.output_token_ids for sequence in rows_of_the_reference]
    assert len(ours) == 8
    assert all(len(tokens) == NUM_TOKENS for tokens in ours)
    assert_same_tokens(ours, default_model_reference.token_ids)


def test_tokens_in_chunks(llm: LLM, default_model_reference: RealReference,
                          rows_of_the_reference: list[Sequence]) -> None:
    """F1.2: the reference's tokens run in chunks of many lengths; at the end of each the next one is predicted."""
    for stop in (0, 1, 2, 9, 40, 41, 99):
        for sequence, tokens in zip(rows_of_the_reference, default_model_reference.token_ids, strict=True):
            sequence.data.output_token_ids[:] = tokens[:stop]
        assert run(llm, rows_of_the_reference) == [tokens[stop] for tokens in default_model_reference.token_ids]


def test_generate(llm: LLM, default_model_reference: RealReference, request: pytest.FixtureRequest) -> None:
    """F1.1, F1.6: the same through the public face, text and all: everything from GGUF, a part from safetensors."""
    everything = "gguf" in request.node.name
    chosen = list(range(8)) if everything else [0, 5]                   # 0 is in English, 5 in Chinese
    length = NUM_TOKENS if everything else 24
    prompts = [default_model_reference.prompts[i] for i in chosen]
    outputs = llm.generate(prompts, greedy(length), use_tqdm=False)
    assert_same_tokens(ids_of(outputs), [default_model_reference.token_ids[i][:length] for i in chosen])
    for output in outputs:
        assert output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids)
    chinese = chosen.index(5)
    parts = [part.outputs[0] for part in llm.stream(prompts[chinese], greedy(length))]
    assert "".join(part.text for part in parts) == outputs[chinese].outputs[0].text
    assert "" in [part.text for part in parts], "Chinese characters span tokens"


def test_beam_search(llm: LLM, default_model_reference: RealReference) -> None:
    """F1.4: at least as probable as the greedy output."""
    prompt = default_model_reference.prompts[0]
    best, *others = llm.beam_search([prompt], BeamSearchParams(4, 12, ignore_eos=True))[0].sequences
    part = llm.generate(prompt, greedy(12, logprobs=0), use_tqdm=False)[0].outputs[0]
    assert best.cum_logprob >= part.cumulative_logprob - 1e-3
    assert [s.cum_logprob for s in others] == sorted((s.cum_logprob for s in others), reverse=True)
    assert len(others) == 3
    assert best.cum_logprob >= others[0].cum_logprob


def test_static_batch(default_model_reference: RealReference) -> None:
    """F1.8: the padded batch gives the same."""
    llm = StaticBatchLLM(dtype="float32", max_model_len=256, max_num_seqs=8)
    outputs = llm.generate(default_model_reference.prompts, greedy(24), use_tqdm=False)
    assert_same_tokens(ids_of(outputs), [tokens[:24] for tokens in default_model_reference.token_ids])


def test_divergence_in_bfloat16_is_rounding() -> None:
    """FX.6: where bfloat16 tokens differ from transformers', the two candidates were within its resolution."""
    llm = LLM(dtype="bfloat16", max_model_len=256)
    prompts = ["The capital of France is", "def fibonacci(n):", "从前有一座山，"]
    found = compare_with_transformers(llm, prompts, max_tokens=40)
    assert len(found) == len(prompts)
    for divergence in found:                # None where the tokens are the same
        assert divergence is None or divergence.within_resolution, divergence.report()
