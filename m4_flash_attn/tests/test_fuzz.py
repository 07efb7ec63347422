"""F3.5, F3.6, F3.8 on this milestone's engine: preemption, swap and forks change no token that the kernels make.

m3's fuzz test, with one difference: the engine with room for all is m3's, so the two share no kernel.
"""
from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m0_basics.tools.testing.fixtures import TinyModels
from m3_paged_kv.tests import test_fuzz as m3
from m4_flash_attn import LLM


@cache
def engine(folder: str, policy: str, num_blocks: int, block_size: int, swap_space: float, max_num_seqs: int,
           async_scheduling: bool) -> tuple[LLM, m3.Auditor]:
    """Engines are kept: a test that leaves something behind spoils the next."""
    auditor = m3.Auditor()
    llm = LLM(folder, plugins=[auditor], dtype="float32", max_model_len=m3.LONGEST, policy=policy,
              num_blocks=num_blocks, block_size=block_size, swap_space=swap_space, max_num_seqs=max_num_seqs,
              skip_tokenizer_init=True, async_scheduling=async_scheduling)
    assert llm.attention_backend == "cpu"
    return llm, auditor


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(work=st.lists(m3.jobs(), min_size=1, max_size=6), policy=st.sampled_from(m3.POLICIES),
       shape=st.sampled_from(m3.SHAPES), swap=st.sampled_from([0.0, 0.00002, 0.01]), places=st.sampled_from([2, 5, 16]),
       ahead=st.booleans())
def test_tiny_pools_change_no_token(tiny_model: TinyModels, work: list[dict[str, Any]], policy: str,
                                    shape: tuple[int, int], swap: float, places: int, ahead: bool) -> None:
    folder = str(tiny_model("qwen3"))
    roomy = m3.engine(folder, "fcfs", 512, 16, 0.0, 64, False)
    tight = engine(folder, policy, *shape, swap, places, ahead)
    expected = m3.serve(roomy, [job | {"abort": None} for job in work])
    got = m3.serve(tight, work)         # type: ignore[arg-type]
    for job, ours, theirs in zip(work, got, expected, strict=True):
        assert theirs is not None
        if ours is None:
            assert job["abort"] is not None
        else:
            m3.assert_same_but_for_rounding(roomy[0], m3.request_of(roomy[0], job), ours, theirs)
    manager = tight[0].manager
    assert (manager.usage, len(manager.swapped), manager.swapped.host_pool.num_used) == (0.0, 0, 0)
