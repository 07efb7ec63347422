"""The coding round as exercises: a blank body fails its hidden tests, the solutions pass, planted bugs are noticed."""
from __future__ import annotations

from pathlib import Path

import pytest

from interview import coding_round
from interview.state import load_state
from m0_basics.tools.exercise.book import Exercise, ExerciseBook, Python
from m0_basics.tools.exercise.source import find_function, replace_function
from m0_basics.tools.testing.exercises import ExerciseConformance


class TestCodingRound(ExerciseConformance):
    package = "interview"
    # It is about a milestone's `llm`, which this folder has not.
    test_no_module_is_imported_before_the_overlay = None


def write(book: ExerciseBook, task: Exercise, body: bytes) -> None:
    file = book.learner_file(task)
    source = file.read_bytes()
    file.write_bytes(replace_function(source, find_function(source, task.symbol, file), body))


@pytest.mark.slow
def test_insert_is_tested_while_evict_is_blank(tmp_path: Path, forked_python: Python, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """By those tests that need nothing else; the line below says what is to be written."""
    monkeypatch.setenv("LLM_LAB_WORKSPACE", str(tmp_path / "workspace"))
    book, state = ExerciseBook("interview", forked_python), load_state(tmp_path / "state.json")
    insert, evict = book.find("7"), book.find("8")
    for task in (insert, evict):
        coding_round.start(book, task, state)
    write(book, insert, book.solution(insert))
    assert not coding_round.check(book, insert, state)
    shown = capsys.readouterr().out
    assert "still blank: RadixTree.evict; write it first" in shown
    assert "of the tests before that, 4 of 4 passed" in shown
    assert "NotImplementedError" not in shown and "fails:" not in shown and "0 of 30 minutes" in shown
    write(book, insert, book.solution(insert).replace(b"node.users)", b"0)"))
    assert not coding_round.check(book, insert, state)
    shown = capsys.readouterr().out
    assert "fails: interview/tests/test_coding_radix.py::test_a_split_keeps_users_children_and_stamps" in shown
    assert "write it first" in shown and "of the tests before that, 3 of 4 passed" in shown


@pytest.mark.slow
def test_a_round_from_start_to_pass(tmp_path: Path, forked_python: Python, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """The off-by-one of top-p is refused with a call that differs; the right one passes, and its clock stops."""
    monkeypatch.setenv("LLM_LAB_WORKSPACE", str(tmp_path / "workspace"))
    book, state = ExerciseBook("interview", forked_python), load_state(tmp_path / "state.json")
    task = book.find("4")
    text, _ = coding_round.start(book, task, state)
    assert "softmax of the row" in text and "cumsum" not in text
    write(book, task, book.solution(task).replace(b"before >= top_p", b"before + mass > top_p"))
    assert not coding_round.check(book, task, state)
    shown = capsys.readouterr().out
    assert "not passed, 0 of 30 minutes" in shown and "test_the_token_that_crosses_p_is_kept" in shown
    write(book, task, book.solution(task))
    assert coding_round.check(book, task, state)
    assert "keep_nucleus: passed" in capsys.readouterr().out
    assert load_state(tmp_path / "state.json").started == {}
