"""`python -m interview`: ask, score, repeat, check.

Everything is kept in one state file (see `state.py`); `--state` names another.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from m0_basics.config import ConfigError
from m0_basics.tools.exercise import exercise_app
from m0_basics.tools.exercise.book import ExerciseBook
from m0_basics.tools.exercise.book import State as ExerciseState
from m0_basics.tools.exercise.commands import print_rows

from . import coding_round
from .grader import Grader
from .library import LANGUAGES, ROOT, load_corrections, load_questions, select
from .screen import Screen
from .state import State, load_state

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="The interview: every question of the lab, asked, scored, repeated and checked.")
code = typer.Typer(no_args_is_help=True, help="The coding round: a statement, thirty minutes, hidden tests.")
app.add_typer(code, name="code")
app.add_typer(exercise_app(coding_round.PACKAGE), name="exercise",
              help="The same tasks in the exercise mode: solution, diff, reset.")

_SHOWN = 40                     # problems, if no package is named

_State = Annotated[Path | None, typer.Option("--state", help="State file (default: $LLM_LAB_STATE, or "
                                             "~/.local/state/llm-inference-lab/interview.json).", show_default=False)]
_Lang = Annotated[str, typer.Option("--lang", help="Language of the questions: en or zh-CN.")]
_Level = Annotated[list[str] | None, typer.Option(help="Junior, Mid, Senior or Expert; may be repeated.")]
_Milestone = Annotated[list[str] | None, typer.Option(help="m0 to m7, or interview; may be repeated.")]
_Topic = Annotated[list[str] | None, typer.Option(help="A topic of the index, such as paging; may be repeated.")]
_Ids = Annotated[list[str] | None, typer.Option("--id", help="A question's id, such as m3-q04; may be repeated.")]
_Seed = Annotated[int | None, typer.Option(help="Shuffle by this seed (default: the documents' order).")]
_Url = Annotated[str | None, typer.Option("--grader-url", help="OpenAI-compatible server that proposes points, such "
                                          "as http://127.0.0.1:8000/v1 (the lab's own serve).", show_default=False)]
_Model = Annotated[str | None, typer.Option("--grader-model", help="Its model (default: the first that it lists).")]


def main() -> None:
    """Run the command line. A ConfigError becomes one line on stderr and exit status 2."""
    try:
        app(prog_name="python -m interview")
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


def _load(path: Path | None) -> State:
    state = load_state(path)
    if state.repaired:
        typer.secho(f"the state file could not be read; it is kept as {state.repaired}, and a new one begins",
                    fg="yellow", err=True)
    return state


def _grader(url: str | None, model: str | None) -> Grader | None:
    if model and not url:
        raise ConfigError("grader-model needs --grader-url; allowed: both, or the URL alone")
    return Grader(url, model) if url else None


@app.command()
def quiz(level: _Level = None, milestone: _Milestone = None, topic: _Topic = None, ids: _Ids = None,
         count: Annotated[int, typer.Option(help="Questions to ask.", min=1)] = 5, seed: _Seed = None,
         lang: _Lang = "en", state: _State = None, grader_url: _Url = None, grader_model: _Model = None) -> None:
    """Ask questions; the answer stays hidden until you ask for it. Unasked and weak ones come first."""
    from .quiz import order, run_quiz
    kept = _load(state)
    chosen = select(load_questions(lang), level or (), milestone or (), topic or (), ids or ())
    if not chosen:
        raise ConfigError("no question matches all of these filters; allowed: fewer of them")
    asked = order(chosen, kept.last(), seed)[:count]
    scores = run_quiz(asked, kept, Screen(), _grader(grader_url, grader_model))
    typer.echo(f"kept in {kept.path}" if scores else "nothing was answered, so nothing is kept")


@app.command()
def mock(seed: Annotated[int, typer.Option(help="Draws the questions.")] = 0,
         rounds: Annotated[list[str] | None, typer.Option("--round", help="basics, engine, 'system design', coding or "
                                                          "project; may be repeated (default: all five).")] = None,
         each: Annotated[int | None, typer.Option(help="Questions per round (default: 3, 3, 2, 1, 2).", min=1)] = None,
         milestone: Annotated[list[str] | None, typer.Option(
             help="Draw 'basics' and 'engine' from these only: m0 to m7; may be repeated.")] = None,
         output: Annotated[Path, typer.Option(help="Where the transcript goes.")] = Path("mock-interview.md"),
         lang: _Lang = "en", state: _State = None, grader_url: _Url = None, grader_model: _Model = None) -> None:
    """Hold an interview of five rounds with follow-ups; score it by the rubric, save the transcript."""
    from .mock import ROUNDS, draw, of_milestones, run_mock, save_transcript, weakest
    from .points import verdict
    kept = _load(state)
    plan = draw(of_milestones(load_questions(lang), milestone or ()), seed, rounds or tuple(ROUNDS), each)
    interview = run_mock(plan, seed, kept, Screen(), _grader(grader_url, grader_model))
    if not interview.asked:
        typer.echo("nothing was answered, so nothing is saved")
        return
    got, of = interview.score()
    typer.echo(f"{got:g} of {of:g} points, {got / of:.0%}: {verdict(got, of)}")
    low = [i for i, share in weakest(interview).items() if share < 0.7]
    if low:
        typer.echo(f"read again: {', '.join(low)}")
    typer.echo(f"transcript: {save_transcript(interview, output)}")


@app.command()
def anki(output: Annotated[Path, typer.Option(help="The package to write.")] = Path("llm-inference-lab.apkg"),
         level: _Level = None, milestone: _Milestone = None, topic: _Topic = None, lang: _Lang = "en") -> None:
    """Write flash cards for Anki. Importing a newer package updates the cards and keeps your schedule."""
    from .anki import build_package, write_package
    chosen = select(load_questions(lang), level or (), milestone or (), topic or ())
    further = [] if level or milestone or topic else load_corrections(lang)
    write_package(build_package(chosen, lang, further), output)
    parts = f", {len(chosen)} questions and {len(further)} corrections" if further else ""
    typer.echo(f"{output}: {len(chosen) + len(further)} cards{parts}")


@app.command()
def check(package: Annotated[list[str] | None, typer.Argument(help="Packages to check (default: all).",
                                                              show_default=False)] = None,
          measure: Annotated[list[str] | None, typer.Option(
              help="Measure a package's stored facts again, or one group of them: m0_basics or "
                   "m0_basics:microbench.")] = None,
          tolerance: Annotated[float, typer.Option(help="How far a number measured again may move, as a share.",
                                                   min=0.0)] = 0.5) -> None:
    """Work out every quoted number again, look up all code and commands; exit 1 if anything is wrong."""
    from .check import check_package, check_whole, measure_again, packages
    known = packages()
    wanted = package or known
    for name in [*wanted, *(m.partition(":")[0] for m in measure or ())]:
        if name not in known:
            raise ConfigError(f"package={name!r} is not valid; allowed: {', '.join(known)}")
    problems: list[str] = []
    for name in wanted:
        found = check_package(name)
        problems += [f"{name}/{p}" for p in found.problems]
        typer.echo(f"{name}: {found.documents} pages, {found.numbers} numbers, {found.entries} questions, "
                   f"{len(found.problems)} problems")
    if package is None:
        problems += check_whole()
    for name, _, group in (m.partition(":") for m in measure or ()):
        problems += measure_again(name, tolerance, [group] if group else [])
    shown = problems if package else problems[:_SHOWN]
    for problem in shown:
        typer.secho(problem, fg="red")
    if len(shown) < len(problems):
        typer.echo(f"... and {len(problems) - len(shown)} more; name a package to see all of its problems")
    typer.echo("all true" if not problems else f"{len(problems)} problems")
    raise typer.Exit(bool(problems))


@app.command()
def progress(notebook: Annotated[list[str] | None, typer.Option(
                 help="Mark a notebook as done, or as open again: 03; may be repeated.")] = None,
             state: _State = None) -> None:
    """How far you are: exercises, questions and notebooks of every milestone."""
    from .progress import collect, mark_notebook, table
    kept = _load(state)
    for number in notebook or ():
        typer.echo(f"notebook {number.zfill(2)}: {'done' if mark_notebook(number, kept) else 'open'}")
    Console().print(table(collect(load_questions(), kept)))


@app.command()
def pitch(length: Annotated[str, typer.Option(help="30s, 1min, 3min, or all.")] = "all",
          results: Annotated[Path | None, typer.Option(help="Folder with your own <package>/bench.json (default: the "
                                                       "repository's results, marked as not yours).")] = None,
          lang: _Lang = "en",
          output: Annotated[Path | None, typer.Option(help="Write Markdown there (default: show it).")] = None) -> None:
    """Your project in 30 seconds, 1 and 3 minutes, filled from benchmark results and the exercises that you solved."""
    from .pitch import LENGTHS, load_results
    from .pitch import pitch as write
    if length not in (*LENGTHS, "all") or lang not in LANGUAGES:
        raise ConfigError(f"length={length!r}, lang={lang!r} is not valid; allowed: {', '.join(LENGTHS)}, all; "
                          f"{', '.join(LANGUAGES)}")
    found, solved = load_results(results), _solved()
    lengths = LENGTHS if length == "all" else (length,)
    text = "\n\n".join(f"## {name}\n\n{write(found, name, lang, solved)}" for name in lengths)
    if output:
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output={str(output)!r} cannot be written: {error.strerror}; allowed: a file in a "
                              "folder of your own") from error
        typer.echo(f"{output}: {', '.join(lengths)}")
    else:
        Screen().show(text)


@app.command()
def index(write: Annotated[bool, typer.Option("--write", help="Bring the pages up to date.")] = False) -> None:
    """Compare the made parts of this folder's pages with the entries; exit 1 if they differ."""
    from .index import outdated
    found = outdated(write)
    typer.echo(f"{'written' if write else 'out of date'}: {', '.join(found)}" if found else "up to date")
    raise typer.Exit(bool(found) and not write)


@app.command()
def facts() -> None:
    """Print, as JSON, every number that this folder's pages quote."""
    from .tools.facts import FACTS
    typer.echo(FACTS.to_json())


def _solved() -> list[str]:
    """Exercises of all milestones that the learner has solved."""
    names = []
    for package in sorted(p.name for p in ROOT.glob("m[0-7]_*")):
        readme = ROOT / package / "README.md"
        if readme.is_file() and "\n## Exercises" in readme.read_text(encoding="utf-8"):
            book = ExerciseBook(package)
            names += [f"{package}/{e.name}" for e in book.exercises if book.state(e) is ExerciseState.SOLVED]
    return names


_Task = Annotated[str, typer.Argument(help="Number or function of a task.", show_default=False)]


@code.command("list")
def list_tasks(state: _State = None) -> None:
    """Show the tasks, what is solved, and whose clock runs."""
    book, kept = ExerciseBook(coding_round.PACKAGE), _load(state)
    rows = []
    for e in book.exercises:
        used = coding_round.minutes_used(kept, e)
        clock = "" if used is None else f" ({used:.0f} of {coding_round.MINUTES} min)"
        rows.append((str(e.number), book.state(e).value, e.task + clock, ""))
    print_rows(rows)


@code.command()
def statement(name: _Task) -> None:
    """Show a task without starting its clock."""
    book = ExerciseBook(coding_round.PACKAGE)
    Screen().show(coding_round.statement(book, book.find(name)))


@code.command()
def start(name: _Task, force: Annotated[bool, typer.Option("--force", help="Begin again.")] = False,
          state: _State = None) -> None:
    """Blank the function in the workspace, and start thirty minutes."""
    book = ExerciseBook(coding_round.PACKAGE)
    exercise = book.find(name)
    text, place = coding_round.start(book, exercise, _load(state), force)
    Screen().show(text)
    typer.echo(f"write  {place}\ngrade  python -m interview code check {exercise.number}\n"
               f"hint   python -m interview exercise hint {exercise.number}\n"
               f"{coding_round.MINUTES} minutes from now")


@code.command("check")
def check_task(name: _Task, state: _State = None) -> None:
    """Run the hidden tests on what you wrote; exit 1 if they fail."""
    book = ExerciseBook(coding_round.PACKAGE)
    raise typer.Exit(not coding_round.check(book, book.find(name), _load(state)))
