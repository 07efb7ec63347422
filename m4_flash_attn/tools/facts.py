"""Every number that milestone 4's documents may quote.

Computed here: the bytes that attention moves and needs, by the formula that counting confirms; FLOPs per byte of a
layer's parts; what a long context costs at the roofline; what padding computes for nothing; windows; recordings. Bytes
are for bfloat16. What was timed comes from `results/bench.json`.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.calculators import Work
from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.analysis.roofline import HARDWARE, roofline_time
from m0_basics.tools.bench.workloads import ragged
from m0_basics.tools.documents.factbook import Fact, Facts, Result, read_json_file

from ..cuda_graph import graph_sizes
from .intensity import attention_part, linear_part
from .memory_traffic import Heads, Traffic, formula, tile_sizes

H100, LLAMA = HARDWARE["H100-SXM"], SPECS["Llama-3.1-8B"]
NAMES = {"SmolLM2-135M": "smollm2", "Qwen3-0.6B": "qwen3_0_6b", "Llama-3.1-8B": "llama_3_1_8b"}
SRAM_BYTES = 232_448                            # shared memory of an H100 that one program may take
SRAM = SRAM_BYTES // 2                          # the same in elements of 16 bits
HEAD_DIM = 128
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 65_536)
CONTEXT_LENGTHS = (512, 8192, 32_768, 131_072)
LONG, WINDOW, SINKS = 131_072, 4096, 4
NVLINK_BYTES_PER_SECOND = 450e9                 # H100 SXM data sheet, one direction
GRAPH_BATCH = 256


def traffic() -> dict[str, Fact]:
    """One head of 128 in the shared memory of an H100: bytes moved, and at the peak, by both algorithms."""
    facts = {"traffic.sram_bytes": Fact(SRAM_BYTES, "B"), "traffic.rows": Fact(tile_sizes(HEAD_DIM, SRAM)[0])}
    for n in LENGTHS:
        naive, tiled = both(Heads(n, n, HEAD_DIM))
        for name, one in (("naive", naive), ("tiled", tiled)):
            facts |= {f"traffic.{n}.{name}.bytes": Fact(one.total, "B"),
                      f"traffic.{n}.{name}.peak": Fact(one.peak, "B")}
        facts |= {f"traffic.{n}.ratio": Fact(naive.total / tiled.total, "ratio"),
                  f"traffic.{n}.peak_ratio": Fact(naive.peak / tiled.peak, "ratio"),
                  f"traffic.{n}.scores_bytes": Fact(2 * n * n * 2, "B")}           # S and P
    small_head, large_head = (both(Heads(16_384, 16_384, d)) for d in (64, 128))
    facts |= {"traffic.d64.ratio": Fact(small_head[0].total / small_head[1].total, "ratio"),
              "traffic.d128.over_d64": Fact(large_head[1].total / small_head[1].total, "ratio")}
    for group in (1, 4):
        naive, tiled = both(Heads(1, 8192, HEAD_DIM, group))
        facts[f"decode.traffic_ratio.g{group}"] = Fact(naive.total / tiled.total, "ratio")
    return facts


def both(shape: Heads) -> tuple[Traffic, Traffic]:
    """The naive algorithm's traffic, and the tiled one's."""
    return formula("naive", shape, SRAM), formula("tiled", shape, SRAM)


def intensities() -> dict[str, Fact]:
    """FLOPs per byte: attention in decode and prefill, a linear layer by its rows, and what an H100 would need."""
    facts = {"h100.ridge": Fact(H100.ridge_point(), "FLOP/B")}
    for name, short in NAMES.items():
        spec = SPECS[name]
        group = spec.num_attention_heads // spec.num_key_value_heads
        decode = attention_part(Heads(1, 8192, spec.head_dim, group), SRAM)
        facts |= {f"intensity.decode.{short}": Fact(decode.intensity, "FLOP/B"),
                  f"weights.{short}.bytes": Fact(calc.weight_bytes(spec), "B")}
    for algorithm in ("naive", "tiled"):
        part = attention_part(Heads(4096, 4096, HEAD_DIM), SRAM, algorithm)
        facts[f"intensity.prefill.4096.{algorithm}"] = Fact(part.intensity, "FLOP/B")
    for rows in (1, 16, 64, 256, 1024):
        facts[f"intensity.linear.{rows}"] = Fact(linear_part(rows, 4096, 4096).intensity, "FLOP/B")
    return facts


def long_contexts() -> dict[str, Fact]:
    """Llama-3.1-8B on an H100 at the limit, one sequence, over its length: what attention and its cache come to."""
    facts: dict[str, Fact] = {}
    for n in CONTEXT_LENGTHS:
        flops, moved = calc.prefill_flops(LLAMA, n, causal=True), calc.step_bytes(LLAMA, [Work(1, n)])
        prefill = roofline_time(flops.total, calc.prefill_bytes(LLAMA, n).total, H100)
        decode = roofline_time(calc.decode_flops(LLAMA, n).total, moved.total, H100)
        facts |= {f"llama.prefill.{n}.attention_share": Fact(flops.attention / flops.total, "ratio"),
                  f"llama.prefill.{n}.s": Fact(prefill.seconds, "s"),
                  f"llama.decode.{n}.kv_share": Fact(moved.kv_read / moved.total, "ratio"),
                  f"llama.decode.{n}.ms": Fact(decode.seconds * 1e3, "ms"),
                  f"llama.kv.{n}.bytes": Fact(calc.kv_bytes(LLAMA, n), "B")}
    # A device computes with its part of the keys while the next part arrives: 4 n n' H_q D FLOPs against the bytes of
    # n' keys and values, so the time is hidden from n = peak x H_kv / (bandwidth x H_q) tokens on.
    heads = LLAMA.num_key_value_heads / LLAMA.num_attention_heads
    return facts | {"ring.min_tokens": Fact(H100.peak("bfloat16") / NVLINK_BYTES_PER_SECOND * heads)}


def packing() -> dict[str, Fact]:
    """The prompts of `ragged-64`, packed and padded: rows of the linear layers, and query-key pairs of attention."""
    lengths = [len(r.prompt_token_ids) for r in ragged(64).requests]
    padded = len(lengths) * max(lengths)
    return {"packing.tokens": Fact(sum(lengths)), "packing.padded": Fact(padded),
            "packing.used": Fact(sum(lengths) / padded, "ratio"),
            "packing.pairs": Fact(sum(n * (n + 1) // 2 for n in lengths)),
            "packing.padded_pairs": Fact(padded * max(lengths)), "packing.diagonal_pairs": Fact(sum(lengths) ** 2)}


def windows() -> dict[str, Fact]:
    """A window and some sinks over a long context: what is still seen, and the bytes of it."""
    visible = WINDOW + SINKS
    pairs = visible * (visible + 1) // 2 + (LONG - visible) * visible
    return {"window.pairs_share": Fact(pairs / (LONG * (LONG + 1) // 2), "ratio"),
            "window.kv_share": Fact(visible / LONG, "ratio"),
            "window.kv_bytes": Fact(calc.kv_bytes(LLAMA, visible), "B")}


def graphs() -> dict[str, Fact]:
    """CUDA graphs for up to 256 sequences: how many recordings, and the share of rows that pad, all sizes alike."""
    sizes = graph_sizes(GRAPH_BATCH)
    batches = range(1, GRAPH_BATCH + 1)
    rows = sum(sizes[bisect_left(sizes, batch)] for batch in batches)
    return {"graph.sizes": Fact(len(sizes)), "graph.padding": Fact(1 - sum(batches) / rows, "ratio")}


def bench_results(data: Mapping[str, Any]) -> dict[str, Result]:
    """What the documents may quote of `python -m m4_flash_attn bench`: everything that its file, `data`, holds."""
    return _comparisons(data) | (_kernels(data["measurements"]) if "attention" in data["measurements"] else {})


def _comparisons(data: Mapping[str, Any]) -> dict[str, Result]:
    """Both workloads: each contender, how much faster this engine is, what the processor would allow."""
    facts: dict[str, Result] = {}
    for position, table in enumerate(("ragged", "single")):
        for i, name in enumerate(c["name"] for c in data["comparisons"][position]["contenders"]):
            path = f"comparisons.{position}.contenders.{i}"
            facts[f"bench.{table}.{name}.tokens_per_s"] = _bench(f"{path}.output_throughput", "1/s")
            facts[f"bench.{table}.{name}.ratio"] = _bench(f"{path}.ratio", "ratio")
        for name in data["measurements"]["speedup"][table]:
            facts[f"bench.{table}.m4_over.{name}"] = _bench(f"measurements.speedup.{table}.{name}", "ratio")
        facts[f"bench.{table}.limit"] = _bench(f"measurements.limits.{table}.tokens_per_s", "1/s")
    for name in data["measurements"]["limits"]["single"]["decode_share"]:
        facts[f"bench.single.{name}.limit_share"] = _bench(f"measurements.limits.single.decode_share.{name}", "ratio")
    return facts | {"bench.bytes_per_s": _bench("measurements.limits.bytes_per_second", "B/s"),
                    "bench.flops_per_s": _bench("measurements.limits.flops_per_second", "1/s"),
                    "bench.single.bytes_per_token": _bench("measurements.limits.single.bytes_per_token", "B")}


def _kernels(found: Mapping[str, Any]) -> dict[str, Result]:
    """The parts by themselves. Decode is `bench.attention.BxL`, one prompt `bench.prefill.L`, several `...BxL`."""
    facts: dict[str, Result] = {}
    for kind, prefix in (("decode", "attention"), ("prefill", "prefill")):
        for i, entry in enumerate(found["attention"][kind]):
            batch, length, path = entry["batch"], entry["context"], f"measurements.attention.{kind}.{i}"
            if kind == "prefill" and batch == 1:
                facts |= _prompt(length, path, entry, "_s", "s")
            facts |= _numbers(f"bench.{prefix}.{batch}x{length}", path, entry, "_s", "s")
    for i, entry in enumerate(found["prefill_memory"]):
        facts |= _prompt(entry["context"], f"measurements.prefill_memory.{i}", entry, "_bytes", "B")
    for i, entry in enumerate(found["linear"]):
        for suffix, unit in (("_s", "s"), ("_gflops", "GFLOP/s"), ("_gbytes", "GB/s")):
            facts |= _numbers(f"bench.linear.{entry['rows']}", f"measurements.linear.{i}", entry, suffix, unit)
    for i, entry in enumerate(found["steps"]):
        for way, inner in (("", entry), (".apart", entry["apart"])):
            for suffix, unit in (("_s", "s"), ("_share", "ratio")):
                facts |= _numbers(f"bench.step.{entry['num_sequences']}{way}", f"measurements.steps.{i}{way}", inner,
                                  suffix, unit)
    facts |= {f"bench.start.{name}_s": _bench(f"measurements.start.{name}_s", "s") for name in ("cold", "warm")}
    facts |= {f"bench.start.{peer}_s": _bench(f"measurements.start.peers.{peer}", "s")
              for peer in found["start"]["peers"]}
    return facts | {"bench.build_s": _bench("measurements.start.build_s", "s")}


def _numbers(prefix: str, path: str, entry: Mapping[str, Any], suffix: str, unit: str) -> dict[str, Result]:
    """The numbers of an entry whose names end like that."""
    return {f"{prefix}.{key}": _bench(f"{path}.{key}", unit) for key in entry if key.endswith(suffix)}


def _prompt(n: int, path: str, entry: Mapping[str, Any], suffix: str, unit: str) -> dict[str, Result]:
    """The same of one prompt, where a loop is one call of SDPA."""
    one = {name.replace(".loop_", ".sdpa_"): result
           for name, result in _numbers(f"bench.prefill.{n}", path, entry, suffix, unit).items()}
    return {name: result for name, result in one.items() if ".padded_" not in name}


def _bench(path: str, unit: str) -> Result:
    return Result("bench.json", path, unit)


def _results(folder: Path) -> dict[str, Result]:
    """Of every machine that the benchmark ran on: `bench.` is one with AVX-512 and bf16, `avx2.` one without."""
    facts: dict[str, Result] = {}
    for prefix, name in (("bench", "bench.json"), ("avx2", "avx2/bench.json")):
        if (folder / name).is_file():
            found = bench_results(read_json_file(folder / name))
            facts |= {key.replace("bench", prefix, 1): replace(result, file=name) for key, result in found.items()}
    return facts


FOLDER = Path(__file__).parents[1]
FACTS = Facts(FOLDER,
              computed={"traffic": traffic, "intensities": intensities, "long_contexts": long_contexts,
                        "packing": packing, "windows": windows, "graphs": graphs},
              results=_results(FOLDER / "results"))
