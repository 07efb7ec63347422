"""What is measured, with the definitions of vLLM's serving benchmark.

    arrival        first token                                      last token
       |--- TTFT ------|-- ITL --|-- ITL --|--------- ... -- ITL --------|
       |--------------------------- E2E latency -------------------------|

TTFT is the time to the first token, ITL the time between two tokens, TPOT their mean within one request:
(latency - TTFT) / (output tokens - 1). A request with one output token has no TPOT and no ITL.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np

from m0_basics.config import ConfigError, reject
from m0_basics.request import Request

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RequestRecord:
    """When one request arrived, got its tokens and was done: seconds on any one clock.

    `token_times` holds one entry for each token of each sequence; tokens that came together have the same time. It is
    empty where a peer does not tell. `output_lens` holds the tokens of each sequence.
    """

    arrival_time: float
    token_times: tuple[float, ...]
    finish_time: float
    num_prompt_tokens: int
    output_lens: tuple[int, ...]

    @classmethod
    def from_request(cls, request: Request, start: float = 0.0) -> RequestRecord:
        """Read a finished request's times, as its engine left them, relative to `start` on the same clock."""
        metrics = request.metrics
        assert metrics.finished_time is not None, "the request is not finished"
        return cls(metrics.arrival_time - start, tuple(t - start for t in metrics.token_times),
                   metrics.finished_time - start, len(request.prompt_token_ids),
                   tuple(len(s.output_token_ids) for s in request.sequences))

    @property
    def latency(self) -> float:
        """End to end, in seconds."""
        return self.finish_time - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Time to the first token, in seconds."""
        return self.token_times[0] - self.arrival_time if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None where there is none.

        Sequences of one request grow side by side, so the longest one counts.
        """
        tokens = max(self.output_lens)
        return None if self.ttft is None or tokens < 2 else (self.latency - self.ttft) / (tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Seconds from one time at which tokens came to the next: what came together has no gap."""
        return [b - a for a, b in pairwise(self.token_times) if b > a]


@dataclass(frozen=True)
class Stats:
    """Mean, median and 99th percentile (linear interpolation, as numpy's)."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float], scale: float = 1.0) -> Stats | None:
        """The statistics of values * scale; None where there is no value."""
        array = np.asarray(list(values), dtype=np.float64) * scale
        if not array.size:
            return None
        return cls(float(array.mean()), float(np.median(array)), float(np.percentile(array, 99)))


@dataclass(frozen=True)
class SLO:
    """Service level objectives in milliseconds: a request is good when it meets all that are set."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise reject(field.name, value, "milliseconds above 0, or None")

    def met_by(self, record: RequestRecord) -> bool:
        """As in vLLM, a request without a TPOT (one output token) meets any TPOT."""
        measured = ((self.ttft_ms, record.ttft), (self.tpot_ms, record.tpot or 0.0), (self.e2el_ms, record.latency))
        return all(limit is None or (value is not None and 1e3 * value <= limit) for limit, value in measured)


@dataclass(frozen=True)
class PeakMemory:
    """Highest memory during a run, in bytes. The process may hold more than one engine: see `rss_added_bytes`."""

    rss_bytes: int                          # resident memory of the process and its children
    rss_added_bytes: int                    # the peak less what was resident when the run began
    gpu_bytes: int | None = None            # allocated by torch on the GPU; None without one


@dataclass(frozen=True)
class RunMetrics:
    """One run of one workload by one engine. Latencies are in milliseconds, rates per second of wall-clock time."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    duration_s: float
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    ttft_ms: Stats | None
    tpot_ms: Stats | None
    itl_ms: Stats | None
    e2el_ms: Stats | None
    slo: SLO | None = None
    request_goodput: float | None = None
    memory: PeakMemory | None = None
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold and `from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote. Raises ConfigError for another schema version or unknown fields."""
        if data.get("schema_version") != SCHEMA_VERSION:
            raise reject("schema_version", data.get("schema_version"), str(SCHEMA_VERSION))
        known = {f.name for f in dataclasses.fields(cls)}
        if wrong := sorted(set(data) ^ known):
            raise ConfigError(f"run metrics: unknown or missing field {', '.join(wrong)}")
        nested: dict[str, type] = {"ttft_ms": Stats, "tpot_ms": Stats, "itl_ms": Stats, "e2el_ms": Stats, "slo": SLO,
                                   "memory": PeakMemory}
        values = {key: nested[key](**value) if key in nested and value is not None else value
                  for key, value in data.items()}
        return cls(**values)


def compute_metrics(records: Sequence[RequestRecord], duration_s: float, slo: SLO | None = None,
                    memory: PeakMemory | None = None) -> RunMetrics:
    """Turn the finished requests of a run that took `duration_s` seconds of wall-clock time into its metrics."""
    if not records or duration_s <= 0:
        raise reject("records, duration_s", (len(records), duration_s), "at least one request, and a time above 0")
    prompt_tokens = sum(r.num_prompt_tokens for r in records)
    output_tokens = sum(sum(r.output_lens) for r in records)
    good = None if slo is None else sum(slo.met_by(r) for r in records) / duration_s
    return RunMetrics(
        num_requests=len(records),
        num_prompt_tokens=prompt_tokens,
        num_output_tokens=output_tokens,
        duration_s=duration_s,
        request_throughput=len(records) / duration_s,
        output_throughput=output_tokens / duration_s,
        total_token_throughput=(prompt_tokens + output_tokens) / duration_s,
        ttft_ms=Stats.of((r.ttft for r in records if r.ttft is not None), 1e3),
        tpot_ms=Stats.of((r.tpot for r in records if r.tpot is not None), 1e3),
        itl_ms=Stats.of((itl for r in records for itl in r.itls), 1e3),
        e2el_ms=Stats.of((r.latency for r in records), 1e3),
        slo=slo,
        request_goodput=good,
        memory=memory,
    )
