"""The exercises of one milestone: read from its README, kept in a workspace, graded by its own tests.

The table in the README's section `## Exercises` is the only list there is. The workspace holds a copy of each
module with an exercise in it (`workspace/m0_basics/model.py`), the body to write blanked out, and one
`progress.json` per milestone: exercise -> hash of the function that passed its tests, or "" while none has;
module -> hash of the file that was copied.
"""
from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from m0_basics.config import ConfigError

from ..exercise_overlay import WORKSPACE_VARIABLE
from .grading import CheckResult, Grader, Python, first_failure, run_python
from .puzzles import Puzzles, base_docstring, class_docstring, docstring, expected_lines, read_puzzles, skeleton
from .source import blank, find_function, function_text, parse, replace_function

__all__ = ["CheckResult", "Exercise", "ExerciseBook", "Python", "State", "run_python"]


class State(Enum):
    """How far the learner is. A solved exercise that is edited again is a started one until it is checked."""

    NOT_STARTED = "not started"
    STARTED = "started"
    SOLVED = "solved"


@dataclass(frozen=True)
class Exercise:
    """One row of the table. Paths are relative to the package's folder."""

    number: int
    file: str
    symbol: str                         # Class.method or function
    task: str
    tests: tuple[str, ...]              # files or pytest node ids

    @property
    def name(self) -> str:
        return f"{self.file}::{self.symbol}"


class ExerciseBook:
    """The exercises of `package`, and what the learner has made of them."""

    def __init__(self, package: str, python: Python | None = None) -> None:
        """Read and check the table. Raises ConfigError for a row whose function or test does not exist.

        `python` runs the tests; None: a new process each time.
        """
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"package={package!r} is not valid; allowed: an installed milestone, such as m0_basics")
        self.package = package
        self.python = python or run_python
        self.folder = Path(next(iter(spec.submodule_search_locations)))
        workspace = os.environ.get(WORKSPACE_VARIABLE)
        self.workspace = Path(workspace).resolve() if workspace else self.folder.parent / "workspace"
        self.exercises = read_table(self.folder / "README.md")
        self.puzzles: Puzzles = read_puzzles(self.folder)
        for exercise in self.exercises:
            self._check_row(exercise)

    def find(self, name: str) -> Exercise:
        """An exercise by number, symbol, or file::symbol."""
        found = [e for e in self.exercises if name in (str(e.number), e.symbol, e.name)]
        if len(found) != 1:
            allowed = ", ".join(f"{e.number} ({e.name})" for e in self.exercises)
            raise ConfigError(f"exercise={name!r} is not valid; allowed: {allowed}")
        return found[0]

    def source_file(self, exercise: Exercise) -> Path:
        return self.folder / exercise.file

    def learner_file(self, exercise: Exercise) -> Path:
        return self.workspace / self.package / exercise.file

    def command(self, action: str, exercise: Exercise) -> str:
        """The command line that does `action` to the exercise."""
        return f"python -m {self.package} exercise {action} {exercise.number}"

    def state(self, exercise: Exercise) -> State:
        if not self.learner_file(exercise).is_file():
            return State.NOT_STARTED
        progress = self._read_progress()
        try:
            text = self.learner_text(exercise)
        except ConfigError:                         # in the middle of an edit
            return State.STARTED if exercise.name in progress else State.NOT_STARTED
        if exercise.name not in progress and text == self.solution(exercise):
            return State.NOT_STARTED                # the file is there because of another exercise
        return State.SOLVED if progress.get(exercise.name) == _digest(text) else State.STARTED

    def start(self, exercise: Exercise, force: bool = False) -> tuple[Path, int]:
        """Blank the function in the workspace; return the file and the function's line. Other work there is kept.

        `force` starts again what is started already; a copy of what was written stays in the workspace's `kept/`.
        """
        target = self.learner_file(exercise)
        if self.state(exercise) is not State.NOT_STARTED and not force:
            raise ConfigError(f"{exercise.name} is {self.state(exercise).value} already, in {target}; "
                              "allowed: --force, which puts a copy of what you wrote aside and starts again")
        if target.is_file() and self.state(exercise) is not State.NOT_STARTED:
            self._keep_copy(exercise)
        source, path = self.source_file(exercise).read_bytes(), self.source_file(exercise)
        blanked = blank(source, find_function(source, exercise.symbol, path), exercise.symbol)
        if target.is_file():
            text = function_text(blanked, find_function(blanked, exercise.symbol, path))
            self._replace(exercise, text)
            copied = {}
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(blanked)
            copied = {exercise.file: _digest(source)}
        self._write_progress(self._read_progress() | copied | {exercise.name: ""})
        return target, find_function(target.read_bytes(), exercise.symbol, target).lineno

    def reset(self, exercise: Exercise) -> tuple[Path | None, Path | None]:
        """Back to not started. Returns the workspace file, or None where no exercise is left in it: it is removed.

        Returns also where a copy of what was written is kept, or None where nothing was.
        """
        self.require_started(exercise)
        copy = self._keep_copy(exercise)
        target = self.learner_file(exercise)
        others = [e for e in self.exercises if e.file == exercise.file and e.name != exercise.name]
        keep = any(self.state(e) is not State.NOT_STARTED for e in others)
        if keep:
            self._replace(exercise, self.solution(exercise))
            gone = {exercise.name}
        else:
            target.unlink()
            gone = {exercise.name, exercise.file}
        self._write_progress({k: v for k, v in self._read_progress().items() if k not in gone})
        return target if keep else None, copy

    def solution(self, exercise: Exercise) -> bytes:
        """The function as the milestone has it."""
        path = self.source_file(exercise)
        source = path.read_bytes()
        return function_text(source, find_function(source, exercise.symbol, path))

    def learner_text(self, exercise: Exercise) -> bytes:
        """The function as the learner has it. Raises ConfigError where it is gone, or the file does not parse."""
        path = self.learner_file(exercise)
        source = path.read_bytes()
        return function_text(source, find_function(source, exercise.symbol, path))

    def require_started(self, exercise: Exercise) -> None:
        if self.state(exercise) is State.NOT_STARTED:
            raise ConfigError(f"{exercise.name} is not started; start it with: {self.command('start', exercise)}")

    def check(self, exercise: Exercise, first_failure_only: bool = False) -> CheckResult:
        """Run the exercise's tests on the learner's files, in a process of their own.

        The run ends where the blank body of another exercise is met. Where some fail, a few of them run once more, and
        the learner's function is set beside the milestone's; not with `first_failure_only`, which also ends the run at
        the first failure.
        """
        self.require_started(exercise)
        if importlib.util.find_spec("pytest") is None:
            raise ConfigError("pytest is not installed; get it with: pip install 'llm-inference-lab[dev]'")
        try:
            text = self.learner_text(exercise)
        except ConfigError as error:
            return CheckResult(False, str(error))
        result = self.run_tests(exercise.tests, first_failure_only, mine=exercise.symbol)
        if result.failed and not result.still_blank and not first_failure_only:
            # One case of each test function that failed, three at most: one of them may show best what is wrong.
            cases = list({test.partition("[")[0]: test for test in reversed(result.failed)}.values())[::-1]
            shrink = not any(case.endswith("::runTest") for case in cases[:3])      # state machines take minutes
            again, difference = self._grader().run(cases[:3], compare=True, shrink=shrink, **self._orders(exercise))
            result = replace(result, output=first_failure(again.output or result.output), difference=difference)
        progress = self._read_progress()
        self._write_progress(progress | {exercise.name: _digest(text) if result.passed else ""})
        outdated = progress.get(exercise.file) != _digest(self.source_file(exercise).read_bytes())
        others = tuple(symbol for symbol in result.still_blank if symbol != exercise.symbol)
        return replace(result, still_blank=others, outdated=outdated)

    def run_tests(self, tests: Sequence[str], first_failure_only: bool = False, **orders: Any) -> CheckResult:
        """Run test files or node ids of the package with the workspace's modules in place of its own."""
        return self._grader().run([f"{self.package}/{test}" for test in tests], first_failure_only, **orders)[0]

    def example(self, exercise: Exercise) -> str:
        """A call of the milestone's function with the arguments that a test gives it, and what it returns."""
        nowhere = self.workspace / "no such folder"
        tests = [f"{self.package}/{test}" for test in exercise.tests]
        wanted = self.puzzles.examples.get(exercise.name, "")
        return replace(self._grader(), workspace=nowhere).run(tests, True, wanted=wanted, **self._orders(exercise))[1]

    def statement(self, exercise: Exercise) -> str:
        """What is to be written: the docstrings of class and function, and what they leave open. May be empty.

        Where the function says next to nothing, what a base class says of it counts too.
        """
        path = self.source_file(exercise)
        source = path.read_bytes()
        own = docstring(source, exercise.symbol, path)
        inherited = "" if "\n" in own else base_docstring(path, exercise.symbol)
        parts = [class_docstring(source, exercise.symbol), own,
                 "" if inherited.partition(": ")[2] in own else inherited,
                 self.puzzles.statements.get(exercise.name, "")]
        return "\n\n".join(part.strip() for part in parts if part)

    def expected_lines(self, exercise: Exercise) -> int:
        """How many lines of code the milestone's own body has."""
        path = self.source_file(exercise)
        return expected_lines(path.read_bytes(), exercise.symbol, path)

    def hints(self, exercise: Exercise) -> list[str]:
        """First ideas, and at last the function with its expressions cut out."""
        path = self.source_file(exercise)
        ideas = self.puzzles.hints.get(exercise.name, [])
        return [*ideas, skeleton(path.read_bytes(), exercise.symbol, path)]

    def next_hint(self, exercise: Exercise) -> int:
        """How many hints the learner sees now: one more than last time."""
        key, number = f"hints of {exercise.name}", len(self.hints(exercise))
        progress = self._read_progress()
        shown = min(number, int(progress.get(key, "0")) + 1)
        self._write_progress(progress | {key: str(shown)})
        return shown

    def _grader(self) -> Grader:
        return Grader(self.folder.parent, self.workspace, self.python)

    def _orders(self, exercise: Exercise) -> dict[str, Any]:
        module = f"{self.package}.{exercise.file.removesuffix('.py').replace('/', '.')}"
        return {"module": module, "symbol": exercise.symbol, "specification": str(self.source_file(exercise))}

    def _keep_copy(self, exercise: Exercise) -> Path | None:
        """Put what the learner wrote aside before it is thrown away; None where it cannot be read, or is blank."""
        try:
            text = self.learner_text(exercise)
        except ConfigError:
            text = self.learner_file(exercise).read_bytes()     # it does not parse: the whole file
        if text == self._blank_text(exercise) or text == self.solution(exercise):
            return None
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        copy = self.workspace / self.package / "kept" / f"{exercise.symbol}-{stamp}.py"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(text)
        return copy

    def _blank_text(self, exercise: Exercise) -> bytes:
        source, path = self.source_file(exercise).read_bytes(), self.source_file(exercise)
        blanked = blank(source, find_function(source, exercise.symbol, path), exercise.symbol)
        return function_text(blanked, find_function(blanked, exercise.symbol, path))

    def _replace(self, exercise: Exercise, text: bytes) -> None:
        path = self.learner_file(exercise)
        source = path.read_bytes()
        changed = replace_function(source, find_function(source, exercise.symbol, path), text)
        parse(changed, path)                        # a file re-indented by hand would not fit: leave it as it is
        path.write_bytes(changed)

    def _progress_file(self) -> Path:
        return self.workspace / self.package / "progress.json"

    def _read_progress(self) -> dict[str, str]:
        path = self._progress_file()
        progress: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return progress

    def _write_progress(self, progress: dict[str, str]) -> None:
        self._progress_file().parent.mkdir(parents=True, exist_ok=True)
        self._progress_file().write_text(json.dumps(progress, indent=1, sort_keys=True), encoding="utf-8")

    def _check_row(self, exercise: Exercise) -> None:
        where = f"exercise {exercise.number} of {self.folder / 'README.md'}"
        source = self.source_file(exercise)
        if source.suffix != ".py" or source.name == "__init__.py" or not source.is_file():
            raise ConfigError(f"{where}: file={exercise.file!r} is not valid; "
                              f"allowed: a module of {self.package} (not __init__.py)")
        try:
            find_function(source.read_bytes(), exercise.symbol, source)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        for test in exercise.tests:
            file, *names = test.split("[")[0].split("::")
            path = self.folder / file
            if not path.is_file():
                raise ConfigError(f"{where}: test={test!r} is not valid; allowed: a test file of {self.package}")
            scope: ast.AST = parse(path.read_bytes(), path)
            for name in names:
                inside = [n for n in ast.iter_child_nodes(scope) if getattr(n, "name", None) == name]
                if not inside and isinstance(scope, ast.ClassDef) and scope.bases:
                    break                           # inherited, perhaps: pytest will say
                if not inside:
                    raise ConfigError(f"{where}: test={test!r} is not valid; {path} has no {'::'.join(names)}")
                scope = inside[0]


def read_table(readme: Path) -> list[Exercise]:
    """The rows `| number | file::symbol | task | tests |` of the section `## Exercises`."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    section = re.search(r"^## Exercises[ \t]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        raise ConfigError(f"{readme} has no section '## Exercises', so there is none to do")
    # `\|` is a bar inside a cell. The first two lines of a table are its header and its ruler.
    table = [line for line in section[1].splitlines() if line.startswith("|")][2:]
    exercises = [_read_row(readme, [c.strip() for c in re.split(r"(?<!\\)\|", line.strip())[1:-1]]) for line in table]
    numbers = [e.number for e in exercises]
    if not exercises or len(set(numbers)) < len(numbers):
        raise ConfigError(f"the exercises of {readme} have the numbers {numbers}; allowed: one row at least, "
                          "each with a number of its own")
    return exercises


def _read_row(readme: Path, cells: list[str]) -> Exercise:
    if len(cells) == 4:
        number, name, task, tests = cells
        file, _, symbol = name.strip("`").partition("::")
        names = tuple(test.strip(" `") for test in tests.split(",") if test.strip(" `"))
        if number.isdecimal() and file and symbol and names:
            return Exercise(int(number), file, symbol, task.replace(r"\|", "|"), names)
    raise ConfigError(f"{readme} has the exercise row {' | '.join(cells)!r}; "
                      "allowed: | number | `file.py::symbol` | task | `tests/test_file.py`, ... |")


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
