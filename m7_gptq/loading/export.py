"""A quantised model as a Hugging Face folder that other readers of the format take too.

    model.safetensors           packed tensors of the quantised layers, all others in the model's dtype
    config.json                 the source's, with `quantization_config`
    quantize_config.json        the same settings, as AutoGPTQ had them
    generation_config.json, tokenizer files         the source's

GPTQModel 7.6 reads all of it; transformers (over GPTQModel) a plain output matrix only: a packed one it loads without a
word, and computes something else; vLLM 0.32 symmetric grids without an order of inputs only, and says so
(`python -m m7_gptq.tools.interop_readers`). Where input and output matrix are one and it is quantised, the format has
no form for it: the folder holds it packed, and its values once more as a plain embedding, which this lab's loader
compares and leaves out.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m0_basics.config import ConfigError
from m0_basics.loading.files import read_json
from m0_basics.loading.tokenizer import TOKENIZER_FILES
from m0_basics.loading.weights import hf_parts, part_rows
from m0_basics.model import CausalLM

from ..grid import QuantizedMatrix
from .pack import pack_matrix
from .settings import SETTINGS_FILE, GPTQSettings
from .whole_folder import current_umask, whole_folder

_COPIED = ("generation_config.json", *TOKENIZER_FILES, "vocab.json", "merges.txt")
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens.weight"


def plain_tensors(model: CausalLM, matrices: Mapping[str, QuantizedMatrix], dtype: torch.dtype) -> dict[str, Tensor]:
    """What stays plain of a model: all parameters but the weights of `matrices`, under Hugging Face's names."""
    tensors = {}
    for name, parameter in model.named_parameters():
        parts = hf_parts(name)
        sizes = part_rows(parts, parameter.shape[0], model.spec)
        for part, tensor in zip(parts, parameter.split(sizes), strict=True):
            tied_copy = part == f"{_HEAD}.weight" and parameter is model.embed_tokens.weight
            if part.removesuffix(".weight") not in matrices and not tied_copy:
                tensors[part] = tensor.detach().to("cpu", dtype)
    if _HEAD in matrices and model.spec.tie_word_embeddings:
        tensors[_EMBEDDING] = matrices[_HEAD].dequantise().to(dtype)
    return tensors


def write_folder(target: Path, source: Path, plain: Mapping[str, Tensor], matrices: Mapping[str, QuantizedMatrix],
                 settings: GPTQSettings, force: bool = False) -> int:
    """Write the folder `target`, its configuration and tokenizer from the folder `source`; returns its bytes.

    `plain` and `matrices` by Hugging Face's names of tensors and of layers. It appears as a whole or not at all. Raises
    ConfigError for a target that exists (unless `force`), a full disk, and a matrix that the settings do not describe.
    """
    for name, matrix in matrices.items():
        _check_described(name, matrix, settings)
    tensors = {name: tensor.contiguous() for name, tensor in plain.items()}
    for name, matrix in matrices.items():
        tensors |= pack_matrix(matrix, settings.version).tensors(name)
    dtypes = {tensor.dtype for tensor in plain.values()}
    with whole_folder(target, force) as folder:
        _save(folder / "model.safetensors", tensors)
        for file in _COPIED:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        _write_json(folder / SETTINGS_FILE, settings.to_dict())
        _write_json(folder / "config.json", _config(read_json(source / "config.json"), settings, dtypes.pop()))
        return sum(file.stat().st_size for file in folder.iterdir())


def _check_described(name: str, matrix: QuantizedMatrix, settings: GPTQSettings) -> None:
    size = matrix.shape[1] if settings.group_size == -1 else settings.group_size
    if (matrix.bits, matrix.group_size) != (settings.bits, size):
        raise ConfigError(f"{name} has {matrix.bits} bits in groups of {matrix.group_size}; "
                          f"allowed: {settings.bits} bits in groups of {size}, as the folder's settings say")
    if matrix.order is not None and not settings.desc_act:
        raise ConfigError(f"{name} has its inputs in an order of its own; allowed: none, since desc_act is false")
    if settings.sym and matrix.zeros is not None and bool((matrix.zeros != settings.middle).any()):
        raise ConfigError(f"{name} has zero points from {int(matrix.zeros.min())} to {int(matrix.zeros.max())}; "
                          f"allowed: {settings.middle} everywhere, since sym is true")


def _config(config: dict[str, Any], settings: GPTQSettings, dtype: torch.dtype) -> dict[str, Any]:
    """The source's config.json for the quantised model. Transformers 4 calls the dtype `torch_dtype`."""
    name = str(dtype).removeprefix("torch.")
    changed: dict[str, Any] = {"dtype": name, "torch_dtype": name, "quantization_config": settings.to_dict()}
    if settings.lm_head:
        changed["tie_word_embeddings"] = False
    return config | changed


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file
    save_file(dict(tensors), str(path), metadata={"format": "pt"})
    path.chmod(0o666 & ~current_umask())            # it makes files that only their owner reads


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
