"""One engine runs: it is loaded, warmed up, and then has so many seconds for one prompt, and as many for eight.

Each engine has a process to itself while it runs, and the machine to itself; only what is imported by all of them is
shared (a server forks the processes where the platform can). What comes back are `Event`s, as they happen.
"""
from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PROMPT = "Tell a short story about a lighthouse keeper and a lost whale."
SUBJECTS = ("a lighthouse keeper", "a clock that runs backwards", "two rival bakers", "a robot that paints",
            "the last train home", "a talking cat", "a garden on the moon", "a map without names")
SINGLE, EIGHT = "one prompt", "eight at once"
HEATS = (SINGLE, EIGHT)


@dataclass(frozen=True)
class Event:
    """What an engine reports: `kind` is loading, ready, tokens, done or failed."""

    kind: str
    heat: str = ""
    seconds: float = 0.0            # since the heat began
    tokens: int = 0                 # so far in the heat
    text: str = ""                  # of the first prompt so far; the reason of a failure


def milestones(root: Path = ROOT) -> list[str]:
    """The packages that have an engine, in their order."""
    return [file.parent.name for file in sorted(root.glob("m[0-7]_*/llm.py"))]


def race(package: str, seconds: float, options: dict[str, Any]) -> Iterator[Event]:
    """Run one milestone in a process of its own; yield what it reports."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["m0_basics.tools.race.runner", "m0_basics"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(package, seconds, options, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            event: Event = ours.recv()
            yield event
            if event.kind in ("done", "failed"):
                return
    except EOFError:
        yield Event("failed", text="its process ended")
    finally:
        process.terminate()
        process.join()


def _run(package: str, seconds: float, options: dict[str, Any], pipe: Connection) -> None:
    with Path(os.devnull).open("w") as nowhere:         # what libraries say would tear the display apart
        os.dup2(nowhere.fileno(), 2)
    try:
        pipe.send(Event("loading"))
        run_heats(package, seconds, options, pipe.send)
        pipe.send(Event("done"))
    except Exception as error:          # whatever it is, the others still race
        pipe.send(Event("failed", text=f"{type(error).__name__}: {error}"))


def run_heats(package: str, seconds: float, options: dict[str, Any], report: Any) -> None:
    """Load an engine and run both heats, calling `report` with each event."""
    llm = importlib.import_module(package).LLM(**options)
    _heat(llm, _prompts(llm, 2), 0.3, lambda *_: None)              # first calls compile, allocate, page in
    report(Event("ready"))
    for heat, count in ((SINGLE, 1), (EIGHT, 8)):
        _heat(llm, _prompts(llm, count), seconds, lambda at, tokens, text, heat=heat: report(
            Event("tokens", heat, at, tokens, text)))


def _prompts(llm: Any, count: int) -> list[str]:
    texts = [PROMPT, *(f"Tell a short story about {subject}." for subject in SUBJECTS[1:])][:count]
    template = llm.get_tokenizer().apply_chat_template
    return [template([{"role": "user", "content": text}]) for text in texts]


def _heat(llm: Any, prompts: list[str], seconds: float, report: Any) -> None:
    """Add the prompts, and step until the time is up."""
    from m0_basics.sampling_params import SamplingParams
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    requests = [llm.input_processor.process(prompt, params, add_special_tokens=False) for prompt in prompts]
    start = time.perf_counter()
    try:
        for request in requests:
            llm.engine.add_request(request)
        elapsed, told = 0.0, 0.0
        while elapsed < seconds and llm.engine.has_unfinished_requests():
            llm.engine.step()
            elapsed = time.perf_counter() - start
            if elapsed - told > 0.04 or elapsed >= seconds:         # often enough for an eye
                told = elapsed
                ids = requests[0].sequences[0].output_token_ids
                tokens = sum(len(sequence.output_token_ids) for r in requests for sequence in r.sequences)
                report(elapsed, tokens, llm.get_tokenizer().decode(ids, skip_special_tokens=True))
    finally:
        for request in requests:
            llm.engine.abort_request(request.request_id)
