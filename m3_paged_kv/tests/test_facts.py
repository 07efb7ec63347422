"""The computed facts, against sums done by hand."""
from __future__ import annotations

import pytest

from m3_paged_kv.tools.facts import FACTS


def values() -> dict[str, int | float | str]:
    return {name: fact.value for name, fact in FACTS.compute().items()}


def test_by_hand() -> None:
    """F3.4, F3.5: 640 of 4,096 slots; blocks of 16 x 23,040 B; 32 shared blocks, 8 own ones for each of 8 outputs."""
    facts = values()
    assert facts["rows.example"] == pytest.approx(0.15625)
    assert facts["blocks.example"] == 1.0
    assert facts["block.bytes"] == 16 * 23_040
    assert facts["block.mean_waste"] == 7.5
    assert facts["block.waste_of_500"] == pytest.approx(0.015)
    assert (facts["sharing.held"], facts["sharing.copied"]) == (32 + 8 * 8, 8 * 40)
    assert facts["sharing.saved"] == pytest.approx(0.7)
    assert facts["blocks.ragged.1"] == 1.0
    sizes = [facts[f"blocks.ragged.{size}"] for size in (1, 4, 8, 16, 32, 128)]
    assert sizes == sorted(sizes, reverse=True)
    assert (facts["sharing.500.held"], facts["sharing.500.copies"]) == (31 + 8 * 9, 7), "the half block is copied"


def test_costs_by_hand() -> None:
    """F3.7: 640 tokens x 131,072 B, twice over 25 GB/s; two more passes over the keys and values where they are copied.
    """
    facts = values()
    assert facts["llama_3_1_8b.swap.640.ms"] == pytest.approx(2 * 640 * 131_072 / 25e9 * 1e3)
    read_ms = 32 * 512 * 131_072 / 3350e9 * 1e3
    assert facts["gather.32x512.ms"] == pytest.approx(facts["gather.32x512.in_place_ms"] + 2 * read_ms)
    assert facts["sizing.blocks"] == (0.9 * 80e9 - facts["sizing.weight_bytes"]) // (16 * 131_072)
    first, last = facts["smollm2.swap.up_to"], facts["smollm2.swap.again_from"]
    assert first < 640 < last
    assert facts["smollm2.recompute.640.ms"] < facts["smollm2.swap.640.ms"]


def test_blocks_hold_more_than_rows() -> None:
    """F3.9: at the same memory more sequences run side by side; larger blocks hold fewer; a watermark saves victims."""
    facts = values()
    means = [facts[f"sim.blocks.{size}.mean"] for size in (1, 4, 8, 16, 32, 128)]
    assert means == sorted(means, reverse=True)
    assert means[-1] > facts["sim.rows.mean"]
    assert facts["sim.rows.most"] == facts["memory.rows"] == 8
    assert facts["sim.swap.recomputed"] == 0 < facts["sim.swap.preemptions"]
    runs = ("watermark.0", "blocks.16", "watermark.0.05", "watermark.0.2")       # blocks.16 has the default, 0.01
    victims = [facts[f"sim.{run}.preemptions"] for run in runs]
    assert victims == sorted(victims, reverse=True)
    assert victims[-1] == 0


def test_rows_that_fit_take_half_of_the_gain() -> None:
    """F3.9: 345 tokens need rows of 3 x 128, of which 8,192 tokens hold 21: better than 8 rows, worse than blocks."""
    facts = values()
    assert facts["ragged.longest"] == 345
    assert (facts["sim.rows_fitted.row_size"], facts["sim.rows_fitted.rows"]) == (384, 21)
    assert facts["sim.rows_fitted.most"] == 21
    assert facts["rows.ragged.fitted"] == pytest.approx(facts["rows.ragged"] * 1024 / 384)
    runs = ("rows", "rows_fitted", "blocks.16")
    means, steps = ([facts[f"sim.{run}.{key}"] for run in runs] for key in ("mean", "steps"))
    assert means == sorted(means)
    assert steps == sorted(steps, reverse=True)
    assert facts["sim.blocks.fewer"] == pytest.approx(steps[0] / steps[2])
    fitted, rest = facts["sim.rows_fitted.fewer"], facts["sim.blocks.fewer_than_fitted"]
    assert fitted * rest == pytest.approx(facts["sim.blocks.fewer"])
    assert min(fitted, rest) > 1.5, "each is a good part of the whole"


def test_shares_by_hand() -> None:
    """F3.10: 16 x 64 numbers of a head and one scale; a page of 2 MB holds 1,024 tokens of 2 kB."""
    facts = values()
    assert facts["quant.int8.ratio"] == (16 * 64 + 2) / (16 * 64 * 2)
    assert (facts["kv.bytes.bf16"], facts["kv.block_bytes.bf16"]) == (23_040, 16 * 23_040)
    heads = 2 * 30 * 3                                      # keys and values, layers, heads
    assert facts["kv.block_bytes.int8"] == heads * (16 * 64 + 2)
    assert facts["kv.bytes.int4"] == heads * (16 * 32 + 2) / 16
    assert facts["quant.int4_channel.ratio"] == (16 * 32 + 2 + 16 * 32 + 2 * 64) / (2 * 16 * 64 * 2)
    assert facts["quant.int8_token.ratio"] == (64 + 2) / 128
    assert (facts["vattention.tokens_per_page"], facts["vattention.first_page_bytes"]) == (1024, 64 * 2**21)
