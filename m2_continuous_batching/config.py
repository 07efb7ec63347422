"""Configuration of this milestone: how much runs side by side, and who goes first."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import m0_basics.config as m0
from m0_basics.config import check_int, option, reject

from .policies import POLICIES, SchedulingPolicy, make_policy

BACKENDS = ("ragged", "naive")


@dataclass(frozen=True)
class SchedulerConfig(m0.SchedulerConfig):
    """The two budgets of a step, and the policy that spends them."""

    policies: ClassVar[Mapping[str, Callable[[str], SchedulingPolicy]]] = POLICIES
    max_num_seqs: int = option(32, "Sequences that run side by side: the rows of the KV cache.")
    max_num_batched_tokens: int | None = option(
        None, "Most tokens in one step, at least max_model_len: prompts run whole (default: that, or 2048 if more).")
    async_scheduling: bool = option(False, "Choose the next step while the model runs this one.")
    policy: str = option("fcfs", "Who goes first: " + ", ".join(POLICIES) + "; with parameters as in ageing:5.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1, optional=True)
        make_policy(self.policy, self.policies)         # raises ConfigError for a policy that does not exist


@dataclass(frozen=True)
class BatchingConfig(m0.EngineConfig):
    """The layers of m0, with this milestone's scheduler: the base of every configuration from here on."""

    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass(frozen=True)
class AttentionConfig:
    """Which of this milestone's two ragged attentions runs."""

    attention_backend: str = option("ragged", "ragged, or naive: one [T, S] mask over everything, to look at.")

    def __post_init__(self) -> None:
        if self.attention_backend not in BACKENDS:
            raise reject("attention_backend", self.attention_backend, ", ".join(BACKENDS))


@dataclass(frozen=True)
class EngineConfig(BatchingConfig):
    """With a choice of attention."""

    attention_config: AttentionConfig = field(default_factory=AttentionConfig)
