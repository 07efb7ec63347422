"""One suite for every milestone's exercises: each can be blanked, its tests notice, and the solution passes them.

    class TestExercises(ExerciseConformance):
        package = "m1_offline"

Their runs fork from one Python that has imported the libraries: see `forked_python.py`.
"""
from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from ..cli.app import build_app
from ..exercise.book import ExerciseBook, Python
from ..exercise.bugs import BugHunt
from ..exercise.source import find_function, replace_function

_SHOW_FILES = """
import importlib, sys
importlib.import_module({package!r})
for name, module in sys.modules.items():
    if name.startswith({package!r} + "."):
        print(name, module.__spec__.loader.get_filename(name))
"""


class ExerciseConformance:
    """Base of a milestone's test class."""

    package: ClassVar[str]
    pytestmark = pytest.mark.slow

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test for each row of the README's table. Fails here where a row names what does not exist."""
        if "exercise" in metafunc.fixturenames:
            metafunc.parametrize("exercise", [exercise.name for exercise in ExerciseBook(self.package).exercises])

    @pytest.fixture
    def workspace(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("LLM_LAB_WORKSPACE", str(tmp_path))
        return tmp_path

    def test_a_blank_body_fails(self, exercise: str, forked_python: Python, workspace: Path) -> None:
        """At the blank, and at no other."""
        book = ExerciseBook(self.package, forked_python)
        row = book.find(exercise)
        file, _ = book.start(row)
        assert file.is_relative_to(workspace)
        result = book.check(row, first_failure_only=True)
        assert not result.passed
        assert f"NotImplementedError: exercise: write {row.symbol}" in result.output
        assert not result.still_blank

    def test_the_solutions_put_back_pass(self, forked_python: Python, workspace: Path) -> None:
        """All at once: the overlay replaces every module that has an exercise."""
        book = ExerciseBook(self.package, forked_python)
        for exercise in book.exercises:
            book.start(exercise)
        for exercise in book.exercises:
            file = book.learner_file(exercise)
            node = find_function(file.read_bytes(), exercise.symbol, file)
            file.write_bytes(replace_function(file.read_bytes(), node, book.solution(exercise)))
        for exercise in book.exercises:
            assert book.learner_file(exercise).read_bytes() == book.source_file(exercise).read_bytes()
        result = book.run_tests(sorted({test for exercise in book.exercises for test in exercise.tests}))
        assert result.passed, result.output

    def test_planted_bugs_are_noticed(self, forked_python: Python, workspace: Path) -> None:
        """Each by the tests that it names; the symptom does not say where it is."""
        hunt = BugHunt(ExerciseBook(self.package, forked_python))
        assert hunt.bugs
        for number in range(1, len(hunt.bugs) + 1):
            hunt.plant(number)
            result = hunt.check(number, first_failure_only=True)
            assert result.failed and not result.passed, f"bug {number}: {result.output}"
            assert hunt.state(number) == "planted"

    def test_what_shows_a_bug_can_be_called(self) -> None:
        """The command and each of its options exist."""
        for bug in ExerciseBook(self.package).puzzles.bugs:
            if bug.command:
                python, flag, package, name, *arguments = shlex.split(bug.command.rpartition(" | ")[2])
                command = get_command(build_app(package))
                assert (python, flag) == ("python", "-m") and isinstance(command, TyperGroup)
                command.commands[name].make_context(name, arguments)

    def test_each_exercise_has_its_hints(self) -> None:
        """An idea in words, and the skeleton."""
        book = ExerciseBook(self.package)
        assert [e.name for e in book.exercises if len(book.hints(e)) < 2] == []
        named = set(book.puzzles.hints) | set(book.puzzles.statements) | set(book.puzzles.examples)
        assert named <= {e.name for e in book.exercises}
        assert all(book.expected_lines(e) > 0 and "____" in book.hints(e)[-1] for e in book.exercises)

    def test_no_module_is_imported_before_the_overlay(self, forked_python: Python, workspace: Path) -> None:
        """Holds because every milestone's `__init__` imports m0_basics, directly or not, before its own modules."""
        folder = ExerciseBook(self.package).folder
        shutil.copytree(folder, workspace / self.package, ignore=lambda folder, names: [
            name for name in names if name == "tests" or not (name.endswith(".py") or Path(folder, name).is_dir())])
        done = forked_python(["-c", _SHOW_FILES.format(package=self.package)], folder.parent, os.environ)
        assert done.returncode == 0, done.stdout
        loaded = dict(line.split(" ", 1) for line in done.stdout.splitlines())
        loaded.pop("m0_basics.tools.exercise_overlay", None)    # the overlay itself comes first, and stays the real one
        assert f"{self.package}.llm" in loaded
        # An `__init__` holds no exercise, and the overlay replaces modules only.
        elsewhere = {name for name, file in loaded.items()
                     if not Path(file).is_relative_to(workspace) and Path(file).name != "__init__.py"}
        assert not elsewhere
