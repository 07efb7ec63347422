"""F3.2, F3.3: blocks in any order give what rows give, and nothing that was never written is read."""
from __future__ import annotations

import random

import pytest
import torch

from m0_basics.attention import ScheduledSequence
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv.attention import PagedAttention
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager, paged_manager
from m3_paged_kv.metadata import paged_metadata

HEAD_DIM, CPU = 8, torch.device("cpu")


def schedule(computed: int, new: int) -> ScheduledSequence:
    sequence = Sequence(next_seq_id(), SequenceData([1] * (computed + new)), SamplingParams(), seed=0)
    sequence.num_computed_tokens = computed
    return ScheduledSequence.rest(sequence)


def allocate(manager: PagedKVCacheManager, scheduled: list[ScheduledSequence], seed: int) -> None:
    """Let the sequences grow by turns, so that the blocks of each are scattered."""
    dice, lengths = random.Random(seed), {s.sequence: 0 for s in scheduled}
    ends = {s.sequence: s.end for s in scheduled}
    while growing := [s for s in lengths if lengths[s] < ends[s]]:
        sequence = dice.choice(growing)
        assert manager.allocate_slots(sequence, lengths[sequence], 1)
        lengths[sequence] += 1


def test_metadata_by_hand() -> None:
    """A prompt of 5 tokens, a decode after 6, a continued prompt of 2 after 3; blocks of 4."""
    manager = paged_manager(8, 4)
    a, b, c = schedule(0, 5), schedule(6, 1), schedule(3, 2)
    for s in (b, a, c):                     # b gets blocks 0 1, a gets 2 3, c gets 4 5
        assert manager.allocate_slots(s.sequence, 0, s.end)
    metadata = paged_metadata([a, b, c], manager.tables, CPU)
    assert metadata.query_start_loc == [0, 5, 6, 8]
    assert metadata.seq_lens.tolist() == [5, 7, 5]
    assert metadata.block_table.tolist() == [[2, 3], [0, 1], [4, 5]]
    assert metadata.slot_mapping.tolist() == [8, 9, 10, 11, 12, 6, 19, 20]
    assert metadata.max_query_len == 5
    assert {t.dtype for t in (metadata.seq_lens, metadata.block_table, metadata.slot_mapping)} == {torch.int32}


def test_block_table_is_padded_with_minus_one() -> None:
    """F3.2: [sequences, most blocks of any], -1 beyond the last block."""
    manager = paged_manager(8, 4)
    scheduled = [schedule(0, n) for n in (3, 12, 5)]
    for s in scheduled:
        assert manager.allocate_slots(s.sequence, 0, s.num_tokens)
    table = paged_metadata(scheduled, manager.tables, CPU).block_table
    assert (table.shape, table.dtype) == ((3, 3), torch.int32)
    assert table.tolist() == [[0, -1, -1], [1, 2, 3], [4, 5, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_equals_attention_written_out(block_size: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Against a softmax in double precision, per sequence and head. Unwritten slots hold NaN."""
    num_heads, num_kv_heads = heads
    scheduled = [schedule(*s) for s in [(0, 7), (20, 1), (5, 3), (0, 1), *((n, 1) for n in range(1, 30, 3))]]
    spec = ModelSpec("LlamaForCausalLM", 8, 8, 8, 1, num_heads, num_kv_heads, HEAD_DIM, 64, rms_norm_eps=1e-5,
                     rope_theta=1e4, tie_word_embeddings=False)
    manager = paged_manager(400, block_size)
    cache = SlotCache(spec, 400 * block_size, dtype, CPU)
    cache.kv_cache.k.fill_(float("nan"))
    cache.kv_cache.v.fill_(float("nan"))
    allocate(manager, scheduled, seed=block_size)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int, count: int) -> torch.Tensor:
        return torch.randn(n, count, HEAD_DIM, generator=generator).to(dtype)

    queries = [draw(s.num_tokens, num_heads) for s in scheduled]
    keys, values = ([draw(s.end, num_kv_heads) for s in scheduled] for _ in range(2))
    for s, k, v in zip(scheduled, keys, values, strict=True):
        table = manager.tables[s.sequence]
        slots = [table[i // block_size] * block_size + i % block_size for i in range(s.sequence.num_computed_tokens)]
        if slots:
            cache.store(0, k[:len(slots)], v[:len(slots)], torch.tensor(slots))
    backend = PagedAttention(cache, manager.tables, dtype)
    new_keys, new_values = (torch.cat([x[-s.num_tokens:] for s, x in zip(scheduled, xs, strict=True)])
                            for xs in (keys, values))
    out = backend.forward(0, torch.cat(queries), new_keys, new_values, backend.build_metadata(scheduled))
    expected = torch.cat([written_out(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)])
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [n, H_q, D], the newest n of the L tokens in k, v [L, H_kv, D] -> [n, H_q, D] in float64."""
    n, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float64)
    for i in range(n):
        visible = k.shape[0] - n + i + 1
        for head in range(num_heads):
            kv_head = head // (num_heads // k.shape[1])
            scores = k[:visible, kv_head].double() @ q[i, head].double() / HEAD_DIM ** 0.5
            out[i, head] = torch.softmax(scores, 0) @ v[:visible, kv_head].double()
    return out
