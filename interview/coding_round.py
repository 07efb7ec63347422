"""The coding round: a statement, thirty minutes on the clock, and hidden tests. It is the exercise mode with a clock.

The tasks are this folder's exercises (`README.md`, section Exercises): `start` blanks a function of `coding/` in the
workspace, `check` runs its tests on what was written and says how long it took.
"""
from __future__ import annotations

import ast
from datetime import UTC, datetime

from m0_basics.tools.exercise.book import Exercise, ExerciseBook
from m0_basics.tools.exercise.commands import show_check, text_width
from m0_basics.tools.exercise.show import filled, filled_signature

from .state import State, now

PACKAGE = "interview"
MINUTES = 30


def statement(book: ExerciseBook, exercise: Exercise) -> str:
    """The task as Markdown: what the module says, then the function's contract."""
    source = book.source_file(exercise).read_text(encoding="utf-8")
    tree = ast.parse(source)
    name = exercise.symbol.split(".")
    scope: ast.AST = tree
    for part in name:
        scope = next(n for n in ast.iter_child_nodes(scope) if getattr(n, "name", None) == part)
    assert isinstance(scope, ast.FunctionDef)
    returns = f" -> {ast.unparse(scope.returns)}" if scope.returns else ""
    head = f"def {scope.name}({ast.unparse(scope.args)}){returns}"
    parts = (ast.get_docstring(scope) or "").split("\n\n")
    contract = "\n\n".join(filled(part, text_width() - 2, "") for part in parts)
    head = filled_signature(f"{head}:", text_width() - 2)
    return (f"## {exercise.number}. {exercise.task}\n\n{ast.get_docstring(tree)}\n\n```python\n{head}\n```\n\n"
            f"```\n{contract}\n```\n")


def start(book: ExerciseBook, exercise: Exercise, state: State, force: bool = False) -> tuple[str, str]:
    """Blank the function and start the clock. Returns the statement, and where to write."""
    path, line = book.start(exercise, force)
    state.started[exercise.name] = now()
    state.save()
    return statement(book, exercise), f"{path}:{line}"


def check(book: ExerciseBook, exercise: Exercise, state: State) -> bool:
    """Run the hidden tests; print what they say, and the time used."""
    result = book.check(exercise)
    used = minutes_used(state, exercise)
    clock = "" if used is None else f", {used:.0f} of {MINUTES} minutes" + (" (over time)" if used > MINUTES else "")
    show_check(book, exercise, result, clock, "the lab's own")
    if result.passed:
        state.started.pop(exercise.name, None)
        state.save()
    return result.passed


def minutes_used(state: State, exercise: Exercise) -> float | None:
    """Minutes since the task was started; None if it was not, or its clock is unreadable."""
    try:
        begun = datetime.fromisoformat(state.started[exercise.name])
        return (datetime.now(UTC) - begun).total_seconds() / 60
    except (KeyError, ValueError, TypeError):
        return None
