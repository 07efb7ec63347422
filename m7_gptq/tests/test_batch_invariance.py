"""With quantised weights, too, a row's result is the same bits whatever runs beside it, on any number of threads."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from m7_gptq.kernels.cpu.linear import CpuQuantizedGatedLinear, CpuQuantizedLinear
from m7_gptq.tests.cpu_references import compiled_for, draw, make_matrix
from m7_gptq.tests.cpu_tiers import RUNNABLE
from m7_gptq.tests.random_matrices import Kind

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 64, 300]
THREADS = [1, 2, 3]


@pytest.fixture(scope="module", params=RUNNABLE, autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels as they are compiled for several processors."""
    before = torch.get_num_threads()
    with compiled_for(request.param):
        yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Kind(4, 32, zeros=False), Kind(8, 64), Kind(4, 40, ordered=True)])
def test_linear(kind: Kind, dtype: torch.dtype, activations: str) -> None:
    """Tiles of other heights and widths, few rows and many, blocks of rows: one order of sums."""
    depth = kind.group * 10
    matrix, x = make_matrix(140, depth, kind), draw(300, depth, dtype=dtype)
    bias = draw(140, dtype=dtype, seed=2)
    layers = [CpuQuantizedLinear(matrix, bias, dtype, activations, torch.float32),
              CpuQuantizedGatedLinear(matrix, dtype, activations)]
    torch.set_num_threads(1)
    alone = [torch.cat([layer(row) for row in x.split(1)]) for layer in layers]
    for threads in THREADS:
        torch.set_num_threads(threads)
        for rows in ROWS if threads == 1 else (1, 3, 7, 64, 300):
            start = (300 - rows) // 2
            for layer, expected in zip(layers, alone, strict=True):
                assert torch.equal(layer(x[start:start + rows]), expected[start:start + rows]), (rows, threads)
