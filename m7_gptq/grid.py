"""What a weight may be: whole numbers of a few bits, and for each group of neighbours what one step is worth.

    weight  0.31  -0.12   0.05   0.44  | -1.20 ...         a row, cut into groups
    code      11      6      8     13  |     2 ...         0 .. 2^bits - 1, stored
    scale          0.09                |  0.31             one a group: the step
    zero              8                |     6             one a group: the code that means 0

    value = scale * (code - zero)         GPTQ's integer zero points
    value = scale * code + minimum        GGUF's Q4_1: a floating-point minimum instead

N outputs (rows), K inputs (columns), G = K / group_size groups of a row.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [N, K] on its grid. Immutable; the tensors are shared, not copied."""

    codes: Tensor                       # uint8 [N, K]
    scales: Tensor                      # float32 [N, G]
    bits: int                           # 2, 3, 4 or 8
    zeros: Tensor | None = None         # uint8 [N, G], or None where there are
    minimums: Tensor | None = None      # float32 [N, G]: exactly one of the two is given
    order: Tensor | None = None         # int64 [K]: codes[:, k] belongs to input order[k]; None: k

    def __post_init__(self) -> None:
        (rows, columns), groups = self.codes.shape, self.scales.shape[1]
        assert self.bits in BITS and self.codes.dtype is torch.uint8 and self.scales.dtype is torch.float32
        assert groups > 0 and columns % groups == 0 and self.scales.shape == (rows, groups)
        assert (self.zeros is None) != (self.minimums is None)
        for points in (self.zeros, self.minimums):
            assert points is None or points.shape == self.scales.shape
        assert self.zeros is None or self.zeros.dtype is torch.uint8
        assert self.minimums is None or self.minimums.dtype is torch.float32
        assert self.order is None or (self.order.shape == (columns,) and self.order.dtype is torch.int64)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantise(self) -> Tensor:
        """The values, float32 [N, K], in the order of the inputs."""
        rows, columns = self.shape
        codes = self.codes.view(rows, -1, self.group_size).float()
        if self.zeros is not None:
            values = self.scales.unsqueeze(2) * (codes - self.zeros.unsqueeze(2).float())
        else:
            assert self.minimums is not None
            values = self.scales.unsqueeze(2) * codes + self.minimums.unsqueeze(2)
        values = values.view(rows, columns)
        return values if self.order is None else values[:, self.order.argsort()]

    def offsets(self) -> Tensor:
        """What a code of 0 is worth, float32 [N, G]: value = scale * code + offset."""
        if self.minimums is not None:
            return self.minimums
        assert self.zeros is not None
        return -self.scales * self.zeros.float()

    def rows(self, first: int, last: int) -> QuantizedMatrix:
        """The outputs [first, last)."""
        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[first:last]

        return replace(self, codes=self.codes[first:last], scales=self.scales[first:last], zeros=cut(self.zeros),
                       minimums=cut(self.minimums))


def same_order(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    """Whether the two store their inputs in the same order."""
    if a.order is None or b.order is None:
        return a.order is b.order
    return torch.equal(a.order, b.order)


def can_stack(parts: Sequence[QuantizedMatrix]) -> bool:
    """Whether the matrices have one width, group size, order of inputs and kind of grid: then `stack` joins them."""
    first = parts[0]
    return all(p.shape[1] == first.shape[1] and p.group_size == first.group_size and same_order(p, first)
               and (p.zeros is None) == (first.zeros is None) for p in parts)


def stack(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices that `can_stack`, one below the other. Where bits differ, the most of them count: no value changes."""
    assert can_stack(parts)
    first = parts[0]
    if len(parts) == 1:
        return first
    zeros = None if first.zeros is None else torch.cat([p.zeros for p in parts if p.zeros is not None])
    minimums = None if first.minimums is None else torch.cat([p.minimums for p in parts if p.minimums is not None])
    return QuantizedMatrix(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]),
                           max(p.bits for p in parts), zeros, minimums, first.order)
