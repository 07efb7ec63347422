"""A whole model, layer by layer: each linear layer is quantised at the moment its calibration inputs arrive.

The windows run through the model once, one decoder layer after the other. Before a linear layer runs, its inputs are
summed up, its weights quantised, and their new values put in place; it then runs with those. So whatever comes later is
calibrated on what the quantised model will really feed it.

Where input and output matrix are one, it comes first, since every layer's inputs start in it.
"""
from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from m0_basics.config import ConfigError
from m0_basics.loading.weights import hf_parts, part_rows
from m0_basics.model import CausalLM, DecoderLayer

from .calibration import (
    Arrived,
    Batches,
    InputStatistics,
    collect,
    corrected_weight,
    cut_batches,
    hidden_states,
    run_layer,
)
from .gptq import factorise, output_errors, quantize_with
from .grid import QuantizedMatrix
from .rtn import QuantizeOptions, round_to_nearest

Matrices = dict[str, QuantizedMatrix]


class MatrixStore(Protocol):
    """Where finished parts of a model are kept, so that an interrupted run goes on after the last of them.

    Parts: "model.layers.0", "model.layers.1", ..., "lm_head". A part's matrices have Hugging Face's names.
    """

    def get(self, part: str) -> Matrices | None:
        """What `put` was given for `part`; None where it was not."""

    def put(self, part: str, matrices: Matrices) -> None:
        """Keep the matrices of one finished part."""


@dataclass(frozen=True)
class MatrixReport:
    """How one linear layer came out. Errors: squared, of its outputs on the calibration inputs, as a share of them.

    Where nothing was calibrated (rounding to nearest), there are no errors.
    """

    name: str                               # the engine's: "layers.0.self_attn.qkv_proj"
    error: float | None = None
    nearest_error: float | None = None      # of rounding to nearest on grids from smallest to largest weight
    damp_percent: float | None = None       # what the Cholesky factor took
    num_dead: int = 0                       # inputs that were always 0
    seconds: float = 0.0


@dataclass
class QuantizedModel:
    """What `quantize_model` returns. The model that it was given holds the same values, dequantised."""

    options: QuantizeOptions
    matrices: Matrices = field(default_factory=dict)    # by Hugging Face's names of linear layers
    report: list[MatrixReport] = field(default_factory=list)        # of the parts quantised in this run
    num_tokens: int = 0                     # of calibration
    seconds: float = 0.0


def quantize_model(model: CausalLM, windows: Tensor | None, options: QuantizeOptions, *,
                   store: MatrixStore | None = None, on_part: Callable[[str, list[MatrixReport]], None] | None = None,
                   use_tqdm: bool = False) -> QuantizedModel:
    """Quantise every linear layer of a plain float32 model; its weights become the dequantised ones, in place.

    `windows`: token ids [num, length] to calibrate on; rounding to nearest needs none. `store` is asked for each part,
    and given each finished one; `on_part` hears of it. Raises ConfigError that names the layer and what is wrong.
    """
    _check(model, windows, options)
    result = QuantizedModel(options, num_tokens=0 if windows is None else windows.numel())
    start = time.perf_counter()
    parts = _Parts(model, options, store, on_part, result)
    with torch.no_grad(), tqdm(total=len(model.layers) + options.lm_head, disable=not use_tqdm, unit="part",
                               desc=f"{options.method}, {options.bits} bits") as bar:
        for _ in _round(model, parts) if options.method == "rtn" or windows is None else _calibrate(
                model, windows, parts):
            bar.update()
    result.seconds = time.perf_counter() - start
    return result


def _check(model: CausalLM, windows: Tensor | None, options: QuantizeOptions) -> None:
    if model.dtype is not torch.float32:
        raise ConfigError(f"dtype={str(model.dtype).removeprefix('torch.')} is not quantised; allowed: float32")
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            _naming(name, options.group_of, linear.in_features)
    if options.method == "rtn":
        return
    if windows is None or windows.numel() == 0:
        raise ConfigError("there is no calibration text; allowed: at least one window of it, or method='rtn'")
    if windows.shape[1] > model.max_model_len:
        raise ConfigError(f"calibration windows of {windows.shape[1]} tokens exceed max_model_len; "
                          f"allowed: at most {model.max_model_len}")
    if wrong := [int(t) for t in (windows.min(), windows.max()) if not 0 <= int(t) < model.spec.vocab_size]:
        raise ConfigError(f"the calibration text holds token {wrong[0]}; "
                          f"allowed: 0 to {model.spec.vocab_size - 1}")


def _round(model: CausalLM, parts: _Parts) -> Iterator[None]:
    """Round every matrix to nearest: no text, no order."""
    for i, layer in enumerate(model.layers):
        with parts.part(f"layers.{i}", layer) as todo:
            for name, linear in todo:
                parts.quantise(name, linear)
        yield
    if parts.options.lm_head:
        with parts.part("lm_head", model.lm_head) as todo:
            for name, linear in todo:
                parts.quantise(name, linear)
        yield


def _calibrate(model: CausalLM, windows: Tensor, parts: _Parts) -> Iterator[None]:
    """Quantise every matrix as its inputs arrive."""
    options, tied, length = parts.options, model.lm_head.weight is model.embed_tokens.weight, windows.shape[1]
    batches, ids = cut_batches(model, windows)
    full = [model.embed_tokens(part) for part in ids] if options.gptaq else None    # the full-precision model's stream
    if options.lm_head and tied:
        with parts.part("lm_head", model.lm_head) as todo:
            for name, linear in todo:
                some = hidden_states(model, windows[::4])       # they say enough, in a quarter of the time
                parts.quantise(name, linear, collect([some.flatten(0, 1)], None, length, 0))
        yield
    x = [model.embed_tokens(part) for part in ids]
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer), "a plain model"
        seen = dict[str, Batches]()
        if full is not None:
            full = run_layer(copy.deepcopy(layer), full, batches, seen.__setitem__)
        with parts.part(f"layers.{i}", layer) as todo:
            x = run_layer(layer, x, batches, _quantise_arrived(parts, f"layers.{i}.", dict(todo), seen, length))
        yield
    if options.lm_head and not tied:
        with parts.part("lm_head", model.lm_head) as todo:
            for name, linear in todo:
                full_x = None if full is None else [model.norm(part) for part in full]
                parts.quantise(name, linear, collect([model.norm(part) for part in x], full_x, length, 0))
        yield


def _quantise_arrived(parts: _Parts, prefix: str, todo: dict[str, nn.Linear], full: dict[str, Batches],
                      length: int) -> Arrived:
    """Quantises what is still to do of a decoder layer; `full`: the inputs of the full-precision model."""
    def arrived(name: str, inputs: Batches) -> None:
        if (linear := todo.get(prefix + name)) is not None:
            sink = parts.options.sink if name.endswith("qkv_proj") else 0.0
            parts.quantise(prefix + name, linear, collect(inputs, full.pop(name, None), length, sink))

    return arrived


class _Parts:
    """Quantises matrices, and keeps the finished parts."""

    def __init__(self, model: CausalLM, options: QuantizeOptions, store: MatrixStore | None,
                 on_part: Callable[[str, list[MatrixReport]], None] | None, result: QuantizedModel) -> None:
        self.model, self.options, self.store, self.on_part, self.result = model, options, store, on_part, result

    @contextmanager
    def part(self, name: str, module: nn.Module) -> Iterator[list[tuple[str, nn.Linear]]]:
        """Yield the linear layers of a part that are to be quantised: none, where the store has them already."""
        key = name if name == "lm_head" else f"model.{name}"
        linears = [(f"{name}.{inner}" if inner else name, linear) for inner, linear in module.named_modules()
                   if isinstance(linear, nn.Linear)]
        names = [part for linear_name, _ in linears for part in hf_parts(linear_name)]
        known = None if self.store is None else self.store.get(key)
        first_report = len(self.result.report)
        if known is not None:
            if sorted(known) != sorted(names):
                raise ConfigError(f"{key}: the store holds {', '.join(sorted(known))}; allowed: {', '.join(names)}")
            for linear_name, linear in linears:
                self._assign(linear_name, linear,
                             torch.cat([known[part].dequantise() for part in hf_parts(linear_name)]))
            self.result.matrices |= known
        yield [] if known is not None else linears
        if known is None:
            if self.store is not None:
                self.store.put(key, {part: self.result.matrices[part] for part in names})
            if self.on_part is not None:
                self.on_part(key, self.result.report[first_report:])

    def quantise(self, name: str, linear: nn.Linear, inputs: InputStatistics | None = None) -> None:
        """One linear layer: into the result, its values in place."""
        start = time.perf_counter()
        matrix, report = _naming(name, _quantise_one, name, linear.weight.detach(), inputs, self.options)
        parts = hf_parts(name)
        rows = [0, *itertools.accumulate(part_rows(parts, matrix.shape[0], self.model.spec))]
        for part, (first, last) in zip(parts, itertools.pairwise(rows), strict=True):
            self.result.matrices[part] = matrix.rows(first, last)
        self._assign(name, linear, matrix.dequantise())
        self.result.report.append(replace(report, seconds=time.perf_counter() - start))

    @staticmethod
    def _assign(name: str, linear: nn.Linear, values: Tensor) -> None:
        if values.shape != linear.weight.shape:
            raise ConfigError(f"{name}: the store holds a matrix of {tuple(values.shape)}; "
                              f"allowed: {tuple(linear.weight.shape)}")
        linear.weight.copy_(values)


def _quantise_one(name: str, weight: Tensor, inputs: InputStatistics | None,
                  options: QuantizeOptions) -> tuple[QuantizedMatrix, MatrixReport]:
    """By the method asked for: the one place that knows them all (another one, AWQ say, would be a branch here).

    `inputs`: what was summed up of the layer's inputs; None where the method needs no text.
    """
    if inputs is None:
        return round_to_nearest(weight, options), MatrixReport(name)
    factor = factorise(inputs.hessian, options)
    matrix = quantize_with(corrected_weight(weight, inputs, factor.damp_percent, options.gptaq), factor, options)
    nearest = round_to_nearest(weight, replace(options, search=False))
    error, nearest_error = output_errors(weight, [matrix.dequantise(), nearest.dequantise()], inputs.hessian)
    return matrix, MatrixReport(name, error, nearest_error, factor.damp_percent, factor.num_dead)


def _naming(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; a ConfigError that it raises says which layer it was about."""
    try:
        return function(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
