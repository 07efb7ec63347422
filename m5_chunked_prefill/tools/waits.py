"""Who waits for whom: a short prompt behind a giant one, and streams beside it."""
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from m0_basics.tools.bench import BenchRequest, EngineContender, RunResult, Series, Workload, line_plot

_AT = 0.5               # seconds: the short prompt comes while the giant one runs
_GIANT_AT = 0.5         # the giant one comes while the streams decode


def short_behind_long(contenders: Sequence[EngineContender], giant: int, shorts: Sequence[int], rounds: int,
                      vocab_size: int) -> dict[str, Any]:
    """For each length of the short prompt: its TTFT in ms alone, and behind the giant one, and the giant one's."""
    found: dict[str, Any] = {"giant": giant, "contenders": {c.name: {} for c in contenders}}
    for length in shorts:
        short = _request(length, 4, 0.0, vocab_size, seed=length)
        alone = Workload("short", (short,))
        behind = Workload("short behind long", (_request(giant, 4, 0.0, vocab_size),
                                                _request(length, 4, _AT, vocab_size, seed=length)))
        runs: dict[str, list[tuple[float, float, float]]] = {c.name: [] for c in contenders}
        for contender in contenders:
            contender.warm_up(alone)
            if length == shorts[0]:
                contender.run(behind)                   # so that all know what a giant one costs
        for number in range(rounds):
            for contender in contenders:
                [own] = _ttfts(contender.run(alone))
                long, late = _ttfts(contender.run(_later(behind, 0.07 * number)))
                runs[contender.name].append((own, late, long))
        for name, times in runs.items():
            found["contenders"][name][str(length)] = {
                "alone_ms": median(1e3 * own for own, _, _ in times),
                "behind_ms": median(1e3 * late for _, late, _ in times),
                "giant_ms": median(1e3 * long for _, _, long in times),
                "ratio": median(late / own for own, late, _ in times)}
    return found


def _later(workload: Workload, seconds: float) -> Workload:
    """The second request comes so much later: at another moment of the step that is running."""
    first, second = workload.requests
    return replace(workload, requests=(first, replace(second, arrival_time=second.arrival_time + seconds)))


def giant_among_streams(contenders: Sequence[EngineContender], giant: int, num_streams: int, rounds: int,
                        vocab_size: int, stream_output: int) -> dict[str, Any]:
    """F5.5: the longest time without a token of any stream, the giant prompt's TTFT, and the first stream's gaps.

    Medians of the rounds; the gaps are those of the round in the middle, by its longest.
    """
    streams = [_request(32, stream_output, 0.0, vocab_size, seed=i) for i in range(num_streams)]
    workload = Workload("giant", (*streams, _request(giant, 4, _GIANT_AT, vocab_size)))
    runs: dict[str, list[RunResult]] = {c.name: [] for c in contenders}
    for contender in contenders:
        contender.warm_up(workload)
    for _ in range(rounds):
        for contender in contenders:
            runs[contender.name].append(contender.run(workload))
    found: dict[str, Any] = {"giant": giant, "num_streams": num_streams, "contenders": {}}
    for name, results in runs.items():
        middle = sorted(results, key=lambda r: max(_longest(r, num_streams)))[len(results) // 2]
        found["contenders"][name] = {
            "longest_gap_ms": median(1e3 * max(_longest(r, num_streams)) for r in results),
            "giant_ttft_ms": median(1e3 * _ttfts(r)[-1] for r in results),
            "output_throughput": median(r.metrics.output_throughput for r in results),
            "gaps": [[b, 1e3 * (b - a)] for a, b in pairwise(middle.records[0].token_times)]}
    return found


def draw_gaps(found: Mapping[str, Any], path: Path) -> Path:
    """One run's first stream: its time between two tokens. A line is level while the stream waits for the next one."""
    lines = {f"{name}: {max(y for _, y in c['gaps']):,.0f} ms at most": Series(
        [x for x, _ in c["gaps"]], [y for _, y in c["gaps"]], level=True) for name, c in found["contenders"].items()}
    return line_plot(lines, path, title=f"One run of a stream beside a prompt of {found['giant']:,} tokens", log_y=True,
                     xlabel="seconds", ylabel="milliseconds since the token before", unit=None)


def _longest(run: RunResult, num_streams: int) -> list[float]:
    return [max(record.itls) for record in run.records[:num_streams]]


def _ttfts(run: RunResult) -> list[float]:
    times = [record.ttft for record in run.records]
    return [t for t in times if t is not None]


def _request(length: int, output_len: int, arrival: float, vocab_size: int, seed: int = 0) -> BenchRequest:
    rng = random.Random(f"{length} {seed}")
    return BenchRequest(tuple(rng.randrange(min(100, vocab_size - 1), vocab_size) for _ in range(length)), output_len,
                        arrival)
