"""F1.2: attention over the contiguous cache equals the definition, written out in loops."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from m0_basics.attention import FullAttention, ScheduledSequence
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m1_offline.attention import ContiguousAttention, attend
from m1_offline.kv_cache import CacheRows, KVCache

HEAD_DIM = 8


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, one query and one head at a time, in float64; query i of n is token L - n + i of L."""
    n, num_heads, head_dim = q.shape
    length, num_kv_heads, _ = k.shape
    out = torch.zeros(n, num_heads, head_dim, dtype=torch.float64)
    for i in range(n):
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = [float(q[i, head].double() @ k[j, kv_head].double()) / math.sqrt(head_dim)
                      for j in range(length - n + i + 1)]
            largest = max(scores)
            weights = [math.exp(score - largest) for score in scores]
            for j, weight in enumerate(weights):
                out[i, head] += weight / sum(weights) * v[j, kv_head].double()
    return out


def random_qkv(n: int, length: int, group: int, dtype: torch.dtype, num_kv_heads: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(100 * n + length + group)
    shapes = ((n, group * num_kv_heads), (length, num_kv_heads), (length, num_kv_heads))
    q, k, v = (torch.randn(*shape, HEAD_DIM, generator=generator).to(dtype) for shape in shapes)
    return 2 * q, k, v


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(("n", "length"), [(1, 1), (1, 13), (7, 7), (2, 9), (5, 6), (8, 20)])
def test_attend_equals_the_definition(n: int, length: int, group: int, dtype: torch.dtype, tolerance: float) -> None:
    """F1.2: one new token, a whole prompt, some new tokens after earlier ones; grouped heads."""
    q, k, v = random_qkv(n, length, group, dtype)
    out = attend(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    torch.testing.assert_close(out.double(), naive(q, k, v), atol=tolerance, rtol=tolerance)


def test_attend_takes_views() -> None:
    """F1.2: the model hands over slices of one packed product, and the cache slices of its slots."""
    q, k, v = random_qkv(4, 9, 2, torch.float32)
    packed = torch.cat((q, q.flip(0)), dim=1)               # 8 heads, of which the first 4 are meant
    slots = torch.cat((torch.full((3, 2, HEAD_DIM), float("nan")), k, torch.full((2, 2, HEAD_DIM), float("nan"))))
    for rows in (slice(0, 4), slice(3, 4)):
        torch.testing.assert_close(attend(packed[rows, :4], slots[3:12], v), attend(q[rows], k, v))


class Backend:
    """A cache of one layer and four rows, and the sequences in it."""

    def __init__(self, num_kv_heads: int = 2, row_size: int = 16) -> None:
        spec = ModelSpec("LlamaForCausalLM", 8, 4, 4, 2, 2 * num_kv_heads, num_kv_heads, HEAD_DIM, row_size, 1e-6,
                         1e4, False)
        self.cache = KVCache(spec, 4 * row_size, torch.float32, torch.device("cpu"))
        self.cache.k.fill_(float("nan"))
        self.cache.v.fill_(float("nan"))
        self.rows = CacheRows(self.cache, 4, row_size)
        self.attention = ContiguousAttention(self.cache, self.rows)

    def add(self, num_tokens: int) -> Sequence:
        sequence = Sequence(next_seq_id(), SequenceData([0] * num_tokens), SamplingParams(), 0)
        self.rows.allocate(sequence)
        return sequence


def test_several_sequences_equal_each_alone() -> None:
    """F1.2: a packed step over a prefill, a chunk and two decodes gives every sequence its own attention.

    Sequences join in different steps, so that their rows are out of order. The reference is m0's attention over
    the whole sequence, which keeps nothing.
    """
    backend, lengths = Backend(), [11, 7, 14, 5]
    sequences = [backend.add(n) for n in lengths]
    tensors = [random_qkv(n, n, 2, torch.float32) for n in lengths]
    done: list[list[Tensor]] = [[], [], [], []]
    # (sequence, number of tokens) of each packed step
    for step in ([(2, 9), (0, 11)], [(1, 3), (2, 1)], [(3, 5), (2, 3), (1, 1)], [(1, 3), (2, 1)]):
        scheduled = [ScheduledSequence(sequences[i], sequences[i].num_computed_tokens, n) for i, n in step]
        metadata = backend.attention.build_metadata(scheduled)
        ranges = [slice(s.sequence.num_computed_tokens, s.end) for s in scheduled]
        q, k, v = (torch.cat([tensors[i][part][tokens] for (i, _), tokens in zip(step, ranges, strict=True)])
                   for part in range(3))
        for layer in (0, 1):            # the second layer gets other keys, and must not see the first one's
            out = backend.attention.forward(layer, q, k * (1 + layer), v, metadata)
            if layer == 0:
                for (i, _), part in zip(step, out.split([n for _, n in step]), strict=True):
                    done[i].append(part)
        for s in scheduled:
            s.sequence.num_computed_tokens = s.end
    full = FullAttention()
    for sequence, parts, (q, k, v) in zip(sequences, done, tensors, strict=True):
        assert sequence.num_computed_tokens == sequence.num_tokens
        sequence.num_computed_tokens = 0
        metadata = full.build_metadata([ScheduledSequence.rest(sequence)])
        torch.testing.assert_close(torch.cat(parts), full.forward(0, q, k, v, metadata), atol=2e-6, rtol=2e-6)


def test_metadata() -> None:
    """F1.2: lengths after the step, and a slot for each new token: first slot of the row + position."""
    backend = Backend()
    first, second = backend.add(10), backend.add(6)
    first.num_computed_tokens = 9
    metadata = backend.attention.build_metadata([ScheduledSequence(second, 0, 4), ScheduledSequence(first, 9, 1)])
    base = [backend.rows.first_slot(s) for s in (second, first)]
    assert sorted(base) == [0, 16]
    assert metadata.query_start_loc == [0, 4, 5]
    assert metadata.seq_lens == [4, 10]
    assert metadata.first_slots == base
    assert metadata.slot_mapping.tolist() == [*range(base[0], base[0] + 4), base[1] + 9]


def test_stored_before_attended() -> None:
    """F1.2: a step's own keys are seen by its queries, and lie where the next step looks for them."""
    backend = Backend()
    sequence = backend.add(2)
    q, k, v = random_qkv(2, 2, 2, torch.float32)
    metadata = backend.attention.build_metadata([ScheduledSequence(sequence, sequence.num_computed_tokens, 2)])
    backend.attention.forward(1, q, k, v, metadata)
    first = backend.rows.first_slot(sequence)
    assert torch.equal(backend.cache.k[1, first:first + 2], k)
    assert torch.equal(backend.cache.v[1, first:first + 2], v)
    assert backend.cache.k[0].isnan().all()
    assert int((~backend.cache.k[1].isnan()).sum()) == k.numel()
