"""Milestone 4: attention kernels."""
