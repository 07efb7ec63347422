"""What a milestone changes, beside what it replaces: cut out of the code, in a terminal and as a page."""
from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from m0_basics.config import ConfigError
from m0_basics.tools.documents import changes
from m0_basics.tools.documents.changes import find_change, page, previous_milestone, read_changes, read_symbol, show

TABLE = ("part\tbefore\tafter\twhat changes\nsum\tm0_a/code.py::A.add\tm1_b/code.py::add\tFaster.\n"
         "new\t\tm1_b/code.py::sub\tAlso.\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two milestones."""
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    for name in ("m0_a", "m1_b"):
        (tmp_path / name / "tools").mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "llm.py").write_text(f"import x\nmade_of = {name!r}\n")
    (tmp_path / "m0_a/code.py").write_text("class A:\n    def add(self, a, b):\n        # slow\n        return a + b\n")
    (tmp_path / "m1_b/code.py").write_text("def add(a, b):\n    return b + a\n\n\ndef sub(a, b): return a - b\n")
    (tmp_path / "m1_b/tools/changes.tsv").write_text(TABLE)
    return tmp_path


def printed(package: str, part: str | None, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    show(package, part, console)
    return console.export_text()


def test_code_is_cut_out_at_the_margin(tree: Path) -> None:
    assert read_symbol("m0_a/code.py::A.add") == "def add(self, a, b):\n    # slow\n    return a + b\n"
    with pytest.raises(ConfigError, match=r"m0_a/gone\.py::A"):
        read_symbol("m0_a/gone.py::A")


def test_both_sides_are_shown(tree: Path) -> None:
    narrow, wide = printed("m1_b", "sum", 80), printed("m1_b", "sum", 200)
    assert narrow.index("m0_a/code.py::A.add") < narrow.index("m1_b/code.py::add")
    assert next(line for line in wide.splitlines() if "A.add" in line).count("code.py::") == 2      # beside each other
    assert all(len(line) <= 80 for line in narrow.splitlines())
    assert "return a - b" in printed("m1_b", "new", 80)
    assert "-made_of = 'm0_a'" in (diff := printed("m1_b", "llm", 80)) and "+made_of = 'm1_b'" in diff
    for width in (80, 200):
        table = printed("m1_b", None, width)
        assert all(word in table for word in ("sum", "A.add", "Faster.", "llm.py", "changes llm"))
    assert "first milestone" in printed("m0_a", None, 80)


def test_the_page_has_all_of_it(tree: Path) -> None:
    text = page("m1_b")
    assert "| [sum](#sum) | `A.add` | `add` | Faster. |\n| [new](#new) |  | `sub` | Also. |" in text
    assert "m0: `m0_a/code.py::A.add`\n\n```python\ndef add(self" in text and "-made_of = 'm0_a'" in text
    assert changes.write_page("m1_b").read_text() == text
    with pytest.raises(ConfigError, match="one before it"):
        page("m0_a")


def test_what_is_wrong_is_said(tree: Path) -> None:
    with pytest.raises(ConfigError, match="part='sums' is not valid; allowed: llm, sum, new"):
        find_change("m1_b", "sums")
    (tree / "m1_b/tools/changes.tsv").write_text(TABLE + "half\ta row\n")
    with pytest.raises(ConfigError, match="has the row"):
        read_changes("m1_b")
    assert previous_milestone("m0_a") is None and previous_milestone("m1_b") == "m0_a"
