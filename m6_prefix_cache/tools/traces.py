"""Three ways in which prompts share: examples before each question, conversations, and system prompts of many tenants.

  few-shot        a few sets of examples, each followed by questions of its own
  multi-turn      conversations, one turn at a time and in any order; a turn brings all that was said before it
  shared-system   many system prompts, some far more popular than others, each followed by short questions

A visit is a prompt and its answer, in token ids that no tokenizer has to know.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_FIRST, _LAST = 100, 49_000         # token ids


@dataclass(frozen=True)
class Visit:
    """One request of a trace."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    after: int | None = None            # the visit whose answer it takes up


def few_shot(num_visits: int, rng: random.Random) -> list[Visit]:
    sets = [_tokens(rng, rng.randint(300, 900)) for _ in range(12)]
    return [Visit(rng.choice(sets) + _tokens(rng, rng.randint(20, 60)), _tokens(rng, rng.randint(4, 16)))
            for _ in range(num_visits)]


def multi_turn(num_visits: int, rng: random.Random) -> list[Visit]:
    """Of the conversations that are open, one of the newest goes on as a rule; each ends after some turns."""
    system, visits = _tokens(rng, 120), list[Visit]()
    texts: list[tuple[tuple[int, ...], int | None]] = []
    while len(visits) < num_visits:
        if not texts or (len(texts) < 24 and rng.random() < 0.3):
            texts.append((system, None))
        place = len(texts) - 1 - min(int(rng.expovariate(0.2)), len(texts) - 1)
        text, after = texts.pop(place)
        visits.append(Visit(text + _tokens(rng, rng.randint(15, 80)), _tokens(rng, rng.randint(30, 150)), after))
        if rng.random() > 0.15 and len(text) < 1500:
            texts.append((visits[-1].prompt + visits[-1].answer, len(visits) - 1))
    return visits


def shared_system(num_visits: int, rng: random.Random) -> list[Visit]:
    """The popularity of the k-th tenant goes with 1 / k."""
    tenants = [_tokens(rng, rng.randint(200, 1200)) for _ in range(40)]
    weights = [1 / (k + 1) for k in range(len(tenants))]
    return [Visit(rng.choices(tenants, weights)[0] + _tokens(rng, rng.randint(10, 80)),
                  _tokens(rng, rng.randint(10, 60))) for _ in range(num_visits)]


TRACES: dict[str, Callable[[int, random.Random], list[Visit]]] = {
    "few-shot": few_shot, "multi-turn": multi_turn, "shared-system": shared_system}


def make_trace(name: str, num_visits: int, seed: int = 0) -> list[Visit]:
    """The same visits for the same seed."""
    return TRACES[name](num_visits, random.Random(f"{name} {seed}"))


def _tokens(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(_FIRST, _LAST) for _ in range(length))
