"""Plugins: hooks into scheduling, attention and cache, and the built-in ones."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence
from m0_basics.config import reject

from .adaptive_budget import AdaptiveBudgetPlugin
from .base import Attend, AttentionPlugin, CachePlugin, CounterValue, SchedulerPlugin, StepStats
from .kv_compression import KVCompressionPlugin
from .logging_plugin import LoggingPlugin
from .priority import PriorityPlugin

Plugin = SchedulerPlugin | AttentionPlugin | CachePlugin

__all__ = [
    "AdaptiveBudgetPlugin",
    "AttentionPlugin",
    "CachePlugin",
    "CounterValue",
    "KVCompressionPlugin",
    "LoggingPlugin",
    "Plugin",
    "PluginAttention",
    "Plugins",
    "PriorityPlugin",
    "SchedulerPlugin",
    "StepStats",
    "split_plugins",
]


class PluginAttention(AttentionBackend):
    """A backend with plugins around it: the first one given is the outermost."""

    def __init__(self, backend: AttentionBackend, plugins: Sequence[AttentionPlugin]) -> None:
        self.backend = backend
        self.plugins = tuple(plugins)

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        return self.backend.build_metadata(scheduled)

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.backend.forward(layer_idx, q, k, v, metadata)

        inner: Attend = attend
        for plugin in reversed(self.plugins):
            inner = partial(plugin.forward, layer_idx, metadata=metadata, attend=inner)
        return inner(q, k, v)


@dataclass(frozen=True)
class Plugins:
    """Plugins by the place where they hook in. One object may be of several kinds."""

    scheduler: list[SchedulerPlugin]
    attention: list[AttentionPlugin]
    cache: list[CachePlugin]

    def around(self, backend: AttentionBackend) -> AttentionBackend:
        """The backend, wrapped where there is anything to wrap it in."""
        return PluginAttention(backend, self.attention) if self.attention else backend


def split_plugins(plugins: Sequence[Plugin]) -> Plugins:
    """Sort plugins by kind. Raises ConfigError for what is none."""
    for plugin in plugins:
        if not isinstance(plugin, Plugin):
            raise reject("plugins", plugin, "objects of SchedulerPlugin, AttentionPlugin or CachePlugin")
    return Plugins([p for p in plugins if isinstance(p, SchedulerPlugin)],
                   [p for p in plugins if isinstance(p, AttentionPlugin)],
                   [p for p in plugins if isinstance(p, CachePlugin)])
