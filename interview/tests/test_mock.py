"""The mock interview: its draw, its points, its transcript."""
from __future__ import annotations

from pathlib import Path

import pytest

from interview.library import load_questions
from interview.mock import ROUNDS, draw, run_mock, save_transcript, transcript, weakest
from interview.state import load_state
from interview.tests.helpers import Script, question
from m0_basics.config import ConfigError

BANK = [question(f"m{m}-q{n:02d}", level) for m in range(4) for n, level in enumerate(
    ("Junior", "Mid", "Senior", "Expert"), start=1)] + [
    question("m0-q09", topic="project"), question("m5-q27", "Expert", "coding"),
    *(question(f"{p}-q{n:02d}", "Senior", "x") for p in "dspk" for n in (1, 2, 3))]


def test_five_rounds_of_the_right_kind() -> None:
    plan = draw(BANK, seed=1)
    assert [name for name, _ in plan] == [name for name, (count, _) in ROUNDS.items() for _ in range(count)]
    by_round = {name: [q for n, q in plan if n == name] for name in ROUNDS}
    assert {q.level for q in by_round["basics"]} <= {"Junior", "Mid"}
    assert {q.milestone for q in by_round["engine"]} <= {"m0", "m1", "m2", "m3"}
    assert {q.id[0] for q in by_round["system design"]} <= {"d", "s"}
    assert {q.id[0] for q in by_round["coding"]} == {"k"} and {q.id[0] for q in by_round["project"]} == {"p"}
    assert "m0-q09" not in [q.id for _, q in plan] and "m5-q27" not in [q.id for _, q in plan]
    ids = [q.id for _, q in plan]
    assert len(ids) == len(set(ids))


def test_a_seed_is_an_interview() -> None:
    assert draw(BANK, 3) == draw(BANK, 3)
    assert len({tuple(q.id for _, q in draw(BANK, seed)) for seed in range(6)}) > 1
    assert [n for n, _ in draw(BANK, 3, ["project", "basics"], each=1)] == ["basics", "project"]
    assert draw(BANK, 3, ["coding"])[0] in draw(BANK, 3)                # a round alone asks what it asks in the whole


def test_all_rounds_can_be_held_with_the_lab_s_questions() -> None:
    for language in ("en", "zh-CN"):
        assert len(draw(load_questions(language), 0)) == sum(count for count, _ in ROUNDS.values())


def test_bad_rounds() -> None:
    with pytest.raises(ConfigError, match="round='chat' is not valid; allowed: basics, engine"):
        draw(BANK, 0, ["chat"])
    with pytest.raises(ConfigError, match="no question for the round 'coding'"):
        draw([question()], 0, ["coding"])


def hold(answers: list[str], path: Path, **options: object) -> tuple[Script, object]:
    clock = iter(range(0, 10_000, 90))
    script = Script(answers)
    plan = [("basics", question("m1-q01")), ("project", question("p-q01"))]
    return script, run_mock(plan, 4, load_state(path), script.screen, clock=lambda: float(next(clock)), **options)


def test_points_follow_ups_and_verdict(tmp_path: Path) -> None:
    first = ["an answer", "in two lines", "", "more", "", "y", "y", "y", "y"]
    second = ["", "", "n", "y", "n", "h"]
    script, interview = hold(first + second, tmp_path / "s.json")
    assert [(a.got, a.of) for a in interview.asked] == [(11, 11), (5.5, 11)]
    assert interview.score() == (16.5, 22) and interview.score("basics") == (11, 11)
    assert list(weakest(interview)) == ["p-q01", "m1-q01"]
    kept = load_state(tmp_path / "s.json").answers
    assert [(a.id, a.got) for a in kept] == [("m1-q01", 11), ("p-q01", 5.5)]
    assert script.text.index("Follow-up:") < script.text.index("SHORT m1-q01")


def test_the_transcript(tmp_path: Path) -> None:
    _, interview = hold(["an answer", "in two lines", "", "more", "", "y", "y", "y", "y", "", "", "n", "y", "n", "h"],
                        tmp_path / "s.json")
    text = transcript(interview)
    assert "seed 4: 16.5 of 22 points, 75%, **good**." in text
    assert "Rubric: excellent from 90%, good from 70%, pass from 60%." in text
    assert "| basics | 1 | 11 of 11 | excellent |" in text and "| project | 1 | 5.5 of 11 | not yet |" in text
    assert "## m1-q01 · Mid · How is m1-q01?\n\nbasics, 1.5 min, 11 of 11 points.\n" in text
    assert "points.\n\n> an answer\n> in two lines\n" in text
    assert "> (no answer)" in text and "- 5: the second, over two lines" in text
    path = save_transcript(interview, tmp_path / "new" / "mock.md")
    assert path.read_text(encoding="utf-8") == text
    with pytest.raises(ConfigError, match="cannot be written"):
        save_transcript(interview, path / "below-a-file.md")


def test_leaving_early_keeps_what_was_answered(tmp_path: Path) -> None:
    _, interview = hold(["x", "", "", "y", "y", "y", "n", "q", ""], tmp_path / "s.json")
    assert [a.question.id for a in interview.asked] == ["m1-q01"]
    assert "m1-q01" in transcript(interview) and "p-q01" not in transcript(interview)
    _, interview = hold(["x", "", "", "y", "y", "y", "n", "an answer", "", "q", ""], tmp_path / "u.json")
    assert [a.question.id for a in interview.asked] == ["m1-q01"]
    _, nothing = hold([], tmp_path / "t.json")
    assert nothing.asked == [] and nothing.score() == (0, 0)
