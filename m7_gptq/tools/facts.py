"""Every number that milestone 7's documents may quote.

Computed here or in arithmetic.py: bits, bytes and limits, worked out from shapes. What was timed comes from
`results/bench.json`, perplexities from `results/quality.json` (quality_facts.py).
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.documents.factbook import Fact, Facts, Result, read_json_file

from ..loading.memory import GGUF_FORMS, gptq_form, predict
from . import arithmetic
from .quality_facts import quality_facts

PANEL = 32                              # outputs to a panel of the AVX-512 kernels
QUALITY = "quality.json"


def packing() -> dict[str, Fact]:
    """Bytes of models once they are packed for the CPU: what `loading/memory.py` predicts, filled panels and all."""
    facts = {}
    for name, size in (("SmolLM2-135M", 64), ("Qwen3-0.6B", 128), ("Llama-3.1-8B", 128)):
        form = gptq_form(4, size, desc_act=False)          # as `quantize` writes it
        plain = not SPECS[name].tie_word_embeddings
        slug = {"SmolLM2-135M": "smollm2", "Qwen3-0.6B": "qwen3_06b", "Llama-3.1-8B": "llama_8b"}[name]
        facts[f"pack.{slug}.bytes"] = Fact(predict(SPECS[name], torch.bfloat16, form, form, PANEL, plain).total, "B")
    gguf = predict(SPECS["SmolLM2-135M"], torch.bfloat16, GGUF_FORMS["Q4_1"], GGUF_FORMS["Q8_0"], PANEL)
    return facts | {"pack.gguf.bytes": Fact(gguf.total, "B"), "pack.gguf.head_bytes": Fact(gguf.head, "B")}


def bench_results(found: Mapping[str, Any]) -> dict[str, Result]:
    """What may be quoted of `python -m m7_gptq bench`: everything that its file holds."""
    facts: dict[str, Result] = {}
    for position, table in enumerate(("ragged", "single")):
        for i, contender in enumerate(found["comparisons"][position]["contenders"]):
            path, name = f"comparisons.{position}.contenders.{i}", _slug(contender["name"])
            for key, unit in (("output_throughput", "tokens/s"), ("ratio", "ratio")):
                facts[f"bench.{table}.{name}.{key}"] = _bench(f"{path}.{key}", unit)
            facts[f"bench.{table}.{name}.tokens_per_s"] = _bench(f"{path}.output_throughput", "tokens/s")
    measured = found["measurements"]
    for table, ways in measured["speedup"].items():
        for way, ratios in ways.items():
            facts |= {f"bench.{table}.{_slug(way)}_over.{_slug(other)}": _bench(
                f"measurements.speedup.{table}.{way}.{other}", "ratio") for other in ratios}
    for name in measured["decode_tokens_per_s"]:
        facts[f"bench.decode.{_slug(name)}.tokens_per_s"] = _bench(f"measurements.decode_tokens_per_s.{name}",
                                                                   "tokens/s")
    for name in measured["weight_bytes"]:
        facts[f"bench.memory.{_slug(name)}.bytes"] = _bench(f"measurements.weight_bytes.{name}", "B")
        facts[f"bench.single.{_slug(name)}.limit_share"] = _bench(f"measurements.limits.share.{name}", "ratio")
        facts[f"bench.single.{_slug(name)}.limit"] = _bench(f"measurements.limits.tokens_per_s.{name}", "tokens/s")
    for name in measured["perplexity"]:
        facts[f"bench.perplexity.{_slug(name)}"] = _bench(f"measurements.perplexity.{name}", "")
    facts["bench.memory.bf16.bytes"] = _bench("measurements.plain_bytes", "B")
    facts["bench.bytes_per_s"] = _bench("measurements.limits.bytes_per_second", "B/s")
    for i, entry in enumerate(measured.get("linear", ())):
        facts |= {f"bench.linear.{entry['rows']}.{key}": _bench(f"measurements.linear.{i}.{key}", "ms")
                  for key in entry if key.endswith("_ms")}
    for i, entry in enumerate(measured.get("phases", ())):
        path, name = f"measurements.phases.{i}", f"bench.phases.{entry['num_requests']}.{entry['name']}"
        facts |= {f"{name}.{key}": _bench(f"{path}.{key}", "ms") for key in ("call_ms", "products_ms")}
        facts |= {f"{name}.{phase}_ms": _bench(f"{path}.phases.{phase}.ms", "ms") for phase in entry["phases"]}
    for i, entry in enumerate(measured["drafts"]):
        for name in entry["contenders"]:
            path = f"measurements.drafts.{i}.contenders.{name}"
            for key, unit in (("decode_ratio", "ratio"), ("ratio", "ratio"), ("acceptance", "ratio")):
                if entry["contenders"][name][key] is not None:
                    facts[f"bench.draft.{entry['task']}.{entry['num_requests']}.{name}.{key}"] = _bench(
                        f"{path}.{key}", unit)
        if entry["num_requests"] == 1 and entry["task"] == "story":         # the example that texts quote
            facts |= {f"bench.draft.{name}": facts[f"bench.draft.story.1.folder.{key}"]
                      for name, key in (("gain", "decode_ratio"), ("accepted", "acceptance"))
                      if f"bench.draft.story.1.folder.{key}" in facts}
    return facts


def spread(found: Mapping[str, Any]) -> dict[str, Fact]:
    """The lowest and the highest of the rounds, for what tables show the median of."""
    facts: dict[str, Fact] = {}
    for position, table in enumerate(("ragged", "single")):
        for contender in found["comparisons"][position]["contenders"] if found else ():
            rounds, name = contender["rounds"], _slug(contender["name"])
            values = {f"bench.{table}.{name}.ratio": (contender["ratios"], "ratio"),
                      f"bench.{table}.{name}.tokens_per_s": ([r["output_throughput"] for r in rounds], "tokens/s")}
            if table == "single" and all(r["tpot_ms"] for r in rounds):
                values[f"bench.decode.{name}.tokens_per_s"] = [1e3 / r["tpot_ms"]["median"] for r in rounds], "tokens/s"
            for key, (numbers, unit) in values.items():
                facts |= {f"{key}.low": Fact(min(numbers), unit), f"{key}.high": Fact(max(numbers), unit)}
    return facts


def step_shares() -> dict[str, Fact]:
    """What a decode step of one request consists of, by the benchmark's clocks: the native call, Python around it."""
    measured = _stored("bench.json").get("measurements", {})
    [call] = [e for e in measured.get("phases", ()) if (e["name"], e["num_requests"]) == ("m7", 1)] or [None]
    if call is None:
        return {}
    speed = measured["weight_bytes"]["m7"] / (1e-3 * call["products_ms"])
    return {"step.products_bandwidth_share": Fact(100 * speed / measured["limits"]["bytes_per_second"], "%"),
            "step.python_share": Fact(100 * (1 - 1e-3 * call["call_ms"] * measured["decode_tokens_per_s"]["m7"]), "%")}


def _slug(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_").replace(".", "_")


def _bench(path: str, unit: str) -> Result:
    return Result("bench.json", path, unit)


def _stored(name: str) -> dict[str, Any]:
    file = FOLDER / "results" / name
    return read_json_file(file) if file.is_file() else {}


FOLDER = Path(__file__).parents[1]
FACTS = Facts(FOLDER, computed={"formats": arithmetic.formats, "memory": arithmetic.memory, "speed": arithmetic.speed,
                                "algorithm": arithmetic.algorithm, "packing": packing, "steps": step_shares,
                                "quality": lambda: quality_facts(_stored(QUALITY)),
                                "spread": lambda: spread(_stored("bench.json"))},
              results=bench_results(_stored("bench.json")) if _stored("bench.json") else {})
