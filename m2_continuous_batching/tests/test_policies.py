"""Policies as text, and what a request may ask of them (F2.5). What they decide is in test_scheduler.py."""
from __future__ import annotations

from typing import Any

import pytest

from m0_basics.config import ConfigError
from m2_continuous_batching import LLM, EngineConfig, SchedulingParams
from m2_continuous_batching.policies import (
    POLICIES,
    AgeingPolicy,
    FCFSPolicy,
    PriorityPolicy,
    QueuedSequence,
    RoundRobinPolicy,
    ShortestJobFirstPolicy,
    SLAPolicy,
    make_policy,
)
from m2_continuous_batching.tests.fake_loop import make_request


def queued(params: SchedulingParams, arrival: float = 0.0) -> QueuedSequence:
    request = make_request(1, arrival=arrival)
    return QueuedSequence(request.sequences[0], request, params)


@pytest.mark.parametrize(("text", "kind"), [("fcfs", FCFSPolicy), ("priority", PriorityPolicy),
                                            ("sjf", ShortestJobFirstPolicy), ("ageing", AgeingPolicy),
                                            ("round-robin", RoundRobinPolicy), ("sla", SLAPolicy)])
def test_plain_names(text: str, kind: type) -> None:
    assert type(make_policy(text)) is kind
    assert text in POLICIES


def test_parameters() -> None:
    ageing, default = make_policy("ageing:0.5"), make_policy("ageing")
    assert isinstance(ageing, AgeingPolicy)
    assert isinstance(default, AgeingPolicy)
    assert (ageing.interval_s, default.interval_s) == (0.5, 5.0)
    turns = make_policy("round-robin:7")
    assert isinstance(turns, RoundRobinPolicy)
    assert turns.quantum == 7


def test_sla_classes() -> None:
    policy = make_policy("sla: gold=0.5, silver=0.25 ,rest")
    assert isinstance(policy, SLAPolicy)
    assert [(c.name, c.reserved) for c in policy.classes.values()] == [("gold", 0.5), ("silver", 0.25), ("rest", 0.0)]
    entries = [queued(SchedulingParams(sla_class=c)) for c in ("gold", "silver", "rest")]
    assert [policy.share(e, [], 8) for e in entries] == [6, 4, 2]
    gold, silver, rest = entries
    assert policy.share(rest, [(gold, 1), (silver, 5)], 8) == 8 - 3, "what is used is not kept free as well"
    assert policy.class_of(queued(SchedulingParams())) == "rest", "who names no class is of the last"
    assert sorted(entries, key=policy.key) == entries
    with pytest.raises(ConfigError, match=r"sla_class='tin' is not valid; allowed: gold, silver, rest"):
        policy.check(SchedulingParams(sla_class="tin"))


@pytest.mark.parametrize("text", ["", "lifo", "FCFS", ":5", "fcfs:3", "priority:1", "sjf:x", "ageing:soon", "ageing:0",
                                  "ageing:-1", "ageing:nan", "ageing:inf", "round-robin:0", "round-robin:-2",
                                  "round-robin:1.5", "round-robin:many", "sla:a=x", "sla:a=0.5,a=0.1", "sla:=0.5",
                                  "sla:a=0.5,,b=0", "sla:a=-0.1,b=0", "sla:a=0.5,b=0.5", "sla:a=nan", "sla:a=inf",
                                  "sla:a=0.1=0.2", None, 5, b"fcfs"])
def test_bad_policies(text: Any) -> None:
    """One complaint of one form, naming what was given and what is allowed; the engine makes it as well."""
    for make in (make_policy, lambda policy: EngineConfig.from_options(policy=policy)):
        with pytest.raises(ConfigError) as caught:
            make(text)
        field, allowed = str(caught.value).split(" is not valid; allowed: ")
        assert field == f"policy={text!r}"
        assert allowed


@pytest.mark.parametrize(("settings", "message"), [
    ({"priority": 1.5}, r"priority=1.5 is not valid; allowed: an integer"),
    ({"priority": True}, r"priority=True is not valid; allowed: an integer"),
    ({"priority": "high"}, r"priority='high' is not valid; allowed: an integer"),
    ({"priority": 10**400}, r"is not valid; allowed: an integer from -2147483648 to 2147483648"),
    ({"timeout_s": 0}, r"timeout_s=0 is not valid; allowed: seconds above 0, or None"),
    ({"timeout_s": -1.0}, r"timeout_s=-1.0 is not valid"),
    ({"timeout_s": float("nan")}, r"timeout_s=nan is not valid"),
    ({"timeout_s": True}, r"timeout_s=True is not valid"),
    ({"timeout_s": "5"}, r"timeout_s='5' is not valid; allowed: seconds above 0, or None"),
    ({"sla_class": 3}, r"sla_class=3 is not valid; allowed: the name of a class, or None"),
    ({"sla_class": ["batch"]}, r"sla_class=\['batch'\] is not valid"),
])
def test_bad_scheduling_params(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulingParams(**settings)


def test_the_most_extreme_priorities_have_keys() -> None:
    """Ageing multiplies them; nothing overflows, and the order is theirs."""
    policy = AgeingPolicy(1e9)
    keys = [policy.key(queued(SchedulingParams(priority=p))) for p in (-2**31, 0, 2**31)]
    assert keys == sorted(keys)


@pytest.mark.parametrize("name", ["fcfs", "priority", "ageing", "sjf", "round-robin"])
def test_classes_belong_to_the_sla_policy(name: str) -> None:
    make_policy(name).check(SchedulingParams(priority=3, timeout_s=1))
    with pytest.raises(ConfigError, match=r"sla_class='a' is not valid; allowed: None, except under the sla policy"):
        make_policy(name).check(SchedulingParams(sla_class="a"))


def test_a_bad_policy_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="policy='newest'"):
        LLM("/no/such/model", policy="newest")
