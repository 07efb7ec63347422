"""The Q4_1 trap: a model that was 4-bit already is "quantised" to 4 bits without any loss.

The default model comes from a GGUF file whose layers are Q4_1: blocks of 32 weights, 16 evenly spaced values each, a
scale and a minimum. Round it to nearest on the same kind of grid and every weight lands where it was. A perplexity
measured that way says nothing. With integer zero points, or other groups, the grids differ and the comparison is fair;
its "full precision" is then the dequantised model.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m0_basics.config import DEFAULT_MODEL, ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model import CausalLM

from ..grid import QuantizedMatrix
from ..rtn import QuantizeOptions, round_to_nearest


def with_minimums(weight: Tensor, group_size: int) -> QuantizedMatrix:
    """`weight` [N, K] rounded to 4 bits with a floating-point minimum and scale per group, as Q4_1 does."""
    groups = weight.unflatten(1, (-1, group_size))
    low = groups.amin(2)
    scale = (groups.amax(2) - low) / 15
    steps = (groups - low.unsqueeze(2)) / scale.masked_fill(scale == 0, 1.0).unsqueeze(2)
    return QuantizedMatrix(steps.round().clamp(0, 15).flatten(1).to(torch.uint8), scale, 4, minimums=low)


def q4_1_trap(model: CausalLM | None = None) -> dict[str, Any]:
    """Relative error |W' - W| / |W| over all decoder layers of `model` (the default one), on three kinds of grid."""
    if model is None:
        model = load_model(ModelConfig(model=DEFAULT_MODEL, dtype="float32", device="cpu"))
    weights = [m.weight.detach() for layer in model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    total = sum(float(w.square().sum(dtype=torch.float64)) for w in weights)

    def error(matrix: Any) -> float:
        wrong = sum(float((matrix(w).dequantise() - w).square().sum(dtype=torch.float64)) for w in weights)
        return float((wrong / total) ** 0.5)

    def integer(group_size: int) -> float:
        options = QuantizeOptions(group_size=group_size, method="rtn", search=False)
        return error(lambda w: round_to_nearest(w, options))

    return {"relative_error": {"floating-point minimum, groups of 32": error(lambda w: with_minimums(w, 32)),
                               "floating-point minimum, groups of 64": error(lambda w: with_minimums(w, 64)),
                               "integer zero point, groups of 32": integer(32),
                               "integer zero point, groups of 64": integer(64)}}
