"""The exercise mode: blank out a central function, write it, and let the milestone's own tests grade it.

    python -m m0_basics exercise list | start 1 | hint 1 | check 1 | solution 1 | reset 1
    python -m m0_basics exercise bug 1          a bug is planted: find it

Nothing in the package changes: the learner edits a copy in `workspace/`, which an import overlay puts in place
of the module. With `LLM_LAB_WORKSPACE=workspace` every command of this and of later milestones runs on it too.
"""
from __future__ import annotations

import difflib
import re
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m0_basics.config import ConfigError

from .book import Exercise, ExerciseBook, State
from .bugs import BugHunt
from .grading import CheckResult, first_failure
from .puzzles import signature
from .show import filled, filled_signature

_TAIL_LINES = 60                # of pytest's output: one failure with its source lines, and what it printed
_Name = Annotated[str, typer.Argument(help="Number, symbol or file::symbol of the exercise.", show_default=False)]


def exercise_app(package: str) -> typer.Typer:
    """The commands over the exercises of `package`. They raise ConfigError; a failed check exits with status 1."""
    app = typer.Typer(help="Write the milestone's central functions yourself; its tests grade them.",
                      no_args_is_help=True)

    @app.command("list")
    def list_exercises() -> None:
        """Show the exercises and how far you are."""
        book = ExerciseBook(package)
        rows = [(str(e.number), book.state(e).value, e.task, e.name) for e in book.exercises]
        hunt = BugHunt(book)
        rows += [(f"bug {i}", hunt.state(i), bug.title, "") for i, bug in enumerate(hunt.bugs, 1)]
        print_rows(rows)
        solved = sum(book.state(e) is State.SOLVED for e in book.exercises)
        typer.echo(f"{solved} of {len(book.exercises)} solved\n"
                   f"python -m {package} exercise start N begins one, show N only says what it asks")

    @app.command()
    def start(name: _Name, force: Annotated[bool, typer.Option("--force", help="Start again; a copy is kept.")] = False,
              example: Annotated[bool, typer.Option(help="Show a real call; takes some seconds.")] = True) -> None:
        """Blank the function in the workspace, and say what to write."""
        book = ExerciseBook(package)
        exercise = book.find(name)
        path, line = book.start(exercise, force)
        _show_statement(book, exercise)
        typer.echo(f"\nedit   {_short(path)}:{line}")
        typer.echo(f"hint   {book.command('hint', exercise)}")
        typer.echo(f"grade  {book.command('check', exercise)}")
        if example:
            _show_example(book, exercise)

    @app.command("show")
    def show_exercise(name: _Name, example: Annotated[bool, typer.Option(help="Show a real call.")] = True) -> None:
        """Say what to write, with a real call, without starting."""
        book = ExerciseBook(package)
        exercise = book.find(name)
        _show_statement(book, exercise)
        if example:
            _show_example(book, exercise)

    @app.command()
    def hint(name: _Name, all_hints: Annotated[bool, typer.Option("--all", help="Show them all.")] = False) -> None:
        """One hint, and on the next call one more; the last is the function with its expressions cut out."""
        book = ExerciseBook(package)
        exercise = book.find(name)
        hints = book.hints(exercise)
        num_shown = len(hints) if all_hints else book.next_hint(exercise)
        for number, text in enumerate(hints[:num_shown], 1):
            typer.echo(f"hint {number} of {len(hints)}")
            typer.echo(textwrap.indent(text if "\n" in text else textwrap.fill(text, text_width()), "  "))
        if num_shown == len(hints):
            typer.echo(f"that was the last; the function itself: {book.command('solution', exercise)}")

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
        """Go back to not started; a copy of what you wrote is kept."""
        book = ExerciseBook(package)
        exercise = book.find(name)
        left, copy = book.reset(exercise)
        typer.echo(f"{exercise.name} is not started any more; " + (
            f"{_short(left)} has the milestone's function again" if left else
            f"{_short(book.learner_file(exercise))} is removed"))
        if copy is not None:
            typer.echo(f"what you wrote is kept in {_short(copy)}")

    @app.command("bug")
    def hunt_bug(number: Annotated[int, typer.Argument(help="Which bug (see the list).", min=1)] = 1,
                 check: Annotated[bool, typer.Option("--check", help="Is it mended? Run the tests.")] = False,
                 reveal: Annotated[bool, typer.Option("--reveal", help="Say where it is, and why it bites.")] = False,
                 force: Annotated[bool, typer.Option("--force", help="Plant it anew.")] = False) -> None:
        """Plant a known bug in a copy of a module, for you to find."""
        hunt = BugHunt(ExerciseBook(package))
        if reveal:
            why, line = hunt.reveal(number)
            typer.echo(f"{package}/{hunt.find(number).file}:{line}: {why}")
        elif check:
            if not _check_bug(hunt, number):
                raise typer.Exit(1)
        else:
            file = hunt.plant(number, force)
            bug = hunt.find(number)
            typer.echo(f"{bug.title}\n\n{textwrap.fill(bug.symptom, text_width())}\n")
            typer.echo(f"the bug is in {_short(file)}: find it by reading, not by comparing with the package\n"
                       f"{_try_it(hunt, number)}"
                       f"grade   python -m {package} exercise bug {number} --check\n"
                       f"give up python -m {package} exercise bug {number} --reveal")

    return app


def print_rows(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Number, state, task and name of some exercises, in the terminal's width: the name stands below the task."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for number, state, task, name in rows:
        cell = Text(task) if not name else Text.assemble(task, "\n", (name, "bright_black"))
        table.add_row(number, state, cell)
    Console(highlight=False).print(table)


def _try_it(hunt: BugHunt, number: int) -> str:
    command = hunt.find(number).command
    workspace = f"LLM_LAB_WORKSPACE={shlex.quote(_short(hunt.workspace(number)))} "
    return re.sub(r"(?=python -m )", lambda _: workspace, f"try it  {command}\n", count=1) if command else ""


def text_width() -> int:
    """Columns of running text: the terminal's, 100 at most."""
    return min(100, shutil.get_terminal_size().columns - 2)


def _show_statement(book: ExerciseBook, exercise: Exercise) -> None:
    source = book.source_file(exercise)
    typer.echo(f"{exercise.name}: {exercise.task}\n")
    typer.echo(filled_signature(signature(source.read_bytes(), exercise.symbol, source), text_width()) + "\n")
    if statement := book.statement(exercise):
        typer.echo("\n\n".join(filled(part, text_width()) for part in statement.split("\n\n")))
    lines = book.expected_lines(exercise)
    typer.echo(f"\nThe milestone's own body has {lines} line{'' if lines == 1 else 's'} of code.")


def _show_example(book: ExerciseBook, exercise: Exercise) -> None:
    typer.echo("\na call from the tests:", nl=False)
    found = book.example(exercise)
    typer.echo("\n" + filled_call(found) if found else " none could be shown; read the tests")


def filled_call(call: str) -> str:
    """A call's values, each in lines of the terminal's width."""
    return "\n".join(textwrap.fill(line, text_width(), initial_indent="  ", subsequent_indent="      ",
                                   break_on_hyphens=False) for line in call.splitlines())


def _keep_line(book: ExerciseBook, exercise: Exercise) -> str:
    """How a solved exercise is kept, where the workspace is a repository of the learner's own; else ""."""
    if not (book.workspace / ".git").exists():
        return ""
    folder, message = (shlex.quote(text) for text in (
        _short(book.workspace), f"{book.package}: {exercise.symbol}"))
    return f"keep it: git -C {folder} add -A && git -C {folder} commit -m {message}"


def _check(book: ExerciseBook, exercise: Exercise) -> bool:
    book.require_started(exercise)
    typer.echo(f"{exercise.name}: running {', '.join(exercise.tests)} on your code")
    result = book.check(exercise)
    show_check(book, exercise, result)
    if result.outdated and not result.passed:
        typer.echo(f"{_short(book.source_file(exercise))} has changed since your copy was made: if the failure lies "
                   "outside your function, keep your bodies, reset this module's exercises and start them again")
    return result.passed


def show_check(book: ExerciseBook, exercise: Exercise, result: CheckResult, note: str = "",
               whose: str = "the milestone's") -> None:
    """What the tests say about an exercise, whether it is passed (with a note), and what to do next: which function is
    to come first, or how the solved one is kept.

    Where the tests met another function's blank body, those that failed without it are shown alone.
    """
    if not result.still_blank or result.passed:
        _show_result(result, whose)
    elif result.own_failures:
        _show_failure(first_failure(result.output, without=result.still_blank))
        _show_names(result.own_failures)
    typer.echo(f"{exercise.name}: {'passed' if result.passed else 'not passed'}{note}")
    if result.still_blank and not result.passed:
        typer.echo(f"the tests met a function that is still blank: {', '.join(result.still_blank)}; "
                   "write it first, or reset it")
        if before := result.num_passed + len(result.own_failures):
            typer.echo(f"of the tests before that, {result.num_passed} of {before} passed")
    if result.passed and (line := _keep_line(book, exercise)):
        typer.echo(line)


def _show_result(result: CheckResult, whose: str = "the milestone's") -> None:
    """The first failure, a call on which the two functions differ, and how many tests pass."""
    if result.passed:
        typer.echo("".join(result.output.splitlines()[-1:]))
    else:
        _show_failure(result.output)
    if result.difference:
        typer.echo(f"\non this call your function and {whose} differ:")
        typer.echo(filled_call(result.difference))
    if result.num_passed or result.failed:
        typer.echo(f"\n{result.score}")
    _show_names(result.failed)


def _show_failure(output: str) -> None:
    typer.echo("\n".join(output.splitlines()[-_TAIL_LINES:]))


def _show_names(failed: Sequence[str]) -> None:
    for test in failed[:8]:
        typer.echo(f"  fails: {test}")
    if len(failed) > 8:
        typer.echo(f"  and {len(failed) - 8} more")


def _check_bug(hunt: BugHunt, number: int) -> bool:
    bug = hunt.find(number)
    typer.echo(f"bug {number}: running {', '.join(bug.tests)} on your copy")
    result = hunt.check(number)
    _show_result(result)
    if result.passed:
        why, _ = hunt.reveal(number)
        typer.echo(f"found. What it was: {why}")
    else:
        typer.echo("it still bites")
    return result.passed


def _short(path: Path) -> str:
    """Relative to where the user stands, if it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
