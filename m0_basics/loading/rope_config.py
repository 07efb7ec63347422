"""How a configuration asks for rotary position embedding: its base, and the stretching of its frequencies."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import ConfigError, reject


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3's stretching of the low rotary frequencies (source: Llama 3.1's `config.json`, `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RopeConfig:
    """What `config.json` says of it. At most one of `scaling` and `factors` is set."""

    theta: float
    scaling: Llama3RopeScaling | None = None
    factors: tuple[float, ...] | None = None            # one divisor per frequency
    linear_factor: float = 1.0


def read_rope(config: Mapping[str, Any], max_len: int, head_dim: int) -> RopeConfig:
    """Read `rope_scaling` or `rope_parameters`: where both stand the former counts, whole, as in transformers.

    Raises ConfigError, naming it, for a kind that is not implemented and for a value that is missing or no number.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise reject(name, rope, "an object")
    if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"{name} of its own for {', '.join(nested)} is not supported; allowed: one for all layers")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor={partial!r} is not supported; allowed: 1.0")
    theta = positive("rope_theta", rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"

    def number(key: str) -> float:
        if key not in rope:
            raise ConfigError(f"{name} of rope_type={kind!r} lacks {key}")
        return positive(f"{name}.{key}", rope[key])

    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, linear_factor=number("factor"))
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        scaling = Llama3RopeScaling(number("factor"), number("low_freq_factor"), number("high_freq_factor"),
                                    int(positive(f"{name}.original_max_position_embeddings", original or max_len)))
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise reject(f"{name}.high_freq_factor", scaling.high_freq_factor, "more than low_freq_factor")
        return RopeConfig(theta, scaling)
    if kind == "gguf_factors":
        factors = rope.get("factors")
        if not isinstance(factors, list) or len(factors) != head_dim // 2:
            raise ConfigError(f"{name} has {len(factors) if isinstance(factors, list) else 'no'} factors for "
                              f"head_dim={head_dim}; allowed: {head_dim // 2}, one for each frequency")
        return RopeConfig(theta, factors=tuple(positive("a rotary factor", f) for f in factors),
                          linear_factor=positive(f"{name}.factor", rope.get("factor", 1.0)))
    raise ConfigError(f"rope_type={kind!r} is not supported; allowed: default, linear, llama3")


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise reject(name, value, "a number above 0")
    return float(value)
