"""The model: Qwen3, Qwen2 and Llama as one decoder over a flat batch of tokens.

There is no batch dimension and no padding. All tokens of the step, of all sequences, form one `[T]` vector;
every layer but attention treats them alike, and attention is the backend's business.

T tokens in the step, R rows that need logits, H_q / H_kv query / key-value heads, D head size.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model_spec import ModelSpec

if TYPE_CHECKING:
    from .attention import AttentionBackend, AttentionMetadata


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the mean taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (RoFormer, equation 34) in the half-split layout of Hugging Face's weights."""

    def __init__(self, spec: ModelSpec, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse_frequencies(spec))
        angles = torch.cat((angles, angles), dim=-1)
        # The minus sign of the rotation is folded into the table, so that applying it takes two products.
        sign = torch.cat((-torch.ones(spec.head_dim // 2), torch.ones(spec.head_dim // 2)))
        table = torch.stack((angles.cos(), angles.sin() * sign)).unsqueeze(2)
        self.register_buffer("table", table.to(device, dtype), persistent=False)        # [2, max_len, 1, D]
        self.table: Tensor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] -> cosines and signed sines, each [T, 1, D], shared by all heads and layers."""
        cos, signed_sin = self.table.index_select(1, positions).unbind(0)
        return cos, signed_sin


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """theta ** (-2i / D) for i in [0, D/2), stretched as the model's rotary scaling asks; float32 [D / 2]."""
    inverse = 1.0 / spec.rope_theta ** (torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim)
    inverse /= spec.rope_linear_factor
    if spec.rope_factors is not None:
        return inverse / torch.tensor(spec.rope_factors)
    if (scaling := spec.rope_scaling) is None:
        return inverse
    # Long wavelengths are divided by `factor`, short ones are kept, those between are blended.
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_position_embeddings / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inverse / scaling.factor + blend * inverse


def apply_rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate each head of x [T, H, D] by its token's position."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * cos + swapped * signed_sin


class Attention(nn.Module):
    """Projections around the backend. q, k and v come from one product, so the weights are read once."""

    def __init__(self, spec: ModelSpec, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads, self.head_dim = (
            spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim)
        self.qkv_proj = nn.Linear(spec.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim,
                                  bias=spec.qkv_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, spec.hidden_size, bias=spec.o_bias)
        self.q_norm = RMSNorm(self.head_dim, spec.rms_norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, spec.rms_norm_eps) if spec.qk_norm else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], backend: AttentionBackend,
                metadata: AttentionMetadata) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        num_qk = self.num_heads + self.num_kv_heads
        qkv = self.qkv_proj(x).view(-1, num_qk + self.num_kv_heads, self.head_dim)
        qk, v = qkv[:, :num_qk], qkv[:, num_qk:]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :self.num_heads]), self.k_norm(qk[:, self.num_heads:])), dim=1)
        qk = apply_rotary(qk, *rotary)
        out = backend.forward(self.layer_idx, qk[:, :self.num_heads], qk[:, self.num_heads:], v, metadata)
        return self.o_proj(out.reshape(-1, self.num_heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(spec.hidden_size, 2 * spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: ModelSpec, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, layer_idx)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], backend: AttentionBackend,
                metadata: AttentionMetadata) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, backend, metadata)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    """Embedding, decoder layers, final norm, and the output matrix."""

    def __init__(self, spec: ModelSpec, max_model_len: int, dtype: torch.dtype, device: torch.device) -> None:
        """Weights stay on the meta device until a loader assigns them."""
        super().__init__()
        self.spec, self.max_model_len, self.dtype, self.device = spec, max_model_len, dtype, device
        with torch.device("meta"):
            # nn.Embedding(...) draws numbers, and to draw them on "meta" torch imports its whole compiler.
            self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(spec.vocab_size, spec.hidden_size))
            self.layers = nn.ModuleList(DecoderLayer(spec, i) for i in range(spec.num_hidden_layers))
            self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(spec, max_model_len, dtype, device)

    def forward(self, input_ids: Tensor, positions: Tensor, backend: AttentionBackend,
                metadata: AttentionMetadata) -> Tensor:
        """input_ids [T], positions [T] -> hidden states [T, hidden]."""
        x = self.embed_tokens(input_ids)
        rotary = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, rotary, backend, metadata)
        return self.norm(x)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] -> logits [R, vocab] in float32: only for the rows that are asked for."""
        return self.lm_head(hidden).float()
