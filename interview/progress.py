"""How far the learner is: exercises, questions and notebooks of every milestone, in one table.

Exercises are read from the workspace, answers and notebooks from the state file. A notebook counts when the learner
says so: `progress --notebook 03`; nothing else can know whether it was understood.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from m0_basics.config import reject
from m0_basics.tools.exercise.book import ExerciseBook
from m0_basics.tools.exercise.book import State as ExerciseState

from .library import ROOT, Question
from .state import State

WHOLE = "interview"


@dataclass(frozen=True)
class Row:
    """One milestone's line."""

    package: str                # or "interview"
    solved: int
    exercises: int
    asked: int
    questions: int
    share: float | None         # of the points of the newest answers; None while nothing was asked
    notebook: bool | None       # None: there is none


def collect(questions: Sequence[Question], state: State, root: Path = ROOT) -> list[Row]:
    """A row for each milestone that is there, and one for what spans them."""
    last, read = state.last(), set(state.notebooks)
    found = notebooks(root)
    packages = sorted(p.name for p in root.glob("m[0-7]_*") if (p / "__init__.py").is_file())
    rows = []
    for package in [*packages, WHOLE]:
        short = package.partition("_")[0]
        own = [q for q in questions if q.milestone == short]
        answers = [last[q.id] for q in own if q.id in last]
        of = sum(a.of for a in answers)
        number = "08" if package == WHOLE else f"0{short[1:]}"
        solved, exercises = _exercises(package, root)
        rows.append(Row(package, solved, exercises, len(answers), len(own),
                        sum(a.got for a in answers) / of if of else None,
                        number in read if number in found else None))
    return rows


def notebooks(root: Path = ROOT) -> dict[str, Path]:
    """Number of a notebook ("03") -> its file."""
    return {f.name.partition("_")[0]: f for f in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}


def mark_notebook(number: str, state: State, root: Path = ROOT) -> bool:
    """Mark a notebook as done, or as not done if it was; return what it is now."""
    known = notebooks(root)
    number = number.zfill(2)
    if number not in known:
        raise reject("notebook", number, ", ".join(known))
    done = number not in state.notebooks
    state.notebooks = sorted({*state.notebooks, number} if done else {*state.notebooks} - {number})
    state.save()
    return done


def _exercises(package: str, root: Path) -> tuple[int, int]:
    """Solved and all exercises of a package; a milestone that has no table yet has none."""
    readme = root / package / "README.md"
    if not readme.is_file() or "\n## Exercises" not in readme.read_text(encoding="utf-8"):
        return 0, 0
    book = ExerciseBook(package)
    return sum(book.state(e) is ExerciseState.SOLVED for e in book.exercises), len(book.exercises)


def table(rows: Sequence[Row]) -> Table:
    """The rows for the terminal, with a line of sums."""
    shown = Table(box=None, pad_edge=False)
    for name, justify in (("milestone", "left"), ("exercises", "right"), ("questions", "right"), ("points", "right"),
                          ("notebook", "left")):
        shown.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    for row in rows:
        shown.add_row(row.package, f"{row.solved} of {row.exercises}", f"{row.asked} of {row.questions}",
                      "-" if row.share is None else f"{row.share:.0%}",
                      {None: "-", True: "done", False: "open"}[row.notebook])
    books = [row for row in rows if row.notebook is not None]
    shown.add_row("all", f"{sum(r.solved for r in rows)} of {sum(r.exercises for r in rows)}",
                  f"{sum(r.asked for r in rows)} of {sum(r.questions for r in rows)}", "",
                  f"{sum(bool(r.notebook) for r in books)} of {len(books)}", style="bold")
    return shown
