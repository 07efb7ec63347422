"""Keeps documents true: every marked number is compared with its fact, every named piece of code is looked up.

A number is marked by an invisible comment right behind it, or by a row of the map beside the document (`quotes.py`,
which weaves the rows into the text as such comments):

    SmolLM2 keeps 23,040<!-- fact: smollm2.kv_bytes_per_token --> bytes per token,
    1.68<!-- fact: llama2_13b.kv_bytes.2048 /1e9 --> GB for 2048 of them in the larger model.

It has to equal the fact, times or divided by the marker's factor, at the precision shown. "%" right behind the
number shows a fact without the unit "%" times a hundred. Code blocks are left alone.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .factbook import Fact
from .quotes import FENCE, INLINE_CODE, MARKER, lost_quotes, map_file, mask_code, read_document, write_document

_NUMBER = re.compile(r"(?P<number>(?:(?<!\w)[-+−])?\d[\d,]*(?:\.\d+)?)(?P<percent>\s?%)?(?P<close>[*_`]*)$")
_CODE_REFERENCE = re.compile(r"(?P<path>[\w./-]+\.py)::(?P<symbol>[\w.]+)(?:\(\))?")


@dataclass(frozen=True)
class Marker:
    """One marked number of a document."""

    line: int
    name: str
    factor: float               # the fact is multiplied by it before it is compared
    shown: str                  # the text in front of the marker
    start: int                  # where that text's number begins and ends in the document; equal if there is none
    end: int


def check_document(path: Path, facts: Mapping[str, Fact]) -> list[str]:
    """Problems of the marked numbers in a Markdown file, as "file:line: problem"; empty if all are true."""
    markers = find_markers(read_document(path))
    problems = [f"{path.name}:{m.line}: {problem}" for m in markers if (problem := _problem(m, facts))]
    return problems + [f"{path.name}: {q.words!r} is no longer followed by {q.number!r}, the fact {q.fact}: mend the "
                       f"text, or that row of {map_file(path).name}" for q in lost_quotes(path)]


def update_document(path: Path, facts: Mapping[str, Fact]) -> int:
    """Rewrite every marked number whose fact has changed, at the precision shown; return how many were changed.

    For use after measuring again. Read the sentences around them: prose does not update itself.
    """
    text = read_document(path)
    changed = 0
    for marker in reversed(list(find_markers(text))):
        fact = facts.get(marker.name)
        if fact is None or isinstance(fact.value, str) or marker.start == marker.end or not _problem(marker, facts):
            continue
        number = text[marker.start:marker.end]
        decimals = len(number.partition(".")[2])
        separator = "," if "," in number or "." not in number else ""
        new = f"{_target(marker, fact):{separator}.{decimals}f}"
        text = text[:marker.start] + new + text[marker.end:]
        changed += 1
    if changed:
        write_document(path, text)
    return changed


def fact_names(text: str) -> list[str]:
    """Names in the order of their markers, with their factors: what a translation has to repeat."""
    return [m.name if m.factor == 1 else f"{m.name} *{m.factor:g}" for m in find_markers(text)]


def find_markers(text: str) -> Iterator[Marker]:
    """Every marker outside of code."""
    masked = mask_code(text)
    for match in MARKER.finditer(masked):
        before = text[:match.start()]
        shown = _NUMBER.search(before[before.rfind("\n") + 1:])
        offset = before.rfind("\n") + 1
        start, end = (offset + shown.start("number"), offset + shown.end("number")) if shown else (0, 0)
        label = before[start:].strip() if shown else before[-40:]
        yield Marker(text.count("\n", 0, match.start()) + 1, match["name"], _factor(match["factor"]), label, start, end)


def _factor(text: str | None) -> float:
    """"/1e9", "*100" or "/2**30" as a number to multiply by; NaN for anything else."""
    match = re.fullmatch(r"([*/])\s*(?:(\d+)\*\*(\d+)|(\d+(?:\.\d+)?(?:e[+-]?\d+)?))", text or "*1")
    if not match:
        return float("nan")
    number = float(match[2]) ** int(match[3]) if match[2] else float(match[4])
    return number if match[1] == "*" else 1 / number


def _target(marker: Marker, fact: Fact) -> float:
    """The number that should be shown."""
    percent = "%" in marker.shown and fact.unit != "%"
    return float(fact.value) * marker.factor * (100 if percent else 1)


def _problem(marker: Marker, facts: Mapping[str, Fact]) -> str | None:
    if marker.name not in facts:
        return f"there is no fact {marker.name}"
    if marker.factor != marker.factor:
        return f"the factor of {marker.name} is not valid; allowed: * or / and a number, such as /1e9 or /2**30"
    fact = facts[marker.name]
    if isinstance(fact.value, str):
        right = marker.shown.rstrip("*_`").endswith(fact.value)
        return None if right else f"{marker.name} is {fact.value!r}, but the text reads {marker.shown!r}"
    if marker.start == marker.end:
        return f"no number stands right in front of the marker of {marker.name}"
    number = re.match(r"[-+−]?[\d,.]+", marker.shown)
    assert number is not None
    digits = number[0].replace(",", "").replace("−", "-")
    # Half a unit of the last digit, and a hair: a fact that lies on the edge may be rounded either way.
    tolerance = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    target = _target(marker, fact)
    if abs(target - float(digits)) <= tolerance * (1 + 1e-9) + 1e-12 * abs(target):
        return None
    return f"{marker.name} is {target:,.6g}, but the text shows {marker.shown}"


def check_code_references(path: Path, root: Path) -> list[str]:
    """Problems of the references to code in a document: every `path.py::Symbol.method` in backticks must exist.

    Paths are taken from `root`, or from the document's own folder.
    """
    text = FENCE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), path.read_text(encoding="utf-8"))
    problems = []
    for span in INLINE_CODE.finditer(text):
        line = text.count("\n", 0, span.start()) + 1
        for reference in _CODE_REFERENCE.finditer(span[2]):
            file = next((f for f in (root / reference["path"], path.parent / reference["path"]) if f.is_file()), None)
            if file is None:
                problems.append(f"{path.name}:{line}: there is no file {reference['path']}")
            elif reference["symbol"] not in symbols(file):
                problems.append(f"{path.name}:{line}: {reference['path']} has no {reference['symbol']}")
    return problems


@lru_cache(maxsize=256)
def symbols(file: Path) -> frozenset[str]:
    """Dotted names of the classes, functions and assigned names of a Python file, class members included."""
    return frozenset(_symbols(ast.parse(file.read_text(encoding="utf-8")).body, ""))


def _symbols(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name
            yield from _symbols(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + t.id for t in targets if isinstance(t, ast.Name))
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _symbols(node.body + node.orelse, prefix)
