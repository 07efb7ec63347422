"""How fast the three kinds of linear layer are, for any number of rows, with weights that come from memory.

Copies of a layer are used in turn, more than a cache holds: a model's layer, too, finds its weights out of the cache,
because all other layers came in between.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import torch

from m0_basics.tools.analysis.cpu_roofline import best_seconds

from ..kernels.cpu.linear import Kind, PackedLinear

SMOLLM2 = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "lm_head": (49152, 576)}
_WORKING_SET = 160 << 20        # bytes: several times the last cache of a usual processor
_MAX_COPIES = 100


@dataclass(frozen=True)
class Timing:
    """One product x [rows, K] -> [rows, N]."""

    kind: Kind
    rows: int
    columns: int
    depth: int
    weight_bytes: int
    seconds: float

    @property
    def gflops(self) -> float:
        """10^9 floating point operations per second."""
        return 2e-9 * self.rows * self.columns * self.depth / self.seconds

    @property
    def gbytes(self) -> float:
        """10^9 bytes of weights per second."""
        return 1e-9 * self.weight_bytes / self.seconds


def measure(columns: int, depth: int, rows: Iterable[int], dtype: torch.dtype, rounds: int = 9) -> list[Timing]:
    """Every kind that works here, for every number of rows: the best of `rounds` passes over all copies, per copy."""
    weight = torch.randn(columns, depth).to(dtype)
    copies = max(2, min(_MAX_COPIES, _WORKING_SET // weight.nbytes))
    timings = []
    for kind in get_args(Kind):
        try:
            layers = [PackedLinear(weight.clone(), kind=kind) for _ in range(copies)]
        except ValueError:      # no packed oneDNN product on this processor
            continue
        for num_rows in rows:
            x = torch.randn(num_rows, depth).to(dtype)

            def run(layers: list[PackedLinear] = layers, x: torch.Tensor = x) -> None:
                for layer in layers:
                    layer(x)

            timings.append(Timing(kind, num_rows, columns, depth, weight.nbytes, best_seconds(run, rounds) / copies))
    return timings


def table(timings: list[Timing]) -> str:
    """A line per number of rows, three columns per kind, as markdown."""
    kinds = list(dict.fromkeys(t.kind for t in timings))
    lines = ["| rows | " + " | ".join(f"{kind} ms | GFLOP/s | GB/s" for kind in kinds) + " |",
             "|---:" * (1 + 3 * len(kinds)) + "|"]
    for rows in dict.fromkeys(t.rows for t in timings):
        cells = [f"{t.seconds * 1e3:.3f} | {t.gflops:.0f} | {t.gbytes:.0f}" for t in timings if t.rows == rows]
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
