"""Names of what the quality suite has measured, on a file of its form written by hand."""
from __future__ import annotations

from typing import Any

import pytest

from m7_gptq.tools.quality_facts import CHOICES, METHODS, quality_facts
from m7_gptq.tools.quality_suite import CHOICES as CHOSEN_AMONG
from m7_gptq.tools.quality_suite import DEFAULT
from m7_gptq.tools.quality_suite import METHODS as MEASURED


def row(bits: int, perplexity: float, **more: Any) -> dict[str, Any]:
    return {"options": {"bits": bits, "group_size": 64}, "seconds": 7.5, "perplexity": {"test": perplexity}, **more}


FOUND = {
    "about": {"calibration_tokens": 16384, "tokens": {"test": 8192, "chinese": 100}},
    "rows": {"full precision": {"perplexity": {"test": 10.0}, "mass_of_first_token": [0.1, 0.6, 0.3]},
             "4 bits: nearest": row(4, 18.0), "4 bits: GPTQ, textbook": row(4, 12.0),
             f"4 bits: {DEFAULT}": row(4, 10.5, int8_activations={"by token": {"test": 11.0},
                                                                  "by group of 64": {"test": 10.6}}),
             "8 bits: nearest": row(8, 10.0),
             "the Q4_1 trap": {"relative_error": {"floating-point minimum, groups of 32": 1e-7,
                                                  "integer zero point, groups of 64": 0.1}}},
    "tiny": {"full precision": {"perplexity": {"test": 4.0}}, "2 bits: nearest": row(2, 6.0),
             "2 bits: GPTQ, textbook": row(2, 4.5)},
    "dev": {"full precision": {"perplexity": {"dev": 11.0}}, "4 bits: the default": {"perplexity": {"dev": 11.5}},
            "3 bits: GPTAQ 0.25": {"perplexity": {"dev": 13.0}}},
    "about_dev": {"tokens": {"dev": 4096}}}


@pytest.mark.parametrize(("name", "value"), [
    ("quality.full.ppl", 10.0), ("quality.4.64.rtn.ppl", 18.0), ("quality.4.64.textbook.ppl", 12.0),
    ("quality.4.64.textbook.closed", 0.75), ("quality.4.64.rtn.closed", 0.0), ("quality.4.64.gptaq.seconds", 7.5),
    ("quality.8.64.rtn.ppl", 10.0), ("quality.tiny.full.ppl", 4.0), ("quality.tiny.2.64.textbook.closed", 0.75),
    ("quality.calibration_tokens", 16384), ("quality.heldout_tokens", 8192), ("quality.sink.attention", 0.6),
    ("quality.sink.layer", 1), ("quality.a8.token.ppl", 11.0), ("quality.a8.group.ppl", 10.6),
    ("quality.dev.full.ppl", 11.0), ("quality.dev.4.default.ppl", 11.5), ("quality.dev.3.gptaq_25.ppl", 13.0),
    ("quality.dev.tokens", 4096), ("quality.trap.32.minimum.error", 1e-7), ("quality.trap.64.integer.error", 0.1)])
def test_each_by_its_name(name: str, value: float) -> None:
    assert quality_facts(FOUND)[name].value == pytest.approx(value)


def test_what_was_not_measured_has_no_name() -> None:
    assert quality_facts({}) == {}
    names = quality_facts({"rows": {"4 bits: nearest": row(4, 18.0), "4 bits: another": row(4, 1.0)}})
    assert set(names) == {"quality.4.64.rtn.ppl", "quality.4.64.rtn.seconds"}


def test_every_row_of_the_suite_has_a_name() -> None:
    assert set(MEASURED) <= set(METHODS.values())
    assert set(CHOSEN_AMONG) == set(CHOICES.values())
