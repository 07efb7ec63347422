"""Configuration of this milestone: which attention runs."""
from __future__ import annotations

from dataclasses import dataclass, field

import m3_paged_kv.config as m3
from m0_basics.config import option, reject

BACKENDS = ("cpu", "flash_attn", "triton", "torch_varlen", "sdpa", "tiled", "naive")


@dataclass(frozen=True)
class AttentionConfig:
    """The attention backend, and what is fused around it."""

    attention_backend: str = option("auto", "auto (the fastest that this machine has), " + ", ".join(BACKENDS) + ".")
    fused_layers: bool = option(True, "Fused layers and, on a CPU, packed weights; off: milestone 0's model as it is.")
    enforce_eager: bool = option(False, "No CUDA graphs.")

    def __post_init__(self) -> None:
        if self.attention_backend not in ("auto", *BACKENDS):
            raise reject("attention_backend", self.attention_backend, "auto, " + ", ".join(BACKENDS))


@dataclass(frozen=True)
class EngineConfig(m3.EngineConfig):
    """m3's layers, and the choice of attention."""

    attention_config: AttentionConfig = field(default_factory=AttentionConfig)
