"""Codes in 32-bit words, as AutoGPTQ laid them out and GPTQModel, vLLM and transformers read them.

    qweight  int32 [K * bits / 32, N]    a column holds one output's codes, the first in the lowest bits
    qzeros   int32 [G, N * bits / 32]    a row holds one group's zero points, packed the same way
    scales   fp16  [G, N]
    g_idx    int32 [K]                   the group of each input: all that activation order leaves behind

The words of a column are one string of bits: with 3 bits, 32 codes fill three words and two of them straddle words.
Format 1 ("gptq") stores each zero point less one, format 2 ("gptq_v2") as it is.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m0_basics.config import ConfigError

from ..grid import BITS, QuantizedMatrix

# One in every field of a word. Format 1 was written by one subtraction of it from the whole word.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [N, K] as a checkpoint stores it; G groups."""

    qweight: Tensor                     # int32 [K * bits / 32, N]
    qzeros: Tensor                      # int32 [G, ceil(N * bits / 32)]
    scales: Tensor                      # float16 [G, N]
    g_idx: Tensor                       # int32 [K]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The four tensors under their names in a checkpoint."""
        return {f"{part}.{name}": getattr(self, name) for name in ("qweight", "qzeros", "scales", "g_idx")}


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n, columns], n a multiple of 32 -> int32 words [n * bits / 32, columns]."""
    assert bits in BITS and codes.dtype is torch.uint8 and codes.shape[0] % 32 == 0
    codes = codes.view(-1, 32, codes.shape[1])
    words = torch.zeros(codes.shape[0], bits, codes.shape[2], dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = codes[:, i].to(torch.int64) << shift
        words[:, word] |= value & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= value >> 32
    return _as_int32(words).view(-1, codes.shape[2])


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 words [n * bits / 32, columns], n a multiple of 32 -> uint8 codes [n, columns]."""
    assert bits in BITS and words.dtype is torch.int32 and words.shape[0] % bits == 0
    words = words.view(-1, bits, words.shape[1])
    codes = torch.empty(words.shape[0], 32, words.shape[2], dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        here = min(bits, 32 - shift)                    # how many of the bits lie in the first word
        value = (words[:, word] >> shift) & (2 ** here - 1)
        if here < bits:
            value = value | ((words[:, word + 1] & (2 ** (bits - here) - 1)) << here)
        codes[:, i] = value
    return codes.view(-1, words.shape[2])


def pack_zeros(zeros: Tensor, bits: int, version: int) -> Tensor:
    """Zero points uint8 [G, N] -> qzeros int32 [G, ceil(N * bits / 32)] of format 1 or 2."""
    outputs = zeros.shape[1]
    if version == 1 and bits not in _ONES:              # fields that straddle words: each on its own, modulo 8
        zeros = (zeros - 1) & (2 ** bits - 1)
    filler = zeros.new_zeros(zeros.shape[0], -outputs % 32)
    words = pack_words(torch.cat((zeros, filler), 1).t().contiguous(), bits).t().contiguous()
    if version == 1 and bits in _ONES:
        words = _as_int32(words.to(torch.int64) - _ONES[bits])
    return words[:, :-(-outputs * bits // 32)].contiguous()


def unpack_zeros(qzeros: Tensor, bits: int, outputs: int, version: int) -> Tensor:
    """qzeros int32 [G, ceil(N * bits / 32)] of format 1 or 2 -> zero points uint8 [G, N].

    A zero point of 0 less one borrowed from its neighbour, so the one goes back into the packed word before it is cut.
    """
    if version == 1 and bits in _ONES:
        qzeros = _as_int32(qzeros.to(torch.int64) + _ONES[bits])
    filler = qzeros.new_zeros(qzeros.shape[0], -qzeros.shape[1] % bits)
    zeros = unpack_words(torch.cat((qzeros, filler), 1).t().contiguous(), bits).t()[:, :outputs].contiguous()
    if version == 1 and bits not in _ONES:
        zeros = (zeros + 1) & (2 ** bits - 1)
    return zeros


def pack_matrix(matrix: QuantizedMatrix, version: int = 1) -> PackedMatrix:
    """A matrix in the checkpoint's form. Raises ConfigError for what that form cannot hold.

    That is a floating-point minimum, a scale outside float16, and a number of inputs that does not fill words of 32.
    """
    inputs, groups = matrix.shape[1], matrix.scales.shape[1]
    if matrix.zeros is None:
        raise ConfigError("a grid with floating-point minimums cannot be packed as GPTQ; allowed: integer zero points")
    if inputs % 32:
        raise ConfigError(f"a layer of {inputs} inputs cannot be packed as GPTQ; allowed: a multiple of 32")
    scales = matrix.scales.t().to(torch.float16).contiguous()
    if not bool(scales.isfinite().all()):
        raise ConfigError(f"a scale of {float(matrix.scales.abs().max()):.4g} does not fit GPTQ's float16; "
                          "allowed: finite scales up to 65504")
    g_idx = torch.arange(groups, dtype=torch.int32).repeat_interleave(inputs // groups)
    codes = matrix.codes
    if matrix.order is not None:
        place = matrix.order.argsort()                  # input -> where its code is stored
        g_idx, codes = g_idx[place], codes[:, place]
    return PackedMatrix(pack_words(codes.t().contiguous(), matrix.bits),
                        pack_zeros(matrix.zeros.t().contiguous(), matrix.bits, version), scales, g_idx)


def unpack_matrix(packed: PackedMatrix, bits: int, version: int) -> QuantizedMatrix:
    """What `packed` stands for. The shapes fit each other, and the groups of `g_idx` have one size: both are checked
    where a checkpoint is read."""
    groups, outputs = packed.scales.shape
    zeros = unpack_zeros(packed.qzeros, bits, outputs, version).t().contiguous()
    codes = unpack_words(packed.qweight, bits).t()
    order = order_of(packed.g_idx, groups)
    if order is not None:
        codes = codes[:, order]
    return QuantizedMatrix(codes.contiguous(), packed.scales.t().float().contiguous(), bits, zeros, order=order)


def order_of(g_idx: Tensor, groups: int) -> Tensor | None:
    """The inputs sorted by their group, int64 [K], those of a group in their own order; None where they are so already.
    """
    if torch.equal(g_idx, torch.arange(groups, dtype=g_idx.dtype).repeat_interleave(len(g_idx) // groups)):
        return None
    return g_idx.to(torch.int64).argsort(stable=True)


def _as_int32(words: Tensor) -> Tensor:
    """int64 -> int32 modulo 2^32, as the addition of a 32-bit register wraps."""
    return ((words + 0x80000000) % 0x100000000 - 0x80000000).to(torch.int32)
