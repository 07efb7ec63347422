"""GGUF files: the header, read within bounds, and the tensors under their Hugging Face names.

    GGUF | version | counts | key, type, value ... | name, shape, type, offset ... | padding | tensors

The `gguf` package decodes the blocks; its reader of the header trusts the file (an array may claim 2^63 elements), so
the header is read here, where every length is compared with what is left. Format: ggml, docs/gguf.md.
"""
from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import LoadError
from .weights import WeightSource

_TENSOR_NAMES = {                     # GGUF -> Hugging Face, within a layer
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight"}
_BIASED = ("q_proj", "k_proj", "v_proj", "o_proj")
# The rotary divisors are part of the configuration; the other is a table that old files carry and nothing reads.
_NO_WEIGHTS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_HEADER_BYTES = 256 << 20         # the largest vocabularies in use take some 10 MB
_MAX_TEXT_BYTES = 16 << 20
_MAX_ITEMS = 1 << 22                  # of an array; a vocabulary has 2^18
_MAX_COUNT = 1 << 18                  # of keys, and of tensors
_MAX_DIMS = 4


class GGUFError(LoadError):
    """A GGUF file that cannot be read, or holds what this model cannot run."""


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as it lies in the file."""

    name: str
    tensor_type: Any                    # gguf.GGMLQuantizationType
    shape: tuple[int, ...]              # of the weights, outermost dimension first
    data: np.ndarray[Any, Any]          # uint8, mapped: the blocks of each row, one row after the other

    @property
    def n_bytes(self) -> int:
        return int(self.data.nbytes)


@dataclass(frozen=True)
class GGUFFile:
    """What a file holds. Metadata values are numbers, texts, and lists of those."""

    metadata: dict[str, Any]
    tensors: list[GGUFTensor]


def open_gguf(path: Path) -> GGUFFile:
    """Read the header. Raises GGUFError where it does not fit the file, or the tensors do not."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise GGUFError(f"{path} is not a complete GGUF file: {error}") from error
    header = _Header(data.data, path)
    if header.bytes(4) != b"GGUF":
        raise header.damaged("it does not begin with GGUF")
    if (version := header.scalar("I")) not in (2, 3):
        raise header.damaged(f"version {version}; allowed: 2 and 3, little-endian")
    num_tensors, num_keys = (header.count() for _ in range(2))
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = header.text()
        if key in metadata:
            raise header.damaged(f"it holds the key {key!r} twice")
        metadata[key] = header.value(header.scalar("I"))
    infos = [(header.text(), header.shape(), header.scalar("I"), header.scalar("Q")) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise header.damaged(f"general.alignment={alignment!r}; allowed: a power of two")
    start = -(-header.at // alignment) * alignment
    if not infos:
        raise GGUFError(f"{path} is cut short: it holds no tensors")
    return GGUFFile(metadata, _tensors(infos, data, start, alignment, path))


class _Header:
    """A position in the file that never passes its end."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self._data, self._path, self.at = data, path, 0
        self._end = min(len(data), _MAX_HEADER_BYTES)

    def damaged(self, reason: str) -> GGUFError:
        return GGUFError(f"{self._path} is not a complete GGUF file: {reason}")

    def bytes(self, size: int) -> bytes:
        if size > self._end - self.at:
            raise self.damaged(f"its header goes on after byte {self._end:,}")
        self.at += size
        return bytes(self._data[self.at - size:self.at])

    def scalar(self, form: str) -> Any:
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form)))[0]

    def count(self, limit: int = _MAX_COUNT) -> int:
        number: int = self.scalar("Q")
        if number > limit:
            raise self.damaged(f"its header announces {number:,} of something; allowed: at most {limit:,}")
        return number

    def text(self) -> str:
        raw = self.bytes(self.count(_MAX_TEXT_BYTES))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text in its header is not UTF-8: {error}") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.damaged(f"a value in its header has the type {kind}; allowed: 0 to 12")
        kind, size = self.scalar("I"), self.count(_MAX_ITEMS)
        if kind == _STRING:
            return [self.text() for _ in range(size)]
        if kind not in _SCALARS:
            raise self.damaged(f"an array in its header has items of type {kind}; allowed: numbers and texts")
        form = f"<{size}{_SCALARS[kind]}"
        return list(struct.unpack(form, self.bytes(struct.calcsize(form))))

    def shape(self) -> tuple[int, ...]:
        """The file lists dimensions innermost first."""
        num_dims = self.scalar("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.damaged(f"a tensor has {num_dims} dimensions; allowed: 1 to {_MAX_DIMS}")
        return tuple(reversed([self.count(1 << 40) for _ in range(num_dims)]))


def _tensors(infos: list[tuple[str, tuple[int, ...], int, int]], data: np.ndarray[Any, Any], start: int,
             alignment: int, path: Path) -> list[GGUFTensor]:
    """Each tensor's bytes: inside the file, aligned, and nobody else's."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    tensors, ends = [], []
    for name, shape, kind, offset in infos:
        try:
            tensor_type = GGMLQuantizationType(kind)
            block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
        except (ValueError, KeyError):
            raise GGUFError(f"tensor {name} of {path} has type {kind}, which is not known") from None
        size = block_bytes
        for dimension in (*shape[:-1], shape[-1] // block_size):
            size *= dimension
        if shape[-1] % block_size or not size:
            raise GGUFError(f"tensor {name} of {path} has the shape {shape}, which {tensor_type.name} does not fill")
        if offset % alignment:
            raise GGUFError(f"tensor {name} of {path} begins at {offset:,}, which is not aligned to {alignment}")
        begin = start + offset
        ends.append((begin, begin + size, name))
        tensors.append(GGUFTensor(name, tensor_type, shape, data[begin:begin + size]))
    if (last := max(end for _, end, _ in ends)) > len(data):
        raise GGUFError(f"{path} is cut short: {len(data):,} bytes, its tensors end at {last:,}")
    for (_, end, one), (begin, _, other) in pairwise(sorted(ends)):
        if begin < end:
            raise GGUFError(f"the tensors {one} and {other} of {path} overlap")
    name, times = Counter(tensor.name for tensor in tensors).most_common(1)[0]
    if times > 1:
        raise GGUFError(f"{path} holds the tensor {name} {times} times")
    return tensors


class GGUFWeights(WeightSource):
    """The tensors of a file under their Hugging Face names, as float32 and in Hugging Face's row order."""

    def __init__(self, file: GGUFFile, config: Mapping[str, Any], path: Path) -> None:
        """`config` is the file's `hf_config`. Raises GGUFError for a tensor that has no place in that model."""
        self.location, self._config = path, config
        self.stored: dict[str, GGUFTensor] = {}             # as they lie in the file
        for tensor in file.tensors:
            if _NO_WEIGHTS.fullmatch(tensor.name):
                continue
            name = hf_name(tensor.name)
            if name is None:
                raise GGUFError(f"tensor {tensor.name} of {path} has no place in {config['architectures'][0]}")
            self.stored[name] = tensor
        # A file has any of a layer's four biases; Hugging Face's switch asks for all of them.
        self._zeros = [name for layer in range(config["num_hidden_layers"]) for part in _BIASED
                       if (name := f"model.layers.{layer}.self_attn.{part}.bias") not in self.stored
                       and config["attention_bias"]]

    def names(self) -> Collection[str]:
        return [*self.stored, *self._zeros]

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised; zeros for a bias that the file leaves out."""
        if name in self._zeros:
            return torch.zeros(self.read(name.replace(".bias", ".weight")).shape[0])
        if name not in self.stored:
            raise GGUFError(f"{self.location} lacks the tensor {name}")
        return self.in_order(name, dequantise(self.stored[name], self.location))

    def in_order(self, name: str, rows: Tensor) -> Tensor:
        """The rows of the tensor `name`, whatever stands in each, in Hugging Face's order. Raises GGUFError."""
        if self._config["model_type"] != "llama" or (match := re.search(r"\.([qk])_proj\.", name)) is None:
            return rows
        heads = self._config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        if rows.shape[0] % (2 * heads):
            raise GGUFError(f"tensor {self.stored[name].name} of {self.location} has {rows.shape[0]} rows, which "
                            f"{heads} heads do not divide")
        return unpermute(rows, heads)


def hf_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for a tensor no family has."""
    if match := re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", name, re.ASCII):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_TENSOR_NAMES[part]}.{kind}" if part in _TENSOR_NAMES else None
    return _TOP_NAMES.get(name)


def dequantise(tensor: GGUFTensor, path: Path) -> Tensor:
    """One tensor as float32, whatever its type in the file."""
    from gguf.quants import dequantize
    rows = tensor.data.reshape(*tensor.shape[:-1], -1)
    try:
        array = dequantize(rows, tensor.tensor_type)
    except NotImplementedError as error:
        raise GGUFError(f"tensor {tensor.name} of {path} has type {tensor.tensor_type.name}, which is not supported; "
                        "allowed: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K") from error
    return torch.from_numpy(array.astype("float32")).reshape(tensor.shape)


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's row order, which interleaves the two halves of each head for its rotary kernel."""
    rows, rest = weight.shape[0], weight.shape[1:]
    return weight.reshape(num_heads, rows // num_heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)
