"""Triton kernels: the same algorithms for GPUs, tile by tile. Importing this folder's modules needs Triton."""
import importlib.util


def has_triton() -> bool:
    """Whether Triton can be imported (found, not imported)."""
    return importlib.util.find_spec("triton") is not None
