"""A mock interview: five rounds with follow-ups, a score for each, a verdict, and a transcript in Markdown.

    basics -> engine -> system design -> coding -> project

Questions are drawn by a seed, so that two people can be asked the same. A follow-up counts a tenth of its question's
points: knowing what comes next is worth something, and cannot replace the answer.
"""
from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from m0_basics.config import ConfigError, reject

from .grader import Grader
from .library import Question, select
from .points import FULL, RUBRIC, follow_ups, must_have, verdict
from .quiz import STOP, grade_by_hand
from .screen import Screen, plain
from .state import State, now

Chooser = Callable[[Question], bool]
_BASICS, _ENGINE = ("Junior", "Mid"), ("Mid", "Senior", "Expert")


def _starts(*prefixes: str) -> Chooser:
    return lambda q: q.id.split("-")[0] in prefixes


ROUNDS: dict[str, tuple[int, Chooser]] = {        # name -> questions asked, and which ones may be
    "basics": (3, lambda q: q.milestone != "interview" and q.level in _BASICS and q.topic not in ("project", "coding")),
    "engine": (3, lambda q: q.milestone != "interview" and q.level in _ENGINE and q.topic not in ("project", "coding")),
    "system design": (2, _starts("d", "s")),
    "coding": (1, _starts("k")),
    "project": (2, _starts("p")),
}
FOLLOW_UP_POINTS = FULL / 10


@dataclass(frozen=True)
class Asked:
    """One question of an interview: what was answered, and what it got."""

    round: str
    question: Question
    answer: str
    got: float
    of: float
    follow_up: str = ""
    follow_up_answer: str = ""
    proposal: str = ""              # of the grader
    seconds: float = 0.0


@dataclass
class Interview:
    """A whole interview, as it grows."""

    seed: int
    began: str = field(default_factory=now)
    asked: list[Asked] = field(default_factory=list)

    def score(self, of_round: str | None = None) -> tuple[float, float]:
        """Points got and possible, of one round or of all."""
        chosen = [a for a in self.asked if of_round in (None, a.round)]
        return sum(a.got for a in chosen), sum(a.of for a in chosen)


def of_milestones(questions: Sequence[Question], milestones: Sequence[str]) -> list[Question]:
    """Of the milestones' own questions only those of `milestones`, if any are named; of the rest all."""
    if not milestones:
        return list(questions)
    return select(questions, milestone=list({*milestones, "interview"}))


def draw(questions: Sequence[Question], seed: int, rounds: Sequence[str] = tuple(ROUNDS),
         each: int | None = None) -> list[tuple[str, Question]]:
    """The questions of an interview with their rounds, no question twice. `each` overrides the rounds' own numbers."""
    if unknown := [name for name in rounds if name not in ROUNDS]:
        raise reject("round", unknown[0], ", ".join(ROUNDS))
    chosen: list[tuple[str, Question]] = []
    for name in (name for name in ROUNDS if name in rounds):
        number, allowed = ROUNDS[name]
        pool = [q for q in questions if allowed(q) and q not in [c for _, c in chosen]]
        if not pool:
            raise ConfigError(f"there is no question for the round {name!r} among the {len(questions)} chosen ones")
        picked = random.Random(f"{seed} {name}").sample(pool, min(each or number, len(pool)))
        chosen += [(name, question) for question in picked]
    return chosen


def run_mock(plan: Sequence[tuple[str, Question]], seed: int, state: State, screen: Screen,
             grader: Grader | None = None, clock: Callable[[], float] = time.monotonic) -> Interview:
    """Hold the interview. It may be ended early; what was answered counts."""
    interview, current = Interview(seed), ""
    for name, question in plan:
        if name != current:
            current = name
            screen.say(f"\nRound: {name}", style="bold")
        try:
            asked = _ask(name, question, random.Random(f"{seed} {question.id}"), screen, grader, clock)
        except EOFError:
            asked = None
        if asked is None:
            break
        interview.asked.append(asked)
        state.add(question.id, min(asked.got, asked.of), asked.of)
    return interview


def _ask(name: str, question: Question, rng: random.Random, screen: Screen, grader: Grader | None,
         clock: Callable[[], float]) -> Asked | None:
    screen.say(f"\n{question.id}  {question.level}")
    screen.show(f"**{question.entry.question}**")
    begin = clock()
    answer = screen.ask_lines("your answer, an empty line ends it (q ends the interview):")
    if answer.lower() in STOP:
        return None
    seconds = clock() - begin
    further = follow_ups(question.entry)
    follow_up = rng.choice(further) if further else None
    again = ""
    if follow_up:
        screen.show(f"Follow-up: *{follow_up.question}*")
        again = screen.ask_lines("your answer (q ends the interview, without this question):")
        if again.lower() in STOP:
            return None
    points = must_have(question.entry)
    proposed = grader.grade(question.entry, answer) if grader and answer else None
    proposal = proposed.report(points) if proposed else (grader.problem if grader and answer else "")
    screen.show(question.entry.sections["short"])
    if proposal:
        screen.say(f"grader: {proposal}")
    score = grade_by_hand(points, screen)
    got, of = score.got, score.of
    if follow_up:
        screen.show(follow_up.answer)
        got += FOLLOW_UP_POINTS * screen.ask_yes("did you answer the follow-up?")
        of += FOLLOW_UP_POINTS
    return Asked(name, question, answer, got, of, follow_up.question if follow_up else "", again, proposal, seconds)


def transcript(interview: Interview) -> str:
    """The interview as a Markdown page: scores first, then every question with its answer and what was missing."""
    got, of = interview.score()
    lines = ["# Mock interview", "", f"Held {interview.began}, seed {interview.seed}: {got:g} of {of:g} points, "
             f"{got / of if of else 0:.0%}, **{verdict(got, of)}**.", "",
             "Rubric: " + ", ".join(f"{word} from {limit:.0%}" for limit, word in RUBRIC if limit) + ".", "",
             "| round | questions | points | verdict |", "|---|--:|--:|---|"]
    for name in dict.fromkeys(a.round for a in interview.asked):
        part, whole = interview.score(name)
        count = sum(a.round == name for a in interview.asked)
        lines.append(f"| {name} | {count} | {part:g} of {whole:g} | {verdict(part, whole)} |")
    for asked in interview.asked:
        lines += ["", f"## {asked.question.id} · {asked.question.level} · {asked.question.entry.question}", "",
                  f"{asked.round}, {asked.seconds / 60:.1f} min, {asked.got:g} of {asked.of:g} points.", "",
                  *_quoted(asked.answer or "(no answer)")]
        if asked.follow_up:
            lines += ["", f"*{asked.follow_up}*", "", *_quoted(asked.follow_up_answer or "(no answer)")]
        if asked.proposal:
            lines += ["", f"Grader: {asked.proposal}"]
        lines += ["", "Must have:", "", *(f"- {p.points}: {plain(p.text)}" for p in must_have(asked.question.entry))]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> list[str]:
    return [f"> {line}" for line in text.splitlines()]


def save_transcript(interview: Interview, path: Path) -> Path:
    """Write the transcript. Raises ConfigError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(transcript(interview), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be written: {error.strerror}; allowed: a file in a folder of "
                          "your own") from error
    return path


def weakest(interview: Interview) -> Mapping[str, float]:
    """Question -> share of its points, the lowest first: what to read next."""
    return dict(sorted(((a.question.id, a.got / a.of) for a in interview.asked if a.of), key=lambda item: item[1]))
