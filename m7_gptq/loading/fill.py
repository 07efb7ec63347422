"""A checkpoint's packed matrices in the model's linear layers; what is stored plain, the way milestone 0 does it.

    q, k, v    gate, up        stacked into one matrix, as m0 joins plain ones
    lm_head                    packed; where input and output matrix are one, the embedding looks rows up in it
    some parts packed, others not, or on grids that do not stack        dequantised, and joined as plain ones

N rows, K columns.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from m0_basics.config import ConfigError
from m0_basics.loading.files import LoadError
from m0_basics.loading.loader import load_model as load_plain_model
from m0_basics.loading.loader import new_model, resolve_device
from m0_basics.loading.weights import FillLinear, WeightSource, check_layers, fill_linear, load_weights, part_rows
from m0_basics.model import CausalLM
from m0_basics.model_spec import ModelSpec

from ..config import ModelConfig
from ..grid import QuantizedMatrix, can_stack, same_order, stack
from ..linear import QuantizedEmbedding, QuantizedLinear
from ..rtn import QuantizeOptions, round_to_nearest
from .checkpoint import read_bias
from .source import Checkpoint, ReadMatrix, dtype_of, find_checkpoint

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_ROWS = 4096                            # compared at once


def load_model(config: ModelConfig) -> CausalLM:
    """The model that `config` names, with its matrices packed or plain as `config.quantization` asks."""
    checkpoint, wanted = find_checkpoint(config), config.quantization
    if wanted in ("gptq", "gguf") and checkpoint.method != wanted:
        raise ConfigError(f"quantization={wanted!r} does not fit model={config.model!r}, whose weights are "
                          f"{'plain' if checkpoint.method == 'none' else checkpoint.method}; allowed: auto, "
                          f"{checkpoint.method}")
    if wanted == "rtn":
        return round_model(load_dequantised(config, checkpoint), config)
    if wanted == "none" or checkpoint.method == "none":
        return load_dequantised(config, checkpoint)
    return load_packed(config, checkpoint)


def load_dequantised(config: ModelConfig, checkpoint: Checkpoint) -> CausalLM:
    """The model with plain weights, whatever the files hold."""
    if checkpoint.method != "gptq":
        return load_plain_model(config)
    model = _empty_model(config, checkpoint)
    load_weights(model, Dequantised(checkpoint.source, checkpoint.read, model.spec))
    return model.eval()


def load_packed(config: ModelConfig, checkpoint: Checkpoint) -> CausalLM:
    """The model with matrices as they are packed in the checkpoint."""
    model, source = _empty_model(config, checkpoint), _Remaining(checkpoint.source)
    _fill_ends(model, source, checkpoint)
    load_weights(model, source, fill_packed(checkpoint.read))
    model.spec = checkpoint.spec
    return model.eval()


def _empty_model(config: ModelConfig, checkpoint: Checkpoint) -> CausalLM:
    check_layers(checkpoint.spec, checkpoint.source)
    return new_model(checkpoint.spec, config.max_model_len, dtype_of(config), resolve_device(config.device))


def fill_packed(read: ReadMatrix) -> FillLinear:
    """How m0's loader fills a linear layer: with a QuantizedLinear, where the checkpoint packs it."""
    def fill(linear: nn.Linear, parts: list[str], source: WeightSource, model: CausalLM) -> nn.Module:
        matrices = [read(source, part) for part in parts]
        if all(matrix is None for matrix in matrices):
            return fill_linear(linear, parts, source, model)
        sizes = part_rows(parts, linear.out_features, model.spec)
        for part, matrix, size in zip(parts, matrices, sizes, strict=True):
            if matrix is not None:
                _check(part, matrix.shape, (size, linear.in_features), source)
        biases = [read_bias(source, part, size, linear.bias is not None)
                  for part, size in zip(parts, sizes, strict=True)]
        if linear.bias is not None:
            linear.bias = _parameter(torch.cat([bias for bias in biases if bias is not None]), model)
        if (whole := join(matrices, parts, source)) is not None:
            return QuantizedLinear(on_device(whole, model.device), linear.bias, model.dtype)
        values = [_read_plain(part, (size, linear.in_features), source) if matrix is None else matrix.dequantise()
                  for part, matrix, size in zip(parts, matrices, sizes, strict=True)]
        linear.weight = _parameter(torch.cat([value.to(model.dtype) for value in values]), model)
        return linear

    return fill


def join(matrices: Sequence[QuantizedMatrix | None], parts: Sequence[str],
         source: WeightSource) -> QuantizedMatrix | None:
    """The parts of one layer as one matrix; None where some are plain, or their groups differ.

    Raises LoadError where their inputs are in different orders: whoever packed them so did not mean one layer.
    """
    packed = [matrix for matrix in matrices if matrix is not None]
    if len(packed) < len(matrices):
        return None
    if not all(same_order(matrix, packed[0]) for matrix in packed):
        raise LoadError(f"{source.location}: {', '.join(parts)} have their inputs in different orders (g_idx), and run "
                        "as one layer; allowed: the same g_idx for all of them, or quantization=none")
    if not can_stack(packed):                           # integer zero points beside minimums: all become minimums
        packed = [replace(m, zeros=None, minimums=m.offsets()) for m in packed]
    return stack(packed) if can_stack(packed) else None


def on_device(matrix: QuantizedMatrix, device: torch.device) -> QuantizedMatrix:
    """The matrix with its tensors on `device`."""
    def move(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    return replace(matrix, codes=matrix.codes.to(device), scales=matrix.scales.to(device), zeros=move(matrix.zeros),
                   minimums=move(matrix.minimums), order=move(matrix.order))


def _fill_ends(model: CausalLM, source: _Remaining, checkpoint: Checkpoint) -> None:
    """Embedding and output matrix where one of them is packed. Else m0's loader fills them, and ties them.

    A packed matrix that serves as both is held once.
    """
    tied, read = model.spec.tie_word_embeddings, checkpoint.read
    head, embedding = read(source, HEAD), read(source, EMBEDDING)
    if checkpoint.head_is_embedding and head is None:
        raise LoadError(f"{source.location} is marked as one whose packed output matrix is the embedding too, and "
                        f"lacks the tensor {HEAD}.qweight")
    if head is None and embedding is None:
        return
    expected = (model.spec.vocab_size, model.spec.hidden_size)
    for name, matrix in ((HEAD, head), (EMBEDDING, embedding)):
        if matrix is not None:
            _check(name, matrix.shape, expected, source)
            read_bias(source, name, expected[0], expected=False)
    stored = source.names()
    if checkpoint.head_is_embedding and head is not None and f"{EMBEDDING}.weight" in stored:
        _check_same(head, source)
        embedding = head
    elif embedding is None and tied and f"{EMBEDDING}.weight" not in stored:
        embedding = head
    if head is None and tied and f"{HEAD}.weight" not in stored:
        head = embedding
    held = {id(matrix): on_device(matrix, model.device) for matrix in (head, embedding) if matrix is not None}
    if head is not None:
        model.lm_head = QuantizedLinear(held[id(head)], None, model.dtype)      # type: ignore[assignment]
    if embedding is not None:
        model.embed_tokens = QuantizedEmbedding(held[id(embedding)], model.dtype)
    source.hide_what_was_read()
    model.spec = replace(model.spec, tie_word_embeddings=False)         # for m0's loader: what is left is not tied


def _check_same(head: QuantizedMatrix, source: WeightSource) -> None:
    """The embedding, stored for readers that do not look it up packed, holds the packed output matrix's values."""
    name = f"{EMBEDDING}.weight"
    stored = source.read(name)
    _check(name, tuple(stored.shape), head.shape, source)
    for first in range(0, len(stored), _ROWS):
        rows = stored[first:first + _ROWS]
        if not torch.equal(head.rows(first, first + _ROWS).dequantise().to(rows.dtype), rows):
            raise LoadError(f"{source.location} is marked as one whose packed output matrix is the embedding too, and "
                            f"the values of {name} are others; allowed: the same, or no tied_lm_head in its settings")


def round_model(model: CausalLM, config: ModelConfig, embedding: bool = True) -> CausalLM:
    """Every matrix of a plain model rounded to nearest; embedding and output matrix as one where they are one.

    Without `embedding` that stays as it is.
    """
    def rounded(weight: Tensor) -> QuantizedMatrix:
        size = group_size(weight.shape[1], config.quantization_group_size)
        return round_to_nearest(weight.float(), QuantizeOptions(config.quantization_bits, size, method="rtn"))

    tied = model.spec.tie_word_embeddings and embedding
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            matrix = rounded(module.weight)
            model.set_submodule(name, QuantizedLinear(matrix, module.bias, model.dtype))
            if name == HEAD and tied:
                model.embed_tokens = QuantizedEmbedding(matrix, model.dtype)
    return model


def group_size(width: int, most: int) -> int:
    """The largest number up to `most` that divides a row of `width` weights."""
    return next(size for size in range(min(most, width), 0, -1) if width % size == 0)


def _parameter(values: Tensor, model: CausalLM) -> nn.Parameter:
    return nn.Parameter(values.to(model.device, model.dtype), requires_grad=False)


def _read_plain(part: str, expected: tuple[int, int], source: WeightSource) -> Tensor:
    """The weight of a part that is not packed. Raises LoadError for another shape, or for whole numbers."""
    weight = source.read(f"{part}.weight")
    _check(f"{part}.weight", tuple(weight.shape), expected, source)
    if not weight.dtype.is_floating_point:
        raise LoadError(f"tensor {part}.weight of {source.location} is {str(weight.dtype).removeprefix('torch.')}; "
                        "allowed: float32, bfloat16, float16, float64")
    return weight


def _check(name: str, shape: tuple[int, ...], expected: tuple[int, ...], source: WeightSource) -> None:
    if shape != expected:
        raise LoadError(f"{source.location}: {name} has shape {shape}, config.json says {expected}")


class Dequantised(WeightSource):
    """A folder of packed matrices as one of plain weights: `X.weight` where it has `X.qweight`; float32.

    The zero biases that old files carry for layers without one are left out.
    """

    def __init__(self, source: WeightSource, read: ReadMatrix, spec: ModelSpec) -> None:
        self.location, self._source, self._read, self._spec = source.location, source, read, spec
        self._packed = {name.removesuffix(".qweight") for name in source.names() if name.endswith(".qweight")}

    def names(self) -> Collection[str]:
        parts = [f"{part}.weight" for part in self._packed]
        return [*parts, *(name for name in self._source.names()
                          if name.rpartition(".")[0] not in self._packed or self._is_bias(name))]

    def _is_bias(self, name: str) -> bool:
        part, _, kind = name.rpartition(".")
        layer = part.rpartition(".")[2]
        spec = self._spec
        has_one = spec.o_bias if layer == "o_proj" else spec.qkv_bias and layer in ("q_proj", "k_proj", "v_proj")
        return kind == "bias" and (has_one or bool(self._source.read(name).any()))

    def read(self, name: str) -> Tensor:
        part = name.removesuffix(".weight")
        matrix = self._read(self._source, part) if part in self._packed else None
        return self._source.read(name) if matrix is None else matrix.dequantise()


class _Remaining(WeightSource):
    """Another source; what was read of it before some moment is there no more."""

    def __init__(self, source: WeightSource) -> None:
        self.location, self._source = source.location, source
        self._read: set[str] = set()
        self._hidden: frozenset[str] = frozenset()

    def names(self) -> Collection[str]:
        return [name for name in self._source.names() if name not in self._hidden]

    def read(self, name: str) -> Tensor:
        self._read.add(name)
        return self._source.read(name)

    def hide_what_was_read(self) -> None:
        self._hidden = frozenset(self._read)
