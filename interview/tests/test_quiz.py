"""The quiz: the answer stays hidden until asked for, points add up, weak questions come back."""
from __future__ import annotations

from pathlib import Path

import pytest

from interview.grader import Grade
from interview.quiz import order, run_quiz
from interview.state import Answer, load_state
from interview.tests.helpers import Script, question


def test_the_answer_comes_after_the_user_s(tmp_path: Path) -> None:
    script = Script(["my answer", "", "n", "y", "h", "n"])
    state = load_state(tmp_path / "s.json")
    scores = run_quiz([question()], state, script.screen)
    assert [(s.got, s.of) for s in scores] == [(3 + 2.5, 10)]
    assert script.text.index("How is m3-q01?") < script.text.index("<your answer") < script.text.index("SHORT m3-q01")
    assert "DEEP" not in script.text                            # not asked for
    assert [(a.id, a.got) for a in load_state(tmp_path / "s.json").answers] == [("m3-q01", 5.5)]
    assert "5.5 of 10 points (55%)" in script.text


def test_nothing_is_shown_or_kept_if_the_user_leaves(tmp_path: Path) -> None:
    for answers in (["q", ""], []):                             # says so, or closes the input
        script = Script(answers)
        assert run_quiz([question()], load_state(tmp_path / "s.json"), script.screen) == []
        assert "SHORT" not in script.text
    assert not (tmp_path / "s.json").exists()


def test_an_end_in_the_middle_keeps_what_was_finished(tmp_path: Path) -> None:
    script = Script(["", "y", "y", "y", "y", "", "n", "y"])
    scores = run_quiz([question(), question("m4-q01")], load_state(tmp_path / "s.json"), script.screen)
    assert [s.got for s in scores] == [10]
    assert [a.id for a in load_state(tmp_path / "s.json").answers] == ["m3-q01"]
    assert "DEEP m3-q01" in script.text


def test_unclear_answers_are_asked_again(tmp_path: Path) -> None:
    script = Script(["", "n", "maybe", "3", "YES", "no", ""])
    assert run_quiz([question()], load_state(tmp_path / "s.json"), script.screen)[0].got == 3


def test_unasked_first_then_the_weakest_then_the_oldest() -> None:
    last = {"m1-q01": Answer("m1-q01", "2026-01-02", 9, 10), "m2-q01": Answer("m2-q01", "2026-01-03", 4, 10),
            "m3-q01": Answer("m3-q01", "2026-01-01", 9, 10)}
    questions = [question(f"m{i}-q01") for i in (1, 2, 3, 4, 5)]
    assert [q.id for q in order(questions, last)] == ["m4-q01", "m5-q01", "m2-q01", "m3-q01", "m1-q01"]
    shuffled = {tuple(q.id for q in order(questions, last, seed)) for seed in range(8)}
    assert {s[2:] for s in shuffled} == {("m2-q01", "m3-q01", "m1-q01")}
    assert len(shuffled) == 2
    assert order(questions, last, 5) == order(questions, last, 5)


class Proposes:
    problem = "not reached"

    def __init__(self, grade: Grade | None) -> None:
        self.found, self.asked = grade, []

    def grade(self, entry: object, answer: str) -> Grade | None:
        self.asked.append(answer)
        return self.found


@pytest.mark.parametrize(("grade", "shown"), [
    (Grade((1.0, 0.5, 0.0), "Fine."), "the grader proposes: 5.5 (3.0 + 2.5 + 0.0). Fine."),
    (None, "the grader is left out: not reached")])
def test_a_grader_proposes_and_the_user_decides(tmp_path: Path, grade: Grade | None, shown: str) -> None:
    script, grader = Script(["two", "lines", "", "n", "n", "n", "y"]), Proposes(grade)
    scores = run_quiz([question()], load_state(tmp_path / "s.json"), script.screen, grader)    # type: ignore[arg-type]
    assert grader.asked == ["two\nlines"]
    assert shown in script.text
    assert scores[0].got == 2


def test_no_answer_is_not_sent_to_a_grader(tmp_path: Path) -> None:
    script, grader = Script(["", "n", "n", "n", "n"]), Proposes(None)
    run_quiz([question()], load_state(tmp_path / "s.json"), script.screen, grader)             # type: ignore[arg-type]
    assert grader.asked == [] and "grader" not in script.text
