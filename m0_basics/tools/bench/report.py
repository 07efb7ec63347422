"""What a benchmark leaves behind: a table on the screen, a JSON file, and figures.

The JSON holds the machine, the command and every round as measured, so that a figure in a document can be traced
to the run that it came from, and drawn again.
"""
from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from m0_basics.config import ConfigError, reject

from .harness import Comparison, ContenderResult
from .metrics import SCHEMA_VERSION, RunMetrics, Stats

_WIDE = 110             # columns that the whole table needs


@dataclass(frozen=True)
class BenchReport:
    """Everything one benchmark measured. `measurements` holds what is not a comparison: plain JSON values."""

    package: str                                            # "m0_basics"
    command: str
    created: str                                            # UTC, ISO 8601
    machine: Mapping[str, Any]
    config: Mapping[str, Any]                               # the LLM options that were asked for
    comparisons: tuple[Comparison, ...]
    measurements: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, package: str, config: Mapping[str, Any], comparisons: tuple[Comparison, ...],
               measurements: Mapping[str, Any] | None = None) -> Self:
        """A report of this process, on this machine, now."""
        from ..analysis.machine import describe_machine
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(package, command_line(), created, describe_machine(), dict(config), comparisons, measurements or {})

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return {"schema_version": SCHEMA_VERSION, "package": self.package, "command": self.command,
                "created": self.created, "machine": dict(self.machine), "config": dict(self.config),
                "comparisons": [c.to_dict() for c in self.comparisons], "measurements": dict(self.measurements)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote. Raises ConfigError for another schema version."""
        if data.get("schema_version") != SCHEMA_VERSION:
            raise reject("schema_version", data.get("schema_version"), str(SCHEMA_VERSION))
        return cls(data["package"], data["command"], data["created"], data["machine"], data["config"],
                   tuple(Comparison.from_dict(c) for c in data["comparisons"]), data["measurements"])

    def save(self, path: Path) -> Path:
        """Write the JSON file, with the folder that it lies in."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1, default=str) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a JSON file that `save` wrote."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path} is not a benchmark result: {error}") from error

    def print(self, console: Console | None = None) -> None:
        """Show every comparison as a table."""
        console = console or Console()
        for comparison in self.comparisons:
            console.print(comparison_table(comparison, wide=console.width >= _WIDE))


def comparison_table(comparison: Comparison, wide: bool = True) -> Table:
    """One line per contender: throughput, ratio to the baseline, latencies and equal tokens, all medians of the rounds.

    `wide` adds the range of the ratio and the peak memory; without them the table fits into 80 columns.
    """
    work = comparison.workload
    notes = [f"{r.name}: {r.note}" for r in comparison.contenders if r.note]
    about = (f"Medians of {len(comparison.contenders[0].rounds)} rounds, times in ms. Ratio and same tokens: "
             f"against {comparison.baseline}.")
    many = "" if work["num_requests"] == 1 else "s"
    table = Table(title=f"{work['name']}: {work['num_requests']} request{many}, {work['num_prompt_tokens']} prompt and "
                        f"{work['num_output_tokens']} output tokens",
                  caption="\n".join([about, *notes]), caption_justify="left", box=SIMPLE_HEAD)
    rows = [_cells(result, work["num_requests"], wide) for result in comparison.contenders]
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table


def _cells(result: ContenderResult, num_requests: int, wide: bool) -> dict[str, str]:
    """Column -> text."""
    def show(metric: Callable[[RunMetrics], float | None], digits: int = 0) -> str:
        value = result.median_of(metric)
        return "-" if value is None else f"{value:.{digits}f}"

    def latency(name: str, which: str, digits: int = 0) -> str:
        def read(metrics: RunMetrics) -> float | None:
            stats: Stats | None = getattr(metrics, name)
            return None if stats is None else float(getattr(stats, which))
        return show(read, digits)

    cells = {"contender": result.name, "tok/s": f"{result.output_throughput:.1f}", "ratio": f"{result.ratio:.2f}",
             "range": f"{min(result.ratios):.2f}-{max(result.ratios):.2f}", "TTFT": latency("ttft_ms", "median"),
             "P99": latency("ttft_ms", "p99"), "TPOT": latency("tpot_ms", "median", 1),
             "ITL P99": latency("itl_ms", "p99", 1),
             "RSS MB": show(lambda m: None if m.memory is None else m.memory.rss_bytes / 1e6),
             "added": show(lambda m: None if m.memory is None else m.memory.rss_added_bytes / 1e6),
             "same": f"{result.identical_requests}/{num_requests}"}
    return {name: text for name, text in cells.items() if wide or name not in ("range", "RSS MB", "added")}


def command_line() -> str:
    """The command that started this process, as one would type it again in the repository.

    A place outside of it is called by its name: `--peer-python <vllm>` for the Python of an environment `vllm`.
    """
    script = Path(sys.argv[0].removeprefix(f"{Path.cwd()}{os.sep}") or "python")
    if script.name == "__main__.py":
        head = f"python -m {script.parent.name}"
    elif not script.is_absolute() and (script.parent / "__init__.py").is_file():       # of a package: run as a module
        head = f"python -m {'.'.join(script.with_suffix('').parts)}"
    else:
        head = f"python {_without_place(str(script))}"
    return " ".join([head, *map(_without_place, sys.argv[1:])])


def _without_place(argument: str) -> str:
    """An argument as a shell takes it, of a path what means something on another machine too."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value.removeprefix(f"{Path.cwd()}{os.sep}"))
    if not Path(value).is_absolute():
        return shlex.quote(argument)
    if path.is_absolute():
        return f"{option}{equals}<{(path.parent.parent if path.parent.name == 'bin' else path).name}>"
    return shlex.quote(f"{option}{equals}{path}")
