"""The quiz: one question at a time, the answer hidden until it is asked for, the score by the must-have points.

What was never asked comes first, then what went worst, then what lies longest back.
"""
from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .grader import Grader
from .library import Question
from .points import Point, must_have
from .screen import Screen
from .state import Answer, State

STOP = ("q", "quit")


@dataclass(frozen=True)
class Score:
    """The points of one answer."""

    got: float
    of: float


def order(questions: Iterable[Question], last: Mapping[str, Answer], seed: int | None = None) -> list[Question]:
    """Unasked first, then by the share of points that the last answer got, then the oldest first.

    `seed` shuffles what is equal in that respect; None keeps the documents' order.
    """
    shuffled = list(questions)
    if seed is not None:
        random.Random(seed).shuffle(shuffled)

    def key(question: Question) -> tuple[bool, float, str]:
        answer = last.get(question.id)
        return (False, 0.0, "") if answer is None else (True, answer.got / answer.of if answer.of else 0.0, answer.at)
    return sorted(shuffled, key=key)


def run_quiz(questions: Sequence[Question], state: State, screen: Screen, grader: Grader | None = None) -> list[Score]:
    """Ask the questions in turn until they end or the user does. Scores are kept as they come."""
    scores: list[Score] = []
    for number, question in enumerate(questions, start=1):
        screen.say(f"\n{number} of {len(questions)}  {question.id}  {question.level}  {question.topic}", style="bold")
        try:
            score = ask_question(question, screen, grader)
        except EOFError:
            score = None
        if score is None:
            break
        state.add(question.id, score.got, score.of)
        scores.append(score)
        screen.say(f"{score.got:g} of {score.of:g} points")
    if scores:
        got, of = sum(s.got for s in scores), sum(s.of for s in scores)
        screen.say(f"\n{len(scores)} answered, {got:g} of {of:g} points ({got / of:.0%})", style="bold")
    return scores


def ask_question(question: Question, screen: Screen, grader: Grader | None = None) -> Score | None:
    """One question: the user's answer, then the page's, then the points. None: the user wants to stop."""
    screen.show(f"**{question.entry.question}**")
    answer = screen.ask_lines("your answer, an empty line shows ours (q ends):")
    if answer.lower() in STOP:
        return None
    proposed = grader.grade(question.entry, answer) if grader and answer else None
    screen.say("\n30 seconds", style="dim")
    screen.show(question.entry.sections["short"])
    if screen.ask_yes("the deep answer too?"):
        screen.show(question.entry.sections["deep"])
    points = must_have(question.entry)
    if proposed is not None:
        screen.say(f"the grader proposes: {proposed.report(points)}")
    elif grader and answer:
        screen.say(f"the grader is left out: {grader.problem}", style="yellow")
    return grade_by_hand(points, screen)


def grade_by_hand(points: Sequence[Point], screen: Screen) -> Score:
    """The user says, point by point, whether the answer had it."""
    got = 0.0
    for point in points:
        screen.show(f"{point.points} points: {point.text}")
        got += point.points * screen.ask_yes("did your answer say it?")
    return Score(got, sum(point.points for point in points))
