"""Flash cards: every entry as an Anki note whose id never changes, so that importing again updates and doubles nothing.

The note's guid is a hash of language and entry id; deck and note type have constant ids. Front: the question. Back:
30 seconds, must-have points, and where to read on.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from m0_basics.config import ConfigError, require

from .library import Correction, Question
from .points import must_have
from .screen import plain

# Drawn once. Another number would be another deck to Anki, and every card would come twice.
DECK_IDS = {"en": 1_746_281_903, "zh-CN": 1_746_281_904}
MODEL_ID = 1_528_407_316
DECK_NAMES = {"en": "LLM inference lab", "zh-CN": "LLM inference lab (中文)"}
_CLAIM = {"en": "Often said. What is true?", "zh-CN": "常见说法，对不对？"}
_LABELS = {"en": "Must have", "zh-CN": "得分点"}
_CSS = (".card { font-family: sans-serif; font-size: 18px; text-align: left; line-height: 1.5; max-width: 44em; "
        "margin: auto; } .id { color: #888; font-size: 13px; } code { font-size: 0.9em; } "
        "table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: 2px 8px; }")


def build_package(questions: Iterable[Question], language: str, corrections: Iterable[Correction] = ()) -> Any:
    """A genanki.Package with a deck for each milestone, and one for what is often said and not true."""
    genanki = require_genanki()
    model = genanki.Model(
        MODEL_ID, "LLM inference lab question",
        fields=[{"name": name} for name in ("Id", "Question", "Answer", "Points")],
        templates=[{"name": "Card 1", "qfmt": '<div class="id">{{Id}}</div>{{Question}}',
                    "afmt": '{{FrontSide}}<hr id="answer">{{Answer}}{{Points}}'}], css=_CSS)
    decks: dict[str, Any] = {}

    def add(deck: str, note_id: str, texts: list[str], tags: list[str]) -> None:
        if deck not in decks:
            number = DECK_IDS[language] + 16 * (1 + _place(deck))
            decks[deck] = genanki.Deck(number, f"{DECK_NAMES[language]}::{deck}")
        decks[deck].add_note(genanki.Note(model=model, guid=note_guid(note_id, language), fields=texts, tags=tags))

    for question in questions:
        add(question.milestone, question.id, fields(question, language),
            [question.level, question.topic, question.milestone])
    for correction in corrections:
        add("corrections", correction.id, correction_fields(correction, language), ["corrections"])
    if not decks:
        raise ConfigError("no question is left to make cards of; allowed: filters that leave at least one")
    return genanki.Package(list(decks.values()))


def note_guid(question_id: str, language: str) -> str:
    """The note's identity for Anki: it depends on nothing but these two."""
    return str(require_genanki().guid_for("llm-inference-lab", language, question_id))


def fields(question: Question, language: str) -> list[str]:
    """Id, question, answer and points as HTML."""
    points = "\n".join(f"- **{p.points}** {p.text}" for p in must_have(question.entry))
    return [f"{question.id} · {question.level}", html(question.entry.question), html(question.entry.sections["short"]),
            html(f"**{_LABELS[language]}**\n\n{points}")]


def correction_fields(correction: Correction, language: str) -> list[str]:
    """The same four of a correction: the claim in front."""
    return [correction.id, html(f"{_CLAIM[language]}\n\n*{correction.claim}*"), html(correction.truth),
            html(correction.measure)]


def html(markdown: str) -> str:
    """Markdown as HTML, its formulas and angle brackets escaped."""
    return str(_renderer().render(plain(markdown))).strip()


def write_package(package: Any, path: Path, timestamp: float | None = None) -> None:
    """Write the .apkg file. With a `timestamp` the cards' ids and dates follow from it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        package.write_to_file(str(path), timestamp=timestamp)
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be written: {error.strerror}; "
                          "allowed: a file in a folder of your own") from error


def require_genanki() -> Any:
    """The package, imported when it is first used."""
    return require("genanki", "Anki packages", "anki")


@lru_cache(maxsize=1)
def _renderer() -> Any:
    from markdown_it import MarkdownIt
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def _place(deck: str) -> int:
    match = re.fullmatch(r"m(\d)", deck)
    return int(match[1]) if match else {"interview": 8, "corrections": 9}[deck]
