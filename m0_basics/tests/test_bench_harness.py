"""The harness: turns, ratios, equal tokens, reports and figures, by contenders whose speed is known; then real ones."""
import json
import re
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from m0_basics import LLM, SamplingParams, benchmark
from m0_basics.config import ConfigError, require
from m0_basics.tools.bench import (
    BenchError,
    BenchReport,
    BenchRequest,
    Contender,
    EngineContender,
    RequestRecord,
    Series,
    Served,
    Workload,
    compare,
    comparison_table,
    line_plot,
    throughput_bars,
)
from m0_basics.tools.bench.figures import grouped_bars
from m0_basics.tools.bench.report import command_line

WORK = Workload("two", (BenchRequest((5, 6), 4), BenchRequest((7,), 6)), "ten output tokens")


class Fake(Contender):
    """Says that it took the next of `seconds` for the workload, and puts its name on a shared list."""

    def __init__(self, name, seconds, log, tokens=lambda round_, request: request.prompt_token_ids[0]):
        super().__init__(name, f"{name}'s note")
        self.seconds, self.log, self.tokens, self.round = iter(seconds), log, tokens, 0

    def warm_up(self, workload):
        self.log.append(f"warm {self.name}")

    def serve(self, workload):
        self.log.append(self.name)
        seconds = next(self.seconds)
        ids = tuple((self.tokens(self.round, r),) * r.output_len for r in workload.requests)
        self.round += 1
        return Served(seconds, tuple(
            RequestRecord(0.0, tuple(seconds * (i + 1) / r.output_len for i in range(r.output_len)), seconds,
                          len(r.prompt_token_ids), (r.output_len,)) for r in workload.requests), ids)


def test_contenders_take_turns():
    log, seen = [], []
    compare([Fake(n, [1] * 3, log) for n in "ABC"], WORK, rounds=3,
            on_result=lambda number, c, result: seen.append((number, c.name, result.token_ids[0])))
    assert log == ["warm A", "warm B", "warm C", *"ABCABCABC"]
    assert seen == [(n, c, (5,) * 4) for n in range(3) for c in "ABC"]


def test_probes_stand_beside_their_runs(tmp_path):
    """Measured before and after each run; without a probe there are none; and a report keeps them."""
    log, values = [], iter(range(100))

    def probe():
        log.append("?")
        return next(values)

    comparison = compare([Fake(n, [1] * 2, log) for n in "AB"], WORK, rounds=2, warm_up=False, probe=probe)
    assert log == ["?", "A", "?", "?", "B", "?"] * 2
    assert [c.probes for c in comparison.contenders] == [(0.5, 4.5), (2.5, 6.5)]
    BenchReport.create("x", {}, (comparison,)).save(tmp_path / "x.json")
    assert BenchReport.load(tmp_path / "x.json").comparisons == (comparison,)
    assert compare([Fake("A", [1], [])], WORK, rounds=1)["A"].probes == ()


def test_medians_and_ratios_pair_by_pair():
    """The machine slows down tenfold in the second round; B is 2, 4 and 5 times as fast as A."""
    comparison = compare([Fake("A", [1.0, 10.0, 2.0], []), Fake("B", [0.5, 2.5, 0.4], [])], WORK, rounds=3)
    a, b = comparison.contenders
    assert comparison.baseline == "A"
    assert [m.output_throughput for m in b.rounds] == [20.0, 4.0, 25.0]
    assert (a.output_throughput, b.output_throughput) == (5.0, 20.0)
    assert b.ratios == pytest.approx((2.0, 4.0, 5.0))
    assert b.ratio == pytest.approx(4.0)
    assert a.ratios == (1.0, 1.0, 1.0)
    other = compare([Fake("A", [1.0, 10.0, 2.0], []), Fake("B", [0.5, 3.0, 0.1], [])], WORK, rounds=3, baseline="B")
    assert other["A"].ratio == pytest.approx(0.3)   # median of 0.5, 0.3, 0.05; the medians' ratio would be 0.25
    assert other["A"].output_throughput / other["B"].output_throughput == pytest.approx(0.25)


def test_identical_requests_must_be_so_in_every_round():
    same = Fake("same", [1, 1], [])
    one_off = Fake("one", [1, 1], [], lambda round_, r: -1 if r.prompt_token_ids[0] == 7 else r.prompt_token_ids[0])
    late = Fake("late", [1, 1], [], lambda round_, r: -1 if round_ == 1 else r.prompt_token_ids[0])
    comparison = compare([Fake("base", [1, 1], []), same, one_off, late], WORK, rounds=2)
    assert [c.identical_requests for c in comparison.contenders] == [2, 2, 1, 0]


class Lazy(Fake):
    """Leaves out the last token of the second request."""

    def serve(self, workload):
        served = super().serve(workload)
        return Served(served.duration_s, served.records, (served.token_ids[0], served.token_ids[1][:-1]))


class Deaf(Fake):
    """Answers the first request only."""

    def serve(self, workload):
        served = super().serve(workload)
        return Served(served.duration_s, served.records[:1], served.token_ids[:1])


@pytest.mark.parametrize(("kind", "message"), [(Lazy, "request 1 of two got 5 output tokens, not 6"),
                                               (Deaf, "request 1 of two got no answer")])
def test_less_work_is_an_error(kind, message):
    with pytest.raises(BenchError, match=message):
        kind("lazy", [1], []).run(WORK)


@pytest.mark.parametrize(("names", "options", "message"), [
    ("", {}, "contenders"), ("AA", {}, "contenders"), ("AB", {"rounds": 0}, "rounds=0"),
    ("AB", {"baseline": "C"}, "baseline='C'.*A, B"),
])
def test_compare_refuses(names, options, message):
    with pytest.raises(ConfigError, match=message):
        compare([Fake(n, [1] * 9, []) for n in names], WORK, **options)


def a_report():
    comparison = compare([Fake("A", [1.0, 10.0, 2.0], []), Fake("B", [0.5, 2.5, 0.4], [])], WORK, rounds=3)
    return BenchReport.create("m0_basics", {"dtype": "float32"}, (comparison,), {"extra": [1, 2]})


def test_report_survives_its_file(tmp_path):
    report = a_report()
    path = report.save(tmp_path / "results" / "bench.json")
    assert BenchReport.load(path) == report
    data = json.loads(path.read_text())
    assert data["comparisons"][0]["contenders"][1]["ratio"] == pytest.approx(4.0)
    assert data["comparisons"][0]["contenders"][1]["output_throughput"] == 20.0
    assert data["machine"]["cpu_cores"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", data["created"])


def test_report_that_is_none(tmp_path):
    file = tmp_path / "bench.json"
    for text, message in (("{", "not a benchmark result"), ('{"schema_version": 1}', "not a benchmark result"),
                          ('{"schema_version": 7}', "schema_version=7")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            BenchReport.load(file)


def test_table_shows_the_medians():
    comparison = a_report().comparisons[0]
    for wide, width in ((True, 200), (False, 80)):
        out = StringIO()
        Console(file=out, width=width).print(comparison_table(comparison, wide))
        text = out.getvalue()
        (line,) = [line.split() for line in text.splitlines() if line.strip().startswith("B ")]
        # The median round takes half a second for 4 and for 6 tokens: first tokens after 125 and 83 ms.
        assert line[:3] == ["B", "20.0", "4.00"]
        assert ("2.00-5.00" in line) == wide
        assert line[4 if wide else 3] == "104"
        assert line[-1] == "2/2"
        assert "B's note" in text


def test_report_prints_every_comparison():
    out = StringIO()
    a_report().print(Console(file=out, width=90))
    assert "two: 2 requests, 3 prompt and 10 output tokens" in out.getvalue()


def test_command_line_can_be_typed_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "m1_offline" / "__main__.py"), "bench", "--model",
                                      str(tmp_path / "my model"), "--rounds", "2"])
    assert command_line() == "python -m m1_offline bench --model 'my model' --rounds 2"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "tools" / "x.py"), "a/b", "--size=1/2"])
    assert command_line() == "python tools/x.py a/b --size=1/2"
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").touch()
    assert command_line() == "python -m tools.x a/b --size=1/2"


def test_a_command_tells_no_place_outside_the_repository(monkeypatch, tmp_path):
    """An environment's Python is called by the environment, whatever the option looks like."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [
        "/somewhere/run.py", "--peer-python", "/envs/vllm/bin/python", "--output-dir=/r/x y", "--model", "/models/big",
        f"--prompts={tmp_path}/in here.txt"])
    assert command_line() == ("python <run.py> --peer-python <vllm> --output-dir=<x y> --model <big> "
                              "'--prompts=in here.txt'")


def test_stored_results_tell_no_place_of_a_machine():
    """Neither in commands nor anywhere else: what is stored has to mean something on another machine."""
    root = Path(__file__).parents[2]
    stored = sorted(root.glob("m[0-9]*/results/**/*.json"))
    assert len(stored) > 5
    for file in stored:
        found = re.findall(r"""[\s"'=]/\w+/[^\s"']*""", file.read_text(encoding="utf-8"))
        assert not found, f"{file}: {found}"


def test_figures_are_pictures(tmp_path):
    comparison = a_report().comparisons[0]
    bars = throughput_bars(comparison, tmp_path / "new" / "bars.png")
    lines = line_plot({"a": Series([1, 2, 4], [1, 4, 16]), "b": Series([1, 4], [1, 16], dashed=True)},
                      tmp_path / "lines.png", title="t", xlabel="x", ylabel="y", log_x=True, log_y=True)
    for path in (bars, lines):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


def test_missing_library_says_how_to_install_it():
    with pytest.raises(ConfigError, match=r'a plot needs no_such_library.*pip install "llm-inference-lab\[bench\]"'):
        require("no_such_library.part", "a plot")


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=128)


def tiny_work(num_requests=3, gap=0.0):
    rng = range(num_requests)
    return Workload("tiny", tuple(BenchRequest(tuple(range(10 + i, 20 + 3 * i)), 3 + i, gap * i) for i in rng))


def test_engine_contender_serves_what_generate_does(llm):
    work = tiny_work()
    result = EngineContender("m0", llm).run(work)
    params = [SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True) for r in work.requests]
    outputs = llm.generate([{"prompt_token_ids": list(r.prompt_token_ids)} for r in work.requests], params,
                           use_tqdm=False)
    assert [list(ids) for ids in result.token_ids] == [o.outputs[0].token_ids for o in outputs]
    for record, request in zip(result.records, work.requests, strict=True):
        assert len(record.token_times) == request.output_len
        assert list(record.token_times) == sorted(record.token_times)
        assert 0 < record.token_times[0] <= record.finish_time <= result.metrics.duration_s
    assert result.metrics.memory.rss_bytes > 0


def test_engine_contender_waits_for_arrivals(llm):
    work = tiny_work(gap=0.15)
    started = time.perf_counter()
    result = EngineContender("m0", llm).run(work)
    assert time.perf_counter() - started >= 0.3
    assert result.metrics.duration_s >= 0.3
    for record, request in zip(result.records, work.requests, strict=True):
        assert record.arrival_time == pytest.approx(request.arrival_time)
        assert record.token_times[0] > record.arrival_time


def test_engine_contender_leaves_nothing_behind_when_it_fails(llm, monkeypatch):
    def broken():
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", broken)
        with pytest.raises(RuntimeError, match="out of order"):
            EngineContender("m0", llm).run(tiny_work())
    assert not llm.engine.has_unfinished_requests()
    assert len(EngineContender("m0", llm).run(tiny_work()).token_ids) == 3


def test_one_engine_twice_gives_equal_tokens(llm):
    comparison = compare([EngineContender("a", llm), EngineContender("b", llm)], tiny_work(), rounds=2)
    assert comparison["b"].identical_requests == 3
    assert len(comparison["b"].rounds) == 2
    with pytest.raises(KeyError):
        comparison["c"]


@pytest.mark.slow
def test_benchmark_of_m0_in_its_quick_form(tiny_model, tmp_path, capsys):
    """F0.11, F1.7: the whole benchmark, small; counted FLOPs grow as predicted, and the total with the square."""
    options = {"model": str(tiny_model("qwen3")), "dtype": "float32"}
    report = benchmark.run(options, rounds=1, quick=True, output_dir=tmp_path)
    (comparison,) = report.comparisons
    assert [c.name for c in comparison.contenders] == ["m0", "transformers-no-cache", "transformers"]
    assert all(c.identical_requests == 1 for c in comparison.contenders)
    assert [p["flops"] for p in report.measurements["growth"]] == [
        p["predicted_flops"] for p in report.measurements["growth"]]
    two, four = (t["flops"] for t in report.measurements["total"])
    assert 3.0 < four / two < 4.0           # (1 + 2 + 3 + 4) / (1 + 2) = 3.33, and attention a little more
    assert BenchReport.load(tmp_path / "bench.json").comparisons == report.comparisons
    assert {p.name for p in tmp_path.glob("*.png")} == {"one_request.png", "growth.png", "total_flops.png"}
    assert "transformers-no-cache" in capsys.readouterr().out


def test_groups_of_bars_have_a_bar_for_each_name(tmp_path, monkeypatch):
    """Also where a group lacks one: its place stays empty, and the others keep theirs."""
    drawn = []
    monkeypatch.setattr("m0_basics.tools.bench.style.write", lambda figure, path: drawn.append(figure) or path)
    grouped_bars({"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}}, tmp_path / "bars.png", title="t", ylabel="l", line=1.0)
    [axes] = drawn[0].axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[1.0, 0.0], [2.0, 3.0]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["x", "y"]
    assert axes.lines[0].get_ydata()[0] == 1.0
