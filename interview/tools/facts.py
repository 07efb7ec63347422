"""Every number that the interview pages may quote.

Computed here: what models weigh on which hardware, what travels between devices, what a fleet needs, what experts do
to a batch. All are bounds and sums from published shapes and data sheets, not measurements. What was measured is read
from the milestones' benchmark results (`road.*`).
"""
from __future__ import annotations

import importlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from m0_basics.loading.rope_config import Llama3RopeScaling
from m0_basics.model_spec import ModelSpec
from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.calculators import Work
from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.analysis.roofline import HARDWARE, max_sequences, memory_bound_context, roofline_time
from m0_basics.tools.documents.factbook import Fact, Facts

FOLDER = Path(__file__).parents[1]
H100, RTX4090 = HARDWARE["H100-SXM"], HARDWARE["RTX-4090"]
SMALL, LLAMA8, LLAMA13 = SPECS["SmolLM2-135M"], SPECS["Llama-3.1-8B"], SPECS["Llama-2-13B"]
QWEN06 = SPECS["Qwen3-0.6B"]
# Llama-3.1-70B by its published configuration.
LLAMA70 = ModelSpec(
    "LlamaForCausalLM", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5,
    rope_theta=500_000.0, tie_word_embeddings=False, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192))
USED = 0.9                              # share of a device's memory that an engine claims
NVLINK, PCIE5, NET400, NET100 = 450e9, 50e9, 50e9, 12.5e9        # bytes per second, one direction
LATENCY = 10e-6                         # seconds of one small all-reduce within a machine: an assumption
PRICE = 2.0                             # dollars for an hour of an H100: an assumption, put in your own
EFFICIENCY = 0.5                        # of the bound that an engine reaches over a day: an assumption
CONTEXT = 2048
# Shares of experts: (experts, chosen per token, layers, hidden, width of an expert), by the published configurations.
MOE = {"qwen3_30b_a3b": (128, 8, 48, 2048, 768), "mixtral_8x7b": (8, 2, 32, 4096, 14336)}
ADAPTER_RANK = 16


def seventy() -> dict[str, Fact]:
    """Llama-3.1-70B on H100s: what fits on 2, 4 and 8, how fast a step can be, and what a million tokens cost."""
    weights, token = calc.weight_bytes(LLAMA70), calc.kv_bytes_per_token(LLAMA70)
    facts = {"llama70.params": Fact(calc.count_parameters(LLAMA70).total), "llama70.weights": Fact(weights, "B"),
             "llama70.kv_token": Fact(token, "B"), "llama70.kv_2048": Fact(CONTEXT * token, "B"),
             "h100.usable": Fact(USED * H100.memory_bytes, "B"), "h100.gb_per_s": Fact(H100.bytes_per_second, "B/s"),
             "h100.tflops": Fact(H100.peak("bfloat16"), "FLOP/s"), "h100.ridge": Fact(H100.ridge_point(), "FLOP/B"),
             "llama70.critical_context": Fact(memory_bound_context(LLAMA70, H100) or 0, "tokens")}
    for devices in (2, 4, 8):
        room = devices * USED * H100.memory_bytes - weights
        fit = int(room // (CONTEXT * token))
        facts |= {f"llama70.{devices}.room": Fact(room, "B"), f"llama70.{devices}.fit": Fact(fit)}
        for batch in (1, fit):
            step = _step(LLAMA70, batch, CONTEXT, devices)
            facts[f"llama70.{devices}.b{'1' if batch == 1 else 'fit'}.ms"] = Fact(1e3 * step, "ms")
        facts[f"llama70.{devices}.tokens_per_s"] = Fact(fit / _step(LLAMA70, fit, CONTEXT, devices), "tokens/s")
    best = float(facts["llama70.4.tokens_per_s"].value)
    flops = calc.step_flops(LLAMA70, [Work(CONTEXT, CONTEXT)], causal=True, num_logits=1).total
    return facts | {
        "llama70.4.dollars_per_million": Fact(4 * PRICE / 3600 / (best * EFFICIENCY) * 1e6, "dollars"),
        "llama70.4.dollars_per_million_alone": Fact(4 * PRICE / 3600 * _step(LLAMA70, 1, CONTEXT, 4) * 1e6, "dollars"),
        "llama70.4.prefill_2048.ms": Fact(1e3 * flops / (4 * EFFICIENCY * H100.peak("bfloat16")), "ms"),
        "llama70.4.prefill_dollars_per_million": Fact(
            4 * PRICE / 3600 * flops / (4 * EFFICIENCY * H100.peak("bfloat16")) / CONTEXT * 1e6, "dollars"),
        "llama70.load.seconds": Fact(weights / NET100, "s"), "llama70.load.nvme.seconds": Fact(weights / 7e9, "s"),
        "price": Fact(PRICE, "dollars"), "llama70.int4": Fact(_four_bits(LLAMA70), "B"),
        "llama70.int4.one.fit": Fact(int((USED * H100.memory_bytes - _four_bits(LLAMA70)) // (CONTEXT * token)))}


def _step(spec: ModelSpec, batch: int, context: int, devices: int) -> float:
    """Seconds of a decode step at the roofline over `devices` H100s, without communication."""
    work = [Work(1, context)] * batch
    flops, traffic = calc.step_flops(spec, work, True).total, calc.step_bytes(spec, work).total
    return roofline_time(flops, traffic, H100).seconds / devices


def _four_bits(spec: ModelSpec, group: int = 128) -> float:
    """Bytes with all linear layers in 4 bits and a 16-bit scale and 4-bit zero per group; the rest in 16 bits."""
    count = calc.count_parameters(spec)
    linear = spec.num_hidden_layers * (count.attention + count.mlp)
    return linear * (4 + 20 / group) / 8 + 2 * (count.total - linear)


def one_card() -> dict[str, Fact]:
    """Llama-3.1-8B on one card of 24 GB: in 16 bits and in 4."""
    token, facts = calc.kv_bytes_per_token(LLAMA8), dict[str, Fact]()
    for name, weights in (("bf16", float(calc.weight_bytes(LLAMA8))), ("int4", _four_bits(LLAMA8))):
        room = USED * RTX4090.memory_bytes - weights
        facts |= {f"card.{name}.weights": Fact(weights, "B"), f"card.{name}.room": Fact(room, "B"),
                  f"card.{name}.tokens": Fact(int(room // token), "tokens"),
                  f"card.{name}.fit": Fact(int(room // (CONTEXT * token))),
                  f"card.{name}.one.tokens_per_s": Fact(
                      RTX4090.bytes_per_second / (weights - 2 * calc.count_parameters(LLAMA8).embedding), "tokens/s")}
    return facts | {"card.kv_token": Fact(token, "B"), "card.usable": Fact(USED * RTX4090.memory_bytes, "B")}


def travel() -> dict[str, Fact]:
    """What travels between four devices for Llama-3.1-70B, by tensor and by pipeline parallelism."""
    hidden, layers = LLAMA70.hidden_size, LLAMA70.num_hidden_layers
    row, facts = 2 * hidden, dict[str, Fact]()                      # bytes of one token's hidden state
    facts |= {"wire.tp.reduces": Fact(2 * layers), "wire.row": Fact(row, "B"),
              "wire.tp.token": Fact(2 * layers * 2 * 3 / 4 * row, "B"),     # a ring of 4 sends 2 (n - 1) / n of it
              "wire.pp.token": Fact(3 * row, "B"), "wire.ratio": Fact(2 * layers * 2 * 3 / 4 / 3, "ratio")}
    for batch in (1, 64):
        size = batch * row
        for name, speed in (("nvlink", NVLINK), ("net100", NET100)):
            latency = LATENCY if name == "nvlink" else 3 * LATENCY
            facts[f"wire.tp.b{batch}.{name}.ms"] = Fact(1e3 * 2 * layers * (latency + 2 * 3 / 4 * size / speed), "ms")
            facts[f"wire.pp.b{batch}.{name}.ms"] = Fact(1e3 * 3 * (latency + size / speed), "ms")
    prompt = 2048 * row
    facts |= {f"wire.tp.prefill.{name}.ms": Fact(1e3 * 2 * layers * 2 * 3 / 4 * prompt / speed, "ms")
              for name, speed in (("nvlink", NVLINK), ("pcie5", PCIE5), ("net100", NET100))}
    speeds = {"wire.nvlink": Fact(NVLINK, "B/s"), "wire.pcie5": Fact(PCIE5, "B/s"), "wire.net100": Fact(NET100, "B/s")}
    bubbles = {f"bubble.4.{m}": Fact(3 / (m + 3), "ratio") for m in (1, 4, 16)}    # of 4 stages and m micro-batches
    return facts | speeds | bubbles | {"step70.b64.ms": Fact(1e3 * _step(LLAMA70, 64, CONTEXT, 4), "ms")}


def apart() -> dict[str, Fact]:
    """Prefill and decode on devices of their own, Llama-3.1-8B: transfer, and how many of each."""
    facts: dict[str, Fact] = {}
    token = calc.kv_bytes_per_token(LLAMA8)
    for length in (500, 4000):
        flops = calc.step_flops(LLAMA8, [Work(length, length)], causal=True, num_logits=1).total
        compute = flops / (EFFICIENCY * H100.peak("bfloat16"))
        facts |= {f"pd.{length}.compute.ms": Fact(1e3 * compute, "ms"), f"pd.{length}.bytes": Fact(length * token, "B"),
                  f"pd.{length}.net400.ms": Fact(1e3 * length * token / NET400, "ms"),
                  f"pd.{length}.net100.ms": Fact(1e3 * length * token / NET100, "ms")}
        decode = 300 * _decode_seconds(64, length + 150) / 64       # seconds of a decode device per request
        facts[f"pd.{length}.decode.ms"] = Fact(1e3 * decode, "ms")
        facts[f"pd.{length}.ratio"] = Fact(compute / decode, "ratio")
    return facts


def _decode_seconds(batch: int, context: int) -> float:
    work = [Work(1, context)] * batch
    return calc.step_bytes(LLAMA8, work).total / H100.bytes_per_second / EFFICIENCY


def experts() -> dict[str, Fact]:
    """Experts that a step touches if tokens choose at random, and what that does to a decode step."""
    facts: dict[str, Fact] = {}
    for name, (total, chosen, layers, hidden, width) in MOE.items():
        each = 3 * hidden * width * 2                               # bytes of one expert: gate, up, down
        facts |= {f"moe.{name}.experts": Fact(total), f"moe.{name}.chosen": Fact(chosen),
                  f"moe.{name}.all_bytes": Fact(layers * total * each, "B"),
                  f"moe.{name}.token_bytes": Fact(layers * chosen * each, "B")}
        for batch in (1, 8, 16, 64, 256):
            touched = total * (1 - (1 - chosen / total) ** batch)
            facts |= {f"moe.{name}.touched.{batch}": Fact(touched),
                      f"moe.{name}.share.{batch}": Fact(touched / total, "ratio"),
                      f"moe.{name}.tokens_per_expert.{batch}": Fact(batch * chosen / touched),
                      f"moe.{name}.ms.{batch}": Fact(1e3 * layers * touched * each / H100.bytes_per_second, "ms")}
        ridge, once = H100.ridge_point(), float(facts[f"moe.{name}.touched.1"].value)
        facts[f"moe.{name}.slower.16"] = Fact(float(facts[f"moe.{name}.touched.16"].value) / once, "ratio")
        facts[f"moe.{name}.useful_batch"] = Fact(ridge * total / chosen)
        facts[f"moe.{name}.all_to_all"] = Fact(2 * chosen * hidden * 2 * layers, "B")
    return facts


def fleet() -> dict[str, Fact]:
    """A service: 1,000,000 users a day who ask Llama-3.1-8B, and what the peak needs."""
    users, asks, prompt, output, peak = 1_000_000, 8, 1200, 300, 3
    per_second = users * asks / 86_400
    busy = peak * per_second
    seconds = output * 0.025
    running = busy * seconds
    fit = max_sequences(LLAMA8, H100, prompt + output)
    work = [Work(1, prompt + output // 2)] * 128
    step = calc.step_bytes(LLAMA8, work).total / H100.bytes_per_second / EFFICIENCY
    prefill = calc.step_flops(LLAMA8, [Work(prompt, prompt)], causal=True, num_logits=1).total / (
        EFFICIENCY * H100.peak("bfloat16"))
    per_request = prefill + output * step / 128
    devices = busy * per_request / 0.7
    return {"fleet.mean": Fact(per_second, "1/s"), "fleet.peak": Fact(busy, "1/s"), "fleet.running": Fact(running),
            "fleet.fit": Fact(fit), "fleet.step.ms": Fact(1e3 * step, "ms"),
            "fleet.prefill.ms": Fact(1e3 * prefill, "ms"),
            "fleet.request.ms": Fact(1e3 * per_request, "ms"), "fleet.devices": Fact(devices),
            "fleet.memory_devices": Fact(running / fit), "fleet.hit_devices": Fact(
                busy * (0.3 * prefill + output * step / 128) / 0.7),
            "fleet.dollars_per_day": Fact(math.ceil(devices) * PRICE * 24, "dollars"),
            "fleet.prefill_share": Fact(prefill / per_request, "ratio")}


def long_context() -> dict[str, Fact]:
    """128k tokens of Llama-3.1-8B: cache, prefill, and what a step reads. And thoughts of 10,000 tokens."""
    length = 131_072
    token = calc.kv_bytes_per_token(LLAMA8)
    prefill = calc.step_flops(LLAMA8, [Work(length, length)], causal=True, num_logits=1)
    read = calc.step_bytes(LLAMA8, [Work(1, length)])
    room = USED * H100.memory_bytes - calc.weight_bytes(LLAMA8)
    facts = {"long.kv": Fact(length * token, "B"), "long.fit": Fact(int(room // (length * token))),
             "long.fp8.fit": Fact(int(room // (length * token // 2))),
             "long.prefill.s": Fact(prefill.total / (EFFICIENCY * H100.peak("bfloat16")), "s"),
             "long.attention_share": Fact(prefill.attention / prefill.total, "ratio"),
             "long.step.ms": Fact(1e3 * read.total / H100.bytes_per_second, "ms"),
             "long.kv_share": Fact(read.kv_read / read.total, "ratio"),
             "long.weights": Fact(calc.weight_bytes(LLAMA8), "B")}
    for tokens in (500, 10_000):
        mean = 200 + tokens // 2
        fit = int(room // ((200 + tokens) * token))
        step = calc.step_bytes(LLAMA8, [Work(1, mean)] * fit).total / H100.bytes_per_second
        flops = calc.step_flops(LLAMA8, [Work(1, mean)] * fit, True).total / H100.peak("bfloat16")
        facts |= {f"thought.{tokens}.fit": Fact(fit), f"thought.{tokens}.kv": Fact((200 + tokens) * token, "B"),
                  f"thought.{tokens}.ms": Fact(1e3 * max(step, flops), "ms"),
                  f"thought.{tokens}.answers_per_minute": Fact(60 * fit / max(step, flops) / tokens, "1/min"),
                  f"thought.{tokens}.seconds": Fact(tokens * max(step, flops), "s")}
    return facts


def adapters() -> dict[str, Fact]:
    """LoRA on all linear layers of Llama-3.1-8B: bytes of one adapter, and what many in one step read."""
    spec = LLAMA8
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    shapes = [(spec.hidden_size, q), (spec.hidden_size, kv), (spec.hidden_size, kv), (q, spec.hidden_size)] + [
        (spec.hidden_size, spec.intermediate_size)] * 2 + [(spec.intermediate_size, spec.hidden_size)]
    size = 2 * spec.num_hidden_layers * ADAPTER_RANK * sum(a + b for a, b in shapes)
    weights = calc.weight_bytes(spec)
    return {"lora.bytes": Fact(size, "B"), "lora.share": Fact(size / weights, "ratio"),
            "lora.32.read": Fact(32 * size, "B"), "lora.32.share": Fact(32 * size / weights, "ratio"),
            "lora.host.ms": Fact(1e3 * size / PCIE5, "ms"), "lora.1000": Fact(1000 * size, "B"),
            "lora.merged_32": Fact(32 * weights, "B")}


def rollouts() -> dict[str, Fact]:
    """What a policy update moves, and how fast probabilities of engine and trainer part."""
    weights = calc.weight_bytes(LLAMA8)
    return {"rl.weights": Fact(weights, "B"), "rl.nvlink.ms": Fact(1e3 * weights / NVLINK, "ms"),
            "rl.net400.ms": Fact(1e3 * weights / NET400, "ms"), "rl.disk.s": Fact(weights / 7e9, "s"),
            "rl.ratio.1000": Fact(1.001 ** 1000, "ratio"), "rl.kv_freed": Fact(USED * H100.memory_bytes - weights, "B")}


def corrections() -> dict[str, Fact]:
    """Numbers of the page of corrections."""
    return {
        "kv.smollm2": Fact(calc.kv_bytes_per_token(SMALL), "B"),
        "kv.smollm2.wrong": Fact(calc.kv_bytes_per_token_by_hidden_size(SMALL), "B"),
        "kv.qwen": Fact(calc.kv_bytes_per_token(QWEN06), "B"),
        "kv.qwen.wrong": Fact(calc.kv_bytes_per_token_by_hidden_size(QWEN06), "B"),
        "kv.13b.2048": Fact(calc.kv_bytes(LLAMA13, 2048), "B"),
        "saved.qwen.embedding": Fact(calc.count_parameters(QWEN06).embedding),
        "static.utilisation": Fact((5 + 100 + 3 + 80) / 400, "ratio"), "static.prealloc": Fact(640 / 4096, "ratio"),
        "page.waste.500": Fact(7.5 / 500, "ratio")}


def road() -> dict[str, Fact]:
    """What each milestone measured against the one before it, from its stored benchmark."""
    facts: dict[str, Fact] = {}
    for file in sorted(FOLDER.parent.glob("m[0-7]_*/results/bench.json")):
        name = file.parents[1].name.partition("_")[0]
        before = f"m{int(name[1:]) - 1}"
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for comparison in data["comparisons"]:
            rows = {c["name"]: c for c in comparison["contenders"]}
            load = str(comparison["workload"]["name"]).partition(":")[0]
            if name in rows and f"road.{name}.{load}.tokens_per_s" not in facts:
                facts[f"road.{name}.{load}.tokens_per_s"] = Fact(rows[name]["output_throughput"], "tokens/s")
                for other in (before, "vllm", "transformers", "transformers-static"):
                    if other in rows:
                        over = rows[name]["ratio"] / rows[other]["ratio"]
                        facts[f"road.{name}.{load}.over.{other}"] = Fact(over, "ratio")
    return facts


# Facts of the milestones that these pages quote too; here their names begin with the milestone's.
OF_MILESTONES = {
    "m0_basics": ("access.tensor_item_over_list", "cpu.bfloat16_over_float32", "cpu.float32_over_float16"),
    "m1_offline": ("example.nucleus.kept", "example.nucleus.mass", "example.nucleus.wrong_kept",
                   "example.nucleus.wrong_mass"),
    "m3_paged_kv": ("block.mean_waste", "smollm2.swap.up_to", "smollm2.swap.again_from"),
    "m4_flash_attn": ("traffic.1024.peak_ratio", "traffic.8192.peak_ratio", "traffic.65536.peak_ratio",
                      "traffic.8192.ratio", "traffic.d128.over_d64"),
    "m5_chunked_prefill": ("bench.giant.m4.longest_gap_ms", "bench.giant.m5.longest_gap_ms",
                           "bench.giant.m4.giant_ttft_ms", "bench.giant.m5.giant_ttft_ms"),
    "m7_gptq": ("saved.qwen3_06b.layers4", "saved.smollm2.layers4", "bits.4.128", "bytes.qwen3_06b.bf16",
                "bytes.qwen3_06b.layers4", "quality.full.ppl", "quality.4.64.gptaq.ppl", "quality.4.64.rtn.ppl",
                "bench.single.m7_a16.ratio", "bench.ragged.m7_a16.ratio"),
}


def of_milestones() -> dict[str, Fact]:
    """The facts of OF_MILESTONES, as `m4:traffic.8192.ratio`. A milestone that is not there has none."""
    facts: dict[str, Fact] = {}
    for package, names in OF_MILESTONES.items():
        if importlib.util.find_spec(f"{package}.tools.facts") is None:
            continue
        book: Facts = importlib.import_module(f"{package}.tools.facts").FACTS
        known = book.all()
        facts |= {f"{package.partition('_')[0]}:{name}": known[name] for name in names}
    return facts


FACTS = Facts(FOLDER, computed={
    "seventy": seventy, "one_card": one_card, "travel": travel, "apart": apart, "experts": experts, "fleet": fleet,
    "long_context": long_context, "adapters": adapters, "rollouts": rollouts, "corrections": corrections, "road": road,
    "of_milestones": of_milestones})

