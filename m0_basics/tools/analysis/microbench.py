"""Micro-benchmarks: what lists, tensors, dataclasses, copies and checks cost, in nanoseconds (F0.3, F0.13).

Folklore about Python objects is often wrong, and cheap to test. Each function compares a few ways of doing one
thing. The ways take turns within every round, so that a disturbance hits all of them; the median of the
rounds is reported. One engine step takes milliseconds: compare before optimising.
"""
from __future__ import annotations

import copy
import statistics
import sys
import timeit
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from m0_basics.config import EngineConfig
from m0_basics.request import Sequence, SequenceData, SequenceStatus
from m0_basics.sampling_params import SamplingParams, SamplingType, check_batch

from ..documents.factbook import Fact, merge

Ways = Mapping[str, Callable[[], object] | str]


@dataclass(frozen=True)
class Effort:
    """How carefully to measure: rounds, about how long one sample takes, and what is made of the samples."""

    rounds: int = 9
    sample_seconds: float = 0.02
    reduce: Callable[[list[float]], float] = statistics.median


QUICK = Effort(rounds=4, sample_seconds=0.0002, reduce=min)      # short samples: only the best is undisturbed


def compare(ways: Ways, effort: Effort, per: int = 1, names: dict[str, Any] | None = None) -> dict[str, Fact]:
    """Nanoseconds of one operation, each way: the median of the rounds, divided by `per`, the operations in one run.

    A way is a callable, or a statement over `names` where calling a function would cost more than what is
    measured. The garbage collector is off while a sample runs, as `timeit` has it.
    """
    timers = {name: timeit.Timer(run, globals=names) for name, run in ways.items()}
    number = {}
    for name, timer in timers.items():
        once = max(timer.timeit(1), timer.timeit(1), 1e-9)        # the first call also warms up
        number[name] = max(1, round(effort.sample_seconds / once))
        once = timer.timeit(number[name]) / number[name]          # a second look: one call is a poor estimate
        number[name] = max(1, round(effort.sample_seconds / once))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(effort.rounds):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(number[name]) / number[name])
    return {name: Fact(effort.reduce(times) * 1e9 / per, "ns") for name, times in samples.items()}


def ratio(facts: Mapping[str, Fact], slow: str, fast: str) -> Fact:
    """How many times as long `slow` takes as `fast`."""
    return Fact(float(facts[slow].value) / float(facts[fast].value), "ratio")


class _Plain:
    def __init__(self, token_id: int, logprob: float, rank: int) -> None:
        self.token_id, self.logprob, self.rank = token_id, logprob, rank


@dataclass
class _Data:
    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class _Frozen:
    token_id: int
    logprob: float
    rank: int


@dataclass(slots=True)
class _Slots:
    token_id: int
    logprob: float
    rank: int


def object_styles(effort: Effort) -> dict[str, Fact]:
    """A record of three fields as a plain class, a dataclass (frozen, with slots) and a dict."""
    kinds = {"plain_class": _Plain, "dataclass": _Data, "frozen_dataclass": _Frozen, "slots_dataclass": _Slots}
    objects: dict[str, Any] = {name: kind(7, -0.5, 1) for name, kind in kinds.items()}
    as_dict = {"token_id": 7, "logprob": -0.5, "rank": 1}
    ways = {f"object.create.{name}": f"{kind.__name__}(7, -0.5, 1)" for name, kind in kinds.items()}
    ways["object.create.dict"] = "{'token_id': 7, 'logprob': -0.5, 'rank': 1}"
    ways |= {f"object.read.{name}": f"{name}.token_id" for name in kinds}
    ways["object.read.dict"] = "as_dict['token_id']"
    classes = {kind.__name__: kind for kind in kinds.values()}
    facts = compare(ways, effort, names={**classes, **objects, "as_dict": as_dict})
    data = objects["dataclass"]
    facts["object.bytes.dataclass"] = Fact(sys.getsizeof(data) + sys.getsizeof(vars(data)), "B")
    facts["object.bytes.slots_dataclass"] = Fact(sys.getsizeof(objects["slots_dataclass"]), "B")
    facts["object.bytes.dict"] = Fact(sys.getsizeof(as_dict), "B")
    return facts


class _CachedType:
    """Works the sampling type out once and keeps it."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params

    @cached_property
    def sampling_type(self) -> SamplingType:
        return self.params.sampling_type


def config_validation(effort: Effort) -> dict[str, Fact]:
    """Checking sampling parameters and configurations: always, once, or once for each distinct set (F0.3)."""
    requests = [{"temperature": 0.8, "top_p": 0.95, "max_tokens": 128} for _ in range(256)]
    distinct = [{"temperature": 0.8, "top_p": 0.95, "max_tokens": 128 + i} for i in range(256)]
    shared = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=128)
    cached = _CachedType(shared)
    facts = compare({
        "validate.sampling_params": lambda: SamplingParams(temperature=0.8, top_p=0.95, max_tokens=128),
        "validate.engine_config": lambda: EngineConfig.from_options(max_model_len=1024),
    }, effort)
    facts |= compare({"validate.sampling_type_computed": "shared.sampling_type",
                      "validate.sampling_type_cached": "cached.sampling_type"},
                     effort, names={"shared": shared, "cached": cached})
    facts |= compare({
        "validate.one_by_one_per_request": lambda: [SamplingParams.from_options(**r) for r in requests],
        "validate.check_batch_alike_per_request": lambda: check_batch(requests),
        "validate.check_batch_distinct_per_request": lambda: check_batch(distinct),
        "validate.shared_object_per_request": lambda: [shared for _ in requests],
    }, effort, per=len(requests))
    facts["validate.check_batch_gain"] = ratio(facts, "validate.one_by_one_per_request",
                                               "validate.check_batch_alike_per_request")
    return facts


def token_growth(effort: Effort, length: int = 512) -> dict[str, Fact]:
    """Growing an output by `length` tokens, one at a time; ns per token."""
    def append() -> None:
        ids: list[int] = []
        for i in range(length):
            ids.append(i)               # noqa: PERF402 (one token at a time is the point)

    def concatenate() -> None:
        ids = torch.empty(0, dtype=torch.int64)
        for i in range(length):
            ids = torch.cat((ids, torch.tensor([i])))

    def preallocated() -> None:
        ids = torch.empty(length, dtype=torch.int64)
        for i in range(length):
            ids[i] = i

    facts = compare({f"grow.{length}.list_append": append, f"grow.{length}.torch_cat": concatenate,
                     f"grow.{length}.preallocated_tensor": preallocated}, effort, per=length)
    facts[f"grow.{length}.cat_over_append"] = ratio(facts, f"grow.{length}.torch_cat", f"grow.{length}.list_append")
    facts[f"grow.{length}.preallocated_over_append"] = ratio(facts, f"grow.{length}.preallocated_tensor",
                                                             f"grow.{length}.list_append")
    return facts


def element_access(effort: Effort, length: int = 1024) -> dict[str, Fact]:
    """Reading one element, and going over all of them (ns per element)."""
    ids, tensor = list(range(length)), torch.arange(length)
    middle = length // 2
    facts = compare({"access.list": "ids[middle]", "access.tensor": "tensor[middle]",
                     "access.tensor_item": "tensor[middle].item()"},
                    effort, names={"ids": ids, "tensor": tensor, "middle": middle})
    facts |= compare({"access.iterate_list": lambda: [i for i in ids],                  # noqa: C416
                      "access.iterate_tensor": lambda: [i.item() for i in tensor],
                      "access.iterate_tolist": lambda: [i for i in tensor.tolist()]},   # noqa: C416
                     effort, per=length)
    facts["access.tensor_item_over_list"] = ratio(facts, "access.tensor_item", "access.list")
    return facts


def id_storage(effort: Effort, length: int = 2048) -> dict[str, Fact]:
    """Bytes of `length` token ids, all beyond CPython's cache of small integers. Counted, not timed."""
    del effort
    ids = list(range(1000, 1000 + length))
    return {
        f"storage.{length}.list": Fact(sys.getsizeof(ids) + sum(map(sys.getsizeof, ids)), "B"),
        f"storage.{length}.list_pointers": Fact(sys.getsizeof(ids), "B"),
        f"storage.{length}.array_int32": Fact(sys.getsizeof(array("i", ids)), "B"),
        f"storage.{length}.tensor_int32": Fact(torch.tensor(ids, dtype=torch.int32).nbytes, "B"),
        f"storage.{length}.tensor_int64": Fact(torch.tensor(ids).nbytes, "B"),
    }


def list_to_tensor(effort: Effort) -> dict[str, Fact]:
    """What a step pays to hand its token ids over: a decode batch of 32, a prompt of 2048."""
    facts: dict[str, Fact] = {}
    for length in (32, 2048):
        ids = list(range(1000, 1000 + length))
        flat = array("q", ids)
        facts |= compare({
            f"convert.{length}.list": partial(torch.tensor, ids),
            f"convert.{length}.array": partial(torch.frombuffer, flat, dtype=torch.int64),
            f"convert.{length}.tolist": torch.tensor(ids).tolist,
        }, effort)
    return facts


class _CachedJoin:
    """Keeps prompt and output joined: twice the memory, and each append has to reach both lists."""

    def __init__(self, data: SequenceData) -> None:
        self.data, self.joined = data, data.token_ids

    @property
    def token_ids(self) -> list[int]:
        return self.joined


def joined_ids(effort: Effort, prompt: int = 2048, output: int = 256) -> dict[str, Fact]:
    """Getting the newest token of a long sequence: joining the two lists, slicing across them, a cached join."""
    data = SequenceData(list(range(prompt)), list(range(output)))
    names = {"data": data, "cached": _CachedJoin(data), "length": prompt + output}
    facts = compare({
        "join.token_ids": "data.token_ids[-1:]",
        "join.token_slice_newest": "data.token_slice(length - 1, length)",
        "join.token_slice_chunk_of_512": "data.token_slice(length - 512, length)",
        "join.cached": "cached.token_ids[-1:]",
    }, effort, names=names)
    facts["join.token_ids_over_slice"] = ratio(facts, "join.token_ids", "join.token_slice_newest")
    return facts


class SequencePool:
    """Hands used sequences out again, every field set back by hand: one forgotten leaks a request into the next."""

    def __init__(self) -> None:
        self.free: list[Sequence] = []

    def acquire(self, seq_id: int, prompt: list[int], params: SamplingParams) -> Sequence:
        """A sequence like a new one."""
        if not self.free:
            return Sequence(seq_id, SequenceData(prompt), params, 0)
        sequence = self.free.pop()
        sequence.seq_id, sequence.sampling_params, sequence.seed = seq_id, params, 0
        sequence.data.prompt_token_ids = prompt
        # New lists, not cleared ones: outputs that were handed out may still refer to the old.
        sequence.data.output_token_ids, sequence.logprobs, sequence.prompt_logprobs = [], [], []
        sequence.eos_token_ids, sequence.index, sequence.status = (), 0, SequenceStatus.WAITING
        sequence.num_computed_tokens, sequence.cumulative_logprob = 0, None
        sequence.output_text, sequence.stop_reason = "", None
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Give a finished sequence back."""
        self.free.append(sequence)


def sequence_creation(effort: Effort, count: int = 256, prompt: int = 512) -> dict[str, Fact]:
    """Making `count` sequences over one prompt: anew, from a pool, or as copies; ns per sequence."""
    ids, params, pool = list(range(prompt)), SamplingParams(temperature=0), SequencePool()
    parent = Sequence(0, SequenceData(ids), params, 0)

    def pooled() -> None:
        sequences = [pool.acquire(i, ids, params) for i in range(count)]
        for sequence in sequences:
            pool.release(sequence)

    facts = compare({
        "create.one_by_one": lambda: [Sequence(i, SequenceData(ids), params, 0) for i in range(count)],
        "create.copied_prompt": lambda: [Sequence(i, SequenceData(ids.copy()), params, 0) for i in range(count)],
        "create.pool": pooled,
        "create.bulk_fork": lambda: [parent.fork(i, i) for i in range(count)],
        "create.bulk_shallow_copy": lambda: [copy.copy(parent) for _ in range(count)],
    }, effort, per=count)
    facts["create.one_by_one_over_pool"] = ratio(facts, "create.one_by_one", "create.pool")
    return facts


def fork_cost(effort: Effort, prompt: int = 1024, output: int = 256) -> dict[str, Fact]:
    """One fork of a long sequence: a deep copy, copies of both lists, or the prompt shared."""
    sequence = Sequence(0, SequenceData(list(range(prompt)), list(range(output))), SamplingParams(), 0)
    data = sequence.data
    facts = compare({
        "fork.deepcopy": lambda: copy.deepcopy(sequence),
        "fork.sequence_fork": lambda: sequence.fork(1, 1),
        "fork.data_deepcopy": lambda: copy.deepcopy(data),
        "fork.data_copy_both_lists": lambda: SequenceData(data.prompt_token_ids.copy(), data.output_token_ids.copy()),
        "fork.data_share_prompt": data.copy,
    }, effort)
    facts["fork.deepcopy_over_fork"] = ratio(facts, "fork.deepcopy", "fork.sequence_fork")
    return facts


BENCHMARKS = (object_styles, config_validation, token_growth, element_access, id_storage, list_to_tensor, joined_ids,
              sequence_creation, fork_cost)


def run_all(quick: bool = False) -> dict[str, Fact]:
    """Every micro-benchmark. `quick` runs the same ones with few, short rounds: for tests, not for quoting."""
    effort = QUICK if quick else Effort()
    return merge(*(benchmark(effort) for benchmark in BENCHMARKS))


def format_facts(facts: Mapping[str, Fact]) -> str:
    """One line per fact."""
    width = max(map(len, facts), default=0)
    return "\n".join(f"{name:<{width}}  {fact.value if isinstance(fact.value, str) else f'{fact.value:>12,.4g}'} "
                     f"{fact.unit}" for name, fact in facts.items())


if __name__ == "__main__":
    print(format_facts(run_all()))
