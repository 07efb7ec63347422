"""The exercise mode: blank out a central function, write it, and let the milestone's own tests grade it.

    python -m m0_basics exercise list | start 1 | check 1 | solution 1 | reset 1

Nothing in the package changes: the learner edits a copy in `workspace/`, which an import overlay puts in place
of the module. With `LLM_LAB_WORKSPACE=workspace` every command of this and of later milestones runs on it too.
"""
from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from m0_basics.config import ConfigError

from .book import Exercise, ExerciseBook, State

_TAIL_LINES = 40                # of pytest's output: one failure with its source lines
_Name = Annotated[str, typer.Argument(help="Number, symbol or file::symbol of the exercise.", show_default=False)]


def exercise_app(package: str) -> typer.Typer:
    """The commands over the exercises of `package`. They raise ConfigError; a failed check exits with status 1."""
    app = typer.Typer(help="Write the milestone's central functions yourself; its tests grade them.",
                      no_args_is_help=True)

    @app.command("list")
    def list_exercises() -> None:
        """Show the exercises and how far you are."""
        book = ExerciseBook(package)
        width = max(len(e.name) for e in book.exercises)
        for e in book.exercises:
            typer.echo(f"{e.number:>2}  {book.state(e).value:<11}  {e.name:<{width}}  {e.task}")

    @app.command()
    def start(name: _Name, force: Annotated[bool, typer.Option("--force", help="Throw away what is there.")] = False,
              ) -> None:
        """Blank the function in the workspace."""
        book = ExerciseBook(package)
        exercise = book.find(name)
        path, line = book.start(exercise, force)
        typer.echo(f"{exercise.name}: {exercise.task}")
        typer.echo(f"edit   {_short(path)}:{line}")
        typer.echo(f"grade  {book.command('check', exercise)}")

    @app.command()
    def check(name: Annotated[str | None, typer.Argument(help="Number, symbol or file::symbol.")] = None,
              everything: Annotated[bool, typer.Option("--all", help="Check all that are started.")] = False) -> None:
        """Run the tests of an exercise on your code."""
        book = ExerciseBook(package)
        if (name is None) is not everything:
            raise ConfigError("exercise check wants a name, or --all, and not both")
        chosen = [e for e in book.exercises if book.state(e) is not State.NOT_STARTED] if name is None else [
            book.find(name)]
        if not chosen:
            raise ConfigError(f"no exercise is started; start one with: {book.command('start', book.exercises[0])}")
        results = [_check(book, e) for e in chosen]         # all of them, also after a failure
        if not all(results):
            raise typer.Exit(1)

    @app.command()
    def solution(name: _Name) -> None:
        """Print the milestone's own function."""
        book = ExerciseBook(package)
        typer.echo(book.solution(book.find(name)).decode(), nl=False)

    @app.command()
    def diff(name: _Name) -> None:
        """Compare your function with the milestone's."""
        book = ExerciseBook(package)
        exercise = book.find(name)
        book.require_started(exercise)
        yours, ours = (text.decode().splitlines() for text in (book.learner_text(exercise), book.solution(exercise)))
        typer.echo("\n".join(difflib.unified_diff(yours, ours, _short(book.learner_file(exercise)),
                                                  _short(book.source_file(exercise)), lineterm="")))

    @app.command()
    def reset(name: _Name) -> None:
        """Throw away what you wrote for an exercise (start --force blanks it again)."""
        book = ExerciseBook(package)
        exercise = book.find(name)
        left = book.reset(exercise)
        typer.echo(f"{exercise.name} is not started any more; " + (
            f"{_short(left)} has the milestone's function again" if left else
            f"{_short(book.learner_file(exercise))} is removed"))

    return app


def _check(book: ExerciseBook, exercise: Exercise) -> bool:
    typer.echo(f"{exercise.name}: running {', '.join(exercise.tests)} on your code")
    result = book.check(exercise)
    lines = result.output.splitlines()
    typer.echo("\n".join(lines[-1:] if result.passed else lines[-_TAIL_LINES:]))
    typer.echo(f"{exercise.name}: " + ("passed" if result.passed else "not passed"))
    if result.still_blank and not result.passed:
        typer.echo(f"the tests met a function that is still blank: {', '.join(result.still_blank)}; "
                   "write it first, or reset it")
    if result.outdated and not result.passed:
        typer.echo(f"{_short(book.source_file(exercise))} has changed since your copy was made: if the failure lies "
                   "outside your function, keep your bodies, reset this module's exercises and start them again")
    return result.passed


def _short(path: Path) -> str:
    """Relative to where the user stands, if it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
