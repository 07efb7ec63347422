"""Fixtures of this milestone's tests."""
from m4_flash_attn.tests.cpu_variants import own_products, variant

__all__ = ["own_products", "variant"]
