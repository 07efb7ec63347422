"""The milestone's idea in 80 lines does what its engine does, and runs by itself."""
from __future__ import annotations

import pytest
import torch

from m0_basics.tools.testing.idea import run_idea
from m7_gptq import idea
from m7_gptq.gptq import quantize_matrix
from m7_gptq.rtn import QuantizeOptions, round_to_nearest


def test_it_runs_by_itself() -> None:
    printed = run_idea("m7_gptq")
    assert "4 bits: outputs off by" in printed
    assert "nothing can be taken back" in printed


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_rounds_as_the_engine_does(bits: int) -> None:
    """One group, whose smallest and largest weight make a scale that fp16 holds exactly."""
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(16, idea.GROUP, generator=generator).clamp(-0.5, 0.5)
    w[:, 3], w[:, 9] = -0.25 * (2 ** bits - 1), 0.25 * (2 ** bits - 1)
    x = torch.randn(300, 8, generator=generator) @ torch.randn(8, idea.GROUP, generator=generator)
    x += 0.2 * torch.randn(300, idea.GROUP, generator=generator)
    options = QuantizeOptions(bits=bits, group_size=idea.GROUP, search=False, desc_act=False,
                              damp_percent=idea.DAMPING)
    torch.testing.assert_close(idea.nearest(w, bits), round_to_nearest(w, options).dequantise())
    mine, theirs = idea.gptq(w, x, bits), quantize_matrix(w, 2 / 300 * x.T @ x, options).dequantise()
    assert float(((mine - theirs).abs() < 1e-5).float().mean()) > 0.97          # but for ties
    assert idea.output_error(w, mine, x) == pytest.approx(idea.output_error(w, theirs, x), rel=0.05)
    assert idea.output_error(w, mine, x) < 0.7 * idea.output_error(w, idea.nearest(w, bits), x)
