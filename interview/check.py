"""Are the interview pages true? Every number is worked out again, every piece of code that is named is looked up.

    python -m interview check                    numbers, code, commands, form, translations, index, sources
    python -m interview check --measure m0       measures again what m0's pages quote as measured on a machine

A computed number fails if it differs from its fact by more than half a unit of the last digit that is shown. One that
is measured again fails if it differs from what is stored by more than the stated share (`--tolerance`).
"""
from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from m0_basics.config import ConfigError, reject
from m0_basics.tools.documents.checks import check_code_references, check_document, find_markers
from m0_basics.tools.documents.factbook import Fact, Facts
from m0_basics.tools.documents.interview import check_interview, check_translation, parse_interview
from m0_basics.tools.documents.quotes import read_document
from m0_basics.tools.testing.documents import check_evidence, check_links

from .index import check_sources, load_sources, outdated
from .library import FOLDER, LANGUAGES, PAGES, ROOT, load_questions
from .points import check_points

_COMMAND = re.compile(r"python -m (?P<module>[\w.]+)(?:[ ](?P<command>[a-z][\w-]*))?")


@dataclass(frozen=True)
class Checked:
    """One package's result: what was looked at, and what is wrong."""

    package: str
    documents: int
    numbers: int
    entries: int
    problems: tuple[str, ...]


def packages(root: Path = ROOT) -> list[str]:
    """What has interview pages: the milestones with an INTERVIEW.md, and `interview` itself."""
    return [*sorted(f.parent.name for f in root.glob("m[0-7]_*/INTERVIEW.md")), "interview"]


def check_package(package: str, root: Path = ROOT) -> Checked:
    """Everything about the pages of one package."""
    folder = root / package
    pages = sorted(f for f in folder.glob("*.md"))
    try:
        facts: Mapping[str, Fact] = facts_of(package).all()
        problems = []
    except (ConfigError, ImportError) as error:
        facts, problems = {}, [f"{package}: its facts cannot be worked out: {error}"]
    for file in pages:
        if facts:
            problems += check_document(file, facts)
        problems += check_code_references(file, root) + check_links(file) + check_commands(file)
    problems += check_entries(folder)
    count = sum(len(list(find_markers(read_document(file)))) for file in pages)
    entries = sum(len(parse_interview(english)) for english, _ in pairs(folder))
    return Checked(package, len(pages), count, entries, tuple(problems))


def check_entries(folder: Path) -> list[str]:
    """Form, evidence, points and translation of the pages with entries."""
    problems: list[str] = []
    for english, chinese in pairs(folder):
        if missing := [f.name for f in (english, chinese) if not f.is_file()]:
            problems.append(f"{folder.name} lacks {', '.join(missing)}")
            continue
        problems += [p for f in (english, chinese) for p in check_interview(f) + check_evidence(f)]
        problems += [p for f in (english, chinese) for entry in parse_interview(f) for p in check_points(entry)]
        problems += check_translation(english, chinese)
    return problems


def pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Pages with entries, in both languages."""
    names = ["INTERVIEW"] if (folder / "INTERVIEW.md").is_file() else list(PAGES)
    return [(folder / f"{name}.md", folder / f"{name}.zh-CN.md") for name in names]


def facts_of(package: str) -> Facts:
    """The facts of a package, from its `tools/facts.py`."""
    facts: Facts = importlib.import_module(f"{package}.tools.facts").FACTS
    return facts


def check_commands(path: Path) -> list[str]:
    """Commands of the lab that a page names and that do not exist."""
    text, problems = path.read_text(encoding="utf-8"), []
    for match in _COMMAND.finditer(text):
        module, command = match["module"].rstrip("."), match["command"]
        if not re.match(r"(m\d_|interview\b)", module):
            continue
        line = text.count("\n", 0, match.start()) + 1
        if (known := commands_of(module)) is None:
            problems.append(f"{path.name}:{line}: python -m {module} does not exist")
        elif command and known and command not in known:
            problems.append(f"{path.name}:{line}: python -m {module} has no command {command}; it has "
                            f"{', '.join(sorted(known))}")
    return problems


def commands_of(module: str) -> frozenset[str] | None:
    """The commands of `python -m module`; empty where it is not a package of the lab, None where it does not exist."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if found is None:
        return None
    if "." in module:
        return frozenset()
    if module not in _commands:
        if module == "interview":
            from .cli import app
        else:
            from m0_basics.tools.cli.app import build_app
            app = build_app(module)
        names = [c.name or (c.callback.__name__.replace("_", "-") if c.callback else "")
                 for c in app.registered_commands]
        _commands[module] = frozenset([*names, *(g.name or "" for g in app.registered_groups)])
    return _commands[module]


_commands: dict[str, frozenset[str]] = {}


def check_whole() -> list[str]:
    """What concerns all pages together: ids, sources, the made parts."""
    problems: list[str] = []
    for language in LANGUAGES:
        ids = [q.id for q in load_questions(language)]
        problems += [f"{i} is the id of {ids.count(i)} entries" for i in sorted({i for i in ids if ids.count(i) > 1})]
        problems += [f"{p} ({language})" for p in check_sources(load_sources(), ids)]
    return problems + [f"{name} is out of date; bring it up to date with: python -m interview index --write"
                       for name in outdated(folder=FOLDER)]


def measure_again(package: str, tolerance: float, groups: Iterable[str] = (),
                  measure: Callable[[Facts, str], Mapping[str, Fact]] | None = None) -> list[str]:
    """Measure groups of facts again, without storing them; name those quoted that moved by more than `tolerance`."""
    book = facts_of(package)
    names = list(groups) or list(book.measured)
    if unknown := sorted(set(names) - set(book.measured)):
        raise reject("measure", unknown[0], ", ".join(book.measured) or f"nothing: {package} has only computed facts "
                     "and results of its bench")
    quoted = {m.name for f in sorted((ROOT / package).glob("*.md")) for m in find_markers(read_document(f))}
    stored, problems = book.load_measured(), []
    for name in names:
        found = measure(book, name) if measure else book.measured[name]()
        for key, fact in found.items():
            old = stored.get(key)
            if key not in quoted or old is None or isinstance(fact.value, str) or isinstance(old.value, str):
                continue
            moved = abs(fact.value / old.value - 1) if old.value else abs(fact.value)
            if moved > tolerance:
                problems.append(f"{package}: {key} is {fact.value:.4g} now, {old.value:.4g} is stored: it moved by "
                                f"{moved:.0%}, allowed are {tolerance:.0%}")
    return problems
