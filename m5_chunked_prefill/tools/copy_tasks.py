"""Prompts whose answers repeat much of them, and one whose answer does not. Every seed gives other contents.

  quote    notes, to be repeated word for word
  code     a class, to be written out again with one name changed
  json     records in prose, to be given as JSON with the same keys again and again
  story    nothing to copy: what speculation must not slow down
"""
from __future__ import annotations

import random
from collections.abc import Callable

_NAMES = ("Ada", "Bela", "Chen", "Dina", "Emil", "Fatou", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Mara", "Nils")
_TOWNS = ("Lisbon", "Oslo", "Kyoto", "Cusco", "Riga", "Dakar", "Turin", "Ghent", "Split", "Pune", "Quito", "Tartu")
_THINGS = ("turbine", "ledger", "harbour", "orchard", "signal", "archive", "market", "tunnel", "kiln", "bridge")
_VERBS = ("inspected", "repaired", "sold", "opened", "measured", "painted", "closed", "moved")


def quote(rng: random.Random) -> str:
    notes = " ".join(f"On day {rng.randint(1, 28)} {rng.choice(_NAMES)} {rng.choice(_VERBS)} the {rng.choice(_THINGS)} "
                     f"near {rng.choice(_TOWNS)} for {rng.randint(100, 999)} crowns." for _ in range(8))
    return f"Repeat the following notes word for word, and add nothing.\n\n{notes}"


def code(rng: random.Random) -> str:
    fields = rng.sample(_THINGS, 6)
    new = rng.choice([n for n in _THINGS if n not in fields])
    body = "\n".join(f"    def get_{f}(self):\n        return self.{f} * {rng.randint(2, 9)}\n" for f in fields)
    init = "\n".join(f"        self.{f} = {f}" for f in fields)
    source = f"class Store:\n    def __init__(self, {', '.join(fields)}):\n{init}\n\n{body}"
    return (f"Write this Python class again with `{fields[0]}` renamed to `{new}`. Answer with the whole code only."
            f"\n\n```python\n{source}```")


def records(rng: random.Random) -> str:
    people = "\n".join(f"{rng.choice(_NAMES)} lives in {rng.choice(_TOWNS)}, is {rng.randint(20, 79)} years old and "
                       f"works at the {rng.choice(_THINGS)}." for _ in range(8))
    first = '[{"name": "Zoe", "city": "Bern", "age": 30, "work_place": "library"},'
    return ("Give these people as a JSON list with the keys name, city, age and work_place. It begins with:\n"
            f"{first}\n\n{people}")


def story(rng: random.Random) -> str:
    return (f"Tell a story about {rng.choice(_NAMES)}, who found a {rng.choice(_THINGS)} in {rng.choice(_TOWNS)} and "
            f"{rng.choice(_VERBS)} it at night.")


TASKS: dict[str, Callable[[random.Random], str]] = {"quote": quote, "code": code, "json": records, "story": story}


def prompts(task: str, number: int, seed: int) -> list[str]:
    """So many prompts of a task, all of them different."""
    return [TASKS[task](random.Random(f"{task} {seed} {i}")) for i in range(number)]
