"""F7.3: the Triton kernels without a GPU: their values in the interpreter, their machine code by the compiler.

Whether a kernel is interpreted is decided when its module is imported, so each half runs in a process of its own. The
order of packed codes is plain torch, and is tested here.
"""
from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from m4_flash_attn.tests.test_triton import run
from m7_gptq.kernels.triton.packing import STRIP, can_pack, pack
from m7_gptq.tests.random_matrices import Kind, random_matrix

TESTS = Path(__file__).parent
# Triton is made for Linux; where it exists, `make setup` installs it.
needs_triton = pytest.mark.skipif(find_spec("triton") is None and sys.platform != "linux",
                                  reason="Triton is for Linux")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("file", "interpret"), [("interpreted_kernels.py", True), ("compiled_kernels.py", False)])
def test_in_a_process_of_its_own(file: str, interpret: bool, pytestconfig: pytest.Config) -> None:
    """What was compiled is kept: Triton's cache goes by the sources, and compiling takes minutes."""
    output = run(str(TESTS / file), interpret, pytestconfig.rootpath / ".cache" / "triton")
    assert re.search(r"\b\d+ passed", output)
    assert "skipped" not in output


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_lie_where_the_kernels_look(bits) -> None:
    """By the picture in packing.py, one code after the other."""
    matrix = random_matrix(5, 64, Kind(bits))
    strips = pack(matrix).strips
    for output in range(5):
        for k in range(64):
            if bits == 8:
                code = strips[k // 16, output, k % 16]
            else:
                byte = strips[k // 32, output, k % 16]
                code = byte & 15 if k % 32 < 16 else byte >> 4
            assert code == matrix.codes[output, k]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_word_holds_scale_and_point_exactly(zeros, half) -> None:
    """Two float16 where they change no number, else two float32."""
    matrix = random_matrix(6, 96, Kind(8, 32, zeros, half))
    packed = pack(matrix)
    assert packed.grids.shape == (3, 6)
    numbers = packed.grids.view(torch.float16 if half else torch.float32).unflatten(1, (6, 2)).float()
    assert torch.equal(numbers[:, :, 0].t(), matrix.scales)
    assert torch.equal(numbers[:, :, 1].t(), matrix.zeros.float() if zeros else matrix.minimums)
    assert packed.has_zeros == zeros


def test_bytes() -> None:
    """4 bits in groups of 64, half a bit for scale and zero point; eight bytes an input for an order."""
    packed = pack(random_matrix(48, 128, Kind(4, 64, ordered=True)))
    assert packed.nbytes == 48 * 128 * 4.5 / 8 + 8 * 128
    assert packed.shape == (48, 128)


def test_what_can_be_packed() -> None:
    """Groups of whole strips."""
    sizes = range(8, 97, 8)
    assert [n for n in sizes if can_pack(random_matrix(2, n, Kind(4, n)))] == [32, 64, 96]
    assert [n for n in sizes if can_pack(random_matrix(2, n, Kind(8, n)))] == [STRIP * i for i in range(1, 7)]


def test_packing_keeps_no_tensor_alive() -> None:
    """The codes, a byte each, can go: not even a part of them is shared."""
    matrix = random_matrix(1, 64, Kind(8))
    packed = pack(matrix)
    assert packed.strips.untyped_storage().data_ptr() != matrix.codes.untyped_storage().data_ptr()
    assert packed.strips.untyped_storage().nbytes() == matrix.codes.numel()
