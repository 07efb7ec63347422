"""A model on quantised weights, with its layers fused as m4 fuses them: what a machine has kernels for is packed.

    CPU, float32 or bfloat16    packed C++ layers, all in one call
    GPU                         packed Triton layers, where Triton is installed
    elsewhere                   the readable layers stay

Layers that are not quantised become what m4 makes of them. An embedding that shares the output matrix's memory goes on
doing so.
"""
from __future__ import annotations

import logging
from functools import partial

import torch
from torch import nn

from m0_basics.model import CausalLM
from m4_flash_attn.kernels.cpu.build import BuildError
from m4_flash_attn.kernels.layer_kernels import layer_kernels_for, stack
from m4_flash_attn.kernels.triton import has_triton
from m4_flash_attn.layers import LayerKernels, fuse

from ..linear import QuantizedEmbedding, QuantizedLinear
from .cpu.build import library
from .cpu.decoder import PACKED
from .cpu.large_pages import LargePages
from .cpu.linear import DTYPES, Activations, CpuQuantizedEmbedding, CpuQuantizedGatedLinear, CpuQuantizedLinear
from .packed import pack

logger = logging.getLogger(__name__)


def fuse_packed(model: CausalLM, activations: Activations) -> CausalLM:
    """Exchange the model's layers, its output matrix and its embedding; returns the same model.

    activations: how the packed CPU layers take x (cpu/linear.py); the others take it as it is.
    """
    embedding, head = model.embed_tokens, model.lm_head
    is_tied = (isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
               and embedding.matrix is head.matrix)
    fuse(model, layer_kernels(model.device, model.dtype, activations))
    if isinstance(embedding, QuantizedEmbedding) and has_packed_layers(model.device, model.dtype):
        packed = (model.lm_head.packed if is_tied and isinstance(model.lm_head, CpuQuantizedLinear)
                  else pack(embedding.matrix, library().quantized_panel()))
        model.embed_tokens = CpuQuantizedEmbedding(packed, model.dtype)
    elif isinstance(embedding, QuantizedEmbedding) and model.device.type == "cuda" and has_triton():
        from .triton.linear import pack_embedding
        model.embed_tokens = pack_embedding(embedding, model.lm_head, is_tied)
    return model


def has_packed_layers(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether quantised layers run packed on the CPU: where they do, `activations` means something."""
    if device.type != "cpu" or dtype not in DTYPES:
        return False
    try:
        library()
    except BuildError as error:
        logger.warning("quantised layers are dequantised at each use, which is slow: %s", error)
        return False
    return True


def layer_kernels(device: torch.device, dtype: torch.dtype, activations: Activations) -> LayerKernels:
    """m4's parts for plain layers, and the packed ones for quantised layers."""
    plain = layer_kernels_for(device, dtype)
    if device.type == "cuda":
        if not has_triton():
            return plain
        from .triton.linear import quantized_layer_kernels
        return quantized_layer_kernels(plain, dtype)
    if not has_packed_layers(device, dtype):
        return plain

    memory = LargePages()

    def pack_layer(linear: nn.Module) -> nn.Module:
        if isinstance(linear, QuantizedLinear):
            return CpuQuantizedLinear(linear.matrix, linear.bias, dtype, activations, None, memory)
        return plain.pack(linear)

    def gate(linear: nn.Module) -> nn.Module:
        if isinstance(linear, QuantizedLinear):
            return CpuQuantizedGatedLinear(linear.matrix, dtype, activations, linear.bias, memory)
        return plain.gate(linear)

    def head(linear: nn.Module) -> nn.Module:
        if isinstance(linear, QuantizedLinear):
            return CpuQuantizedLinear(linear.matrix, linear.bias, dtype, activations, torch.float32, memory)
        return plain.head(linear)

    return LayerKernels(plain.ops, pack_layer, gate, head, partial(stack, products=PACKED))
