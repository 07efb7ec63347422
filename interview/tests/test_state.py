"""The state file: kept, found again, put aside if damaged, never half written."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from interview.state import STATE_VARIABLE, default_path, load_state
from m0_basics.config import ConfigError


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    state = load_state(tmp_path / "deep" / "state.json")
    assert (state.answers, state.notebooks, state.repaired) == ([], [], None)
    state.add("m1-q01", 7, 10)
    state.add("m1-q01", 9.5, 10)
    state.notebooks.append("03")
    state.started["coding/top_p.py::keep_nucleus"] = "2026-01-01T00:00:00+00:00"
    state.save()
    again = load_state(tmp_path / "deep" / "state.json")
    assert [(a.id, a.got, a.of) for a in again.answers] == [("m1-q01", 7, 10), ("m1-q01", 9.5, 10)]
    assert again.last()["m1-q01"].got == 9.5
    assert (again.notebooks, again.started) == (state.notebooks, state.started)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["state.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', '{"version": 1, "answers": [{"id": "a"}]}',
                                  '{"version": 1, "answers": [{"id": "a", "at": "x", "got": "y", "of": 1}]}',
                                  '{"version": 1, "answers": 3}', "\x00\xff"])
def test_a_damaged_file_is_put_aside(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("latin-1"))
    state = load_state(path)
    assert state.answers == []
    assert state.repaired == tmp_path / "state.json.damaged-1"
    assert state.repaired.read_bytes() == text.encode("latin-1")
    assert not path.exists()
    state.add("m1-q01", 1, 10)
    path.write_text("{")                                    # again: the first one is not overwritten
    assert load_state(path).repaired == tmp_path / "state.json.damaged-2"
    assert state.repaired.read_bytes() == text.encode("latin-1")


def test_a_later_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"version": 2, "answers": []}))
    with pytest.raises(ConfigError, match=r"version 2; allowed: up to 1.*--state"):
        load_state(path)
    assert json.loads(path.read_text())["version"] == 2


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    state = load_state(tmp_path / "file" / "state.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        state.add("m1-q01", 1, 10)


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "llm-inference-lab" / "interview.json"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local" / "state" / "llm-inference-lab" / "interview.json"
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "mine.json"))
    assert default_path() == tmp_path / "mine.json"
