"""Scores: what an answer must have, the points for each part, and the verdict.

    - 3 points: keys and values of ended requests are kept        (of an entry's section "Must have")

Ten points a question. The verdict is by share of the points: 90 % excellent, 70 % good, 60 % a pass.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

from m0_basics.tools.documents.interview import Entry

FULL = 10
RUBRIC = ((0.90, "excellent"), (0.70, "good"), (0.60, "pass"), (0.0, "not yet"))
_POINT = re.compile(r"^[-*]\s+(?P<points>\d+)\s*(?:points?|分)\s*[:：]\s*(?P<text>.+(?:\n[ \t]+\S.*)*)", re.MULTILINE)
_FOLLOW_UP = re.compile(r"^[-*]\s+\*(?P<question>[^*\n]+)\*\s*(?P<answer>.*(?:\n(?![-*]\s).*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Point:
    """One thing that an answer must have."""

    points: int
    text: str


@dataclass(frozen=True)
class FollowUp:
    """What an interviewer asks next, and the answer."""

    question: str
    answer: str


def must_have(entry: Entry) -> list[Point]:
    """The points of an entry, in order."""
    found = _POINT.finditer(entry.sections.get("must_have", ""))
    return [Point(int(m["points"]), " ".join(m["text"].split())) for m in found]


def follow_ups(entry: Entry) -> list[FollowUp]:
    """The follow-up questions of an entry, in order."""
    found = _FOLLOW_UP.finditer(entry.sections.get("follow_ups", ""))
    return [FollowUp(m["question"].strip(), m["answer"].strip()) for m in found]


def check_points(entry: Entry) -> list[str]:
    """Problems of an entry's scoring: its points must add up to ten, and there must be a follow-up."""
    total = sum(point.points for point in must_have(entry))
    problems = [] if total == FULL else [f"{entry.id}: its must-have points add up to {total}; allowed: {FULL}"]
    return problems + ([] if follow_ups(entry) else [f"{entry.id} has no follow-up question"])


def verdict(got: float, of: float) -> str:
    """The rubric's word for a share of the points."""
    share = got / of if of else 0.0
    return next(word for limit, word in RUBRIC if share >= limit)
