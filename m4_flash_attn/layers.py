"""Fused decoder layers, put in the place of the model's own: the same weights, fewer trips to memory.

    m0       norm | qkv | rotate | store | attend | o | add | norm | gate, up | silu | mul | down | add
    here     norm | qkv | rotate + store, attend     | o | add + norm   | gate, up | silu x up  | down | add

The model's class does not change: its layers are modules, and a module can be exchanged.

T tokens in the step, H_q / H_kv query / key-value heads, D head size.
"""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from m0_basics.attention import AttentionBackend, AttentionMetadata
from m0_basics.model import CausalLM, DecoderLayer, RMSNorm, apply_rotary

from .elementwise import ElementwiseOps

Rotary = tuple[Tensor, Tensor]              # cosines and signed sines, [T, 1, D] each


class Stacked(NamedTuple):
    """What runs in the place of a model's layers, of the norm behind the last of them, and of its output matrix."""

    layers: list[nn.Module]
    norm: nn.Module
    head: nn.Module


@dataclass(frozen=True)
class LayerKernels:
    """What layers are made of on some machine."""

    ops: ElementwiseOps
    pack: Callable[[nn.Module], nn.Module]                              # a linear layer -> the one that runs
    gate: Callable[[nn.Module], nn.Module]                              # gate_up_proj -> silu(gate(x)) * up(x)
    head: Callable[[nn.Module], nn.Module]                              # the output matrix -> the one that runs
    stack: Callable[[list[FusedDecoderLayer], FusedRMSNorm, nn.Module], Stacked]        # layers, norm and head as one


class FusedAttention(AttentionBackend):
    """A backend that takes the product of the qkv projection as it is."""

    @abstractmethod
    def forward_qkv(self, layer_idx: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
                    rotary: Rotary, metadata: AttentionMetadata) -> Tensor:
        """qkv [T, (H_q + 2 H_kv) D] -> [T, H_q D]: norms q and k (where the model does), rotates, stores, attends.

        `qkv` may be overwritten.
        """


class FusedRMSNorm(nn.Module):
    """The model's norm, by one kernel."""

    def __init__(self, norm: RMSNorm, ops: ElementwiseOps) -> None:
        super().__init__()
        self.weight, self.eps, self.ops = norm.weight, norm.eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        return self.ops.add_rms_norm(x, None, self.weight, self.eps)


class GatedLinear(nn.Module):
    """silu(gate(x)) * up(x), by a product and an operation."""

    def __init__(self, gate_up_proj: nn.Module, ops: ElementwiseOps) -> None:
        super().__init__()
        self.gate_up_proj, self.ops = gate_up_proj, ops

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, intermediate]."""
        return self.ops.silu_mul(self.gate_up_proj(x))


class FusedDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x is changed in place."""

    def __init__(self, layer: DecoderLayer, parts: LayerKernels) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.ops, pack = parts.ops, parts.pack
        self.layer_idx, self.eps = attention.layer_idx, layer.input_layernorm.eps
        self.num_heads, self.num_kv_heads, self.head_dim = (
            attention.num_heads, attention.num_kv_heads, attention.head_dim)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.norms = (None if attention.q_norm is None or attention.k_norm is None
                      else (attention.q_norm.weight, attention.k_norm.weight))
        self.input_norm, self.post_attention_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv_proj, self.o_proj = pack(attention.qkv_proj), pack(attention.o_proj)
        self.gated, self.down_proj = parts.gate(mlp.gate_up_proj), pack(mlp.down_proj)

    def forward(self, x: Tensor, rotary: Rotary, backend: AttentionBackend, metadata: AttentionMetadata) -> Tensor:
        """x [T, hidden] -> the same tensor."""
        ops = self.ops
        qkv = self.qkv_proj(ops.add_rms_norm(x, None, self.input_norm, self.eps))
        attended = self.o_proj(self._attend(qkv, rotary, backend, metadata))
        activated = self.gated(ops.add_rms_norm(x, attended, self.post_attention_norm, self.eps))
        return x.add_(self.down_proj(activated))

    def _attend(self, qkv: Tensor, rotary: Rotary, backend: AttentionBackend, metadata: AttentionMetadata) -> Tensor:
        if isinstance(backend, FusedAttention):
            return backend.forward_qkv(self.layer_idx, qkv, self.norms, self.eps, rotary, metadata)
        heads = qkv.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = backend.forward(self.layer_idx, apply_rotary(q, *rotary), apply_rotary(k, *rotary), v, metadata)
        return out.reshape(-1, self.num_heads * self.head_dim)


def fuse(model: CausalLM, parts: LayerKernels) -> CausalLM:
    """Exchange the model's layers, its last norm and its output matrix; returns the same model."""
    layers = []
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer), "a model is fused once"
        layers.append(FusedDecoderLayer(layer, parts))
        model.layers[i] = nn.Identity()                 # so that the weights go as soon as they are packed
    modules, norm, head = parts.stack(layers, FusedRMSNorm(model.norm, parts.ops), parts.head(model.lm_head))
    model.layers, model.norm, model.lm_head = nn.ModuleList(modules), norm, head    # type: ignore[assignment]
    return model
