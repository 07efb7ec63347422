"""Run tests on the learner's files, in a process of their own, and read what the referee reports."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..exercise_overlay import WORKSPACE_VARIABLE
from .referee import VARIABLE
from .source import blanks

# (arguments, folder, environment) -> what `python arguments` did there; errors go where the output goes.
Python = Callable[[Sequence[str], Path, Mapping[str, str]], subprocess.CompletedProcess[str]]
# Plugins of pytest that no exercise needs, and that take longer to import than an exercise to grade.
_SLOW_PLUGINS = ("schemathesis", "nbmake", "anyio")
_NUM_PRINTED = 20           # last lines of what a failing test printed: the learner's own print() among them
_OVERLAY, _REFEREE = "m0_basics.tools.exercise_overlay", "m0_basics.tools.exercise.referee"


@dataclass(frozen=True)
class CheckResult:
    """What the tests said, and what else may be the reason of a failure."""

    passed: bool
    output: str                             # pytest's; of the first test that failed, where one did
    still_blank: tuple[str, ...] = ()       # symbols whose blank bodies the tests met
    outdated: bool = False                  # the module has changed since the learner's copy was made
    num_passed: int = 0
    failed: tuple[str, ...] = ()            # node ids
    difference: str = ""                    # a call on which the learner's function and the milestone's differ

    @property
    def score(self) -> str:
        """"12 of 28 tests pass"."""
        total = self.num_passed + len(self.failed)
        return f"{self.num_passed} of {total} test{'' if total == 1 else 's'} pass"

    @property
    def own_failures(self) -> tuple[str, ...]:
        """Tests that failed without meeting another's blank body: a run ends with the first test that meets one."""
        return self.failed[:-1] if self.still_blank else self.failed


@dataclass(frozen=True)
class Grader:
    """Where tests run: the folder that holds the package, and the workspace whose files take the modules' places."""

    root: Path
    workspace: Path
    python: Python

    def run(self, tests: Sequence[str], first_failure_only: bool = False, **orders: Any) -> tuple[CheckResult, str]:
        """Run test files or node ids, relative to the root; `orders` are for the referee. Returns what it found too."""
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch, "report.json")
            # --verbosity sets what -q in a project's own settings would only add to.
            left_out = [part for name in _SLOW_PLUGINS for part in ("-p", f"no:{name}")]
            arguments = ["-m", "pytest", "-p", _OVERLAY, "-p", _REFEREE, *(["-x"] if first_failure_only else []),
                         "--verbosity=-1", "-rN", "--color=no", "-p", "no:cacheprovider",
                         *left_out, *tests]
            environment = os.environ | {WORKSPACE_VARIABLE: str(self.workspace),
                                        VARIABLE: json.dumps({"report": str(report), **orders})}
            done = self.python(arguments, self.root, environment)
            data = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        output, num_passed, failed = done.stdout.strip(), data.get("passed", 0), tuple(data.get("failed", ()))
        found = str(data.get("found", ""))
        if done.returncode in (0, 5) and not num_passed:        # 5: pytest selected none
            nothing = f"{output}\nno test ran: all were skipped or left out, so nothing was graded"
            return CheckResult(False, nothing), found
        return CheckResult(done.returncode == 0, output, blanks(output), num_passed=num_passed, failed=failed), found


def first_failure(output: str, without: Collection[str] = ()) -> str:
    """pytest's report of the first test that failed, with the last lines that it printed, and no logs.

    Left out are other tests, and the counts, which would be those of a run that ends early. `without`: tests that met
    the blank bodies of these functions do not count; "" where there is no other.
    """
    parts = re.split(r"^_{3,} .+ _{3,}$", output, flags=re.MULTILINE)[1:]
    if not parts:
        return "" if without else output
    own = next((part for part in parts if not set(blanks(part)) & set(without)), "")
    end = r"^(?:=+ short test summary info =+|!{3,} .+ !{3,}|(?:=+ )?\d+ failed.* in [\d.]+s.*)$"
    own = re.split(end, own, maxsplit=1, flags=re.MULTILINE)[0]
    report, *captured = re.split(r"^-+ (?=Captured )(.+) -+$", own, flags=re.MULTILINE)
    printed = dict(zip(captured[::2], captured[1::2], strict=True)).get("Captured stdout call", "").strip().splitlines()
    if not printed:
        return report.strip()
    cut = f", the last {_NUM_PRINTED} of {len(printed)} lines" if len(printed) > _NUM_PRINTED else ""
    return "\n".join([report.strip(), "", f"--- Captured stdout call{cut} ---", *printed[-_NUM_PRINTED:]])


def run_python(arguments: Sequence[str], folder: Path, environment: Mapping[str, str],
               ) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
