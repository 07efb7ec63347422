"""Reading a model folder's small files, and the one error for whatever is wrong in a folder."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import ConfigError

_MAX_JSON_BYTES = 256 << 20           # the largest tokenizer.json in use is some 35 MB


class LoadError(ConfigError):
    """A model that is not there, or whose files are damaged or do not fit together."""


def read_text(path: Path) -> str:
    """A UTF-8 file of a model folder. Raises LoadError."""
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise LoadError(f"{path} cannot be read: {size:,} bytes; allowed: at most {_MAX_JSON_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise error if isinstance(error, LoadError) else LoadError(f"{path} cannot be read: {error}") from error


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """A JSON object from a model folder; {} where it may be missing and is."""
    if not path.is_file() and not required:
        return {}
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:           # ten thousand brackets are valid JSON
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise LoadError(f"{path} does not hold a JSON object")
    return data
