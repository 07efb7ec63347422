"""The calculators against real tensors and against PyTorch's own count of operations (F0.12)."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m0_basics.attention import FullAttention, ScheduledSequence
from m0_basics.config import DEFAULT_MODEL, ConfigError
from m0_basics.loading.loader import load_spec, resolve_model
from m0_basics.model import CausalLM
from m0_basics.model_runner import ModelRunner
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence, SequenceData
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.analysis.calculators import (
    Flops,
    Work,
    arithmetic_intensity,
    count_parameters,
    decode_bytes,
    decode_flops,
    dtype_name,
    generate_flops,
    kv_bytes,
    kv_bytes_per_token,
    kv_bytes_per_token_by_hidden_size,
    prefill_bytes,
    prefill_flops,
    step_bytes,
    step_flops,
    weight_bytes,
)
from m0_basics.tools.analysis.flop_count import count_flops
from m0_basics.tools.analysis.model_specs import SPECS

# No two sizes are equal, and head_dim is not hidden_size / heads: a formula that mixes them up is found out.
SIZES = {"vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
FAMILIES = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "qwen3 with biases": {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama with biases": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "tie_word_embeddings": True},
}


def tiny_spec(family: str) -> ModelSpec:
    return ModelSpec.from_hf_config(SIZES | FAMILIES[family])


def tiny_model(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Random weights in every parameter; the output matrix is the embedding where the model ties them."""
    model = CausalLM(spec, 64, dtype, torch.device("cpu"))
    weights = {name: torch.randn(p.shape, dtype=dtype) / 8 for name, p in model.named_parameters()}
    if spec.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def scheduled(*lengths: int) -> list[ScheduledSequence]:
    params = SamplingParams(temperature=0)
    return [ScheduledSequence.rest(Sequence(i, SequenceData(list(range(n))), params, 0)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_bytes_equal_the_tensors(family: str, dtype: torch.dtype) -> None:
    """F0.12: predicted bytes equal the tensors' nbytes, a shared tensor counted once."""
    spec = tiny_spec(family)
    model = tiny_model(spec, dtype)
    tensors = {p.data_ptr(): p for p in model.parameters()}
    assert weight_bytes(spec, dtype) == sum(p.nbytes for p in tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_of_the_parameter_count(family: str) -> None:
    """F0.12: the breakdown, part by part."""
    spec, model = tiny_spec(family), tiny_model(tiny_spec(family))
    layer = model.layers[0]

    def numel(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    count = count_parameters(spec)
    assert count.embedding == numel(model.embed_tokens)
    assert count.attention == numel(layer.self_attn)
    assert count.mlp == numel(layer.mlp)
    assert count.norms == numel(layer.input_layernorm) + numel(layer.post_attention_layernorm)
    assert count.final_norm == numel(model.norm)
    assert count.lm_head == (0 if spec.tie_word_embeddings else numel(model.lm_head))
    assert count.non_embedding == numel(model.layers) + numel(model.norm)


@pytest.mark.parametrize(("name", "parameters"), [
    ("SmolLM2-135M", 134_515_008), ("Qwen3-0.6B", 596_049_920), ("Qwen3-8B", 8_190_735_360),
    ("Llama-3.1-8B", 8_030_261_248), ("Llama-2-13B", 13_015_864_320)])
def test_published_parameter_counts(name: str, parameters: int) -> None:
    """The counts that the Hub states for these checkpoints."""
    assert count_parameters(SPECS[name]).total == parameters


@pytest.mark.real_model
def test_our_spec_of_the_default_model_is_its_files() -> None:
    real, ours = load_spec(resolve_model(DEFAULT_MODEL, torch.bfloat16)), SPECS["SmolLM2-135M"]
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "tie_word_embeddings"):
        assert getattr(real, field) == getattr(ours, field), field
    assert real.rms_norm_eps == pytest.approx(ours.rms_norm_eps)
    assert weight_bytes(real) == weight_bytes(ours)


def test_kv_bytes_equal_the_tensors() -> None:
    """F0.12: a cache of real tensors, one key and one value per layer, head and token."""
    spec = tiny_spec("qwen3")
    tokens, batch = 11, 3
    cache = [torch.empty(batch, tokens, spec.num_key_value_heads, spec.head_dim, dtype=torch.bfloat16)
             for _ in range(spec.num_hidden_layers) for _ in ("key", "value")]
    assert kv_bytes(spec, tokens, batch) == sum(t.nbytes for t in cache)
    assert kv_bytes(spec, tokens, batch, "float32") == 2 * kv_bytes(spec, tokens, batch, torch.float16)


def test_kv_bytes_right_and_wrong() -> None:
    """The formula with hidden_size overstates grouped-query attention, or agrees by coincidence."""
    smollm2, qwen3, llama2 = SPECS["SmolLM2-135M"], SPECS["Qwen3-0.6B"], SPECS["Llama-2-13B"]
    assert (kv_bytes_per_token(smollm2), kv_bytes_per_token_by_hidden_size(smollm2)) == (23_040, 69_120)
    assert kv_bytes_per_token(qwen3) == kv_bytes_per_token_by_hidden_size(qwen3) == 114_688
    assert kv_bytes(llama2, 2048, dtype="float16") == 1_677_721_600


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(1,), (2,), (17,), (64,), (5, 1, 30)])
def test_predicted_flops_are_those_counted(family: str, lengths: tuple[int, ...]) -> None:
    """F0.12: predicted FLOPs equal those counted by torch.utils.flop_counter, exactly."""
    spec = tiny_spec(family)
    runner = ModelRunner(tiny_model(spec), FullAttention())
    counted = count_flops(lambda: runner.execute_model(scheduled(*lengths)))
    assert step_flops(spec, [Work(n, n) for n in lengths]).total == counted > 0
    if len(lengths) == 1:
        assert prefill_flops(spec, lengths[0]).total == counted


def test_flops_of_bfloat16_are_counted_alike() -> None:
    """F0.12: the format changes the kernels, not the count."""
    spec = tiny_spec("llama")
    runner = ModelRunner(tiny_model(spec, torch.bfloat16), FullAttention())
    assert count_flops(lambda: runner.execute_model(scheduled(9))) == prefill_flops(spec, 9).total


def test_flops_of_generating_without_a_cache_are_those_counted() -> None:
    """F0.12: every step runs all tokens so far."""
    spec = tiny_spec("qwen3")
    runner = ModelRunner(tiny_model(spec), FullAttention())
    [work] = scheduled(6)
    counted = 0
    for _ in range(5):
        again = [ScheduledSequence.rest(work.sequence)]
        counted += count_flops(lambda step=again: runner.execute_model(step))
        work.sequence.append_token_id(1)
    assert generate_flops(spec, 6, 5, kv_cache=False).total == counted


@pytest.mark.parametrize("context", [1, 7, 50])
def test_attention_of_a_cached_decode_step_is_counted(context: int) -> None:
    """F0.12: one query per head, the query heads of a group side by side, against the cached keys and values."""
    spec = tiny_spec("llama")
    group = spec.num_attention_heads // spec.num_key_value_heads
    q = torch.randn(spec.num_key_value_heads, group, spec.head_dim)
    k = torch.randn(spec.num_key_value_heads, context, spec.head_dim)
    counted = count_flops(lambda: F.scaled_dot_product_attention(q, k, k))
    decode = decode_flops(spec, context)
    assert decode.attention == spec.num_hidden_layers * counted
    one = prefill_flops(spec, 1)
    assert (decode.projections, decode.mlp, decode.lm_head) == (one.projections, one.mlp, one.lm_head)


@pytest.mark.parametrize(("num_tokens", "seq_len"), [(1, 1), (1, 9), (9, 9), (4, 10)])
def test_causal_pairs(num_tokens: int, seq_len: int) -> None:
    """Counted on a mask: query i of the chunk sits at position seq_len - num_tokens + i."""
    positions = torch.arange(seq_len - num_tokens, seq_len)
    mask = torch.arange(seq_len) <= positions[:, None]
    assert Work(num_tokens, seq_len).attended(causal=True) == int(mask.sum())
    assert Work(num_tokens, seq_len).attended(causal=False) == mask.numel()


def test_chunks_of_a_prefill_add_up() -> None:
    """Causal pairs do not depend on how a prompt is cut; only the last chunk needs logits."""
    spec = tiny_spec("qwen2")
    chunks = [Work(4, 4), Work(4, 8), Work(3, 11)]
    parts = [step_flops(spec, [w], causal=True, num_logits=int(w.seq_len == 11)) for w in chunks]
    assert parts[0] + parts[1] + parts[2] == prefill_flops(spec, 11, causal=True)


def test_generation_with_a_cache() -> None:
    """One prefill and steps over one token: the last token sampled is never run."""
    spec = tiny_spec("llama")
    by_hand = prefill_flops(spec, 10) + decode_flops(spec, 11) + decode_flops(spec, 12)
    assert generate_flops(spec, 10, 3, kv_cache=True) == by_hand
    assert generate_flops(spec, 10, 1, kv_cache=True) == generate_flops(spec, 10, 1, kv_cache=False)
    assert generate_flops(spec, 10, 3, kv_cache=True, batch=4).total == 4 * by_hand.total
    assert by_hand.total < generate_flops(spec, 10, 3, kv_cache=False).total


def test_cache_turns_the_cost_of_a_token_from_square_to_linear() -> None:
    """Attention of one more token at 2n against n: twice with a cache, four times without."""
    spec = SPECS["Qwen3-0.6B"]
    assert decode_flops(spec, 2000).attention == 2 * decode_flops(spec, 1000).attention
    assert prefill_flops(spec, 2000).attention == 4 * prefill_flops(spec, 1000).attention


def test_bytes_moved() -> None:
    """Weights once, whatever the batch; keys and values once for each sequence; an untied table by rows only."""
    tied, untied = tiny_spec("qwen3"), tiny_spec("llama")
    row = tied.hidden_size * 2
    one, four = decode_bytes(tied, 20), decode_bytes(tied, 20, batch=4)
    assert one.weights == weight_bytes(tied) + row
    assert four.weights - one.weights == 3 * row
    assert (one.kv_read, one.kv_write) == (20 * kv_bytes_per_token(tied), kv_bytes_per_token(tied))
    assert four.kv_read == 4 * one.kv_read
    table = untied.vocab_size * untied.hidden_size * 2
    assert decode_bytes(untied, 20).weights == weight_bytes(untied) - table + row
    assert prefill_bytes(tied, 20).kv_write == prefill_bytes(tied, 20).kv_read == one.kv_read
    assert step_bytes(tied, [Work(20, 20)], kv_cache=False).total == prefill_bytes(tied, 20).weights
    assert step_bytes(tied, [Work(1, 20)], kv_dtype="int8").kv_read * 2 == one.kv_read


def test_intensity_of_decode_is_about_one_flop_per_byte_and_grows_with_the_batch() -> None:
    spec = SPECS["SmolLM2-135M"]
    alone, batch = (arithmetic_intensity(decode_flops(spec, 1, b), decode_bytes(spec, 1, b)) for b in (1, 64))
    assert alone == pytest.approx(1.0, rel=0.01)        # 2 FLOPs for each 2-byte weight
    assert batch == pytest.approx(64, rel=0.02)
    assert arithmetic_intensity(Flops(1, 2, 3, 4), decode_bytes(spec, 1)) == 10 / decode_bytes(spec, 1).total


@pytest.mark.parametrize("dtype", ["float64", "auto", torch.int64])
def test_an_unknown_format_is_refused(dtype: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"dtype=.*allowed: float32, float16"):
        weight_bytes(SPECS["Qwen3-8B"], dtype)


def test_names_of_formats() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert dtype_name(torch.float8_e4m3fn) == "float8"


@pytest.mark.parametrize(("num_tokens", "seq_len", "field"), [(0, 5, "num_tokens"), (6, 5, "seq_len")])
def test_impossible_work_is_refused(num_tokens: int, seq_len: int, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Work(num_tokens, seq_len)
