"""The three places where code of yours can hook into the engine, each with defaults that do nothing.

    SchedulerPlugin    around every step: look, reorder, change the budget
    AttentionPlugin    around every layer's attention: look, change, replace
    CachePlugin        around every write to the KV cache: look, change what is stored

Nothing is patched: the engine calls its plugins, in the order in which they were given.
"""
from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m0_basics.attention import AttentionMetadata
from m0_basics.config import ConfigError
from m0_basics.request import Request
from m1_offline.kv_cache import KVCache

if TYPE_CHECKING:
    from ..kv_cache_manager import SlotCopy
    from ..scheduler import Scheduler, SchedulerOutput

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepStats:
    """One step, after it is done. Times are `time.perf_counter()` seconds."""

    index: int
    start_time: float
    end_time: float
    output: SchedulerOutput
    num_prompt_tokens: int          # tokens run that were no decodes: prefill, or recomputation
    num_generation_tokens: int      # tokens sampled
    num_running: int
    num_waiting: int
    num_preempted: int
    kv_cache_usage: float           # 0 to 1
    token_budget: int               # what the step was allowed to run

    @property
    def duration_s(self) -> float:
        return self.end_time - self.start_time


@dataclass(frozen=True)
class CounterValue:
    """A number that only grows, as the server's /metrics shows it: under `name`, with "_total" behind it."""

    name: str
    text: str                       # what it counts
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


class SchedulerPlugin(ABC):
    """Called by the engine around each step. May reorder `scheduler.waiting` and set `scheduler.token_budget`."""

    def before_step(self, scheduler: Scheduler) -> None:  # noqa: B027
        """Before requests are chosen."""

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:  # noqa: B027
        """After a step that ran something."""

    def on_request_completion(self, request: Request) -> None:  # noqa: B027
        """Once for each request that finishes or is aborted, with its final state."""

    def counters(self) -> Sequence[CounterValue]:
        """What it has counted so far, for the server's /metrics. Called from another thread than the engine's."""
        return ()


class AttentionPlugin(ABC):
    """Called for each layer of each step, around the backend's attention."""

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata,
                attend: Attend) -> Tensor:
        """q [T, H_q, D]; k, v [T, H_kv, D] -> [T, H_q, D]. `attend(q, k, v)` is the attention it is wrapped around."""
        return attend(q, k, v)


class CachePlugin(ABC):
    """Called for each layer of each step, around the write to the cache, and before its contents are read."""

    def storage_format(self, dtype: torch.dtype, head_dim: int) -> tuple[torch.dtype, int]:
        """Vectors come with `head_dim` elements of `dtype` -> type and number of those that `before_append` returns."""
        return dtype, head_dim

    def extra_bytes(self, num_slots: int, num_kv_heads: int, head_dim: int) -> int:
        """Bytes that the plugin will keep beside the cache for `num_slots` slots of one layer."""
        return 0

    def attach(self, kv_cache: KVCache, dtype: torch.dtype, block_size: int) -> None:  # noqa: B027
        """Once, when the cache is made: allocate what the plugin keeps beside it.

        `dtype` is that of the vectors that come in, and that `on_read` gives back. Slots are handed out `block_size`
        at a time, from a multiple of it on.
        """

    def before_append(self, layer_idx: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [T, H_kv, D] on their way into the slots [T] -> what to store instead."""
        return k, v

    def after_append(self, layer_idx: int, slot_mapping: Tensor) -> None:  # noqa: B027
        """After the write."""

    def on_read(self, layer_idx: int, k: Tensor, v: Tensor, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Stored k, v [n, H_kv, D] of `slots` -> what attention is to see."""
        return k, v

    def on_copy(self, copies: list[SlotCopy]) -> None:  # noqa: B027
        """The cache copied slots: copy what the plugin keeps for them."""

    @property
    def nbytes(self) -> int:
        """Bytes that the plugin keeps beside the cache."""
        return 0


def check_floating_point(plugin: CachePlugin, dtype: torch.dtype) -> None:
    """Raise ConfigError unless the numbers that come to a plugin which rounds them are not rounded yet."""
    if not dtype.is_floating_point:
        raise ConfigError(f"{type(plugin).__name__} gets {dtype}, from the cache plugin before it; allowed: "
                          "floating-point numbers, so one plugin that rounds them, as the last")


def check_unused(plugin: CachePlugin, unused: bool) -> None:
    """Raise ConfigError for a plugin object that keeps what is one engine's, and has an engine already."""
    if not unused:
        raise ConfigError(f"this {type(plugin).__name__} serves an engine already; allowed: an object for each engine")
