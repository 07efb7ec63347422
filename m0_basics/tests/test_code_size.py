"""The counts of lines, by hand."""
from __future__ import annotations

from pathlib import Path

import pytest

from m0_basics.tools.analysis.code_size import HERE, code_lines, engine_files, entries, functions, report

SOURCE = '''"""A module.

Of some lines.
"""
import os          # 5

X = """text
of two lines"""    # 7, 8


class A:           # 11
    """Doc."""

    def f(self,    # 14
          x):      # 15
        # A comment.
        def g():   # 17
            """Doc."""
            return (1,

                    2)
        return g   # 22
'''


def test_lines_by_hand() -> None:
    """Line 20 is blank, but inside brackets: it holds no token."""
    assert code_lines(SOURCE) == {5, 7, 8, 11, 14, 15, 17, 19, 21, 22}
    assert [(f.name, f.lines) for f in functions(SOURCE)] == [("f", 6), ("g", 3)]


def test_report(tmp_path: Path) -> None:
    """Of an old tree too, whose tools stood beside the engine; the new one says which files those are."""
    old, new = tmp_path / "old" / "m3_paged_kv", tmp_path / "new" / "m3_paged_kv"
    for folder in (old / "__pycache__", new / "tools", new / "kernels"):
        folder.mkdir(parents=True)
    for name in ("__init__", "__main__", "benchmark", "idea", "llm", "swap", "facts"):
        (old / f"{name}.py").write_text("x = 1\ny = 2\n" + "\n" * (name == "swap"))
    (old / "llm.py").write_text(SOURCE)
    for file in (new / "__init__.py", new / "llm.py", new / "tools/facts.py", new / "tools/__init__.py",
                 new / "kernels/swap.py"):
        file.write_text("def f(): return 1\n")
    assert entries(new) == ["__init__.py", "kernels/", "llm.py", "tools/"]
    assert [file.name for file in engine_files(old)] == ["facts.py", "llm.py", "swap.py"]
    assert report(old.parent, new.parent).splitlines() == [
        "m3_paged_kv: 7 entries; engine 12 lines of code in 2 files, decode path 10",
        "  __init__.py __main__.py benchmark.py facts.py idea.py llm.py swap.py",
        "  llm 10, swap 2",
        "longest engine file: m3_paged_kv/llm.py, 22 lines",
        "longest engine function: m3_paged_kv/llm.py::f, 6 lines of code",
    ]
    assert "  tools/: 2\n  kernels/: 1\n" in report(new.parent)


@pytest.mark.slow
def test_this_tree_can_be_counted() -> None:
    assert report(HERE).count("decode path") == len(list(HERE.glob("m[0-7]_*/__init__.py")))
