"""The idea of this milestone: the batch is made anew before every step.

All that a request needs is its cache and its newest token. So it may join between any two steps and leave after any,
and the row that it leaves is another's at once. The tokens of a step lie one behind the other, without padding; one
line keeps the requests apart:  visible(i, j) = same request and position(j) <= position(i)

T tokens of the step, S keys of all its requests, E size of a vector. Run me: python m2_continuous_batching/idea.py
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

VOCAB, E = 50, 16


@dataclass
class Request:
    name: str
    ids: list[int]                  # the prompt, then what was generated
    length: int                     # it is done when it has so many tokens
    kv: Tensor = field(default_factory=lambda: torch.empty(0, 2, E))        # its cache: keys and values of what has run


def attend(q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Request b runs its tokens spans[b] = (start, end): q [T, E] of those of all, k, v [S, E] up to them -> [T, E]."""
    tokens = torch.tensor([(b, i) for b, span in enumerate(spans) for i in range(*span)])
    keys = torch.tensor([(b, i) for b, (_, end) in enumerate(spans) for i in range(end)])
    visible = (tokens[:, None, 0] == keys[:, 0]) & (keys[:, 1] <= tokens[:, None, 1])           # [T, S]
    return (q @ k.T / E ** 0.5).masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v


def step(batch: list[Request], model: dict[str, Tensor]) -> None:
    """Run what is new of each request, all in one: a whole prompt, or the newest token. Each gets one token more."""
    spans = [(len(r.kv), len(r.ids)) for r in batch]
    counts = [end - start for start, end in spans]
    x = model["embedding"][[i for r in batch for i in r.ids[len(r.kv):]]]       # [T, E]
    q, k, v = (x @ model["qkv"]).view(-1, 3, E).unbind(1)                       # each weight is read once, for all
    for r, kv in zip(batch, torch.stack((k, v), dim=1).split(counts), strict=True):
        r.kv = torch.cat((r.kv, kv))
    keys, values = torch.cat([r.kv for r in batch]).unbind(1)
    x = x + attend(q, keys, values, spans)
    newest = torch.tensor(counts).cumsum(0) - 1
    for r, token in zip(batch, (x[newest] @ model["head"]).argmax(dim=-1), strict=True):
        r.ids.append(int(token))


def run(waiting: list[Request], max_num_seqs: int, model: dict[str, Tensor], static: bool = False) -> list[list[str]]:
    """Run all requests, at most `max_num_seqs` at a time -> who ran in each step. Static: nobody joins a batch."""
    running, steps = list[Request](), list[list[str]]()
    while waiting or running:
        room = 0 if static and running else max_num_seqs - len(running)
        joining, waiting = waiting[:room], waiting[room:]
        running += joining
        batch = joining or running              # prompts have a step of their own, as in this milestone's engine
        step(batch, model)
        steps.append([r.name for r in batch])
        running = [r for r in running if len(r.ids) < r.length]
    return steps


if __name__ == "__main__":
    torch.manual_seed(0)
    model = {"embedding": torch.randn(VOCAB, E), "qkv": torch.randn(E, 3 * E), "head": torch.randn(E, VOCAB)}
    outputs = {"A": 5, "B": 17, "C": 3, "D": 12, "E": 5, "F": 9, "G": 2, "H": 6}

    def requests() -> list[Request]:
        return [Request(name, list(range(i, 2 * i + 3)), i + 3 + n) for i, (name, n) in enumerate(outputs.items())]

    together, batches, alone = requests(), requests(), requests()
    steps, one_by_one = run(together, 3, model), run(alone, 1, model)
    static = run(batches, 3, model, static=True)
    for r in together:
        ran = [i for i, names in enumerate(steps) if r.name in names]
        print(r.name, " ".join("P" if i == ran[0] else r.name.lower() if i in ran else "." for i in range(len(steps))))
    assert [r.ids for r in together] == [r.ids for r in batches] == [r.ids for r in alone]
    assert len(steps) < len(static) < len(one_by_one) == 59
    print(f"P: its prompt. {len(steps)} steps, in static batches {len(static)}, one by one 59; same tokens")
