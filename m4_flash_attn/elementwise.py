"""What lies between the products of a decoder layer, as operations that are worth fusing.

    add_rms_norm    x += addend, then x / rms(x) * weight        two passes over memory instead of six
    silu_mul        silu(gate) * up                              one instead of three

`TorchOps` is the readable version, the one that the fast ones are held equal to.

T tokens in the step.
"""
from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class ElementwiseOps(ABC):
    """The element-wise parts of a decoder layer."""

    @abstractmethod
    def add_rms_norm(self, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """x [T, n] += addend, in place, where there is one; returns x / rms(x) * weight [T, n]."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 n] -> silu(gate) * up [T, n]."""


class TorchOps(ElementwiseOps):
    """One torch operation after the other, as in the model of milestone 0."""

    def add_rms_norm(self, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if addend is not None:
            x += addend
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
