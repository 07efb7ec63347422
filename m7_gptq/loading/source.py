"""From the name of a model to what it holds: settings, tensors, and how its packed matrices are read.

    a GGUF file                     matrices of Q4_0, Q4_1 and Q8_0 stay as they are in the file
    a folder of method "gptq"       AutoGPTQ's and GPTQModel's tensors (checkpoint.py)
    any other folder                plain weights: milestone 0's way
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from m0_basics.config import ConfigError
from m0_basics.loading.files import read_json
from m0_basics.loading.gguf import open_gguf
from m0_basics.loading.loader import (
    gguf_file,
    load_spec,
    quantization_method,
    resolve_device,
    resolve_dtype,
    resolve_model,
)
from m0_basics.loading.model_cache import convert_gguf
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.loading.weights import SafetensorsFolder, WeightSource
from m0_basics.model_spec import ModelSpec

from ..config import ModelConfig
from ..grid import QuantizedMatrix
from .checkpoint import read_matrix
from .gguf_blocks import GGUFBlocks, read_gguf_matrix
from .settings import read_settings

# (where tensors are read, Hugging Face's name of a layer) -> its matrix; None where it is stored plain.
ReadMatrix = Callable[[WeightSource, str], QuantizedMatrix | None]


@dataclass(frozen=True)
class Checkpoint:
    """A model that has been found and not been read."""

    method: str                 # "gguf", "gptq", or "none" for plain weights
    folder: Path                # of its config.json and its tokenizer
    spec: ModelSpec
    source: WeightSource
    read: ReadMatrix
    head_is_embedding: bool = False     # the packed output matrix is the embedding, whatever else is stored as that


def find_checkpoint(config: ModelConfig) -> Checkpoint:
    """What `config.model` names. Raises LoadError where there is no such model, ConfigError for a packing not known."""
    if (file := gguf_file(config.model)) is not None:
        folder = settings_folder(file)
        source = GGUFBlocks(open_gguf(file), read_json(folder / "config.json"), file)
        return Checkpoint("gguf", folder, load_spec(folder), source, read_gguf_matrix)
    folder = resolve_model(config.model, dtype_of(config))
    method = quantization_method(folder)
    spec, tensors = load_spec(folder), SafetensorsFolder(folder)
    if method is None:
        return Checkpoint("none", folder, spec, tensors, lambda source, part: None)
    if method != "gptq":
        raise ConfigError(f"quantization_config of method {method!r} is not supported; allowed: gptq, a GGUF file, or "
                          "float32, bfloat16 or float16 weights")
    settings = read_settings(folder)
    return Checkpoint("gptq", folder, spec, tensors, partial(read_matrix, settings=settings), settings.tied)


@lru_cache(maxsize=16)
def settings_folder(file: Path) -> Path:
    """Configuration and tokenizer of a GGUF file, as a folder; its weights are not written."""
    return convert_gguf(file, None)


def load_tokenizer(config: ModelConfig) -> Tokenizer | None:
    """The model's tokenizer; None where the configuration asks for none."""
    if config.skip_tokenizer_init:
        return None
    file = gguf_file(config.model)
    return Tokenizer.from_folder(settings_folder(file) if file else resolve_model(config.model, dtype_of(config)))


def dtype_of(config: ModelConfig) -> torch.dtype:
    """The type of activations, and of weights that are not packed."""
    return resolve_dtype(str(config.dtype), resolve_device(config.device))
