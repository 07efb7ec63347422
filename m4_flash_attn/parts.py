"""What runs between attention: the element-wise operations and the linear layers of this machine."""
from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from .backends import has_triton
from .kernels.cpu import ops as cpu
from .kernels.cpu.build import BuildError
from .kernels.cpu.decoder import CpuDecoder, can_stack
from .kernels.cpu.linear import PackedLinear
from .layers import FusedDecoderLayer
from .ops import ElementwiseOps, TorchOps

logger = logging.getLogger(__name__)


def make_ops(device: torch.device, dtype: torch.dtype) -> ElementwiseOps:
    """The fastest element-wise operations that there are for a model."""
    if device.type == "cpu" and dtype in cpu.DTYPES:
        try:
            return cpu.CpuOps(dtype)
        except BuildError as error:
            logger.warning("the layers' element-wise parts run in plain torch: %s", error)
    if device.type == "cuda" and has_triton():
        from .kernels.triton.elementwise import TritonOps
        return TritonOps()
    return TorchOps()


def pack_for(device: torch.device) -> Callable[[nn.Linear], nn.Module]:
    """What turns a linear layer into the one that runs: packed on a CPU, as it is elsewhere."""
    return PackedLinear.of if device.type == "cpu" else _as_it_is


def stack(layers: list[FusedDecoderLayer]) -> list[nn.Module]:
    """One module for all layers where there is a kernel for that, else the layers themselves."""
    return [CpuDecoder(layers)] if can_stack(layers) else [*layers]


def _as_it_is(linear: nn.Linear) -> nn.Linear:
    return linear
