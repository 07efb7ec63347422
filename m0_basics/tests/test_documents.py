"""This milestone's documents are true; and the suite that says so catches planted errors."""
from __future__ import annotations

from pathlib import Path

import pytest

import m0_basics
from m0_basics.tools.documents.checks import check_code_references
from m0_basics.tools.documents.interview import LABELS, SECTIONS
from m0_basics.tools.facts import FACTS
from m0_basics.tools.testing.documents import DocumentConformance, anchor, check_evidence, check_links


class TestDocuments(DocumentConformance):
    folder, facts = Path(m0_basics.__file__).parent, FACTS


ROOT = Path(m0_basics.__file__).parents[1]


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_documents_of_the_whole_name_what_exists(name: str) -> None:
    assert check_code_references(ROOT / name, ROOT) == []
    assert check_links(ROOT / name) == []


def entry(**sections: str) -> str:
    texts = dict.fromkeys(SECTIONS, "text") | {"code": "`m9/code.py::run`"} | sections
    body = "\n\n".join(f"**{label}** {texts[name]}" for name, label in zip(SECTIONS, LABELS["en"], strict=True))
    return f"### m9-q01 · Mid · How large?\n\n{body}\n"


QUOTED = "23,040<!-- fact: kv.bytes --> bytes"


@pytest.mark.parametrize(("text", "complaints"), [
    (entry(), []),
    (entry(deep=QUOTED, numbers="`python -m m9 facts`: `kv.bytes`"), []),
    (entry(deep=QUOTED, numbers=f"`python -m m9 facts`: {QUOTED}"), []),
    (entry(code="see the engine"), ["names no code"]),
    (entry(code="`m9/code.py`"), ["names no code"]),
    (entry(deep=QUOTED, numbers="`python -m m9 facts`"), ["lacks kv.bytes"]),
    (entry(numbers=QUOTED), ["names no command"]),
    (entry(short=QUOTED, numbers="None."), ["lacks kv.bytes", "names no command"]),
])
def test_evidence_that_is_missing(tmp_path: Path, text: str, complaints: list[str]) -> None:
    path = tmp_path / "INTERVIEW.md"
    path.write_text(f"# Title\n\n{text}", encoding="utf-8")
    problems = check_evidence(path)
    assert len(problems) == len(complaints)
    for problem, complaint in zip(problems, complaints, strict=True):
        assert problem.startswith("INTERVIEW.md:3: m9-q01")
        assert complaint in problem


def test_links(tmp_path: Path) -> None:
    """Headings, files and addresses; code is no link."""
    (tmp_path / "other.md").write_text("text")
    path = tmp_path / "doc.md"
    path.write_text("# A title\n\n[a](#a-title) [b](other.md#anything) [c](https://example.org/x#y)\n`x[0](#gone)`\n"
                    "```\n[d](#gone)\n```\n[e](#gone)\n[f](gone.md)\n", encoding="utf-8")
    assert check_links(path) == ["doc.md:8: #gone leads nowhere", "doc.md:9: gone.md leads nowhere"]


@pytest.mark.parametrize(("heading", "name"), [
    ("m0-q05 · Mid · Why `dataclass`, and not `dict`?", "m0-q05--mid--why-dataclass-and-not-dict"),
    ("m0-q06 · Mid · 为什么用 `__post_init__`？", "m0-q06--mid--为什么用-__post_init__"),
])
def test_anchors_are_github_s(heading: str, name: str) -> None:
    assert anchor(heading) == name
