"""What an architecture is made of: one frozen record, read from a Hugging Face `config.json`.

The three families differ in two switches only (biases, and norms on queries and keys), so adding a family
is adding a line to `FAMILIES`.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import ConfigError


@dataclass(frozen=True)
class Family:
    """How one family departs from the common decoder."""

    gguf_architecture: str
    qk_norm: bool = False                   # RMSNorm on each query and key head, before rotary
    qkv_bias: bool = False
    bias_option: str | None = None          # config.json's switch for biases on q, k, v and o


FAMILIES: dict[str, Family] = {
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, bias_option="attention_bias"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "LlamaForCausalLM": Family("llama", bias_option="attention_bias"),
}


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3's stretching of the low rotary frequencies (source: Llama 3.1's `config.json`, `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a model. Field names are those of Hugging Face's configuration."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    rope_scaling: Llama3RopeScaling | None = None
    rope_factors: tuple[float, ...] | None = None       # GGUF's form of the same: one divisor per frequency
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], eos_token_ids: tuple[int, ...] = ()) -> ModelSpec:
        """Read a `config.json` of transformers 4 or 5. Raises ConfigError for what this model cannot run."""
        architecture = (config.get("architectures") or ["(none)"])[0]
        if architecture not in FAMILIES:
            raise ConfigError(f"architecture {architecture} is not supported; allowed: {', '.join(FAMILIES)}")
        family = FAMILIES[architecture]
        for switch in ("use_sliding_window", "mlp_bias"):
            if config.get(switch):
                raise ConfigError(f"{switch}={config[switch]!r} of {architecture} is not supported; allowed: false")
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise ConfigError(f"hidden_act={activation!r} is not supported; allowed: silu")
        if missing := [key for key in _REQUIRED if key not in config]:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        bias = bool(family.bias_option and config.get(family.bias_option))
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return cls(
            architecture=architecture,
            **{key: config[key] for key in _REQUIRED},
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias or bias,
            o_bias=bias,
            rope_scaling=_rope_scaling(rope),
            rope_factors=tuple(rope["factors"]) if rope.get("rope_type") == "gguf_factors" else None,
            eos_token_ids=eos_token_ids,
        )


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("default", "gguf_factors"):
        return None
    if kind == "llama3":
        return Llama3RopeScaling(float(rope["factor"]), float(rope["low_freq_factor"]),
                                 float(rope["high_freq_factor"]), int(rope["original_max_position_embeddings"]))
    raise ConfigError(f"rope_type={kind!r} is not supported; allowed: default, llama3")
