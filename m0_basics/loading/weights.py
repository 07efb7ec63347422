"""From a checkpoint's tensors to the model's parameters.

    WeightSource    tensors by their Hugging Face names, one at a time, as they are stored
    load_weights    asks for what each module of the model needs, and refuses what nothing asked for
    fill_linear     what a linear layer is made of: here one plain matrix, joined from its parts

A checkpoint of another kind brings its own source; a packed format brings its own way to fill a linear layer too.
"""
from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from ..model import CausalLM, RMSNorm
from ..model_spec import ModelSpec
from .files import LoadError, read_json

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tables that old checkpoints carry and every reader computes itself (transformers ignores the same).
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$")


class WeightSource(ABC):
    """A checkpoint: tensors by name, each read when it is asked for.

    Names are Hugging Face's: `model.norm.weight`. Where a format packs a linear layer, its tensors have the names that
    the format gives them (`....q_proj.qweight`), and are returned packed: who fills the layer knows the format.
    """

    location: Path

    @abstractmethod
    def names(self) -> Collection[str]:
        """Every tensor there is."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored. Raises LoadError where it is missing or damaged."""


# (the model's layer, Hugging Face's layers that it joins, source, device and dtype of the model) -> the layer that runs
FillLinear = Callable[[nn.Linear, list[str], WeightSource, CausalLM], nn.Module]


def fill_linear(linear: nn.Linear, parts: list[str], source: WeightSource, model: CausalLM) -> nn.Module:
    """Assign the plain matrices of `parts`, one below the other, and their biases where the layer has one."""
    for kind in ("weight",) if linear.bias is None else ("weight", "bias"):
        names = [f"{part}.{kind}" for part in parts]
        setattr(linear, kind, _parameter(getattr(linear, kind), names, source, model))
    return linear


def load_weights(model: CausalLM, source: WeightSource, fill: FillLinear = fill_linear) -> None:
    """Fill every module of the model. Raises LoadError for a tensor that is missing, misshapen, or left over.

    A tensor that no module asks for would be silently left out of the computation: a bias is an example.
    """
    asked = _AskedFor(source)
    tied = model.spec.tie_word_embeddings
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not (module is model.lm_head and tied):
            model.set_submodule(name, fill(module, hf_parts(name), asked, model))
        elif isinstance(module, (nn.Embedding, RMSNorm)):
            [part] = hf_parts(name)
            if tied and module is model.embed_tokens and f"{part}.weight" not in source.names():
                part = "lm_head"                    # the one matrix is stored under its other name
            module.weight = _parameter(module.weight, [f"{part}.weight"], asked, model)
    if tied:
        _tie(model, asked)
    model.requires_grad_(False)
    left = sorted(name for name in set(source.names()) - asked.taken if not _HARMLESS.search(name))
    if left:
        raise LoadError(f"tensor {left[0]} of {source.location} has no place in {model.spec.architecture}"
                        + (f", nor have {len(left) - 1} more" if len(left) > 1 else "")
                        + "; without it the model would compute something else")


def check_layers(spec: ModelSpec, source: WeightSource) -> None:
    """Raise LoadError where the checkpoint lacks a layer: before a model of a billion of them is built."""
    held = {int(match[1]) for name in source.names() if (match := re.match(r"model\.layers\.(\d{1,6})\.", name))}
    first = next(layer for layer in range(len(held) + 1) if layer not in held)
    if first < spec.num_hidden_layers:
        raise LoadError(f"{source.location} lacks the tensor model.layers.{first}.input_layernorm.weight")


def hf_parts(name: str) -> list[str]:
    """What Hugging Face calls the parts that make up one of our modules (or parameters), in order."""
    if name.startswith("lm_head"):
        return [name]
    for merged, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        if f".{merged}" in name:
            return ["model." + name.replace(merged, part) for part in parts]
    return ["model." + name]


def part_rows(parts: list[str], num_rows: int, spec: ModelSpec) -> list[int]:
    """How many of a parameter's rows each of its parts has."""
    if len(parts) == 3:
        return [spec.num_attention_heads * spec.head_dim, *[spec.num_key_value_heads * spec.head_dim] * 2]
    return [num_rows // len(parts)] * len(parts)


class SafetensorsFolder(WeightSource):
    """Tensors by name from `model.safetensors`, the shards that an index names, or whatever files there are."""

    def __init__(self, folder: Path) -> None:
        self.location = folder
        one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if one.is_file():                   # transformers' order: the one file, then the index
            self._file_of = self._read_headers([one])
        elif index.is_file():
            self._file_of = self._read_index(index)
        else:
            self._file_of = self._read_headers(sorted(folder.glob("*.safetensors")))
        self._opened: dict[Path, Any] = {}

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        if name not in self._file_of:
            raise LoadError(f"{self.location} lacks the tensor {name}")
        file = self._file_of[name]
        if file not in self._opened:
            self._opened[file] = _open(file)
        try:
            tensor: Tensor = self._opened[file].get_tensor(name)
        except Exception as error:
            raise LoadError(f"{file} is damaged: {error}") from error
        return tensor

    def _read_index(self, index: Path) -> dict[str, Path]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise LoadError(f"{index} holds no weight_map from tensor names to files")
        for file in set(files.values()):
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file or "\0" in file:
                raise LoadError(f"{index} names the file {file!r}; allowed: files inside the folder")
        file_of = {name: self.location / file for name, file in files.items()}
        if missing := sorted({file.name for file in file_of.values() if not file.is_file()}):
            raise LoadError(f"{self.location} lacks {', '.join(missing)}, which its index names")
        return file_of

    def _read_headers(self, files: list[Path]) -> dict[str, Path]:
        if not files:
            raise LoadError(f"{self.location} holds no *.safetensors file")
        file_of: dict[str, Path] = {}
        for file in files:
            for name in _open(file).keys():  # noqa: SIM118
                if name in file_of:
                    raise LoadError(f"{self.location}: {file_of[name].name} and {file.name} both hold the tensor "
                                    f"{name}, and no model.safetensors.index.json says which one counts")
                file_of[name] = file
        return file_of


class _AskedFor(WeightSource):
    """Another source, and what has been read of it."""

    def __init__(self, source: WeightSource) -> None:
        self.location, self._source = source.location, source
        self.taken: set[str] = set()

    def names(self) -> Collection[str]:
        return self._source.names()

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        self.taken.add(name)
        return tensor


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{file} is damaged or cut short: {error}") from error


def _parameter(old: Tensor, names: list[str], source: WeightSource, model: CausalLM) -> nn.Parameter:
    """The tensors `names` one below the other, in the model's dtype and on its device, in the shape of `old`."""
    parts = [source.read(name) for name in names]
    shapes = [tuple(part.shape) for part in parts]
    if shapes != [(rows, *old.shape[1:]) for rows in part_rows(names, old.shape[0], model.spec)]:
        raise LoadError(f"{source.location}: {' + '.join(names)} has shape {' + '.join(map(str, shapes))}, "
                        f"config.json says {tuple(old.shape)}")
    for name, part in zip(names, parts, strict=True):
        if part.dtype not in _PLAIN_DTYPES:
            raise LoadError(f"tensor {name} of {source.location} is {str(part.dtype).removeprefix('torch.')}; "
                            "allowed: float32, bfloat16, float16, float64")
    joined = torch.cat([part.to(model.device, model.dtype) for part in parts])
    return nn.Parameter(joined, requires_grad=False)


def _tie(model: CausalLM, source: WeightSource) -> None:
    """One matrix under two names, unless the checkpoint holds two that differ: then those count, as in transformers."""
    if "lm_head.weight" in source.names():
        head = _parameter(model.lm_head.weight, ["lm_head.weight"], source, model)
        if not torch.equal(head, model.embed_tokens.weight):
            model.lm_head.weight = head
            model.spec = replace(model.spec, tie_word_embeddings=False)
            return
    model.lm_head.weight = model.embed_tokens.weight
