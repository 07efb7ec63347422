"""Bytes of the weights in memory: as the shapes say before anything is loaded, and as a loaded model holds them.

The two are equal to the byte, so the first can be trusted where a model is not at hand. Panels of the packed format are
filled up, which the prediction counts; so are norms, biases and, where it is not the output matrix, the embedding.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m0_basics.model_spec import ModelSpec
from m4_flash_attn.kernels.cpu.linear import PackedGatedLinear, PackedLinear

from ..kernels.cpu.linear import CpuQuantizedEmbedding, CpuQuantizedGatedLinear, CpuQuantizedLinear
from ..kernels.packed import Offsets, packed_bytes
from ..kernels.triton.packing import PackedMatrix as GpuMatrix
from ..linear import QuantizedEmbedding, QuantizedLinear
from .fingerprint import tensors_of


@dataclass(frozen=True)
class Form:
    """How a matrix is stored."""

    bits: int
    group_size: int
    offsets: Offsets = Offsets.ZEROS
    ordered: bool = False               # by activation order

    def nbytes(self, columns: int, depth: int, panel: int, gated: bool = False) -> int:
        return packed_bytes(columns, depth, self.group_size, self.bits, panel, 2, self.offsets, self.ordered, gated)


GGUF_FORMS = {"Q4_0": Form(4, 32, Offsets.SAME_ZERO), "Q4_1": Form(4, 32, Offsets.HALF_MINIMUMS),
              "Q8_0": Form(8, 32, Offsets.SAME_ZERO)}


def gptq_form(bits: int, group_size: int, sym: bool = False, desc_act: bool = False) -> Form:
    """Of the matrices in a folder with these settings."""
    return Form(bits, group_size, Offsets.SAME_ZERO if sym else Offsets.ZEROS, desc_act)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes by what they belong to."""

    layers: int                         # linear layers, with their biases
    head: int                           # the output matrix
    embedding: int                      # 0 where that is the output matrix
    norms: int

    @property
    def total(self) -> int:
        return self.layers + self.head + self.embedding + self.norms


def predict(spec: ModelSpec, dtype: torch.dtype, layers: Form, head: Form, panel: int,
            plain_embedding: bool = False) -> WeightBytes:
    """Bytes of a model whose matrices are packed for the CPU kernels, in panels of `panel` outputs.

    `plain_embedding`: it is not looked up in the output matrix, but kept beside it in `dtype`.
    """
    size, width = dtype.itemsize, spec.hidden_size
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim

    def bias(outputs: int, there: bool) -> int:
        return 4 * -(-outputs // panel) * panel if there else 0

    layer = (layers.nbytes(q + 2 * kv, width, panel) + bias(q + 2 * kv, spec.qkv_bias)
             + layers.nbytes(width, q, panel) + bias(width, spec.o_bias)
             + layers.nbytes(2 * spec.intermediate_size, width, panel, gated=True)
             + layers.nbytes(width, spec.intermediate_size, panel))
    norms = spec.num_hidden_layers * (2 * width + (2 * spec.head_dim if spec.qk_norm else 0)) + width
    return WeightBytes(spec.num_hidden_layers * layer, head.nbytes(spec.vocab_size, width, panel),
                       spec.vocab_size * width * size if plain_embedding else 0, norms * size)


def held_bytes(model: nn.Module) -> int:
    """Bytes of all weights that a model holds, fused or not. What two modules share counts once."""
    return sum(dict(held for module in model.modules() for held in _memory_of(module)).values())


def _memory_of(module: nn.Module) -> Iterator[tuple[int, int]]:
    """(an address that nothing else has, bytes) of what a module holds itself."""
    tensors: list[Tensor | None] = list(module.parameters(recurse=False))
    if isinstance(module, CpuQuantizedLinear | CpuQuantizedGatedLinear):
        tensors += [module.packed.packed, module.packed.order]
        yield id(module), module.nbytes - module.packed.nbytes              # its bias
    elif isinstance(module, CpuQuantizedEmbedding):
        tensors += [module.packed.packed, module.packed.order]
    elif isinstance(module, PackedLinear | PackedGatedLinear):
        yield id(module), module.nbytes
        return
    elif isinstance(module, QuantizedLinear | QuantizedEmbedding):
        tensors += tensors_of(module.matrix)
    elif isinstance(packed := getattr(module, "packed", None), GpuMatrix):      # their classes are Triton's to import
        tensors += [packed.strips, packed.grids, packed.order, getattr(module, "bias", None)]
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "meta":
            yield tensor.data_ptr(), tensor.nbytes
