"""A soak test: a real server, many clients, some of them rude, and a look at what is left at the end.

Clients complete requests (streamed or not), hang up in the middle, or send what is no valid request. Every greedy
answer has to equal the offline engine's. At the end nothing may wait or run, the cache has to be empty, and the
server must not have grown.
"""
from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai
import typer

from m0_basics.bench.report import BenchReport
from m0_basics.divergence import DEFAULT_PROMPTS
from m0_basics.sampling_params import SamplingParams

from .continuous_llm import ContinuousLLM
from .soak_server import ServerProcess

MODEL = "soak"
_LENGTHS = (1, 4, 16, 48)           # max_tokens of the requests
_PATIENCE_S = 600.0                 # a request that takes longer is lost
_GROWTH = 1.10                      # of resident memory, from the first third of the run to its end
# What clients do, and how often. The last two hang up: after some pieces, or while they wait for the whole.
_ACTIONS = {"whole": 35, "stream": 35, "malformed": 10, "leave_stream": 10, "leave_whole": 10}
_MALFORMED: tuple[dict[str, Any], ...] = (
    {"temperature": "hot"}, {"prompt": ""}, {"prompt": [10 ** 9]}, {"unknown_field": 1}, {"max_tokens": -5},
    {"n": 10 ** 6}, {"suffix": "x"}, {"logit_bias": {"word": 1}})


class UnexpectedAnswerError(Exception):
    """The server has accepted what it should have refused."""


@dataclass(frozen=True)
class Expected:
    """One request and the offline engine's answer to it."""

    prompt: str
    max_tokens: int
    text: str
    num_tokens: int


@dataclass
class Tally:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)       # by action, for those that went as they should
    different: list[dict[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lost: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Soak:
    """The result. Memory in MiB."""

    clients: int
    seconds: float
    counts: Mapping[str, int]
    different: list[dict[str, str]]
    errors: list[str]
    lost: int
    output_tokens: int
    rss_early: float
    rss_end: float
    gauges_at_end: Mapping[str, float]
    exit_status: int

    @property
    def complaints(self) -> list[str]:
        """What is wrong; [] is a pass."""
        found = [f"{len(self.different)} answers differ from the offline engine's"] if self.different else []
        found += [f"{len(self.errors)} requests failed, the first: {self.errors[0]}"] if self.errors else []
        found += [f"{self.lost} requests were lost"] if self.lost else []
        found += [f"{name} is {value} at the end" for name, value in self.gauges_at_end.items() if value]
        if self.rss_end > self.rss_early * _GROWTH:
            found.append(f"memory grew from {self.rss_early:.0f} to {self.rss_end:.0f} MiB")
        found += [f"the server ended with status {self.exit_status}"] if self.exit_status else []
        found += [f"no client did {action}" for action in _ACTIONS if not self.counts.get(action)]
        return found


def run_soak(llm_class: type[ContinuousLLM], engine_options: Mapping[str, Any], clients: int, seconds: float,
             output_dir: Path) -> bool:
    """Run, print a summary, write soak.json; return whether everything held. float32 unless the options say else."""
    options = {"dtype": "float32", "max_model_len": 512, **engine_options}
    expected = offline_answers(llm_class, options)
    package = llm_class.__module__.partition(".")[0]
    with ServerProcess(package, options, MODEL) as server:
        typer.echo(f"{clients} clients for {seconds:g} s against {server.url}")
        tally, rss_early = asyncio.run(_drive(server, expected, clients, seconds))
        gauges = server.wait_for_idle()
        rss_end = server.rss_mib()
        status = server.stop()
    result = Soak(clients, seconds, dict(tally.counts), tally.different, tally.errors, tally.lost,
                  tally.output_tokens, rss_early, rss_end, gauges, status)
    report = BenchReport.create(package, options, (), {"soak": asdict(result) | {"complaints": result.complaints}})
    report.save(output_dir / "soak.json")
    _print(result)
    return not result.complaints


def offline_answers(llm_class: type[ContinuousLLM], options: Mapping[str, Any]) -> list[Expected]:
    """Every prompt at every length, greedy. The engine is dropped afterwards: the server has one of its own."""
    make: Any = llm_class
    llm: ContinuousLLM = make(**options)
    requests = [(prompt, length) for prompt in DEFAULT_PROMPTS for length in _LENGTHS]
    params = [SamplingParams(temperature=0, max_tokens=length) for _, length in requests]
    outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    return [Expected(prompt, length, o.outputs[0].text, len(o.outputs[0].token_ids))
            for (prompt, length), o in zip(requests, outputs, strict=True)]


async def _drive(server: ServerProcess, expected: list[Expected], clients: int,
                 seconds: float) -> tuple[Tally, float]:
    """All clients until the time is up and their last requests are answered; and the server's memory after a third."""
    tally, end = Tally(), time.monotonic() + seconds

    async def one(number: int) -> None:
        rng = random.Random(number)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0,
                                      timeout=_PATIENCE_S) as client:
            while time.monotonic() < end:
                [action] = rng.choices(list(_ACTIONS), list(_ACTIONS.values()))
                await _act(client, action, rng, expected, tally)

    running = asyncio.gather(*(one(number) for number in range(clients)))
    await asyncio.sleep(seconds / 3)
    rss = server.rss_mib()
    await running
    return tally, rss


async def _act(client: openai.AsyncOpenAI, action: str, rng: random.Random, expected: list[Expected],
               tally: Tally) -> None:
    """One request of one client, and what came of it."""
    want = rng.choice(expected)
    body: dict[str, Any] = {"model": MODEL, "prompt": want.prompt, "temperature": 0, "max_tokens": want.max_tokens}
    text: str | None = None
    try:
        if action == "malformed":
            await _send_malformed(client, body, rng)
        elif action == "whole":
            answer = await client.completions.create(**body)
            text = answer.choices[0].text
        elif action == "leave_whole":
            await _leave(client, body, rng.uniform(0.0, 0.5))
        else:
            pieces = rng.randint(0, 8) if action == "leave_stream" else None
            read = await _read_stream(client, body, pieces)
            text = read if pieces is None else None
    except openai.APITimeoutError:
        tally.lost += 1
        return
    except (openai.APIError, UnexpectedAnswerError) as error:
        tally.errors.append(f"{action}: {type(error).__name__}: {error}")
        return
    tally.counts[action] += 1
    if text is not None:
        tally.output_tokens += want.num_tokens
        if text != want.text:
            tally.different.append({"prompt": want.prompt, "expected": want.text, "got": text})


async def _read_stream(client: openai.AsyncOpenAI, body: dict[str, Any], pieces: int | None) -> str:
    """The text of the stream, or, given a number, of its first pieces; then the connection is closed."""
    text = ""
    async with aclosing(await client.completions.create(**body, stream=True)) as stream:
        if pieces == 0:
            return text
        async for chunk in stream:
            text += chunk.choices[0].text
            if pieces is not None and (pieces := pieces - 1) <= 0:
                break
    return text


async def _leave(client: openai.AsyncOpenAI, body: dict[str, Any], after_s: float) -> None:
    """Ask for the whole, and hang up if it has not come in time."""
    try:
        async with asyncio.timeout(after_s):
            await client.completions.create(**body)
    except TimeoutError:
        return


async def _send_malformed(client: openai.AsyncOpenAI, body: dict[str, Any], rng: random.Random) -> None:
    """Raises UnexpectedAnswerError unless the server refuses the request."""
    bad = rng.choice(_MALFORMED)
    try:
        await client.completions.create(**body, extra_body=bad)
    except openai.BadRequestError:
        return
    raise UnexpectedAnswerError(f"{bad} was accepted")


def _print(result: Soak) -> None:
    counts = ", ".join(f"{result.counts.get(action, 0)} {action}" for action in _ACTIONS)
    typer.echo(f"{sum(result.counts.values())} requests ({counts}), {result.output_tokens} tokens in answers that were "
               f"compared; memory {result.rss_early:.0f} -> {result.rss_end:.0f} MiB")
    for complaint in result.complaints:
        typer.secho(f"  {complaint}", fg="red")
    typer.secho("failed" if result.complaints else "passed", fg="red" if result.complaints else "green")
