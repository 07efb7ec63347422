"""GGUF's block formats, one weight at a time, straight from their definition (ggml, ggml-common.h).

Slow and simple: a second opinion on the vectorised code that the loader uses. w is a weight's index in its block.
"""
from __future__ import annotations

import struct
from collections.abc import Callable

BlockDecoder = Callable[[bytes], list[float]]


def _half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def q8_0(block: bytes) -> list[float]:
    """d; 32 signed bytes."""
    return [_half(block, 0) * q for q in struct.unpack_from("<32b", block, 2)]


def q4_0(block: bytes) -> list[float]:
    """d; 16 bytes, whose low halves are weights 0-15 and whose high halves are 16-31; zero point 8."""
    return [_half(block, 0) * (_nibble(block[2:], w) - 8) for w in range(32)]


def q4_1(block: bytes) -> list[float]:
    """d, m; the same bytes."""
    return [_half(block, 0) * _nibble(block[4:], w) + _half(block, 2) for w in range(32)]


def q5_0(block: bytes) -> list[float]:
    """d; 32 fifth bits; the same bytes; zero point 16."""
    [fifth] = struct.unpack_from("<I", block, 2)
    return [_half(block, 0) * ((_nibble(block[6:], w) | (fifth >> w & 1) << 4) - 16) for w in range(32)]


def q5_1(block: bytes) -> list[float]:
    """d, m; 32 fifth bits; the same bytes."""
    [fifth] = struct.unpack_from("<I", block, 4)
    return [_half(block, 0) * (_nibble(block[8:], w) | (fifth >> w & 1) << 4) + _half(block, 2) for w in range(32)]


def _nibble(quants: bytes, w: int) -> int:
    return quants[w % 16] >> 4 * (w // 16) & 15


def q4_k(block: bytes) -> list[float]:
    """d, dmin; 12 bytes of scales and minima; 128 bytes. 8 sub-blocks of 32 weights, two of them to 32 bytes."""
    scales, quants = block[4:16], block[16:144]
    return [_k_value(block, scales, w, quants[32 * (w // 64) + w % 32] >> 4 * (w // 32 % 2) & 15) for w in range(256)]


def q5_k(block: bytes) -> list[float]:
    """d, dmin; scales and minima; 32 bytes of fifth bits, bit s for sub-block s; 128 bytes as in Q4_K."""
    scales, fifth, quants = block[4:16], block[16:48], block[48:176]
    return [_k_value(block, scales, w, quants[32 * (w // 64) + w % 32] >> 4 * (w // 32 % 2) & 15
                     | (fifth[w % 32] >> w // 32 & 1) << 4) for w in range(256)]


def _k_value(block: bytes, scales: bytes, w: int, q: int) -> float:
    scale, minimum = _six_bits(scales, w // 32)
    return _half(block, 0) * scale * q - _half(block, 2) * minimum


def _six_bits(packed: bytes, s: int) -> tuple[int, int]:
    """Scale and minimum of sub-block s: six low bits for the first four; for the others half bytes and high bits."""
    if s < 4:
        return packed[s] & 63, packed[s + 4] & 63
    return (packed[s + 4] & 15 | packed[s - 4] >> 6 << 4), (packed[s + 4] >> 4 | packed[s] >> 6 << 4)


def q6_k(block: bytes) -> list[float]:
    """128 bytes of low halves, 64 of high pairs of bits, 16 signed scales, d; zero point 32."""
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    values = []
    for w in range(256):
        half, quarter, i = w // 128, w % 128 // 32, w % 32
        q = (low[64 * half + 32 * (quarter % 2) + i] >> 4 * (quarter // 2) & 15
             | (high[32 * half + i] >> 2 * quarter & 3) << 4)
        values.append(_half(block, 208) * scales[8 * half + 2 * quarter + i // 16] * (q - 32))
    return values


# Name of the type -> bytes per block, weights per block, decoder.
BLOCKS: dict[str, tuple[int, int, BlockDecoder]] = {
    "Q8_0": (34, 32, q8_0), "Q4_0": (18, 32, q4_0), "Q4_1": (20, 32, q4_1), "Q5_0": (22, 32, q5_0),
    "Q5_1": (24, 32, q5_1), "Q4_K": (144, 256, q4_k), "Q5_K": (176, 256, q5_k), "Q6_K": (210, 256, q6_k),
}
