"""How far a long command is; and its help, whose names are never cut."""
from __future__ import annotations

import io
import re

import pytest
from typer.testing import CliRunner

from m0_basics.config import EngineConfig
from m0_basics.tools.cli import build_app
from m0_basics.tools.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> list[str]:
    return [line.rstrip() for line in stream.getvalue().split("\r") if line.strip()]


def test_the_line_says_what_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    times = iter([0.0, 10.0, 250.0])
    stream = Terminal()
    with Progress("ragged", 4, stream, lambda: next(times)) as progress:
        progress.now("round 1, m1")
        progress.step()
        progress.now("round 1, m2")
        progress.step()
        progress.now("x" * 100)
    lines = shown(stream)
    assert lines[:2] == ["ragged: round 1, m1 · 1 of 4", "ragged: round 1, m2 · 2 of 4 · about 30 s left"]
    assert len(lines[2]) == 59 and stream.getvalue().endswith("\r" + " " * 59 + "\r")


def test_files_and_pipes_get_nothing_of_it() -> None:
    stream = io.StringIO()
    with Progress("ragged", 1, stream) as progress:
        progress.now("round 1")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("width", [80, 40])
def test_help_has_every_name_in_a_panel(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = CliRunner().invoke(build_app("m0_basics"), ["generate", "--help"]).output
    assert all(len(line) <= width for line in text.splitlines()) and "…" not in text
    words = re.sub(r"[│\s]+", " ", text)
    refused = {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"}     # all but one of their values
    for name in EngineConfig.options():
        assert (f"--{name.replace('_', '-')} " in words) is (name not in refused)
    for title in ("This command", "Model", "Sampling"):
        assert f"─ {title} ─" in text
    assert "--temperature" in words and "[default: 0.0]" in words


def test_facts_take_words() -> None:
    result = CliRunner().invoke(build_app("m0_basics"), ["facts", "smollm2.kv_bytes_per_token"])
    assert '"smollm2.kv_bytes_per_token"' in result.output and "qwen" not in result.output
    wrong = CliRunner().invoke(build_app("m0_basics"), ["facts", "nothing like it"])
    assert "parts of fact names, which begin with" in str(wrong.exception)
