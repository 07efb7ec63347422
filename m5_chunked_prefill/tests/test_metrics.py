"""F5.6: what is guessed and what was right is counted under vLLM's names, up to the end of a request and no further.

vLLM #56101 (counted behind the end), #24322 (0 / 0), llama.cpp #14104 (checked against drafted), TensorRT-LLM #14724.
"""
from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from m0_basics import SamplingParams
from m2_continuous_batching.server.metrics import PrometheusMetrics
from m5_chunked_prefill import LLM
from m5_chunked_prefill.drafter import Drafter
from m5_chunked_prefill.speculation_stats import SpeculationStats

PROMPT = {"prompt_token_ids": [5, 6, 7, 8] * 4}


class Oracle(Drafter):
    """Guesses what the engine will say, or something else from a place on."""

    def __init__(self, answer: list[int], wrong_from: int | None = None) -> None:
        self.answer, self.wrong_from = answer, wrong_from

    def propose(self, sequences, lengths):
        drafts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            done = len(sequence.output_token_ids)
            guess = self.answer[done:done + length]
            if self.wrong_from is not None:
                guess = [token if done + i < self.wrong_from else token + 1 for i, token in enumerate(guess)]
            drafts.append(guess)
        return drafts


def make(folder, drafter_of=None, **options):
    metrics = PrometheusMetrics("tiny")
    llm = LLM(str(folder), plugins=[metrics], dtype="float32", max_model_len=256, speculative_method="ngram",
              adaptive_drafts=False, **options)
    metrics.show_counters_of(llm.engine.plugins)
    if drafter_of is not None:
        llm.engine.scheduler.speculation.drafter = drafter_of
    return llm, metrics


def scraped(metrics):
    text = metrics.render()[0].decode()
    return {(sample.name, sample.labels.get("position")): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples
            if sample.name.startswith("vllm:spec_decode")}


@pytest.fixture(scope="module")
def answer(tiny_model):
    llm, _ = make(tiny_model("llama"))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    return llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids


def test_all_right(tiny_model, answer):
    """The first token, then 6 for each draft of 5: 37 tokens are 1 + 6 x 6."""
    llm, metrics = make(tiny_model("llama"), Oracle(list(answer)), num_speculative_tokens=5)
    llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=37, ignore_eos=True), use_tqdm=False)
    found = scraped(metrics)
    assert found["vllm:spec_decode_num_drafts_total", None] == 6
    assert found["vllm:spec_decode_num_draft_tokens_total", None] == 30
    assert found["vllm:spec_decode_num_accepted_tokens_total", None] == 30
    assert [found["vllm:spec_decode_num_accepted_tokens_per_pos_total", str(i)] for i in range(5)] == [6] * 5


def test_wrong_guesses_count_as_drafted(tiny_model, answer):
    """Every guess wrong: a token each step, so nothing is accepted and no place has a number."""
    llm, metrics = make(tiny_model("llama"), Oracle(list(answer), wrong_from=0), num_speculative_tokens=3)
    llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)
    found = scraped(metrics)
    assert found["vllm:spec_decode_num_accepted_tokens_total", None] == 0
    assert found["vllm:spec_decode_num_draft_tokens_total", None] == 3 + 3 + 2 + 1     # fewer as the end comes near
    assert not any(name.endswith("per_pos_total") for name, _ in found)


def test_guesses_behind_the_end_are_not_counted(tiny_model, answer):
    """A stop token is the second guess of five: two were drafted for this request, whatever was computed."""
    llm, metrics = make(tiny_model("llama"), Oracle(list(answer)), num_speculative_tokens=5)
    stop = answer[2]
    assert stop not in answer[:2]
    output = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[stop]),
                          use_tqdm=False)[0].outputs[0]
    assert list(output.token_ids) == list(answer[:3])
    found = scraped(metrics)
    assert found["vllm:spec_decode_num_draft_tokens_total", None] == 2
    assert found["vllm:spec_decode_num_accepted_tokens_total", None] == 2


def test_no_guesses_no_rate(tiny_model):
    """Before the first guess the counters are 0 and there is no rate to divide for."""
    llm, metrics = make(tiny_model("llama"))
    assert set(scraped(metrics).values()) == {0.0}
    [stats] = [p for p in llm.engine.plugins if isinstance(p, SpeculationStats)]
    assert stats.acceptance_rate is None
