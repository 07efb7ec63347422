"""Shapes of well-known models, so that a calculation needs no download.

Values are those of each model's `config.json` on the Hugging Face Hub; the parameter counts that follow
from them equal the published ones, which a test checks.
"""
from __future__ import annotations

from m0_basics.loading.rope_config import Llama3RopeScaling
from m0_basics.model_spec import ModelSpec

SPECS: dict[str, ModelSpec] = {
    "SmolLM2-135M": ModelSpec(
        "LlamaForCausalLM", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_theta=100_000.0, tie_word_embeddings=True),
    "Qwen3-0.6B": ModelSpec(
        "Qwen3ForCausalLM", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rms_norm_eps=1e-6, rope_theta=1_000_000.0, tie_word_embeddings=True, qk_norm=True),
    "Qwen3-8B": ModelSpec(
        "Qwen3ForCausalLM", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rms_norm_eps=1e-6, rope_theta=1_000_000.0, tie_word_embeddings=False, qk_norm=True),
    "Llama-3.1-8B": ModelSpec(
        "LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_theta=500_000.0, tie_word_embeddings=False,
        rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192)),
    "Llama-2-13B": ModelSpec(
        "LlamaForCausalLM", vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40, head_dim=128, max_position_embeddings=4096,
        rms_norm_eps=1e-5, rope_theta=10_000.0, tie_word_embeddings=False),
}
