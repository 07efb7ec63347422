"""What tells one model's KV cache from another's: every weight, packed ones by their codes and grids."""
from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import Tensor, nn

from m0_basics.model import CausalLM
from m6_prefix_cache.make_manager import fingerprint_of as fingerprint_of_plain

from ..grid import QuantizedMatrix
from ..linear import QuantizedEmbedding, QuantizedLinear


def fingerprint_of(model: CausalLM, activations: str) -> str:
    """Of a model's shapes, type and every weight, and its activations. To be asked before layers are fused."""
    digest = sha256(f"{fingerprint_of_plain(model)} {activations}".encode())
    for name, matrix in sorted(matrices_of(model)):
        digest.update(f"{name} {matrix.bits}".encode())
        for tensor in tensors_of(matrix):
            digest.update(b"-" if tensor is None else _bytes(tensor))
    return digest.hexdigest()


def matrices_of(model: nn.Module) -> Iterator[tuple[str, QuantizedMatrix]]:
    """The packed matrices of a model that is not fused, by the names of their modules."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            yield name, module.matrix


def tensors_of(matrix: QuantizedMatrix) -> list[Tensor | None]:
    """Codes, scales, zero points, minimums, order."""
    return [matrix.codes, matrix.scales, matrix.zeros, matrix.minimums, matrix.order]


def _bytes(tensor: Tensor) -> bytes:
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.cpu().contiguous().flatten().view(
        torch.uint8).numpy().tobytes()
