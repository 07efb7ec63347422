"""The check of all pages: this folder's are true, and each kind of planted error is found."""
from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from interview import check
from interview.cli import app
from interview.library import ROOT
from m0_basics.config import ConfigError
from m0_basics.tools.documents.factbook import Fact, Facts
from m0_basics.tools.documents.tidy import untidy
from m0_basics.tools.testing.documents import DocumentConformance

FOLDER = ROOT / "interview"
MARKED = "{0}<!-- fact: size -->"


def test_this_folder_s_pages_are_true() -> None:
    found = check.check_package("interview")
    assert found.problems == ()
    assert found.entries == 35 and found.numbers > 300
    assert [p for f in sorted(FOLDER.glob("*.md")) for p in untidy(f)] == []


def test_what_concerns_all_pages_is_true() -> None:
    assert check.check_whole() == []


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """m9_lab with one page, and a fact: size = 23,040."""
    folder = tmp_path / "m9_lab"
    folder.mkdir()
    (folder / "code.py").write_text("def run(): ...\n")
    for name in ("m9_lab", "m9_lab.tools", "m9_lab.tools.facts"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(check, "pairs", lambda folder: [])
    facts = Facts(folder, {"g": lambda: {"size": Fact(23040, "B")}})
    monkeypatch.setattr(sys.modules["m9_lab.tools.facts"], "FACTS", facts, raising=False)
    return folder


@pytest.mark.parametrize(("text", "problem"), [
    (MARKED.format("23,040"), ""),
    (MARKED.format("23,041"), "README.md:1: size is 23,040, but the text shows 23,041"),
    ("7<!-- fact: other -->", "README.md:1: there is no fact other"),
    ("`m9_lab/code.py::run`", ""),
    ("`m9_lab/code.py::walk`", "README.md:1: m9_lab/code.py has no walk"),
    ("`m9_lab/gone.py::run`", "README.md:1: there is no file m9_lab/gone.py"),
    ("[a](gone.md)", "README.md:1: gone.md leads nowhere"),
    ("`python -m m1_offline facts`", ""),
    ("x\n`python -m m1_offline dance`", "README.md:2: python -m m1_offline has no command dance; it has "),
    ("`python -m m8_nothing facts`", "README.md:1: python -m m8_nothing does not exist"),
    ("`python -m m0_basics.tools.nothing`", "README.md:1: python -m m0_basics.tools.nothing does not exist"),
    ("`python -m interview quiz`, `python -m pip install`", ""),
    ("`python -m interview sing`", "README.md:1: python -m interview has no command sing"),
])
def test_planted_errors(package: Path, text: str, problem: str) -> None:
    (package / "README.md").write_text(text + "\n", encoding="utf-8")
    found = check.check_package("m9_lab", package.parent).problems
    assert len(found) == bool(problem)
    assert all(p.startswith(problem) for p in found)


def test_facts_that_cannot_be_worked_out_are_a_problem(package: Path) -> None:
    def broken() -> dict[str, Fact]:
        raise ConfigError("bench.json cannot be read")
    sys.modules["m9_lab.tools.facts"].FACTS = Facts(package, {"g": broken})             # type: ignore[attr-defined]
    (package / "README.md").write_text(MARKED.format("23,041"), encoding="utf-8")
    assert check.check_package("m9_lab", package.parent).problems == (
        "m9_lab: its facts cannot be worked out: bench.json cannot be read",)


def test_a_page_without_its_translation(tmp_path: Path) -> None:
    (tmp_path / "INTERVIEW.md").write_text("# None\n")
    assert check.check_entries(tmp_path) == [f"{tmp_path.name} lacks INTERVIEW.zh-CN.md"]


@pytest.mark.parametrize(("now", "problems"), [(100.0, 0), (149.0, 0), (51.0, 0), (151.0, 1), (49.0, 1)])
def test_what_is_measured_again_may_move_by_the_tolerance(package: Path, monkeypatch: pytest.MonkeyPatch, now: float,
                                                          problems: int) -> None:
    monkeypatch.setattr(check, "ROOT", package.parent)
    facts = Facts(package, measured={"speed": lambda: {"walk": Fact(100.0, "ns"), "unquoted": Fact(1.0)}})
    facts.measure()
    stored = facts.store.read_bytes()
    sys.modules["m9_lab.tools.facts"].FACTS = facts                                     # type: ignore[attr-defined]
    (package / "README.md").write_text("100<!-- fact: walk -->", encoding="utf-8")
    again = {"walk": Fact(now, "ns"), "unquoted": Fact(9.0)}
    found = check.measure_again("m9_lab", 0.5, measure=lambda book, group: again)
    assert len(found) == problems
    assert all("walk is" in p and "100 is stored" in p and "allowed are 50%" in p for p in found)
    assert facts.store.read_bytes() == stored
    with pytest.raises(ConfigError, match=r"measure='x' is not valid; allowed: speed"):
        check.measure_again("m9_lab", 0.5, ["x"])


def test_the_command_s_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    good = check.Checked("interview", 1, 2, 3, ())
    bad = check.Checked("interview", 1, 2, 3, tuple(f"README.md:{i}: wrong" for i in range(50)))
    monkeypatch.setattr(check, "check_whole", list)
    monkeypatch.setattr(check, "packages", lambda: ["interview"])
    monkeypatch.setattr(check, "check_package", lambda name: good)
    result = CliRunner().invoke(app, ["check"])
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "all true")
    monkeypatch.setattr(check, "check_package", lambda name: bad)
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 1
    assert "... and 10 more" in result.output and result.output.splitlines()[-1] == "50 problems"
    assert "README.md:49" in CliRunner().invoke(app, ["check", "interview"]).output
    result = CliRunner().invoke(app, ["check", "m9"])
    assert isinstance(result.exception, ConfigError) and "allowed: interview" in str(result.exception)


def test_links_and_evidence_are_those_of_the_milestones() -> None:
    """The same functions that every milestone's own tests use: one rule, one place."""
    assert check.check_links.__module__ == check.check_evidence.__module__ == DocumentConformance.__module__
