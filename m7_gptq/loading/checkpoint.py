"""Packed layers of AutoGPTQ's and GPTQModel's folders, read and checked.

A layer is packed where the folder holds its `qweight`; any other is plain, whatever the settings say. Every shape
is checked against the settings, since a wrong number of bits still unpacks, into noise. The label of the format is
checked too: on a symmetric grid all zero points are known, so they show which of the two formats they are in.
"""
from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from m0_basics.loading.files import LoadError
from m0_basics.loading.weights import WeightSource

from ..grid import QuantizedMatrix
from .pack import PackedMatrix, unpack_matrix
from .settings import FORMATS, GPTQSettings

_NEAR = 0.5                         # of a step: how near to a whole step off centre most rows lie, if mislabelled


class PackedLabelWarning(UserWarning):
    """A folder's label says one format of zero points, and its tensors look like the other."""


def is_packed(source: WeightSource, part: str) -> bool:
    """Whether the checkpoint holds this layer ("model.layers.0.self_attn.q_proj") packed."""
    return f"{part}.qweight" in source.names()


def read_matrix(source: WeightSource, part: str, settings: GPTQSettings) -> QuantizedMatrix | None:
    """The packed layer `part`; None where it is plain or not there.

    Raises LoadError for tensors that are missing, misshapen or of another kind than the settings say. That the matrix
    has its layer's shape is checked where it is put in place.
    """
    if not is_packed(source, part):
        if left := [name for name in ("qzeros", "scales", "g_idx") if f"{part}.{name}" in source.names()]:
            raise LoadError(f"{source.location} lacks the tensor {part}.qweight, and holds {part}.{left[0]}")
        return None
    matrix = unpack_matrix(_read_packed(source, part, settings), settings.bits, settings.version)
    return _with_true_zeros(matrix, source, part, settings)


def read_bias(source: WeightSource, part: str, outputs: int, expected: bool) -> Tensor | None:
    """The bias [N] beside a packed layer, as it is stored; None where there is none. Raises LoadError.

    AutoGPTQ wrote biases of zeros into models that have none (`expected` is false): those are left out.
    """
    name = f"{part}.bias"
    if name not in source.names():
        if expected:
            raise LoadError(f"{source.location} lacks the tensor {name}")
        return None
    bias = source.read(name)
    if bias.shape != (outputs,) or not bias.dtype.is_floating_point:
        raise LoadError(f"{source.location}: {name} is {_form(bias)}; allowed: floating-point ({outputs},)")
    if expected:
        return bias
    if bool(bias.any()):
        raise LoadError(f"tensor {name} of {source.location} has no place in the model; "
                        "without it the model would compute something else")
    return None


def _read_packed(source: WeightSource, part: str, settings: GPTQSettings) -> PackedMatrix:
    """The four tensors, their shapes and types checked against each other and the settings."""
    qweight, qzeros, scales = (source.read(f"{part}.{name}") for name in ("qweight", "qzeros", "scales"))
    bits, size = settings.bits, settings.group_size
    if qweight.dim() != 2 or qweight.dtype is not torch.int32:
        raise _bad(source, part, "qweight", qweight, "int32 [inputs * bits / 32, outputs]")
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    g_idx = None
    if f"{part}.g_idx" in source.names():
        g_idx = source.read(f"{part}.g_idx")
        if g_idx.dim() != 1 or g_idx.dtype not in (torch.int32, torch.int64):
            raise _bad(source, part, "g_idx", g_idx, "int32 [inputs]")
        inputs = g_idx.shape[0]
    if inputs == 0 or outputs == 0 or inputs % 32 or qweight.shape[0] * 32 != inputs * bits:
        raise _bad(source, part, "qweight", qweight, f"{bits} bits of a multiple of 32 inputs"
                   + (f", here {inputs} by g_idx" if g_idx is not None else ""))
    if size != -1 and inputs % size:
        raise LoadError(f"{source.location}: group_size={size} does not divide the {inputs} inputs of {part}; "
                        f"allowed: a divisor of {inputs}, or -1")
    groups = settings.groups(inputs)
    if scales.shape != (groups, outputs) or not scales.dtype.is_floating_point:
        raise _bad(source, part, "scales", scales, f"float16 ({groups}, {outputs})")
    if not bool(scales.isfinite().all()):
        raise LoadError(f"{source.location}: {part}.scales holds a value that is not finite")
    if qzeros.shape != (groups, -(-outputs * bits // 32)) or qzeros.dtype is not torch.int32:
        raise _bad(source, part, "qzeros", qzeros, f"int32 ({groups}, {-(-outputs * bits // 32)})")
    return PackedMatrix(qweight, qzeros, scales, _checked_groups(source, part, g_idx, inputs, groups, settings))


def _checked_groups(source: WeightSource, part: str, g_idx: Tensor | None, inputs: int, groups: int,
                    settings: GPTQSettings) -> Tensor:
    """g_idx with each of the groups as often as every other; the trivial one where it is left out."""
    size = inputs // groups
    if g_idx is None:
        if settings.desc_act and groups > 1:
            raise LoadError(f"{source.location} lacks the tensor {part}.g_idx, which desc_act=true needs")
        return torch.arange(groups, dtype=torch.int32).repeat_interleave(size)
    if bool((g_idx < 0).any()) or bool((g_idx >= groups).any()):
        raise LoadError(f"{source.location}: {part}.g_idx holds values from {int(g_idx.min())} to {int(g_idx.max())}; "
                        f"allowed: groups 0 to {groups - 1}")
    counts = g_idx.to(torch.int64).bincount(minlength=groups)
    if bool((counts != size).any()):
        group = int((counts != size).nonzero()[0])
        raise LoadError(f"{source.location}: {part}.g_idx puts {int(counts[group])} inputs into group {group}; "
                        f"allowed: {size} into each group")
    return g_idx


def _with_true_zeros(matrix: QuantizedMatrix, source: WeightSource, part: str,
                     settings: GPTQSettings) -> QuantizedMatrix:
    """The matrix, its zero points mended where a symmetric grid shows that the format is mislabelled.

    An asymmetric grid cannot show it for certain. But weights lie around 0, and the wrong format moves all of them by
    one step the same way: that is reported. Eight bits have steps too small to tell.
    """
    assert matrix.zeros is not None
    other = FORMATS[2 - settings.version]
    one_off = 1 if settings.version == 1 else -1        # by which the wrong format moves a zero point
    if settings.sym:
        middle = settings.middle
        if bool((matrix.zeros == middle).all()):
            return matrix
        if bool((matrix.zeros == middle + one_off).all()):
            _warn(f"checkpoint_format={settings.checkpoint_format!r} of {source.location} is wrong: its zero points "
                  f"are stored as {other!r} does, and are read so")
            return replace(matrix, zeros=torch.full_like(matrix.zeros, middle))
        raise LoadError(f"{source.location}: {part}.qzeros holds zero points from {int(matrix.zeros.min())} to "
                        f"{int(matrix.zeros.max())}; allowed: {middle} everywhere, since sym is true")
    if settings.bits < 8:
        centres = matrix.codes.float().mean(1) - matrix.zeros.float().mean(1)           # of each row, in steps
        low, high = centres.quantile(0.25), centres.quantile(0.75)
        if max(abs(low + one_off), abs(high + one_off)) < _NEAR:
            _warn(f"checkpoint_format={settings.checkpoint_format!r} of {source.location} may be wrong: the weights "
                  f"lie a whole step off 0, as they do where zero points are stored as {other!r} does")
    return matrix


def _warn(message: str) -> None:
    warnings.warn(message, PackedLabelWarning, stacklevel=4)


def _bad(source: WeightSource, part: str, name: str, tensor: Tensor, allowed: str) -> LoadError:
    return LoadError(f"{source.location}: {part}.{name} is {_form(tensor)}; allowed: {allowed}")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
