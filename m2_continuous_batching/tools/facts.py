"""Every number that milestone 2's documents may quote.

The computed ones stand here: what static batches waste, what a step costs at the roofline, what the rows of the
cache hold, what a preemption costs, and what the policies do to a trace, by the real scheduler over a computed clock.
Bytes are for bfloat16 unless a name says otherwise. What was timed comes from `results/bench.json`.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache as memoise
from pathlib import Path

import numpy as np
import torch

from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.calculators import Work
from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.analysis.roofline import (
    HARDWARE,
    largest_useful_batch,
    max_sequences,
    memory_bound_context,
    roofline_table,
    roofline_time,
)
from m0_basics.tools.bench.workloads import BenchRequest, equal, get_workload, ragged
from m0_basics.tools.documents.factbook import Fact, Facts, Result
from m1_offline.tools.facts import static_slots, used_share

from ..attention import GROUP_SIZE, ragged_mask
from ..benchmark import DEFAULT_PEERS, POISSON_METRICS, RATES
from ..config import SchedulerConfig
from ..plugins.adaptive_budget import AdaptiveBudgetPlugin
from ..plugins.base import SchedulerPlugin
from ..policies import SchedulingParams
from . import latency_scenarios
from .simulation import SimulatedStep, Simulation, Simulator, StepCost
from .utilisation import continuous_utilisation, static_utilisation

SMOLLM2, H100 = SPECS["SmolLM2-135M"], HARDWARE["H100-SXM"]
NAMES = {"SmolLM2-135M": "smollm2", "Qwen3-0.6B": "qwen3_0_6b", "Llama-3.1-8B": "llama_3_1_8b"}
CONTEXT = 512                                   # tokens that each decoding sequence attends to
S0_BATCH = (5, 100, 3, 80)                      # output tokens of four requests
CPU_COST = StepCost(0.016, 0.00055)             # about SmolLM2 on two cores: 16 ms a step, 0.55 ms a token
URGENT_SHARE = 0.2
TPOT_TARGET = 0.4                               # seconds: what the adaptive budget is given
HOST_BYTES_PER_SECOND = 25e9                    # an assumption: what a PCIe 4 x16 link does in practice


def utilisation() -> dict[str, Fact]:
    """Four requests of 5, 100, 3 and 80 tokens in four places: one batch, and as a stream."""
    places, static = len(S0_BATCH), static_utilisation(S0_BATCH)
    facts = {"s0.tokens": Fact(static.busy), "s0.static.steps": Fact(static.total // places),
             "s0.static.places": Fact(static.total), "s0.static.utilisation": Fact(static.ratio, "ratio")}
    for times in (1, 4, 16):
        stream = continuous_utilisation(S0_BATCH, times)
        steps, static_steps = stream.total // places, times * static.total // places
        facts |= {f"s0.continuous.{times}.steps": Fact(steps), f"s0.static.{times}.steps": Fact(static_steps),
                  f"s0.continuous.{times}.utilisation": Fact(stream.ratio, "ratio"),
                  f"s0.steps_saved.{times}": Fact(static_steps / steps, "ratio")}
    return facts


def padding() -> dict[str, Fact]:
    """`ragged-64` in static batches and in the engine's steps; equal lengths, where there is nothing to gain."""
    workload, facts = ragged(64), dict[str, Fact]()
    for rows in (16, 32):
        run, useful, _ = static_slots(workload, rows)
        static_steps = sum(max(r.output_len for r in workload.requests[i:i + rows]) for i in range(0, 64, rows))
        steps = Simulator(rows).run(workload.requests).steps
        decodes = [s for s in steps if s.is_decode]
        sampled = sum(s.num_sampled for s in decodes)
        one, grouped = padded_keys(decodes, rows), padded_keys(decodes, GROUP_SIZE)
        facts |= {
            f"ragged.{rows}.static.slots": Fact(run), f"ragged.{rows}.static.useful": Fact(useful / run, "ratio"),
            f"ragged.{rows}.static.steps": Fact(static_steps),
            f"ragged.{rows}.tokens_run": Fact(sum(s.num_tokens for s in steps)),
            f"ragged.{rows}.static_over_continuous": Fact(run / sum(s.num_tokens for s in steps), "ratio"),
            f"ragged.{rows}.steps": Fact(len(steps)),
            f"ragged.{rows}.prefill_steps": Fact(len(steps) - len(decodes)),
            f"ragged.{rows}.mean_batch": Fact(sampled / len(decodes)),
            f"ragged.{rows}.decode_utilisation": Fact(sampled / (rows * len(decodes)), "ratio"),
            f"ragged.{rows}.key_padding.one_group": Fact(one, "ratio"),
            f"ragged.{rows}.key_padding.groups": Fact(grouped, "ratio"),
        }
    run, useful, _ = static_slots(equal(32), 32)
    return facts | {"ragged.prompt_tokens": Fact(workload.num_prompt_tokens), "attention.group_size": Fact(GROUP_SIZE),
                    "ragged.output_tokens": Fact(workload.num_output_tokens),
                    "equal.static.useful": Fact(useful / run, "ratio")}


def padded_keys(decodes: Sequence[SimulatedStep], group: int) -> float:
    """Share of the keys that decode steps read only because sequences are padded to the longest of their group."""
    read = useful = 0
    for step in decodes:
        lengths = sorted(step.seq_lens)
        for start in range(0, len(lengths), group):
            members = lengths[start:start + group]
            read += len(members) * members[-1]
            useful += sum(members)
    return 1 - useful / read


def roofline() -> dict[str, Fact]:
    """Steps on an H100 at the limit: prefill, decode by batch size, and both in one step."""
    facts = {"h100.ridge": Fact(H100.ridge_point(), "FLOP/B")}
    for name, short in NAMES.items():
        spec = SPECS[name]
        cases = {f"decode.{b}": [Work(1, CONTEXT)] * b for b in (1, 8, 32, 64, 256)}
        cases |= {"prefill.512": [Work(512, 512)], "prefill.256": [Work(256, 256)], "prefill.2048": [Work(2048, 2048)],
                  "prefill.8192": [Work(8192, 8192)], "mixed.32+256": [Work(1, CONTEXT)] * 32 + [Work(256, 256)]}
        cases |= {f"verify.{b}x5": [Work(5, CONTEXT + 4)] * b for b in (1, 32, 64, 256)}      # four guesses each
        for context in (512, 2048):                                 # the same, by what they look back at
            cases |= {f"decode.192.{context}": [Work(1, context)] * 192,
                      f"verify.192x5.{context}": [Work(5, context + 4)] * 192}
        for case, works in cases.items():
            flops, traffic = calc.step_flops(spec, works, True, _num_logits(works)), calc.step_bytes(spec, works)
            bound = roofline_time(flops.total, traffic.total, H100)
            facts |= {f"{short}.{case}.intensity": Fact(calc.arithmetic_intensity(flops, traffic), "FLOP/B"),
                      f"{short}.{case}.ms": Fact(bound.seconds * 1e3, "ms"),
                      f"{short}.{case}.binds": Fact(bound.binds)}
            if case.startswith("decode"):
                facts[f"{short}.{case}.tokens_per_s"] = Fact(len(works) / bound.seconds, "1/s")
                facts[f"{short}.{case}.kv_share"] = Fact(traffic.kv_read / traffic.total, "ratio")
        apart = float(facts[f"{short}.decode.32.ms"].value) + float(facts[f"{short}.prefill.256.ms"].value)
        decode_1, decode_32 = (float(facts[f"{short}.decode.{b}.ms"].value) for b in (1, 32))
        slower = float(facts[f"{short}.verify.256x5.ms"].value) / float(facts[f"{short}.decode.256.ms"].value)
        for context in (512, 2048):
            verify, plain = (float(facts[f"{short}.{case}.{context}.ms"].value)
                             for case in ("verify.192x5", "decode.192"))
            facts[f"{short}.verify.192x5.{context}.slower"] = Fact(verify / plain, "ratio")
        facts |= {f"{short}.apart.32+256.ms": Fact(apart, "ms"), f"{short}.verify.256x5.slower": Fact(slower, "ratio"),
                  f"{short}.batch_32_slower": Fact(decode_32 / decode_1 - 1, "ratio"),
                  f"{short}.batch_32_gain": Fact(32 * decode_1 / decode_32, "ratio"),
                  f"{short}.memory_bound_context": Fact(memory_bound_context(spec, H100) or 0),
                  f"{short}.max_sequences.2048": Fact(max_sequences(spec, H100, 2048)),
                  f"{short}.logits_bytes.2048": Fact(2048 * spec.vocab_size * 4, "B"),
                  f"{short}.grammar_mask_bytes": Fact((spec.vocab_size + 31) // 32 * 4, "B"),
                  f"{short}.weight_bytes": Fact(calc.weight_bytes(spec), "B")}
    useful = largest_useful_batch(SPECS["Llama-3.1-8B"], H100, 128)
    assert useful is not None
    return facts | {"llama_3_1_8b.useful_batch.128": Fact(useful)}


def _num_logits(works: Sequence[Work]) -> int:
    """Rows of logits: one for each sequence, but one for each token where guesses are verified (5 tokens)."""
    return sum(5 if w.num_tokens == 5 else 1 for w in works)


def kv_cache() -> dict[str, Fact]:
    """The default rows, what a workload uses of them, and 8 bits instead of 16."""
    rows, row_size = SchedulerConfig().max_num_seqs, SMOLLM2.max_position_embeddings
    total, (_, used) = calc.kv_bytes(SMOLLM2, row_size, rows), used_share(ragged(64), row_size)
    facts = {"rows": Fact(rows), "row_size": Fact(row_size), "rows.bytes": Fact(total, "B"),
             "rows.row_bytes": Fact(calc.kv_bytes(SMOLLM2, row_size), "B"),
             "rows.over_weights": Fact(total / calc.weight_bytes(SMOLLM2), "ratio"),
             "rows.used": Fact(used, "ratio"), "rows.bytes.1024": Fact(calc.kv_bytes(SMOLLM2, 1024, rows), "B"),
             "rows.used.1024": Fact(used_share(ragged(64), 1024)[1], "ratio"),
             "budget.default": Fact(max(2048, row_size)), "budget.2048": Fact(2048)}
    for head_dim in (64, 128):
        ratio = (head_dim + 2) / (2 * head_dim)         # one byte per value and a 16-bit scale, against two per value
        facts |= {f"int8.d{head_dim}.ratio": Fact(ratio, "ratio"), f"int8.d{head_dim}.gain": Fact(1 / ratio, "ratio")}
    for name, short in NAMES.items():
        facts[f"{short}.kv_bytes_per_token"] = Fact(calc.kv_bytes_per_token(SPECS[name]), "B")
    return facts


def mask() -> dict[str, Fact]:
    """The dense mask over the first 16 prompts of `ragged-64`, and over the decode step that follows."""
    lengths = [len(r.prompt_token_ids) for r in ragged(64).requests[:16]]
    tokens = [(b, i) for b, n in enumerate(lengths) for i in range(n)]
    newest = [(b, n) for b, n in enumerate(lengths)]
    prefill, decode = ragged_mask(tokens, tokens), ragged_mask(newest, tokens + newest)
    visible = int(prefill.sum())
    assert visible == sum(n * (n + 1) // 2 for n in lengths)
    small = ragged_mask([(0, i) for i in range(4)] + [(1, 0), (1, 1), (2, 4)],
                        [(0, i) for i in range(4)] + [(1, 0), (1, 1)] + [(2, i) for i in range(5)])
    return {"mask.sequences": Fact(len(lengths)), "mask.tokens": Fact(len(tokens)), "mask.pairs": Fact(prefill.numel()),
            "mask.visible": Fact(visible), "mask.visible_share": Fact(visible / prefill.numel(), "ratio"),
            "mask.bytes": Fact(prefill.numel(), "B"),
            "mask.score_bytes": Fact(4 * SMOLLM2.num_attention_heads * prefill.numel(), "B"),
            "mask.padded_share": Fact(visible / (len(lengths) * max(lengths) ** 2), "ratio"),
            "mask.decode_share": Fact(int(decode.sum()) / decode.numel(), "ratio"),
            "mask.small.visible": Fact(int(small.sum())), "mask.small.pairs": Fact(small.numel())}


def clamp() -> dict[str, Fact]:
    """Probabilities of eight masked keys that are clamped to 1e-6 after the softmax, and where exp overflows."""
    scores = torch.tensor([1.0, 2.0] + [float("-inf")] * 8)
    leaked = scores.softmax(0).clamp_min(1e-6)
    overflow = int(torch.arange(200.0).exp().isinf().nonzero()[0])
    return {"clamp.leaked": Fact(leaked[2:].sum().item()), "clamp.sum_minus_1": Fact(leaked.sum().item() - 1.0),
            "clamp.exp_overflows_at": Fact(overflow)}


def preemption() -> dict[str, Fact]:
    """A victim of 512 + 128 tokens: run again, or copied out and back."""
    facts: dict[str, Fact] = {}
    for name, short in NAMES.items():
        spec, tokens = SPECS[name], 512 + 128
        again, decode = calc.prefill_flops(spec, tokens, causal=True).total, calc.decode_flops(spec, tokens).total
        recompute = roofline_time(again, calc.prefill_bytes(spec, tokens).total, H100).seconds
        swap = 2 * calc.kv_bytes(spec, tokens - 1) / HOST_BYTES_PER_SECOND
        facts |= {f"{short}.recompute.flops": Fact(again, "FLOP"),
                  f"{short}.recompute.in_decodes": Fact(again / decode, "ratio"),
                  f"{short}.recompute.ms": Fact(recompute * 1e3, "ms"),
                  f"{short}.swap.bytes": Fact(calc.kv_bytes(spec, tokens - 1), "B"),
                  f"{short}.swap.ms": Fact(swap * 1e3, "ms")}
    return facts | {"swap.bytes_per_second": Fact(HOST_BYTES_PER_SECOND, "B/s"), "preempt.tokens": Fact(512 + 128)}


@memoise
def urgency(num_requests: int, share: float) -> tuple[bool, ...]:
    """Which requests of a trace are urgent."""
    rng = random.Random(0)
    return tuple(rng.random() < share for _ in range(num_requests))


def serve(policy: str, rate: float, num_requests: int = 200, share: float = URGENT_SHARE,
          declared: int | None = None) -> Simulation:
    """A Poisson trace of ragged lengths under a policy: 16 rows, two classes of requests."""
    urgent = urgency(num_requests, share)
    sla = policy.startswith("sla")
    return Simulator(16, policy, CPU_COST, declared=declared).run(
        get_workload("poisson", num_requests=num_requests, rate=rate, seed=1).requests,
        lambda i: SchedulingParams(priority=0 if sla or urgent[i] else 1,
                                   sla_class=("interactive" if urgent[i] else "batch") if sla else None))


def policies() -> dict[str, Fact]:
    """The policies on one trace: above capacity for half a minute, then drained."""
    urgent = np.array(urgency(200, URGENT_SHARE))
    facts = {"policy.rows": Fact(16), "policy.requests": Fact(200), "policy.rate": Fact(6, "1/s"),
             "policy.urgent": Fact(int(urgent.sum())), "policy.step_ms": Fact(CPU_COST.fixed_s * 1e3, "ms"),
             "policy.token_ms": Fact(CPU_COST.per_token_s * 1e3, "ms")}
    names = {"fcfs": "fcfs", "priority": "priority", "ageing": "ageing:5", "sjf": "sjf",
             "round_robin": "round-robin:32", "sla": "sla:interactive=0.25,batch=0"}
    for name, text in names.items():
        run = serve(text, 6.0)
        waits = np.array([r.token_times[0] - r.arrival_time for r in run.records])
        facts |= {f"policy.{name}.latency_mean": Fact(float(np.mean([r.latency for r in run.records])), "s"),
                  f"policy.{name}.urgent_p99": Fact(float(np.percentile(waits[urgent], 99)), "s"),
                  f"policy.{name}.others_p99": Fact(float(np.percentile(waits[~urgent], 99)), "s"),
                  f"policy.{name}.longest_wait": Fact(float(waits.max()), "s"),
                  f"policy.{name}.longest_gap": Fact(max(max(r.itls) for r in run.records), "s"),
                  f"policy.{name}.preemptions": Fact(sum(s.preempted for s in run.steps)),
                  f"policy.{name}.recomputed": Fact(sum(s.recomputed for s in run.steps)),
                  f"policy.{name}.seconds": Fact(run.seconds, "s")}
    blind = serve("sjf", 6.0, declared=128)
    facts["policy.sjf_blind.latency_mean"] = Fact(float(np.mean([r.latency for r in blind.records])), "s")
    for num_requests in (100, 200, 400):
        for name in ("fcfs", "priority", "ageing:5"):
            run = serve(name, 8.0, num_requests, share=0.7)
            wait = max(r.token_times[0] - r.arrival_time for r in run.records)
            facts[f"starve.{name.partition(':')[0]}.{num_requests}"] = Fact(wait, "s")
    return facts


def burst(token_budget: int, *plugins: SchedulerPlugin) -> Simulation:
    """Eight sequences decode; after two seconds sixteen prompts of 256 tokens arrive at once."""
    requests = [BenchRequest((0,) * 16, 200)] * 8 + [BenchRequest((0,) * 256, 32, 2.0)] * 16
    return Simulator(32, cost=CPU_COST, token_budget=token_budget, plugins=plugins).run(requests)


def budgets() -> dict[str, Fact]:
    """The same burst under several token budgets: the stall of those who decode, and the wait of those who arrive."""
    facts = {"burst.target_ms": Fact(TPOT_TARGET * 1e3, "ms")}
    runs = {str(tokens): burst(tokens) for tokens in (2048, 1024, 512, 256)}
    for name, run in (runs | {"adaptive": burst(2048, AdaptiveBudgetPlugin(TPOT_TARGET))}).items():
        waits = [r.token_times[0] - r.arrival_time for r in run.records[8:]]
        facts |= {f"burst.{name}.stall_ms": Fact(max(max(r.itls) for r in run.records[:8]) * 1e3, "ms"),
                  f"burst.{name}.ttft_first": Fact(min(waits), "s"),
                  f"burst.{name}.ttft_mean": Fact(sum(waits) / len(waits), "s"),
                  f"burst.{name}.ttft_last": Fact(max(waits), "s"),
                  f"burst.{name}.seconds": Fact(run.seconds, "s")}
    slower = float(facts["burst.256.seconds"].value) / float(facts["burst.2048.seconds"].value) - 1
    return facts | {"burst.slower": Fact(slower, "ratio"), "prefill.2048.cpu": Fact(CPU_COST(2048), "s")}


def capacity() -> dict[str, Fact]:
    """GPUs for ten million conversations and for those that generate at one moment; what a sharded cache moves."""
    spec = SPECS["Llama-3.1-8B"]
    held, shard = max_sequences(spec, H100, 2048), 131_072
    per_step, half = ((1 - rate ** 5) / (1 - rate) for rate in (0.8, 0.5))          # four guesses and one more
    slower = float(roofline()["llama_3_1_8b.verify.256x5.slower"].value)
    # Each query head returns its output, a maximum and a sum, as 4-byte floats.
    partial = 4 * spec.num_hidden_layers * spec.num_attention_heads * (spec.head_dim + 2)
    [*_, full] = roofline_table(spec, H100, context=2048, batch_sizes=(held,))
    return {"capacity.tokens_per_s": Fact(full.tokens_per_second, "tokens/s"),
            "capacity.gpus.by_speed": Fact(100_000 * 20 / full.tokens_per_second),
            "capacity.per_gpu": Fact(held), "capacity.gpus": Fact(-(-10_000_000 // held)),
            "capacity.gpus.active": Fact(-(-100_000 // held)),
            "accepted.per_step": Fact(per_step), "accepted.per_step.half": Fact(half),
            "accepted.gain_256": Fact(per_step / slower, "ratio"),
            "shard.kv_bytes": Fact(calc.kv_bytes(spec, shard), "B"), "shard.partial_bytes": Fact(partial, "B"),
            "shard.fetch_2048.ms": Fact(calc.kv_bytes(spec, 2048) / HOST_BYTES_PER_SECOND * 1e3, "ms")}


def bench_results() -> dict[str, Result]:
    """What the documents quote of `python -m m2_continuous_batching bench`."""
    facts: dict[str, Result] = {}
    tables = {"ragged": (0, ("m1", "m1-static", "m2", *DEFAULT_PEERS)), "equal": (1, ("m1-static", "m2")),
              "async": (5, ("m2", "m2-async"))}
    for table, (position, names) in tables.items():
        for i, name in enumerate(names):
            path = f"comparisons.{position}.contenders.{i}"
            facts[f"bench.{table}.{name}.tokens_per_s"] = Result("bench.json", f"{path}.output_throughput", "1/s")
            facts[f"bench.{table}.{name}.ratio"] = Result("bench.json", f"{path}.ratio", "ratio")
    for i, rate in enumerate(RATES):
        for name in ("m1", "m1-static", "m2", "transformers-continuous"):
            for key, unit in zip(POISSON_METRICS, ("ms", "ms", "ms", "1/s", "1/s"), strict=True):
                facts[f"bench.poisson.{rate:g}.{name}.{key}"] = Result("bench.json",
                                                                      f"measurements.poisson.{i}.{name}.{key}", unit)
    for part in ("schedule", "prepare", "model", "conclude"):
        facts |= {f"bench.step.{part}_{key}": Result("bench.json", f"measurements.step_costs.{part}_{key}", unit)
                  for key, unit in (("s", "s"), ("share", "ratio"))}
    for policy in latency_scenarios.POLICIES:
        for key in ("urgent_ttft_p99_ms", "others_ttft_p99_ms", "longest_ttft_ms"):
            facts[f"bench.policy.{policy}.{key}"] = Result("bench.json",
                                                           f"measurements.latency.policies.{policy}.{key}", "ms")
    for budget in ("fixed", "adaptive"):
        for key in ("stream_itl_p99_ms", "stream_itl_max_ms", "burst_ttft_mean_ms"):
            facts[f"bench.budget.{budget}.{key}"] = Result("bench.json", f"measurements.latency.budget.{budget}.{key}",
                                                           "ms")
    return facts


BENCH = bench_results()
FACTS = Facts(Path(__file__).parents[1],
              computed={"utilisation": utilisation, "padding": padding, "roofline": roofline, "kv_cache": kv_cache,
                        "mask": mask, "clamp": clamp, "preemption": preemption, "policies": policies,
                        "budgets": budgets, "capacity": capacity},
              results=BENCH)
