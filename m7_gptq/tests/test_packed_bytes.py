"""F7.4: the packed format says what it takes, to the byte, and every code is where the format says."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m7_gptq.grid import QuantizedMatrix
from m7_gptq.kernels.cpu.linear import CpuQuantizedGatedLinear, CpuQuantizedLinear, kernels
from m7_gptq.kernels.packed import Offsets, PackedMatrix, offsets_of, pack, packed_bytes, pieces_of, scale_bytes_of
from m7_gptq.tests.cpu_references import make_matrix
from m7_gptq.tests.random_matrices import Kind

kinds = st.builds(Kind, bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([8, 20, 32, 64, 128, 200, 576]),
                  zeros=st.booleans(), half=st.booleans(), ordered=st.booleans())


@settings(max_examples=60, deadline=None)
@given(kind=kinds, outputs=st.integers(1, 50), groups=st.integers(1, 3), same_zero=st.booleans(), gated=st.booleans(),
       panel=st.sampled_from([8, 16, 32]))
def test_bytes_are_predicted(kind: Kind, outputs: int, groups: int, same_zero: bool, gated: bool, panel: int) -> None:
    rows = 2 * outputs if gated else outputs
    matrix = make_matrix(rows, kind.group * groups, kind, same_zero)
    packed, size = pack(matrix, panel, gated), scale_bytes_of(matrix)
    assert packed.nbytes == packed_bytes(rows, kind.group * groups, kind.group, kind.bits, panel, size,
                                         offsets_of(matrix), kind.ordered, gated)
    assert packed.columns == outputs


def test_bytes_of_layers() -> None:
    panel = kernels().quantized_panel()
    matrix = make_matrix(96, 128, Kind(4, 64))
    plain, biased = (CpuQuantizedLinear(matrix, bias, torch.bfloat16, "int8") for bias in (None, torch.zeros(96)))
    assert plain.nbytes == packed_bytes(96, 128, 64, 4, panel)
    assert biased.nbytes == plain.nbytes + 4 * -(-96 // panel) * panel
    gated = CpuQuantizedGatedLinear(matrix, torch.bfloat16, "exact")
    assert gated.nbytes == packed_bytes(96, 128, 64, 4, panel, gated=True)


def test_bits_of_a_weight() -> None:
    """4 bits in groups of 64: two bytes of scale, one of zero point, or none where all are the same."""
    for offsets, bits in ((Offsets.ZEROS, 4.375), (Offsets.SAME_ZERO, 4.25), (Offsets.HALF_MINIMUMS, 4.5)):
        assert packed_bytes(4096, 4096, 64, 4, 32, offsets=offsets) * 8 == bits * 4096 * 4096
    assert packed_bytes(4096, 4096, 64, 3, 32) == packed_bytes(4096, 4096, 64, 4, 32)
    assert packed_bytes(4096, 4096, 32, 8, 32, offsets=Offsets.SAME_ZERO) * 8 == 8.5 * 4096 * 4096


@pytest.mark.parametrize(("group", "expected"), [(8, (1, 8)), (20, (1, 24)), (64, (1, 64)), (128, (1, 128)),
                                                 (256, (2, 128)), (576, (6, 96)), (1536, (12, 128)), (131, (2, 72))])
def test_long_groups_are_cut(group: int, expected: tuple[int, int]) -> None:
    assert pieces_of(group) == expected


def value_at(packed: PackedMatrix, panel: int, output: int, place: int) -> tuple[int, float, float]:
    """(code, scale, offset) of an output's place, read by the format's description."""
    groups, group = packed.inner // packed.group, place // packed.group
    block, column = packed.packed[output // panel], output % panel

    def line(num_bytes: int) -> int:
        return -(-num_bytes // 64) * 64

    def number(start: int, index: int, size: int) -> float:
        data = block[start + index * size:start + (index + 1) * size]
        return float(data.view({1: torch.uint8, 2: torch.float16, 4: torch.float32}[size])[0])

    offsets_at = line(groups * panel * packed.scale_bytes)
    codes_at = offsets_at + line(groups * panel * packed.offsets)
    scale = number(0, group * panel + column, packed.scale_bytes)
    if packed.offsets <= Offsets.ZEROS:
        zero = number(offsets_at, group * panel + column, 1) if packed.offsets is Offsets.ZEROS else packed.zero
        offset = -scale * zero
    else:
        offset = number(offsets_at, group * panel + column, packed.offsets)
    per_step = 32 // packed.bits
    lane = codes_at + (place // per_step * panel + column) * 4
    code = int(block[lane + [0, 2, 1, 3][place % 4]])
    return (code >> 4 * (place // 4 % 2)) & 15 if packed.bits == 4 else code, scale, offset


@pytest.mark.parametrize("kind", [Kind(4, 32), Kind(3, 20, ordered=True), Kind(8, 256, zeros=False),
                                  Kind(4, 64, zeros=False, half=False)])
@pytest.mark.parametrize("same_zero", [False, True])
def test_every_weight_is_where_the_format_says(kind: Kind, same_zero: bool) -> None:
    matrix = make_matrix(19, kind.group * 2, kind, same_zero)
    packed = pack(matrix, 8)
    assert packed.inner % 8 == 0 and packed.group % 8 == 0
    order = torch.arange(packed.inner, dtype=torch.int32) if packed.order is None else packed.order
    values = torch.zeros(matrix.shape)
    for output in range(19):
        for place in range(packed.inner):
            code, scale, offset = value_at(packed, 8, output, place)
            if order[place] >= 0:
                values[output, order[place]] = scale * code + offset
    torch.testing.assert_close(values, matrix.dequantise(), rtol=1e-6, atol=1e-6)
    assert sorted(i for i in order.tolist() if i >= 0) == list(range(matrix.shape[1]))


def test_both_halves_of_a_gated_matrix_stand_in_every_panel() -> None:
    codes = torch.arange(12, dtype=torch.uint8).unsqueeze(1).expand(12, 8).contiguous()     # a row's number
    matrix = QuantizedMatrix(codes, torch.ones(12, 1), 4, torch.zeros(12, 1, dtype=torch.uint8))
    packed = pack(matrix, 8, gated=True)
    found = [[value_at(packed, 8, 8 * p + c, 0)[0] for c in range(8)] for p in range(2)]
    assert found == [[0, 1, 2, 3, 6, 7, 8, 9], [4, 5, 0, 0, 10, 11, 0, 0]]
