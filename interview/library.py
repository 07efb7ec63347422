"""The library: every entry of every milestone's INTERVIEW.md and of this folder's pages, in one list.

A question's milestone follows from its id (`m3-q04` -> `m3`), or is "interview" for what spans them all. Its topic
is looked up in `topics.json`: one for each prefix of ids, and the exceptions by id, so that a new entry has a topic
from its first day.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from m0_basics.config import ConfigError, reject
from m0_basics.tools.documents.factbook import read_json_file
from m0_basics.tools.documents.interview import LEVELS, Entry, parse_interview

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PAGES = ("system_design", "sizing", "project", "coding")        # of this folder, in the order of the index
LANGUAGES = ("en", "zh-CN")


@dataclass(frozen=True)
class Question:
    """An entry, where it stands, and what it is about."""

    entry: Entry
    document: Path
    milestone: str              # "m3", or "interview"
    topic: str                  # a key of `topics.json`

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def level(self) -> str:
        return self.entry.level


def documents(language: str = "en", root: Path = ROOT) -> list[Path]:
    """The files with entries: those of the milestones that have one, in order, then this folder's."""
    if language not in LANGUAGES:
        raise reject("language", language, ", ".join(LANGUAGES))
    end = ".md" if language == "en" else f".{language}.md"
    milestones = sorted(root.glob(f"m[0-7]_*/INTERVIEW{end}"))
    return milestones + [f for page in PAGES if (f := root / "interview" / f"{page}{end}").is_file()]


def load_questions(language: str = "en", root: Path = ROOT) -> list[Question]:
    """Every question, in the order of the documents."""
    topics = Topics.load()
    return [Question(entry, document, milestone_of(entry.id), topics.of(entry.id))
            for document in documents(language, root) for entry in parse_interview(document)]


def milestone_of(question_id: str) -> str:
    """"m3" for `m3-q04`, "interview" for `d-q01`."""
    match = re.match(r"m\d", question_id)
    return match[0] if match else "interview"


def select(questions: Iterable[Question], level: Sequence[str] = (), milestone: Sequence[str] = (),
           topic: Sequence[str] = (), ids: Sequence[str] = ()) -> list[Question]:
    """Questions that match each filter that is given. Raises ConfigError for a value that no question has."""
    questions = list(questions)
    levels = {name.lower(): name for name in LEVELS}
    if unknown := [name for name in level if name.lower() not in levels]:
        raise reject("level", unknown[0], ", ".join(LEVELS))
    wanted = {"milestone": milestone, "topic": topic, "id": ids}
    for field, values in wanted.items():
        known = list(dict.fromkeys(getattr(q, field) for q in questions))
        if unknown := [value for value in values if value not in known]:
            shown = known if field != "id" else [*known[:3], "...", known[-1]]
            raise reject(field, unknown[0], ", ".join(shown))
    chosen_levels = {levels[name.lower()] for name in level}
    return [q for q in questions if (not level or q.level in chosen_levels)
            and all(not values or getattr(q, field) in values for field, values in wanted.items())]


@dataclass(frozen=True)
class Correction:
    """What is often said, what is true, and how to measure it."""

    id: str
    claim: str
    truth: str
    measure: str


_CORRECTION = re.compile(r"^### (?P<id>c-\d\d) · (?P<claim>[^\n]+)\n(?P<body>.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
_PARTS = {"en": ("What is true", "Measure it"), "zh-CN": ("实际情况", "怎么测")}


def load_corrections(language: str = "en", folder: Path = FOLDER) -> list[Correction]:
    """The entries of corrections.md. Raises ConfigError for one that lacks a part."""
    file = folder / ("corrections.md" if language == "en" else f"corrections.{language}.md")
    found = []
    for match in _CORRECTION.finditer(file.read_text(encoding="utf-8")):
        pieces = re.split(r"^\*\*(.+?)\*\*$", match["body"], flags=re.MULTILINE)
        parts = {name: text.replace("</details>", "").strip() for name, text in zip(pieces[1::2], pieces[2::2],
                                                                                   strict=True)}
        if tuple(parts) != _PARTS[language] or not all(parts.values()):
            raise ConfigError(f"{file.name}: {match['id']} has the parts {', '.join(parts)}; allowed: "
                              f"{', '.join(_PARTS[language])}, none of them empty")
        found.append(Correction(match["id"], match["claim"].strip(), *parts.values()))
    return found


@dataclass(frozen=True)
class Topics:
    """Names of the topics by language, the topic of each prefix of ids, and the ids that differ from their prefix."""

    names: dict[str, dict[str, str]]
    prefixes: dict[str, str]
    exceptions: dict[str, str]

    @staticmethod
    @lru_cache(maxsize=1)
    def load() -> Topics:
        data: dict[str, Any] = read_json_file(FOLDER / "topics.json")
        exceptions = {i: name for name, topic in data.items() for i in topic["ids"]}
        prefixes = {prefix: name for name, topic in data.items() for prefix in topic["prefixes"]}
        return Topics({name: {k: topic[k] for k in LANGUAGES} for name, topic in data.items()}, prefixes, exceptions)

    def of(self, question_id: str) -> str:
        prefix = question_id.partition("-")[0]
        topic = self.exceptions.get(question_id) or self.prefixes.get(prefix)
        if topic is None:
            raise reject("id", question_id, f"ids that begin with {', '.join(self.prefixes)}")
        return topic
