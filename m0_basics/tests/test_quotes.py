"""Numbers are marked beside the text: taken apart and put together again, also after the text was edited."""
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from m0_basics.config import ConfigError
from m0_basics.tools.documents.__main__ import app, documents
from m0_basics.tools.documents.checks import check_document, update_document
from m0_basics.tools.documents.factbook import Fact
from m0_basics.tools.documents.interview import check_interview, parse_interview
from m0_basics.tools.documents.quotes import (
    Quote,
    _weave,
    format_quotes,
    lost_quotes,
    map_file,
    read_document,
    split_text,
    without_markers,
    write_document,
)
from m0_basics.tools.documents.tidy import fold_answers, tidy, untidy

BOOK = {"kv": Fact(23040, "B"), "share": Fact(0.4701, "ratio"), "speed": Fact(142.5), "bound": Fact("memory")}
TEXT = """# Cache

It keeps 23,040<!-- fact: kv --> bytes, 47%<!-- fact: share --> of all; in kB 23.0<!-- fact: kv /1000 -->.

| 23,040<!-- fact: kv --> | 23,040<!-- fact: kv --> | **142.5**<!-- fact: speed --> |

每个 token 占 23,040<!-- fact: kv --> 字节，受 memory<!-- fact: bound --> 限制。
Write `7<!-- fact: kv -->`.
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    path = tmp_path / "README.md"
    path.write_text(TEXT, encoding="utf-8")
    assert tidy(path) and not tidy(path)
    return path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_markers_leave_the_text_and_come_back(document: Path) -> None:
    assert document.read_text(encoding="utf-8") == without_markers(TEXT).replace("`7`", "`7<!-- fact: kv -->`")
    assert map_file(document) == document.parent / "tools/quoted/README.tsv"
    rows = [line.split("\t") for line in map_file(document).read_text(encoding="utf-8").splitlines()]
    assert rows[1] == ["It keeps", "23,040", "kv", ""]
    assert [row[1:] for row in rows[2:4]] == [["47%", "share", ""], ["23.0", "kv", "/1000"]]
    assert read_document(document) == TEXT
    assert check_document(document, BOOK) == []


@given(st.lists(st.tuples(st.sampled_from(["", "of ", "a b ", "| ", "占", "\n\n", "7 "]),
                          st.sampled_from(["7", "7.5", "77", "1,000", "-7", "7%"]),
                          st.sampled_from(["", "<!-- fact: a -->", "<!-- fact: b /2 -->"]),
                          st.sampled_from([" ", ", ", "的", " |", "`x`"])), max_size=30))
def test_any_text_survives(parts: list[tuple[str, ...]]) -> None:
    """Numbers that repeat, among others that are not marked."""
    woven = "".join("".join(part) for part in parts)
    plain, quotes = split_text(woven)
    assert plain == without_markers(woven)
    assert _weave(plain, quotes) == (woven, [])


def test_edits_around_a_number_do_no_harm(document: Path) -> None:
    edit(document, "It keeps 23,040", "The cache is large. It keeps\n23,040")
    edit(document, "# Cache", "# Cache\n\nThere are 23,040 reasons.\n")
    edit(document, "Write", "It all ends here. Write")
    assert check_document(document, BOOK) == []
    assert read_document(document).count("<!-- fact: kv -->") == TEXT.count("<!-- fact: kv -->")
    assert "23,040 reasons" in read_document(document)


def test_a_paragraph_may_move(document: Path) -> None:
    edit(document, "每个 token 占 23,040 字节，受 memory 限制。\n", "")
    edit(document, "# Cache\n", "# Cache\n\n每个 token 占 23,040 字节，受 memory 限制。\n")
    assert "受 memory<!-- fact: bound --> 限制" in read_document(document)
    assert lost_quotes(document) == []


def test_a_number_that_was_changed_by_hand_is_named(document: Path) -> None:
    edit(document, "47%", "48%")
    [problem] = check_document(document, BOOK)
    assert "no longer followed by '47%', the fact share" in problem and "README.tsv" in problem
    with pytest.raises(ConfigError, match="has lost the places of share"):
        CliRunner().invoke(app, ["tidy", str(document)], catch_exceptions=False)
    assert CliRunner().invoke(app, ["tidy", "--drop", str(document)]).exit_code == 0
    assert check_document(document, BOOK) == [] and "share" not in map_file(document).read_text(encoding="utf-8")


def test_numbers_follow_their_facts(document: Path) -> None:
    new = BOOK | {"kv": Fact(46080, "B")}
    assert len(check_document(document, new)) == 5
    assert update_document(document, new) == 5
    assert "It keeps 46,080 bytes, 47% of all; in kB 46.1." in document.read_text(encoding="utf-8")
    assert check_document(document, new) == [] and "46,080" in map_file(document).read_text(encoding="utf-8")


def test_without_a_map_markers_stay_in_the_text(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("1<!-- fact: kv -->", encoding="utf-8")
    assert update_document(path, BOOK) == 1
    assert path.read_text(encoding="utf-8") == "23,040<!-- fact: kv -->"
    assert map_file(path) == tmp_path / "quoted/README.tsv" and not map_file(path).exists()
    assert untidy(path)[0].startswith("README.md:1: the marker of kv stands in the text; mend it with: python -m ")
    write_document(path, "no quotes", split=True)
    assert path.read_text(encoding="utf-8") == "no quotes" and not map_file(path).exists()


def test_rows_with_odd_characters() -> None:
    text = format_quotes([Quote('a "b" |', "7", "x.y", "/1e9")])
    assert text.splitlines()[1] == '"a ""b"" |"\t7\tx.y\t/1e9'


ENTRY = """### m9-q01 · Mid · How large?

**30 seconds**

Small.

**Deep answer**

Long.
```
**30 seconds** in code
```

**Follow-ups** f

**Common wrong answer** w

**Code** `a.py::b`

**Numbers** n

**Must have** m
"""


def test_answers_are_folded(tmp_path: Path) -> None:
    path = tmp_path / "INTERVIEW.md"
    text = f"# Title\n\nIntroduction.\n\n## One\n\n{ENTRY}\n## Two\n\n{ENTRY.replace('q01', 'q02')}"
    path.write_text(text, encoding="utf-8")
    entries = parse_interview(path)
    assert untidy(path) and tidy(path)
    folded = path.read_text(encoding="utf-8")
    assert fold_answers(folded, "en") == folded and untidy(path) == [] == check_interview(path)
    head, first, second = folded.partition("</details>\n\n<details>")[0], *folded.split("### ")[1:]
    assert head.endswith("<summary>Answer in 30 seconds</summary>\n\n**30 seconds**\n\nSmall.\n\n")
    assert first.count("<details>") == second.count("</details>") == 2 and first.endswith("</details>\n\n## Two\n\n")
    again = parse_interview(path)
    assert [(e.id, e.sections, e.order) for e in again] == [(e.id, e.sections, e.order) for e in entries]
    edit(path, "<details>", "")
    assert len(untidy(path)) == 1


def test_an_entry_without_its_labels_is_left_to_the_check_of_the_form() -> None:
    text = "### m9-q01 · Mid · How large?\n\n**Deep answer** only\n"
    assert fold_answers(text, "en") == text


def test_documents_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    assert documents([tmp_path]) == documents([tmp_path / "a.md"]) == [(tmp_path / "a.md").resolve()]
    with pytest.raises(ConfigError, match="allowed: Markdown files"):
        documents([tmp_path / "b.md"])


def test_the_commands(document: Path) -> None:
    """A document outside of the milestones has no facts: every quote of it is a problem."""
    result = CliRunner().invoke(app, ["check", str(document)])
    assert result.exit_code == 1 and "there is no fact kv" in result.output
    assert "0 numbers rewritten" in CliRunner().invoke(app, ["update", str(document)]).output
