"""The bench of packed products: what is timed, and how a rate follows from a time."""
from __future__ import annotations

import pytest
import torch

from m7_gptq.tools import linear_bench
from m7_gptq.tools.linear_bench import Kind, Timing, main, measure, product_kinds, table


def test_rates_of_a_timing() -> None:
    timing = Timing("int8", rows=10, seconds=1e-6, weight_bytes=10_000, multiplications=5_000, read_gbytes=1.0)
    assert timing.gbytes == pytest.approx(10)
    assert timing.gops == pytest.approx(100)


def test_kinds_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_bench, "_READ_BYTES", 4096)
    calls: list[tuple[str, int]] = []
    kinds = [Kind(name, 1, 1, lambda rows, name=name: lambda: calls.append((name, rows))) for name in "ab"]
    timings = measure(kinds, [1, 2], rounds=2)
    assert calls == [("a", 1), ("b", 1)] * 3 + [("a", 2), ("b", 2)] * 3
    assert [(t.kind, t.rows) for t in timings] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert all(0 < t.seconds < 1 and t.read_gbytes > 0 for t in timings)


def test_bytes_and_products_of_the_layers() -> None:
    plain, int8, exact = product_kinds(1, torch.bfloat16)
    weights = sum(n * k for n, k in linear_bench.SHAPES)
    assert plain.multiplications == int8.multiplications == weights
    assert plain.weight_bytes == 2 * weights
    assert int8.weight_bytes == exact.weight_bytes == pytest.approx(weights * 4.375 / 8, rel=1e-2)
    for kind in (plain, int8, exact):
        results = kind.prepare(3)()
        assert [y.shape for y in results] == [(3, n) for n, _ in linear_bench.SHAPES]


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(linear_bench, "_READ_BYTES", 4096)
    main(["--rows", "1", "2", "--layers", "1", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["1", "2"]
    assert len({line.count("|") for line in lines[1:]}) == 1
    timings = [Timing("a", 1, 4e-3, 8_000_000, 1, 5.0), Timing("b", 1, 2e-3, 2_000_000, 1, 5.0)]
    assert table(timings).splitlines()[2] == "| 1 | 5.0 | 4.000 | 2.0 | 0 | 1.00 | 2.000 | 1.0 | 0 | 2.00 |"
