"""What documents may quote of `results/quality.json`, under short names.

    quality.4.64.textbook.ppl      perplexity of the text that no choice has seen: bits, group size, method
    quality.4.64.rtn.chinese.ppl   the same of the Chinese text, unlike anything that was calibrated on
    quality.4.64.textbook.closed   the share of the gap from rounding to the nearest to full precision that it closes
    quality.4.64.sink.first_value_error    the first token's values: error over size, the median of the layers
    quality.tiny.3.64.rtn.ppl      the same of the tiny model
    quality.a8.token.ppl           the default method at 4 bits, and activations in 8 bits with a scale for each token
    quality.dev.4.gptaq_25.ppl     the default with one thing changed, on the text that defaults were chosen by

The file is quality_suite.py's: "rows" and "tiny", a section for each model, "dev", and "about".
"""
from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from m0_basics.tools.documents.factbook import Fact

from .quality_suite import DEFAULT

FULL, NEAREST, TRAP = "full precision", "nearest", "the Q4_1 trap"
# Rows of the suite by what their facts are called; "N bits: " stands before them.
METHODS = {"rtn": NEAREST, "rtn_search": "nearest, searched grids", "textbook": "GPTQ, textbook",
           "search": "GPTQ, searched grids", "sink": "GPTQ, + first token", "order": "GPTQ, + activation order",
           "gptaq": "GPTQ, + GPTAQ", "aware": "GPTQ, group-aware order"}
_SLUGS = {name: slug for slug, name in METHODS.items()}
# Of the section "dev".
CHOICES = {"rtn": NEAREST, "default": "the default", "as_come": "inputs as they come", "order": "activation order",
           "gptaq_0": "GPTAQ 0", "gptaq_25": "GPTAQ 0.25", "gptaq_75": "GPTAQ 0.75", "gptaq_100": "GPTAQ 1",
           "sink_0": "first token 0", "sink_30": "first token 0.3", "no_search": "grids not searched"}
_ACTIVATIONS = {"token": "by token", "group": "by group of 64"}
_GRIDS = {"32.minimum": "floating-point minimum, groups of 32", "64.minimum": "floating-point minimum, groups of 64",
          "32.integer": "integer zero point, groups of 32", "64.integer": "integer zero point, groups of 64"}


def quality_facts(found: Mapping[str, Any]) -> dict[str, Fact]:
    """All of them, of the rows that the file has; none of an empty file."""
    rows = found.get("rows", {})
    facts: dict[str, Fact] = {}
    for prefix, section in (("quality", rows), ("quality.tiny", found.get("tiny", {}))):
        facts |= _perplexities(prefix, section)
    facts |= _choices(found.get("dev", {}))
    if about := found.get("about_dev"):
        facts["quality.dev.tokens"] = Fact(about["tokens"]["dev"], "tokens")
    if about := found.get("about"):
        facts["quality.calibration_tokens"] = Fact(about["calibration_tokens"], "tokens")
        facts["quality.heldout_tokens"] = Fact(about["tokens"]["test"], "tokens")
    if mass := rows.get(FULL, {}).get("mass_of_first_token"):
        facts["quality.sink.attention"] = Fact(max(mass), "ratio")
        facts["quality.sink.layer"] = Fact(mass.index(max(mass)))
    for name, text in rows.get(f"4 bits: {DEFAULT}", {}).get("int8_activations", {}).items():
        facts |= {f"quality.a8.{slug}.ppl": Fact(text["test"]) for slug, row in _ACTIVATIONS.items() if row == name}
    errors = rows.get(TRAP, {}).get("relative_error", {})
    return facts | {f"quality.trap.{slug}.error": Fact(errors[name], "ratio")
                    for slug, name in _GRIDS.items() if name in errors}


def _choices(rows: Mapping[str, Any]) -> dict[str, Fact]:
    """What the defaults were chosen by."""
    facts = {"quality.dev.full.ppl": Fact(rows[FULL]["perplexity"]["dev"])} if FULL in rows else {}
    slugs = {name: slug for slug, name in CHOICES.items()}
    for name, row in rows.items():
        bits, _, choice = name.partition(" bits: ")
        if choice in slugs:
            facts[f"quality.dev.{bits}.{slugs[choice]}.ppl"] = Fact(row["perplexity"]["dev"])
    return facts


def _perplexities(prefix: str, rows: Mapping[str, Any]) -> dict[str, Fact]:
    """Of one model's rows: perplexity, seconds, and the share of the gap closed."""
    facts: dict[str, Fact] = {}
    full = rows[FULL]["perplexity"]["test"] if FULL in rows else None
    if full is not None:
        facts[f"{prefix}.full.ppl"] = Fact(full)
    for name, row in rows.items():
        bits, _, method = name.partition(": ")
        if method not in _SLUGS:
            continue
        key = f"{prefix}.{row['options']['bits']}.{row['options']['group_size']}.{_SLUGS[method]}"
        own = row["perplexity"]["test"]
        facts |= {f"{key}.ppl": Fact(own), f"{key}.seconds": Fact(row["seconds"], "s")}
        facts |= {f"{key}.{text}.ppl": Fact(value) for text, value in row["perplexity"].items() if text != "test"}
        if "value_error" in row:
            facts[f"{key}.first_value_error"] = Fact(median(row["value_error"]["first"]), "ratio")
        far = rows.get(f"{bits}: {NEAREST}", {}).get("perplexity", {}).get("test")
        if full is not None and far is not None and far != full:
            facts[f"{key}.closed"] = Fact((far - own) / (far - full), "ratio")
    return facts
