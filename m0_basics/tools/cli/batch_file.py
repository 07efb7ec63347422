"""A file of prompts in, a file of results out. A bad line is named and skipped; what cannot be written is printed."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError, reject
from m0_basics.outputs import RequestOutput
from m0_basics.request import Logprob, RequestMetrics
from m0_basics.sampling_params import SamplingParams


@dataclass(frozen=True)
class Job:
    """One good line."""

    line: int
    prompt: Any
    params: SamplingParams
    is_chat: bool = False


def run_batch_file(make_llm: Callable[[], BaseLLM], source: Path, target: Path | None,
                   defaults: dict[str, Any]) -> int:
    """Run every line of `source`; write one JSON object a line to `target` (or stdout). Return the bad lines' number.

    A line is a prompt, or, in a .jsonl file, an object with `prompt`, `prompt_token_ids` or `messages` and any
    sampling parameters. Blank lines are passed over. Raises ConfigError before anything is run where `source`
    cannot be read or `target` cannot be written.
    """
    lines = read_lines(source)
    if target is not None and target.exists() and target.samefile(source):
        raise reject("output", str(target), "another file than the prompts")
    if target is not None:
        check_writable(target)
    SamplingParams.from_options(**defaults)
    jobs, results = list[Job](), dict[int, dict[str, Any]]()
    for number, text in lines:
        try:
            jobs.append(parse_line(number, text, source.suffix == ".jsonl", defaults))
        except ConfigError as error:
            results[number] = {"line": number, "error": str(error)}
    if jobs:
        llm = make_llm()
        ready = []
        for job in jobs:
            try:
                ready.append((job, _as_prompt(llm, job)))
            except ConfigError as error:
                results[job.line] = {"line": job.line, "error": str(error)}
        outputs = llm.generate([prompt for _, prompt in ready], [job.params for job, _ in ready])
        for (job, _), output in zip(ready, outputs, strict=True):
            results[job.line] = {"line": job.line, **describe(output)}
    bad = [r for r in results.values() if "error" in r]
    for r in sorted(bad, key=lambda r: r["line"]):
        typer.secho(f"error: {source}, line {r['line']}: {r['error']}", fg="red", err=True)
    _write([results[number] for number in sorted(results)], target)
    return len(bad)


def _as_prompt(llm: BaseLLM, job: Job) -> dict[str, Any]:
    """Tokenise and check one job, so that a bad one is found before any is run."""
    prompt, special = job.prompt, True
    if job.is_chat:
        prompt, special = llm.get_tokenizer().apply_chat_template(job.prompt), False
    request = llm.input_processor.process(prompt, job.params, add_special_tokens=special)
    llm.engine.check_request(request)
    return {"prompt": request.prompt, "prompt_token_ids": request.prompt_token_ids}


def read_lines(source: Path) -> list[tuple[int, str]]:
    """(number, text) of each line that is not blank, from 1 on. Bytes that are no UTF-8 spoil their line only."""
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ConfigError(f"prompts_file={str(source)!r} cannot be read: {error.strerror}") from error
    lines = enumerate(data.split(b"\n"), start=1)
    return [(i, line.decode("utf-8", "surrogateescape").rstrip("\r")) for i, line in lines if line.strip()]


def check_writable(target: Path) -> None:
    """Raise ConfigError unless `target` can be written; what it holds stays."""
    try:
        with target.open("a"):
            pass
    except OSError as error:
        raise ConfigError(f"output={str(target)!r} cannot be written: {error.strerror}; nothing was run") from error


def parse_line(number: int, text: str, is_json: bool, defaults: dict[str, Any]) -> Job:
    """One line -> a job. Raises ConfigError saying what is wrong with it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("it is not valid UTF-8") from error
    if not is_json:
        return Job(number, text, SamplingParams.from_options(**defaults))
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"it is not JSON: {error}") from error
    if isinstance(data, str):
        data = {"prompt": data}
    kinds = ("prompt", "prompt_token_ids", "messages")
    if not isinstance(data, dict) or sum(kind in data for kind in kinds) != 1:
        raise ConfigError(f"it is not valid; allowed: an object with one of {', '.join(kinds)}")
    kind = next(k for k in kinds if k in data)
    prompt = data.pop(kind)
    if isinstance(bias := data.get("logit_bias"), dict):
        # JSON has text for keys; what is no number is left for the check to name.
        data["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in bias.items()}
    params = SamplingParams.from_options(**(defaults | data))
    if kind == "messages":
        return Job(number, prompt, params, is_chat=True)
    return Job(number, {kind: prompt}, params)


def describe(output: RequestOutput) -> dict[str, Any]:
    """The JSON form of a result: outputs, the log-probabilities that were asked for, and times in milliseconds."""
    outputs = []
    for o in output.outputs:
        entry: dict[str, Any] = {"text": o.text, "token_ids": o.token_ids, "finish_reason": o.finish_reason,
                                 "stop_reason": o.stop_reason}
        if o.logprobs is not None:
            entry |= {"cumulative_logprob": o.cumulative_logprob,
                      "logprobs": [_logprobs(step) for step in o.logprobs]}
        outputs.append(entry)
    result: dict[str, Any] = {"prompt": output.prompt, "num_prompt_tokens": len(output.prompt_token_ids),
                              "outputs": outputs}
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = [step and _logprobs(step) for step in output.prompt_logprobs]
    if output.metrics is not None and output.metrics.finished_time is not None:
        result["metrics"] = _metrics(output, output.metrics, output.metrics.finished_time)
    return result


def _metrics(output: RequestOutput, metrics: RequestMetrics, finished: float) -> dict[str, float | None]:
    from ..bench.metrics import RequestRecord  # here, so that other commands start without the harness
    record = RequestRecord(metrics.arrival_time, tuple(metrics.token_times), finished, len(output.prompt_token_ids),
                           tuple(len(o.token_ids) for o in output.outputs))
    times = {"ttft_ms": record.ttft, "tpot_ms": record.tpot, "e2el_ms": record.latency}
    return {name: None if seconds is None else seconds * 1e3 for name, seconds in times.items()}


def _logprobs(step: dict[int, Logprob]) -> dict[int, dict[str, Any]]:
    return {token_id: {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token_id, entry in step.items()}


def _write(results: list[dict[str, Any]], target: Path | None) -> None:
    def rows() -> Iterator[str]:
        return (json.dumps(r, ensure_ascii=False) + "\n" for r in results)

    if target is not None:
        try:
            with target.open("w", encoding="utf-8") as file:
                file.writelines(rows())
            return
        except OSError as error:
            typer.secho(f"error: output={str(target)!r} cannot be written: {error.strerror}; the results follow on "
                        "standard output", fg="red", err=True)
    sys.stdout.writelines(rows())
    sys.stdout.flush()
    if target is not None:
        raise typer.Exit(1)
