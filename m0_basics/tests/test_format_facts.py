"""Facts about formats, against what defines them elsewhere: IEEE 754, the GGUF file itself, Llama's wavelengths."""
from __future__ import annotations

import math

import pytest

from m0_basics.loading.gguf import open_gguf
from m0_basics.loading.loader import default_model_file
from m0_basics.tools.analysis.format_facts import (
    bits_per_weight,
    gguf_blocks,
    number_formats,
    rotary_frequencies,
    tokens_run,
)
from m0_basics.tools.analysis.model_specs import SPECS


def test_number_formats() -> None:
    """F0.9: the layouts that the standard states: float16 is 1 + 5 + 10 bits, bfloat16 is float32 cut to 1 + 8 + 7."""
    facts = {name: fact.value for name, fact in number_formats().items()}
    for name, exponent, mantissa in (("float32", 8, 23), ("float16", 5, 10), ("bfloat16", 8, 7)):
        assert facts[f"dtype.{name}.exponent_bits"] == exponent
        assert facts[f"dtype.{name}.mantissa_bits"] == mantissa
        largest = (2 - 2.0**-mantissa) * 2.0 ** (2 ** (exponent - 1) - 1)
        assert facts[f"dtype.{name}.max"] == largest
        assert facts[f"dtype.{name}.smallest_normal"] == 2.0 ** (2 - 2 ** (exponent - 1))


@pytest.mark.parametrize(("block_type", "weights", "fields"), [
    ("Q4_0", 32, [2, 16]),                  # one fp16 scale, 32 nibbles
    ("Q4_1", 32, [2, 2, 16]),               # fp16 scale and fp16 minimum, 32 nibbles
    ("Q8_0", 32, [2, 32]),                  # one fp16 scale, 32 bytes
    ("Q4_K", 256, [2, 2, 12, 128]),         # two fp16, eight 6-bit scales and minima, 256 nibbles
    ("Q6_K", 256, [128, 64, 16, 2]),        # low 4 bits, high 2 bits, 16 byte scales, one fp16
])
def test_bits_per_weight_by_hand(block_type: str, weights: int, fields: list[int]) -> None:
    """F0.9: the fields of each block, added up."""
    assert bits_per_weight(block_type) == sum(fields) * 8 / weights


@pytest.mark.real_model
def test_predicted_bytes_are_the_file_s() -> None:
    """F0.9, F0.12: the bytes of the default model's tensors follow from its shape and the block types."""
    reader, facts = open_gguf(default_model_file()), gguf_blocks()
    held: dict[str, int] = {}
    for tensor in reader.tensors:
        held[tensor.tensor_type.name] = held.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    assert held == {"Q4_1": facts["smollm2.gguf.linear_bytes"].value, "F32": facts["smollm2.gguf.norms_bytes"].value,
                    "Q8_0": facts["smollm2.gguf.embedding_bytes"].value}
    assert sum(held.values()) == facts["smollm2.gguf.tensor_bytes"].value < default_model_file().stat().st_size


def test_llama_3_keeps_blends_and_divides_by_wavelength() -> None:
    """Each pair classified by its own wavelength: below 8192 / 4 tokens kept, above 8192 / 1 divided."""
    wavelengths = [2 * math.pi * 500_000 ** (2 * i / 128) for i in range(64)]
    facts = {name: fact.value for name, fact in rotary_frequencies().items()}
    assert facts["llama3_1_8b.rope.pairs"] == 64
    assert facts["llama3_1_8b.rope.kept"] == sum(w <= 8192 / 4 for w in wavelengths)
    assert facts["llama3_1_8b.rope.divided"] == sum(w >= 8192 for w in wavelengths)
    assert facts["llama3_1_8b.rope.blended"] == sum(8192 / 4 < w < 8192 for w in wavelengths)
    assert facts["llama3_1_8b.rope.longest_wavelength.before"] == pytest.approx(max(wavelengths), rel=1e-5)
    assert facts["llama3_1_8b.rope.longest_wavelength.after"] == pytest.approx(8 * max(wavelengths), rel=1e-5)
    theta = SPECS["SmolLM2-135M"].rope_theta
    assert facts["smollm2.rope.longest_wavelength"] == pytest.approx(2 * math.pi * theta ** (62 / 64), rel=1e-5)


def test_tokens_run() -> None:
    """By hand: prompt 3, 2 outputs. Cached 3 + 1; without a cache 3, then 4."""
    facts = tokens_run(3, 2)
    assert facts["tokens_run.3+2.cached"].value == 4
    assert facts["tokens_run.3+2.uncached"].value == 7
