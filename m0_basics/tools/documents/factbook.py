"""Facts: the numbers that documents may quote, each with a name and the code or measurement behind it.

A *computed* fact follows from code and is worked out anew whenever it is asked for. A *measured* fact depends
on a machine, so it is stored with that machine's description and the command that measured it. A *result*
is read from a benchmark's stored JSON. `documents.py` compares the documents with all three.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m0_basics.config import ConfigError, reject

from ..analysis.machine import describe_machine
from ..progress import Progress

Value = int | float | str


@dataclass(frozen=True)
class Fact:
    """A value and its unit ("B", "ns", "tokens/s", "ratio", "%"; empty for a plain count)."""

    value: Value
    unit: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float, str)):
            raise reject("value", self.value, "a number or text")


@dataclass(frozen=True)
class Result:
    """A number inside a stored JSON file: `Result("bench.json", "engines.m1.tokens_per_s", "tokens/s")`.

    The path's steps are keys of objects, or positions in lists.
    """

    file: str
    path: str
    unit: str = ""


class Facts:
    """The facts of one milestone, in groups: each function works out, or measures, several at once.

        FACTS = Facts(Path(__file__).parents[1],
                      computed={"cache": lambda: {"kv.bytes_per_token": Fact(23040, "B")}},
                      measured={"microbench": microbench.run_all},
                      results={"engine.tokens_per_s": Result("bench.json", "engines.m1.tokens_per_s")})
    """

    def __init__(self, folder: Path, computed: Mapping[str, Callable[[], Mapping[str, Fact | Value]]] | None = None,
                 measured: Mapping[str, Callable[[], Mapping[str, Fact]]] | None = None,
                 results: Mapping[str, Result] | None = None) -> None:
        """`folder` is the milestone's package: measurements are stored, and results read, in its `results/`."""
        self.folder = folder
        self.computed = dict(computed or {})
        self.measured = dict(measured or {})
        self.results = dict(results or {})

    @property
    def store(self) -> Path:
        """Where measured facts lie."""
        return self.folder / "results" / "facts.json"

    def compute(self) -> dict[str, Fact]:
        """Work out every computed fact."""
        return merge(*({name: value if isinstance(value, Fact) else Fact(value) for name, value in group().items()}
                       for group in self.computed.values()))

    def measure(self, groups: Iterable[str] | None = None) -> dict[str, Fact]:
        """Measure the named groups (default: all), store them, and return the facts measured.

        Groups that are not named stay as they are stored, with their own machine: a GPU's numbers and a CPU's
        can lie side by side.
        """
        names = list(self.measured if groups is None else groups)
        if unknown := sorted(set(names) - set(self.measured)):
            raise reject("groups", unknown, ", ".join(self.measured) or "none, nothing is measured here")
        stored = self._stored()
        facts: dict[str, Fact] = {}
        with Progress("facts", len(names)) as progress:
            for name in names:
                progress.now(name)
                group = {key: rounded(fact) for key, fact in self.measured[name]().items()}
                stored[name] = {
                    "machine": describe_machine(),
                    "command": f"python -m {self.folder.name} facts --measure {name}",
                    "facts": {key: asdict(fact) for key, fact in group.items()},
                }
                facts = merge(facts, group)
                progress.step()
        self.store.parent.mkdir(parents=True, exist_ok=True)
        self.store.write_text(json.dumps({n: stored[n] for n in self.measured if n in stored}, indent=1) + "\n")
        return facts

    def load_measured(self) -> dict[str, Fact]:
        """The measured facts as stored. Groups that were never measured are absent."""
        groups = self._stored().values()
        return merge(*({name: Fact(**fact) for name, fact in group["facts"].items()} for group in groups))

    def load_results(self) -> dict[str, Fact]:
        """The facts that come from benchmark results."""
        return {name: Fact(read_result(self.folder, r.file, r.path), r.unit) for name, r in self.results.items()}

    def all(self) -> dict[str, Fact]:
        """Computed facts, stored measurements and results. Raises ConfigError where two share a name."""
        return merge(self.compute(), self.load_measured(), self.load_results())

    def to_json(self, words: Iterable[str] = ()) -> str:
        """Facts as a JSON object, name -> {"value", "unit"}: all, or those whose name holds one of `words`.

        Raises ConfigError where there is none.
        """
        words, facts = list(words), self.all()
        chosen = {name: fact for name, fact in facts.items() if not words or any(word in name for word in words)}
        if words and not chosen:
            begins = dict.fromkeys(name.partition(".")[0] for name in facts)
            raise reject("names", words, f"parts of fact names, which begin with {', '.join(begins)}")
        return json.dumps({name: asdict(fact) for name, fact in chosen.items()}, indent=1)

    def _stored(self) -> dict[str, Any]:
        return read_json_file(self.store) if self.store.is_file() else {}


def merge(*books: Mapping[str, Fact]) -> dict[str, Fact]:
    """Facts of several sources as one. Raises ConfigError for a name that two of them use."""
    merged: dict[str, Fact] = {}
    for book in books:
        if twice := sorted(set(book) & set(merged)):
            raise ConfigError(f"fact names used twice: {', '.join(twice)}; allowed: one fact to a name")
        merged |= book
    return merged


def read_result(folder: Path, file: str, path: str) -> Value:
    """The number or text at a dotted `path` inside `folder/results/file`. Raises ConfigError if it is not there."""
    node: Any = read_json_file(folder / "results" / file)
    for step in path.split("."):
        try:
            node = node[int(step)] if isinstance(node, list) else node[step]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ConfigError(f"{file} has nothing at {step!r} of {path!r}") from error
    if isinstance(node, bool) or not isinstance(node, (int, float, str)):
        raise ConfigError(f"{path!r} of {file} is not a number or text")
    return node


def read_json_file(path: Path) -> dict[str, Any]:
    """A stored JSON object. Raises ConfigError for a file that is missing or damaged."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from error
    return data


def rounded(fact: Fact) -> Fact:
    """A measured fact to four significant digits: more would be noise. Whole numbers stay as they are."""
    return Fact(float(f"{fact.value:.4g}"), fact.unit) if isinstance(fact.value, float) else fact
