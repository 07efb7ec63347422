"""Configuration of this milestone: how the weights are held, how activations meet them, and who drafts for whom."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import m0_basics.config as m0
import m5_chunked_prefill.config as m5
import m6_prefix_cache.config as m6
from m0_basics.config import ConfigError, check_int, option, reject

from .grid import BITS

METHODS = ("auto", "none", "gptq", "gguf", "rtn")
ACTIVATIONS = ("auto", "int8", "exact")
SELF = "self"


@dataclass(frozen=True)
class ModelConfig(m0.ModelConfig):
    """m0's, and what becomes of weights that are packed, or should be."""

    quantization: str = option("auto", "Weights: auto (packed where the model's files are), none (dequantised), gptq, "
                                       "gguf (those, or an error), or rtn (rounded to nearest while loading).")
    quantization_bits: int = option(4, "Bits of a weight that is rounded while loading: 2, 3, 4 or 8.")
    quantization_group_size: int = option(
        64, "Weights to a scale there; where they do not divide a row, the most below.")
    activations: str = option("auto", "What packed weights are multiplied with: exact, int8 (rounded, faster), or "
                                      "auto: int8 where the model is in bfloat16 and this machine has a kernel.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization not in METHODS:
            raise reject("quantization", self.quantization, ", ".join(METHODS))
        if self.activations not in ACTIVATIONS:
            raise reject("activations", self.activations, ", ".join(ACTIVATIONS))
        if type(self.quantization_bits) is not int or self.quantization_bits not in BITS:
            raise reject("quantization_bits", self.quantization_bits, ", ".join(map(str, BITS)))
        check_int("quantization_group_size", self.quantization_group_size, 8)


@dataclass(frozen=True)
class SpeculativeConfig(m5.SpeculativeConfig):
    """m5's, and a model that drafts for itself."""

    methods: ClassVar[Mapping[str, str]] = m5.METHODS | {SELF: "optional"}
    speculative_method: str = option("none", "Who guesses the next tokens: " + ", ".join(methods) + " (the packed "
                                             "weights for the full ones, in one cache).")
    speculative_model: str | None = option(None, "The draft model, with the same vocabulary; for self, the same model "
                                                 "packed (default: its own file, or rounded while loading).")


@dataclass(frozen=True)
class EngineConfig(m6.EngineConfig):
    """m6's layers, with packed weights."""

    model_config: ModelConfig = field(default_factory=ModelConfig)
    speculative_config: SpeculativeConfig = field(default_factory=SpeculativeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        model, drafts = self.model_config, self.speculative_config
        rounds = model.quantization == "rtn" or drafts.speculative_method == SELF
        for name in ("quantization_bits", "quantization_group_size"):
            if not rounds and (value := getattr(model, name)) != getattr(ModelConfig, name):
                raise ConfigError(f"{name}={value} is about rounding while loading, and nothing is rounded here; "
                                  f"allowed: quantization=rtn, or no {name}")
        if drafts.speculative_method == SELF and model.quantization not in ("auto", "none"):
            raise ConfigError(f"speculative_method=self drafts with packed weights for the full ones, and "
                              f"quantization={model.quantization} packs both; allowed: quantization=auto or none")
