"""The coding round as exercises: a blank body fails its hidden tests, the solutions pass, planted bugs are noticed."""
from __future__ import annotations

from pathlib import Path

import pytest

from interview import coding_round
from interview.state import load_state
from m0_basics.tools.exercise.book import ExerciseBook, Python
from m0_basics.tools.exercise.source import find_function, replace_function
from m0_basics.tools.testing.exercises import ExerciseConformance


class TestCodingRound(ExerciseConformance):
    package = "interview"
    # It is about a milestone's `llm`, which this folder has not.
    test_no_module_is_imported_before_the_overlay = None


@pytest.mark.slow
def test_a_round_from_start_to_pass(tmp_path: Path, forked_python: Python, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """The off-by-one of top-p is refused with a call that differs; the right one passes, and its clock stops."""
    monkeypatch.setenv("LLM_LAB_WORKSPACE", str(tmp_path / "workspace"))
    book, state = ExerciseBook("interview", forked_python), load_state(tmp_path / "state.json")
    task = book.find("4")
    text, _ = coding_round.start(book, task, state)
    assert "softmax of the row" in text and "cumsum" not in text
    file = book.learner_file(task)

    def write(body: bytes) -> None:
        source = file.read_bytes()
        file.write_bytes(replace_function(source, find_function(source, task.symbol, file), body))
    write(book.solution(task).replace(b"before >= top_p", b"before + mass > top_p"))
    assert not coding_round.check(book, task, state)
    shown = capsys.readouterr().out
    assert "not passed, 0 of 30 minutes" in shown and "test_the_token_that_crosses_p_is_kept" in shown
    write(book.solution(task))
    assert coding_round.check(book, task, state)
    assert "keep_nucleus: passed" in capsys.readouterr().out
    assert load_state(tmp_path / "state.json").started == {}
