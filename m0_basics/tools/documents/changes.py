"""What a milestone changes: each part it replaces beside the part that does the same job one milestone earlier.

    tools/changes.tsv       part <tab> before <tab> after <tab> what changes, in a sentence
    attention               m0_basics/attention.py::FullAttention.forward ...

The code is cut out of the files as they are, so neither the terminal's view nor the page can drift. `llm`, the
difference of the two composition roots, comes first without being listed. The first milestone has no earlier one.
"""
from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from m0_basics.config import ConfigError, reject

from ..exercise.source import find_function, function_text

ROOT = Path(__file__).parents[3]
PAGE = "tools/CHANGES.md"
_SIDE_BY_SIDE = 140         # columns of a terminal from which on two pieces of code stand beside each other


@dataclass(frozen=True)
class Change:
    """One part. `before` and `after` name code as `package/file.py::symbol`; `before` is empty for what is new."""

    part: str
    before: str
    after: str
    what: str

    @property
    def code(self) -> list[tuple[str, str]]:
        """(name, source) of both sides, without the indentation of a method."""
        return [(name, read_symbol(name)) for name in (self.before, self.after) if name]


def read_changes(package: str) -> list[Change]:
    """The rows of a milestone's table; none where it has no table."""
    file = ROOT / package / "tools" / "changes.tsv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t"))[1:]
    if wrong := [row for row in rows if len(row) != 4]:
        raise ConfigError(f"{package}/tools/changes.tsv has the row {wrong[0]}; allowed: part, before, after, what")
    return [Change(*row) for row in rows]


def find_change(package: str, part: str) -> Change:
    """The row of a part. Raises ConfigError that lists the parts."""
    changes = read_changes(package)
    for change in changes:
        if change.part == part:
            return change
    raise reject("part", part, ", ".join(["llm", *(c.part for c in changes)]))


def read_symbol(name: str) -> str:
    """The source of `package/file.py::Class.method` as it stands in the tree, its first column at the margin."""
    path, _, symbol = name.partition("::")
    file = ROOT / path
    if not file.is_file() or not symbol:
        raise ConfigError(f"change={name!r} is not valid; allowed: package/file.py::symbol of this tree")
    source = file.read_bytes()
    text = function_text(source, find_function(source, symbol, file)).decode()
    indent = len(text) - len(text.lstrip(" "))
    return re.sub(rf"^ {{{indent}}}", "", text, flags=re.MULTILINE).rstrip() + "\n"


def symbol(name: str) -> str:
    """`Class.method` of `package/file.py::Class.method`; "" of ""."""
    return name.rpartition("::")[2]


def previous_milestone(package: str) -> str | None:
    """The milestone before, or None."""
    names = sorted(file.parent.name for file in ROOT.glob("m[0-7]_*/__init__.py"))
    at = names.index(package)
    return names[at - 1] if at else None


def llm_diff(package: str, before: str) -> str:
    """How the composition root differs, as a unified diff."""
    old, new = ((ROOT / name / "llm.py").read_text(encoding="utf-8").splitlines() for name in (before, package))
    lines = difflib.unified_diff(old, new, f"{before}/llm.py", f"{package}/llm.py", n=1, lineterm="")
    return "\n".join(lines) + "\n"


def show(package: str, part: str | None, console: Console) -> None:
    """Print the table of all parts, or one part: both sides of it."""
    before = previous_milestone(package)
    if before is None:
        console.print(f"{package} is the first milestone: nothing comes before it. Start with {package}/llm.py.")
        return
    if part is None:
        console.print(_overview(package, before, console.width))
        console.print(f"Look at one: python -m {package} changes llm", soft_wrap=True)
    elif part == "llm":
        console.print(Syntax(llm_diff(package, before), "diff", theme="ansi_dark", word_wrap=True))
    else:
        change = find_change(package, part)
        console.print(f"[bold]{change.part}[/bold]: {change.what}", soft_wrap=True)
        panels = [_panel(name, code, console.width) for name, code in change.code]
        wide = console.width >= _SIDE_BY_SIDE and len(panels) == 2
        console.print(Columns(panels, equal=True, expand=True) if wide else Group(*panels))


def _overview(package: str, before: str, width: int) -> RenderableType:
    """A line for each part where there is room, else two."""
    title = f"what {package} changes against {before}"
    names = [("llm", "llm.py", "llm.py", "The composition root, which names every part.")]
    names += [(c.part, symbol(c.before), symbol(c.after), c.what) for c in read_changes(package)]
    if width < _SIDE_BY_SIDE:
        return Text("\n".join([title, *(f"\n{part}: {f'{old} -> ' if old else 'new: '}{new}\n    {what}"
                                       for part, old, new, what in names)]))
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("part", "before", "after", "what changes"):
        table.add_column(column, overflow="fold")
    for row in names:
        table.add_row(*row)
    return table


def _panel(name: str, code: str, width: int) -> RenderableType:
    side = width if width < _SIDE_BY_SIDE else width // 2 - 2
    source = Syntax(code.rstrip(), "python", theme="ansi_dark", word_wrap=True)
    if len(name) > side - 6:            # a frame would cut its title off
        return Group(Text(name), Panel(source, width=side))
    return Panel(source, title=name, title_align="left", width=side)


def page(package: str) -> str:
    """The same as a Markdown page. Raises ConfigError for the first milestone, which has none."""
    before = previous_milestone(package)
    if before is None:
        raise reject("package", package, "a milestone that has one before it")
    return "\n".join(_page_lines(package, before)) + "\n"


def _page_lines(package: str, before: str) -> Iterator[str]:
    short, other = package.partition("_")[0], before.partition("_")[0]
    yield f"# What {short} changes against {other}"
    yield f"\nWritten by `python -m {package} changes --write` out of the code. In a terminal:"
    yield f"`python -m {package} changes PART`, with both sides beside each other where there is room.\n"
    changes = read_changes(package)
    if changes:
        yield f"| part | {other} | {short} | what changes |\n|---|---|---|---|"
        for c in changes:
            old = f"`{symbol(c.before)}`" if c.before else ""
            yield f"| [{c.part}](#{c.part.replace(' ', '-')}) | {old} | `{symbol(c.after)}` | {c.what} |"
    for c in changes:
        yield f"\n## {c.part}\n\n{c.what}\n"
        sides = [*([(other, c.before)] if c.before else []), (short, c.after)]
        for title, name in sides:
            yield f"{title}: `{name}`\n\n```python\n{read_symbol(name)}```\n"
    yield "\n## llm\n\nThe composition root, which names every part:\n"
    yield f"```diff\n{llm_diff(package, before)}```"


def write_page(package: str) -> Path:
    """Write the page into the milestone's folder."""
    file = ROOT / package / PAGE
    file.write_text(page(package), encoding="utf-8")
    return file
