"""What a model costs, from its shape alone: parameters, bytes, floating-point operations.

Everything an engine does is bounded by these few formulas, so they come before any engine. Each one says
which terms it counts and which it leaves out; tests hold the parameters and bytes equal to real tensors
and the operations equal to those that PyTorch's `FlopCounterMode` counts.

One multiplication and one addition are two FLOPs: a product [m, k] x [k, n] takes 2 m k n.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from m0_basics.config import check_int, reject
from m0_basics.model_spec import ModelSpec

Dtype = str | torch.dtype
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1}


def dtype_name(dtype: Dtype) -> str:
    """A key of `BYTES_PER_VALUE`. Raises ConfigError for any other format."""
    name = str(dtype).removeprefix("torch.")
    name = "float8" if name.startswith("float8") else name
    if name not in BYTES_PER_VALUE:
        raise reject("dtype", dtype, ", ".join(BYTES_PER_VALUE))
    return name


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by where they sit. `attention`, `mlp` and `norms` are those of one layer."""

    embedding: int
    attention: int              # q, k, v, o, their biases, and the norms of queries and keys
    mlp: int
    norms: int
    num_layers: int
    final_norm: int
    lm_head: int                # 0 where the embedding serves as the output matrix too

    @property
    def per_layer(self) -> int:
        return self.attention + self.mlp + self.norms

    @property
    def total(self) -> int:
        return self.embedding + self.num_layers * self.per_layer + self.final_norm + self.lm_head

    @property
    def non_embedding(self) -> int:
        """All but the embedding and the output matrix."""
        return self.total - self.embedding - self.lm_head


def count_parameters(spec: ModelSpec) -> ParameterCount:
    """Parameters of the model; a tied embedding is counted once."""
    q_size, kv_size = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    attention = spec.hidden_size * (q_size + 2 * kv_size) + q_size * spec.hidden_size
    attention += (q_size + 2 * kv_size) * spec.qkv_bias + spec.hidden_size * spec.o_bias
    attention += 2 * spec.head_dim * spec.qk_norm
    embedding = spec.vocab_size * spec.hidden_size
    return ParameterCount(
        embedding=embedding,
        attention=attention,
        mlp=3 * spec.hidden_size * spec.intermediate_size,
        norms=2 * spec.hidden_size,
        num_layers=spec.num_hidden_layers,
        final_norm=spec.hidden_size,
        lm_head=0 if spec.tie_word_embeddings else embedding,
    )


def weight_bytes(spec: ModelSpec, dtype: Dtype = "bfloat16") -> int:
    """Bytes of all weights in one format."""
    return count_parameters(spec).total * BYTES_PER_VALUE[dtype_name(dtype)]


def kv_bytes_per_token(spec: ModelSpec, dtype: Dtype = "bfloat16") -> int:
    """2 (key and value) x layers x H_kv x D x bytes per value."""
    values = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim
    return values * BYTES_PER_VALUE[dtype_name(dtype)]


def kv_bytes_per_token_by_hidden_size(spec: ModelSpec, dtype: Dtype = "bfloat16") -> int:
    """The formula often quoted, 2 x layers x hidden_size x bytes. **Wrong** wherever H_kv x D != hidden_size.

    It holds for multi-head attention only, and overstates grouped-query attention by about H_q / H_kv.
    It is here to be compared with.
    """
    return 2 * spec.num_hidden_layers * spec.hidden_size * BYTES_PER_VALUE[dtype_name(dtype)]


def kv_bytes(spec: ModelSpec, num_tokens: int, batch: int = 1, dtype: Dtype = "bfloat16") -> int:
    """Bytes of the keys and values of `batch` sequences of `num_tokens` tokens each."""
    return batch * num_tokens * kv_bytes_per_token(spec, dtype)


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step: it runs `num_tokens` tokens and is `seq_len` tokens long afterwards.

    A prefill is Work(n, n), a decode step Work(1, n), a chunk in the middle anything between.
    """

    num_tokens: int
    seq_len: int

    def __post_init__(self) -> None:
        check_int("num_tokens", self.num_tokens, 1)
        check_int("seq_len", self.seq_len, self.num_tokens)

    def attended(self, causal: bool) -> int:
        """Query-key pairs: the full rectangle, or only those in which the key is not younger than the query."""
        rectangle = self.num_tokens * self.seq_len
        return rectangle - self.num_tokens * (self.num_tokens - 1) // 2 if causal else rectangle


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by where they are spent."""

    projections: int            # q, k, v and o
    attention: int              # q k^T, and its product with v
    mlp: int
    lm_head: int

    @property
    def total(self) -> int:
        return self.projections + self.attention + self.mlp + self.lm_head

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.projections + other.projections, self.attention + other.attention, self.mlp + other.mlp,
                     self.lm_head + other.lm_head)


def step_flops(spec: ModelSpec, works: Sequence[Work], causal: bool = False, num_logits: int | None = None) -> Flops:
    """FLOPs of one step over all layers, for T tokens and R rows of logits (default: one per sequence).

        projections  2 T hidden (H_q + 2 H_kv) D  +  2 T H_q D hidden
        attention    4 H_q D x (query-key pairs): one product with the keys, one with the values
        mlp          2 T x 3 hidden intermediate
        lm_head      2 R hidden vocab

    With `causal=False` a prefill's pairs are the full square n x n: what a dense product computes and what
    FlopCounterMode counts, the mask notwithstanding. `causal=True` counts the pairs that matter,
    n (n + 1) / 2: what a kernel that skips masked tiles comes close to.
    Left out: norms, rotary, softmax, activation, biases, the embedding's look-up: a few operations per value, or
    per pair and head, beside the 2 hidden or 4 D that a product spends on it.
    """
    tokens, layers = sum(w.num_tokens for w in works), spec.num_hidden_layers
    q_size, kv_size = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    rows = len(works) if num_logits is None else num_logits
    return Flops(
        projections=layers * 2 * tokens * spec.hidden_size * (2 * q_size + 2 * kv_size),
        attention=layers * 4 * q_size * sum(w.attended(causal) for w in works),
        mlp=layers * 2 * tokens * 3 * spec.hidden_size * spec.intermediate_size,
        lm_head=2 * rows * spec.hidden_size * spec.vocab_size,
    )


def prefill_flops(spec: ModelSpec, num_tokens: int, batch: int = 1, causal: bool = False) -> Flops:
    """FLOPs of running `batch` prompts of `num_tokens` tokens, with logits for the last token of each."""
    return step_flops(spec, [Work(num_tokens, num_tokens)] * batch, causal)


def decode_flops(spec: ModelSpec, context: int, batch: int = 1) -> Flops:
    """FLOPs of one cached decode step; each new token attends to `context` tokens, itself included."""
    return step_flops(spec, [Work(1, context)] * batch)


def generate_flops(spec: ModelSpec, prompt_len: int, output_len: int, kv_cache: bool, batch: int = 1,
                   causal: bool = False) -> Flops:
    """FLOPs of `batch` prompts of `prompt_len` tokens and `output_len` new ones each, in output_len steps.

    Cached: one prefill, then steps over one token; without a cache every step is a prefill of all tokens so
    far. The last token is sampled and never run.
    """
    check_int("output_len", output_len, 1)
    lengths = range(prompt_len, prompt_len + output_len)
    return _sum(step_flops(spec, [Work(1 if kv_cache and n > prompt_len else n, n)] * batch, causal) for n in lengths)


def _sum(parts: Iterable[Flops]) -> Flops:
    return sum(parts, Flops(0, 0, 0, 0))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step has to move between memory and the processor."""

    weights: int
    kv_read: int
    kv_write: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_read + self.kv_write


def step_bytes(spec: ModelSpec, works: Sequence[Work], dtype: Dtype = "bfloat16", kv_dtype: Dtype | None = None,
               kv_cache: bool = True) -> Traffic:
    """Bytes of one step at the least.

        weights   all of them once, whatever the batch; of the embedding table only the T rows looked up
                  (a tied table is read whole as well, as the output matrix)
        kv_read   the keys and values of each sequence's `seq_len` tokens, once
        kv_write  those of the tokens that the step runs

    Left out: activations, scores and logits (they stay in caches or on the chip as long as T is small), and
    reading weights or keys again tile by tile. Without a cache (`kv_cache=False`) keys and values are activations.
    """
    size = BYTES_PER_VALUE[dtype_name(dtype)]
    parameters, tokens = count_parameters(spec), sum(w.num_tokens for w in works)
    matrices = parameters.total - (0 if spec.tie_word_embeddings else parameters.embedding)
    per_token = kv_bytes_per_token(spec, kv_dtype or dtype) if kv_cache else 0
    return Traffic(
        weights=(matrices + tokens * spec.hidden_size) * size,
        kv_read=sum(w.seq_len for w in works) * per_token,
        kv_write=tokens * per_token,
    )


def prefill_bytes(spec: ModelSpec, num_tokens: int, batch: int = 1, dtype: Dtype = "bfloat16") -> Traffic:
    """Bytes of prefilling `batch` prompts of `num_tokens` tokens in one step."""
    return step_bytes(spec, [Work(num_tokens, num_tokens)] * batch, dtype)


def decode_bytes(spec: ModelSpec, context: int, batch: int = 1, dtype: Dtype = "bfloat16") -> Traffic:
    """Bytes of one cached decode step of `batch` sequences of `context` tokens."""
    return step_bytes(spec, [Work(1, context)] * batch, dtype)


def arithmetic_intensity(flops: Flops, traffic: Traffic) -> float:
    """FLOPs per byte moved."""
    return flops.total / traffic.total
