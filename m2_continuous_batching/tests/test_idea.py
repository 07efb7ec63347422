"""The milestone's idea in 80 lines gives what its engine gives, and runs by itself."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m0_basics.attention import ScheduledSequence
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.idea import run_idea
from m2_continuous_batching import LLM
from m2_continuous_batching.attention import RaggedAttention
from m2_continuous_batching.idea import VOCAB, E, Request, attend, run
from m2_continuous_batching.kv_cache_manager import RowKVCacheManager
from m2_continuous_batching.plugins import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler
from m2_continuous_batching.slot_cache import SlotCache

ROW_SIZE = 24
# Name, prompt tokens, output tokens: at least two, so that nobody leaves with its prompt.
WORK = [("A", 3, 5), ("B", 4, 17), ("C", 5, 3), ("D", 1, 7), ("E", 7, 4), ("F", 2, 9), ("G", 9, 2), ("H", 3, 6)]


def make_model() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"embedding": torch.randn(VOCAB, E), "qkv": torch.randn(E, 3 * E), "head": torch.randn(E, VOCAB)}


def make_requests() -> list[Request]:
    return [Request(name, list(range(5, 5 + prompt)), prompt + output) for name, prompt, output in WORK]


@pytest.mark.slow
def test_it_runs_by_itself() -> None:
    assert "same tokens" in run_idea("m2_continuous_batching")


@pytest.mark.parametrize("max_num_seqs", [1, 3, 4, 8])
def test_same_steps_as_the_engine(tiny_model: TinyModels, max_num_seqs: int) -> None:
    """Who runs in each step, from the first to the last."""
    steps: list[list[str]] = []

    class Watch(SchedulerPlugin):
        def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
            steps.append(sorted(names[s.sequence.seq_id] for s in stats.output.scheduled))

    llm = LLM(str(tiny_model("qwen3")), [Watch()], dtype="float32", max_num_seqs=max_num_seqs, max_model_len=64,
              skip_tokenizer_init=True)
    names: dict[int, str] = {}
    for name, prompt, output in WORK:
        request = llm.input_processor.process(list(range(5, 5 + prompt)), greedy(output))
        names[request.sequences[0].seq_id] = name
        llm.engine.add_request(request)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert [sorted(batch) for batch in run(make_requests(), max_num_seqs, make_model())] == steps


def test_same_attention_as_the_engine() -> None:
    """Prompts, continued prompts and decodes in one batch, over `RaggedAttention` in rows of no order."""
    spans = [(0, 7), (20, 21), (5, 8), (0, 1), (3, 4), (11, 12)]
    spec = ModelSpec("LlamaForCausalLM", 8, 8, 8, 1, 1, 1, E, ROW_SIZE, rms_norm_eps=1e-5, rope_theta=1e4,
                     tie_word_embeddings=False)
    manager = RowKVCacheManager(len(spans) + 2, ROW_SIZE)
    cache = SlotCache(spec, manager.num_rows * ROW_SIZE, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    q, k, v = torch.randn(14, E), torch.randn(53, E), torch.randn(53, E)
    scheduled, new = [], list[Tensor]()
    for (start, end), keys, values in zip(spans, *(x.split([end for _, end in spans]) for x in (k, v)), strict=True):
        sequence = Sequence(next_seq_id(), SequenceData([1] * end), SamplingParams(), seed=0)
        assert manager.allocate_slots(sequence, start, end - start)
        sequence.num_computed_tokens = start
        first = manager.first_slot(sequence)
        cache.store(0, keys[:start, None], values[:start, None], torch.arange(first, first + start))
        scheduled.append(ScheduledSequence(sequence, start, end - start))
        new.append(torch.stack((keys[start:], values[start:])))
    backend = RaggedAttention(cache, manager, torch.float32)
    new_keys, new_values = torch.cat(new, dim=1).unsqueeze(2)
    out = backend.forward(0, q.unsqueeze(1), new_keys, new_values, backend.build_metadata(scheduled))
    torch.testing.assert_close(attend(q, k, v, spans), out.squeeze(1), rtol=1e-5, atol=1e-5)
