"""The import overlay: a learner's file takes the place of a module, and nothing else knows.

With `LLM_LAB_WORKSPACE=workspace`, importing `m0_basics.model` runs `workspace/m0_basics/model.py` where that
file exists. The hook at the top of `m0_basics/__init__.py` installs the overlay before any other module is
imported, so it holds for the tests, for the command line and for every later milestone. Standard library
only: whatever this file imported could no longer be replaced. (It is also a pytest plugin: `-p
m0_basics.tools.exercise_overlay` installs it before the tests are collected, whatever package they import first.)
"""
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

WORKSPACE_VARIABLE = "LLM_LAB_WORKSPACE"


class LearnerLoader(SourceFileLoader):
    """Runs the learner's file. Caches no bytecode: an edit within the same second would be missed."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Called by the import system with compiled bytecode."""


class OverlayFinder(MetaPathFinder):
    """Finds `package.module` in `workspace/package/module.py`, if the package has a module of that name."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace

    def find_spec(self, fullname: str, path: Sequence[str] | None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        """The learner's module, or None, which leaves the name to the usual finders.

        Code is compiled under the workspace's path, so tracebacks and debuggers show the learner's lines. The
        module's `__file__` stays the real one, so that `Path(__file__)` still finds the data files beside it.
        """
        learner = self.workspace.joinpath(*fullname.split(".")).with_suffix(".py")
        if path is None or not learner.is_file():
            return None
        for folder in path:
            real = Path(folder, learner.name)
            if real.is_file():
                return spec_from_file_location(fullname, real, loader=LearnerLoader(fullname, str(learner)))
        return None         # a note or a scratch file of the learner's


def install_overlay_from_environment() -> None:
    """Put the overlay before all other finders, where the environment names a workspace. Safe to call twice."""
    if not (folder := os.environ.get(WORKSPACE_VARIABLE)):
        return
    workspace = Path(folder).resolve()
    if not any(isinstance(finder, OverlayFinder) and finder.workspace == workspace for finder in sys.meta_path):
        sys.meta_path.insert(0, OverlayFinder(workspace))


def learner_modules() -> list[str]:
    """Names of the modules that are imported from the learner's files."""
    return [name for name, module in list(sys.modules.items())
            if type(getattr(module, "__loader__", None)).__name__ == LearnerLoader.__name__]
