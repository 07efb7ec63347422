"""Every number that milestone 1's documents may quote.

The computed ones stand here: how large the cache is, how much of it is used, what it saves, what padding costs,
and the small distributions that the sampling answers work through. The measured ones are in `measurements.py`.
All bytes are for bfloat16.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.bench.metrics import RequestRecord
from m0_basics.tools.bench.workloads import Workload, ragged
from m0_basics.tools.divergence import ulp
from m0_basics.tools.documents.factbook import Fact, Facts, Result

from ..benchmark import GROWTH_LENGTHS
from ..config import SchedulerConfig
from ..sampler import candidates, distribution
from . import measurements, output_measurements

SMOLLM2 = SPECS["SmolLM2-135M"]
PROMPT, OUTPUT, NUM_SAMPLES = 512, 128, 8       # the example of the documents: one prompt, several outputs
BLOCK_SIZE = 16                                 # what a paged cache commonly allocates at a time
_NAMES = {"SmolLM2-135M": "smollm2", "Qwen3-0.6B": "qwen3_0_6b", "Llama-3.1-8B": "llama_3_1_8b",
          "Llama-2-13B": "llama_2_13b"}


def models() -> dict[str, Fact]:
    """Bytes of keys and values of the models named in the answers, and the formula that gets them wrong."""
    facts: dict[str, Fact] = {}
    for name, short in _NAMES.items():
        spec = SPECS[name]
        right, wrong = calc.kv_bytes_per_token(spec), calc.kv_bytes_per_token_by_hidden_size(spec)
        facts |= {
            f"{short}.kv_bytes_per_token": Fact(right, "B"),
            f"{short}.kv_bytes_per_token_wrong": Fact(wrong, "B"),
            f"{short}.kv_overstated": Fact(wrong / right, "ratio"),
            f"{short}.kv_bytes.2048": Fact(calc.kv_bytes(spec, 2048), "B"),
            f"{short}.weight_bytes": Fact(calc.weight_bytes(spec), "B"),
            f"{short}.sequences_2048_in_weights": Fact(calc.weight_bytes(spec) / calc.kv_bytes(spec, 2048), "ratio"),
        }
    return facts


def used_share(workload: Workload, row_size: int, block_size: int = 1) -> tuple[float, float]:
    """Share of the reserved slots that holds a token, (when a request ends, on average over its steps).

    A request reserves `row_size` slots, or, with `block_size` > 1, just the blocks that its tokens have reached.
    A request of p prompt and n output tokens stores p + n - 1: the last token is returned and never run.
    """
    at_end, over_time, steps = 0.0, 0.0, 0
    for request in workload.requests:
        first, last = len(request.prompt_token_ids), len(request.prompt_token_ids) + request.output_len - 1
        shares = [stored / (row_size if block_size == 1 else -(-stored // block_size) * block_size)
                  for stored in range(first, last + 1)]
        at_end += shares[-1]
        over_time += sum(shares)
        steps += len(shares)
    return at_end / len(workload.requests), over_time / steps


def cache() -> dict[str, Fact]:
    """The default cache: its size, and what requests use of it."""
    rows, row_size = SchedulerConfig().max_num_seqs, SMOLLM2.max_position_embeddings
    per_token, stored = calc.kv_bytes_per_token(SMOLLM2), PROMPT + OUTPUT - 1
    shared = PROMPT + NUM_SAMPLES * (OUTPUT - 1)
    workload = ragged(64)
    facts = {
        "cache.rows": Fact(rows),
        "cache.row_size": Fact(row_size),
        "cache.slots": Fact(rows * row_size),
        "cache.bytes": Fact(calc.kv_bytes(SMOLLM2, row_size, rows), "B"),
        "cache.row_bytes": Fact(calc.kv_bytes(SMOLLM2, row_size), "B"),
        "cache.over_weights": Fact(calc.kv_bytes(SMOLLM2, row_size, rows) / calc.weight_bytes(SMOLLM2), "ratio"),
        "cache.prompt": Fact(PROMPT),
        "cache.output": Fact(OUTPUT),
        "cache.one_request.tokens": Fact(stored),
        "cache.one_request.of_row": Fact(stored / row_size, "ratio"),
        "cache.one_request.of_cache": Fact(stored / (rows * row_size), "ratio"),
        "cache.fork.copied_bytes": Fact((NUM_SAMPLES - 1) * PROMPT * per_token, "B"),
        "cache.fork.copied_tokens": Fact((NUM_SAMPLES - 1) * PROMPT),
        "cache.fork.samples": Fact(NUM_SAMPLES),
        "cache.fork.stored_tokens": Fact(NUM_SAMPLES * stored),
        "cache.fork.shared_tokens": Fact(shared),
        "cache.fork.stored_over_shared": Fact(NUM_SAMPLES * stored / shared, "ratio"),
        "cache.block_size": Fact(BLOCK_SIZE),
        "cache.longest": Fact(workload.longest),
    }
    for name, size, block in (("model_len", row_size, 1), ("longest", workload.longest, 1), ("blocks", 0, BLOCK_SIZE)):
        at_end, over_time = used_share(workload, size, block)
        facts |= {f"cache.used.{name}.at_end": Fact(at_end, "ratio"),
                  f"cache.used.{name}.over_time": Fact(over_time, "ratio")}
    return facts


def work() -> dict[str, Fact]:
    """FLOPs of a step with and without the cache, and of several outputs from one prompt."""
    facts: dict[str, Fact] = {}
    for n in (128, 512, 2048, 8192):
        uncached, cached = calc.prefill_flops(SMOLLM2, n, causal=True), calc.decode_flops(SMOLLM2, n)
        facts |= {
            f"step.{n}.uncached": Fact(uncached.total, "FLOP"),
            f"step.{n}.cached": Fact(cached.total, "FLOP"),
            f"step.{n}.saved": Fact(uncached.total / cached.total, "ratio"),
            f"step.{n}.cached.attention_share": Fact(cached.attention / cached.total, "ratio"),
        }
    for prompt, output in ((16, 64), (16, 256), (16, 1024), (PROMPT, OUTPUT)):
        with_cache, without = (calc.generate_flops(SMOLLM2, prompt, output, kv_cache, causal=True).total
                               for kv_cache in (True, False))
        facts |= {f"generate.{prompt}+{output}.cached": Fact(with_cache, "FLOP"),
                  f"generate.{prompt}+{output}.uncached": Fact(without, "FLOP"),
                  f"generate.{prompt}+{output}.saved": Fact(without / with_cache, "ratio")}
    alone = calc.generate_flops(SMOLLM2, PROMPT, OUTPUT, True, causal=True).total
    prefill = calc.prefill_flops(SMOLLM2, PROMPT, causal=True).total
    together = prefill + NUM_SAMPLES * (alone - prefill)
    return facts | {"samples.flops_saved": Fact(NUM_SAMPLES * alone / together, "ratio"),
                    "samples.prefill_share": Fact(prefill / alone, "ratio")}


def static_slots(workload: Workload, batch_size: int) -> tuple[int, int, int]:
    """Token slots that a static batch runs, those that hold a token of a running request, and the prompts' padding.

    Requests are batched in order of arrival. Every row runs `longest prompt + longest output - 1` columns.
    """
    run = useful = padding = 0
    for start in range(0, len(workload.requests), batch_size):
        batch = workload.requests[start:start + batch_size]
        prompts, outputs = [len(r.prompt_token_ids) for r in batch], [r.output_len for r in batch]
        run += len(batch) * (max(prompts) + max(outputs) - 1)
        useful += sum(prompts) + sum(outputs) - len(batch)
        padding += len(batch) * max(prompts) - sum(prompts)
    return run, useful, padding


def padding() -> dict[str, Fact]:
    """What padding costs the static batches of `ragged-64`."""
    facts: dict[str, Fact] = {}
    for batch_size in (8, 16, 64):
        run, useful, prompt_padding = static_slots(ragged(64), batch_size)
        facts |= {f"static.{batch_size}.slots": Fact(run), f"static.{batch_size}.useful": Fact(useful / run, "ratio"),
                  f"static.{batch_size}.prompt_padding": Fact(prompt_padding / run, "ratio")}
    return facts


def examples() -> dict[str, Fact]:
    """The small distributions that answers work through, by the sampler's own code."""
    nucleus = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = distribution(nucleus, SamplingParams(top_p=0.9)) > 0
    inside = nucleus.exp().cumsum(0) <= 0.9                 # the rule that loses the token that crosses p
    logits = torch.tensor([2.0, 1.0, 0.0])
    facts = {
        "example.nucleus.kept": Fact(int(kept.sum())),
        "example.nucleus.mass": Fact(nucleus.exp()[kept].sum().item(), "ratio"),
        "example.nucleus.wrong_kept": Fact(int(inside.sum())),
        "example.nucleus.wrong_mass": Fact(nucleus.exp()[inside].sum().item(), "ratio"),
        "example.raw_logprob": Fact(logits.log_softmax(0)[1].item()),
        "generator.state_bytes": Fact(torch.Generator().get_state().numel(), "B"),
        "ulp.bfloat16.at_20": Fact(ulp(20.0, torch.bfloat16)),
        "ulp.float32.at_20": Fact(ulp(20.0, torch.float32)),
    }
    for temperature in (0.5, 1.0, 2.0):
        probabilities = distribution(logits, SamplingParams(temperature=temperature))
        facts |= {f"example.top.t{temperature}": Fact(probabilities[0].item(), "ratio"),
                  f"example.second.t{temperature}": Fact(probabilities[1].item(), "ratio"),
                  f"example.second_logprob.t{temperature}": Fact(probabilities[1].log().item())}
    return facts | _order() | _garden_path()


def _garden_path() -> dict[str, Fact]:
    """Two steps in which the best first token leads to the worse pair: what greedy finds, and what is there."""
    first = {"A": 0.6, "B": 0.4}
    second = {"A": {"a": 0.3, "b": 0.25, "c": 0.25, "d": 0.2}, "B": {"a": 0.9, "b": 0.1}}
    chosen = max(first, key=first.__getitem__)
    return {"example.greedy": Fact(first[chosen] * max(second[chosen].values())),
            "example.best_pair": Fact(max(first[x] * p for x in first for p in second[x].values()))}


def _order() -> dict[str, Fact]:
    """How many tokens top-p keeps where the temperature comes before it, and where it comes after."""
    logits = torch.arange(8.0).flip(0)
    return {"example.order.temperature_first": Fact(_nucleus_size(logits / 2.0, 0.9)),
            "example.order.temperature_last": Fact(_nucleus_size(logits, 0.9))}


def _nucleus_size(logits: torch.Tensor, top_p: float) -> int:
    probabilities, _, _ = candidates(logits.unsqueeze(0), torch.tensor([len(logits)]), torch.tensor([top_p]),
                                     len(logits))
    return int((probabilities > 0).sum())


def metrics() -> dict[str, Fact]:
    """One request's times, worked through: arrival at 0, tokens at the times given, in milliseconds."""
    times: Sequence[float] = (200.0, 220.0, 240.0, 340.0, 360.0)
    record = RequestRecord(0.0, tuple(t / 1e3 for t in times), times[-1] / 1e3, 100, (len(times),))
    assert record.ttft is not None and record.tpot is not None
    return {"example.output_tokens": Fact(len(times)), "example.ttft_ms": Fact(record.ttft * 1e3, "ms"),
            "example.tpot_ms": Fact(record.tpot * 1e3, "ms"), "example.latency_ms": Fact(record.latency * 1e3, "ms"),
            "example.itl_max_ms": Fact(max(record.itls) * 1e3, "ms")}


def bench_results() -> dict[str, Result]:
    """What the README quotes of `python -m m1_offline bench`."""
    facts: dict[str, Result] = {}
    for part, position, names in (("one", 0, ("m1", "m0", "transformers")),
                                  ("several", 1, ("m1", "m1-static", "transformers", "transformers-static"))):
        for i, name in enumerate(names):
            path = f"comparisons.{position}.contenders.{i}"
            facts |= {f"bench.{part}.{name}.tokens_per_s": Result("bench.json", f"{path}.output_throughput", "1/s"),
                      f"bench.{part}.{name}.ratio": Result("bench.json", f"{path}.ratio", "ratio"),
                      f"bench.{part}.{name}.same": Result("bench.json", f"{path}.identical_requests")}
        for key in ("num_requests", "num_prompt_tokens", "num_output_tokens"):
            facts[f"bench.{part}.{key}"] = Result("bench.json", f"comparisons.{position}.workload.{key}")
    for engine in ("m0", "m1"):
        for i, length in enumerate(GROWTH_LENGTHS):
            path = f"measurements.growth.{engine}.{i}"
            facts |= {f"bench.growth.{engine}.{length}.s": Result("bench.json", f"{path}.seconds", "s"),
                      f"bench.growth.{engine}.{length}.flops": Result("bench.json", f"{path}.flops", "FLOP")}
    for i, name in enumerate(("greedy", "temperature", "top_k_top_p")):
        facts |= {f"bench.step.{name}.{key}": Result("bench.json", f"measurements.step_costs.{i}.{key}", unit)
                  for key, unit in (("overhead", "ratio"), ("sample_s", "s"), ("metadata_s", "s"), ("step_s", "s"))}
    return facts | {"bench.static.run": Result("bench.json", "measurements.static_batching.run"),
                    "bench.static.useful": Result("bench.json", "measurements.static_batching.useful")}


BENCH = bench_results()
FACTS = Facts(Path(__file__).parents[1],
              computed={"models": models, "cache": cache, "work": work, "padding": padding, "examples": examples,
                        "metrics": metrics},
              measured=measurements.GROUPS | output_measurements.GROUPS, results=BENCH)
