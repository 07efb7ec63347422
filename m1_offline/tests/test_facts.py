"""The facts that the documents quote: the formulas by hand and against the engine, the measurements on small input."""
from __future__ import annotations

import json

import pytest
import torch

from m0_basics.tools.analysis.microbench import QUICK
from m0_basics.tools.bench.workloads import BenchRequest, Workload, get_workload
from m0_basics.tools.testing.fixtures import TinyModels
from m1_offline import SamplingParams
from m1_offline.sampler import distribution
from m1_offline.static_batching import StaticBatchEngine, StaticBatchLLM
from m1_offline.tools import facts, measurements, output_measurements


def workload(*lengths: tuple[int, int]) -> Workload:
    """Requests of (prompt, output) tokens."""
    return Workload("by hand", tuple(BenchRequest((1,) * prompt, output) for prompt, output in lengths))


def test_used_share() -> None:
    """A prompt of 4 and 3 output tokens hold 4, 5 and 6 slots; one of 2 and 1 holds 2."""
    assert facts.used_share(workload((4, 3)), 10) == pytest.approx((0.6, 0.5))
    two = facts.used_share(workload((4, 3), (2, 1)), 10)
    assert two == pytest.approx(((0.6 + 0.2) / 2, (0.4 + 0.5 + 0.6 + 0.2) / 4))
    assert facts.used_share(workload((4, 3)), 0, block_size=4) == pytest.approx((6 / 8, (4 / 4 + 5 / 8 + 6 / 8) / 3))


def test_static_slots() -> None:
    """Two rows of max(3, 5) + max(4, 2) - 1 = 8 columns; 6 + 6 slots hold a token, 2 are prompt padding."""
    assert facts.static_slots(workload((3, 4), (5, 2)), 2) == (16, 12, 2)
    assert facts.static_slots(workload((3, 4), (5, 2)), 1) == (12, 12, 0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_static_slots_are_those_that_the_engine_runs(tiny_model: TinyModels, batch_size: int) -> None:
    llm = StaticBatchLLM(str(tiny_model("llama")), max_num_seqs=batch_size, max_model_len=96, dtype="float32")
    requests = get_workload("ragged-7:prompt_max=24,output_max=20").fit_vocabulary(llm.spec.vocab_size)
    params = [SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True) for r in requests.requests]
    llm.generate([{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests.requests], params, use_tqdm=False)
    assert isinstance(llm.engine, StaticBatchEngine)
    assert llm.engine.num_slots_run == facts.static_slots(requests, batch_size)[0]


def test_worked_examples() -> None:
    """What the documents say in words: the times, the nucleus, the garden path."""
    values = {name: fact.value for name, fact in (facts.metrics() | facts.examples()).items()}
    assert values["example.ttft_ms"] == pytest.approx(200)
    assert values["example.tpot_ms"] == pytest.approx((360 - 200) / 4)
    assert values["example.itl_max_ms"] == pytest.approx(340 - 240)
    assert (values["example.nucleus.kept"], values["example.nucleus.wrong_kept"]) == (3, 2)
    assert values["example.greedy"] == pytest.approx(0.6 * 0.3)
    assert values["example.best_pair"] == pytest.approx(0.4 * 0.9)
    assert values["example.order.temperature_first"] > values["example.order.temperature_last"]
    assert values["ulp.bfloat16.at_20"] == 2.0 ** (4 - 7)


def test_nucleus_sizes() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5], [0.97, 0.01, 0.01, 0.01]]).log()
    assert measurements.nucleus_sizes(logits, 0.9).tolist() == [3, 3, 1]
    assert measurements.nucleus_sizes(logits, 1.0).tolist() == [4, 4, 4]


def test_the_full_sort_draws_from_the_same_distribution() -> None:
    """Numbers spread evenly over [0, 1) draw each token in proportion to its probability."""
    logits = torch.tensor([1.0, 3.0, 0.5, 2.0, -1.0])
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = measurements.by_full_sort(logits.repeat(1000, 1), 0.8, numbers).flatten()
    shares = torch.bincount(drawn, minlength=5) / 1000
    torch.testing.assert_close(shares, distribution(logits, SamplingParams(top_p=0.8)).float(), atol=0.002, rtol=0)


def test_measurements_run_on_small_input() -> None:
    times = measurements.sampler_times(torch.randn(4, 2000), QUICK) | measurements.random_numbers(QUICK)
    assert {"sampler.greedy.ms", "sampler.top_p_sort.ms", "sampler.mixed_one_by_one.ms", "random.hash.us"} <= set(times)
    assert all(float(fact.value) > 0 for fact in times.values())
    assert (times["sampler.rows"].value, times["sampler.vocab"].value) == (4, 2000)


def test_distinct() -> None:
    assert output_measurements.distinct([1, 2, 3, 4, 5]) == 1.0
    assert output_measurements.distinct([1, 1, 1, 1, 1]) == 0.5
    assert output_measurements.distinct([1, 2, 1, 2, 1, 2], n=2) == 2 / 5


def test_every_group_was_measured() -> None:
    """Each stored group names its machine and the command that measures it again."""
    stored = json.loads(facts.FACTS.store.read_text(encoding="utf-8"))
    assert set(stored) == set(facts.FACTS.measured)
    for name, group in stored.items():
        assert group["command"] == f"python -m m1_offline facts --measure {name}"
        assert group["machine"]["cpu"]
        assert group["facts"]
