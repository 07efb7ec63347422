"""FX.7: blank -> tests fail; solution -> tests pass. On a small milestone made here."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from m0_basics.config import ConfigError
from m0_basics.tools.cli.app import say_whose_code_runs
from m0_basics.tools.exercise import book
from m0_basics.tools.exercise.book import ExerciseBook, Python
from m0_basics.tools.exercise.commands import exercise_app

README = """# m9_toy
## Exercises
What to do.

| # | Exercise | Write | Graded by |
|---|---|---|---|
| 1 | `shop.py::Shop.Till.total` | the sum \\| of prices | `tests/test_shop.py::test_total` |
| 2 | `shop.py::greet` | a greeting | `tests/test_shop.py::test_greet`, `tests/test_more.py` |
| 3 | `shop.py::gpu_only` | nothing | `tests/test_shop.py::test_gpu_only` |

## Next
| 4 | `not.py::read` | - | - |
"""
SHOP = '''"""A shop."""
import functools
from importlib.resources import files
from pathlib import Path

from .prices import PRICES   # a relative import
from . import prices


class Shop:
    class Till:
        @functools.lru_cache
        def total(
            self, items: tuple[str, ...],
        ) -> int:
            """Sum of the items' prices."""
            # One by one.
            return sum(PRICES[i] for i in items)


async def greet(name: str) -> str: return motto() + name


def motto() -> str:
    beside = Path(__file__).with_name("motto.txt").read_text()
    assert beside == files(__package__).joinpath("motto.txt").read_text()
    return beside


def gpu_only() -> int:
    return prices.__name__.count("m9_toy")
'''
TESTS = '''
import asyncio
import pytest
from m9_toy import shop

def test_total():
    assert shop.Shop.Till().total(("tea", "cake")) == 7

def test_greet():
    assert asyncio.run(shop.greet("Ann")) == "Hello, Ann"

@pytest.mark.skip(reason="no device")
def test_gpu_only():
    assert shop.gpu_only() == 1
'''
TOTAL = "            # One by one.\n            return sum(PRICES[i] for i in items)\n"
BLANK_GREET = 'raise NotImplementedError("exercise: write greet")'
BLANK_TOTAL = '            raise NotImplementedError("exercise: write Shop.Till.total")\n'


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_python: Python) -> Path:
    """The folder of a milestone `m9_toy` that can be imported; its workspace lies beside it."""
    monkeypatch.setattr(book, "run_python", forked_python)
    folder = tmp_path / "m9_toy"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text("from .shop import Shop\n")
    (folder / "prices.py").write_text('PRICES = {"tea": 3, "cake": 4}\n')
    (folder / "motto.txt").write_text("Hello, ")
    (folder / "README.md").write_text(README)
    (folder / "shop.py").write_text(SHOP)
    (folder / "tests/test_shop.py").write_text(TESTS)
    (folder / "tests/test_more.py").write_text("import m9_toy.shop\ndef test_motto(): assert m9_toy.shop.motto()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_LAB_WORKSPACE", raising=False)
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(exercise_app("m9_toy"), list(arguments))


def learner(toy: Path) -> Path:
    return toy.parent / "workspace/m9_toy/shop.py"


def edit(toy: Path, old: str, new: str) -> None:
    """What the learner does."""
    text = learner(toy).read_text()
    assert text.count(old) == 1
    learner(toy).write_text(text.replace(old, new))


def states() -> list[str]:
    toys = ExerciseBook("m9_toy")
    return [toys.state(exercise).value for exercise in toys.exercises]


@pytest.mark.slow
def test_from_blank_to_solved(toy: Path) -> None:
    started = run("start", "1", "--no-example")
    assert started.exit_code == 0
    assert "workspace/m9_toy/shop.py:13" in started.output and "the sum | of prices" in started.output
    assert "python -m m9_toy exercise check 1" in started.output
    assert learner(toy).read_text() == SHOP.replace(TOTAL, BLANK_TOTAL)         # all other bytes as they were

    failed = run("check", "Shop.Till.total")
    assert failed.exit_code == 1
    assert "NotImplementedError: exercise: write Shop.Till.total" in failed.output and "not passed" in failed.output
    assert "workspace/m9_toy/shop.py:" in failed.output                         # the traceback shows the learner's file

    edit(toy, BLANK_TOTAL, TOTAL)
    assert states() == ["started", "not started", "not started"]
    passed = run("check", "1")
    assert (passed.exit_code, passed.output.count("1 passed")) == (0, 1)
    assert states() == ["solved", "not started", "not started"]

    other_way = "            return 7 if items == ('tea', 'cake') else 0\n"
    edit(toy, TOTAL, other_way)
    assert states()[0] == "started"
    assert run("check", "shop.py::Shop.Till.total").exit_code == 0
    listed = [line.split() for line in run("list").output.splitlines()]
    assert listed[:2] == [["1", "solved", "the", "sum", "|", "of", "prices"], ["shop.py::Shop.Till.total"]]
    assert listed[2:4] == [["2", "not", "started", "a", "greeting"], ["shop.py::greet"]]

    edit(toy, other_way, "            return 8\n")
    assert run("check", "1").exit_code == 1
    assert states()[0] == "started"
    assert (toy / "shop.py").read_text() == SHOP


@pytest.mark.slow
def test_a_second_exercise_of_the_module_keeps_the_first_ones_work(toy: Path) -> None:
    run("start", "1", "--no-example")
    mine = "            return 7\n"
    edit(toy, BLANK_TOTAL, mine)
    learner(toy).write_text(learner(toy).read_text() + "\n# my note\n")
    assert run("start", "greet", "--no-example").exit_code == 0
    text = learner(toy).read_text()
    assert text == SHOP.replace(TOTAL, mine).replace("return motto() + name", BLANK_GREET) + "\n# my note\n"

    result = run("check", "--all")
    assert result.exit_code == 1
    assert "shop.py::Shop.Till.total: passed" in result.output and "shop.py::greet: not passed" in result.output
    edit(toy, BLANK_GREET, 'return "Hello, Ann"')
    assert run("check", "--all").exit_code == 0

    assert isinstance(run("start", "1", "--no-example").exception, ConfigError)
    assert mine in learner(toy).read_text()
    assert run("start", "1", "--force", "--no-example").exit_code == 0
    assert BLANK_TOTAL in learner(toy).read_text() and 'return "Hello, Ann"' in learner(toy).read_text()

    assert run("reset", "1").exit_code == 0
    assert TOTAL in learner(toy).read_text() and 'return "Hello, Ann"' in learner(toy).read_text()
    assert "removed" in run("reset", "2").output
    assert not learner(toy).exists()


@pytest.mark.slow
def test_a_blank_neighbour_is_named(toy: Path) -> None:
    more = "def test_till(): assert m9_toy.shop.Shop.Till().total(('tea',)) == 3\n"
    (toy / "tests/test_more.py").write_text("import m9_toy.shop\n" + more)
    run("start", "1", "--no-example")
    run("start", "2", "--no-example")
    edit(toy, BLANK_GREET, 'return "Hello, Ann"')
    result = run("check", "2")
    assert result.exit_code == 1
    assert "still blank: Shop.Till.total; write it first" in result.output and "has changed" not in result.output
    assert "tests pass" not in result.output and "Traceback" not in result.output
    assert "fails:" not in result.output and "of the tests before that, 1 of 1 passed" in result.output
    (toy / "tests/test_more.py").write_text("import m9_toy.shop\n" + more + "def test_b(): open('ran', 'w')\n")
    run("check", "2")
    assert not (toy.parent / "ran").exists(), "the first blank ends the run"


@pytest.mark.slow
def test_what_fails_before_a_blank_neighbour_is_met_is_shown(toy: Path) -> None:
    (toy / "tests/test_more.py").write_text(
        "import m9_toy.shop\ndef test_motto(): assert m9_toy.shop.motto()\n"
        "def test_till(): assert m9_toy.shop.Shop.Till().total(('tea',)) == 3\n")
    run("start", "1", "--no-example")
    run("start", "2", "--no-example")
    edit(toy, BLANK_GREET, 'return "Hi, Ann"')
    output = run("check", "2").output
    assert "assert 'Hi, Ann' == 'Hello, Ann'" in output and "NotImplementedError" not in output
    assert "  fails: m9_toy/tests/test_shop.py::test_greet\n" in output and "::test_till" not in output
    assert "still blank: Shop.Till.total; write it first" in output
    assert "of the tests before that, 1 of 2 passed" in output


@pytest.mark.slow
def test_a_line_to_copy_is_quoted(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_LAB_WORKSPACE", "my work")
    (toy.parent / "my work/.git").mkdir(parents=True)
    run("start", "1", "--no-example")
    file = toy.parent / "my work/m9_toy/shop.py"
    file.write_text(file.read_text().replace(BLANK_TOTAL, TOTAL))
    assert ("keep it: git -C 'my work' add -A && git -C 'my work' commit -m 'm9_toy: Shop.Till.total'\n"
            in run("check", "1").output)


@pytest.mark.slow
def test_a_module_that_changed_since_is_named(toy: Path) -> None:
    run("start", "1", "--no-example")
    (toy / "shop.py").write_text(SHOP + "x = 1\n")
    assert "m9_toy/shop.py has changed since your copy was made" in run("check", "1").output


@pytest.mark.slow
def test_tests_that_are_all_skipped_grade_nothing(toy: Path) -> None:
    run("start", "3", "--no-example")
    result = run("check", "3")
    assert result.exit_code == 1
    assert "no test ran" in result.output


def test_a_syntax_error_is_shown_and_can_be_reset(toy: Path) -> None:
    run("start", "1", "--no-example")
    edit(toy, BLANK_TOTAL, "            return (\n")
    result = run("check", "1")
    assert result.exit_code == 1
    assert f"{learner(toy)}, line 17 is not valid Python: '(' was never closed" in result.output
    assert states() == ["started", "not started", "not started"]
    assert "not valid Python" in str(run("start", "2", "--no-example").exception)
    assert run("reset", "1").exit_code == 0 and not learner(toy).exists()


def test_solution_and_diff(toy: Path) -> None:
    assert run("solution", "1").output == SHOP[SHOP.index("        @functools"):SHOP.index("\n\nasync def")]
    run("start", "1", "--no-example")
    lines = run("diff", "1").output.splitlines()
    assert lines[:2] == ["--- workspace/m9_toy/shop.py", "+++ m9_toy/shop.py"]
    assert [line[0] for line in lines if line[0] in "+-"][2:] == ["-", "+", "+"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["check", "1"], "shop.py::Shop.Till.total is not started; start it with: python -m m9_toy exercise start 1"),
    (["check", "--all"], "no exercise is started"),
    (["check"], "wants a name, or --all"),
    (["reset", "2"], "shop.py::greet is not started"),
    (["diff", "2"], "shop.py::greet is not started"),
    (["start", "till"], r"exercise='till' is not valid; allowed: 1 \(shop.py::Shop.Till.total\), 2"),
])
def test_what_cannot_be_done_is_an_error(toy: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(exercise_app("m9_toy"), arguments, catch_exceptions=False)
    assert not learner(toy).exists()


@pytest.mark.parametrize(("old", "new", "message"), [
    ("Shop.Till.total", "Shop.total", r"exercise 1 of .*README.md: .*no function 'Shop.total'; it has Shop.Till.total"),
    ("shop.py::greet", "shops.py::greet", r"exercise 2 of .*file='shops.py' is not valid"),
    ("shop.py::greet", "__init__.py::greet", r"file='__init__.py' is not valid"),
    ("test_more.py", "test_less.py", r"exercise 2 of .*test='tests/test_less.py' is not valid"),
    ("::test_total", "::test_sum", r"test='tests/test_shop.py::test_sum' is not valid; .* has no test_sum"),
    ("| 2 |", "| 1 |", r"have the numbers \[1, 1, 3\]"),
    ("| 2 |", "| two |", "has the exercise row 'two | .*allowed: | number"),
    ("| a greeting |", "|", "has the exercise row"),
    ("## Exercises", "## Tasks", "has no section '## Exercises'"),
])
def test_a_wrong_table_is_an_error(toy: Path, old: str, new: str, message: str) -> None:
    assert old in README
    (toy / "README.md").write_text(README.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        ExerciseBook("m9_toy")


def test_a_package_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="package='m9_nothing' is not valid"):
        ExerciseBook("m9_nothing")


SHOW = """
import sys
sys.dont_write_bytecode = False
import m0_basics
import m9_toy
from m9_toy import prices, shop
print(shop.MINE if hasattr(shop, "MINE") else "real", shop.__file__, shop.motto.__code__.co_filename, shop.__name__,
      shop.__package__, shop.motto(), hasattr(m9_toy, "notes"), sep="\\n")
try:
    import m9_toy.notes
except ModuleNotFoundError:
    print("no notes")
"""


@pytest.mark.slow
def test_the_overlay_replaces_the_module_and_nothing_else(toy: Path) -> None:
    """`__file__` stays, so data files are found; code objects carry the learner's path, so tracebacks show it."""
    file = learner(toy)
    file.parent.mkdir(parents=True)
    file.write_text(SHOP + "MINE = 'mine'\n")
    file.with_name("notes.py").write_text("print('a scratch file of the learner was imported')\n")

    def show(workspace: str | None) -> list[str]:
        environment = {k: v for k, v in os.environ.items() if k != "LLM_LAB_WORKSPACE"}
        environment |= {"LLM_LAB_WORKSPACE": workspace} if workspace is not None else {}
        done = subprocess.run([sys.executable, "-c", SHOW], cwd=toy.parent, env=environment, text=True,
                              stdout=subprocess.PIPE, check=True)
        return done.stdout.splitlines()

    real = str(toy / "shop.py")
    common = ["m9_toy.shop", "m9_toy", "Hello, ", "False", "no notes"]
    assert show("workspace") == ["mine", real, str(file), *common]
    assert not (file.parent / "__pycache__").exists()       # so that an edit within the same second is seen
    assert show(None) == show("") == show("elsewhere") == ["real", real, real, *common]


@pytest.mark.slow
def test_the_command_line_says_whose_code_runs(tmp_path: Path) -> None:
    """In a workspace there may be changed modules that one has forgotten."""
    file = tmp_path / "m0_basics/sampler.py"
    file.parent.mkdir()
    file.write_bytes(Path(ExerciseBook("m0_basics").folder, "sampler.py").read_bytes())
    done = subprocess.run([sys.executable, "-m", "m0_basics", "changes"], text=True, capture_output=True, check=True,
                          env=os.environ | {"LLM_LAB_WORKSPACE": str(tmp_path)})
    assert "your code is in use: m0_basics.sampler\n" in done.stderr


def test_a_workspace_without_code_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt folder would run the milestone's own code, as if it were the learner's."""
    monkeypatch.setattr("m0_basics.tools.cli.app.learner_modules", list)
    monkeypatch.setattr(sys, "argv", ["m0_basics", "generate"])
    monkeypatch.setenv("LLM_LAB_WORKSPACE", str(tmp_path))
    say_whose_code_runs()
    assert capsys.readouterr().err == f"no code of yours in {tmp_path}\n"
    (tmp_path / "m7_gptq").mkdir()
    (tmp_path / "m7_gptq/rtn.py").touch()                   # of a milestone that this command does not load
    say_whose_code_runs()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LLM_LAB_WORKSPACE", "workspce")
    with pytest.raises(ConfigError, match="LLM_LAB_WORKSPACE='workspce' is not valid; allowed: a folder that"):
        say_whose_code_runs()
    monkeypatch.setattr(sys, "argv", ["m0_basics", "exercise", "start", "1"])
    say_whose_code_runs()
