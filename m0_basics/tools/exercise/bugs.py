"""Break it, and find out why: a known bug is planted in a copy of a module, and the learner hunts it.

Each bug has a workspace of its own, `workspace/bugs/m0_basics-1/`, which the import overlay puts in the place of the
package's module: the hunter sees a symptom and tests that fail, and reads the engine until it is plain why.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m0_basics.config import ConfigError, reject

from .book import ExerciseBook
from .grading import CheckResult, Grader, first_failure
from .puzzles import Bug


class BugHunt:
    """The bugs of one milestone."""

    def __init__(self, book: ExerciseBook) -> None:
        self.book = book
        self.bugs = book.puzzles.bugs

    def find(self, number: int) -> Bug:
        """The bug of a number, from 1 on."""
        if not 1 <= number <= len(self.bugs):
            allowed = f"1 to {len(self.bugs)}" if self.bugs else f"none: {self.book.package} has none"
            raise reject("bug", number, allowed)
        return self.bugs[number - 1]

    def workspace(self, number: int) -> Path:
        return self.book.workspace / "bugs" / f"{self.book.package}-{number}"

    def file(self, number: int) -> Path:
        """The module that has the bug, as the hunter edits it."""
        return self.workspace(number) / self.book.package / self.find(number).file

    def state(self, number: int) -> str:
        """"not planted", "planted" or "found"."""
        if not self.file(number).is_file():
            return "not planted"
        return "found" if (self.workspace(number) / "found").is_file() else "planted"

    def plant(self, number: int, force: bool = False) -> Path:
        """Write the module with the bug in it. Raises ConfigError if it is there already, and not `force`."""
        file = self.file(number)
        if file.is_file() and not force:
            raise ConfigError(f"bug {number} is {self.state(number)} already, in {file}; "
                              "allowed: --force, which plants it anew and throws your edits away")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.broken(number), encoding="utf-8")
        (self.workspace(number) / "found").unlink(missing_ok=True)
        return file

    def broken(self, number: int) -> str:
        """The module's text with the bug. Raises ConfigError where the text that the bug replaces is not there once."""
        bug = self.find(number)
        text = (self.book.folder / bug.file).read_text(encoding="utf-8")
        if text.count(bug.find) != 1 or bug.find == bug.replace:
            raise ConfigError(f"bug {number} of {self.book.package}: {bug.find!r} stands {text.count(bug.find)} times "
                              f"in {bug.file}; allowed: exactly once, and replaced by something else")
        return text.replace(bug.find, bug.replace)

    def check(self, number: int, first_failure_only: bool = False) -> CheckResult:
        """Run the tests that notice the bug on the hunter's copy."""
        bug = self.find(number)
        if not self.file(number).is_file():
            raise ConfigError(f"bug {number} is not planted; plant it with: python -m {self.book.package} exercise "
                              f"bug {number}")
        grader = Grader(self.book.folder.parent, self.workspace(number), self.book.python)
        result, _ = grader.run([f"{self.book.package}/{test}" for test in bug.tests], first_failure_only)
        if result.failed and not first_failure_only:
            again, _ = grader.run(result.failed[:1], True)
            result = replace(result, output=first_failure(again.output or result.output))
        if result.passed:
            (self.workspace(number) / "found").touch()
        return result

    def reveal(self, number: int) -> tuple[str, int]:
        """What was wrong, and in which line it stands."""
        bug = self.find(number)
        text = (self.book.folder / bug.file).read_text(encoding="utf-8")
        return bug.why, text.count("\n", 0, text.index(bug.find)) + 1
