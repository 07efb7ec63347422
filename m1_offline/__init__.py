"""Milestone 1."""
