"""What rounding the activations to 8 bits costs: rounded and turned back in front of every product.

    by token   one scale for all of a token's inputs: an outlier in one of them leaves the others few steps
    by group   one scale for each 64 of them: an outlier harms its own group alone

The kernels do the same with real integers; here only the error counts.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def rounded(x: Tensor, group_size: int | None) -> Tensor:
    """x [..., K] on a grid of -127 ... 127 steps for each row, or for each `group_size` inputs of it."""
    groups = x.unflatten(-1, (-1, x.shape[-1] if group_size is None else group_size))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    scale = scale.masked_fill(scale == 0, 1.0)
    return ((groups / scale).round() * scale).flatten(-2)


@contextmanager
def rounded_inputs(model: nn.Module, group_size: int | None) -> Iterator[None]:
    """Within the block every linear layer of `model` sees its inputs rounded."""
    hooks = [module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], group_size),))
             for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
