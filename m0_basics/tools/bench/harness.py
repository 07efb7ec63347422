"""Run contenders against each other: A B C A B C ..., in one process run, on one workload.

The speed of a shared machine drifts by more than what is to be shown. So contenders take turns, and a ratio is
taken within a round, between two runs that stand side by side; the median of those ratios is the result.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from m0_basics.config import check_int, reject

from ..progress import Progress
from .contender import Contender, RunResult
from .metrics import SLO, RunMetrics
from .workloads import Workload

OnResult = Callable[[int, Contender, RunResult], None]


@dataclass(frozen=True)
class ContenderResult:
    """One contender's rounds, and how it stands against the baseline."""

    name: str
    note: str
    rounds: tuple[RunMetrics, ...]
    ratios: tuple[float, ...]               # output throughput over the baseline's, round by round
    identical_requests: int                 # requests whose tokens equal the baseline's in every round
    probes: tuple[float, ...] = ()          # what the machine offered in each round, where that was measured

    def median_of(self, metric: Callable[[RunMetrics], float | None]) -> float | None:
        """The median over the rounds of one number of `RunMetrics`; None where a round lacks it."""
        values = [metric(r) for r in self.rounds]
        known = [v for v in values if v is not None]
        return median(known) if len(known) == len(values) else None

    @property
    def output_throughput(self) -> float:
        """Output tokens per second, median of the rounds."""
        return median(r.output_throughput for r in self.rounds)

    @property
    def ratio(self) -> float:
        """Output throughput over the baseline's: the median of the rounds' ratios."""
        return median(self.ratios)


@dataclass(frozen=True)
class Comparison:
    """Contenders on one workload."""

    workload: Mapping[str, Any]             # `Workload.summary()`
    baseline: str
    contenders: tuple[ContenderResult, ...]

    def __getitem__(self, name: str) -> ContenderResult:
        for result in self.contenders:
            if result.name == name:
                return result
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON: every round as measured, and the medians that tables quote."""
        data = dataclasses.asdict(self)
        for entry, result in zip(data["contenders"], self.contenders, strict=True):
            entry["output_throughput"] = result.output_throughput
            entry["ratio"] = result.ratio
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        results = tuple(ContenderResult(entry["name"], entry["note"],
                                        tuple(RunMetrics.from_dict(r) for r in entry["rounds"]),
                                        tuple(entry["ratios"]), entry["identical_requests"],
                                        tuple(entry.get("probes", ())))
                        for entry in data["contenders"])
        return cls(dict(data["workload"]), data["baseline"], results)


def compare(contenders: Sequence[Contender], workload: Workload, rounds: int = 3, baseline: str | None = None,
            slo: SLO | None = None, warm_up: bool = True, on_result: OnResult | None = None,
            probe: Callable[[], float] | None = None) -> Comparison:
    """Run every contender `rounds` times, in turns, and set each against `baseline` (default: the first).

    `on_result` sees each run as it ends, with its records and tokens. `probe` measures what the machine offers, which
    drifts: it is called before and after each run, and the mean is kept beside it. The contenders stay open.
    """
    check_int("rounds", rounds, 1)
    names = [c.name for c in contenders]
    if not names or len(set(names)) != len(names):
        raise reject("contenders", names, "at least one, each with a name of its own")
    baseline = baseline or names[0]
    if baseline not in names:
        raise reject("baseline", baseline, ", ".join(names))
    results: dict[str, list[RunResult]] = {name: [] for name in names}
    probes: dict[str, list[float]] = {name: [] for name in names}
    with Progress(workload.name, len(contenders) * rounds) as progress:
        for contender in contenders if warm_up else ():
            progress.now(f"warming up, {contender.name}")
            contender.warm_up(workload)
        for number in range(rounds):
            for contender in contenders:
                progress.now(f"round {number + 1} of {rounds}, {contender.name}")
                before = probe() if probe else 0.0
                result = contender.run(workload, slo)
                if probe:
                    probes[contender.name].append((before + probe()) / 2)
                results[contender.name].append(result)
                progress.step()
                if on_result is not None:
                    on_result(number, contender, result)
    reference = results[baseline]
    return Comparison(workload.summary(), baseline, tuple(
        ContenderResult(
            c.name, c.note, tuple(r.metrics for r in results[c.name]),
            tuple(r.metrics.output_throughput / b.metrics.output_throughput
                  for r, b in zip(results[c.name], reference, strict=True)),
            count_identical([r.token_ids for r in results[c.name]], [b.token_ids for b in reference]),
            tuple(probes[c.name]))
        for c in contenders))


def count_identical(rounds: Iterable[Sequence[Sequence[int]]], reference: Iterable[Sequence[Sequence[int]]]) -> int:
    """Requests whose tokens equal the reference's in every round."""
    return sum(all(pairs) for pairs in zip(*([tuple(a) == tuple(b) for a, b in zip(ours, theirs, strict=True)]
                                             for ours, theirs in zip(rounds, reference, strict=True)), strict=True))
