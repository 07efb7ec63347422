"""What every launch needs to know: in which precision to multiply, and how large the GPU is.

Triton's interpreter (TRITON_INTERPRET=1) runs kernels on CPU tensors with numpy, which has no bfloat16: arithmetic on
one silently takes its bits for an integer. So the type in which a kernel computes is an argument, and the
interpreter's is float32; a kernel converts right after each load and right before each store.
"""
from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Two loads depend on each other, the block table's entry and the keys that it leads to. With five stages the compiler
# runs each two tiles ahead and keeps two tiles of keys in flight; with four or fewer it waits for every load at once.
NUM_STAGES = 5
MAX_GROUP = 16          # query heads per KV head: the rows of the smallest tile that tensor cores multiply
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def compute_dtype(dtype: torch.dtype) -> Any:
    """The Triton type in which tiles of `dtype` are multiplied."""
    return tl.float32 if INTERPRETED else _DTYPES[dtype]


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the GPU, (9, 0) for Hopper."""
    return (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)


def check_rows(**tensors: Tensor) -> None:
    """A kernel reads each head, or each row, as one contiguous run."""
    for name, tensor in tensors.items():
        assert tensor.stride(-1) == 1, f"{name} must be contiguous in its last dimension"
