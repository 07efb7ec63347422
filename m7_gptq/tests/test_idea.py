"""The milestone's idea in 80 lines does what its engine does, and runs by itself."""
from __future__ import annotations

import pytest
import torch

from m0_basics.tools.testing.idea import run_idea
from m7_gptq import idea
from m7_gptq.gptq import quantize_matrix
from m7_gptq.rtn import QuantizeOptions, round_to_nearest

OPTIONS = QuantizeOptions(bits=idea.BITS, group_size=idea.GROUP, damp_percent=idea.DAMPING, search=False,
                          desc_act=False)


def test_it_runs_by_itself() -> None:
    printed = run_idea("m7_gptq")
    assert "to the nearest  weights off by 15 %, outputs for unseen inputs by 16.3 %" in printed
    assert "GPTQ            weights off by 18 %, outputs for unseen inputs by 5.9 %" in printed


@pytest.mark.parametrize("seed", range(5))
def test_it_chooses_what_the_engine_chooses(seed: int) -> None:
    """Rounding to the nearest exactly; GPTQ but for near-ties, which fall as the last digits of the sums do."""
    torch.manual_seed(seed)
    weight, inputs = torch.randn(24, 64), torch.randn(200, 64) @ torch.randn(64, 64)
    assert torch.equal(idea.nearest(weight), round_to_nearest(weight, OPTIONS).dequantise())
    rounded = idea.gptq(weight, inputs)
    engine = quantize_matrix(weight, 2 / 200 * inputs.T @ inputs, OPTIONS).dequantise()
    assert (rounded == engine).float().mean() > 0.9
    assert idea.output_error(weight, rounded, inputs) == pytest.approx(idea.output_error(weight, engine, inputs),
                                                                       rel=0.02)
    assert idea.output_error(weight, rounded, inputs) < idea.output_error(weight, idea.nearest(weight), inputs) * 0.7
