"""Writes a Hugging Face folder as a GGUF file, the way llama.cpp's converter does, for tests of the reader.

The reader dequantises, renames and reorders; all three are done here in the other direction, and the tensors are
returned as they should come back.
"""
from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gguf_blocks import BLOCKS
from .tiny_models import CHAT_TEMPLATE, EOS

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, folder: Path, kind: str = "F32", *, metadata: Mapping[str, Any] | None = None,
               edit: Callable[[dict[str, Tensor]], None] = lambda tensors: None, seed: int = 0) -> dict[str, Tensor]:
    """Write the model in `folder` to `path`, its matrices in the type `kind`; return what a reader should get.

    Returned are Hugging Face names and float32 tensors, after quantisation. "Q4_K", "Q5_K" and "Q6_K", which
    nothing here can quantise to, get random blocks instead. `metadata` overrides keys of the header (None leaves a
    key out). `edit` changes the Hugging Face tensors before they are written; names that no model has are kept as
    they are, and so are integer tensors.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from safetensors.torch import load_file
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    edit(tensors)
    writer = GGUFWriter(str(path), config["model_type"])
    header = {**_header(config), **_tokenizer_header(folder, config["vocab_size"]), **(metadata or {})}
    for key, value in header.items():
        if value is not None:
            _add(writer, key, value)
    back: dict[str, Tensor] = {}
    rng = np.random.default_rng(seed)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            writer.add_tensor(gguf_name(name), tensor.numpy())
            continue
        this_kind = kind if tensor.dim() == 2 else "F32"
        heads = _heads_to_permute(name, config)
        raw, value = _encode(_permute(tensor, heads) if heads else tensor, this_kind, rng)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType[this_kind])
        back[name] = _unpermute(value, heads) if heads else value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}
    if not name.startswith("model.layers."):
        return top.get(name, name)
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(part)]}.{kind}"


def decode(raw: bytes, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Raw blocks -> float32, one weight at a time."""
    size, _, decoder = BLOCKS[kind]
    values = [x for at in range(0, len(raw), size) for x in decoder(raw[at:at + size])]
    return torch.tensor(values, dtype=torch.float64).float().reshape(shape)


def _encode(tensor: Tensor, kind: str, rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], Tensor]:
    """The tensor in the type `kind`, as bytes for the file, and as a reader should see it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize
    if kind in ("F32", "F16", "BF16"):
        value = tensor.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
        raw = value.view(torch.int16).numpy().view(np.uint8) if kind == "BF16" else value.numpy()
        return raw, value.float()
    if kind.endswith("_K"):
        raw = _random_blocks(kind, tuple(tensor.shape), rng)
    else:
        raw = quantize(tensor.numpy(), GGMLQuantizationType[kind])
    return raw, decode(raw.tobytes(), kind, tuple(tensor.shape))


def _random_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Every bit at random but the two scales: those are small numbers, so that the weights are."""
    size, per_block, _ = BLOCKS[kind]
    rows, blocks = shape[0], shape[1] // per_block
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    scale_at = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    largest = {"Q4_K": 15 * 63, "Q5_K": 31 * 63, "Q6_K": 32 * 127}[kind]
    for at in scale_at:
        scales = rng.uniform(0.1, 0.3, (rows, blocks)) / largest
        raw[:, :, at:at + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    return raw.reshape(rows, blocks * size)


def _heads_to_permute(name: str, config: Mapping[str, Any]) -> int:
    """How many heads the rows of this tensor are reordered in; 0 for none. Only Llama's queries and keys are."""
    part = name.split(".")[-2:-1]
    if config["model_type"] != "llama" or part not in (["q_proj"], ["k_proj"]):
        return 0
    heads: int = config["num_attention_heads" if part == ["q_proj"] else "num_key_value_heads"]
    return heads


def _permute(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp's order: within each head, row 2i is the i-th of its first half, row 2i + 1 of its second."""
    size = weight.shape[0] // num_heads
    order = [head * size + half * size // 2 + i
             for head in range(num_heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order].contiguous()


def _unpermute(weight: Tensor, num_heads: int) -> Tensor:
    order = _permute(torch.arange(weight.shape[0]), num_heads)
    restored = torch.empty_like(weight)
    restored[order] = weight
    return restored


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    arch = config["model_type"]
    return {
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": config.get("head_dim"),
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }


def _tokenizer_header(folder: Path, vocab_size: int) -> dict[str, Any]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {t["id"]: t["content"] for t in tokenizer["added_tokens"]}
    known = {i: t for t, i in tokenizer["model"]["vocab"].items()} | special
    tokens = [known.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_CONTROL if i in special else _NORMAL if i in known else _UNUSED
                                      for i in range(vocab_size)],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokens.index(EOS),
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, np.uint8):
        writer.add_uint8(key, int(value))
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, struct.unpack("<f", struct.pack("<f", value))[0])
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
