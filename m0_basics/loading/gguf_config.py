"""The settings that a GGUF header holds, as the `config.json` and `tokenizer_config.json` of the same model."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..model_spec import FAMILIES
from .gguf import GGUFError, GGUFFile, dequantise
from .gguf_tokenizer import END_TEXTS, special_ids

# What a header may ask for beside these, and the model does not do: scaled attention, logits, embeddings, residuals.
_REFUSED_SCALES = ("attention.scale", "logit_scale", "embedding_scale", "residual_scale", "attention.clamp_kqv")


def hf_config(file: GGUFFile, path: Path) -> dict[str, Any]:
    """The `config.json` that describes the same model. Raises GGUFError, naming it, for what this model cannot run."""
    metadata = file.metadata
    if (num_parts := metadata.get("split.count", 1)) != 1:
        raise GGUFError(f"{path} is one of {num_parts} parts of a split file; allowed: a whole one "
                        "(llama-gguf-split --merge joins them)")
    kind = metadata.get("general.architecture")
    architectures = {family.gguf_architecture: name for name, family in FAMILIES.items()}
    if not isinstance(kind, str) or kind not in architectures:
        raise GGUFError(f"architecture {kind!r} of {path} is not supported; allowed: {', '.join(architectures)}")
    read = _Reader(metadata, kind, path)
    tensors = {t.name: t for t in file.tensors}
    if "token_embd.weight" not in tensors:
        raise GGUFError(f"{path} lacks the tensor token_embd.weight")
    heads, hidden = read.size("attention.head_count"), read.size("embedding_length")
    head_dim = read.size("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (size := read.size(name, head_dim)) != head_dim:
            raise GGUFError(f"{kind}.{name}={size} of {path} is not supported; allowed: {head_dim}, the size of a head")
    for name in _REFUSED_SCALES:
        if value := metadata.get(f"{kind}.{name}"):
            raise GGUFError(f"{kind}.{name}={value!r} of {path} is not supported; allowed: none")
    biases = [name for name in tensors if re.fullmatch(r"blk\.\d+\.attn_(q|k|v|output)\.bias", name)]
    ends = eos_token_ids(metadata)
    return {
        "architectures": [architectures[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": _num_layers(read, tensors, path),
        "intermediate_size": read.size("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": read.size("context_length", 2048),
        # The file holds a float32; its shortest text is the number that was meant.
        "rms_norm_eps": float(f"{read.number('attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": bool(biases) and FAMILIES[architectures[kind]].bias_option is not None,
        "rope_parameters": _rope(read, tensors, path),
        "eos_token_id": ends[0] if ends else None,
        "bos_token_id": special_ids(metadata).get("bos"),
    }


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The `tokenizer_config.json`: special tokens by their role, and the chat template."""
    tokens, ids = metadata["tokenizer.ggml.tokens"], special_ids(metadata)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config: dict[str, Any] = {key: tokens[ids[name]] for key, name in names.items() if name in ids}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # By id as well: whoever wants the id of one need not build the tokenizer.
    config["added_tokens_decoder"] = {
        str(ids[name]): {"content": tokens[ids[name]], "special": True, "normalized": False}
        for name in names.values() if name in ids}
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def eos_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Every token that ends an output: those of the keys, then those that llama.cpp knows by their text."""
    ids, tokens = special_ids(metadata), metadata.get("tokenizer.ggml.tokens")
    named = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    by_text = [i for i, token in enumerate(tokens) if token in END_TEXTS] if isinstance(tokens, list) else []
    return list(dict.fromkeys([*named, *by_text]))


class _Reader:
    """Numbers of one architecture's keys, each checked."""

    def __init__(self, metadata: dict[str, Any], kind: str, path: Path) -> None:
        self._metadata, self._kind, self._path = metadata, kind, path

    def number(self, name: str, default: float | None = None) -> float:
        key = f"{self._kind}.{name}"
        value = self._metadata.get(key, default)
        if value is None:
            raise GGUFError(f"{self._path} lacks the key {key!r}")
        if isinstance(value, list):                         # one value for each layer
            if not value or value != [value[0]] * len(value):
                raise GGUFError(f"{key} of {self._path} differs between layers: {str(value)[:60]}; "
                                "allowed: one value for all of them")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise GGUFError(f"{key}={str(value)[:60]!r} of {self._path} is not valid; allowed: a number")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not isinstance(value, int) or not 0 < value < 1 << 31:
            raise GGUFError(f"{self._kind}.{name}={value!r} of {self._path} is not valid; allowed: an integer above 0")
        return value

    def text(self, name: str, default: str) -> Any:
        return self._metadata.get(f"{self._kind}.{name}", default)


def _num_layers(read: _Reader, tensors: dict[str, Any], path: Path) -> int:
    announced = read.size("block_count")
    held = 1 + max((int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d{1,6})\.", name))), default=-1)
    if announced != held:
        raise GGUFError(f"{path} announces {announced:,} layers (block_count) and holds tensors of {held}")
    return announced


def _rope(read: _Reader, tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    """llama.cpp's rules: a factor without a type is linear, and the legacy key counts where the newer is missing."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(read.number("rope.freq_base", 10000.0))}
    kind = read.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise GGUFError(f"rope scaling {kind!r} of {path} is not supported; allowed: none, linear, rope_freqs.weight")
    if (attention_factor := read.number("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise GGUFError(f"rope.scaling.attn_factor={attention_factor} of {path} is not supported; allowed: 1")
    factor = read.number("rope.scaling.factor", read.number("rope.scale_linear", 0.0)) if kind == "linear" else 0.0
    if factor not in (0, 1):                        # 0 stands for none
        rope |= {"rope_type": "linear", "factor": float(factor)}
    if "rope_freqs.weight" in tensors:
        factors = dequantise(tensors["rope_freqs.weight"], path).flatten().tolist()
        rope |= {"rope_type": "gguf_factors", "factors": factors}
    return rope
