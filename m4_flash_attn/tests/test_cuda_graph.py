"""F4.7: everything about decode graphs but the capture: sizes, padding, when one is used, and the tokens.

The stand-in for a graph runs the launches again: they see the buffers and nothing else, as a replay does.
"""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from m0_basics.attention import AttentionBackend, ScheduledSequence
from m0_basics.model_runner import ModelRunner
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m3_paged_kv import LLM
from m3_paged_kv.metadata import paged_metadata
from m4_flash_attn.cuda_graph import DecodeBuffers, GraphRunner, graph_sizes
from m4_flash_attn.metadata import FlashMetadata, flash_metadata
from m4_flash_attn.reference import paged_attention_reference

PROMPTS = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 7, 20, 13, 3)]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
MAX_LEN = 64


class ReferenceAttention(AttentionBackend):
    """Attention by definition over `FlashMetadata`, so that nothing but the tensors decides. Notes what it is given."""

    def __init__(self, cache, tables) -> None:
        self.cache, self.tables, self.seen = cache, tables, []

    def build_metadata(self, scheduled):
        return flash_metadata(scheduled, self.tables, self.cache.device)

    def forward(self, layer_idx, q, k, v, metadata):
        assert isinstance(metadata, FlashMetadata)
        self.seen.append(metadata)
        stored = metadata.slot_mapping >= 0
        self.cache.store(layer_idx, k[stored], v[stored], metadata.slot_mapping[stored].long())
        caches = self.cache.kv_cache.k[layer_idx], self.cache.kv_cache.v[layer_idx]
        return paged_attention_reference(q, *caches, metadata.query_starts, metadata.seq_lens, metadata.block_table,
                                         metadata.block_size, q.shape[-1] ** -0.5).to(q.dtype)


class StandIn:
    """Captures by remembering what was run; counts replays by the order of capture."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, run):
        index = len(self.replays)
        self.replays.append(0)
        run()

        def replay() -> None:
            self.replays[index] += 1
            run()

        return replay


def make_llm(folder, **options) -> LLM:
    return LLM(str(folder), dtype="float32", max_model_len=MAX_LEN, skip_tokenizer_init=True, num_blocks=40,
               block_size=8, max_num_seqs=5, **options)


def with_graphs(llm: LLM, capture) -> GraphRunner:
    runner = ModelRunner(llm.engine.runner.model, ReferenceAttention(llm.cache, llm.manager.tables))
    llm.engine.runner = GraphRunner(runner, llm.manager.tables.block_size, 5, MAX_LEN, capture)
    return llm.engine.runner


def tokens(llm: LLM, params=GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def test_sizes() -> None:
    """Small batches exactly or nearly, large ones in steps of 16, and the largest itself."""
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(16) == [1, 2, 4, 8, 16]
    assert graph_sizes(50) == [1, 2, 4, 8, 16, 32, 48, 50]
    assert graph_sizes(256) == [1, 2, 4, 8, *range(16, 257, 16)]


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_tokens_are_the_same(family, options, tiny_model) -> None:
    """Prompts run eagerly, decodes are replayed, in the engine and ahead of it."""
    capture = StandIn()
    llm = make_llm(tiny_model(family), **options)
    with_graphs(llm, capture)
    assert tokens(llm) == tokens(make_llm(tiny_model(family)))
    assert sum(capture.replays) >= GREEDY.max_tokens - 1


def test_recordings_are_made_largest_first_and_touch_no_slot(tiny_model) -> None:
    """What is recorded at the start runs on padding: a cache in use would be damaged."""
    llm = make_llm(tiny_model("qwen3"))
    llm.cache.kv_cache.k.fill_(7.0)
    runner = with_graphs(llm, StandIn())
    sizes = [len(metadata.seq_lens) for metadata in runner.backend.seen]
    layers = llm.engine.runner.model.spec.num_hidden_layers
    assert sizes == [size for size in (5, 4, 2, 1) for _ in range(layers)]
    assert (llm.cache.kv_cache.k == 7.0).all()


def test_a_batch_takes_the_smallest_recording_that_holds_it(tiny_model) -> None:
    """Five sequences of different lengths, so that every size from 5 down to 1 comes by."""
    capture = StandIn()
    llm = make_llm(tiny_model("llama"))
    with_graphs(llm, capture)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 5, 7, 9, 11)]
    reference = tokens(make_llm(tiny_model("llama")), params)
    assert tokens(llm, params) == reference
    # Steps with 5, 5, 4, 4, 3, 3, 2, 2, 1, 1 decodes; recordings of 5, 4, 2 and 1 rows, in the order of capture.
    assert capture.replays == [2, 4, 2, 2]


def schedule(llm: LLM, counts: list[tuple[int, int]], params=GREEDY) -> list[ScheduledSequence]:
    scheduled = []
    for computed, new in counts:
        sequence = Sequence(next_seq_id(), SequenceData(list(range(1, computed + new + 1))), params, seed=0)
        assert llm.manager.allocate_slots(sequence, sequence.num_computed_tokens, computed + new)
        sequence.num_computed_tokens = computed
        scheduled.append(ScheduledSequence(sequence, sequence.num_computed_tokens, new))
    return scheduled


def test_what_runs_eagerly(tiny_model) -> None:
    """Prompts, mixed steps, chunks that do not end, too many sequences, and prompt log-probabilities."""
    llm = make_llm(tiny_model("llama"))
    runner = with_graphs(llm, StandIn())

    def fits(counts, params=GREEDY) -> bool:
        return runner.fits(runner.prepare_inputs(schedule(llm, counts, params)))

    assert fits([(3, 1), (9, 1)])
    assert not fits([(0, 4)])
    assert not fits([(3, 1), (0, 4)])
    assert not fits([(3, 1)] * 6)
    assert not fits([(3, 1)], replace(GREEDY, prompt_logprobs=0))
    scheduled = schedule(llm, [(3, 1)])
    scheduled[0].sequence.append_token_id(1)
    assert not runner.fits(runner.prepare_inputs(scheduled))


def test_another_backends_steps_run_eagerly(tiny_model) -> None:
    """Metadata that is not this milestone's cannot be copied to the buffers."""
    llm = make_llm(tiny_model("llama"))
    runner = with_graphs(llm, StandIn())
    scheduled = schedule(llm, [(3, 1)])
    inputs = runner.prepare_inputs(scheduled)
    assert runner.fits(inputs)
    other = paged_metadata(scheduled, llm.manager.tables, llm.cache.device)
    assert not runner.fits(replace(inputs, metadata=other))


def test_buffers_by_hand(tiny_model) -> None:
    """A batch of three after a fuller one: what is left over becomes padding, and the buffers stay where they are."""
    llm = make_llm(tiny_model("llama"))
    runner = ModelRunner(llm.engine.runner.model, ReferenceAttention(llm.cache, llm.manager.tables))
    buffers = DecodeBuffers(5, 8, MAX_LEN, 10, torch.device("cpu"))
    metadata = buffers.metadata(4)
    buffers.fill(runner.prepare_inputs(schedule(llm, [(20, 1), (1, 1), (2, 1), (3, 1)])), 4)
    assert metadata.seq_lens.tolist() == [21, 2, 3, 4]
    assert metadata.slot_mapping.tolist() == [20, 25, 34, 43]
    assert metadata.block_table[:, :3].tolist() == [[0, 1, 2], [3, -1, -1], [4, -1, -1], [5, -1, -1]]
    buffers.fill(runner.prepare_inputs(schedule(llm, [(9, 1), (4, 1), (0, 1)])), 4)
    assert metadata.seq_lens.tolist() == [10, 5, 1, 0]
    assert metadata.slot_mapping.tolist() == [57, 68, 72, -1]
    assert metadata.block_table[:3, :2].tolist() == [[6, 7], [8, -1], [9, -1]]
    assert buffers.input_ids[:3].tolist() == [10, 5, 1]
    assert buffers.positions[:3].tolist() == [9, 4, 0]
    assert metadata.query_start_loc == metadata.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert (metadata.max_query_len, metadata.max_seq_len, metadata.block_size) == (1, MAX_LEN, 8)
    assert metadata.seq_lens.data_ptr() == buffers.seq_lens.data_ptr()
    assert metadata.block_table.shape == (4, 8)


def test_logits_of_a_padded_batch_are_the_eager_ones(tiny_model) -> None:
    llm = make_llm(tiny_model("qwen3"))
    runner = with_graphs(llm, StandIn())
    scheduled = schedule(llm, [(0, 1), (0, 1), (0, 1)])
    eager = runner.runner.execute_model(scheduled)
    replayed = runner.execute_model(scheduled)
    assert replayed.shape == eager.shape == (3, llm.engine.runner.model.spec.vocab_size)
    assert replayed.data_ptr() == runner.buffers.logits.data_ptr()
    torch.testing.assert_close(replayed, eager)
