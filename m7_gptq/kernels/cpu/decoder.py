"""What m4's one call for all layers multiplies with here: quantised matrices, and plain ones among them.

Every layer may have its own bits. A plain layer is packed as m4 packs it, and its weights say 0 bits.
"""
from __future__ import annotations

from torch import nn

from m4_flash_attn.kernels.cpu.decoder import Products
from m4_flash_attn.kernels.cpu.decoder import weights_of as plain_weights_of

from .linear import CpuQuantizedGatedLinear, CpuQuantizedLinear, Weights, kernels


def weights_of(layer: nn.Module) -> Weights | None:
    """A layer's weights for quantised::Product, where it is packed for the CPU."""
    if isinstance(layer, CpuQuantizedLinear | CpuQuantizedGatedLinear):
        return layer.weights
    if (plain := plain_weights_of(layer)) is not None:
        return Weights(packed=plain.packed, bias=plain.bias, columns=plain.columns, depth=plain.depth)
    return None


PACKED = Products(Weights, weights_of, kernels)
