"""What an architecture is made of: one frozen record, read from a Hugging Face `config.json`.

The three families differ in two switches only (biases, and norms on queries and keys), so adding a family
is adding a line to `FAMILIES`.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import ConfigError, reject
from .loading.rope_config import Llama3RopeScaling, positive, read_rope


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
    rope_linear_factor: float = 1.0                     # positions are divided by it
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], eos_token_ids: tuple[int, ...] = ()) -> ModelSpec:
        """Read a `config.json` of transformers 4 or 5. Raises ConfigError for what this model cannot run."""
        names = config.get("architectures") or ["(none)"]
        architecture = str(names[0] if isinstance(names, list) else names)
        if architecture not in FAMILIES:
            raise ConfigError(f"architecture {architecture} is not supported; allowed: {', '.join(FAMILIES)}")
        family = FAMILIES[architecture]
        for switch in ("use_sliding_window", "mlp_bias", "attention_bias", "tie_word_embeddings"):
            if config.get(switch) not in (None, True, False):
                raise reject(switch, config[switch], "true, false")
        for switch in ("use_sliding_window", "mlp_bias"):
            if config.get(switch):
                raise ConfigError(f"{switch}={config[switch]!r} of {architecture} is not supported; allowed: false")
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise ConfigError(f"hidden_act={activation!r} is not supported; allowed: silu")
        if missing := [key for key in _REQUIRED if key not in config]:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        sizes = {key: _size(key, config[key]) for key in _REQUIRED}
        heads = sizes["num_attention_heads"]
        kv_heads = _size("num_key_value_heads", config.get("num_key_value_heads") or heads)
        head_dim = _size("head_dim", config.get("head_dim") or sizes["hidden_size"] // heads)
        if heads % kv_heads:
            raise reject("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        if head_dim % 2:
            raise reject("head_dim", head_dim, "an even number: rotary position embedding turns pairs")
        max_len = _size("max_position_embeddings", config.get("max_position_embeddings", 2048))
        bias = bool(family.bias_option and config.get(family.bias_option))
        rope = read_rope(config, max_len, head_dim)
        return cls(
            architecture=architecture,
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_len,
            rms_norm_eps=positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope_theta=rope.theta,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias or bias,
            o_bias=bias,
            rope_scaling=rope.scaling,
            rope_factors=rope.factors,
            rope_linear_factor=rope.linear_factor,
            eos_token_ids=eos_token_ids,
        )


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MAX_SIZE = 1 << 31                     # of one dimension: far above the largest there is


def _size(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
        raise reject(name, value, f"an integer from 1 to {_MAX_SIZE - 1}")
    return value
