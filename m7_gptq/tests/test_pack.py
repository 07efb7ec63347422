"""Codes in 32-bit words, against Python's own big integers."""
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from m0_basics.config import ConfigError
from m7_gptq.grid import BITS, QuantizedMatrix
from m7_gptq.loading.pack import (
    PackedMatrix,
    order_of,
    pack_matrix,
    pack_words,
    pack_zeros,
    unpack_matrix,
    unpack_words,
    unpack_zeros,
)


def words_of(codes, bits):
    """One column: the codes as digits of one big number, cut into words. Signed, as int32 is."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def random_matrix(bits, outputs=48, inputs=128, groups=4, order=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** bits, (outputs, inputs), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, 2 ** bits, (outputs, groups), generator=g, dtype=torch.uint8)
    zeros[:3] = 0                                       # each a borrow over the word
    scales = torch.rand(outputs, groups, generator=g).half().float() + 0.0625
    permutation = torch.randperm(inputs, generator=g) if order else None
    return QuantizedMatrix(codes, scales.half().float(), bits, zeros, order=permutation)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=40)
def test_words_are_the_digits_of_one_number(data):
    bits = data.draw(st.sampled_from(BITS))
    n = 32 * data.draw(st.integers(1, 3))
    columns = data.draw(st.lists(st.lists(st.integers(0, 2 ** bits - 1), min_size=n, max_size=n), min_size=1,
                                 max_size=3))
    codes = torch.tensor(columns, dtype=torch.uint8).t().contiguous()
    words = pack_words(codes, bits)
    assert words.dtype is torch.int32 and words.t().tolist() == [words_of(column, bits) for column in columns]
    assert torch.equal(unpack_words(words, bits), codes)


def test_four_bits_by_hand():
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).view(32, 1)
    assert [hex(w & 0xFFFFFFFF) for w in pack_words(codes, 4).flatten().tolist()] == [
        "0x76543210", "0xfedcba98"] * 2


def test_format_1_subtracts_from_the_whole_word():
    """A zero point of 0 less one borrows from the zero point above it: 0x00000010 - 0x11111111."""
    zeros = torch.zeros(1, 8, dtype=torch.uint8)
    zeros[0, 1] = 1
    stored = pack_zeros(zeros, 4, version=1)
    assert stored.tolist() == [[(0x10 - 0x11111111)]]
    # Cut first and corrected afterwards, as an unaware reader does, the second zero point would be 0.
    assert ((stored[0, 0] >> 4 & 15) + 1) % 16 == 0
    assert torch.equal(unpack_zeros(stored, 4, 8, version=1), zeros)


@hypothesis.given(bits=st.sampled_from(BITS), version=st.sampled_from((1, 2)), outputs=st.integers(1, 80),
                  seed=st.integers(0, 2 ** 20))
@hypothesis.settings(max_examples=60)
def test_zero_points_return_from_both_formats(bits, version, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.randint(0, 2 ** bits, (3, outputs), generator=generator, dtype=torch.uint8)
    zeros[torch.rand(3, outputs, generator=generator) < 0.4] = 0
    stored = pack_zeros(zeros, bits, version)
    assert stored.dtype is torch.int32 and stored.shape == (3, -(-outputs * bits // 32))
    assert torch.equal(unpack_zeros(stored, bits, outputs, version), zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_two_formats_differ_by_one_in_every_field(bits):
    """Where no zero point is 0, format 1 is format 2 of zero points less one."""
    zeros = torch.randint(1, 2 ** bits, (2, 64), dtype=torch.uint8)
    assert torch.equal(pack_zeros(zeros, bits, 1), pack_zeros(zeros - 1, bits, 2))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_returns_with_the_same_values(bits, order, version):
    matrix = random_matrix(bits, order=order)
    packed = pack_matrix(matrix, version)
    assert packed.qweight.shape == (128 * bits // 32, 48) and packed.qzeros.shape == (4, -(-48 * bits // 32))
    assert packed.scales.dtype is torch.float16 and packed.g_idx.dtype is torch.int32
    back = unpack_matrix(packed, bits, version)
    assert torch.equal(back.dequantise(), matrix.dequantise())
    assert (back.order is None) == (not order)


def test_each_weight_by_the_formula_of_the_format():
    """scales[g_idx] * (code - zeros[g_idx]), weight by weight, from the words themselves."""
    matrix = random_matrix(3, outputs=32, inputs=64, groups=2, order=True)
    packed, values = pack_matrix(matrix, version=2), matrix.dequantise()
    for output, k in ((0, 0), (5, 10), (17, 21), (31, 42), (12, 63), (9, 32)):
        column = packed.qweight[:, output].tolist()
        number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(column))
        group = int(packed.g_idx[k])
        row = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed.qzeros[group].tolist()))
        code, zero = number >> (3 * k) & 7, row >> (3 * output) & 7
        assert float(values[output, k]) == float(packed.scales[group, output]) * (code - zero)


def test_inputs_of_a_group_keep_their_own_order():
    g_idx = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    assert order_of(g_idx, 2).tolist() == [1, 3, 0, 2]
    assert order_of(torch.tensor([0, 0, 1, 1], dtype=torch.int32), 2) is None
    assert order_of(torch.zeros(4, dtype=torch.int32), 1) is None


def test_what_the_form_cannot_hold():
    matrix = random_matrix(4)
    minimums = QuantizedMatrix(matrix.codes, matrix.scales, 4, minimums=matrix.scales)
    with pytest.raises(ConfigError, match="floating-point minimums"):
        pack_matrix(minimums)
    with pytest.raises(ConfigError, match=r"7e\+04 does not fit GPTQ's float16"):
        pack_matrix(QuantizedMatrix(matrix.codes, torch.full_like(matrix.scales, 7e4), 4, matrix.zeros))
    with pytest.raises(ConfigError, match="40 inputs"):
        pack_matrix(QuantizedMatrix(matrix.codes[:, :40], matrix.scales, 4, matrix.zeros))


def test_names_in_a_checkpoint():
    packed = PackedMatrix(*(torch.tensor(i) for i in range(4)))
    assert {name: int(t) for name, t in packed.tensors("lm_head").items()} == {
        "lm_head.qweight": 0, "lm_head.qzeros": 1, "lm_head.scales": 2, "lm_head.g_idx": 3}
