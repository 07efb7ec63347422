"""How much of the cache holds tokens, and where the rest goes.

    reserved for one sequence   [ t t t t | t t t t | t t . . ]      internal: the end of its last block
    a row for the longest one   [ t t t t t t t t t t . . . . . . . . . . . . . . . . . . . . ]

Blocks leave no holes between sequences that nobody could use (external fragmentation): any free block fits anybody.
What is left is inside the last block of each sequence: on average (block_size - 1) / 2 tokens.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from m2_continuous_batching.plugins.base import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler

from ..block_tables import HasBlocks


@dataclass(frozen=True)
class Fragmentation:
    """Slots of the cache at one moment. A block that several sequences hold counts once."""

    stored: int             # slots that hold a token
    reserved: int           # slots of all blocks that are held
    num_sequences: int

    @property
    def utilisation(self) -> float:
        """Share of the reserved slots that hold a token; 1 where nothing is reserved."""
        return self.stored / self.reserved if self.reserved else 1.0

    @property
    def waste_per_sequence(self) -> float:
        """Reserved slots without a token, per sequence."""
        return (self.reserved - self.stored) / self.num_sequences if self.num_sequences else 0.0


def row_utilisation(lengths: Iterable[int], row_size: int) -> float:
    """The same for rows: each sequence reserves `row_size` slots, whatever it stores."""
    stored = list(lengths)
    return sum(stored) / (len(stored) * row_size)


def block_utilisation(lengths: Iterable[int], block_size: int) -> float:
    """The same for blocks that nobody shares."""
    stored = list(lengths)
    return sum(stored) / sum(-(-length // block_size) * block_size for length in stored)


class FragmentationMeter(SchedulerPlugin):
    """Measures after every step of a real engine."""

    def __init__(self) -> None:
        self.history: list[Fragmentation] = []

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        manager = scheduler.kv_cache_manager
        assert isinstance(manager, HasBlocks), "blocks are measured, not rows"
        tables = manager.tables
        stored: dict[int, int] = {}             # block -> how much of it is filled, by who has filled it most
        # Under async scheduling the next step is chosen: the blocks that only its tokens need are not counted yet.
        sequences = [e.sequence for e in scheduler.running if e.sequence.num_computed_tokens]
        for sequence in sequences:
            kept = tables.place(sequence, sequence.num_computed_tokens)
            for i, block in enumerate(tables.split(sequence)[0]):
                stored[block] = max(min(tables.block_size, kept - i * tables.block_size), stored.get(block, 0))
        self.history.append(Fragmentation(sum(stored.values()), len(stored) * tables.block_size, len(sequences)))

    @property
    def mean_utilisation(self) -> float:
        """Mean over the steps; 1 before the first."""
        return sum(f.utilisation for f in self.history) / len(self.history) if self.history else 1.0
