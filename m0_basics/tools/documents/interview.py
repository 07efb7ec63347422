"""Interview documents: one fixed form, so that a quiz, flash cards and the checks can read them.

    ### m0-q01 · Mid · How large is the KV cache of one token?
    **30 seconds** ...
    **Deep answer** ...            (and five more sections, always all seven, in one order)

`tidy.py` folds the answers away, so that a reader can try first: what folds is no part of a section.
The Chinese file repeats the English one's entries: same ids, same levels, same facts behind the numbers.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checks import check_code_references, check_document, fact_names
from .factbook import Fact
from .quotes import mask_code, read_document

LEVELS = ("Junior", "Mid", "Senior", "Expert")
SECTIONS = ("short", "deep", "follow_ups", "wrong", "code", "numbers", "must_have")
LABELS: dict[str, tuple[str, ...]] = {      # in the order of SECTIONS
    "en": ("30 seconds", "Deep answer", "Follow-ups", "Common wrong answer", "Code", "Numbers", "Must have"),
    "zh-CN": ("30 秒版", "深入回答", "追问", "常见误区", "代码", "数据", "得分点"),
}
SPOKEN = {"en": 95, "zh-CN": 160}       # what "30 seconds" may hold, as `spoken_length` counts
HEADING = re.compile(r"^#{1,3}\s.*$", re.MULTILINE)
FOLD = re.compile(r"^(?:</?details[^>\n]*>|<summary>.*</summary>)[ ]*$", re.MULTILINE)
ENTRY = re.compile(r"###\s+(?P<prefix>[a-z][a-z0-9]*)-q(?P<number>\d{2,})\s+·\s+(?P<level>\S+)\s+·\s+(?P<question>.+)")


@dataclass(frozen=True)
class Entry:
    """One question and its answer. `sections` maps the names in SECTIONS to Markdown, in either language."""

    id: str
    level: str
    question: str
    sections: Mapping[str, str]
    order: tuple[str, ...]          # section names as they come in the document, repeats included
    line: int

    @property
    def facts(self) -> list[str]:
        """Names of the facts behind the entry's numbers, in order."""
        return [name for text in self.sections.values() for name in fact_names(text)]


def language(path: Path) -> str:
    """"zh-CN" for `*.zh-CN.md`, else "en"."""
    return "zh-CN" if path.name.endswith(".zh-CN.md") else "en"


def parse_interview(path: Path) -> list[Entry]:
    """The entries of a document, in order, a marker behind each number that is a fact.

    Headings that are not entries are skipped; `check_interview` names them.
    """
    text = read_document(path)
    names = dict(zip(LABELS[language(path)], SECTIONS, strict=True))
    masked = mask_code(text)
    headings = list(HEADING.finditer(masked))
    entries = []
    for heading, stop in zip(headings, [*(h.start() for h in headings[1:]), len(text)], strict=True):
        if match := ENTRY.fullmatch(heading[0].strip()):
            found = _sections(text[heading.end():stop], masked[heading.end():stop], names)
            line = text.count("\n", 0, heading.start()) + 1
            entries.append(Entry(f"{match['prefix']}-q{match['number']}", match["level"], match["question"].strip(),
                                 dict(found), tuple(name for name, _ in found), line))
    return entries


def _sections(text: str, masked: str, names: Mapping[str, str]) -> list[tuple[str, str]]:
    label = re.compile(rf"^\*\*({'|'.join(map(re.escape, names))})\*\*[ ]*[:：.]?", re.MULTILINE)
    for fold in FOLD.finditer(masked):
        text = text[:fold.start()] + " " * len(fold[0]) + text[fold.end():]
    labels = list(label.finditer(masked))
    stops = [*(m.start() for m in labels[1:]), len(text)]
    return [(names[m[1]], text[m.end():stop].strip()) for m, stop in zip(labels, stops, strict=True)]


def spoken_length(text: str, language: str) -> int:
    """How long an answer is to speak: English words; in Chinese its characters, a Latin word or a number as two."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    if language == "en":
        return len(text.split())
    return len(re.findall(r"[\u4e00-\u9fff]", text)) + 2 * len(re.findall(r"[A-Za-z0-9][\w.,/+-]*", text, re.ASCII))


def check_interview(path: Path) -> list[str]:
    """Problems of a document's form, as "file:line: problem"."""
    text, labels = path.read_text(encoding="utf-8"), dict(zip(SECTIONS, LABELS[language(path)], strict=True))
    entries = parse_interview(path)
    problems = [] if entries else [f"{path.name}: there is no entry such as ### m0-q01 · Mid · Question?"]
    for heading in HEADING.finditer(mask_code(text)):
        if heading[0].startswith("### ") and not ENTRY.fullmatch(heading[0].strip()):
            line = text.count("\n", 0, heading.start()) + 1
            problems.append(f"{path.name}:{line}: the heading is not of the form ### m0-q01 · Mid · Question?")
    previous: Entry | None = None
    for entry in entries:
        where = f"{path.name}:{entry.line}: {entry.id}"
        if entry.level not in LEVELS:
            problems.append(f"{where}: level {entry.level!r} is not valid; allowed: {', '.join(LEVELS)}")
        if previous is not None and _order(entry) <= _order(previous):
            problems.append(f"{where} comes after {previous.id}: ids are unique and ascending")
        missing = [labels[name] for name in SECTIONS if not entry.sections.get(name)]
        if missing:
            problems.append(f"{where} lacks {', '.join(missing)}")
        elif entry.order != SECTIONS:
            problems.append(f"{where}: its sections are not, once each and in this order, {', '.join(labels.values())}")
        if (length := spoken_length(entry.sections.get("short", ""), language(path))) > SPOKEN[language(path)]:
            problems.append(f"{where}: {length} {'words' if language(path) == 'en' else 'syllables'} cannot be said in "
                            f"30 seconds; at most {SPOKEN[language(path)]}")
        previous = entry
    return problems


def _order(entry: Entry) -> tuple[str, int]:
    prefix, number = entry.id.split("-q")
    return prefix, int(number)


def check_translation(english: Path, chinese: Path) -> list[str]:
    """Problems between a document and its translation: ids, levels, and the facts behind each entry's numbers."""
    first = {entry.id: entry for entry in parse_interview(english)}
    second = {entry.id: entry for entry in parse_interview(chinese)}
    problems = [f"{chinese.name} lacks {i}" for i in first if i not in second]
    problems += [f"{english.name} lacks {i}" for i in second if i not in first]
    for i in first.keys() & second.keys():
        one, other = first[i], second[i]
        if one.level != other.level:
            problems.append(f"{i}: level {one.level} in {english.name}, {other.level} in {chinese.name}")
        if different := set(one.facts) ^ set(other.facts):
            problems.append(f"{i}: only one of the two files quotes {', '.join(sorted(different))}")
    return sorted(problems)


def check_folder(folder: Path, facts: Mapping[str, Fact]) -> list[str]:
    """All checks over a milestone's documents: README.md, INTERVIEW.md and INTERVIEW.zh-CN.md must be there."""
    names = ("README.md", "INTERVIEW.md", "INTERVIEW.zh-CN.md")
    if missing := [name for name in names if not (folder / name).is_file()]:
        return [f"{folder.name} lacks {', '.join(missing)}"]
    documents = sorted(folder.glob("*.md"))
    problems = [p for d in documents for p in check_document(d, facts) + check_code_references(d, folder.parent)]
    problems += [p for name in names[1:] for p in check_interview(folder / name)]
    return problems + check_translation(folder / "INTERVIEW.md", folder / "INTERVIEW.zh-CN.md")
