"""Exercises as puzzles: statement, example, hints, how much passes, where yours and the specification differ; bugs."""
from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from m0_basics.config import ConfigError
from m0_basics.tools.exercise import book
from m0_basics.tools.exercise.book import ExerciseBook, Python
from m0_basics.tools.exercise.commands import exercise_app
from m0_basics.tools.exercise.grading import first_failure
from m0_basics.tools.exercise.puzzles import base_docstring, expected_lines, read_puzzles, signature, skeleton
from m0_basics.tools.exercise.show import differs, filled, filled_signature, show_call, show_value

README = """## Exercises
| # | Exercise | Write | Graded by |
|---|---|---|---|
| 1 | `shop.py::Till.total` | the sum of prices | `tests/test_shop.py` |
| 2 | `shop.py::doubled` | twice as much | `tests/test_doubled.py` |
"""
SHOP = '''"""A shop."""
import torch


class Till:
    """Keeps what was paid."""

    def __init__(self):
        self.paid = []

    def total(self, prices: torch.Tensor, factor: int = 1) -> torch.Tensor:
        """Sum of the prices, which is paid."""
        total = prices.sum() * factor
        # It is remembered.
        self.paid.append(total.item())
        return total


def doubled(x: int) -> int:
    return 2 * x
'''
TESTS = '''
import torch
from m8_toy.shop import Till

def test_small():
    till = Till()
    assert till.total(torch.tensor([3., 4.])) == 7
    assert till.paid == [7.0]

def test_factor():
    assert Till().total(torch.ones(3), factor=2) == 6

def test_nothing():
    assert Till().total(torch.zeros(0)) == 0
'''
PUZZLES = """[hints]
"shop.py::Till.total" = ["Add, then multiply."]
[statements]
"shop.py::Till.total" = "The sum of nothing is 0."
[[bug]]
title = "Cheap"
symptom = "Some customers pay too little."
file = "shop.py"
find = "prices.sum() * factor"
replace = "prices.sum()"
tests = ["tests/test_shop.py"]
why = "the factor is lost"
command = "printf 3 | python -m m8_toy pay --twice"
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_python: Python) -> Path:
    monkeypatch.setattr(book, "run_python", forked_python)
    folder = tmp_path / "m8_toy"
    (folder / "tests").mkdir(parents=True)
    (folder / "tools").mkdir()
    (folder / "__init__.py").touch()
    (folder / "README.md").write_text(README)
    (folder / "shop.py").write_text(SHOP)
    (folder / "tools/puzzles.toml").write_text(PUZZLES)
    (folder / "tests/test_shop.py").write_text(TESTS)
    (folder / "tests/test_doubled.py").write_text(
        "from m8_toy.shop import doubled\ndef test_doubled(): assert [doubled(i) for i in (0, 1, 5)] == [0, 2, 10]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_LAB_WORKSPACE", raising=False)
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(exercise_app("m8_toy"), list(arguments))


def write(toy: Path, symbol: str, body: str) -> None:
    file = toy.parent / "workspace/m8_toy/shop.py"
    blank = f'raise NotImplementedError("exercise: write {symbol}")'
    assert blank in file.read_text()
    file.write_text(file.read_text().replace(blank, body))


@pytest.mark.slow
def test_the_statement_and_a_real_call(toy: Path) -> None:
    output = run("start", "1").output
    for text in ("def total(self, prices: torch.Tensor, factor: int=1) -> torch.Tensor", "has 3 lines of code",
                 "class Till: Keeps what was paid.", "Sum of the prices, which is paid.", "The sum of nothing is 0.",
                 "exercise hint 1"):
        assert text in output
    example = output.partition("a call from the tests:")[2]
    assert "prices = float32 [" in example and "returns float32 []:" in example
    assert "self afterwards: Till(paid=" in example


@pytest.mark.slow
def test_yours_and_the_specification_side_by_side(toy: Path) -> None:
    run("start", "1", "--no-example")
    write(toy, "Till.total", "self.paid.append(prices.sum().item()); return prices.sum()")
    output = run("check", "1").output
    assert "2 of 3 tests pass" in output and "fails: m8_toy/tests/test_shop.py::test_factor" in output
    difference = output.partition("function and the milestone's differ:")[2]
    assert "prices = float32 [3]: [1, 1, 1]" in difference and "factor = 2" in difference
    assert "yours      float32 []: 3" in difference and "milestone  float32 []: 6" in difference


@pytest.mark.slow
def test_an_object_that_is_left_in_another_state(toy: Path) -> None:
    """A function that was imported by name is watched too."""
    run("start", "1", "--no-example")
    write(toy, "Till.total", "return prices.sum() * factor")
    output = run("check", "1").output
    assert "afterwards, yours      Till(paid=[])" in output and "afterwards, milestone  Till(paid=[7.0])" in output
    run("start", "2", "--no-example")
    write(toy, "doubled", "return x * x")
    output = run("check", "2").output
    assert "0 of 1 test pass" in output and "x = 1" in output and "yours      1\n  milestone  2" in output


@pytest.mark.slow
def test_what_the_learner_prints_is_shown_and_logs_are_not(toy: Path) -> None:
    run("start", "1", "--no-example")
    write(toy, "Till.total", "import sys; print(*range(41), sep='\\n'); print('log', file=sys.stderr); return 0")
    output = run("check", "1").output
    assert "--- Captured stdout call, the last 20 of 41 lines ---\n21\n22\n" in output and "\n40\n" in output
    assert "\n20\n" not in output and "\nlog\n" not in output and "tests pass" in output


def test_the_first_failure_is_cut_out() -> None:
    report = ("F.\n=== FAILURES ===\n___ test_a ___\nexercise: write f_of\n--- Captured log call ---\nsent\n"
              "___ test_b ___\nassert 2 == 3\n--- Captured stdout setup ---\nnot mine\n"
              "--- Captured stdout call ---\nx\ny\n--- Captured stderr call ---\nnoise\n2 failed, 1 passed in 0.1s\n")
    assert first_failure(report) == "exercise: write f_of"
    assert first_failure(report, without=["f"]) == "exercise: write f_of"           # another function
    assert first_failure(report, without=["f_of"]) == "assert 2 == 3\n\n--- Captured stdout call ---\nx\ny"
    assert first_failure("no tests ran") == "no tests ran" and first_failure("no tests ran", without=["f"]) == ""


def test_hints_come_one_by_one(toy: Path) -> None:
    first, second = run("hint", "1").output, run("hint", "1").output
    assert first == "hint 1 of 2\n  Add, then multiply.\n"
    assert second.startswith(first) and "total = ____" in second and "self.paid.append(____)" in second
    assert second.endswith("that was the last; the function itself: python -m m8_toy exercise solution 1\n")
    assert run("hint", "1").output == run("hint", "1", "--all").output == second


def test_what_is_reset_is_kept(toy: Path) -> None:
    run("start", "1", "--no-example")
    assert "kept" not in run("reset", "1").output               # nothing was written
    run("start", "1", "--no-example")
    write(toy, "Till.total", "return 1")
    assert "what you wrote is kept in workspace/m8_toy/kept/Till.total-" in run("reset", "1").output
    run("start", "1", "--no-example")
    write(toy, "Till.total", "return (")
    assert run("reset", "1").exit_code == 0
    kept = sorted((toy.parent / "workspace/m8_toy/kept").iterdir(), key=lambda p: p.stat().st_size)
    assert ["return 1" in p.read_text() or "return (" in p.read_text() for p in kept] == [True] * len(kept) and kept


@pytest.mark.slow
def test_a_bug_is_hunted(toy: Path) -> None:
    output = run("bug", "1").output
    assert "Some customers pay too little." in output and "factor" not in output
    file = toy.parent / "workspace/bugs/m8_toy-1/m8_toy/shop.py"
    assert str(file.relative_to(toy.parent)) in output and "total = prices.sum()\n" in file.read_text()
    assert "try it  printf 3 | LLM_LAB_WORKSPACE=workspace/bugs/m8_toy-1 python -m m8_toy pay --twice\n" in output
    failed = run("bug", "1", "--check")
    assert failed.exit_code == 1 and "2 of 3 tests pass" in failed.output and "it still bites" in failed.output
    assert "assert" in failed.output and "stopping after" not in failed.output and "1 failed" not in failed.output
    file.write_text(SHOP)
    passed = run("bug", "1", "--check")
    assert passed.exit_code == 0 and "found. What it was: the factor is lost" in passed.output
    assert "bug 1  found        Cheap" in run("list").output
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_LAB_WORKSPACE", "my work")
        assert "LLM_LAB_WORKSPACE='my work/bugs/m8_toy-1' python -m m8_toy pay" in run("bug", "1").output
    (toy / "tools/puzzles.toml").write_text(PUZZLES[:PUZZLES.index("command")])
    assert "try it" not in run("bug", "1", "--force").output
    file.write_text(SHOP)
    run("bug", "1", "--check")
    assert run("bug", "1", "--reveal").output == "m8_toy/shop.py:13: the factor is lost\n"
    assert "found already" in str(run("bug", "1").exception)
    assert run("bug", "1", "--force").exit_code == 0 and file.read_text() != SHOP


def test_bugs_that_cannot_be_planted(toy: Path) -> None:
    assert "bug=2 is not valid; allowed: 1 to 1" in str(run("bug", "2").exception)
    assert "is not planted" in str(run("bug", "1", "--check").exception)
    (toy / "shop.py").write_text(SHOP.replace("* factor", ""))
    assert "stands 0 times in shop.py" in str(run("bug", "1").exception)
    (toy / "tools/puzzles.toml").write_text("[[bug]]\ntitle = 1")
    with pytest.raises(ConfigError, match="is not valid"):
        ExerciseBook("m8_toy")


def test_without_a_file_there_are_no_puzzles(tmp_path: Path) -> None:
    assert read_puzzles(tmp_path).bugs == ()


def test_what_a_base_class_says_counts_where_a_method_says_little(toy: Path) -> None:
    said = '"""Money.\n\n        Never less than 0.\n        """\n'
    (toy / "base.py").write_text(f"class Desk:\n    def total(self):\n        {said}")
    (toy / "again.py").write_text("from .base import Desk as Table\n")
    (toy / "shop.py").write_text(SHOP.replace("class Till:", "from m8_toy.again import Table\n\n\nclass Till(Table):"))
    path = toy / "shop.py"
    assert base_docstring(path, "Till.total") == "Desk.total: Money.\n\nNever less than 0."
    assert base_docstring(path, "doubled") == base_docstring(path, "Till.__init__") == ""
    output = run("show", "1", "--no-example").output
    assert "Sum of the prices, which is paid." in output and "Never less than 0." in output
    path.write_text(path.read_text().replace("which is paid.", "which is paid.\n\n        All of it.\n        "))
    assert "Never less than 0." not in run("show", "1", "--no-example").output


@pytest.mark.slow
def test_the_example_shows_what_it_should(toy: Path) -> None:
    """Not a call with nothing in it; and of the others the one that is asked for."""
    assert "float32 [0]" not in run("show", "1").output
    for wanted in ("factor = 2", "3, 4"):
        (toy / "tools/puzzles.toml").write_text(f'[examples]\n"shop.py::Till.total" = "{wanted}"\n')
        assert wanted in run("show", "1").output.partition("a call from the tests:")[2]


def test_text_fits(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    (toy / "README.md").write_text(README.replace("the sum of prices", "the sum of prices " * 9))
    lines = run("list").output.splitlines()[:-1]
    assert max(map(len, lines)) <= 60 and sum("prices" in line for line in lines) > 2
    items = "1. One two three\n   four.\n10. Five."
    assert filled(items, 16) == "  1. One two\n     three four.\n  10. Five."
    assert filled("a b\nc", 40) == "  a b c" and filled("- a\n  b\nc", 40) == "  - a b\n  c"
    for by_hand in ("a:\n    b  c", "| a |\n| b |", "   a\n b"):
        assert filled(by_hand, 40) == textwrap.indent(by_hand, "  ")
    lines = filled_signature("def name(a: int, b: int) -> int", 20).splitlines()
    assert lines == ["def name(a: int, b:", "         int) -> int"]


SOURCE = b'''def f(a, *, b: int = 2) -> list[int]:
    """Doc.

    More.
    """
    # A comment.
    rest = [x for x in a]

    while rest and b:
        rest.append(b + 1); b -= 1
    for x in a[1:]:
        yield_, other = x, g(x)
    if a > b:
        raise ValueError("no")
    return None
'''


def test_code_of_a_function() -> None:
    path = Path("f.py")
    assert expected_lines(SOURCE, "f", path) == 8
    assert signature(SOURCE, "f", path) == "def f(a, *, b: int=2) -> list[int]"
    assert skeleton(SOURCE, "f", path).splitlines()[1:] == [
        "    rest = ____", "    while ____:", "        rest.append(____)", "        b -= 1", "    for x in ____:",
        "        yield_, other = (x, g(____))", "    if ____:", "        raise ValueError('no')", "    return None"]


class Thing:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


@pytest.mark.parametrize(("a", "b", "where"), [
    (1, 1, ""), (1, 2, "1 instead of 2"), (1.0, 1.0 + 1e-9, ""), (1.0, 2.0, "1.0 instead of 2.0"),
    (True, 1, "True instead"),
    ([1, 2], [1, 2], ""), ([1, 2], [1, 3], "[1]: 2 instead of 3"), ([1], [1, 2], "1 elements instead of 2"),
    ((1,), [1], "tuple instead of list"), ({"a": 1}, {"b": 1}, "keys"), ({"a": [1]}, {"a": [2]}, "['a'][0]: 1 instead"),
    ({1, 2}, {1, 3}, "{1, 2} instead of {1, 3}"), (None, 3, "None instead of 3"), ("x", "y", "'x' instead of 'y'"),
    (torch.ones(2), torch.ones(2), ""), (torch.ones(2), torch.ones(3), "shape [2] instead of [3]"),
    (torch.ones(2), torch.ones(2).int(), "torch.float32 instead of torch.int32"),
    (torch.ones(2), 1, "Tensor instead of 1"), (torch.tensor(2.0), torch.tensor(3.0), "[] 2 instead"),
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), "[1] 2 instead of 3; 1 of 2 numbers differ"),
    (torch.tensor(float("nan")), torch.tensor(float("nan")), ""),
    (torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 1.001, dtype=torch.bfloat16), ""),
    (np.arange(3), np.arange(3), ""), (Thing(a=1), Thing(a=1), ""), (Thing(a=1), Thing(a=2), ".a: 1 instead of 2"),
])
def test_where_two_values_differ(a: object, b: object, where: str) -> None:
    assert differs(a, b).startswith(where) if where else differs(a, b) == ""


def test_values_are_shown_short() -> None:
    assert show_value(torch.tensor([[1, 2], [3, 4]])) == "int64 [2, 2]: [[1, 2], [3, 4]]"
    assert show_value(torch.zeros(100, 2)) == "float32 [100, 2]: 0, 0, 0, 0, 0, 0, ..."
    assert show_value(torch.zeros(0, 2)) == "float32 [0, 2]"
    assert show_value({"a": (1, Thing(x=[2]))}) == "{'a': (1, Thing(x=[...]))}" or "Thing(" in show_value(
        {"a": (1, Thing(x=[2]))})
    assert len(show_value(list(range(1000)) * 3)) < 60 and show_value("x" * 1000).endswith(" ...")

    def call(items: list[int], extra: int = 0) -> int: ...          # type: ignore[empty-body]

    text = show_call(inspect.signature(call), (([1],), {}), (([1, 2],), {}), 5)
    assert text == "items = [1]\nreturns 5\nitems afterwards: [1, 2]"
    long = list(range(20))
    text = show_call(inspect.signature(call), ((long,), {}), (([*long[:-1], 7],), {}), 5)
    assert text.endswith("items afterwards: [19]: 7 instead of 19")       # what is shown of both is the same
