"""Where converted models lie: a GGUF file becomes a Hugging Face folder once, and is loaded like any other.

The folder is keyed by the file's SHA-256, so a changed file is converted anew and a moved one is not. It is built
beside its place, flushed to the disk and renamed into it: a reader never sees half a folder, whoever comes first.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model_spec import ModelSpec
from .files import LoadError, read_json
from .gguf import GGUFError, GGUFWeights, open_gguf
from .gguf_config import eos_token_ids, hf_config, tokenizer_config
from .gguf_tokenizer import build_tokenizer
from .weights import WeightSource

_FORMAT = 2                           # raise it when the layout of the converted folder changes
_SHARD_BYTES = 2 << 30                # tensors held in memory at once while converting
_PREFIX = "converting-"               # a folder that is being built
_INDEX = "model.safetensors.index.json"
_RECORD = "converted.json"            # each file of a converted folder, and its size in bytes


def cache_dir() -> Path:
    """Where converted models lie: `$LLM_LAB_CACHE`, or `llm-inference-lab` in the user's cache folder."""
    if custom := os.environ.get("LLM_LAB_CACHE"):
        return Path(custom)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-inference-lab"


def convert_gguf(path: Path, dtype: torch.dtype | None) -> Path:
    """Return the Hugging Face folder made from the file at `path` with weights in `dtype`; make it if need be.

    `dtype` None: configuration and tokenizer alone, for who reads the weights from the file itself.
    """
    name = "settings" if dtype is None else str(dtype).removeprefix("torch.")
    try:
        folder = cache_dir() / f"{_sha256(path)[:32]}-v{_FORMAT}-{name}"
    except OSError as error:
        raise GGUFError(f"{path} cannot be read: {error.strerror or error}") from error
    if _is_complete(folder):
        return folder
    file = open_gguf(path)
    config = hf_config(file, path)
    ModelSpec.from_hf_config(config)                    # sizes that make no sense are found before anything is written
    tokenizer = build_tokenizer(file.metadata, path)
    try:
        with _scratch_folder(folder.parent) as scratch:
            tokenizer.save(str(scratch / "tokenizer.json"))
            _write_json(scratch / "tokenizer_config.json", tokenizer_config(file.metadata))
            _write_json(scratch / "generation_config.json", {"eos_token_id": eos_token_ids(file.metadata)})
            if dtype is not None:
                _write_shards(scratch, GGUFWeights(file, config, path), dtype)
            _write_json(scratch / "config.json", config if dtype is None else config | {"dtype": name})
            _write_record(scratch)
            _move(scratch, folder)
    except LoadError:
        raise
    except Exception as error:          # OSError, and what the libraries that write make of it
        reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
        raise GGUFError(f"{path} cannot be converted into {folder.parent}: {reason}; allowed: a folder with room "
                        "for the weights (LLM_LAB_CACHE names another)") from error
    return folder


@contextlib.contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder for what is being built, locked while this process lives; what killed ones left behind is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 60:         # a younger one's owner is about to lock it
                with locked(left):
                    shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with locked(scratch):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises OSError where another process holds the lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _is_complete(folder: Path) -> bool:
    """Whether all files of a converted folder are there, and whole: some clean caches by age, file by file.

    A folder without a record, of an earlier version, is made anew in its place.
    """
    try:
        sizes = read_json(folder / _RECORD)["bytes"]
        return bool(sizes) and all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, LoadError, KeyError, AttributeError, TypeError, ValueError):
        return False


def _write_record(folder: Path) -> None:
    """Write down what the finished folder holds, and flush all of it: a rename may outlive a crash that data does not.
    """
    _write_json(folder / _RECORD, {"bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())}})
    for file in folder.iterdir():
        flush_file(file)
    flush_file(folder)


def flush_file(path: Path) -> None:
    """To the disk: a file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(scratch: Path, folder: Path) -> None:
    """Into its place, unless another process was faster. What lies there otherwise is no model."""
    for _ in range(2):
        try:
            scratch.rename(folder)
            return
        except OSError:
            if _is_complete(folder):
                return
            if not folder.exists():
                raise
            shutil.rmtree(folder, ignore_errors=True)
    raise LoadError(f"{folder} is in the way of a converted model and cannot be removed")


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
    _write_json(folder / _INDEX, {"metadata": {}, "weight_map": weight_map})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
