"""The form of interview documents: good ones pass, and each rule catches a planted error."""
from __future__ import annotations

from pathlib import Path

import pytest

from m0_basics.tools.documents.factbook import Fact
from m0_basics.tools.documents.interview import (
    LABELS,
    SECTIONS,
    check_folder,
    check_interview,
    check_translation,
    parse_interview,
    spoken_length,
)

ENGLISH, CHINESE = "INTERVIEW.md", "INTERVIEW.zh-CN.md"
FACTS = {"kv.bytes": Fact(23040, "B")}


def entry(number: int, language: str = "en", level: str = "Mid", **sections: str) -> str:
    texts = {name: f"text of {name}" for name in SECTIONS}
    texts |= {"numbers": "23,040<!-- fact: kv.bytes --> bytes", "code": "`m9/code.py::run`"} | sections
    question = "How large is it?" if language == "en" else "有多大？"
    body = "\n\n".join(f"**{label}** {texts[name]}" for name, label in zip(SECTIONS, LABELS[language], strict=True)
                       if texts[name])
    return f"### m9-q{number:02d} · {level} · {question}\n\n{body}\n\n"


def write(folder: Path, english: str | None = None, chinese: str | None = None) -> tuple[Path, Path]:
    title = "# Interview\n\nIntroduction.\n\n## Part one\n\n"
    (folder / ENGLISH).write_text(title + (english if english is not None else entry(1) + entry(2)), encoding="utf-8")
    (folder / CHINESE).write_text(title + (chinese if chinese is not None else entry(1, "zh-CN") + entry(2, "zh-CN")),
                                  encoding="utf-8")
    return folder / ENGLISH, folder / CHINESE


def test_entries_are_read(tmp_path: Path) -> None:
    """Sections carry the same names in both languages; code blocks and small headings belong to their section."""
    deep = "\n#### Detail\n```bash\n### not a heading\n**Code** not a label\n```\nEnd."
    english, chinese = write(tmp_path, entry(1, deep=deep) + "## Part two\n\n" + entry(12, level="Expert"))
    first, second = parse_interview(english)
    assert (first.id, first.level, first.question, first.line) == ("m9-q01", "Mid", "How large is it?", 7)
    assert list(first.sections) == list(SECTIONS)
    assert first.sections["short"] == "text of short"
    assert first.sections["deep"] == deep.strip()
    assert first.sections["must_have"] == "text of must_have"
    assert first.facts == ["kv.bytes"]
    assert (second.id, second.level) == ("m9-q12", "Expert")
    assert parse_interview(chinese)[0].question == "有多大？"
    assert parse_interview(chinese)[0].sections["wrong"] == "text of wrong"
    assert check_interview(english) == check_interview(chinese) == []


@pytest.mark.parametrize(("text", "complaint"), [
    ("", "there is no entry"),
    (entry(1) + entry(1), "INTERVIEW.md:23: m9-q01 comes after m9-q01"),
    (entry(2) + entry(1), "m9-q01 comes after m9-q02"),
    (entry(1, level="Guru"), "level 'Guru' is not valid; allowed: Junior, Mid, Senior, Expert"),
    (entry(1, wrong=""), "m9-q01 lacks Common wrong answer"),
    (entry(1, wrong=" "), "m9-q01 lacks Common wrong answer"),
    (entry(1, must_have="x\n\n**Code** again"), "once each and in this order"),
    (entry(1).replace("**Numbers**", "**Figures**"), "lacks Numbers"),
    (entry(1).replace("· Mid ·", "- Mid -") + entry(2), "INTERVIEW.md:7: the heading is not of the form"),
])
def test_planted_errors_of_form(tmp_path: Path, text: str, complaint: str) -> None:
    english, _ = write(tmp_path, text)
    problems = check_interview(english)
    assert len(problems) == 1
    assert complaint in problems[0]


def test_sections_out_of_order(tmp_path: Path) -> None:
    swapped = entry(1).replace("**Code**", "**X**").replace("**Numbers**", "**Code**").replace("**X**", "**Numbers**")
    [problem] = check_interview(write(tmp_path, swapped)[0])
    assert "in this order" in problem


@pytest.mark.parametrize(("language", "longest", "one_more", "complaint"), [
    ("en", "word " * 94 + "16<!-- fact: block.size --> ", "word", "96 words cannot be said in 30 seconds; at most 95"),
    ("zh-CN", "一块放 16<!-- fact: block.size --> 个 token，" + "字" * 152, "KV", "162 syllables cannot be said"),
])
def test_an_answer_of_30_seconds_can_be_said(tmp_path: Path, language: str, longest: str, one_more: str,
                                              complaint: str) -> None:
    """Markers of facts are not spoken, and a Latin word or a number is two Chinese syllables."""
    for short, complaints in ((longest, 0), (longest + one_more, 1)):
        text = entry(1, language, short=short)
        document = write(tmp_path, text, text)[language != "en"]
        problems = check_interview(document)
        assert len(problems) == complaints, problems
        assert all(complaint in problem for problem in problems)


def test_syllables_of_an_answer() -> None:
    assert spoken_length("two words, 1,000 tokens", "en") == 4
    assert spoken_length("每个 token 占 23,040 字节，KV cache 很大。", "zh-CN") == 2 + 1 + 2 + 2 + 4 * 2


@pytest.mark.parametrize(("chinese", "complaints"), [
    (entry(1, "zh-CN"), ["INTERVIEW.zh-CN.md lacks m9-q02"]),
    (entry(1, "zh-CN") + entry(2, "zh-CN") + entry(3, "zh-CN"), ["INTERVIEW.md lacks m9-q03"]),
    (entry(1, "zh-CN") + entry(2, "zh-CN", level="Senior"),
     ["m9-q02: level Mid in INTERVIEW.md, Senior in INTERVIEW.zh-CN.md"]),
    (entry(1, "zh-CN") + entry(2, "zh-CN", numbers="没有数字"), ["m9-q02: only one of the two files quotes kv.bytes"]),
    (entry(1, "zh-CN") + entry(2, "zh-CN", numbers="23.04<!-- fact: kv.bytes /1e3 --> kB"),
     ["m9-q02: only one of the two files quotes kv.bytes, kv.bytes *0.001"]),
])
def test_planted_differences_of_translation(tmp_path: Path, chinese: str, complaints: list[str]) -> None:
    assert check_translation(*write(tmp_path)) == []
    assert check_translation(*write(tmp_path, chinese=chinese)) == complaints


def test_all_checks_over_a_folder(tmp_path: Path) -> None:
    """A missing document, a wrong number, a missing symbol and a wrong form: each is reported."""
    folder = tmp_path / "m9"
    folder.mkdir()
    write(folder)
    assert check_folder(folder, FACTS) == ["m9 lacks README.md"]
    (folder / "README.md").write_text("23,040<!-- fact: kv.bytes -->")
    (folder / "code.py").write_text("def run(): ...\n")
    assert check_folder(folder, FACTS) == []
    (folder / "README.md").write_text("23,041<!-- fact: kv.bytes --> by `m9/code.py::walk`")
    write(folder, chinese=entry(1, "zh-CN", short="") + entry(2, "zh-CN"))
    assert check_folder(folder, FACTS) == [
        "README.md:1: kv.bytes is 23,040, but the text shows 23,041", "README.md:1: m9/code.py has no walk",
        "INTERVIEW.zh-CN.md:7: m9-q01 lacks 30 秒版"]
