"""Tasks whose answers repeat much of the prompt, and one whose answer does not. Every seed gives other contents.

  quote    notes, to be repeated word for word
  code     a class, to be written out again with one name changed
  json     records in prose, to be given as JSON with the same keys again and again
  story    nothing to copy: what speculation must not slow down
  hostile  the same, behind many short pieces of text that stories use as well, each followed by something else

A small model does not always do as it is told, so the answers of `code` and `json` are begun for it.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from m0_basics.loading.tokenizer import Tokenizer

_NAMES = ("Ada", "Bela", "Chen", "Dina", "Emil", "Fatou", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Mara", "Nils")
_TOWNS = ("Lisbon", "Oslo", "Kyoto", "Cusco", "Riga", "Dakar", "Turin", "Ghent", "Split", "Pune", "Quito", "Tartu")
_THINGS = ("turbine", "ledger", "harbour", "orchard", "signal", "archive", "market", "tunnel", "kiln", "bridge")
_VERBS = ("inspected", "repaired", "sold", "opened", "measured", "painted", "closed", "moved")


class Task(NamedTuple):
    """What the user asks for, and how the answer begins."""

    prompt: str
    begun: str = ""

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The chat, up to where the model goes on."""
        text = tokenizer.apply_chat_template([{"role": "user", "content": self.prompt}])
        return tokenizer.encode(text + self.begun, add_special_tokens=False)


def quote(rng: random.Random) -> Task:
    notes = " ".join(f"On day {rng.randint(1, 28)} {rng.choice(_NAMES)} {rng.choice(_VERBS)} the {rng.choice(_THINGS)} "
                     f"near {rng.choice(_TOWNS)} for {rng.randint(100, 999)} crowns." for _ in range(8))
    return Task(f"Repeat the following notes word for word, and add nothing.\n\n{notes}")


def code(rng: random.Random) -> Task:
    fields = rng.sample(_THINGS, 6)
    new = rng.choice([n for n in _THINGS if n not in fields])
    factors = [rng.randint(2, 9) for _ in fields]

    def method(name: str, factor: int) -> str:
        return f"    def get_{name}(self):\n        return self.{name} * {factor}\n"

    def top(names: list[str]) -> str:
        init = "\n".join(f"        self.{name} = {name}" for name in names)
        return f"```python\nclass Store:\n    def __init__(self, {', '.join(names)}):\n{init}\n\n"

    source = top(fields) + "\n".join(map(method, fields, factors)) + "```"
    renamed = [new, *fields[1:]]
    return Task(f"Write this Python class again with `{fields[0]}` renamed to `{new}`. Answer with the whole code only."
                f"\n\n{source}", top(renamed) + "\n".join(map(method, renamed[:2], factors)) + "\n    def get_")


def records(rng: random.Random) -> Task:
    people = [(rng.choice(_NAMES), rng.choice(_TOWNS), rng.randint(20, 79), rng.choice(_THINGS)) for _ in range(8)]
    prose = "\n".join(f"{name} lives in {town}, is {age} years old and works at the {place}."
                      for name, town, age, place in people)
    begun = "".join(f'  {{"name": "{name}", "city": "{town}", "age": {age}, "work_place": "{place}"}},\n'
                    for name, town, age, place in people[:2])
    return Task(f"Give these people as a JSON list with the keys name, city, age and work_place.\n\n{prose}",
                f"[\n{begun}  {{\"name\": \"")


def story(rng: random.Random) -> Task:
    return Task(f"Tell a story about {rng.choice(_NAMES)}, who found a {rng.choice(_THINGS)} in {rng.choice(_TOWNS)} "
                f"and {rng.choice(_VERBS)} it at night.")


def hostile(rng: random.Random) -> Task:
    pieces = ("in the", "of the", "and the", "to the", "with a", "it was", "on the", "from the", "had been", "it is")
    noise = ", ".join(f"{rng.choice(pieces)} {rng.choice(_THINGS + _TOWNS)}" for _ in range(60))
    return Task(f"Here are some words: {noise}.\n\n{story(rng).prompt}")


TASKS: dict[str, Callable[[random.Random], Task]] = {
    "quote": quote, "code": code, "json": records, "story": story, "hostile": hostile}


def tasks(kind: str, number: int, seed: int) -> list[Task]:
    """So many tasks of a kind, all of them different."""
    return [TASKS[kind](random.Random(f"{kind} {seed} {i}")) for i in range(number)]
