"""The step's tensors cut from one are those that milestone 3 works out one by one."""
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.attention import ScheduledSequence
from m0_basics.request import Sequence, SequenceData
from m0_basics.sampling_params import SamplingParams
from m3_paged_kv.kv_cache_manager import paged_manager
from m3_paged_kv.metadata import paged_metadata
from m4_flash_attn.metadata import flash_metadata

CPU = torch.device("cpu")


@given(works=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=8),
       block_size=st.integers(1, 17), evicted=st.integers(0, 2))
def test_equal_to_milestone_3(works: list[tuple[int, int]], block_size: int, evicted: int) -> None:
    """Prompts, continued prompts and decodes in any mixture; some sequences have forgotten blocks."""
    manager = paged_manager(600, block_size)
    scheduled = []
    for i, (computed, new) in enumerate(works):
        sequence = Sequence(i, SequenceData([1] * (computed + new)), SamplingParams(), 0)
        if computed:
            assert manager.allocate_slots(sequence, sequence.num_computed_tokens, computed)
            sequence.num_computed_tokens = computed
            manager.tables.drop(sequence, range(min(evicted, (computed - 1) // block_size)))
        assert manager.allocate_slots(sequence, sequence.num_computed_tokens, new)
        scheduled.append(ScheduledSequence(sequence, sequence.num_computed_tokens, new))
    theirs, ours = paged_metadata(scheduled, manager.tables, CPU), flash_metadata(scheduled, manager.tables, CPU)
    assert ours.query_start_loc == ours.query_starts.tolist() == theirs.query_start_loc
    for name in ("seq_lens", "block_table", "slot_mapping"):
        a, b = getattr(theirs, name), getattr(ours, name)
        assert (a.dtype, a.tolist()) == (b.dtype, b.tolist()), name
        assert b.is_contiguous() and b.storage_offset() % 4 == 0        # 16 bytes: Triton compiles for that once
    assert ours.max_query_len == theirs.max_query_len == max(new for _, new in works)
    assert ours.max_seq_len == max(computed + new for computed, new in works)
    assert ours.block_size == block_size
