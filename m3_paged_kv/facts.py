"""Every number that milestone 3's documents may quote: sizes of blocks, what they waste, what sharing saves."""
from __future__ import annotations

from pathlib import Path

from m0_basics.analysis import calculators as calc
from m0_basics.analysis.model_specs import SPECS
from m0_basics.bench.workloads import ragged
from m0_basics.documents.factbook import Fact, Facts

from .config import CacheConfig
from .fragmentation import block_utilisation, row_utilisation

SMOLLM2 = SPECS["SmolLM2-135M"]
ROW_SIZE = 2048


def blocks() -> dict[str, Fact]:
    """The default block, and the waste at the end of a sequence's last block."""
    size = CacheConfig().block_size
    return {"block.size": Fact(size), "block.bytes": Fact(calc.kv_bytes(SMOLLM2, size), "B"),
            "block.mean_waste": Fact((size - 1) / 2), "block.waste_of_500": Fact((size - 1) / 2 / 500, "ratio")}


def utilisation() -> dict[str, Fact]:
    """Share of the reserved slots that hold a token: rows, and blocks of several sizes."""
    stored = [len(r.prompt_token_ids) + r.output_len - 1 for r in ragged(64).requests]
    facts = {"rows.example": Fact(row_utilisation([512, 128], ROW_SIZE), "ratio"),
             "blocks.example": Fact(block_utilisation([512, 128], 16), "ratio"),
             "rows.ragged": Fact(row_utilisation(stored, ROW_SIZE), "ratio")}
    return facts | {f"blocks.ragged.{size}": Fact(block_utilisation(stored, size), "ratio")
                    for size in (1, 4, 8, 16, 32, 128)}


def sharing() -> dict[str, Fact]:
    """Eight outputs of 128 tokens from a prompt of 512: blocks held, and blocks if each had its own prompt."""
    size, prompt, output, n = CacheConfig().block_size, 512, 128, 8
    shared = prompt // size
    own = -(-(prompt + output - 1) // size) - shared
    return {"sharing.held": Fact(shared + n * own), "sharing.copied": Fact(n * (shared + own)),
            "sharing.saved": Fact(1 - (shared + n * own) / (n * (shared + own)), "ratio")}


FACTS = Facts(Path(__file__).parent, computed={"blocks": blocks, "utilisation": utilisation, "sharing": sharing})
