"""Tiny models in packed folders and files, each with a plain twin of the same values for transformers to read."""
from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m0_basics.loading.loader import resolve_model
from m0_basics.loading.model_cache import cache_dir
from m0_basics.tools.testing.gguf_files import write_gguf
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.loading.pack import pack_matrix
from m7_gptq.loading.settings import GPTQSettings, tied_meta
from m7_gptq.loading.source import settings_folder
from m7_gptq.rtn import QuantizeOptions, round_to_nearest


@dataclass(frozen=True)
class PackedModel:
    """Where a packed model lies, and its plain twin."""

    packed: Path
    plain: Path


def write_twin(target: Path, folder: Path, tensors: dict[str, Tensor]) -> Path:
    """The model of `folder` with other weights, float32."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith("index.json"):
            shutil.copy(file, target)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def pack_gguf(target: Path, folder: Path, kind: str, **settings: Any) -> PackedModel:
    """The model of `folder` in a GGUF file whose matrices are all of one `kind`."""
    target.mkdir(parents=True)
    tensors = write_gguf(target / "model.gguf", folder, kind, **settings)
    return PackedModel(target / "model.gguf", write_twin(target / "plain", folder, tensors))


def pack_gptq(target: Path, folder: Path, bits: int = 4, group_size: int = 32, *, sym: bool = False,
              desc_act: bool = False, lm_head: bool = True, version: int = 1, seed: int = 0) -> PackedModel:
    """The model of `folder` rounded to nearest and packed; with `desc_act` its inputs are in an order of chance."""
    tensors, packed = load_file(folder / "model.safetensors"), dict[str, Tensor]()
    config = json.loads((folder / "config.json").read_text())
    tied, generator = config["tie_word_embeddings"], torch.Generator().manual_seed(seed)
    orders: dict[int, Tensor] = {}
    for name in list(tensors):
        part = name.removesuffix(".weight")
        is_head = part == ("model.embed_tokens" if tied else "lm_head") and lm_head
        if not name.endswith("_proj.weight") and not is_head:
            continue
        width = tensors[name].shape[1]
        order = orders.setdefault(width, torch.randperm(width, generator=generator)) if desc_act else None
        matrix = in_order(tensors[name], order, QuantizeOptions(bits, group_size, sym, search=False))
        tensors[name] = matrix.dequantise()
        packed |= pack_matrix(matrix, version).tensors("lm_head" if is_head else part)
    plain = write_twin(target / "plain", folder, tensors)
    meta = tied_meta({}) if tied and lm_head else {}
    settings = GPTQSettings(bits, group_size, desc_act, sym, lm_head=lm_head, meta=meta,
                            checkpoint_format="gptq" if version == 1 else "gptq_v2")
    parts = {name.rpartition(".")[0] for name in packed}
    rest = {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in parts}
    write_twin(target / "packed", folder, rest | packed)
    (target / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": settings.to_dict()}))
    return PackedModel(target / "packed", plain)


def in_order(weight: Tensor, order: Tensor | None, options: QuantizeOptions) -> QuantizedMatrix:
    """Rounded to nearest, its groups made of the inputs as `order` lists them."""
    if order is None:
        return round_to_nearest(weight, options)
    matrix = round_to_nearest(weight[:, order].contiguous(), options)
    return QuantizedMatrix(matrix.codes, matrix.scales, matrix.bits, matrix.zeros, order=order)


def use_cache(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, which shares the built kernels: they take longer than all that is tested."""
    kernels = cache_dir() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    (folder / "kernels").symlink_to(kernels.resolve())
    patch.setenv("LLM_LAB_CACHE", str(folder))
    for remembers in (resolve_model, settings_folder):
        remembers.cache_clear()
    return folder
