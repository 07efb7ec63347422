"""GGUF's simple formats as they lie in the file: a block of 32 weights is a group of 32 codes, and stays one.

    Q4_0    scale, 16 bytes              value = scale * (code - 8)
    Q4_1    scale, minimum, 16 bytes     value = scale * code + minimum
    Q8_0    scale, 32 signed bytes       value = scale * (code - 128), with code = byte + 128

Nothing is rounded: scales and minimums are float16 in the file. Other formats come dequantised. (ggml, ggml-common.h.)

N rows, K columns, G = K / 32.
"""
from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m0_basics.loading.gguf import GGUFFile, GGUFWeights
from m0_basics.loading.weights import WeightSource

from ..grid import QuantizedMatrix

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


class GGUFBlocks(WeightSource):
    """A file's tensors: blocks as they are under `NAME.Q4_1` and so on, all others under NAME, as m0 reads them."""

    def __init__(self, file: GGUFFile, config: Mapping[str, Any], path: Path) -> None:
        """`config` is the file's `hf_config`. Raises GGUFError for a tensor that has no place in that model."""
        self.location, self._weights = path, GGUFWeights(file, config, path)
        self._packed = {f"{name}.{tensor.tensor_type.name}": name for name, tensor in self._weights.stored.items()
                        if tensor.tensor_type.name in BLOCK_BYTES and len(tensor.shape) == 2}

    def names(self) -> Collection[str]:
        packed = set(self._packed.values())
        return [*self._packed, *(name for name in self._weights.names() if name not in packed)]

    def read(self, name: str) -> Tensor:
        """A tensor in Hugging Face's row order: the blocks of each row, uint8 [N, bytes], or float32."""
        if name not in self._packed:
            return self._weights.read(name)
        plain = self._packed[name]
        tensor = self._weights.stored[plain]
        rows = torch.from_numpy(tensor.data.reshape(tensor.shape[0], -1).copy())        # the file may not be written to
        return self._weights.in_order(plain, rows)


def read_gguf_matrix(source: WeightSource, part: str) -> QuantizedMatrix | None:
    """The matrix of the layer `part` ("model.layers.0.mlp.up_proj"); None where the file holds it in another format."""
    for kind in BLOCK_BYTES:
        if (name := f"{part}.weight.{kind}") in source.names():
            return unpack_blocks(source.read(name), kind)
    return None


def unpack_blocks(rows: Tensor, kind: str) -> QuantizedMatrix:
    """Rows of blocks, uint8 [N, G * bytes of a block], as a matrix [N, K]."""
    blocks = rows.view(rows.shape[0], -1, BLOCK_BYTES[kind])
    scales = _half(blocks, 0)
    if kind == "Q8_0":
        codes = (blocks[..., 2:] ^ 0x80).flatten(1)             # flipping the sign bit adds 128
        return QuantizedMatrix(codes, scales, 8, zeros=torch.full_like(scales, 128, dtype=torch.uint8))
    at = BLOCK_BYTES[kind] - BLOCK // 2
    nibbles = blocks[..., at:]
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=2).flatten(1)       # low halves are weights 0 to 15
    if kind == "Q4_0":
        return QuantizedMatrix(codes, scales, 4, zeros=torch.full_like(scales, 8, dtype=torch.uint8))
    return QuantizedMatrix(codes, scales, 4, minimums=_half(blocks, 2))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at byte `at` of each block, float32 [N, G]."""
    return blocks[..., at:at + 2].contiguous().view(torch.float16).squeeze(2).float()
