"""Benchmark of milestone 7: what fewer bytes are worth, for one request and for many.

  ragged     64 requests of all lengths at once: this engine's ways to hold weights, the earlier ones, peers
  single     one request: against llama.cpp, and against what the memory's bandwidth allows for the weights' bytes
  linear     a linear layer alone: plain, packed, packed with 8-bit activations
  phases     a decode step's native call, phase by phase: what is left to gain, and where
  drafts     the packed weights draft for the full ones: speed, and how many guesses were right
  bytes      what each way holds in memory
  perplexity of each engine, by its own kernels: what 8-bit activations cost, apart from the weights

How codes are found is measured apart, since it takes longer: `python -m m7_gptq quality` shows both in one table.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from m0_basics.base_llm import BaseLLM
from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.cpu_roofline import read_bandwidth
from m0_basics.tools.bench import BenchReport, Comparison, Contender, ContenderResult, Workload, compare, get_workload
from m2_continuous_batching.engine import engine_of
from m4_flash_attn.kernels.cpu import build as plain_build
from m4_flash_attn.kernels.cpu.runner import DecodeRunner
from m4_flash_attn.tools import phase_times
from m5_chunked_prefill.tools import draft_table

from .calibration import cut_windows
from .kernels.cpu import build
from .llm import LLM
from .tools import linear_bench
from .tools.bench_views import draw, key, print_tables
from .tools.contenders import Ours, make_ours, start_peers
from .tools.perplexity import perplexity_of_llm
from .tools.texts import evaluation_text

DEFAULT_PEERS = ("transformers-static",)
SINGLE = "equal-1:prompt_len=80,output_len=64"
ROWS = (1, 4, 16, 64, 256)
PHASE_SIZES = (1, 64)                   # sequences
FEW_ROWS = 4                            # up to here a product has one phase: see product.hpp
WINDOWS = 16, 512                       # of the held-out text, and their tokens
DRAFT_KINDS, DRAFT_SIZES = ("story", "quote"), {1: 128, 4: 64}


def run(config_options: dict[str, Any], *, workload: str | None = None, rounds: int = 3, quick: bool = False,
        peers: Sequence[str] = (), peer_python: Sequence[Path] = (), output_dir: Path) -> BenchReport:
    """Run everything, or one named `workload` over all contenders; print, save JSON and figures, return the report.

    `quick` shrinks every part until it takes seconds; its numbers mean nothing.
    """
    ragged = get_workload(workload or ("ragged-64:num_requests=6,output_max=20" if quick else "ragged-64"))
    base = {"max_model_len": 256 if quick else 1024, "max_num_seqs": 64, **config_options}
    base["max_model_len"] = max(base["max_model_len"], ragged.longest)
    ours = make_ours(base, quick)
    llm = ours.llms["m6"]
    with ExitStack() as stack:
        others = start_peers(stack, list(peers) or list(DEFAULT_PEERS), peer_python, base, llm, quick)
        contenders: list[Contender] = [*ours.contenders(), *others]
        comparisons = [compare(contenders, ragged.fit_vocabulary(llm.spec.vocab_size), rounds, baseline="m6")]
        if workload is not None:
            report = BenchReport.create("m7_gptq", base, tuple(comparisons), {"speedup": speedups(comparisons)})
            report.print()
            report.save(output_dir / f"bench-{ragged.name.partition(':')[0]}.json")
            return report
        single = get_workload("equal-1:prompt_len=8,output_len=4" if quick else SINGLE)
        memory = torch.ones((1 if quick else 256) << 18)            # MiB
        comparisons.append(compare(contenders, single.fit_vocabulary(llm.spec.vocab_size), rounds, baseline="m6",
                                   probe=partial(read_bandwidth, memory, choose=median)))
    held = ours.weight_bytes()
    measurements: dict[str, Any] = {
        "speedup": speedups(comparisons), "weight_bytes": held, "plain_bytes": calc.weight_bytes(llm.spec),
        "decode_tokens_per_s": decode_speeds(comparisons[1]), "limits": limits(ours, held, single, comparisons[1])}
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished = output_dir / "unfinished.json"                     # something is left if the rest is cut short
    unfinished.write_text(json.dumps([c.to_dict() for c in comparisons] + [measurements]))
    measurements["perplexity"] = perplexities(ours, *((1, 32) if quick else WINDOWS))
    measurements["linear"] = linear_products(*((1, ROWS[:2], 1) if quick else (llm.spec.num_hidden_layers, ROWS, 7)))
    measurements["phases"] = phases(ours, *(((1,), 2) if quick else (PHASE_SIZES, 48)))
    measurements["drafts"] = drafts(base, ours, rounds, quick)
    report = BenchReport.create("m7_gptq", base, tuple(comparisons), measurements)
    report.print()
    print_tables(report)
    report.save(output_dir / "bench.json")
    unfinished.unlink()
    draw(report, output_dir)
    return report


def linear_products(num_layers: int, rows: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """Milliseconds of all linear products of so many layers of SmolLM2's shapes, weights from memory, by rows."""
    with torch.inference_mode():
        timings = linear_bench.measure(linear_bench.product_kinds(num_layers, torch.bfloat16), rows, rounds)
    keys = dict(zip(dict.fromkeys(t.kind for t in timings), ("bf16_ms", "w4a8_ms", "w4a16_ms"), strict=True))
    return [{"rows": number, **{keys[t.kind]: 1e3 * t.seconds for t in timings if t.rows == number}} for number in rows]


def speedups(comparisons: Sequence[Comparison]) -> dict[str, dict[str, dict[str, float]]]:
    """By workload and each of this milestone's ways: its output throughput over each other contender's.

    The median of the rounds' ratios.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, comparison in zip(("ragged", "single"), comparisons, strict=False):
        found[name] = {mine.name: {key(c.name): median(a.output_throughput / b.output_throughput
                                                 for a, b in zip(mine.rounds, c.rounds, strict=True))
                                   for c in comparison.contenders if c is not mine}
                       for mine in comparison.contenders if mine.name.startswith("m7")}
    return found


def decode_speeds(comparison: Comparison) -> dict[str, float]:
    """Tokens per second once the first is there, medians over the rounds."""
    return {key(c.name): median(1e3 / m.tpot_ms.median for m in c.rounds if m.tpot_ms is not None)
            for c in comparison.contenders}


def limits(ours: Ours, held: dict[str, int], single: Workload, measured: Comparison) -> dict[str, Any]:
    """What the memory allows one request: every token reads the weights that the engine holds, and the keys and values.

    The bandwidth drifts on a machine that others use, so each run has its own, read just before and after it. An
    embedding that is not the output matrix is held and not read.
    """
    [request] = single.requests
    context = len(request.prompt_token_ids) + request.output_len // 2
    limits: dict[str, Any] = {
        "bytes_per_second": median(probe for c in measured.contenders for probe in c.probes), "bytes_per_token": {},
        "tokens_per_s": {}, "share": {}}
    for name, llm in ours.llms.items():
        num_bytes = held[name] - plain_embedding_bytes(llm) + context * calc.kv_bytes_per_token(
            llm.spec, dtype=engine_of(llm).runner.model.dtype)
        limits["bytes_per_token"][name] = num_bytes
        limits["tokens_per_s"][name] = limits["bytes_per_second"] / num_bytes
        limits["share"][name] = median(shares(measured[name], num_bytes))
    return limits


def plain_embedding_bytes(llm: BaseLLM) -> int:
    """Bytes of an embedding that is a tensor of its own: a token reads one row of it."""
    weight = getattr(engine_of(llm).runner.model.embed_tokens, "weight", None)
    return weight.nbytes if isinstance(weight, torch.Tensor) else 0


def shares(contender: ContenderResult, num_bytes: int) -> list[float]:
    """For each round, the share of the bandwidth at which decoding reads `num_bytes` a token."""
    return [num_bytes / (1e-3 * metrics.tpot_ms.median) / bandwidth
            for metrics, bandwidth in zip(contender.rounds, contender.probes, strict=True)
            if metrics.tpot_ms is not None]


def perplexities(ours: Ours, num_windows: int, length: int) -> dict[str, float]:
    """Of each engine, by its own kernels and with its own activations, on the start of the held-out text."""
    token_ids = ours.llms["m6"].get_tokenizer().encode(evaluation_text("test"))
    windows = cut_windows(token_ids, length, num_windows)
    return {name: perplexity_of_llm(llm, windows) for name, llm in ours.llms.items() if name != "m4"}


def phases(ours: Ours, sizes: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Milliseconds of a decode step's native call by kind of phase, for plain and for packed weights.

    The sequences of a step have one prompt, of which a prefix cache holds one copy. Empty where steps are no such call.
    """
    if not all(isinstance(engine_of(ours.llms[name]).runner, DecodeRunner) for name in ("m6", "m7")):
        return []
    found = []
    for size in sizes:
        packed = phase_times.measure(ours.llms["m7"], size, steps=steps, sources=build.SOURCES,
                                     include=[plain_build.SOURCES], per_product=1 if size <= FEW_ROWS else 2)
        plain = phase_times.measure(ours.llms["m6"], size, steps=steps)
        found += [{"name": name, "num_requests": size, **phase_times.table(step)}
                  for name, step in (("m6", plain), ("m7", packed))]
    return found


def drafts(base: dict[str, Any], ours: Ours, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """The full weights alone, drafted for by the folder of 4 bits, and by what the model's own files hold.

    On a tokenizer's own texts: answers of random tokens would be guessed by nobody.
    """
    drafting = base | {"speculative_method": "self"}
    contenders: dict[str, BaseLLM] = {
        draft_table.BASELINE: LLM(**base | {"quantization": "none"}),
        "folder": LLM(**drafting | {"speculative_model": str(ours.folder)}), "own": LLM(**drafting)}
    return draft_table.measure(contenders, DRAFT_KINDS[:1] if quick else DRAFT_KINDS, {1: 8} if quick else DRAFT_SIZES,
                               rounds)
