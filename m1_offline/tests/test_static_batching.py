"""F1.8: a batch padded on the left gives what single runs give; it stays whole until its longest row is done."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from m0_basics.config import ConfigError
from m0_basics.outputs import RequestOutput
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens, mixed_length_prompts, reference_greedy
from m0_basics.tools.testing.tiny_models import VOCAB_SIZE
from m1_offline import LLM
from m1_offline.static_batching import PaddedAttention, StaticBatchEngine, StaticBatchLLM


def make(model: str, **options: Any) -> tuple[StaticBatchLLM, StaticBatchEngine]:
    llm = StaticBatchLLM(model, **{"dtype": "float32", **options})
    assert isinstance(llm.engine, StaticBatchEngine)
    return llm, llm.engine


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("variant", ["qwen3", "qwen2", "llama3_rope"])
def test_padded_batch_gives_what_single_runs_give(tiny_model: TinyModels, variant: str, batch_size: int) -> None:
    """F1.8: mixed prompt lengths, mixed output lengths, greedy and sampled rows side by side."""
    prompts = mixed_length_prompts(VOCAB_SIZE, 8, seed=1)
    params = [greedy(4 + 3 * i) if i % 2 else SamplingParams(seed=i, temperature=1.5, top_k=20, max_tokens=25 - 3 * i,
                                                              ignore_eos=True) for i in range(8)]
    folder = tiny_model(variant)
    batched = make(str(folder), max_num_seqs=batch_size)[0].generate(prompts, params, use_tqdm=False)
    single = LLM(str(folder), dtype="float32")
    alone = [single.generate(prompt, p, use_tqdm=False)[0] for prompt, p in zip(prompts, params, strict=True)]
    assert_same_tokens(ids_of(batched), ids_of(alone))
    assert [b.outputs[0].text for b in batched] == [a.outputs[0].text for a in alone]
    for i in (1, 7):
        assert_same_tokens([batched[i].outputs[0].token_ids], reference_greedy(folder, [prompts[i]], 4 + 3 * i))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_one_row_reaches_max_model_len_while_others_go_on(tiny_model: TinyModels, batch_size: int) -> None:
    """F1.8: a full row is finished early and kept; the others run on past the last position it may have."""
    longest = 48
    prompts = [[i + 1] * length for i, length in enumerate((46, 3, 47, 20, 1, 30, 47, 9))]
    params = [greedy(None) if i != 3 else greedy(5) for i in range(8)]
    folder = tiny_model("qwen3")
    outputs = make(str(folder), max_num_seqs=batch_size, max_model_len=longest)[0].generate(prompts, params,
                                                                                           use_tqdm=False)
    room = [5 if i == 3 else longest - len(prompt) for i, prompt in enumerate(prompts)]
    expected = reference_greedy(folder, prompts, max(room))
    assert_same_tokens(ids_of(outputs), [tokens[:n] for tokens, n in zip(expected, room, strict=True)])
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_slots_that_are_run_and_kept(tiny_model: TinyModels) -> None:
    """F1.8: every row pays for the longest prompt and the longest output, in columns run and in columns held."""
    llm, engine = make(str(tiny_model("qwen3")), max_num_seqs=3)
    held: list[int] = []
    prompts, outputs = [[1] * 5, [2] * 9, [3] * 2, [4] * 7], [6, 2, 11, 3]
    for prompt, n in zip(prompts, outputs, strict=True):
        engine.add_request(llm.input_processor.process(prompt, greedy(n)))
    while engine.has_unfinished_requests():
        engine.step()
        if engine.backend is not None:
            held.append(engine.backend.k.shape[2])
    assert engine.num_slots_run == 3 * (9 + 11 - 1) + 1 * (7 + 3 - 1)
    assert held == [9 + 11 - 1] * (11 - 1) + [7 + 3 - 1] * (3 - 1)
    assert engine.backend is None, "the cache goes with the batch"


def test_a_batch_returns_as_one(tiny_model: TinyModels) -> None:
    """F1.8: a short request waits for the longest of its batch; a new one waits until the batch is done."""
    llm, engine = make(str(tiny_model("qwen3")), max_num_seqs=2)
    requests = [llm.input_processor.process([7, 8], greedy(n)) for n in (2, 5, 1)]
    for request in requests:
        engine.add_request(request)
    steps: list[list[RequestOutput]] = []
    while engine.has_unfinished_requests():
        steps.append(engine.step())
    finished = [[output.request_id for output in outputs] for outputs in steps]
    assert finished == [[], [], [], [], [requests[0].request_id, requests[1].request_id], [requests[2].request_id]]
    times = [r.metrics for r in requests]
    assert [len(t.token_times) for t in times] == [2, 5, 1]
    assert times[0].finished_time < times[1].finished_time      # done early, but not returned early
    assert times[2].first_scheduled_time >= times[1].finished_time


def test_an_aborted_row_neither_stops_nor_loses_the_others(tiny_model: TinyModels) -> None:
    """F1.8: where the last running row is aborted, the rows that were done already are still returned."""
    llm, engine = make(str(tiny_model("qwen3")))
    short, long = llm.stream(PROMPTS[0], greedy(2)), llm.stream(PROMPTS[1], greedy(100))
    got = [i for _ in range(2) for i in next(long).outputs[0].token_ids]
    assert_same_tokens([got], reference_greedy(tiny_model("qwen3"), PROMPTS[1:2], 2))
    for _ in range(5):
        next(long)
    long.close()
    assert engine.has_unfinished_requests()
    parts = list(short)
    assert_same_tokens([[i for part in parts for i in part.outputs[0].token_ids]],
                       reference_greedy(tiny_model("qwen3"), PROMPTS[:1], 2))
    assert not engine.has_unfinished_requests()


def test_what_the_baseline_refuses(tiny_model: TinyModels) -> None:
    """F1.8: an option or parameter that it would ignore is an error."""
    llm, _ = make(str(tiny_model("qwen3")))
    for settings, message in (({"n": 2}, "n=2 is not valid; allowed: 1"),
                              ({"n": 1, "best_of": 2}, "best_of=2 is not valid; allowed: 1"),
                              ({"prompt_logprobs": 1}, "prompt_logprobs=1 is not valid; allowed: None")):
        with pytest.raises(ConfigError, match=message):
            llm.generate(PROMPTS[0], SamplingParams(**settings), use_tqdm=False)
    spec, longest = llm.spec, 64
    worst = 2 * spec.num_hidden_layers * 8 * (2 * longest) * spec.num_key_value_heads * spec.head_dim * 4
    make(str(tiny_model("qwen3")), max_model_len=longest, kv_cache_memory_bytes=worst)
    with pytest.raises(ConfigError, match=f"kv_cache_memory_bytes={worst - 1:,} is too small"):
        make(str(tiny_model("qwen3")), max_model_len=longest, kv_cache_memory_bytes=worst - 1)


def test_precision_of_the_cache(tiny_model: TinyModels) -> None:
    """F1.8: `kv_cache_dtype` is obeyed: what is stored is the exact key, rounded."""
    stored = []
    for dtype in ("float32", "bfloat16"):
        llm, engine = make(str(tiny_model("qwen3")), kv_cache_dtype=dtype)
        for prompt in PROMPTS:
            engine.add_request(llm.input_processor.process(prompt, greedy(2)))
        engine.step()
        assert engine.backend is not None
        stored.append(engine.backend.k[0])          # in the first layer, nothing read from the cache has come in yet
    assert [k.dtype for k in stored] == [torch.float32, torch.bfloat16]
    assert torch.equal(stored[0].bfloat16(), stored[1])


def test_mask(tiny_model: TinyModels) -> None:
    """F1.8: a token sees its own row's tokens up to itself; padding sees itself alone."""
    _, engine = make(str(tiny_model("qwen3")))
    backend = PaddedAttention(engine.model, 2, 5, torch.float32)
    first = backend.build_padded_metadata(torch.tensor([2, 0]), 0, 4).mask[:, 0].int().tolist()
    assert first == [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
                     [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]
    later = backend.build_padded_metadata(torch.tensor([2, 0]), 4, 1).mask[:, 0].int().tolist()
    assert later == [[[0, 0, 1, 1, 1]], [[1, 1, 1, 1, 1]]]
