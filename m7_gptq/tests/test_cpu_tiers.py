"""Each processor's tier: its name, and that all of them compute the same."""
from __future__ import annotations

import ctypes

import pytest
import torch

from m7_gptq.kernels.cpu import build
from m7_gptq.kernels.cpu.linear import Activations, CpuQuantizedLinear
from m7_gptq.tests.cpu_references import compiled_for, draw, make_matrix
from m7_gptq.tests.cpu_tiers import RUNNABLE, TIERS, tier_library
from m7_gptq.tests.random_matrices import Kind


@pytest.mark.parametrize("tier", [name for name in RUNNABLE if name != "native"])
def test_a_library_says_which_tier_it_is(tier: str) -> None:
    ask = tier_library(tier).quantized_int8_tier
    ask.restype = ctypes.c_char_p
    assert ask().decode() == TIERS[tier].int8


def test_this_machines_tier_is_the_best_that_it_can_run() -> None:
    best = next((TIERS[name].int8 for name in RUNNABLE if name != "native"), "plain")
    assert build.int8_tier() in ({"avx512_vnni", "avx512"} if best == "avx512" else {best})


@pytest.mark.parametrize("kind", [Kind(4, 32, zeros=False), Kind(8, 64), Kind(3, 40, ordered=True)])
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_all_tiers_agree(kind: Kind, activations: Activations) -> None:
    """Integer sums are exact; the rest differs by the rounding of sums in fp32, which have another order or no FMA."""
    depth = 6 * kind.group
    matrix, x = make_matrix(50, depth, kind), draw(9, depth, dtype=torch.bfloat16)
    results = {}
    for tier in RUNNABLE:
        with compiled_for(tier):
            results[tier] = CpuQuantizedLinear(matrix, None, torch.bfloat16, activations, torch.float32)(x)
    for tier, y in results.items():
        torch.testing.assert_close(y, results["native"], rtol=1e-4, atol=2e-4)
        if activations == "int8" and tier != "plain" and build.int8_tier() != "plain":
            assert torch.equal(y, results["native"]), tier
