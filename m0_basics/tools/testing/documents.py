"""One suite for every milestone's documents: numbers, code references, form, translation, links.

    class TestDocuments(DocumentConformance):
        folder, facts = Path(m1_offline.__file__).parent, FACTS

README.md is checked where there is one; the two interview documents have to be there.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from m0_basics.tools.documents import changes
from m0_basics.tools.documents.checks import check_code_references, check_document, find_markers
from m0_basics.tools.documents.factbook import Facts
from m0_basics.tools.documents.interview import check_interview, check_translation, parse_interview
from m0_basics.tools.documents.quotes import mask_code
from m0_basics.tools.documents.tidy import untidy

_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6}\s+(?P<text>.+?)\s*$", re.MULTILINE)
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_REFERENCE = re.compile(r"`[\w./-]+\.py::[\w.]+(?:\(\))?`")


class DocumentConformance:
    """Base of a milestone's test class."""

    folder: ClassVar[Path]
    facts: ClassVar[Facts]

    @property
    def interviews(self) -> tuple[Path, Path]:
        return self.folder / "INTERVIEW.md", self.folder / "INTERVIEW.zh-CN.md"

    @property
    def documents(self) -> list[Path]:
        documents = sorted(self.folder.glob("*.md"))
        assert set(self.interviews) <= set(documents)
        return documents

    def test_numbers_are_those_of_the_facts(self) -> None:
        facts = self.facts.all()
        assert [problem for document in self.documents for problem in check_document(document, facts)] == []

    def test_code_that_is_named_exists(self) -> None:
        assert [p for document in self.documents for p in check_code_references(document, self.folder.parent)] == []

    def test_links_lead_somewhere(self) -> None:
        assert [problem for document in self.documents for problem in check_links(document)] == []

    def test_answers_are_hidden_and_markers_beside_the_text(self) -> None:
        """`python -m m0_basics.tools.documents tidy FOLDER` does both."""
        assert [problem for document in self.documents for problem in untidy(document)] == []

    def test_the_page_of_changes_is_that_of_the_code(self) -> None:
        """`python -m PACKAGE changes --write` writes it again. The first milestone has none."""
        page = self.folder / changes.PAGE
        if changes.previous_milestone(self.folder.name) is None:
            assert not page.exists() and not changes.read_changes(self.folder.name)
        else:
            assert changes.read_changes(self.folder.name)
            assert page.read_text(encoding="utf-8") == changes.page(self.folder.name)

    def test_interviews_have_their_form(self) -> None:
        problems = [check(path) for path in self.interviews for check in (check_interview, check_evidence)]
        assert [problem for found in problems for problem in found] == []

    def test_english_and_chinese_say_the_same(self) -> None:
        assert check_translation(*self.interviews) == []


def check_evidence(path: Path) -> list[str]:
    """Entries that name no code, or quote a fact that their section on numbers does not list with a command."""
    problems = []
    for entry in parse_interview(path):
        where = f"{path.name}:{entry.line}: {entry.id}"
        if not _REFERENCE.search(entry.sections.get("code", "")):
            problems.append(f"{where} names no code")
        numbers = entry.sections.get("numbers", "")
        quoted = {m.name for text in entry.sections.values() for m in find_markers(text)}
        if unlisted := sorted(name for name in quoted if name not in numbers):
            problems.append(f"{where}: its section on numbers lacks {', '.join(unlisted)}")
        if quoted and "python -m " not in numbers:
            problems.append(f"{where}: its section on numbers names no command")
    return problems


def check_links(path: Path) -> list[str]:
    """Links of a document to headings and files that do not exist. Addresses on the web are left alone."""
    text = mask_code(path.read_text(encoding="utf-8"))
    anchors = {anchor(heading["text"]) for heading in _HEADING.finditer(text)}
    problems = []
    for link in _LINK.finditer(_INLINE_CODE.sub(lambda code: " " * len(code[0]), text)):
        target, _, fragment = link["target"].partition("#")
        if "://" in target:
            continue
        if not ((path.parent / target).exists() if target else fragment in anchors):
            problems.append(f"{path.name}:{text.count(chr(10), 0, link.start()) + 1}: {link['target']} leads nowhere")
    return problems


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading: lower case, punctuation dropped, a hyphen for each space."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
