"""Where the native call of a decode step spends its time: what each thread worked and waited, phase by phase.

    norm | qkv | rotate, store | attention | o | norm | gate, up | down     of every layer, then norm | output matrix

`step_parts` puts stopwatches around parts that are called one by one. Here the call runs as it always does; the library
is built once more with clocks in team.hpp, three readings for each phase.
"""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from m0_basics.base_llm import BaseLLM
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.tools.step_costs import decode_steps

from ..kernels.cpu.build import _NATIVE, SOURCES, library
from ..kernels.cpu.runner import DecodeRunner

THREADS, PHASES = 8, 2048
LAYER = ("norm", "qkv", "rotate", "attention", "o", "norm", "gate_up", "down")
PRODUCTS = ("qkv", "o", "gate_up", "down", "output_matrix")


class _PhaseTimes(ctypes.Structure):
    """`struct PhaseTimes` of team.hpp."""

    _fields_ = [("regions", ctypes.c_int64), ("total", ctypes.c_int64),
                *((name, ctypes.c_int64 * PHASES * THREADS) for name in ("work", "wait"))]


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a kind of phase in a step, over all layers, by thread."""

    name: str
    work: tuple[float, ...]
    wait: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """What it adds to the step: a thread's work and waiting together, the longest."""
        return max(work + wait for work, wait in zip(self.work, self.wait, strict=True))


@dataclass(frozen=True)
class StepTime:
    """A decode step's native call: seconds in all, and by kind of phase. What is in no phase is waking threads."""

    total: float
    phases: tuple[PhaseTime, ...]

    @property
    def products(self) -> float:
        """Seconds in linear products."""
        return sum(phase.seconds for phase in self.phases if phase.name in PRODUCTS)


def measure(llm: BaseLLM, num_sequences: int, *, prompt_len: int = 80, steps: int = 64, sources: Path = SOURCES,
            include: Sequence[Path] = (), per_product: int = 1) -> StepTime:
    """Mean over greedy decode steps of so many sequences, on a clocked build of the engine's kernels.

    `sources`, `include`: as of `library`; `per_product`: phases of a product at this number of rows. Raises BuildError,
    and ValueError for an engine whose layers are not one native call.
    """
    engine = engine_of(llm)
    if not isinstance(engine.runner, DecodeRunner):
        raise ValueError("a decode step of this engine is not one native call")
    decoder: Any = engine.runner.model.layers[0]
    kernels = library((*_NATIVE, "-DPHASE_TIMES"), sources, tuple(include))
    kernels.kernels_phase_times.restype = ctypes.POINTER(_PhaseTimes)
    times = kernels.kernels_phase_times().contents
    names = [name for name in LAYER for _ in range(per_product if name in PRODUCTS else 1)] * len(decoder.layers)
    names += ["norm", *["output_matrix"] * per_product]

    def timed_step() -> dict[str, float]:
        ctypes.memset(ctypes.addressof(times), 0, ctypes.sizeof(times))
        engine.step()
        seconds = {"total": 1e-9 * times.total}
        for kind, table in (("work", times.work), ("wait", times.wait)):
            for thread in range(THREADS):
                row = table[thread]
                for i, name in enumerate(names):
                    key = f"{kind} {thread} {name}"
                    seconds[key] = seconds.get(key, 0.0) + 1e-9 * row[i]
        return seconds

    usual, decoder._native = decoder._native, replace(decoder._native, kernels=kernels)
    try:
        found = decode_steps(llm, engine, timed_step, num_sequences, steps, prompt_len)
    finally:
        decoder._native = usual
    assert not times.work[0][len(names)], "a phase of the last step has no name"
    means = {key: mean(step[key] for step in found) for key in found[0]}
    threads = [t for t in range(THREADS) if any(means[f"work {t} {name}"] for name in names)]
    phases = tuple(PhaseTime(name, *(tuple(means[f"{kind} {t} {name}"] for t in threads) for kind in ("work", "wait")))
                   for name in dict.fromkeys(names))
    return StepTime(means["total"], phases)


def table(step: StepTime) -> dict[str, Any]:
    """Milliseconds, for a benchmark's results; `idle`: by thread, what it waited for others."""
    return {"call_ms": 1e3 * step.total, "products_ms": 1e3 * step.products,
            "phases": {p.name: {"ms": 1e3 * p.seconds, "idle_ms": [1e3 * wait for wait in p.wait]}
                       for p in step.phases}}
