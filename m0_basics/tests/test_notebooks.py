"""The notebooks: the source and its executed twin are the same, and the outputs are fit to be published.

That they run is checked by executing them: `pytest --nbmake notebooks`.
"""
from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
RENEW = "renew it: jupytext --to ipynb notebooks/{0}.py && pytest --nbmake --overwrite notebooks/{0}.ipynb"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEAKS = re.compile(r"""
      (?<![\w/.:)\]])/(?:[\w.+-]+/)+[\w.+-]*            # /an/absolute/path
    | \b[A-Za-z]:\\+\w                                  # C:\path
    | \b[\w-]+@[\w-]+\b                                 # user@host
    | \b[\w-]+\.(?:local|lan|internal|localdomain)\b    # a host in a private network
    | \b\d{1,3}(?:\.\d{1,3}){3}\b                       # its address
    """, re.VERBOSE)

by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def executed(source: Path) -> nbformat.NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def code_cells(source: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in executed(source).cells if cell.cell_type == "code"]


def images(cell: nbformat.NotebookNode) -> list[bytes]:
    return [base64.b64decode(o.data["image/png"]) for o in cell.outputs if "image/png" in o.get("data", {})]


def test_sources_and_executed_notebooks_come_in_pairs() -> None:
    assert SOURCES
    assert [path.stem for path in SOURCES] == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@by_name
def test_both_hold_the_same_cells(source: Path) -> None:
    written, run = ([(cell.cell_type, cell.source) for cell in notebook.cells]
                    for notebook in (jupytext.read(source), executed(source)))
    assert written == run, RENEW.format(source.stem)


@by_name
def test_every_cell_ran_once_in_order_without_complaint(source: Path) -> None:
    cells = code_cells(source)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), RENEW.format(source.stem)
    bad = [o for cell in cells for o in cell.outputs
           if o.output_type == "error" or (o.output_type == "stream" and o.name == "stderr")]
    assert not bad


@by_name
def test_pictures(source: Path) -> None:
    """Each cell that draws has its picture."""
    drawn = [len(images(cell)) for cell in code_cells(source) if "plt.show()" in cell.source]
    assert drawn == [1] * len(drawn)
    assert len(drawn) >= 5
    assert all(image.startswith(PNG_SIGNATURE) for cell in code_cells(source) for image in images(cell))


@by_name
def test_nothing_names_the_machine(source: Path) -> None:
    notebook = executed(source)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
        found = LEAKS.findall(json.dumps([cell.get("outputs", []), cell.metadata], ensure_ascii=False))
        assert not found, found
    assert not LEAKS.findall(json.dumps(notebook.metadata))


@pytest.mark.parametrize("text, leaks", [
    ("File /home/jo/lab/model.py", True), ("'/opt/venv/lib'", True), ("C:\\\\Users\\\\jo", True), ("jo@box:~$", True),
    ("box-7.internal", True), ("at 10.0.0.12", True),
    ("295 FLOP/byte", False), ("tokens/s", False), ("q . k = -13.4724", False), ("| 1 | 2.0 | 3.5 |", False),
    ("k and v of shape [30, 1920, 3, 64]", False), ("module 'm0_basics.model'", False),
])
def test_what_counts_as_naming_the_machine(text: str, leaks: bool) -> None:
    assert bool(LEAKS.search(text)) == leaks


@by_name
def test_prose_quotes_no_numbers(source: Path) -> None:
    """A number is printed by the cell that worked it out. Headings, lists and code may hold digits."""
    for cell in jupytext.read(source).cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"`[^`]*`|^#+ .*$|^\d+\. |\bsections? \d+", "", cell.source, flags=re.MULTILINE)
            assert not re.findall(r".*\d.*", prose)
