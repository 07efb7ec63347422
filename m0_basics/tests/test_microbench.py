"""The micro-benchmarks run and measure what they say (F0.3, F0.13). Times are compared only where they cannot flip."""
from __future__ import annotations

import sys

import pytest

from m0_basics.request import Sequence, SequenceData, SequenceStatus
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.analysis.microbench import (
    QUICK,
    Effort,
    SequencePool,
    compare,
    format_facts,
    id_storage,
    ratio,
    run_all,
)
from m0_basics.tools.documents.factbook import Fact


@pytest.fixture(scope="module")
def facts() -> dict[str, Fact]:
    return run_all(quick=True)


def test_every_way_has_a_positive_number_and_a_unit(facts: dict[str, Fact]) -> None:
    """F0.3, F0.13: the benchmark prints every number."""
    assert {name.split(".")[0] for name in facts} == {
        "object", "validate", "grow", "access", "storage", "convert", "join", "create", "fork"}
    for name, fact in facts.items():
        assert isinstance(fact.value, (int, float)) and fact.value > 0, name
        assert fact.unit in ("ns", "B", "ratio"), name
        assert f"{name} " in format_facts(facts)


@pytest.mark.parametrize(("slow", "fast", "at_least"), [
    ("grow.512.torch_cat", "grow.512.list_append", 5),              # 100x and more in truth
    ("access.tensor_item", "access.list", 3),                       # 20x and more
    ("convert.2048.list", "convert.2048.array", 3),                 # 300x
    ("join.token_ids", "join.token_slice_newest", 2),               # 15x
    ("fork.deepcopy", "fork.sequence_fork", 5),                     # 200x
    ("validate.one_by_one_per_request", "validate.shared_object_per_request", 5),      # 500x
])
def test_orders_of_magnitude(facts: dict[str, Fact], slow: str, fast: str, at_least: float) -> None:
    """F0.13: differences so large that no disturbance turns them round."""
    assert float(ratio(facts, slow, fast).value) > at_least


def test_ratios_are_those_of_the_times(facts: dict[str, Fact]) -> None:
    assert facts["grow.512.cat_over_append"] == ratio(facts, "grow.512.torch_cat", "grow.512.list_append")
    assert facts["fork.deepcopy_over_fork"] == ratio(facts, "fork.deepcopy", "fork.sequence_fork")


def test_bytes_of_ids_are_counted() -> None:
    """F0.13: a list holds a pointer and an object for each id, a tensor 4 or 8 bytes."""
    facts = id_storage(QUICK, length=100)
    pointers = sys.getsizeof([None] * 100)
    assert facts["storage.100.tensor_int32"].value == 400
    assert facts["storage.100.tensor_int64"].value == 800
    assert facts["storage.100.list"].value == pytest.approx(pointers + 100 * sys.getsizeof(1000), rel=0.1)


def test_compare_takes_turns_and_divides() -> None:
    """The ways alternate in every round, and the time is one operation's."""
    calls: list[str] = []
    effort = Effort(rounds=3, sample_seconds=1e-9)              # one call per sample
    facts = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, effort)
    assert calls[-6:] == ["a", "b"] * 3
    assert facts["a"].unit == "ns"
    whole = compare({"x": "for _ in range(1000): pass"}, QUICK)
    part = compare({"x": "for _ in range(1000): pass"}, QUICK, per=1000)
    assert float(part["x"].value) < float(whole["x"].value) / 50


def test_a_pooled_sequence_is_like_a_new_one() -> None:
    """F0.13: every field is set back, so nothing of a request reaches the next; and its outputs stay untouched."""
    pool, params = SequencePool(), SamplingParams(temperature=0)
    used = pool.acquire(1, [5, 6], SamplingParams(n=2, best_of=3))
    used.append_token_id(7)
    used.eos_token_ids, used.index, used.seed = (2,), 4, 99
    used.set_status(SequenceStatus.RUNNING)
    used.num_computed_tokens, used.cumulative_logprob = 3, -1.5
    used.logprobs.append({})
    used.prompt_logprobs.append(None)
    used.output_text, used.stop_reason = "text", "stop"
    handed_out = used.output_token_ids
    pool.release(used)
    again = pool.acquire(2, [8], params)
    assert again is used
    assert vars(again) == vars(Sequence(2, SequenceData([8]), params, 0))
    assert handed_out == [7]
