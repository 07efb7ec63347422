"""GGUF files: converted once into a Hugging Face folder that lies in a cache, then loaded like any other.

The conversion reads the file with the `gguf` package, dequantises every tensor, undoes llama.cpp's reordering
of rotary rows, and rebuilds the tokenizer. The folder is keyed by the file's SHA-256, so a changed file is
converted anew and a moved one is not. Format: the GGUF specification (ggml, docs/gguf.md).
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..model_spec import FAMILIES
from .gguf_tokenizer import build_tokenizer
from .weights import WeightSource

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

_FORMAT = 1                           # raise it when the layout of the converted folder changes
_SHARD_BYTES = 2 << 30                # tensors held in memory at once while converting
_TENSOR_NAMES = {                     # GGUF -> Hugging Face, within a layer
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight"}


class GGUFError(ConfigError):
    """A GGUF file that cannot be read, or holds what this model cannot run."""


def cache_dir() -> Path:
    """Where converted models lie: `$LLM_LAB_CACHE`, or `llm-inference-lab` in the user's cache folder."""
    if custom := os.environ.get("LLM_LAB_CACHE"):
        return Path(custom)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-inference-lab"


def convert_gguf(path: Path, dtype: torch.dtype) -> Path:
    """Return the Hugging Face folder made from the file at `path` with weights in `dtype`; make it if need be."""
    name = str(dtype).removeprefix("torch.")
    folder = cache_dir() / f"{_sha256(path)[:32]}-v{_FORMAT}-{name}"
    if (folder / "config.json").exists():
        return folder
    reader = open_gguf(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed into it: a reader never sees half a folder, whoever comes first.
    scratch = Path(tempfile.mkdtemp(prefix="converting-", dir=folder.parent))
    try:
        metadata = read_metadata(reader)
        config = hf_config(metadata, reader, path)
        build_tokenizer(metadata, path).save(str(scratch / "tokenizer.json"))
        _write_json(scratch / "tokenizer_config.json", _tokenizer_config(metadata))
        _write_json(scratch / "generation_config.json", {"eos_token_id": _eos_token_ids(metadata)})
        _write_shards(scratch, GGUFWeights(reader, config, path), dtype)
        _write_json(scratch / "config.json", config | {"dtype": name})
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def open_gguf(path: Path) -> GGUFReader:
    """Open a GGUF file and check that every tensor it announces is there."""
    from gguf import GGUFReader
    try:
        reader = GGUFReader(str(path))
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, IndexError, OSError, KeyError, OverflowError, AttributeError) as error:
        raise GGUFError(f"{path} is not a complete GGUF file: {str(error) or type(error).__name__}") from error
    if end > path.stat().st_size or not reader.tensors:
        raise GGUFError(f"{path} is cut short: {path.stat().st_size:,} bytes, its tensors end at {end:,}")
    return reader


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """Every key of the file's header -> its value."""
    return {key: field.contents() for key, field in reader.fields.items()}


def hf_config(metadata: dict[str, Any], reader: GGUFReader, path: Path) -> dict[str, Any]:
    """The `config.json` that describes the same model."""
    kind = metadata.get("general.architecture")
    architectures = {family.gguf_architecture: name for name, family in FAMILIES.items()}
    if kind not in architectures:
        raise GGUFError(f"architecture {kind!r} of {path} is not supported; allowed: {', '.join(architectures)}")
    if (scaling := metadata.get(f"{kind}.rope.scaling.type", "none")) != "none":
        raise GGUFError(f"rope scaling {scaling!r} of {path} is not supported; allowed: none, or rope_freqs.weight")
    try:
        heads = metadata[f"{kind}.attention.head_count"]
        hidden = metadata[f"{kind}.embedding_length"]
        config = {
            "architectures": [architectures[kind]],
            "model_type": kind,
            "hidden_size": hidden,
            "num_hidden_layers": metadata[f"{kind}.block_count"],
            "intermediate_size": metadata[f"{kind}.feed_forward_length"],
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv", heads),
            "head_dim": metadata.get(f"{kind}.attention.key_length", hidden // heads),
            "max_position_embeddings": metadata.get(f"{kind}.context_length", 2048),
            # The file holds a float32; its shortest text is the number that was meant.
            "rms_norm_eps": float(f"{metadata[f'{kind}.attention.layer_norm_rms_epsilon']:.6g}"),
            "hidden_act": "silu",
        }
    except KeyError as error:
        raise GGUFError(f"{path} lacks the key {error}") from error
    tensors = {t.name: t for t in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise GGUFError(f"{path} lacks the tensor token_embd.weight")
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_output.bias" in tensors
    rope: dict[str, Any] = {"rope_type": "default",
                            "rope_theta": float(metadata.get(f"{kind}.rope.freq_base", 10000.0))}
    if "rope_freqs.weight" in tensors:
        rope |= {"rope_type": "gguf_factors", "factors": tensors["rope_freqs.weight"].data.tolist()}
    config["rope_parameters"] = rope
    eos = _eos_token_ids(metadata)
    config["eos_token_id"] = eos[0] if eos else None
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    return config


class GGUFWeights(WeightSource):
    """The tensors of a file under their Hugging Face names, as float32 and in Hugging Face's row order."""

    def __init__(self, reader: GGUFReader, config: Mapping[str, Any], path: Path) -> None:
        """`config` is the file's `hf_config`. Raises GGUFError for a tensor that has no place in that model."""
        self.location, self._config = path, config
        self.stored: dict[str, ReaderTensor] = {}           # as they lie in the file
        for tensor in reader.tensors:
            if tensor.name == "rope_freqs.weight":          # part of the configuration
                continue
            name = hf_name(tensor.name)
            if name is None:
                raise GGUFError(f"tensor {tensor.name} of {path} has no place in {config['architectures'][0]}")
            self.stored[name] = tensor

    def names(self) -> Collection[str]:
        return self.stored.keys()

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised."""
        if name not in self.stored:
            raise GGUFError(f"{self.location} lacks the tensor {name}")
        weight = dequantise(self.stored[name], self.location)
        if self._config["model_type"] == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            key = "num_attention_heads" if match[1] == "q" else "num_key_value_heads"
            weight = unpermute(weight, self._config[key])
        return weight


def hf_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for a tensor no family has."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_TENSOR_NAMES[part]}.{kind}" if part in _TENSOR_NAMES else None
    return _TOP_NAMES.get(name)


def dequantise(tensor: ReaderTensor, path: Path) -> Tensor:
    """One tensor as float32, whatever its type in the file."""
    from gguf.quants import dequantize
    try:
        array = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise GGUFError(f"tensor {tensor.name} of {path} has type {tensor.tensor_type.name}, which is not supported; "
                        "allowed: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K") from error
    # gguf lists dimensions innermost first; the array comes in torch's order already.
    return torch.from_numpy(array.astype("float32")).reshape(tuple(int(n) for n in reversed(tensor.shape)))


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's row order, which interleaves the two halves of each head for its rotary kernel."""
    rows, rest = weight.shape[0], weight.shape[1:]
    return weight.reshape(num_heads, rows // num_heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _write_shards(folder: Path, source: WeightSource, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    held = count = 0

    def flush() -> None:
        nonlocal shard, held, count
        count += 1
        file = f"model-{count:05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard, held = {}, 0

    for name in source.names():
        shard[name] = source.read(name).to(dtype).contiguous()
        held += shard[name].nbytes
        if held >= _SHARD_BYTES:
            flush()
    if shard:
        flush()
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    config: dict[str, Any] = {key: tokens[i] for key, i in ids.items() if i is not None and i < len(tokens)}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _eos_token_ids(metadata: dict[str, Any]) -> list[int]:
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return list(dict.fromkeys(int(i) for i in ids if i is not None))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False))
