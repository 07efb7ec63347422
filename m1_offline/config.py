"""Configuration of this milestone: the cache has rows, and several sequences of one request use them."""
from __future__ import annotations

from dataclasses import dataclass, field

import m0_basics.config as m0
from m0_basics.config import option


@dataclass(frozen=True)
class SchedulerConfig(m0.SchedulerConfig):
    """`max_num_seqs` is the number of rows in the KV cache."""

    max_num_seqs: int = option(8, "Rows of the KV cache: the most outputs that one request may generate.")


@dataclass(frozen=True)
class EngineConfig(m0.EngineConfig):
    """The layers of m0, with this milestone's scheduler defaults."""

    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
