"""Who goes first, and who has to give way: the scheduling policies.

A policy is a key: the waiting request with the smallest key is admitted first, the running one with the largest
is the first victim when something has to give way. All keys are constant while a sequence waits, also that of
ageing: `priority - waited / interval` orders requests as `arrival + priority * interval` does.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from m0_basics.config import check_int, reject
from m0_basics.request import Request, Sequence

Key = tuple[float, ...]
_MAX_PRIORITY = 2**31           # ageing multiplies it with seconds: a float has to hold the product exactly enough


@dataclass(frozen=True)
class SchedulingParams:
    """How one request wants to be scheduled. Policies read what concerns them."""

    priority: int = 0                   # lower runs sooner, as in vLLM
    sla_class: str | None = None        # a class of the `sla` policy; None is its last one
    timeout_s: float | None = None      # seconds from arrival after which the request is aborted

    def __post_init__(self) -> None:
        if isinstance(self.priority, bool) or not isinstance(self.priority, int) or abs(self.priority) > _MAX_PRIORITY:
            raise reject("priority", self.priority, f"an integer from -{_MAX_PRIORITY} to {_MAX_PRIORITY} "
                                                    "(lower runs sooner)")
        if self.sla_class is not None and not isinstance(self.sla_class, str):
            raise reject("sla_class", self.sla_class, "the name of a class, or None")
        seconds = self.timeout_s
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float))
                                    or not seconds > 0):
            raise reject("timeout_s", seconds, "seconds above 0, or None")


@dataclass(eq=False)
class QueuedSequence:
    """A sequence as the scheduler sees it."""

    sequence: Sequence
    request: Request
    params: SchedulingParams
    work_before: int = 0                # tokens that the engine had run when it arrived
    queue_number: int = 0               # sequences that had joined the queue when it did, itself included
    tokens_this_turn: int = 0           # steps that gave it a token since it was last admitted
    last_step: int = -1                 # the last step that ran it

    @property
    def arrival_time(self) -> float:
        return self.request.metrics.arrival_time

    @property
    def order(self) -> Key:
        """First come, first served; outputs of one request in order."""
        return (self.arrival_time, float(self.sequence.seq_id))


class SchedulingPolicy(ABC):
    """Orders the queue, and may reserve room or let one sequence displace another."""

    @abstractmethod
    def key(self, entry: QueuedSequence) -> Key:
        """Smaller goes first. Has to be the same for as long as the sequence waits."""

    def may_displace(self, waiting: QueuedSequence, victim: QueuedSequence) -> bool:
        """Whether `waiting` may take the place of `victim`, where no place is free."""
        return False

    def share(self, entry: QueuedSequence, used: Iterable[tuple[QueuedSequence, int]], total: int) -> int:
        """Of `total` rows, or tokens, how many may be in use once `entry` has got its own; `used` says by whom."""
        return total

    def lane(self, entry: QueuedSequence) -> str:
        """Sequences of one lane are admitted in order; one that has to wait does not hold up other lanes."""
        return ""

    def check(self, params: SchedulingParams) -> None:
        """Raise ConfigError for parameters that make no sense under this policy."""
        if params.sla_class is not None:
            raise reject("sla_class", params.sla_class, "None, except under the sla policy")


class FCFSPolicy(SchedulingPolicy):
    """First come, first served. Nobody starves."""

    def key(self, entry: QueuedSequence) -> Key:
        return entry.order


class PriorityPolicy(SchedulingPolicy):
    """Lower `priority` first; a more urgent request displaces a running one. The least urgent may starve."""

    def key(self, entry: QueuedSequence) -> Key:
        return (entry.params.priority, *entry.order)

    def may_displace(self, waiting: QueuedSequence, victim: QueuedSequence) -> bool:
        return waiting.params.priority < victim.params.priority


class AgeingPolicy(SchedulingPolicy):
    """Priority, but every `interval_s` seconds of waiting are worth one step of priority: nobody starves."""

    def __init__(self, interval_s: float = 5.0) -> None:
        self.interval_s = interval_s

    def key(self, entry: QueuedSequence) -> Key:
        return (entry.arrival_time + entry.params.priority * self.interval_s, *entry.order)

    def may_displace(self, waiting: QueuedSequence, victim: QueuedSequence) -> bool:
        return waiting.params.priority < victim.params.priority and self.key(waiting) < self.key(victim)


class ShortestJobFirstPolicy(SchedulingPolicy):
    """Least work first, by the output length that requests ask for. Their real length nobody knows in advance."""

    def key(self, entry: QueuedSequence) -> Key:
        sequence = entry.sequence
        max_tokens = entry.request.sampling_params.max_tokens
        return (float("inf") if max_tokens is None else sequence.num_prompt_tokens + max_tokens, *entry.order)


class ShortestFirstPolicy(SchedulingPolicy):
    """The least left to compute goes first, aged by work: nobody starves.

    A sequence with n tokens to compute is overtaken by at most `patience` * n tokens of others' work. Time is counted
    in tokens, so the same patience means the same on any machine.
    """

    def __init__(self, patience: float = 8.0) -> None:
        self.patience = patience

    def key(self, entry: QueuedSequence) -> Key:
        left = entry.sequence.num_tokens - entry.sequence.num_computed_tokens
        return (entry.work_before + self.patience * left, *entry.order)


class RoundRobinPolicy(SchedulingPolicy):
    """After `quantum` tokens a sequence may be sent to the end of the queue. Each switch costs a recompute.

    New requests join at the end as well, so that a turn comes round for everybody, however many arrive.
    """

    def __init__(self, quantum: int = 32) -> None:
        self.quantum = quantum

    def key(self, entry: QueuedSequence) -> Key:
        return (entry.queue_number, *entry.order)

    def may_displace(self, waiting: QueuedSequence, victim: QueuedSequence) -> bool:
        return victim.tokens_this_turn >= self.quantum


@dataclass(frozen=True)
class SLAClass:
    """A class of service: rank (its position), and the share of rows and tokens kept free for it."""

    name: str
    reserved: float


class SLAPolicy(SchedulingPolicy):
    """Classes in order of rank; each may keep a share of every budget that others cannot use."""

    def __init__(self, classes: Iterable[SLAClass]) -> None:
        self.classes = {c.name: c for c in classes}
        self.rank = {name: i for i, name in enumerate(self.classes)}

    def key(self, entry: QueuedSequence) -> Key:
        return (self.rank[self.class_of(entry)], *entry.order)

    def class_of(self, entry: QueuedSequence) -> str:
        """The entry's class; requests that name none are of the last."""
        return entry.params.sla_class or list(self.classes)[-1]

    def lane(self, entry: QueuedSequence) -> str:
        """Each class has its own, so that a class can use what is reserved for it while a higher one waits."""
        return self.class_of(entry)

    def share(self, entry: QueuedSequence, used: Iterable[tuple[QueuedSequence, int]], total: int) -> int:
        """`total` less what other classes have reserved and do not use."""
        by_class = dict.fromkeys(self.classes, 0)
        for other, amount in used:
            by_class[self.class_of(other)] += amount
        mine = self.class_of(entry)
        kept = sum(max(0, int(c.reserved * total) - by_class[name]) for name, c in self.classes.items() if name != mine)
        return total - kept

    def check(self, params: SchedulingParams) -> None:
        if params.sla_class is not None and params.sla_class not in self.classes:
            raise reject("sla_class", params.sla_class, ", ".join(self.classes))


def with_number(name: str, unit: str, default: float, policy: Callable[[float], SchedulingPolicy],
                 ) -> Callable[[str], SchedulingPolicy]:
    """A policy with one finite number above 0: `name:unit`."""
    def make(text: str) -> SchedulingPolicy:
        try:
            number = float(text or default)
        except ValueError:
            raise reject("policy", f"{name}:{text}", f"{name}:{unit}") from None
        if not 0 < number < float("inf"):
            raise reject("policy", f"{name}:{text}", f"{name}:{unit}, above 0")
        return policy(number)
    return make


def _round_robin(text: str) -> RoundRobinPolicy:
    try:
        quantum = int(text or 32)
        check_int("quantum", quantum, 1)
    except ValueError:
        raise reject("policy", f"round-robin:{text}", "round-robin:TOKENS, an integer >= 1") from None
    return RoundRobinPolicy(quantum)


def _sla(text: str) -> SLAPolicy:
    """`interactive=0.5,batch=0`: names in order of rank, each with the share reserved for it."""
    classes: list[SLAClass] = []
    for part in (text or "interactive=0.25,batch=0").split(","):
        name, _, share = part.partition("=")
        try:
            classes.append(SLAClass(name.strip(), float(share or 0)))
        except ValueError:
            raise reject("policy", f"sla:{text}", "sla:NAME=SHARE,NAME=SHARE") from None
    total = sum(c.reserved for c in classes)
    if len({c.name for c in classes} - {""}) != len(classes) or not all(c.reserved >= 0 for c in classes) or total >= 1:
        raise reject("policy", f"sla:{text}", "classes with names of their own and shares >= 0 that sum to less than 1")
    return SLAPolicy(classes)


def _plain(name: str, policy: Callable[[], SchedulingPolicy]) -> Callable[[str], SchedulingPolicy]:
    def make(text: str) -> SchedulingPolicy:
        if text:
            raise reject("policy", f"{name}:{text}", f"{name}, which takes no parameter")
        return policy()
    return make


POLICIES: dict[str, Callable[[str], SchedulingPolicy]] = {
    "fcfs": _plain("fcfs", FCFSPolicy),
    "priority": _plain("priority", PriorityPolicy),
    "ageing": with_number("ageing", "SECONDS", 5.0, AgeingPolicy),
    "shortest-first": with_number("shortest-first", "PATIENCE", 8.0, ShortestFirstPolicy),
    "sjf": _plain("sjf", ShortestJobFirstPolicy),
    "round-robin": _round_robin,
    "sla": _sla,
}


def make_policy(text: str, policies: Mapping[str, Callable[[str], SchedulingPolicy]] = POLICIES) -> SchedulingPolicy:
    """`fcfs`, `ageing:5`, `sla:interactive=0.5,batch=0`, ... -> the policy. Raises ConfigError for any other."""
    name, _, parameter = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name not in policies:
        raise reject("policy", text, ", ".join(policies))
    return policies[name](parameter)
