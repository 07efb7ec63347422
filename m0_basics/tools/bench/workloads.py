"""Named workloads: what every engine, and every peer, is given to do.

A workload is token ids in, a fixed number of tokens out, and the time at which each request arrives. Lengths
are fixed in advance (greedy, the end-of-sequence token ignored), so that all engines do the same work and no
tokenizer is involved. The same name and parameters always give the same requests, on every machine.
"""
from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, get_type_hints

from m0_basics.config import ConfigError, reject

_FIRST_TOKEN = 100          # ids below are special tokens in most vocabularies


@dataclass(frozen=True)
class BenchRequest:
    """One prompt, the exact number of tokens to generate, and when it arrives (seconds after the start)."""

    prompt_token_ids: tuple[int, ...]
    output_len: int
    arrival_time: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival."""

    name: str
    requests: tuple[BenchRequest, ...]
    description: str = ""

    def __post_init__(self) -> None:
        if not self.requests:
            raise reject("workload", self.name, "at least one request")
        arrivals = [r.arrival_time for r in self.requests]
        if arrivals != sorted(arrivals):
            raise reject("workload", self.name, "requests in the order of their arrival times")

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(r.prompt_token_ids) for r in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(r.output_len for r in self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(r.prompt_token_ids) + r.output_len for r in self.requests)

    def summary(self) -> dict[str, Any]:
        """What a result file says about the workload."""
        return {"name": self.name, "description": self.description, "num_requests": len(self.requests),
                "num_prompt_tokens": self.num_prompt_tokens, "num_output_tokens": self.num_output_tokens}

    def warm_up(self) -> Workload:
        """A small taste of the same lengths: two requests, at most four tokens each, arriving at once."""
        few = [replace(r, output_len=min(r.output_len, 4), arrival_time=0.0) for r in self.requests[:2]]
        return Workload(f"{self.name} (warm-up)", tuple(few))

    def fit_vocabulary(self, vocab_size: int) -> Workload:
        """The same lengths for a model with fewer tokens: ids that it lacks are folded into its vocabulary."""
        if all(max(r.prompt_token_ids) < vocab_size for r in self.requests):
            return self
        folded = [replace(r, prompt_token_ids=tuple(i % vocab_size for i in r.prompt_token_ids))
                  for r in self.requests]
        return Workload(f"{self.name} (ids mod {vocab_size})", tuple(folded), self.description)


def ragged(num_requests: int = 64, seed: int = 0, vocab_size: int = 49_000, prompt_min: int = 16,
           prompt_max: int = 256, output_min: int = 16, output_max: int = 128) -> Workload:
    """Random token ids, prompt and output lengths uniform: the work that batches badly when padded."""
    rng = random.Random(seed)
    requests = []
    for _ in range(num_requests):
        # The order of the draws is part of the definition: the prompt's length, its ids, the output's length.
        length = rng.randint(prompt_min, prompt_max)
        ids = tuple(rng.randrange(_FIRST_TOKEN, vocab_size) for _ in range(length))
        requests.append(BenchRequest(ids, rng.randint(output_min, output_max)))
    return Workload("ragged", tuple(requests), f"prompts of {prompt_min} to {prompt_max} tokens, outputs of "
                                               f"{output_min} to {output_max}")


def single(output_len: int = 64, seed: int = 0, vocab_size: int = 49_000) -> Workload:
    """The first request of `ragged`, alone: latency, where nothing can be batched."""
    first = ragged(1, seed, vocab_size).requests[0]
    return Workload("single", (replace(first, output_len=output_len),), "one request")


def decode(output_len: int = 256, prompt_len: int = 16, seed: int = 0, vocab_size: int = 49_000) -> Workload:
    """One short prompt and a long output: the cost of a token against the length of its sequence."""
    rng = random.Random(seed)
    ids = tuple(rng.randrange(_FIRST_TOKEN, vocab_size) for _ in range(prompt_len))
    return Workload("decode", (BenchRequest(ids, output_len),), "one short prompt, a long output")


def equal(num_requests: int = 32, prompt_len: int = 128, output_len: int = 64, seed: int = 0,
          vocab_size: int = 49_000) -> Workload:
    """Equal lengths: padding wastes nothing here, so tricks against padding gain nothing."""
    even = ragged(num_requests, seed, vocab_size, prompt_len, prompt_len, output_len, output_len)
    return Workload("equal", even.requests, f"prompts of {prompt_len} tokens, outputs of {output_len}")


def poisson(num_requests: int = 64, rate: float = 4.0, seed: int = 0, vocab_size: int = 49_000, prompt_min: int = 16,
            prompt_max: int = 256, output_min: int = 16, output_max: int = 128) -> Workload:
    """The requests of `ragged`, arriving as a Poisson process of `rate` requests per second, the first at 0."""
    base = ragged(num_requests, seed, vocab_size, prompt_min, prompt_max, output_min, output_max)
    rng = random.Random(f"arrivals {seed}")         # a stream of its own: the lengths have used Random(seed)
    arrivals = accumulate([0.0, *(rng.expovariate(rate) for _ in range(num_requests - 1))])
    requests = tuple(replace(r, arrival_time=t) for r, t in zip(base.requests, arrivals, strict=True))
    return Workload("poisson", requests, f"{base.description}; {rate:g} arrivals per second")


def mixed(num_streams: int = 8, seed: int = 0, vocab_size: int = 49_000, stream_prompt: int = 32,
          stream_output: int = 320, num_long: int = 4, long_min: int = 512, long_max: int = 6000, long_output: int = 1,
          first: float = 1.0, every: float = 1.5) -> Workload:
    """Streams that decode from the start on, and long prompts that arrive meanwhile, one `every` so many seconds.

    Their lengths grow from `long_min` to `long_max` by equal factors; the first comes at second `first`.
    """
    rng = random.Random(f"mixed {seed}")

    def request(prompt_len: int, output_len: int, arrival: float) -> BenchRequest:
        return BenchRequest(tuple(rng.randrange(_FIRST_TOKEN, vocab_size) for _ in range(prompt_len)), output_len,
                            arrival)

    growth = (long_max / long_min) ** (1 / max(1, num_long - 1))
    streams = [request(stream_prompt, stream_output, 0.0) for _ in range(num_streams)]
    long = [request(round(long_min * growth**i), long_output, first + i * every) for i in range(num_long)]
    return Workload("mixed", (*streams, *long), f"{num_streams} streams; prompts of {long_min} to {long_max} tokens "
                                                "arrive while they decode")


# Family -> its builder, and the parameter that a number behind the name stands for: `ragged-64`, `decode-256`.
FAMILIES: dict[str, tuple[Callable[..., Workload], str]] = {
    "ragged": (ragged, "num_requests"),
    "single": (single, "output_len"),
    "decode": (decode, "output_len"),
    "equal": (equal, "num_requests"),
    "poisson": (poisson, "num_requests"),
    "mixed": (mixed, "num_streams"),
}


def workload_names() -> list[str]:
    """Each family with its default number, as `get_workload` takes it."""
    return [f"{family}-{inspect.signature(build).parameters[number].default}"
            for family, (build, number) in FAMILIES.items()]


def get_workload(text: str, **params: int | float) -> Workload:
    """Build a workload from `family`, `family-N` or `family-N:key=value,key=value`; keywords win over the text.

    Raises ConfigError that lists the names, or the parameters of the family.
    """
    name, _, options = text.partition(":")
    match = re.fullmatch(r"([a-z]+)(?:-(\d+))?", name)
    if match is None or match[1] not in FAMILIES:
        raise reject("workload", text, f"{', '.join(workload_names())} (any number), with parameters as in "
                                       "ragged-64:seed=1,output_max=32")
    build, number = FAMILIES[match[1]]
    given: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise reject("workload parameter", part, "key=value")
        given[key.strip()] = value
    given |= params
    named = {number: match[2]} if match[2] else {}
    types = get_type_hints(build)
    checked = {key: _number(key, value, types.get(key), build) for key, value in (named | given).items()}
    for low, high in (("prompt_min", "prompt_max"), ("output_min", "output_max"), ("long_min", "long_max")):
        bounds = {k: p.default for k, p in inspect.signature(build).parameters.items()} | checked
        if low in bounds and bounds[low] > bounds[high]:
            raise reject(low, bounds[low], f"at most {high}, {bounds[high]}")
    extra = ",".join(f"{key}={checked[key]}" for key in given)
    return replace(build(**checked), name=f"{name}:{extra}" if extra else name)


def _number(key: str, value: Any, kind: Any, build: Callable[..., Workload]) -> int | float:
    if kind not in (int, float):
        known = ", ".join(inspect.signature(build).parameters)
        raise ConfigError(f"unknown parameter {key} of the workload {build.__name__}; it knows: {known}")
    minimum = {"seed": 0, "vocab_size": _FIRST_TOKEN + 1}.get(key, 1)
    try:
        number: int | float = kind(str(value))         # from text, so that 2.5 requests are refused
    except ValueError:
        raise reject(key, value, "an integer" if kind is int else "a number") from None
    if kind is int and number < minimum:
        raise reject(key, number, f"an integer >= {minimum}")
    if kind is float and not 0 < number < float("inf"):
        raise reject(key, number, "a finite number above 0")
    return number
