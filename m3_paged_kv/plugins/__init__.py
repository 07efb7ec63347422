"""Plugins over blocks: a cache in fewer bits, and sequences that forget."""
