"""Triton kernels over packed weights, for GPUs. Importing this folder's modules needs Triton (but for packing.py)."""
