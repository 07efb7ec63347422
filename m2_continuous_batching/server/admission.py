"""How much a request brings, and whether the engine has room for it: counted before anything is tokenised."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from m0_basics.config import ConfigError
from m0_basics.sampling_params import SamplingParams

from .output_stream import OutputStream
from .unavailable import QueueFullError


def is_chat(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)


def num_chars(prompt: Any) -> int:
    """Characters that are to be tokenised, or token ids to be checked; of a chat what its template may print."""
    if is_chat(prompt):
        return sum(len(text) for message in prompt for text in message.values() if isinstance(text, str))
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids") or prompt.get("prompt")
    return len(prompt) if isinstance(prompt, (str, list, tuple)) else 0


def num_chars_within(value: Any, most: int) -> int:
    """Characters of all texts in a JSON value, and one for everything else; no longer counted once above `most`."""
    total, rest = 0, [value]
    while rest and total <= most:
        part = rest.pop()
        total += len(part) if isinstance(part, str) else 1
        if isinstance(part, Mapping):
            rest += [*part, *part.values()]
        elif isinstance(part, (list, tuple)):
            rest += part
    return total


def check_size(num_prompts: int, params: SamplingParams, most: int | None) -> None:
    """Raise ConfigError for a request with more outputs than the `most` that the engine ever holds."""
    num_each = params.best_of or 1
    if most is not None and num_prompts > most:
        raise ConfigError(f"{num_prompts} prompts in one request; allowed: at most {most}, which this server holds")
    if most is not None and num_prompts * num_each > most:
        name = "n" if num_each == params.n else "best_of"
        raise ConfigError(f"{name}={num_each} is not valid for {num_prompts} prompts; allowed: at most {most} outputs, "
                          "which this server holds")


def check_room(new: Iterable[OutputStream], present: Iterable[OutputStream], places: int, waiting: int | None) -> None:
    """Raise QueueFullError where more outputs would wait than `waiting` (None: any number)."""
    if waiting is None:
        return
    num_present = sum(map(_num_unfinished, present))
    if num_present + sum(map(_num_unfinished, new)) > places + waiting:
        raise QueueFullError(f"{num_present} outputs run or wait; allowed: {places} that run and "
                             f"max_queued_requests={waiting} that wait; try again later")


def _num_unfinished(stream: OutputStream) -> int:
    """Outputs of a request that run, wait, or have not parted from the first one yet."""
    request = stream.request
    return (request.sampling_params.best_of or 1) - sum(s.is_finished for s in request.sequences)
