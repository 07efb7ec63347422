"""The roofline by hand, and the boundaries it predicts (F0.12)."""
from __future__ import annotations

import getpass
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch

from m0_basics.config import ConfigError
from m0_basics.tools.analysis import cpu_roofline
from m0_basics.tools.analysis.calculators import decode_bytes, decode_flops, kv_bytes, weight_bytes
from m0_basics.tools.analysis.machine import describe_machine
from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.analysis.roofline import (
    HARDWARE,
    Hardware,
    format_table,
    largest_useful_batch,
    main,
    max_sequences,
    memory_bound_context,
    roofline_table,
    roofline_time,
)

TOY = Hardware("toy", {"bfloat16": 1000.0, "float32": 500.0}, 10.0, 1e6, "made up")
PAIRS = [(model, hardware) for model in SPECS for hardware in HARDWARE]


def test_the_slower_of_the_two_ceilings_binds() -> None:
    """F0.12: 1000 FLOP/s and 10 B/s meet at 100 FLOPs per byte."""
    assert TOY.ridge_point("bfloat16") == 100
    assert TOY.ridge_point("float32") == 50
    below, above = roofline_time(9_900, 100, TOY), roofline_time(10_100, 100, TOY)
    assert (below.binds, below.seconds) == ("memory", 10.0)
    assert (above.binds, above.seconds) == ("compute", 10.1)
    assert roofline_time(9_900, 100, TOY, "float32").binds == "compute"


def test_a_format_without_a_figure_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"allowed: bfloat16, float32 \(known for toy\)"):
        TOY.peak("int8")


def test_ridge_points_of_named_hardware() -> None:
    """Worked out by hand from the data sheets."""
    assert HARDWARE["A100-80GB-SXM"].ridge_point() == pytest.approx(153.0, abs=0.1)     # 312e12 / 2.039e12
    assert HARDWARE["H100-SXM"].ridge_point() == pytest.approx(295.3, abs=0.1)          # 989.4e12 / 3.35e12
    assert HARDWARE["H200-SXM"].ridge_point() == pytest.approx(206.1, abs=0.1)
    assert HARDWARE["RTX-4090"].ridge_point() == pytest.approx(163.9, abs=0.1)
    assert HARDWARE["L4"].ridge_point() == pytest.approx(403.3, abs=0.1)
    assert all(h.source and h.peak("bfloat16") > h.peak("float32") for h in HARDWARE.values())


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_largest_useful_batch_is_where_the_bound_changes(model: str, name: str) -> None:
    """F0.12: one sequence less and memory binds; from there on arithmetic does."""
    spec, hardware = SPECS[model], HARDWARE[name]

    def binds(batch: int, context: int) -> str:
        return roofline_time(decode_flops(spec, context, batch).total, decode_bytes(spec, context, batch).total,
                             hardware).binds

    found = 0
    for context in (1, 20, 100, 300, 1000):
        batch = largest_useful_batch(spec, hardware, context)
        if batch is None:
            assert binds(10_000, context) == "memory"
        else:
            found += 1
            assert (binds(batch - 1, context), binds(batch + 1, context)) == ("memory", "compute")
    assert found >= 1


@pytest.mark.parametrize(("model", "name"), PAIRS)
def test_memory_bound_context_is_where_no_batch_helps(model: str, name: str) -> None:
    """F0.12: one token less, and a large enough batch is bound by arithmetic."""
    spec, hardware = SPECS[model], HARDWARE[name]
    context = memory_bound_context(spec, hardware)
    assert context is not None
    assert largest_useful_batch(spec, hardware, context) is None
    assert largest_useful_batch(spec, hardware, context - 1) is not None


def test_memory_bound_context_at_the_extremes() -> None:
    """Hardware with little arithmetic is never short of bytes; hardware with endless arithmetic always is."""
    spec = SPECS["Qwen3-8B"]
    weak = Hardware("weak", {"bfloat16": 1e12}, 1e12, 1e12, "made up")
    strong = Hardware("strong", {"bfloat16": 1e20}, 1e12, 1e12, "made up")
    assert memory_bound_context(spec, weak) is None
    assert memory_bound_context(spec, strong) == 1
    assert largest_useful_batch(spec, strong, 1) is None


def test_sequences_that_fit() -> None:
    spec, hardware = SPECS["Llama-2-13B"], HARDWARE["A100-80GB-SXM"]
    most = max_sequences(spec, hardware, 2048)
    budget = 0.9 * 80e9
    assert weight_bytes(spec) + most * kv_bytes(spec, 2048) <= budget < weight_bytes(spec) + (most + 1) * kv_bytes(
        spec, 2048)
    assert max_sequences(spec, HARDWARE["L4"], 2048) == 0           # 26 GB of weights, 24 GB of memory


def test_table() -> None:
    """Each row against the calculators; prefill counts prompt tokens, decode new ones."""
    spec, hardware = SPECS["Qwen3-0.6B"], HARDWARE["L4"]
    rows = roofline_table(spec, hardware, prompt_len=256, context=1000, batch_sizes=(1, 8))
    assert [(r.step, r.batch, r.tokens) for r in rows] == [
        ("prefill", 1, 256), ("prefill", 8, 256), ("decode", 1, 1000), ("decode", 8, 1000)]
    decode = rows[3]
    assert decode.flops == decode_flops(spec, 1000, 8)
    assert decode.traffic == decode_bytes(spec, 1000, 8)
    assert decode.tokens_per_second == pytest.approx(8 / (decode.traffic.total / 300e9))
    assert rows[1].tokens_per_second == pytest.approx(8 * 256 / (rows[1].flops.total / 121e12))
    assert (rows[1].bound.binds, decode.bound.binds) == ("compute", "memory")
    lines = format_table(rows).splitlines()
    assert len(lines) == 6
    assert all(line.count("|") == 10 for line in lines)
    assert f"| {decode.intensity:,.1f} |" in lines[5]


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["Qwen3-8B", "H100-SXM", "--context", "2048"])
    table = format_table(roofline_table(SPECS["Qwen3-8B"], HARDWARE["H100-SXM"], context=2048))
    printed = capsys.readouterr().out
    assert printed.startswith(table + "\n")
    assert "ridge point 295" in printed
    assert f"context of {memory_bound_context(SPECS['Qwen3-8B'], HARDWARE['H100-SXM'])} tokens" in printed


def test_this_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """F0.12: operations and bytes over the time taken, with a clock that says half a second."""
    ran = []

    def half_a_second(run: Callable[[], object], rounds: int) -> list[float]:
        ran.append(run())
        return [2.0, 0.5, 1.0]

    monkeypatch.setattr(cpu_roofline, "times_of", half_a_second)
    cpu = cpu_roofline.measure_cpu(read_bytes=1 << 20, max_matrix=64)
    assert cpu.flops_per_second == dict.fromkeys(("float32", "bfloat16", "float16"), 2 * 64**3 / 0.5)
    assert cpu.bytes_per_second == 2**20 / 0.5
    assert [tuple(result.shape) for result in ran] == [(64, 64)] * 3 + [()]
    assert float(ran[3]) == 2**20 / 4                               # the whole tensor of ones was read
    assert cpu_roofline.matrix_vector_bandwidth(read_bytes=1 << 20) == 2**20 / 0.5
    assert cpu_roofline.read_bandwidth(torch.ones(1 << 18), choose=median) == 2**20 / 1.0
    facts = cpu_roofline.ceilings(cpu)
    assert facts["cpu.ridge.bfloat16"].value == 2 * 64**3 / 2**20
    assert facts["cpu.bfloat16_gflops"].value == 2 * 64**3 / 0.5 / 1e9


def test_the_best_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run only warms up; a disturbed round does not count."""
    ticks = iter([0.0, 3.0, 10.0, 11.5, 20.0, 29.0])
    monkeypatch.setattr(cpu_roofline.time, "perf_counter", lambda: next(ticks))
    calls: list[int] = []
    assert cpu_roofline.best_seconds(lambda: calls.append(1), rounds=3) == 1.5
    assert len(calls) == 4


def test_a_machine_is_described_without_naming_it() -> None:
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["cpu"]
    assert machine["cpu_cores"] >= 1
    assert machine["memory_gib"] > 0.1
    assert machine["torch"] == torch.__version__
    assert not {platform.node(), getpass.getuser(), str(Path.home())} & set(map(str, machine.values()))
