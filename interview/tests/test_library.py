"""Questions of all pages: ids, topics, filters, points, corrections."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from interview.library import Topics, load_corrections, load_questions, milestone_of, select
from interview.points import RUBRIC, check_points, follow_ups, must_have, verdict
from interview.screen import plain
from interview.tests.helpers import question
from m0_basics.config import ConfigError


def test_every_page_s_questions_are_there_in_both_languages() -> None:
    english, chinese = load_questions(), load_questions("zh-CN")
    assert [q.id for q in english] == [q.id for q in chinese]
    assert [(q.level, q.topic) for q in english] == [(q.level, q.topic) for q in chinese]
    ids = [q.id for q in english]
    assert len(ids) == len(set(ids))
    assert {"m0-q01", "m6-q27", "d-q01", "s-q06", "p-q05", "k-q07"} <= set(ids)
    assert {q.milestone for q in english} >= {*(f"m{i}" for i in range(7)), "interview"}


def test_every_question_can_be_scored() -> None:
    assert [p for language in ("en", "zh-CN") for q in load_questions(language) for p in check_points(q.entry)] == []


def test_topics_exist_and_their_ids_too() -> None:
    ids, topics = {q.id for q in load_questions()}, Topics.load()
    assert [i for i in topics.exceptions if i not in ids and not i.startswith("m7")] == []
    assert {q.topic for q in load_questions()} == set(topics.names)
    with pytest.raises(ConfigError, match=r"id='x-q01'.*begin with"):
        topics.of("x-q01")


@pytest.mark.parametrize(("filters", "expected"), [
    ({}, ["m1-q01", "m3-q01", "d-q01"]),
    ({"level": ["mid"]}, ["m1-q01", "d-q01"]),
    ({"milestone": ["m3", "interview"]}, ["m3-q01", "d-q01"]),
    ({"topic": ["paging"], "level": ["Mid"]}, []),
    ({"ids": ["d-q01"]}, ["d-q01"]),
])
def test_filters(filters: dict[str, list[str]], expected: list[str]) -> None:
    questions = [question("m1-q01", topic="kv-cache"), question("m3-q01", "Senior"), question("d-q01", topic="design")]
    assert [q.id for q in select(questions, **filters)] == expected


@pytest.mark.parametrize(("filters", "complaint"), [
    ({"level": ["Guru"]}, "level='Guru' is not valid; allowed: Junior, Mid, Senior, Expert"),
    ({"milestone": ["m9"]}, "milestone='m9' is not valid; allowed: m3"),
    ({"topic": ["x"]}, "topic='x' is not valid; allowed: paging"),
    ({"ids": ["m3-q99"]}, "id='m3-q99' is not valid"),
])
def test_filters_that_match_nothing_known(filters: dict[str, list[str]], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        select([question()], **filters)


def test_points_and_follow_ups_are_read() -> None:
    entry = question().entry
    assert [(p.points, p.text) for p in must_have(entry)] == [
        (3, "the first"), (5, "the second, over two lines"), (2, "the third")]
    found = [(f.question, f.answer.split()[0]) for f in follow_ups(entry)]
    assert found == [("What next?", "This"), ("And then?", "That")]
    chinese = question(must_have="- 1 分：一\n- 9 分: 二", follow_ups="- *然后呢？* 这样。").entry
    assert [(p.points, p.text) for p in must_have(chinese)] == [(1, "一"), (9, "二")]
    assert check_points(chinese) == []


def test_entries_that_cannot_be_scored_are_named() -> None:
    assert check_points(question(must_have="- 3 points: one").entry) == [
        "m3-q01: its must-have points add up to 3; allowed: 10"]
    assert check_points(question(follow_ups="none").entry) == ["m3-q01 has no follow-up question"]


@pytest.mark.parametrize(("got", "word"), [(9, "excellent"), (8.9, "good"), (7, "good"), (6.9, "pass"), (6, "pass"),
                                           (5.9, "not yet"), (0, "not yet")])
def test_the_rubric(got: float, word: str) -> None:
    assert verdict(got, 10) == word
    assert [limit for limit, _ in RUBRIC] == [0.9, 0.7, 0.6, 0.0]


def test_nothing_possible_is_not_excellent() -> None:
    assert verdict(0, 0) == "not yet"
    assert milestone_of("m3-q04") == "m3" and milestone_of("d-q04") == "interview"


def test_plain_text_has_no_comments_folds_or_links() -> None:
    text = "<details>\n<summary>Deep</summary>\n\n16<!-- fact: x --> and [m3-q01](a.md#b) ![p](x.png)\n</details>"
    assert plain(text) == "16 and m3-q01 ![p](x.png)"


def test_corrections_have_their_parts_in_both_languages() -> None:
    english, chinese = load_corrections(), load_corrections("zh-CN")
    assert [c.id for c in english] == [c.id for c in chinese] == [f"c-{i:02d}" for i in range(1, 22)]
    for correction in english + chinese:
        assert "python " in correction.measure or ".py::" in correction.measure


def test_a_correction_without_a_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corrections.md").write_text("### c-01 · It is so\n\n**What is true**\n\nNot.\n")
    with pytest.raises(ConfigError, match="c-01 has the parts What is true; allowed: What is true, Measure it"):
        load_corrections(folder=tmp_path)


def test_the_topics_file_names_each_id_once() -> None:
    data = json.loads((Path(__file__).parents[1] / "topics.json").read_text(encoding="utf-8"))
    ids = [i for topic in data.values() for i in topic["ids"]]
    assert len(ids) == len(set(ids))
