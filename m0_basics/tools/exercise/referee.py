"""A pytest plugin that grades: it counts what passes, and sets your function beside the milestone's on real calls.

    python -m pytest -p m0_basics.tools.exercise.referee tests/test_model.py

It obeys the JSON in `LLM_LAB_REFEREE`: `report` is the file that it writes. With `compare`, each call of the learner's
function is repeated by the specification on a copy of its arguments, and the shortest call on which the two differ is
reported; without it, some call as it is. With `shrink`, hypothesis looks for the smallest input that fails.
"""
from __future__ import annotations
import __future__

import copy
import functools
import importlib
import inspect
import json
import os
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from .show import differs, show_call, show_value
from .source import blanks

VARIABLE = "LLM_LAB_REFEREE"
_MAX_CALLS, _MAX_SECONDS = 400, 20.0
# An argument or a result that is empty, or a field of one.
_EMPTY = re.compile(r"(?:= |returns )(?:\[\]|\(\)|\{\}|''|None|0|\w+ \[(?:[\d, ]+, )?0(?:, [\d, ]+)?\])$|"
                    r"=(?:\[\]|\(\)|\{\})", re.MULTILINE)
_GOOD_LENGTH = 500                      # characters of an example that says enough and is read at a glance


class Referee:
    """The hooks of one run."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.orders = orders
        self.passed, self.failed, self.skipped = 0, list[str](), 0
        self.watch: Watch | None = None
        self.met_blank = False

    def pytest_collection_finish(self) -> None:
        """The tests are imported: the function can be found, and nothing has called it yet."""
        if "symbol" in self.orders:
            self.watch = Watch(self.orders)
            self.watch.install()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
            said = report.longreprtext + report.capstderr + report.caplog       # an engine catches, and logs
            self.met_blank |= any(symbol != self.orders.get("mine", symbol) for symbol in blanks(said))
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if self.watch is not None and not self.orders.get("compare") and self.watch.has_enough():
            item.session.shouldstop = "the example is there"
        if self.met_blank:                  # the tests that follow would say no more than this one
            item.session.shouldstop = "another function is still blank"

    def pytest_sessionfinish(self) -> None:
        found = self.watch.report() if self.watch is not None else ""
        report = {"passed": self.passed, "failed": list(dict.fromkeys(self.failed)), "skipped": self.skipped,
                  "found": found}
        Path(self.orders["report"]).write_text(json.dumps(report), encoding="utf-8")


class Watch:
    """Looks on while a function is called."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.module: ModuleType = importlib.import_module(orders["module"])
        self.symbol: str = orders["symbol"]
        self.compare = bool(orders.get("compare"))
        self.wanted = re.compile(orders.get("wanted") or "")
        self.spec = specification(orders["specification"], self.symbol, self.module) if self.compare else None
        self.calls, self.busy, self.started = 0, False, time.monotonic()
        self.found: list[str] = []

    def install(self) -> None:
        """Put the looking-on call in the function's place. A kind of function that it cannot watch is left alone."""
        *path, name = self.symbol.split(".")
        owner: Any = self.module
        for step in path:
            owner = getattr(owner, step, None)
            if not inspect.isclass(owner):
                return
        raw = vars(owner).get(name)
        kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
        function = raw.__func__ if kind is not None else raw
        if not isinstance(function, FunctionType) or inspect.isgeneratorfunction(function) or (
                inspect.iscoroutinefunction(function)):
            return
        if path:
            self._set_method(owner, name, function, kind)
        elif not function.__code__.co_freevars:
            self._swap_code(function)

    def _set_method(self, owner: type, name: str, function: FunctionType, kind: type | None) -> None:
        @functools.wraps(function)
        def method(*args: Any, **kwargs: Any) -> Any:
            return self.call(function, args, kwargs)

        setattr(owner, name, kind(method) if kind is not None else method)

    def _swap_code(self, function: FunctionType) -> None:
        """Other modules may hold the function itself, so it stays the same object with another body."""
        yours = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
        yours.__kwdefaults__ = function.__kwdefaults__
        function.__globals__["watched_call_"] = functools.partial(self.call, yours)

        def body(*args, **kwargs):                                      # type: ignore[no-untyped-def]
            return watched_call_(args, kwargs)                         # type: ignore[name-defined]  # noqa: F821

        function.__code__ = body.__code__
        function.__defaults__, function.__kwdefaults__ = None, None

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `function`, and look at the call if there is still something to be learned from it."""
        if self.busy or self.calls >= _MAX_CALLS or time.monotonic() - self.started > _MAX_SECONDS:
            return function(*args, **kwargs)
        self.calls += 1
        bound = inspect.signature(function)
        self.busy = True
        try:
            before, theirs = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
        except Exception:                       # an argument that cannot be copied: this call is not looked at
            self.busy = False
            return function(*args, **kwargs)
        self.busy = False
        outcome = attempt(function, args, kwargs)
        self.busy = True
        try:
            self._look(bound, before, (args, kwargs), outcome, theirs)
        finally:
            self.busy = False
        if isinstance(outcome, Failure):
            raise outcome.error
        return outcome

    def _look(self, bound: inspect.Signature, before: Any, after: Any, outcome: Any, theirs: Any) -> None:
        if self.spec is None:
            if not isinstance(outcome, Failure):
                self.found.append(show_call(bound, before, after, outcome))
            return
        expected = attempt(self.spec, *theirs)
        lines = [show_call(bound, before, None, None)]
        if where := differs(outcome, expected):
            lines += [f"yours      {show_value(outcome)}", f"milestone  {show_value(expected)}", f"differ: {where}"]
        else:
            names, mine, right = changed(bound, after, theirs)
            if not names:
                return
            for name in names:
                lines += [f"{name} afterwards, yours      {show_value(mine[name])}",
                          f"{name} afterwards, milestone  {show_value(right[name])}",
                          f"differ: {differs(mine[name], right[name])}"]
        self.found.append("\n".join(lines))

    def has_enough(self) -> bool:
        """A dozen calls, and among them what the example should show."""
        return len(self.found) >= 12 and any(map(self.wanted.search, self.found))

    def report(self) -> str:
        """The shortest difference; or the example that shows most: what is wanted, little that is empty, and of a
        length that is read at a glance."""
        if self.compare:
            return min(self.found, key=len, default="")
        return min(self.found, default="", key=lambda text: (
            not self.wanted.search(text), len(_EMPTY.findall(text)), abs(len(text) - _GOOD_LENGTH)))


class Failure:
    """A call that raised instead of returning."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __repr__(self) -> str:
        return f"raises {type(self.error).__name__}: {self.error}"


def attempt(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call returns, or the Failure that it ends in."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return Failure(error)


def changed(bound: inspect.Signature, mine: Any, right: Any) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Arguments that the two functions leave in different states, with both states."""
    yours, spec = (dict(bound.bind(*args, **kwargs).arguments) for args, kwargs in (mine, right))
    return [name for name in yours if differs(yours[name], spec[name])], yours, spec


def specification(file: str, symbol: str, module: ModuleType) -> Callable[..., Any]:
    """The milestone's own function, compiled among the names of the learner's module."""
    from .source import find_function, function_text
    path = Path(file)
    source = path.read_bytes()
    text = textwrap.dedent(function_text(source, find_function(source, symbol, path)).decode())
    code = compile(text, file, "exec", __future__.annotations.compiler_flag)
    names: dict[str, Any] = {}
    exec(code, vars(module), names)
    function = names[symbol.rpartition(".")[2]]
    return function.__func__ if isinstance(function, (staticmethod, classmethod)) else function


def pytest_configure(config: pytest.Config) -> None:
    if orders := os.environ.get(VARIABLE):
        referee = Referee(json.loads(orders))
        config.pluginmanager.register(referee, "referee")
        if not referee.orders.get("shrink"):
            leave_out_shrinking()


def leave_out_shrinking() -> None:
    """To count failures nobody needs the smallest input that fails, and finding it may take a minute for each test."""
    try:
        from hypothesis import Phase, settings
    except ImportError:
        return
    settings.register_profile("referee", phases=(Phase.explicit, Phase.reuse, Phase.generate))
    settings.load_profile("referee")
