"""Every number that milestone 3's documents may quote.

Computed here: sizes of blocks, what they waste, what sharing saves, what rows and blocks hold at the same memory (the
real scheduler over a computed clock), and what swapping, recomputing and gathering cost at the roofline. Bytes are for
bfloat16 unless a name says otherwise. What was timed comes from `results/bench.json`.
"""
from __future__ import annotations

from pathlib import Path

import torch

from m0_basics.model_spec import ModelSpec
from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.calculators import Work
from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.analysis.roofline import HARDWARE, roofline_time
from m0_basics.tools.bench.workloads import ragged
from m0_basics.tools.documents.factbook import Fact, Facts, Result
from m2_continuous_batching.plugins import CachePlugin
from m2_continuous_batching.plugins.kv_compression import KVCompressionPlugin
from m2_continuous_batching.slot_cache import slot_cache_bytes
from m2_continuous_batching.tools.simulation import Simulation, Simulator

from ..benchmark import BLOCK_SIZES, CROSSOVER_LENGTHS, DEFAULT_PEERS, MAX_NUM_SEQS, MEMORY_ROWS
from ..config import CacheConfig
from ..kv_cache_manager import paged_manager
from ..plugins.kv_quant import BlockQuantisation
from .fragmentation import block_utilisation, row_utilisation

SMOLLM2, H100 = SPECS["SmolLM2-135M"], HARDWARE["H100-SXM"]
NAMES = {"SmolLM2-135M": "smollm2", "Qwen3-0.6B": "qwen3_0_6b", "Llama-3.1-8B": "llama_3_1_8b"}
LLAMA = SPECS["Llama-3.1-8B"]
EXAMPLE_ROW = 2048
MEMORY_ROW = 1024                               # tokens of each of the benchmark's MEMORY_ROWS rows
MEMORY_TOKENS = MEMORY_ROWS * MEMORY_ROW
ROW_STEP = 128                                  # rows for one known load: rounded up to a multiple of it
LENGTHS = (128, 640, 2048, 8192, 32_768)        # of a victim: swapped or recomputed
PAGE_BYTES = 2 * 2**20
CACHE_VARIANTS = {"bf16": "16 bits", "int8_token": "8 bits, scale per token", "int8": "8 bits, scale per block",
                  "int4": "4 bits, scale per block", "int4_channel": "4 bits, keys per channel",
                  "sinks": "attention sinks", "hitters": "heavy hitters"}         # of `cache_error.all_variants`
HOST_BYTES_PER_SECOND = 25e9                    # an assumption: what a PCIe 4 x16 link does in practice


def blocks() -> dict[str, Fact]:
    """The default block, the waste at the end of a sequence's last block, and the table beside what it points to."""
    size = CacheConfig().block_size
    table = 4 * -(-2048 // size)                # int32
    return {"block.size": Fact(size), "block.bytes": Fact(calc.kv_bytes(SMOLLM2, size), "B"),
            "block.mean_waste": Fact((size - 1) / 2), "block.waste_of_500": Fact((size - 1) / 2 / 500, "ratio"),
            "block.piece_bytes": Fact(size * SMOLLM2.num_key_value_heads * SMOLLM2.head_dim * 2, "B"),
            "block.pieces": Fact(2 * SMOLLM2.num_hidden_layers),
            "table.bytes": Fact(table, "B"), "table.kv_bytes": Fact(calc.kv_bytes(LLAMA, 2048), "B"),
            "kv.smollm2.bytes": Fact(calc.kv_bytes_per_token(SMOLLM2), "B"),
            "kv.smollm2.by_hidden_size": Fact(calc.kv_bytes_per_token_by_hidden_size(SMOLLM2), "B"),
            "kv.llama_3_1_8b.bytes": Fact(calc.kv_bytes_per_token(LLAMA), "B"),
            "kv.llama_3_1_8b.131072": Fact(calc.kv_bytes(LLAMA, 131_072), "B"),
            "kv.llama_2_13b.2048": Fact(calc.kv_bytes(SPECS["Llama-2-13B"], 2048), "B")}


def utilisation() -> dict[str, Fact]:
    """Share of the reserved slots that hold a token: rows, and blocks of several sizes."""
    stored = [len(r.prompt_token_ids) + r.output_len - 1 for r in ragged(64).requests]
    facts = {"rows.example": Fact(row_utilisation([512, 128], EXAMPLE_ROW), "ratio"),
             "blocks.example": Fact(block_utilisation([512, 128], 16), "ratio"),
             "rows.ragged": Fact(row_utilisation(stored, MEMORY_ROW), "ratio"),
             "rows.ragged.fitted": Fact(row_utilisation(stored, fitted_row()), "ratio"),
             "ragged.longest": Fact(longest_request()),
             "ragged.mean_stored": Fact(sum(stored) / len(stored))}
    return facts | {f"blocks.ragged.{size}": Fact(block_utilisation(stored, size), "ratio") for size in BLOCK_SIZES}


def sharing() -> dict[str, Fact]:
    """Eight outputs of 128 tokens from a prompt: blocks held, and blocks if each had its own prompt."""
    size, output, n, facts = CacheConfig().block_size, 128, 8, dict[str, Fact]()
    for prefix, prompt in (("sharing", 512), ("sharing.500", 500)):
        shared = prompt // size
        own = -(-(prompt + output - 1) // size) - shared
        facts |= {f"{prefix}.held": Fact(shared + n * own), f"{prefix}.copied": Fact(n * (shared + own)),
                  f"{prefix}.saved": Fact(1 - (shared + n * own) / (n * (shared + own)), "ratio"),
                  f"{prefix}.copies": Fact(n - 1 if prompt % size else 0)}
    return facts


def longest_request() -> int:
    """Tokens of the longest request of `ragged-64`, prompt and output."""
    return max(len(r.prompt_token_ids) + r.output_len for r in ragged(64).requests)


def fitted_row() -> int:
    """The row that somebody would choose who knows the longest request in advance."""
    return -(-longest_request() // ROW_STEP) * ROW_STEP


def serve_rows(row_size: int) -> Simulation:
    """`ragged-64`, all at once, in the memory of the benchmark's first table, cut into rows of `row_size` tokens."""
    return Simulator(MEMORY_TOKENS // row_size, row_size=row_size).run(ragged(64).requests)


def serve(block_size: int, watermark: float = 0.01, swap: bool = False) -> Simulation:
    """The same in blocks."""
    num_blocks = MEMORY_TOKENS // block_size
    manager = paged_manager(num_blocks, block_size, num_blocks if swap else 0, watermark)
    return Simulator(MAX_NUM_SEQS, row_size=MEMORY_ROW, kv_cache_manager=manager).run(ragged(64).requests)


def capacity() -> dict[str, Fact]:
    """Rows and blocks at the same memory: steps, who runs side by side, who has to give way."""
    runs = {"rows": serve_rows(MEMORY_ROW), "rows_fitted": serve_rows(fitted_row()), "swap": serve(16, swap=True)}
    runs |= {f"blocks.{size}": serve(size) for size in BLOCK_SIZES}
    runs |= {f"watermark.{share:g}": serve(16, share) for share in (0.0, 0.05, 0.2)}
    steps = {name: len(run.steps) for name, run in runs.items()}
    facts = {"memory.rows": Fact(MEMORY_ROWS), "memory.row_size": Fact(MEMORY_ROW),
             "memory.tokens": Fact(MEMORY_TOKENS), "memory.blocks": Fact(MEMORY_TOKENS // 16),
             "sim.rows_fitted.row_size": Fact(fitted_row()),
             "sim.rows_fitted.rows": Fact(MEMORY_TOKENS // fitted_row()),
             "sim.rows_fitted.fewer": Fact(steps["rows"] / steps["rows_fitted"]),
             "sim.blocks.fewer": Fact(steps["rows"] / steps["blocks.16"]),
             "sim.blocks.fewer_than_fitted": Fact(steps["rows_fitted"] / steps["blocks.16"])}
    for name, run in runs.items():
        running = [len(s.seq_lens) for s in run.steps if s.is_decode]
        facts |= {f"sim.{name}.steps": Fact(len(run.steps)), f"sim.{name}.most": Fact(max(running)),
                  f"sim.{name}.mean": Fact(sum(running) / len(running)),
                  f"sim.{name}.preemptions": Fact(sum(s.preempted for s in run.steps)),
                  f"sim.{name}.recomputed": Fact(sum(s.recomputed for s in run.steps))}
    return facts


def sizing() -> dict[str, Fact]:
    """Llama-3.1-8B on an H100 of which 90 % may be used: tokens, blocks, and sequences by rows and by blocks."""
    free = int(0.9 * H100.memory_bytes - calc.weight_bytes(LLAMA))
    num_blocks = free // calc.kv_bytes(LLAMA, 16)
    return {"sizing.weight_bytes": Fact(calc.weight_bytes(LLAMA), "B"), "sizing.kv_bytes": Fact(free, "B"),
            "sizing.tokens": Fact(16 * num_blocks), "sizing.blocks": Fact(num_blocks),
            "sizing.rows_8192": Fact(free // calc.kv_bytes(LLAMA, 8192)),
            "sizing.sequences_640": Fact(num_blocks // 40)}


def crossover() -> dict[str, Fact]:
    """A victim out and in again over its length: its cache over the bus and back, or its tokens once more."""
    facts = {"swap.bytes_per_second": Fact(HOST_BYTES_PER_SECOND, "B/s")}
    for name, short in NAMES.items():
        for length in LENGTHS:
            swap, again = swap_and_recompute(SPECS[name], length)
            facts |= {f"{short}.swap.{length}.ms": Fact(swap * 1e3, "ms"),
                      f"{short}.recompute.{length}.ms": Fact(again * 1e3, "ms")}
    for name in ("SmolLM2-135M", "Qwen3-0.6B"):         # for the larger model swapping wins at every length
        recomputed = [n for n in range(16, 131_073, 16) if min(pair := swap_and_recompute(SPECS[name], n)) == pair[1]]
        facts |= {f"{NAMES[name]}.swap.up_to": Fact(recomputed[0] - 16),
                  f"{NAMES[name]}.swap.again_from": Fact(recomputed[-1] + 16)}
    return facts


def swap_and_recompute(spec: ModelSpec, length: int) -> tuple[float, float]:
    """Seconds to copy a sequence's cache out and back, and to run it as one prefill, at the limits."""
    flops = calc.prefill_flops(spec, length, causal=True).total
    again = roofline_time(flops, calc.prefill_bytes(spec, length).total, H100).seconds
    return 2 * calc.kv_bytes(spec, length) / HOST_BYTES_PER_SECOND, again


def quantisation() -> dict[str, Fact]:
    """SmolLM2's cache in 8 and 4 bits, scales included: bytes of a token and of a block, and their share of 16 bits."""
    formats: dict[str, CachePlugin] = {"int8_token": KVCompressionPlugin()}
    for bits in (8, 4):
        formats |= {f"int{bits}": BlockQuantisation(bits), f"int{bits}_channel": BlockQuantisation(bits, 16, True)}
    full = calc.kv_bytes(SMOLLM2, 16)
    facts = {"kv.bytes.bf16": Fact(full / 16, "B"), "kv.block_bytes.bf16": Fact(full, "B")}
    for name, plugin in formats.items():
        block_bytes = slot_cache_bytes(SMOLLM2, 16, torch.bfloat16, [plugin])
        facts |= {f"kv.bytes.{name}": Fact(block_bytes / 16, "B"), f"kv.block_bytes.{name}": Fact(block_bytes, "B"),
                  f"quant.{name}.ratio": Fact(block_bytes / full, "ratio"),
                  f"quant.{name}.gain": Fact(full / block_bytes, "ratio")}
    # One scale in 16 bits for the D / 2 bytes of a vector in 4 bits.
    return facts | {"quant.int4_token.ratio": Fact((SMOLLM2.head_dim / 2 + 2) / (2 * SMOLLM2.head_dim), "ratio")}


def virtual_pages() -> dict[str, Fact]:
    """Keys and values of Llama-3.1-8B in the driver's pages of 2 MB: one range of addresses per layer, twice."""
    ranges, bytes_per_token = 2 * LLAMA.num_hidden_layers, LLAMA.num_key_value_heads * LLAMA.head_dim * 2
    tokens = PAGE_BYTES // bytes_per_token
    return {"vattention.ranges": Fact(ranges), "vattention.tokens_per_page": Fact(tokens),
            "vattention.first_page_bytes": Fact(ranges * PAGE_BYTES, "B"),
            "vattention.mean_waste": Fact((tokens - 1) / 2)}


def gather() -> dict[str, Fact]:
    """A decode step on an H100: keys and values read in place once, or read, written to a copy, and read again."""
    facts: dict[str, Fact] = {}
    for batch, context in ((1, 512), (32, 512), (32, 2048), (256, 512)):
        works = [Work(1, context)] * batch
        flops, traffic = calc.step_flops(LLAMA, works).total, calc.step_bytes(LLAMA, works)
        in_place = roofline_time(flops, traffic.total, H100).seconds
        gathered = roofline_time(flops, traffic.total + 2 * traffic.kv_read, H100).seconds
        prefix = f"gather.{batch}x{context}"
        facts |= {f"{prefix}.in_place_ms": Fact(in_place * 1e3, "ms"), f"{prefix}.ms": Fact(gathered * 1e3, "ms"),
                  f"{prefix}.slower": Fact(gathered / in_place - 1, "ratio")}
    return facts


def bench_results() -> dict[str, Result]:
    """What the documents quote of `python -m m3_paged_kv bench`."""
    facts: dict[str, Result] = {}
    tables = {"memory": (0, ("m2", "m3", *DEFAULT_PEERS)), "roomy": (1, ("m2", "m3")),
              "block": (2, tuple(map(str, BLOCK_SIZES))), "preempt": (3, ("recompute", "swap"))}
    for table, (position, names) in tables.items():
        for i, name in enumerate(names):
            path = f"comparisons.{position}.contenders.{i}"
            facts[f"bench.{table}.{name}.tokens_per_s"] = Result("bench.json", f"{path}.output_throughput", "1/s")
            facts[f"bench.{table}.{name}.ratio"] = Result("bench.json", f"{path}.ratio", "ratio")
            facts[f"bench.{table}.{name}.same"] = Result("bench.json", f"{path}.identical_requests")
    for name in ("m2", "m3"):
        facts |= {f"bench.running.{name}.{key}": Result("bench.json", f"measurements.concurrency.{name}.{key}")
                  for key in ("most", "mean")}
    for i, length in enumerate(CROSSOVER_LENGTHS):
        facts |= {f"bench.crossover.{length}.{way}_s": Result("bench.json", f"measurements.crossover.{i}.{way}_s", "s")
                  for way in ("recompute", "swap")}
    for part in ("schedule", "prepare", "metadata", "model", "conclude"):
        facts |= {f"bench.step.{part}_{key}": Result("bench.json", f"measurements.step_costs.{part}_{key}", unit)
                  for key, unit in (("s", "s"), ("share", "ratio"))}
    for short, name in CACHE_VARIANTS.items():
        path = f"measurements.cache_error.variants.{name}"
        facts |= {f"bench.error.{short}.{key}": Result("bench.json", f"{path}.{step}", unit) for key, step, unit in (
            ("kl", "mean_kl", "nats"), ("kl_first", "kl.0", "nats"), ("kl_last", "kl.-1", "nats"),
            ("same", "mean_same_token", "ratio"), ("bytes", "bytes_per_token", "B"), ("held", "held_bytes", "B"))}
    for key in ("length", "num_texts", "budget"):
        facts[f"bench.error.{key}"] = Result("bench.json", f"measurements.cache_error.{key}")
    return facts | {f"bench.used.{size}": Result("bench.json", f"measurements.block_sizes.{size}", "ratio")
                    for size in BLOCK_SIZES}


FOLDER = Path(__file__).parents[1]
FACTS = Facts(FOLDER,
              computed={"blocks": blocks, "utilisation": utilisation, "sharing": sharing, "capacity": capacity,
                        "sizing": sizing, "crossover": crossover, "gather": gather,
                        "quantisation": quantisation, "virtual_pages": virtual_pages},
              results=bench_results() if (FOLDER / "results" / "bench.json").is_file() else {})
