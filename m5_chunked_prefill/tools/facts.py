"""Every number that milestone 5's documents may quote.

Computed here: what chunks read again, how many tokens a step has room for on an H100, what guesses are worth by the
formulas of the papers, what long answers keep in memory. What was timed comes from `results/bench.json`.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.calculators import Work
from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.analysis.roofline import HARDWARE, roofline_time
from m0_basics.tools.documents.factbook import Fact, Facts, Result, read_json_file

from ..rejection import kept_by_rejection, kept_by_same_draw

H100, LLAMA = HARDWARE["H100-SXM"], SPECS["Llama-3.1-8B"]
GIANT, CHUNK = 6000, 256
DECODES, CONTEXT = 64, 1024
THOUGHT = 10_000                        # output tokens of a long chain of thought


def chunks() -> dict[str, Fact]:
    """A giant prompt in chunks: how many, and how often cache and weights are read."""
    starts = range(0, GIANT, CHUNK)
    pairs = sum((start + min(CHUNK, GIANT - start)) for start in starts)
    return {"chunk.example.steps": Fact(-(-1000 // 256)), "chunk.example.last": Fact(1000 - 3 * 256),
            "chunk.giant.steps": Fact(len(starts)),
            "chunk.giant.cache_reads": Fact(pairs / GIANT, "ratio"),
            "chunk.giant.weight_bytes": Fact(len(starts) * calc.weight_bytes(SPECS["SmolLM2-135M"]), "B"),
            "chunk.whole.weight_bytes": Fact(calc.weight_bytes(SPECS["SmolLM2-135M"]), "B")}


def rooms() -> dict[str, Fact]:
    """Llama-3.1-8B on an H100, by the roofline: what 64 decodes leave for a chunk."""
    def ms(chunk: int) -> float:
        works = [Work(1, CONTEXT)] * DECODES + ([Work(chunk, chunk)] if chunk else [])
        flops = calc.step_flops(LLAMA, works, causal=True, num_logits=DECODES).total
        return 1e3 * roofline_time(flops, calc.step_bytes(LLAMA, works).total, H100).seconds

    free = max(chunk for chunk in range(0, 2048, 8) if ms(chunk) <= 1.05 * ms(0))
    return {"h100.ridge": Fact(H100.ridge_point(), "FLOP/B"), "h100.decode.64.ms": Fact(ms(0), "ms"),
            "h100.free_chunk": Fact(free, "tokens"), "h100.mixed.512.ms": Fact(ms(512), "ms"),
            "h100.mixed.2048.ms": Fact(ms(2048), "ms"), "h100.mixed.512.ratio": Fact(ms(512) / ms(0), "ratio"),
            "h100.mixed.2048.ratio": Fact(ms(2048) / ms(0), "ratio"),
            "h100.prefill.6000.ms": Fact(1e3 * calc.step_flops(LLAMA, [Work(GIANT, GIANT)], causal=True,
                                                               num_logits=1).total / H100.peak(torch.bfloat16), "ms")}


def guesses() -> dict[str, Fact]:
    """Tokens of a step by the chance that a guess is right, and what the drafter's own time leaves of the gain."""
    facts: dict[str, Fact] = {}
    for percent in (50, 80, 90):
        for k in (3, 4, 10):
            facts[f"spec.tokens.{percent}.{k}"] = Fact(expected_tokens(percent / 100, k), "tokens")
    for cost in (5, 27):
        best = max(range(21), key=lambda k: expected_tokens(0.8, k) / (1 + k * cost / 100))
        facts[f"spec.best_k.80.{cost}"] = Fact(best)
        facts[f"spec.speedup.80.{cost}"] = Fact(expected_tokens(0.8, best) / (1 + best * cost / 100), "ratio")
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    q = torch.tensor([0.4, 0.25, 0.25, 0.10])
    return facts | {"accept.rejection": Fact(kept_by_rejection(p, q), "ratio"),
                    "accept.same_draw": Fact(kept_by_same_draw(p, q), "ratio")}


def expected_tokens(p: float, k: int) -> float:
    """Leviathan et al. 2023, equation 1: tokens of a step with k guesses, each right with probability p."""
    return (1 - p ** (k + 1)) / (1 - p)


def thoughts() -> dict[str, Fact]:
    """What a long answer keeps: bytes of keys and values, and how many fit beside the weights of an H100."""
    num_bytes = THOUGHT * calc.kv_bytes_per_token(LLAMA)
    room = 0.9 * 80e9 - calc.weight_bytes(LLAMA)
    return {"thought.kv_bytes": Fact(num_bytes, "B"), "thought.fit": Fact(int(room // num_bytes)),
            "thought.decode_share": Fact(THOUGHT / (THOUGHT + 1))}


def bench_results(found: dict[str, Any]) -> dict[str, Result]:
    """Names of what was measured -> where it stands."""
    facts = {f"bench.{name}.{c['name']}.{key}": _bench(f"comparisons.{i}.contenders.{j}.{key}", unit)
             for i, name in enumerate(("ragged", "long"))
             for j, c in enumerate(found["comparisons"][i]["contenders"])
             for key, unit in (("output_throughput", "tokens/s"), ("ratio", "ratio"))}
    m = found["measurements"]
    lines = m["frontier"]
    for key in ("decode_only_ms", "decode_only_p99_ms"):
        facts[f"bench.{key}"] = _bench(f"measurements.frontier.{key}", "ms")
    for name in lines["points"]:
        slug = name.replace(" ", "_").removesuffix("%")
        for key, unit in (("itl_p99_ms", "ms"), ("itl_max_ms", "ms"), ("output_throughput", "tokens/s"),
                          ("long_ttft_ms", "ms")):
            facts[f"bench.frontier.{slug}.{key}"] = _bench(f"measurements.frontier.points.{name}.{key}", unit)
        for key in ("itl_p99_gain", "throughput_share", "over_decode_only"):
            facts[f"bench.frontier.{slug}.{key}"] = _bench(f"measurements.frontier.compared.{name}.{key}", "ratio")
    for kind in ("decode", "mixed"):
        for key in ("error_median", "error_p90", "within_15_percent"):
            if kind in lines["cost"]:
                facts[f"bench.cost.{kind}.{key}"] = _bench(f"measurements.frontier.cost.{kind}.{key}", "ratio")
    for name, lengths in m["short"]["contenders"].items():
        for length in lengths:
            for key, unit in (("alone_ms", "ms"), ("behind_ms", "ms"), ("giant_ms", "ms"), ("ratio", "ratio")):
                facts[f"bench.short.{name.replace(' ', '_')}.{length}.{key}"] = _bench(
                    f"measurements.short.contenders.{name}.{length}.{key}", unit)
    for name in m["giant"]["contenders"]:
        for key, unit in (("longest_gap_ms", "ms"), ("giant_ttft_ms", "ms"), ("output_throughput", "tokens/s")):
            facts[f"bench.giant.{name}.{key}"] = _bench(f"measurements.giant.contenders.{name}.{key}", unit)
    for i, entry in enumerate(m["drafts"]):
        for name in entry["contenders"]:
            for key, unit in (("tokens_per_s", "tokens/s"), ("ratio", "ratio"), ("decode_ratio", "ratio"),
                              ("acceptance", "ratio")):
                if entry["contenders"][name][key] is not None:
                    facts[f"bench.drafts.{entry['task']}.{entry['num_requests']}.{name}.{key}"] = _bench(
                        f"measurements.drafts.{i}.contenders.{name}.{key}", unit)
    for name in m["thoughts"]:
        for key, unit in (("tokens_per_s", "tokens/s"), ("preemptions", ""), ("first_tenth_ms", "ms"),
                          ("last_tenth_ms", "ms"), ("acceptance", "ratio")):
            slug = name.replace(", ", "_").replace(" ", "_")
            facts[f"bench.thoughts.{slug}.{key}"] = _bench(f"measurements.thoughts.{name}.{key}", unit)
    return facts


def _bench(path: str, unit: str) -> Result:
    return Result("bench.json", path, unit)


FOLDER = Path(__file__).parents[1]
_FILE = FOLDER / "results" / "bench.json"
FACTS = Facts(FOLDER, computed={"chunks": chunks, "rooms": rooms, "guesses": guesses, "thoughts": thoughts},
              results=bench_results(read_json_file(_FILE)) if _FILE.is_file() else {})
