"""F2.1: the batch of 5, 100, 3 and 80 tokens, once as a static batch, and with a queue behind it."""
from __future__ import annotations

import pytest

from m2_continuous_batching.policies import make_policy
from m2_continuous_batching.tests.fake_loop import FakeLoop, make_request
from m2_continuous_batching.tools.utilisation import Utilisation, continuous_utilisation, replay, static_utilisation

S0_BATCH = [5, 100, 3, 80]


def test_static() -> None:
    assert static_utilisation(S0_BATCH) == Utilisation(188, 400)
    assert static_utilisation(S0_BATCH).ratio == 0.47
    assert replay(S0_BATCH * 3, 4, continuous=False) == Utilisation(3 * 188, 3 * 400)


def test_continuous() -> None:
    """A queue as long as the batch's own lengths changes nothing; a long one brings it near 100 %."""
    assert continuous_utilisation(S0_BATCH, 1) == static_utilisation(S0_BATCH)
    ratios = [continuous_utilisation(S0_BATCH, times).ratio for times in (1, 2, 4, 16, 64)]
    assert ratios == sorted(ratios)
    assert ratios[-1] > 0.92
    assert continuous_utilisation(S0_BATCH, 64).busy == 64 * 188


@pytest.mark.parametrize("continuous", [False, True])
def test_by_hand(continuous: bool) -> None:
    """Two rows; outputs of 4, 1 and 2 tokens. Static: 4 steps, then 2. Continuous: c joins in step 2, by itself."""
    assert replay([4, 1, 2], 2, continuous) == (Utilisation(7, 10) if continuous else Utilisation(7, 12))


def test_refilled_at_every_step() -> None:
    """With the queue never empty, what is lost is only what prompts cost: decoding stands still while they run."""
    loop = FakeLoop(make_policy("fcfs"), max_num_seqs=4)
    for length in [5, 20, 3, 16] * 40:
        loop.add(make_request(1, length))
    idle = 0
    while len(loop.scheduler.waiting) > 0:
        before = len(loop.scheduler.running)
        output = loop.step()
        decodes = [s for s in output.scheduled if len(s.sequence.output_token_ids) > 1]
        if decodes:
            idle += 4 - len(decodes)
            assert len(decodes) == before, "everybody who runs gets a token"
    assert idle <= 40 * 4, "a row stays empty for at most the one step until the next prompt"
