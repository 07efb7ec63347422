"""Finished parts of a run that quantises a model, so that it goes on where it was interrupted.

    .target.quantizing/run.json                        which model, options and text the parts belong to
    .target.quantizing/model.layers.0.safetensors      codes and grids of one part, with their checksum

The folder lies beside the target and is locked while a process works on it. A part that was cut short or damaged on
the disk is not taken up again, nor is one of another run.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m0_basics.config import ConfigError

from ..grid import QuantizedMatrix
from .whole_folder import write_whole

_RUN = "run.json"
_TENSORS = ("codes", "scales", "zeros", "minimums", "order")


class PartStore:
    """Finished parts of a quantised model, in a folder beside the target; see `MatrixStore`. Use it in a `with`.

    `run` describes model, options and calibration text. What a run of another description left is dropped. Only one
    process at a time works on a target: a second one is refused with a ConfigError.
    """

    def __init__(self, target: Path, run: str) -> None:
        target = target.absolute()
        self.target, self.folder = target, target.parent / f".{target.name}.quantizing"
        self.run, self.resumed = run, 0             # parts that were found finished
        self._lock = -1

    def __enter__(self) -> PartStore:
        try:
            self._lock = self._take()
            if self._run_of_leftovers() != self.run:
                self._empty()
                write_whole(self.folder / _RUN, json.dumps({"run": self.run}).encode())
        except OSError as error:
            self._give_back()
            raise ConfigError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Parts stay where the run was interrupted; a finished one needs them no more, nor does one that failed."""
        if kind is None or not issubclass(kind, KeyboardInterrupt | SystemExit):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._give_back()

    def get(self, part: str) -> dict[str, QuantizedMatrix] | None:
        """The matrices of a finished part; None where it is missing, cut short or damaged."""
        from safetensors import safe_open
        try:
            with safe_open(str(self._file(part)), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = json.loads(file.metadata()["about"])
            if about["checksum"] != _checksum(tensors):
                return None
            matrices = {name: _matrix(name, bits, tensors) for name, bits in about["bits"].items()}
        except Exception:               # whatever a damaged file makes of it: the part is quantised again
            return None
        self.resumed += 1
        return matrices

    def put(self, part: str, matrices: Mapping[str, QuantizedMatrix]) -> None:
        """Keep a finished part. Raises ConfigError where the disk is full."""
        from safetensors.torch import save
        tensors = {f"{name}:{field}": tensor.clone().contiguous() for name, matrix in matrices.items()
                   for field in _TENSORS if (tensor := getattr(matrix, field)) is not None}
        about = {"checksum": _checksum(tensors), "bits": {name: matrix.bits for name, matrix in matrices.items()}}
        try:
            write_whole(self._file(part), save(tensors, metadata={"about": json.dumps(about)}))
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be written: {error.strerror or error}; nothing was left at "
                              f"{self.target}") from error

    def _file(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def _take(self) -> int:
        """Open the folder and lock it: the one that lies there, not one that another process has just removed."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(handle)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise ConfigError(f"folder={str(self.target)!r} is being written by another process; allowed: one at "
                                  "a time") from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), self.folder.stat()):
                    return handle
            os.close(handle)

    def _give_back(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _run_of_leftovers(self) -> str | None:
        try:
            run = json.loads((self.folder / _RUN).read_bytes())["run"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return run if isinstance(run, str) else None

    def _empty(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()


def _matrix(name: str, bits: int, tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
    codes, scales, *others = (tensors.get(f"{name}:{field}") for field in _TENSORS)
    assert codes is not None and scales is not None
    return QuantizedMatrix(codes, scales, bits, *others)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
