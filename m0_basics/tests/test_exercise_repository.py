"""FX.7, over the milestones themselves: every exercise of every README can be blanked, and is graded.

A blank body has to fail its tests at the blank, and the milestone's own body, put back into the workspace, has to
pass them. The second needs one run for all exercises of a milestone: the overlay then replaces all their modules.
"""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m0_basics.tools.exercise.book import ExerciseBook
from m0_basics.tools.exercise.source import find_function, replace_function

REPO = Path(__file__).parents[2]
MILESTONES = [folder.name for folder in sorted(REPO.glob("m[0-7]_*")) if (folder / "__init__.py").is_file()]
WITH_EXERCISES = [name for name in MILESTONES if (REPO / name / "README.md").is_file()
                  and "\n## Exercises\n" in (REPO / name / "README.md").read_text(encoding="utf-8")]
BOOKS = {name: ExerciseBook(name) for name in WITH_EXERCISES}        # fails where a row names what does not exist
ROWS = [(name, exercise.name) for name, book in BOOKS.items() for exercise in book.exercises]


def test_m0_has_exercises() -> None:
    """Guards the lists above, which would make every other test of this file vanish if they were empty."""
    assert "m0_basics" in WITH_EXERCISES and len(BOOKS["m0_basics"].exercises) >= 6


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_LAB_WORKSPACE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("package", "name"), ROWS, ids=["-".join(row) for row in ROWS])
def test_a_blank_body_fails(package: str, name: str, workspace: Path) -> None:
    book = ExerciseBook(package)
    exercise = book.find(name)
    file, _ = book.start(exercise)
    assert file.is_relative_to(workspace)
    result = book.check(exercise)
    assert not result.passed
    assert f"NotImplementedError: exercise: write {exercise.symbol}" in result.output
    assert not result.still_blank


@pytest.mark.parametrize("package", WITH_EXERCISES)
def test_the_solutions_put_back_pass(package: str, workspace: Path) -> None:
    book = ExerciseBook(package)
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


SHOW_FILES = """
import importlib, sys
importlib.import_module(sys.argv[1])
for name, module in sys.modules.items():
    if name.startswith(sys.argv[1] + "."):
        print(name, module.__spec__.loader.get_filename(name))
"""


@pytest.mark.parametrize("package", MILESTONES)
def test_no_module_is_imported_before_the_overlay(package: str, workspace: Path) -> None:
    """Holds because every milestone's `__init__` imports m0_basics, directly or not, before its own modules."""
    shutil.copytree(REPO / package, workspace / package, ignore=lambda folder, names: [
        name for name in names if name == "tests" or not (name.endswith(".py") or Path(folder, name).is_dir())])
    done = subprocess.run([sys.executable, "-c", SHOW_FILES, package], cwd=REPO, text=True, stdout=subprocess.PIPE,
                          check=True)
    loaded = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    loaded.pop("m0_basics.tools.exercise_overlay", None)      # the overlay itself comes first, and stays the real one
    assert f"{package}.llm" in loaded
    # An `__init__` holds no exercise, and the overlay replaces modules only.
    elsewhere = {name for name, file in loaded.items()
                 if not Path(file).is_relative_to(workspace) and Path(file).name != "__init__.py"}
    assert not elsewhere
