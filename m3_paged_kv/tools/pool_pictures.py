"""Pictures of the pool over time: a plugin that notes after each step where everybody's blocks lie, and the drawing.

    block 0   A A A . C C C        A, B, C: a token of that sequence      .  free
              A A A . C C C        o: reserved and empty, drawn pale
              o A A . C C C
              o o A . o C C        A leaves, C takes its block
    block 1   B B B B . . .
              o B B B . . .        each block is as high as it has slots,
              o o B B . . .        each step is a column
              o o o B . . .
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m0_basics.config import require
from m2_continuous_batching.plugins.base import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler

from ..holdings import Place
from ..kv_cache_manager import PagedKVCacheManager

Holders = dict[int, int]                # seq_id -> how many of its tokens the block holds
PoolState = dict[Place, Holders]        # the blocks that somebody holds, after one step

SHARED = "#22313f"                      # a token that several sequences read
_PALE = 0.25                            # how much of its colour a slot keeps that is reserved and empty


class PoolRecorder(SchedulerPlugin):
    """Notes who holds which block after every step of a real engine, on the device and in host memory."""

    def __init__(self) -> None:
        self.history: list[PoolState] = []

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        manager = scheduler.kv_cache_manager
        assert isinstance(manager, PagedKVCacheManager), "blocks are drawn, not rows"
        tables = manager.tables
        state: PoolState = {}
        for entry in (*scheduler.running, *scheduler.waiting):
            sequence = entry.sequence
            for i, place in enumerate(manager.places_of(sequence)):
                stored = tables.place(sequence, sequence.num_computed_tokens) - i * tables.block_size
                state.setdefault(place, {})[sequence.seq_id] = min(tables.block_size, max(0, stored))
        self.history.append(state)


def slot_colours(history: Sequence[PoolState], pool: str, num_blocks: int, block_size: int,
                 colours: Mapping[int, str]) -> NDArray[np.float64]:
    """RGB of each slot of the "device" or the "host" after each step: [num_blocks * block_size, steps, 3], 0 to 1.

    `colours` maps seq_id to a colour by its name or #rrggbb.
    """
    to_rgb = require("matplotlib.colors", "a picture").to_rgb
    image = np.ones((num_blocks, block_size, len(history), 3))
    for step, state in enumerate(history):
        for (where, block), holders in state.items():
            if where != pool:
                continue
            shared = len(holders) > 1
            colour = np.array(to_rgb(SHARED if shared else colours[next(iter(holders))]))
            image[block, :, step] = 1 - _PALE * (1 - colour)
            image[block, :max(holders.values()), step] = colour
    return image.reshape(num_blocks * block_size, len(history), 3)


def draw_pool(axes: Any, history: Sequence[PoolState], pool: str, num_blocks: int, block_size: int,
              colours: Mapping[int, str]) -> None:
    """The slots of a pool over the steps, on a matplotlib Axes: block 0 on top, white lines between blocks."""
    image = slot_colours(history, pool, num_blocks, block_size, colours)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=(0, len(history), num_blocks, 0))
    axes.hlines(range(1, num_blocks), 0, len(history), color="white", linewidth=1)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set(visible=True, color="#9aa5b1")
    axes.set(xlabel="step", ylabel=f"{pool} block")
    axes.set_yticks([block + 0.5 for block in range(0, num_blocks, max(1, num_blocks // 8))],
                    range(0, num_blocks, max(1, num_blocks // 8)))


def draw_tables(axes: Any, tables: Mapping[int, Sequence[int]], num_blocks: int, colours: Mapping[int, str],
                names: Mapping[int, str]) -> None:
    """Above each sequence's blocks in its own order, below the pool, and a line from each entry to its block."""
    left = (num_blocks - sum(map(len, tables.values())) - len(tables) + 1) / 2
    for seq_id, table in tables.items():
        axes.text(left - 0.2, 3.4, names[seq_id], ha="right", va="center")
        for i, block in enumerate(table):
            axes.plot([left + i + 0.5, block + 0.5], [3, 0.8], color=colours[seq_id], lw=1.2)
            _box(axes, left + i, 3, colours[seq_id], str(block))
        left += len(table) + 1
    for block in range(num_blocks):
        held_by = [seq_id for seq_id, table in tables.items() if block in table]
        _box(axes, block, 0, SHARED if len(held_by) > 1 else colours[held_by[0]] if held_by else "white", str(block))
    axes.text(-0.3, 0.4, "pool", ha="right", va="center")
    axes.axis("off")


def _box(axes: Any, x: float, y: float, colour: str, text: str) -> None:
    axes.broken_barh([(x, 1)], (y, 0.8), facecolor=colour, edgecolor="#9aa5b1", linewidth=0.8)
    axes.text(x + 0.5, y + 0.4, text, ha="center", va="center", fontsize=9,
              color="#9aa5b1" if colour == "white" else "white")
