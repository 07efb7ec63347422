"""What runs between attention: the element-wise operations and the linear layers of this machine."""
from __future__ import annotations

import logging

import torch
from torch import nn

from ..elementwise import ElementwiseOps, TorchOps
from ..layers import FusedDecoderLayer, FusedRMSNorm, GatedLinear, LayerKernels, Stacked
from .cpu import bindings as cpu
from .cpu.build import BuildError
from .cpu.decoder import PACKED, CpuDecoder, Products, can_end_with, can_stack
from .cpu.linear import PackedGatedLinear, PackedLinear, choose
from .triton import has_triton

logger = logging.getLogger(__name__)


def layer_kernels_for(device: torch.device, dtype: torch.dtype) -> LayerKernels:
    """The fastest parts that there are for a model on `device` in `dtype`. Linear modules of other kinds stay."""
    ops = make_ops(device, dtype)
    if device.type != "cpu":
        return plain_layer_kernels(ops)
    native = choose(dtype, dtype) == "native"

    def pack(linear: nn.Module) -> nn.Module:
        return PackedLinear.of(linear) if isinstance(linear, nn.Linear) else linear

    def gate(linear: nn.Module) -> nn.Module:
        if native and isinstance(linear, nn.Linear) and linear.bias is None:
            return PackedGatedLinear(linear.weight)
        return GatedLinear(pack(linear), ops)

    def head(linear: nn.Module) -> nn.Module:
        return PackedLinear.of(linear, torch.float32) if isinstance(linear, nn.Linear) else linear

    return LayerKernels(ops, pack, gate, head, stack)


def plain_layer_kernels(ops: ElementwiseOps) -> LayerKernels:
    """Linear layers as they are, the layers one after the other."""
    def as_it_is(linear: nn.Module) -> nn.Module:
        return linear

    return LayerKernels(ops, as_it_is, lambda linear: GatedLinear(linear, ops), as_it_is, one_by_one)


def make_ops(device: torch.device, dtype: torch.dtype) -> ElementwiseOps:
    """The fastest element-wise operations that there are for a model."""
    if device.type == "cpu" and dtype in cpu.DTYPES:
        try:
            return cpu.CpuOps(dtype)
        except BuildError as error:
            logger.info("the layers' element-wise parts run in plain torch: %s", error)    # the backend has warned
    if device.type == "cuda" and has_triton():
        from .triton.elementwise import TritonOps
        return TritonOps()
    return TorchOps()


def stack(layers: list[FusedDecoderLayer], norm: FusedRMSNorm, head: nn.Module, products: Products = PACKED) -> Stacked:
    """One call for all layers and the norm where there is a kernel for that, else one by one."""
    if not can_stack(layers, products):
        return one_by_one(layers, norm, head)
    last = head if can_end_with(head, layers, products) else None
    return Stacked([CpuDecoder(layers, norm, last, products)], nn.Identity(), head)


def one_by_one(layers: list[FusedDecoderLayer], norm: FusedRMSNorm, head: nn.Module) -> Stacked:
    """Everything as it is."""
    return Stacked([*layers], norm, head)
