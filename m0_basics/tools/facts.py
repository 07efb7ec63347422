"""Every number that milestone 0's documents may quote.

Names: `<model>.<quantity>`, `<hardware>.<quantity>`, `<model>.<hardware>.<quantity>`; measured ones are named by
their benchmark. Computed facts need no model and no GPU; all are bfloat16 unless the name says otherwise.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..benchmark import GROWTH_LENGTHS
from ..model_spec import ModelSpec
from .analysis import calculators as calc
from .analysis import cpu_roofline, format_facts, microbench, roofline
from .analysis.model_specs import SPECS
from .analysis.roofline import HARDWARE, Hardware
from .documents.factbook import Fact, Facts, Result, merge

LENGTHS = (512, 2048)
BATCHES = (1, 8, 32, 128, 256)
SLUGS = {       # how fact names begin
    "SmolLM2-135M": "smollm2", "Qwen3-0.6B": "qwen3_0_6b", "Qwen3-8B": "qwen3_8b", "Llama-3.1-8B": "llama3_1_8b",
    "Llama-2-13B": "llama2_13b", "A100-80GB-SXM": "a100", "H100-SXM": "h100", "H200-SXM": "h200",
    "RTX-4090": "rtx4090", "L4": "l4",
}


def model_facts(spec: ModelSpec) -> dict[str, Fact]:
    """Parameters, bytes and FLOPs that follow from a model's shape."""
    count = calc.count_parameters(spec)
    right, wrong = calc.kv_bytes_per_token(spec), calc.kv_bytes_per_token_by_hidden_size(spec)
    per_token = calc.decode_flops(spec, 1)
    facts = {
        "params": Fact(count.total),
        "params.embedding": Fact(count.embedding),
        "params.attention_per_layer": Fact(count.attention),
        "params.mlp_per_layer": Fact(count.mlp),
        "params.norms_per_layer": Fact(count.norms),
        "params.lm_head": Fact(count.lm_head),
        "params.non_embedding": Fact(count.non_embedding),
        "params.embedding_share": Fact((count.embedding + count.lm_head) / count.total, "ratio"),
        "params.mlp_share_of_layer": Fact(count.mlp / count.per_layer, "ratio"),
        "layers": Fact(spec.num_hidden_layers),
        "hidden_size": Fact(spec.hidden_size),
        "vocab_size": Fact(spec.vocab_size),
        "query_heads": Fact(spec.num_attention_heads),
        "kv_heads": Fact(spec.num_key_value_heads),
        "head_dim": Fact(spec.head_dim),
        "query_heads_per_kv_head": Fact(spec.num_attention_heads / spec.num_key_value_heads, "ratio"),
        "kv_bytes_per_token": Fact(right, "B"),
        "kv_bytes_per_token.float32": Fact(calc.kv_bytes_per_token(spec, "float32"), "B"),
        "kv_bytes_per_token_wrong": Fact(wrong, "B"),
        "kv_overstated": Fact(wrong / right, "ratio"),
        "kv_bytes.max_len": Fact(calc.kv_bytes(spec, spec.max_position_embeddings), "B"),
        "max_len": Fact(spec.max_position_embeddings),
        "flops_per_token": Fact(per_token.total, "FLOP"),
        "flops_per_token_over_params": Fact(per_token.total / count.total, "ratio"),
    }
    facts |= {f"weight_bytes.{dtype}": Fact(calc.weight_bytes(spec, dtype), "B")
              for dtype in ("float32", "bfloat16", "int8")}
    for n in LENGTHS:
        prefill, decode = calc.prefill_flops(spec, n, causal=True), calc.decode_flops(spec, n)
        square = calc.prefill_flops(spec, n)
        facts |= {
            f"kv_bytes.{n}": Fact(calc.kv_bytes(spec, n), "B"),
            f"prefill_flops.{n}": Fact(prefill.total, "FLOP"),
            f"prefill_flops_square.{n}": Fact(square.total, "FLOP"),
            f"prefill_attention_share.{n}": Fact(prefill.attention / prefill.total, "ratio"),
            f"prefill_attention_share_square.{n}": Fact(square.attention / square.total, "ratio"),
            f"prefill_intensity.{n}": Fact(
                calc.arithmetic_intensity(prefill, calc.prefill_bytes(spec, n)), "FLOP/byte"),
            f"decode_flops.{n}": Fact(decode.total, "FLOP"),
            f"decode_bytes.{n}": Fact(calc.decode_bytes(spec, n).total, "B"),
        }
        facts |= {f"decode_intensity.{n}.b{batch}": Fact(calc.arithmetic_intensity(
            calc.decode_flops(spec, n, batch), calc.decode_bytes(spec, n, batch)), "FLOP/byte") for batch in BATCHES}
    for prompt, output in ((128, 128), (512, 128), (1024, 256)):
        cached, naive = (calc.generate_flops(spec, prompt, output, kv_cache, causal=True).total
                         for kv_cache in (True, False))
        facts |= {f"generate_flops.{prompt}+{output}.cached": Fact(cached, "FLOP"),
                  f"generate_flops.{prompt}+{output}.uncached": Fact(naive, "FLOP"),
                  f"generate_flops.{prompt}+{output}.saved": Fact(naive / cached, "ratio")}
    return facts


def hardware_facts(hardware: Hardware) -> dict[str, Fact]:
    """Peaks as the vendor states them, and the ridge points that follow."""
    facts = {f"peak_tflops.{dtype}": Fact(peak / 1e12, "TFLOP/s") for dtype, peak in hardware.flops_per_second.items()}
    facts |= {f"ridge.{dtype}": Fact(hardware.ridge_point(dtype), "FLOP/byte") for dtype in hardware.flops_per_second}
    return facts | {"gb_per_second": Fact(hardware.bytes_per_second / 1e9, "GB/s"),
                    "memory_gb": Fact(hardware.memory_bytes / 1e9, "GB")}


def pair_facts(spec: ModelSpec, hardware: Hardware) -> dict[str, Fact]:
    """What the roofline says about one model on one processor."""
    context = roofline.memory_bound_context(spec, hardware)
    facts = {"memory_bound_context": Fact("none" if context is None else context)}
    for n in LENGTHS:
        batch = roofline.largest_useful_batch(spec, hardware, n)
        facts |= {f"largest_useful_batch.{n}": Fact("none" if batch is None else batch),
                  f"max_sequences.{n}": Fact(roofline.max_sequences(spec, hardware, n))}
    for row in roofline.roofline_table(spec, hardware, batch_sizes=(1, 32, 256)):
        name = f"{row.step}.{row.tokens}.b{row.batch}"
        facts |= {f"{name}.ms": Fact(row.bound.seconds * 1e3, "ms"), f"{name}.bound": Fact(row.bound.binds),
                  f"{name}.tokens_per_second": Fact(row.tokens_per_second, "tokens/s")}
    return facts


def prefixed(prefix: str, facts: Mapping[str, Fact]) -> dict[str, Fact]:
    """The same facts, their names begun with `prefix` and a dot."""
    return {f"{prefix}.{name}": fact for name, fact in facts.items()}


def all_models() -> dict[str, Fact]:
    return merge(*(prefixed(SLUGS[name], model_facts(spec)) for name, spec in SPECS.items()))


def all_hardware() -> dict[str, Fact]:
    return merge(*(prefixed(SLUGS[name], hardware_facts(hardware)) for name, hardware in HARDWARE.items()))


def all_pairs() -> dict[str, Fact]:
    return merge(*(prefixed(f"{SLUGS[model]}.{SLUGS[name]}", pair_facts(spec, hardware))
                   for model, spec in SPECS.items() for name, hardware in HARDWARE.items()))


def measure_this_cpu() -> dict[str, Fact]:
    """This CPU's ceilings, what they allow the default model, and what m0 attains of that."""
    cpu = cpu_roofline.measure_cpu()
    decode = cpu_roofline.matrix_vector_bandwidth()
    return merge(cpu_roofline.ceilings(cpu), {"cpu.matrix_vector_gb_per_second": Fact(decode / 1e9, "GB/s")},
                 prefixed("smollm2.cpu", pair_facts(SPECS["SmolLM2-135M"], cpu)), cpu_roofline.attained(cpu))


def bench_results() -> dict[str, Result]:
    """What the README quotes of `python -m m0_basics bench`."""
    facts = {f"bench.{key}": Result("bench.json", f"comparisons.0.workload.{key}")
             for key in ("num_prompt_tokens", "num_output_tokens")}
    for i, name in enumerate(("m0", "transformers-no-cache", "transformers")):
        path = f"comparisons.0.contenders.{i}"
        facts |= {f"bench.{name}.tokens_per_s": Result("bench.json", f"{path}.output_throughput", "1/s"),
                  f"bench.{name}.ratio": Result("bench.json", f"{path}.ratio", "ratio")}
    for i, length in enumerate(GROWTH_LENGTHS):
        path = f"measurements.growth.{i}"
        facts |= {f"bench.growth.{length}.s": Result("bench.json", f"{path}.seconds", "s"),
                  f"bench.growth.{length}.flops": Result("bench.json", f"{path}.flops", "FLOP"),
                  f"bench.growth.{length}.predicted": Result("bench.json", f"{path}.predicted_flops", "FLOP")}
    return facts


FACTS = Facts(Path(__file__).parents[1],
              computed={"models": all_models, "hardware": all_hardware, "roofline": all_pairs,
                        "dtypes": format_facts.number_formats, "gguf": format_facts.gguf_blocks,
                        "rotary": format_facts.rotary_frequencies, "tokens_run": format_facts.tokens_run},
              measured={"microbench": microbench.run_all, "cpu_roofline": measure_this_cpu},
              results=bench_results())
