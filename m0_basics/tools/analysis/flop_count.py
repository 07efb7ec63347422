"""Count the floating-point operations that a piece of code really runs.

`FlopCounterMode` sees every operator below PyTorch's dispatcher and adds up those it has a formula for. It has
none for the CPU's fused attention kernel, which would count as nothing; so attention runs as plain
products here, which compute the same thing.
"""
from __future__ import annotations

from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products in `run()`. Masked attention counts as the full rectangle of pairs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
