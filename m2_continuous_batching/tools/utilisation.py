"""How many places of the batch do work: a static batch waits for its longest, a continuous one refills.

    static       A a a a a . . . . . . .        continuous   A a a a a E e e e e F f
                 B b b b b b b b b b b b                     B b b b b b b b b b b b
                 C c c . . . . . . . . .                     C c c G g g g H h h h h

The real scheduler over rows, without a model: each step gives one token to each place that is busy.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m0_basics.tools.bench.workloads import BenchRequest

from .simulation import Simulator


@dataclass(frozen=True)
class Utilisation:
    """Row-steps: one row of the cache for the time of one step."""

    busy: int           # that gave a token
    total: int          # that there were

    @property
    def ratio(self) -> float:
        return self.busy / self.total


def replay(output_lens: Sequence[int], num_rows: int, continuous: bool) -> Utilisation:
    """Serve requests of these output lengths (tokens), all there at the start, in `num_rows` rows, in order.

    Static: `num_rows` of them make a batch, and the next batch starts when the last of them is done.
    """
    size = len(output_lens) if continuous else num_rows
    steps = []
    for start in range(0, len(output_lens), size):
        batch = [BenchRequest((0,), length) for length in output_lens[start:start + size]]
        steps += Simulator(num_rows).run(batch).steps
    return Utilisation(sum(step.num_sampled for step in steps), num_rows * len(steps))


def static_utilisation(output_lens: Sequence[int]) -> Utilisation:
    """One static batch, a row for each request."""
    return replay(output_lens, len(output_lens), continuous=False)


def continuous_utilisation(output_lens: Sequence[int], times: int) -> Utilisation:
    """The same number of rows, with the requests `times` times one after the other as the queue."""
    return replay(list(output_lens) * times, len(output_lens), continuous=True)
