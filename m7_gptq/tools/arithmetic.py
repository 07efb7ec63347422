"""What quantised weights weigh, and what their bytes allow, worked out from shapes and data sheets: no clock here.

Bits per weight of the formats with everything beside the codes, bytes of whole models, tokens that fit beside them,
and the roofline's answer to when fewer bytes are less time.
"""
from __future__ import annotations

from dataclasses import replace

from m0_basics.model_spec import ModelSpec
from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.format_facts import bits_per_weight
from m0_basics.tools.analysis.model_specs import SPECS
from m0_basics.tools.analysis.roofline import HARDWARE
from m0_basics.tools.documents.factbook import Fact

H100 = HARDWARE["H100-SXM"]
LLAMA_8B = SPECS["Llama-3.1-8B"]
# Llama-3.1-70B by its published configuration.
LLAMA_70B = replace(LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
MODELS = {"smollm2": SPECS["SmolLM2-135M"], "qwen3_06b": SPECS["Qwen3-0.6B"], "llama_8b": LLAMA_8B,
          "llama_70b": LLAMA_70B}
GROUPS = {"smollm2": 64, "qwen3_06b": 128, "llama_8b": 128, "llama_70b": 128}
# Qwen3-30B-A3B by its published configuration: in each of 48 layers 8 of 128 experts of width 768 run for a token.
MOE_LAYERS, MOE_HIDDEN, MOE_EXPERTS, MOE_ACTIVE, MOE_WIDTH, MOE_VOCAB = 48, 2048, 128, 8, 768, 151936
MOE_ATTENTION = MOE_HIDDEN * 128 * (32 + 2 * 4 + 32)        # q, k and v, o: 32 query heads, 4 of keys, of 128
USABLE = 0.9                                                # share of a device's memory that an engine takes


def disk_bits(bits: int, group_size: int) -> float:
    """Bits per weight in a GPTQ folder: codes, and for each group a 16-bit scale and a zero point of `bits` bits."""
    return bits + (16 + bits) / group_size


def formats() -> dict[str, Fact]:
    """Bits per weight, everything counted but what a whole row shares."""
    facts = {f"bits.{bits}.{group}": Fact(disk_bits(bits, group), "bit")
             for bits, group in ((2, 64), (3, 64), (4, 32), (4, 64), (4, 128), (4, 192), (8, 64))}
    facts |= {f"bits.{name.lower()}": Fact(bits_per_weight(name), "bit")
              for name in ("Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0")}
    return facts | {
        "bits.symmetric.4.128": Fact(4 + 16 / 128, "bit"),
        "bits.nf4": Fact(4 + 8 / 64 + 32 / (64 * 256), "bit"),      # QLoRA: 8-bit scales of 64, scaled again in 256s
        "bits.mxfp4": Fact(4 + 8 / 32, "bit"), "bits.nvfp4": Fact(4 + 8 / 16, "bit")}


def model_bytes(spec: ModelSpec, bits: float, output_too: bool) -> float:
    """Bytes with all linear layers of the decoder at `bits` bits per weight, norms and biases at 16.

    `output_too`: the output matrix as well; where it is tied, the embedding is that matrix.
    """
    count = calc.count_parameters(spec)
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    linear = spec.num_hidden_layers * (spec.hidden_size * (2 * q + 2 * kv) + count.mlp)
    if output_too:
        linear += spec.vocab_size * spec.hidden_size
    return linear * bits / 8 + 2 * (count.total - linear)


def memory() -> dict[str, Fact]:
    """Bytes of whole models, what is saved, and the tokens whose keys and values fit beside them."""
    facts: dict[str, Fact] = {}
    for name, spec in MODELS.items():
        full, bits = calc.weight_bytes(spec), disk_bits(4, GROUPS[name])
        layers, everything = model_bytes(spec, bits, False), model_bytes(spec, bits, True)
        facts |= {f"bytes.{name}.bf16": Fact(full, "B"), f"bytes.{name}.layers4": Fact(layers, "B"),
                  f"bytes.{name}.all4": Fact(everything, "B"),
                  f"saved.{name}.layers4": Fact(1 - layers / full, "ratio"),
                  f"saved.{name}.all4": Fact(1 - everything / full, "ratio"),
                  f"bytes.{name}.8bit": Fact(model_bytes(spec, 8, False), "B")}
    for name, size in (("llama_8b", 24e9), ("llama_70b", 80e9)):
        spec = MODELS[name]
        for kind in ("bf16", "layers4"):
            room = USABLE * size - float(facts[f"bytes.{name}.{kind}"].value)
            facts[f"plan.{name}.{kind}.tokens"] = Fact(max(0, int(room // calc.kv_bytes_per_token(spec))), "tokens")
        facts[f"plan.{name}.kv_token"] = Fact(calc.kv_bytes_per_token(spec), "B")
    return facts | experts()


def experts() -> dict[str, Fact]:
    """Qwen3-30B-A3B: all experts have to be there, few are read for one token."""
    expert, bits = 3 * MOE_HIDDEN * MOE_WIDTH, disk_bits(4, 128)
    shared = MOE_LAYERS * MOE_ATTENTION
    total, active = shared + MOE_LAYERS * MOE_EXPERTS * expert, shared + MOE_LAYERS * MOE_ACTIVE * expert
    both, router = 2 * MOE_VOCAB * MOE_HIDDEN, MOE_LAYERS * MOE_HIDDEN * MOE_EXPERTS
    return {"moe.bytes.bf16": Fact(2 * (total + both + router), "B"),
            "moe.bytes.4": Fact(total * bits / 8 + 2 * (both + router), "B"),
            "moe.token.bf16": Fact(2 * (active + both / 2 + router), "B"),
            "moe.token.4": Fact(active * bits / 8 + 2 * (both / 2 + router), "B"),
            "moe.all_seen": Fact(1 - (1 - MOE_ACTIVE / MOE_EXPERTS) ** 64, "ratio")}


def speed() -> dict[str, Fact]:
    """An H100's roofline for the linear layers of a step of so many rows: 16 bits, 4-bit weights, 8 bits both."""
    peak, peak8, bandwidth = H100.peak("bfloat16"), H100.peak("float8"), H100.bytes_per_second
    four = disk_bits(4, 128) / 8

    def seconds(rows: int, weight: float, flops: float) -> float:
        return max(weight / bandwidth, 2 * rows / flops)            # of one weight

    facts = {"rows.h100.bf16": Fact(peak / bandwidth, "rows"), "rows.h100.4": Fact(four * peak / bandwidth / 2, "rows"),
             "rows.h100.8": Fact(peak8 / bandwidth / 2, "rows")}
    for rows in (1, 16, 64, 128, 256, 512):
        full = seconds(rows, 2, peak)
        facts[f"gain.h100.w4a16.{rows}"] = Fact(full / seconds(rows, four, peak), "ratio")
        facts[f"gain.h100.w8a8.{rows}"] = Fact(full / seconds(rows, 1, peak8), "ratio")
    embedding = 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size      # one of its rows is read
    for name in ("bf16", "layers4"):
        num_bytes = float(memory()[f"bytes.llama_8b.{name}"].value) - embedding
        facts[f"limit.h100.llama_8b.{name}"] = Fact(bandwidth / num_bytes, "tokens/s")
    return facts


def algorithm() -> dict[str, Fact]:
    """What GPTQ keeps and computes for Llama-3.1-8B: the largest Hessian, and a decoder layer's updates."""
    hidden, width = LLAMA_8B.hidden_size, LLAMA_8B.intermediate_size
    kv = LLAMA_8B.num_key_value_heads * LLAMA_8B.head_dim
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (width, hidden), (width, hidden),
              (hidden, width)]
    updates = LLAMA_8B.num_hidden_layers * sum(rows * columns ** 2 for rows, columns in shapes)
    tokens = 128 * 2048
    hessians = LLAMA_8B.num_hidden_layers * 2 * tokens * (3 * hidden ** 2 + width ** 2)     # qkv, o, gate-up; down
    return {"gptq.llama_8b.hessian_bytes": Fact(4 * width ** 2, "B"), "gptq.tokens": Fact(tokens, "tokens"),
            "gptq.llama_8b.update_flops": Fact(updates, "FLOP"), "gptq.llama_8b.hessian_flops": Fact(hessians, "FLOP")}


ARITHMETIC = {"formats": formats, "memory": memory, "speed": speed, "algorithm": algorithm}
