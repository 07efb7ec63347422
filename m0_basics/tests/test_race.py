"""The race: real runs of an engine, a board that fits any terminal, and a picture that says what was measured."""
from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from m0_basics.tools.race import __main__ as command
from m0_basics.tools.race.board import Board, Lane
from m0_basics.tools.race.picture import animated_svg
from m0_basics.tools.race.runner import EIGHT, HEATS, SINGLE, Event, milestones, race, run_heats


def board() -> Board:
    lanes = [Lane("m0 basics"), Lane("m1 offline"), Lane("m2 continuous batching")]
    for lane, speed in zip(lanes[:2], (5, 50), strict=True):
        for heat in HEATS:
            for step in range(1, 101):
                lane.take(Event("tokens", heat, step / 50, speed * step // 50, f"story <of> {lane.name} " * 9))
        lane.take(Event("done"))
    lanes[2].take(Event("failed", text="no memory"))
    return Board(lanes)


def shown(width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), record=True)
    console.print(board().render(width, height))
    return console.export_text().splitlines()


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (40, 20), (24, 12)])
def test_the_board_fits(width: int, height: int) -> None:
    lines = shown(width, height)
    assert all(len(line.rstrip()) <= width for line in lines) and len(lines) <= max(height, 10)
    bars = [line.count("█") for line in lines if "█" in line]
    assert len(bars) == 4 and bars[1] > 2 * bars[0] >= 2 and bars[2:] == bars[:2]
    assert sum("failed" in line for line in lines) == 2
    assert ("m1 offline writes:" in lines) is (height > 12) and (height == 12 or any("story <of>" in x for x in lines))


def test_rates_are_tokens_over_time() -> None:
    race = board()
    assert race.lanes[0].rate(SINGLE) == 5 and race.lanes[1].rate(EIGHT) == 50 and race.lanes[2].rate(SINGLE) == 0
    assert race.fastest() is race.lanes[1] and Board([Lane("m0")]).fastest() is None
    assert " ".join(race.lines()[1].split()) == "m1 offline one prompt 50.0 tokens/s eight at once 50.0 tokens/s"
    assert race.lines()[2].endswith("failed: no memory")


def test_the_picture_moves_as_the_tokens_came() -> None:
    text = animated_svg(board(), "a CPU, 2 cores")
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    bars = root.findall(f"{space}rect")[1:]
    assert len(bars) == 4                                               # who failed is not in the picture
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert widths[1] == pytest.approx(10 * widths[0], rel=1e-3) == widths[3]
    moves = bars[1][0]
    values, times = ([float(x) for x in moves.get(name, "").split(";")] for name in ("values", "keyTimes"))
    assert len(values) == len(times) <= 43 and values == sorted(values) and times == sorted(times) and times[-1] == 1
    assert values[0] == 0 and values[-1] == widths[1] and times[-2] == pytest.approx(2 / 6, abs=1e-3)
    words = "".join(root.itertext())
    assert "50/s" in words and "a CPU, 2 cores" in words and "story <of> m1 offline" in words


def test_an_engine_runs(tiny_model) -> None:                    # type: ignore[no-untyped-def]
    """With a tiny model: both heats report times and tokens that grow."""
    events: list[Event] = []
    run_heats("m0_basics", 0.3, {"model": str(tiny_model("llama_tied"))}, events.append)
    assert events[0].kind == "ready" and {e.heat for e in events[1:]} == set(HEATS)
    for heat in HEATS:
        mine = [e for e in events if e.heat == heat]
        assert [e.tokens for e in mine] == sorted(e.tokens for e in mine) and mine[-1].tokens > 0
        assert mine[-1].seconds >= 0.3 or mine[-1].tokens % 400 == 0


@pytest.mark.slow
def test_who_cannot_run_says_why() -> None:
    kinds = list(race("m0_basics", 0.1, {"model": "/there/is/none"}))
    assert [e.kind for e in kinds] == ["loading", "failed"] and "/there/is/none" in kinds[1].text


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a terminal, a line for each engine; a picture where one is wanted."""
    import typer
    def told(package: str, seconds: float, options: dict[str, object]) -> list[Event]:
        return [Event("loading"), *(Event("tokens", heat, seconds, 30, "text") for heat in HEATS), Event("done")]
    monkeypatch.setattr(command, "race", told)
    app = typer.Typer()
    app.command()(command.run)
    result = CliRunner().invoke(app, ["--only", "m0_basics", "--seconds", "3", "--picture", str(tmp_path / "a/x.svg")])
    assert result.exit_code == 0 and "one prompt   10.0 tokens/s" in result.output
    assert (tmp_path / "a/x.svg").read_text().startswith("<svg")
    wrong = CliRunner().invoke(app, ["--only", "m9_none"])
    assert "m9_none" in str(wrong.exception) and milestones()[0] == "m0_basics" and len(milestones()) >= 7
