"""Entries and screens for the tests."""
from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from interview.library import Question
from interview.screen import Screen
from m0_basics.tools.documents.interview import SECTIONS, Entry

MUST_HAVE = "- 3 points: the first\n- 5 points: the second,\n  over two lines\n- 2 points: the third"
FOLLOW_UPS = "- *What next?* This one.\n- *And then?* That one,\n  with more of it."


def question(question_id: str = "m3-q01", level: str = "Mid", topic: str = "paging", **sections: str) -> Question:
    texts = dict.fromkeys(SECTIONS, "text") | {
        "short": f"SHORT {question_id}", "deep": f"DEEP {question_id}", "follow_ups": FOLLOW_UPS,
        "must_have": MUST_HAVE} | sections
    entry = Entry(question_id, level, f"How is {question_id}?", texts, SECTIONS, 1)
    milestone = question_id.partition("-")[0] if question_id[0] == "m" else "interview"
    return Question(entry, Path("INTERVIEW.md"), milestone, topic)


class Script:
    """A screen whose user answers from a list, and that keeps everything in order, what was asked included."""

    def __init__(self, answers: Iterable[str]) -> None:
        self.out = io.StringIO()
        self.answers = iter(answers)
        self.screen = Screen(Console(file=self.out, width=100, force_terminal=False), self._answer)

    def _answer(self, prompt: str) -> str:
        self.out.write(f"<{prompt.strip()}>\n")
        try:
            return next(self.answers)
        except StopIteration:
            raise EOFError from None

    @property
    def text(self) -> str:
        return self.out.getvalue()
