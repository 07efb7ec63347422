"""A soak test: a real server, many clients, some of them rude, and a look at what is left at the end.

Clients complete requests (streamed or not), hang up in the middle, or send what is no valid request. Every greedy
answer has to equal the offline engine's. At the end nothing may wait or run, the cache has to be empty, and the
server must not have grown.
"""
from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from m0_basics.base_llm import BaseLLM
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench.report import BenchReport
from m0_basics.tools.divergence import DEFAULT_PROMPTS

from .soak_clients import ACTIONS, MODEL, SYNC_ACTIONS, Expected, Tally, run_client, run_sync_client, total
from .soak_server import GAUGES, ServerProcess

_LENGTHS = (1, 4, 16, 48)           # max_tokens of the requests
_SYNC_CLIENTS = 2                   # in threads, beside those in coroutines
_GROWTH = 1.10                      # of resident memory, from the first third of the run to its end


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
        found += [f"{name} is not in /metrics" for name in GAUGES if name not in self.gauges_at_end]
        if self.rss_end > self.rss_early * _GROWTH:
            found.append(f"memory grew from {self.rss_early:.0f} to {self.rss_end:.0f} MiB")
        found += [f"the server ended with status {self.exit_status}"] if self.exit_status else []
        found += [f"no client did {action}" for action in (*ACTIONS, *SYNC_ACTIONS) if not self.counts.get(action)]
        return found


def run_soak(llm_class: type[BaseLLM], engine_options: Mapping[str, Any], clients: int, seconds: float,
             output_dir: Path) -> bool:
    """Run, print a summary, write soak.json; return whether everything held. float32 unless the options say else.

    The model needs a chat template. `clients` run as coroutines; a few more, with a synchronous client, in threads.
    """
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


def offline_answers(llm_class: type[BaseLLM], options: Mapping[str, Any]) -> list[Expected]:
    """Every prompt at every length, greedy, as it is and as a chat. The engine is dropped: the server has its own."""
    make: Any = llm_class
    llm: BaseLLM = make(**options)
    requests = [(prompt, length) for prompt in DEFAULT_PROMPTS for length in _LENGTHS]
    params = [SamplingParams(temperature=0, max_tokens=length) for _, length in requests]
    completions = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    chats = llm.chat([[{"role": "user", "content": prompt}] for prompt, _ in requests], params, use_tqdm=False)
    return [Expected(prompt, is_chat, length, o.outputs[0].text, len(o.outputs[0].token_ids))
            for is_chat, outputs in ((False, completions), (True, chats))
            for (prompt, length), o in zip(requests, outputs, strict=True)]


async def _drive(server: ServerProcess, expected: list[Expected], clients: int,
                 seconds: float) -> tuple[Tally, float]:
    """All clients until the time is up and their last requests are answered.

    And the server's memory after a third of the time, or when every client has done all that it does, if that is later.
    """
    deadline = time.monotonic() + seconds
    rounds = [asyncio.Event() for _ in range(clients)]
    running = asyncio.gather(
        *(run_client(server.url, number, deadline, expected, rounds[number].set) for number in range(clients)),
        *(asyncio.to_thread(run_sync_client, server.url, number, deadline, expected)
          for number in range(_SYNC_CLIENTS)))
    early = asyncio.gather(asyncio.sleep(seconds / 3), *(done.wait() for done in rounds))
    await asyncio.wait((early, running), return_when=asyncio.FIRST_COMPLETED)       # a client that raises does no round
    early.cancel()
    rss = server.rss_mib()
    return total(await running), rss


def _print(result: Soak) -> None:
    counts = ", ".join(f"{result.counts.get(action, 0)} {action}" for action in (*ACTIONS, *SYNC_ACTIONS))
    typer.echo(f"{sum(result.counts.values())} requests ({counts}), {result.output_tokens} tokens in answers that were "
               f"compared; memory {result.rss_early:.0f} -> {result.rss_end:.0f} MiB")
    for complaint in result.complaints:
        typer.secho(f"  {complaint}", fg="red")
    typer.secho("failed" if result.complaints else "passed", fg="red" if result.complaints else "green")
