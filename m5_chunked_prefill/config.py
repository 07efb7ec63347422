"""Configuration of this milestone: how long a step may take, and who guesses ahead."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import m3_paged_kv.config as m3
import m4_flash_attn.config as m4
from m0_basics.config import ConfigError, check_int, option, reject
from m2_continuous_batching.policies import POLICIES

# Who drafts -> whether it takes a speculative_model: never, always, or if it likes.
METHODS = {"none": "never", "ngram": "never", "suffix": "never", "draft_model": "always"}
DEFAULT_SLOWDOWN, DEFAULT_NUM_GUESSES = 3.0, 10


@dataclass(frozen=True)
class SchedulerConfig(m3.SchedulerConfig):
    """m3's; a step may hold pieces of prompts, so that it may be as short as one wants."""

    max_num_batched_tokens: int | None = option(
        None, "Most tokens in one step (default: as many as max_step_slowdown allows, by what steps cost here).")
    max_step_slowdown: float | None = option(
        None, "While something decodes, a step takes at most so many times one that only decodes (default: 3).")
    policy: str = option("shortest-first",
                         "Who goes first: " + ", ".join(POLICIES) + "; with parameters as in ageing:5.")

    def __post_init__(self) -> None:
        super().__post_init__()
        slowdown = self.max_step_slowdown
        if slowdown is None:
            return
        if isinstance(slowdown, bool) or not isinstance(slowdown, (int, float)) or not 1 <= slowdown <= 1e6:
            raise reject("max_step_slowdown", slowdown, "a number from 1 to 1,000,000")
        if self.max_num_batched_tokens is not None:
            raise ConfigError(f"max_num_batched_tokens={self.max_num_batched_tokens} limits a step by its tokens, and "
                              f"max_step_slowdown={slowdown} by its time; allowed: one of them")


@dataclass(frozen=True)
class SpeculativeConfig:
    """Speculative decoding: who drafts, and how far ahead."""

    methods: ClassVar[Mapping[str, str]] = METHODS
    speculative_method: str = option("none", "Who guesses the next tokens: " + ", ".join(METHODS) + ".")
    speculative_model: str | None = option(None, "The draft model: a folder or file with the same vocabulary.")
    num_speculative_tokens: int | None = option(None, "Most tokens guessed ahead for a sequence (default: 10).")
    adaptive_drafts: bool = option(True, "Draft as many tokens as pay, none where none do; off: always the most.")

    def __post_init__(self) -> None:
        if self.speculative_method not in self.methods:
            raise reject("speculative_method", self.speculative_method, ", ".join(self.methods))
        check_int("num_speculative_tokens", self.num_speculative_tokens, 1, optional=True)
        if self.speculative_method == "none":
            for name, value in (("num_speculative_tokens", self.num_speculative_tokens),
                                ("adaptive_drafts", None if self.adaptive_drafts else False)):
                if value is not None:
                    raise ConfigError(f"{name}={value} is about guesses, and speculative_method is none; allowed: "
                                      f"another speculative_method, or no {name}")
        takes_model = self.methods[self.speculative_method]
        if takes_model == "always" and self.speculative_model is None:
            raise ConfigError(f"speculative_method={self.speculative_method} needs speculative_model: a folder or file "
                              "with the same vocabulary")
        if takes_model == "never" and self.speculative_model is not None:
            able = " or ".join(name for name, takes in self.methods.items() if takes != "never")
            raise ConfigError(f"speculative_model={self.speculative_model!r} is for speculative_method={able}, "
                              f"and it is {self.speculative_method}; allowed: no speculative_model")


@dataclass(frozen=True)
class EngineConfig(m4.EngineConfig):
    """m4's layers, this milestone's scheduler, and drafts."""

    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative_config: SpeculativeConfig = field(default_factory=SpeculativeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler_config.async_scheduling and self.speculative_config.speculative_method != "none":
            raise ConfigError("async_scheduling chooses a step before the tokens are there that drafts follow; "
                              "allowed: it, or a speculative_method, not both")
