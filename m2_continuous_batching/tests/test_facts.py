"""The facts that the documents quote: the formulas by hand, and the simulation against the engine."""
from __future__ import annotations

import pytest

from m0_basics.tools.bench.workloads import BenchRequest, get_workload
from m0_basics.tools.documents.factbook import Value
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching import LLM, SamplingParams, SchedulingParams
from m2_continuous_batching.plugins import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler
from m2_continuous_batching.tools import facts
from m2_continuous_batching.tools.simulation import SimulatedStep, Simulator, StepCost


@pytest.fixture(scope="module")
def values() -> dict[str, Value]:
    return {name: fact.value for name, fact in facts.FACTS.compute().items()}


def step(*seq_lens: int) -> SimulatedStep:
    return SimulatedStep(1.0, seq_lens, len(seq_lens), len(seq_lens), 0, 0)


class Recorder(SchedulerPlugin):
    def __init__(self) -> None:
        self.steps: list[tuple[int, int, int]] = []

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.steps.append((stats.output.total_num_scheduled_tokens, stats.num_generation_tokens, stats.num_preempted))


@pytest.mark.parametrize("policy", ["fcfs", "sjf", "round-robin:3"])
def test_the_simulation_takes_the_steps_that_the_engine_takes(tiny_model: TinyModels, policy: str) -> None:
    recorder = Recorder()
    llm = LLM(str(tiny_model("llama")), plugins=[recorder], max_num_seqs=3, max_model_len=96, policy=policy,
              dtype="float32")
    requests = get_workload("ragged-9:prompt_max=24,output_max=20").fit_vocabulary(llm.spec.vocab_size).requests
    params = [SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True) for r in requests]
    llm.generate([{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests], params, use_tqdm=False)
    simulated = Recorder()
    Simulator(3, policy, row_size=96, plugins=[simulated]).run(requests)
    assert simulated.steps == recorder.steps
    assert policy != "round-robin:3" or any(preempted for _, _, preempted in simulated.steps)


def test_times_and_recomputed_tokens_by_hand() -> None:
    """One row, a quantum of one token: A runs its prompt and a token, gives way, and later runs all 5 tokens again."""
    a, b = BenchRequest((1, 2, 3), 3), BenchRequest((4, 5), 1)
    run = Simulator(1, "round-robin:1", StepCost(1.0, 0.5)).run([a, b])
    steps = [(s.num_tokens, s.recomputed, s.preempted) for s in run.steps]
    assert steps == [(3, 0, 0), (1, 0, 0), (2, 0, 1), (5, 4, 0)]
    assert [r.token_times for r in run.records] == [(2.5, 4.0, 9.5), (6.0,)]
    assert run.seconds == run.records[0].finish_time == 9.5
    assert run.records[0].itls == [1.5, 5.5]


def test_an_idle_engine_waits_for_the_next_arrival() -> None:
    run = Simulator(1, cost=StepCost(1.0, 0.0)).run([BenchRequest((1,), 1), BenchRequest((1,), 1, 10.0)])
    assert [r.token_times for r in run.records] == [(1.0,), (11.0,)]


def test_urgent_requests_displace_others() -> None:
    """It arrives during the first step, sits out the decode step that follows a prefill, and gets the third."""
    requests = [BenchRequest((1,), 9), BenchRequest((1,), 1, 0.5)]
    run = Simulator(1, "priority").run(requests, lambda i: SchedulingParams(priority=-i))
    assert run.records[1].token_times == (3.0,)
    assert sum(s.preempted for s in run.steps) == 1


@pytest.mark.slow
def test_utilisation(values: dict[str, Value]) -> None:
    """188 tokens in 4 places of 100 steps; a queue of them ends when the last long one does."""
    assert values["s0.static.utilisation"] == (5 + 100 + 3 + 80) / 400
    assert values["s0.continuous.1.utilisation"] == values["s0.static.utilisation"]
    assert values["s0.continuous.16.utilisation"] == pytest.approx(16 * 188 / (4 * 808))
    assert float(values["s0.continuous.16.utilisation"]) > float(values["s0.continuous.4.utilisation"]) > 0.47


def test_padding(values: dict[str, Value]) -> None:
    assert facts.padded_keys([step(10, 2, 6)], 8) == pytest.approx(1 - 18 / 30)
    assert facts.padded_keys([step(10, 2, 6)], 2) == pytest.approx(1 - 18 / (6 + 6 + 10))
    assert facts.padded_keys([step(5, 5)], 2) == 0.0
    assert values["ragged.16.tokens_run"] == 8416 + 4323 - 64       # no token is run twice, the last ones never
    assert values["equal.static.useful"] == 1.0


def test_roofline(values: dict[str, Value]) -> None:
    """Llama-3.1-8B, one sequence: about 2 FLOPs for the 2 bytes of each weight, read at 3.35 TB/s."""
    assert values["h100.ridge"] == pytest.approx(989.4e12 / 3.35e12)
    assert float(values["llama_3_1_8b.decode.1.intensity"]) == pytest.approx(1.0, abs=0.05)
    matrices = 8.03e9 - 128256 * 4096
    assert float(values["llama_3_1_8b.decode.1.ms"]) == pytest.approx(2 * matrices / 3.35e12 * 1e3, rel=0.01)
    assert float(values["llama_3_1_8b.apart.32+256.ms"]) > float(values["llama_3_1_8b.mixed.32+256.ms"])
    assert (values["llama_3_1_8b.prefill.512.binds"], values["llama_3_1_8b.decode.256.binds"]) == ("compute", "memory")


def test_cache(values: dict[str, Value]) -> None:
    assert values["rows.bytes"] == 32 * 8192 * 23040
    assert values["rows.over_weights"] == pytest.approx(32 * 8192 * 23040 / (2 * 134_515_008))
    assert (values["int8.d64.ratio"], values["int8.d128.ratio"]) == (66 / 128, 130 / 256)


def test_mask(values: dict[str, Value]) -> None:
    """Four new tokens see 1 + 2 + 3 + 4 keys, two see 1 + 2, and the newest of five sees 5."""
    assert values["mask.small.visible"] == 10 + 3 + 5
    assert values["mask.small.pairs"] == 7 * 11
    assert values["mask.decode_share"] == pytest.approx(1 / 16)
    assert values["mask.bytes"] == int(values["mask.tokens"]) ** 2


def test_clamp(values: dict[str, Value]) -> None:
    assert values["clamp.leaked"] == pytest.approx(8e-6)
    assert values["clamp.exp_overflows_at"] == 89           # float32 ends at 3.4e38 = e^88.7


def test_preemption(values: dict[str, Value]) -> None:
    assert values["smollm2.swap.bytes"] == 639 * 23040
    assert float(values["smollm2.swap.ms"]) == pytest.approx(2 * 639 * 23040 / 25e9 * 1e3)
    assert 400 < float(values["smollm2.recompute.in_decodes"]) < 640


def test_policies(values: dict[str, Value]) -> None:
    """What the documents say in words (F2.5)."""
    def value(name: str) -> float:
        return float(values[name])

    assert value("policy.priority.urgent_p99") < value("policy.ageing.urgent_p99") < value("policy.fcfs.urgent_p99")
    assert value("policy.ageing.longest_wait") < value("policy.priority.longest_wait")
    assert value("policy.sjf.latency_mean") < value("policy.fcfs.latency_mean")
    assert value("policy.sjf.longest_wait") > value("policy.fcfs.longest_wait")
    assert value("policy.sla.urgent_p99") < value("policy.fcfs.urgent_p99") and value("policy.sla.preemptions") == 0
    assert value("starve.priority.400") > value("starve.ageing.400")


def test_budgets(values: dict[str, Value]) -> None:
    """The longest gap holds a step of 8 prompts and the decode step of all 24 sequences."""
    assert values["burst.2048.stall_ms"] == pytest.approx((16 + 2048 * 0.55) + (16 + 24 * 0.55))
    assert values["burst.256.stall_ms"] == pytest.approx((16 + 256 * 0.55) + (16 + 24 * 0.55))
    assert float(values["burst.adaptive.stall_ms"]) <= float(values["burst.target_ms"])      # F2.10
    stalls = [float(values[f"burst.{n}.stall_ms"]) for n in (256, 512, 1024, 2048)]
    assert stalls == sorted(stalls)


def test_capacity(values: dict[str, Value]) -> None:
    assert values["capacity.per_gpu"] == int((0.9 * 80e9 - 2 * 8_030_261_248) // (2048 * 131072))
    assert values["accepted.per_step"] == pytest.approx(1 + 0.8 + 0.8**2 + 0.8**3 + 0.8**4)
