"""F0.10: logits equal transformers', for each family and variant; a packed batch equals each sequence alone."""
from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from m0_basics.attention import ScheduledSequence
from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model import RMSNorm, inverse_frequencies
from m0_basics.model_runner import top_logprobs
from m0_basics.model_spec import FAMILIES, ModelSpec
from m0_basics.tools.testing.parity import (
    all_logits,
    make_runner,
    mixed_length_prompts,
    reference_logits,
    reference_model,
    schedule,
)
from m0_basics.tools.testing.tiny_models import FAMILIES_UNDER_TEST, VOCAB_SIZE

PROMPTS = mixed_length_prompts(VOCAB_SIZE, 5, seed=3, longest=150)


def test_every_family_is_under_test():
    tested = {tiny.family for tiny in FAMILIES_UNDER_TEST.values()}
    assert tested == {family.gguf_architecture for family in FAMILIES.values()}


@pytest.mark.parametrize("variant", FAMILIES_UNDER_TEST)
def test_logits_equal_transformers(variant, tiny_model):
    """F0.10: at every position of 150 tokens, which is beyond the original length of the stretched rotary table."""
    folder = tiny_model(variant)
    logits = all_logits(make_runner(folder), PROMPTS)
    for prompt, ours in zip(PROMPTS, logits, strict=True):
        reference = reference_logits(folder, prompt)
        assert ours.shape == reference.shape == (len(prompt), VOCAB_SIZE)
        assert reference.std() > 1, "logits that are all alike would prove nothing"
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", FAMILIES_UNDER_TEST)
def test_rotary_frequencies_equal_transformers(variant, tiny_model):
    folder = tiny_model(variant)
    spec = load_model(ModelConfig(str(folder), dtype="float32")).spec
    torch.testing.assert_close(inverse_frequencies(spec), reference_model(folder).model.rotary_emb.inv_freq)


def test_the_norm_takes_its_mean_in_float32():
    """300 ** 2 is beyond float16: in that precision the mean would be infinite and every output zero."""
    norm = RMSNorm(4, eps=1e-6)
    norm.weight.data = torch.tensor([1.0, 1.0, 2.0, 0.5], dtype=torch.float16)
    out = norm(torch.tensor([300.0, -300.0, 300.0, 300.0], dtype=torch.float16))
    assert out.dtype is torch.float16
    assert out.tolist() == [1.0, -1.0, 2.0, 0.5]


def test_llama3_scaling_changes_the_frequencies(tiny_model):
    spec = load_model(ModelConfig(str(tiny_model("llama3_rope")), dtype="float32")).spec
    stretched, plain = inverse_frequencies(spec), inverse_frequencies(dataclasses.replace(spec, rope_scaling=None))
    ratio = plain / stretched
    assert ratio[0] == 1, "short wavelengths are kept"
    assert ratio[-1] == 4, "long ones are divided by the factor"
    assert 1 < ratio[2] < 4, "those between are blended"
    factors = dataclasses.replace(spec, rope_scaling=None, rope_factors=tuple(ratio.tolist()))
    torch.testing.assert_close(inverse_frequencies(factors), stretched)


@pytest.mark.parametrize("variant", ["qwen3", "qwen2", "llama"])
def test_a_packed_batch_equals_each_sequence_alone(variant, tiny_model):
    """F0.10"""
    runner = make_runner(tiny_model(variant))
    together = all_logits(runner, PROMPTS)
    for prompt, packed in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(packed, all_logits(runner, [prompt])[0], rtol=1e-5, atol=1e-5)


def test_the_runner_returns_the_rows_of_the_newest_tokens(tiny_model):
    folder = tiny_model("qwen3")
    runner = make_runner(folder)
    scheduled = schedule(PROMPTS)
    # It does not reach its newest token.
    scheduled[1] = ScheduledSequence(scheduled[1].sequence, 0, len(PROMPTS[1]) - 1)
    logits = runner.execute_model(scheduled)
    expected = [reference_logits(folder, p)[-1] for i, p in enumerate(PROMPTS) if i != 1]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["qwen3", "qwen2", "llama3_rope"])
def test_bfloat16_is_as_good_as_transformers(variant, tiny_model):
    """In 16 bits nobody is exact: ours may not be farther from the float32 logits than transformers' are."""
    folder = tiny_model(variant)
    runner = make_runner(folder, "bfloat16")
    exact = torch.cat([reference_logits(folder, p) for p in PROMPTS])
    ours = torch.cat(all_logits(runner, PROMPTS))
    theirs = torch.cat([reference_logits(folder, p, torch.bfloat16) for p in PROMPTS])
    assert ours.dtype == torch.float32
    assert (ours - exact).square().mean().sqrt() < 1.2 * (theirs - exact).square().mean().sqrt()


def test_top_logprobs():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    chosen = [0, 7, 7, 49, 20, int(logits[5].argmax())]
    expected = logits.double().log_softmax(-1)
    ks = [0, 1, 4, 2, 50, 60]           # each row its own, the last one more than there are
    for row, token, k, entry in zip(expected, chosen, ks, top_logprobs(logits, chosen, ks), strict=True):
        assert set(entry) == {*row.topk(min(k, 50)).indices.tolist(), token}
        for token_id, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[token_id].item(), abs=1e-5)
            assert logprob.rank == int((row > row[token_id]).sum()) + 1


def test_prompt_logprobs_in_pieces(tiny_model):
    """300 tokens, more than the runner looks at in one go."""
    folder = tiny_model("llama")
    prompt = [token for p in mixed_length_prompts(VOCAB_SIZE, 4, seed=5, longest=160) for token in p][:300]
    scheduled = schedule([prompt], prompt_logprobs=2)
    make_runner(folder).execute_model(scheduled)
    entries = scheduled[0].sequence.prompt_logprobs
    expected = reference_logits(folder, prompt).log_softmax(-1)
    assert entries[0] is None
    assert len(entries) == 300
    for row, token, entry in zip(expected, prompt[1:], entries[1:], strict=False):
        assert {*row.topk(2).indices.tolist(), token} == set(entry)
        assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-3)


CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
          "num_hidden_layers": 2, "num_attention_heads": 4}


def test_a_spec_from_a_bare_config():
    spec = ModelSpec.from_hf_config(CONFIG)
    assert (spec.num_key_value_heads, spec.head_dim) == (4, 4)
    assert (spec.rope_theta, spec.tie_word_embeddings) == (10000.0, False)


@pytest.mark.parametrize("config", [
    {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,       # transformers 4
                                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,           # 5
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}])
def test_both_ways_to_write_rotary_settings(config):
    spec = ModelSpec.from_hf_config(CONFIG | config)
    assert spec.rope_theta == 5e5
    assert dataclasses.astuple(spec.rope_scaling) == (8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("rope", [
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"rope_scaling": {"type": "linear", "factor": 4}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_theta": 700.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
     "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 700.0, "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                                           "high_freq_factor": 4.0}, "max_position_embeddings": 64},
    {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
     "original_max_position_embeddings": 32, "max_position_embeddings": 128}])
def test_rotary_frequencies_of_any_configuration(rope):
    """As transformers reads it, whichever of the two names it stands under, or both."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    config = CONFIG | {"head_dim": 16} | rope
    theirs = LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(config))).inv_freq
    torch.testing.assert_close(inverse_frequencies(ModelSpec.from_hf_config(config)), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("change", "message"), [
    ({"architectures": ["GPT2LMHeadModel"]},
     "architecture GPT2LMHeadModel is not supported; allowed: Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM"),
    ({"architectures": None}, r"architecture \(none\) is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; allowed: silu"),
    ({"mlp_bias": True}, "mlp_bias=True of LlamaForCausalLM is not supported; allowed: false"),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "use_sliding_window=True"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported; allowed: default"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic' is not supported; allowed: default, l"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling of rope_type='linear' lacks factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling\.factor=0 is not valid; allowed: a number"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3' lacks low_freq_factor"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
     r"rope_parameters\.high_freq_factor=4.0 is not valid; allowed: more than low_freq_factor"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "of its own for full_attention is not supported"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported; allowed: 1.0"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' is not valid; allowed: an object"),
    ({"rope_theta": "x"}, "rope_theta='x' is not valid; allowed: a number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not valid; allowed: a number above 0"),
    ({"vocab_size": -3}, "vocab_size=-3 is not valid; allowed: an integer from 1 to"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 is not valid; allowed: an integer"),
    ({"num_key_value_heads": [2, 2]}, r"num_key_value_heads=\[2, 2\] is not valid; allowed: an integer"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 is not valid; allowed: a divisor of num_attention_heads=4"),
    ({"head_dim": 7}, "head_dim=7 is not valid; allowed: an even number"),
    ({"num_attention_heads": 32}, "head_dim=0 is not valid; allowed: an integer from 1 to"),
    ({"max_position_embeddings": 10 ** 12}, "max_position_embeddings=1000000000000 is not valid"),
])
def test_what_the_model_cannot_run_is_refused(change, message):
    """F0.9"""
    with pytest.raises(ConfigError, match=message):
        ModelSpec.from_hf_config(CONFIG | change)


def test_a_config_without_a_size_is_refused():
    config = {key: value for key, value in CONFIG.items() if key not in ("hidden_size", "vocab_size")}
    with pytest.raises(ConfigError, match=r"config\.json lacks vocab_size, hidden_size"):
        ModelSpec.from_hf_config(config)
