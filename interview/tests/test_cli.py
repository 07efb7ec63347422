"""The command line over the real pages, with a user that types."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from interview.cli import app
from interview.library import ROOT
from interview.pitch import Gain, Results, load_results, pitch
from interview.progress import collect, mark_notebook, notebooks
from interview.state import load_state
from interview.tests.helpers import question
from m0_basics.config import ConfigError

RUN = CliRunner()


@pytest.fixture(autouse=True)
def _own_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_LAB_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("LLM_LAB_STATE", str(tmp_path / "state.json"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("lang", "shown"), [("en", "Token 37 of a sequence"), ("zh-CN", "第 37 个 token")])
def test_quiz(tmp_path: Path, lang: str, shown: str) -> None:
    result = RUN.invoke(app, ["quiz", "--id", "m3-q04", "--lang", lang], input="I say so\n\nn\ny\ny\ny\ny\ny\ny\n")
    assert result.exit_code == 0, result.output
    assert "m3-q04" in result.output and "10 of 10 points" in result.output
    [answer] = load_state(tmp_path / "state.json").answers
    assert (answer.id, answer.got) == ("m3-q04", 10)


def test_a_quiz_without_an_answer_keeps_nothing(tmp_path: Path) -> None:
    """q ends it everywhere: at the question, and while points are given."""
    for typed in ("q\n\n", "I say so\n\nn\nwhat\nq\n"):
        result = RUN.invoke(app, ["quiz", "--id", "m3-q04"], input=typed)
        assert "nothing was answered, so nothing is kept" in result.output
    assert "'what' is not valid; allowed: y, h, n, q" in result.output
    assert not (tmp_path / "state.json").exists()


def test_mock_saves_its_transcript(tmp_path: Path) -> None:
    result = RUN.invoke(app, ["mock", "--round", "project", "--each", "1", "--output", "talk.md"],
                        input="hello\n\nagain\n\n" + "y\n" * 8)
    assert result.exit_code == 0, result.output
    assert "100%: excellent" in result.output
    assert "> hello" in (tmp_path / "talk.md").read_text(encoding="utf-8")
    result = RUN.invoke(app, ["mock", "--milestone", "m0", "--output", "none.md"], input="q\n\n")
    assert result.exit_code == 0 and "m0-q" in result.output
    assert not (tmp_path / "none.md").exists()


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["quiz", "--level", "Guru"], "level='Guru'"), (["quiz", "--topic", "x"], "topic='x'"),
    (["quiz", "--lang", "fr"], "language='fr' is not valid; allowed: en, zh-CN"),
    (["quiz", "--topic", "coding", "--level", "Junior"], "no question matches"),
    (["quiz", "--grader-model", "x"], "grader-model needs --grader-url"),
    (["mock", "--round", "chat"], "round='chat'"), (["mock", "--milestone", "m9"], "milestone='m9'"),
    (["progress", "--notebook", "99"], "notebook='99' is not valid; allowed: 00"),
    (["pitch", "--length", "5min"], "length='5min'"), (["pitch", "--results", "nowhere"], "has no benchmark results"),
    (["code", "start", "99"], "exercise='99'"),
])
def test_bad_input_is_one_error(arguments: list[str], complaint: str) -> None:
    result = RUN.invoke(app, arguments)
    assert isinstance(result.exception, ConfigError), result.output
    assert complaint in str(result.exception)


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    result = RUN.invoke(app, ["progress"])
    assert result.exit_code == 0 and "state.json.damaged-1" in result.output.replace("\n", "")


def test_progress_counts_what_is_there(tmp_path: Path) -> None:
    state = load_state(tmp_path / "state.json")
    state.add("m3-q01", 2, 10)
    state.add("m3-q01", 8, 10)                                  # the newest counts
    state.add("d-q01", 5, 10)
    assert mark_notebook("3", state) is True
    rows = {row.package: row for row in collect([question("m3-q01"), question("m3-q02"), question("d-q01")], state)}
    assert (rows["m3_paged_kv"].asked, rows["m3_paged_kv"].questions, rows["m3_paged_kv"].share) == (1, 2, 0.8)
    assert rows["m3_paged_kv"].notebook is True and rows["m4_flash_attn"].notebook is False
    assert (rows["interview"].asked, rows["interview"].exercises) == (1, 8)
    assert rows["m1_offline"].share is None and rows["m1_offline"].solved == 0 < rows["m1_offline"].exercises
    assert load_state(tmp_path / "state.json").notebooks == ["03"]
    assert mark_notebook("03", state) is False
    assert set(notebooks()) >= {"00", "01", "02", "03", "04", "05", "06"}
    result = RUN.invoke(app, ["progress", "--notebook", "04"])
    assert "notebook 04: done" in result.output and "m6_prefix_cache" in result.output


def bench(ratio: float, **more: object) -> dict[str, object]:
    return {"command": "python -m m3_paged_kv bench --quick x", "machine": {
        "cpu": "Abacus", "cpu_capability": "BEADS", "cpu_cores": 2, "gpu": "none"}, "comparisons": [
        {"workload": {"name": "ragged-64:num=4"}, "baseline": "m2", "contenders": [
            {"name": "m2", "ratio": 1.0, "output_throughput": 10.0},
            {"name": "m3", "ratio": ratio, "output_throughput": 10 * ratio},
            {"name": "transformers", "ratio": 0.5, "output_throughput": 5.0}]}], **more}


def test_a_pitch_is_filled_from_own_results(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "m3_paged_kv"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(bench(1.75)))
    results = load_results(tmp_path / "mine")
    assert [(g.milestone, g.over, g.workload, g.ratio) for g in results.gains] == [
        ("m3", "m2", "ragged-64:num=4", 1.75), ("m3", "transformers", "ragged-64:num=4", 3.5)]
    solved = ["m3_paged_kv/block_pool.py::BlockPool.free"]
    short, long = (pitch(results, length, "en", solved) for length in ("30s", "3min"))
    assert "1.75 times that of m2" in short and "Abacus (BEADS), 2 cores" in short
    assert "Figures of your own runs" in short and "1 parts: `m3_paged_kv/block_pool.py::BlockPool.free`" in short
    assert "transformers, ragged-64:num=4: 3.50" in long and "transformers" not in short
    assert len(short) < len(pitch(results, "1min", "en")) < len(long)
    assert "1.75 倍" in pitch(results, "30s", "zh-CN")


def test_the_number_is_one_of_what_was_written() -> None:
    gains = tuple(Gain(f"m{n}", f"m{n - 1}", "ragged-64", float(n), 1.0) for n in (3, 6))
    results = Results(gains, ("Abacus",), (), own=False)
    assert "6.00 times that of m5" in pitch(results, "30s", "en")
    assert "3.00 times that of m2" in pitch(results, "30s", "en", ["m3_paged_kv/block_pool.py::BlockPool.free"])
    assert "6.00 times that of m5" in pitch(results, "30s", "en", ["m1_offline/sampler.py::candidates"])


def test_a_loss_is_said_and_numbers_that_are_not_yours_are_marked(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "m3_paged_kv"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(bench(0.8)))
    text = pitch(load_results(tmp_path / "mine"), "3min", "en")
    assert "did not help" in text and "m3 ragged-64:num=4 0.80" in text and "solve exercises" in text
    theirs = RUN.invoke(app, ["pitch", "--length", "3min", "--output", "p.md"])
    assert theirs.exit_code == 0, theirs.output
    assert "do not tell them as your own" in (tmp_path / "p.md").read_text(encoding="utf-8")


BARE = bench(1.0) | {"comparisons": [{"contenders": [{"name": "m3"}, {"name": "m2"}]}]}


@pytest.mark.parametrize("text", ["{", "{}", '{"comparisons": [], "machine": {}, "command": "x"}', json.dumps(BARE)])
def test_damaged_results_are_one_error(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "mine" / "m3_paged_kv"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(text)
    with pytest.raises(ConfigError, match=r"bench\.json"):
        load_results(tmp_path / "mine")


def test_the_coding_round_has_a_clock(tmp_path: Path) -> None:
    assert "8  not started" in RUN.invoke(app, ["code", "list"]).output
    shown = RUN.invoke(app, ["code", "statement", "4"]).output
    assert "keep_nucleus" in shown and "cumsum" not in shown
    started = RUN.invoke(app, ["code", "start", "4"])
    assert started.exit_code == 0 and "30 minutes from now" in started.output
    file = tmp_path / "workspace" / "interview" / "coding" / "top_p.py"
    assert "raise NotImplementedError" in file.read_text() and "cumsum" not in file.read_text()
    assert "0 of 30 min" in RUN.invoke(app, ["code", "list"]).output
    assert list(load_state(tmp_path / "state.json").started) == ["coding/top_p.py::keep_nucleus"]


def test_facts_and_index_are_commands() -> None:
    facts = json.loads(RUN.invoke(app, ["facts"]).output)
    assert facts["llama70.kv_token"] == {"value": 327680, "unit": "B"}
    assert RUN.invoke(app, ["index"]).output == "up to date\n"
    assert (ROOT / "interview" / "README.md").is_file()
