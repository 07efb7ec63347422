"""Triton kernels: the same algorithms for GPUs, tile by tile. Importing this folder's modules needs Triton."""
