"""Every number that milestone 6's documents may quote.

Computed here: what a known prefix saves by the count of operations, what a fetch has to deliver to be quicker than
computing, what shared attention would read, how replicas share prefixes, how long until hashes collide. What was timed
comes from `results/bench.json`.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.calculators import Work
from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.analysis.roofline import HARDWARE
from m0_basics.tools.documents.factbook import Fact, Facts, Result, read_json_file

from . import routing
from .traces import make_trace

H100, LLAMA, SMALL = HARDWARE["H100-SXM"], SPECS["Llama-3.1-8B"], SPECS["SmolLM2-135M"]
BLOCK = 16
EFFICIENCY = 0.5                        # of an H100's peak, in a prefill
PCIE, NVME, NETWORK = 50e9, 7e9, 12.5e9         # bytes per second: PCIe 5 in practice, one drive, 100 Gbit/s
SHARERS, SHARED, OWN = 64, 2000, 200    # sequences that decode, tokens that all of them share, tokens of their own
AGENT = 20_000                          # tokens of an agent's context while it waits for a tool
# Qwen3-Next-80B-A3B by its published configuration: 36 of 48 layers are gated DeltaNet, 12 are attention.
LINEAR_LAYERS, VALUE_HEADS, KEY_WIDTH, VALUE_WIDTH = 36, 32, 128, 128
FULL_LAYERS, KV_HEADS, HEAD_WIDTH = 12, 2, 256


def savings() -> dict[str, Fact]:
    """Operations of a prompt of 1,200 tokens, and of its last part alone, by the share that is known."""
    whole = calc.step_flops(SMALL, [Work(1200, 1200)], causal=True, num_logits=1).total
    facts = {"block.example.whole": Fact(1200 // BLOCK),
             "block.kv_bytes": Fact(BLOCK * calc.kv_bytes_per_token(SMALL), "B"),
             "block.llama.kv_bytes": Fact(BLOCK * calc.kv_bytes_per_token(LLAMA), "B")}
    for percent in (50, 80, 95):
        own = 1200 - 1200 * percent // 100
        facts[f"save.{percent}"] = Fact(
            whole / calc.step_flops(SMALL, [Work(own, 1200)], causal=True, num_logits=1).total, "ratio")
    room = 0.9 * H100.memory_bytes - calc.weight_bytes(LLAMA)
    return facts | {"h100.room.tokens": Fact(int(room // calc.kv_bytes_per_token(LLAMA)), "tokens"),
                    "h100.room.prompts": Fact(int(room // (SHARED * calc.kv_bytes_per_token(LLAMA))))}


def tiers() -> dict[str, Fact]:
    """Llama-3.1-8B on an H100: milliseconds to compute a prefix, and to bring it from a tier below."""
    facts = {"kv.token_bytes": Fact(calc.kv_bytes_per_token(LLAMA), "B")}
    for length in (500, 2000, 8000, 32_000):
        flops = calc.step_flops(LLAMA, [Work(length, length)], causal=True, num_logits=0).total
        seconds = flops / (EFFICIENCY * H100.peak("bfloat16"))
        num_bytes = length * calc.kv_bytes_per_token(LLAMA)
        facts[f"tier.{length}.compute.ms"] = Fact(1e3 * seconds, "ms")
        facts[f"tier.{length}.break_even"] = Fact(num_bytes / seconds / 1e9, "GB/s")
        for name, speed in (("host", PCIE), ("network", NETWORK), ("nvme", NVME)):
            facts[f"tier.{length}.{name}.ms"] = Fact(1e3 * num_bytes / speed, "ms")
    held = AGENT * calc.kv_bytes_per_token(LLAMA)
    again = calc.step_flops(LLAMA, [Work(AGENT, AGENT)], causal=True, num_logits=0).total
    return facts | {"agent.kv_bytes": Fact(held, "B"), "agent.host.ms": Fact(1e3 * held / PCIE, "ms"),
                    "agent.compute.ms": Fact(1e3 * again / (EFFICIENCY * H100.peak("bfloat16")), "ms")}


def cascade() -> dict[str, Fact]:
    """What a decode step of 64 sequences behind one prefix reads of the cache, and what it would read of it once."""
    token = calc.kv_bytes_per_token(LLAMA)
    plain, shared = SHARERS * (SHARED + OWN) * token, (SHARED + SHARERS * OWN) * token
    weights = calc.weight_bytes(LLAMA)
    return {"cascade.plain_bytes": Fact(plain, "B"), "cascade.shared_bytes": Fact(shared, "B"),
            "cascade.weight_bytes": Fact(weights, "B"),
            "cascade.plain.ms": Fact(1e3 * (weights + plain) / H100.bytes_per_second, "ms"),
            "cascade.shared.ms": Fact(1e3 * (weights + shared) / H100.bytes_per_second, "ms"),
            "cascade.gain": Fact((weights + plain) / (weights + shared), "ratio"),
            "cascade.memory": Fact(plain / shared, "ratio")}


def hybrid() -> dict[str, Fact]:
    """Qwen3-Next-80B-A3B: what one snapshot of its recurrent state weighs, in tokens of its attention's cache."""
    state = LINEAR_LAYERS * VALUE_HEADS * KEY_WIDTH * VALUE_WIDTH * 2
    token = FULL_LAYERS * 2 * KV_HEADS * HEAD_WIDTH * 2
    return {"hybrid.state_bytes": Fact(state, "B"), "hybrid.token_bytes": Fact(token, "B"),
            "hybrid.state_in_tokens": Fact(state / token, "tokens"),
            "hybrid.every_block": Fact(state / (BLOCK * token), "ratio")}


def collisions() -> dict[str, Fact]:
    """Birthday bound: the chance that among n hashes two are equal is about n² / 2^(bits + 1)."""
    return {"collide.32.blocks": Fact(round((2 * 0.01) ** 0.5 * 2 ** 16)),
            "collide.64.million": Fact(1e12 / 2 ** 65, "ratio"), "collide.64.blocks": Fact((2 * 0.01) ** 0.5 * 2 ** 32),
            "collide.bits": Fact(256)}


def replicas() -> dict[str, Fact]:
    """Four replicas under a trace of tenants' system prompts: what is found, and how even the load is."""
    facts: dict[str, Fact] = {}
    trace = make_trace("shared-system", 600)
    for way in routing.WAYS:
        found, slug = routing.route(trace, way), way.replace("-", "_")
        facts[f"route.{slug}.hits"] = Fact(found.hit_share, "ratio")
        facts[f"route.{slug}.imbalance"] = Fact(found.imbalance, "ratio")
    return facts


def bench_results(found: dict[str, Any]) -> dict[str, Result]:
    """Names of what was measured -> where it stands."""
    facts = {f"bench.{name}.{c['name'].replace('-', '_')}.{key}": _bench(f"comparisons.{i}.contenders.{j}.{key}", unit)
             for i, name in enumerate(("ragged", "shared"))
             for j, c in enumerate(found["comparisons"][i]["contenders"])
             for key, unit in (("output_throughput", "tokens/s"), ("ratio", "ratio"))}
    m = found["measurements"]
    for i, entry in enumerate(m["ttft"]):
        for name in entry["contenders"]:
            for key, unit in (("ttft_ms", "ms"), ("gain", "ratio")):
                facts[f"bench.ttft.{100 * entry['share']:.0f}.{name}.{key}"] = _bench(
                    f"measurements.ttft.{i}.contenders.{name}.{key}", unit)
    for i, entry in enumerate(m["traces"]):
        for name in entry["contenders"]:
            for key, unit in (("ttft_ms", "ms"), ("gain", "ratio"), ("hit_share", "ratio")):
                facts[f"bench.trace.{_slug(entry['trace'])}.{name}.{key}"] = _bench(
                    f"measurements.traces.{i}.contenders.{name}.{key}", unit)
    for name in m["bookkeeping"]:
        for key, unit in (("seconds", "s"), ("share", "ratio")):
            facts[f"bench.bookkeeping.{name}.{key}"] = _bench(f"measurements.bookkeeping.{name}.{key}", unit)
    for i, entry in enumerate(m["replay"]):
        for way in entry["ways"]:
            for key in ("share", "of_belady"):
                facts[f"bench.replay.{_slug(entry['trace'])}.{entry['blocks']}.{_slug(way)}.{key}"] = _bench(
                    f"measurements.replay.{i}.ways.{way}.{key}", "ratio")
    for i, entry in enumerate(m["lookup"]):
        for key in entry:
            if key not in ("index", "blocks"):
                facts[f"bench.lookup.{entry['index']}.{entry['blocks']}.{key}"] = _bench(
                    f"measurements.lookup.{i}.{key}", "B" if key.startswith("bytes") else "us")
    for i, entry in enumerate(m["disk"]["lengths"]):
        for way in entry["ms"]:
            facts[f"bench.disk.{entry['tokens']}.{_slug(way)}.ms"] = _bench(
                f"measurements.disk.lengths.{i}.ms.{way}", "ms")
    for way, tokens in m["disk"]["pays_from"].items():
        if tokens is not None:
            facts[f"bench.disk.{_slug(way)}.pays_from"] = _bench(f"measurements.disk.pays_from.{way}", "tokens")
    for key, unit in (("block_bytes", "B"), ("read_block_ms", "ms")):
        facts[f"bench.disk.{key}"] = _bench(f"measurements.disk.{key}", unit)
    return facts


def _slug(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_").replace("/", "_per_")


def _bench(path: str, unit: str) -> Result:
    return Result("bench.json", path, unit)


FOLDER = Path(__file__).parents[1]
_FILE = FOLDER / "results" / "bench.json"
FACTS = Facts(FOLDER, computed={"savings": savings, "tiers": tiers, "cascade": cascade, "hybrid": hybrid,
                                "collisions": collisions, "replicas": replicas},
              results=bench_results(read_json_file(_FILE)) if _FILE.is_file() else {})
