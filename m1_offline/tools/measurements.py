"""What milestone 1's parts cost on this machine: sampler, detokenizer, a decode step, whole requests.

`python -m m1_offline facts --measure sampler` runs one group and stores it. Times are medians of rounds in which
the ways take turns; trust the ratios within a group, not the milliseconds.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from m0_basics.attention import ScheduledSequence
from m0_basics.outputs import RequestOutput
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.analysis.microbench import Effort, compare, ratio
from m0_basics.tools.bench.metrics import RequestRecord
from m0_basics.tools.bench.workloads import ragged
from m0_basics.tools.documents.factbook import Fact

from ..detokenizer import IncrementalDetokenizer
from ..engine import OfflineEngine
from ..llm import LLM
from ..sampler import FullSampler, uniform
from .step_costs import step_costs

_EFFORT = Effort(rounds=9, sample_seconds=0.05)
_ROWS = 32
PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at",
           "The three laws of motion are", "从前有一座山，", "人工智能是", "北京是中国的")
_TEXT = "The cache keeps keys and values. 从前有一座山，山里有座庙。 Naïve café 😀 — done.\n"


def _engine(llm: LLM) -> OfflineEngine:
    assert isinstance(llm.engine, OfflineEngine)
    return llm.engine


def _scaled(facts: Mapping[str, Fact], prefix: str, divide: float, unit: str) -> dict[str, Fact]:
    """The nanoseconds of `compare` in a larger unit, under longer names."""
    return {f"{prefix}.{name}.{unit}": Fact(float(fact.value) / divide, unit) for name, fact in facts.items()}


@torch.inference_mode()
def _logits(llm: LLM, output: RequestOutput) -> Tensor:
    """The logits [tokens, vocab] that decided an output's tokens, computed again in one pass."""
    engine = _engine(llm)
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    sequence = Sequence(next_seq_id(), SequenceData(ids), SamplingParams(), 0)
    engine.rows.allocate(sequence)
    runner = engine.runner
    hidden = runner.forward(runner.prepare_inputs([ScheduledSequence.rest(sequence)]))
    engine.rows.free(sequence)
    return runner.model.compute_logits(hidden[len(output.prompt_token_ids) - 1:-1])


def sampler() -> dict[str, Fact]:
    """One call of the sampler for 32 requests, on logits of the default model; and how large its nuclei are."""
    llm = LLM(max_model_len=1024)
    params = [SamplingParams(temperature=1.0, max_tokens=64, seed=i, ignore_eos=True) for i in range(8)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    logits = torch.cat([_logits(llm, output) for output in outputs])
    facts: dict[str, Fact] = {"nucleus.rows": Fact(len(logits))}
    for temperature in (0.7, 1.0, 1.5, 2.0):
        size = nucleus_sizes(logits / temperature, 0.95)
        facts |= {f"nucleus.t{temperature}.median": Fact(float(size.float().median())),
                  f"nucleus.t{temperature}.max": Fact(int(size.max())),
                  f"nucleus.t{temperature}.beyond_512": Fact((size > 512).float().mean().item(), "ratio")}
    chosen = logits[::len(logits) // _ROWS][:_ROWS].clone()
    facts["sampler.rows_beyond_512"] = Fact(int((nucleus_sizes(chosen, 0.95) > 512).sum()))
    return facts | sampler_times(chosen, _EFFORT) | random_numbers(_EFFORT)


def nucleus_sizes(logits: Tensor, top_p: float) -> Tensor:
    """logits [R, V] -> [R], tokens in each row's nucleus."""
    ordered = torch.softmax(logits.double(), dim=-1).sort(dim=-1, descending=True).values
    return (ordered.cumsum(dim=-1) - ordered < top_p).sum(dim=-1)


def sampler_times(logits: Tensor, effort: Effort) -> dict[str, Fact]:
    """Milliseconds of one call over logits [R, V], for several kinds of batch."""
    full, rows = FullSampler(), len(logits)
    flat = torch.rand_like(logits)          # all tokens about as probable: the nucleus is nearly the whole vocabulary

    def sequences(*params: SamplingParams) -> list[Sequence]:
        return [Sequence(i, SequenceData([1]), params[i % len(params)], i) for i in range(rows)]

    kinds = {
        "greedy": sequences(SamplingParams(temperature=0)),
        "greedy_logprobs": sequences(SamplingParams(temperature=0, logprobs=5)),
        "temperature": sequences(SamplingParams()),
        "top_k": sequences(SamplingParams(top_k=50)),
        "top_p": sequences(SamplingParams(top_p=0.95)),
        "penalties": sequences(SamplingParams(temperature=0, presence_penalty=0.5)),
        "mixed": sequences(SamplingParams(temperature=0), SamplingParams(), SamplingParams(temperature=0.7, top_k=50),
                           SamplingParams(top_p=0.95)),
    }
    ways: dict[str, Callable[[], object]] = {name: partial(full, logits, batch) for name, batch in kinds.items()}
    ways["top_p_flat"] = partial(full, flat, kinds["top_p"])
    ways["top_p_sort"] = partial(by_full_sort, logits, 0.95, torch.rand(rows, dtype=torch.float64))
    ways["mixed_one_by_one"] = lambda: [full(logits[i:i + 1], [s]) for i, s in enumerate(kinds["mixed"])]
    times = compare(ways, effort)
    return _scaled(times, "sampler", 1e6, "ms") | {
        "sampler.rows": Fact(rows),
        "sampler.vocab": Fact(logits.shape[1]),
        "sampler.sort_over_top_p": ratio(times, "top_p_sort", "top_p"),
        "sampler.flat_over_top_p": ratio(times, "top_p_flat", "top_p"),
        "sampler.top_p_over_greedy": ratio(times, "top_p", "greedy"),
        "sampler.one_by_one_over_mixed": ratio(times, "mixed_one_by_one", "mixed"),
    }


def by_full_sort(logits: Tensor, top_p: float, numbers: Tensor) -> Tensor:
    """The plain way that the sampler is compared with: sort the whole vocabulary, cut, draw."""
    probabilities, ids = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    cumulative = (probabilities * (before < top_p)).double().cumsum(dim=-1)
    target = numbers.unsqueeze(1) * cumulative[:, -1:]
    return ids.gather(1, torch.searchsorted(cumulative, target, right=True))


def random_numbers(effort: Effort) -> dict[str, Fact]:
    """One random number for one request: a hash, or a generator that is kept, or one that is seeded anew."""
    sequence, generator = Sequence(0, SequenceData([1]), SamplingParams(), 1), torch.Generator()
    times = compare({"hash": lambda: uniform(sequence), "generator": lambda: torch.rand((), generator=generator),
                     "new_generator": lambda: torch.rand((), generator=torch.Generator().manual_seed(1))}, effort)
    return _scaled(times, "random", 1e3, "us")


def text() -> dict[str, Fact]:
    """The detokenizer's cost, and how the default model's tokenizer cuts characters."""
    tokenizer = LLM(max_model_len=64, max_num_seqs=1).get_tokenizer()
    facts: dict[str, Fact] = {}
    for name, string in (("emoji", "😀"), ("chinese", "从前有一座山，"), ("family", "👨‍👩‍👧‍👦")):
        ids = tokenizer.encode(string, add_special_tokens=False)
        partial_tokens = sum("\ufffd" in tokenizer.decode([i]) for i in ids)
        facts |= {f"text.{name}.characters": Fact(len(string)), f"text.{name}.bytes": Fact(len(string.encode())),
                  f"text.{name}.tokens": Fact(len(ids)), f"text.{name}.incomplete_tokens": Fact(partial_tokens)}
    ids = tokenizer.encode(_TEXT * 40, add_special_tokens=False)

    def push(length: int) -> None:
        detokenizer = IncrementalDetokenizer(tokenizer)
        for token_id in ids[:length]:
            detokenizer.push(token_id)

    for length in (64, 512):
        times = compare({"incremental": partial(push, length)}, _EFFORT, per=length)        # per token
        times |= compare({"whole": partial(tokenizer.decode, ids[:length])}, _EFFORT)       # what each token would cost
        facts |= _scaled(times, f"text.{length}", 1e3, "us")
        facts[f"text.{length}.whole_over_incremental"] = ratio(times, "whole", "incremental")
    return facts


def step() -> dict[str, Fact]:
    """Where the time of a decode step goes: 1 and 8 outputs side by side, 512 prompt tokens."""
    llm = LLM(max_model_len=1024)
    facts: dict[str, Fact] = {}
    for outputs in (1, 8):
        for name, sampling in (("greedy", "greedy"), ("top_k_top_p", "top-k and top-p")):
            costs = step_costs(llm, sampling, outputs, prompt_len=512, steps=40)
            facts |= {f"step.b{outputs}.{name}.ms": Fact(1e3 * costs.step_s, "ms"),
                      f"step.b{outputs}.{name}.sampler_share": Fact(costs.sample_s / costs.step_s, "ratio"),
                      f"step.b{outputs}.{name}.metadata_share": Fact(costs.metadata_s / costs.step_s, "ratio")}
    return facts


def latency() -> dict[str, Fact]:
    """TTFT, TPOT and ITL of single requests; eight outputs of one request against eight requests of one output."""
    llm = LLM(max_model_len=1024)
    facts: dict[str, Fact] = {}
    for length in (16, 512):
        prompt = list(ragged(1, prompt_min=length, prompt_max=length).requests[0].prompt_token_ids)
        records = [_record(llm, prompt, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
                   for _ in range(4)][1:]           # the first one warms up
        itls = [itl for r in records for itl in r.itls]
        facts |= {
            f"latency.{length}.ttft_ms": Fact(1e3 * statistics.median(r.ttft or 0.0 for r in records), "ms"),
            f"latency.{length}.ttft_over_tpot": Fact(statistics.median((r.ttft or 0.0) / (r.tpot or 1.0)
                                                                       for r in records), "ratio"),
            f"latency.{length}.tpot_ms": Fact(1e3 * statistics.median(r.tpot or 0.0 for r in records), "ms"),
            f"latency.{length}.e2e_ms": Fact(1e3 * statistics.median(r.latency for r in records), "ms"),
            f"latency.{length}.itl_median_ms": Fact(1e3 * statistics.median(itls), "ms"),
            f"latency.{length}.itl_max_ms": Fact(1e3 * max(itls), "ms"),
        }
    eight, one = (SamplingParams(n=n, max_tokens=64, ignore_eos=True) for n in (8, 1))
    seconds: dict[str, list[float]] = {"together": [], "apart": []}
    for _ in range(3):
        seconds["together"].append(_record(llm, prompt, eight).latency)
        seconds["apart"].append(sum(_record(llm, prompt, one).latency for _ in range(8)))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    facts["samples.prefills_saved_s"] = Fact(7 * float(facts["latency.512.ttft_ms"].value) / 1e3, "s")
    return facts | {"samples.together_s": Fact(medians["together"], "s"),
                    "samples.apart_s": Fact(medians["apart"], "s"),
                    "samples.apart_over_together": Fact(medians["apart"] / medians["together"], "ratio")}


def _record(llm: LLM, prompt: list[int], params: SamplingParams) -> RequestRecord:
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    metrics = output.metrics
    assert metrics is not None and metrics.finished_time is not None
    return RequestRecord(metrics.arrival_time, tuple(metrics.token_times), metrics.finished_time, len(prompt),
                         tuple(len(o.token_ids) for o in output.outputs))


GROUPS: dict[str, Callable[[], Mapping[str, Fact]]] = {
    "sampler": sampler, "text": text, "step": step, "latency": latency,
}
