"""F2.9: what the collector says equals what is counted without it."""
from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from m0_basics.model_runner import ModelRunner
from m0_basics.tools.bench.metrics import RequestRecord, compute_metrics
from m0_basics.tools.bench.workloads import BenchRequest
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching import LLM, ConfigError, SamplingParams
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m2_continuous_batching.tools.simulation import Simulator, StepCost

PROMPTS = [[7, 8, 9], [20, 21], [5] * 9, [100, 3, 50, 60], [33]]
LENGTHS = [6, 3, 5, 1, 12]


def make(tiny_model: TinyModels, collector: MetricsCollector, **options: Any) -> LLM:
    return LLM(str(tiny_model("qwen3")), plugins=[collector], dtype="float32", max_model_len=128, **options)


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2}, {"max_num_seqs": 2, "policy": "round-robin:3"}])
def test_totals_equal_an_independent_count(tiny_model: TinyModels, options: dict[str, Any],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens by the outputs and by what the model was given, step by step."""
    ran: list[dict[int, int]] = []
    forward = ModelRunner.prepare_inputs

    def counting(self: ModelRunner, scheduled: list[Any]) -> Any:
        ran.append({s.sequence.seq_id: s.num_tokens for s in scheduled})
        return forward(self, scheduled)

    monkeypatch.setattr(ModelRunner, "prepare_inputs", counting)
    collector = MetricsCollector()
    llm = make(tiny_model, collector, **options)
    outputs = llm.generate(PROMPTS, [greedy(n) for n in LENGTHS], use_tqdm=False)
    totals = collector.totals
    assert (totals.num_finished, totals.num_aborted) == (len(PROMPTS), 0)
    assert totals.num_generation_tokens == sum(len(o.outputs[0].token_ids) for o in outputs) == sum(LENGTHS)
    assert totals.num_steps == len(ran)
    assert [row.tokens for row in collector.steps] == ran
    # Every output token but the last of its request is run by itself, unless a preemption has it recomputed.
    all_tokens = sum(sum(step.values()) for step in ran)
    if options.get("policy"):
        assert totals.num_preemptions > 0
    else:
        assert totals.num_preemptions == 0
        assert totals.num_prompt_tokens == sum(map(len, PROMPTS))
        assert all_tokens == totals.num_prompt_tokens + sum(LENGTHS) - len(PROMPTS)
    prompts = sum(n for step, row in zip(ran, collector.steps, strict=True) if row.num_prompt_tokens
                  for n in step.values())
    assert totals.num_prompt_tokens == prompts
    assert totals.step_time_s == pytest.approx(sum(row.duration_s for row in collector.steps))


def test_requests_equal_their_own_metrics(tiny_model: TinyModels) -> None:
    """TTFT and the like are those of the requests' times; n > 1 counts every output."""
    collector = MetricsCollector()
    llm = make(tiny_model, collector)
    outputs = llm.generate(PROMPTS[:2], [SamplingParams(n=3, seed=1, max_tokens=5, ignore_eos=True), greedy(7)],
                           use_tqdm=False)
    records = sorted(collector.records, key=lambda r: r.num_prompt_tokens, reverse=True)
    for record, output in zip(records, outputs, strict=True):
        times = output.metrics
        assert record.token_times == tuple(times.token_times)
        assert record.ttft == times.first_token_time - times.arrival_time
        assert record.latency == times.finished_time - times.arrival_time
        assert record.output_lens == tuple(len(part.token_ids) for part in output.outputs)
    metrics = collector.request_metrics()
    assert metrics is not None
    assert metrics.num_output_tokens == 3 * 5 + 7 == collector.totals.num_generation_tokens


def test_statistics_by_hand() -> None:
    """On a computed clock: 2 rows, 3 requests of 3 tokens, a step takes 1 s and 0.1 s for each token."""
    collector = MetricsCollector()
    simulation = Simulator(2, cost=StepCost(1.0, 0.1), token_budget=10, row_size=16, plugins=[collector]).run(
        [BenchRequest((1,) * 4, 3) for _ in range(3)])
    # Two prompts of 4; two decodes; the third prompt; two decodes.
    summary = collector.summary()
    steps = summary["steps"]
    assert [row.tokens and sum(row.tokens.values()) for row in collector.steps] == [8, 2, 2, 4, 1, 1]
    assert (summary["num_steps"], summary["num_prompt_tokens"], summary["num_generation_tokens"]) == (6, 12, 9)
    assert summary["step_time_s"] == pytest.approx(6 + 0.1 * 18)
    assert steps["duration_ms"]["mean"] == pytest.approx(1e3 * 7.8 / 6)
    assert steps["batch_size"]["mean"] == pytest.approx((2 + 2 + 2 + 1 + 1 + 1) / 6)
    assert steps["num_waiting"]["mean"] == pytest.approx(3 / 6)
    assert steps["budget_utilisation"]["median"] == pytest.approx(0.2)
    assert steps["kv_cache_usage"]["mean"] == pytest.approx((1 + 1 + 0 + 0.5 + 0.5 + 0) / 6)
    assert [row["start_s"] for row in collector.timeline()] == pytest.approx([0, 1.8, 3.0, 4.2, 5.6, 6.7])
    assert [row["end_s"] for row in collector.timeline()] == pytest.approx([1.8, 3.0, 4.2, 5.6, 6.7, 7.8])
    for record in simulation.records:       # the simulator's engine does not complete requests: done here by hand
        collector.records.append(record)
    expected = compute_metrics(simulation.records, 7.8)
    found = collector.summary()["requests"]
    assert found["ttft_ms"]["mean"] == pytest.approx(1e3 * (1.8 + 1.8 + 5.6) / 3) == expected.ttft_ms.mean
    assert found["output_throughput"] == pytest.approx(9 / 7.8)
    json.dumps(collector.summary())


def test_aborted_requests_have_no_latency(tiny_model: TinyModels) -> None:
    collector = MetricsCollector()
    llm = make(tiny_model, collector)
    for params in (greedy(9), greedy(2)):
        llm.engine.add_request(llm.input_processor.process(PROMPTS[0], params))
    llm.engine.step()
    llm.engine.abort_request("0")
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert (collector.totals.num_aborted, collector.totals.num_finished) == (1, 1)
    assert [r.output_lens for r in collector.records] == [(2,)]


def test_timeline_shows_who_ran(tiny_model: TinyModels) -> None:
    """Every request's tokens, found again by its sequence; rows in order and without overlap."""
    collector = MetricsCollector()
    llm = make(tiny_model, collector, max_num_seqs=2)
    llm.generate(PROMPTS, [greedy(n) for n in LENGTHS], use_tqdm=False)
    rows = collector.timeline()
    ran: Counter[int] = Counter()
    for row in rows:
        ran.update(row["tokens"])
    assert sorted(ran.values()) == sorted(len(p) + n - 1 for p, n in zip(PROMPTS, LENGTHS, strict=True))
    assert rows[0]["start_s"] == 0
    assert all(a["start_s"] < a["end_s"] <= b["start_s"] for a, b in pairwise(rows))
    assert [row["step"] for row in rows] == list(range(len(rows)))


def test_memory_is_bounded_and_totals_are_exact(tiny_model: TinyModels) -> None:
    collector = MetricsCollector(max_steps=3, max_requests=2)
    llm = make(tiny_model, collector)
    llm.generate(PROMPTS, [greedy(n) for n in LENGTHS], use_tqdm=False)
    assert (len(collector.steps), len(collector.records)) == (3, 2)
    assert collector.totals.num_steps == max(LENGTHS)
    assert collector.totals.num_finished == len(PROMPTS)
    assert [r.output_lens for r in collector.records] == [(6,), (12,)]       # the two that ended last
    assert len(collector.timeline()) == 3


def test_nothing_yet() -> None:
    collector = MetricsCollector()
    assert collector.request_metrics() is None
    assert collector.timeline() == []
    summary = collector.summary()
    assert summary["num_steps"] == 0
    assert summary["steps"]["duration_ms"] is summary["requests"] is None
    collector.totals.num_steps = 4
    collector.records.append(RequestRecord(0.0, (1.0,), 1.0, 1, (1,)))
    collector.reset()
    assert collector.summary() == summary
    with pytest.raises(ConfigError, match="max_steps"):
        MetricsCollector(max_steps=0)
