"""A file of prompts in, a file of results out. A bad line is named and skipped; what cannot be written is printed."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError, reject
from m0_basics.outputs import RequestOutput
from m0_basics.request import Logprob, Request, RequestMetrics
from m0_basics.sampling_params import SamplingParams

from .journal import Journal, input_key

_TEMPLATE_OPTIONS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


@dataclass(frozen=True)
class Job:
    """One good line."""

    line: int
    prompt: Any
    params: SamplingParams
    template_options: Mapping[str, Any] | None = None       # of a chat


def run_batch_file(make_llm: Callable[[], BaseLLM], source: Path, target: Path | None, defaults: dict[str, Any],
                   engine_options: Mapping[str, Any] | None = None) -> int:
    """Run every line of `source`; write one JSON object a line to `target` (or stdout). Return the bad lines' number.

    A line is a prompt, or, in a .jsonl file, an object with `prompt`, `prompt_token_ids` or `messages` and any
    sampling parameters; beside `messages` also what the chat template is told. Blank lines are passed over. Raises
    ConfigError before anything is run where `source` cannot be read or `target` cannot be written.

    Results go to `<target>.part` as they come. After a run that was cut off the same command goes on from there:
    a result counts if its line, its parameters and `engine_options` are still the same.
    """
    lines = read_lines(source)
    if target is not None and target.exists() and target.samefile(source):
        raise reject("output", str(target), "another file than the prompts")
    if target is not None:
        check_writable(target)
    SamplingParams.from_options(**defaults)
    writer = _Writer([number for number, _ in lines], target)
    jobs = []
    for number, text in lines:
        key = input_key(number, text, [defaults, engine_options])
        if not writer.has(number, key):
            try:
                jobs.append(parse_line(number, text, source.suffix == ".jsonl", defaults))
                writer.keys[number] = key
            except ConfigError as error:
                writer.put_error(source, number, error)
    try:
        if jobs:
            _run_jobs(make_llm(), jobs, source, writer)
    except KeyboardInterrupt:
        writer.interrupted()
        raise
    finally:
        writer.close()
    writer.finish()
    return writer.num_bad


def _run_jobs(llm: BaseLLM, jobs: list[Job], source: Path, writer: _Writer) -> None:
    """All of them at once, as far as the engine can; each result is written when it is there."""
    requests: dict[str, Job] = {}
    try:
        for job in jobs:
            try:
                request = _as_request(llm, job)
                llm.engine.add_request(request)
                requests[request.request_id] = job
            except ConfigError as error:
                writer.put_error(source, job.line, error)
        with tqdm(total=len(requests), desc="prompts", dynamic_ncols=True) as bar:
            while llm.engine.has_unfinished_requests():
                for output in llm.engine.step():
                    writer.put(requests.pop(output.request_id).line, describe(output))
                    bar.update()
    finally:
        for request_id in requests:
            llm.engine.abort_request(request_id)


def _as_request(llm: BaseLLM, job: Job) -> Request:
    prompt, special = job.prompt, True
    if job.template_options is not None:
        prompt, special = llm.get_tokenizer().apply_chat_template(job.prompt, **job.template_options), False
    return llm.input_processor.process(prompt, job.params, add_special_tokens=special)


class _Writer:
    """Puts results where they belong: at once into the journal, at last into the target; or to stdout, in order."""

    def __init__(self, numbers: list[int], target: Path | None) -> None:
        self.target = target
        self.num_bad = 0
        self.keys: dict[int, str] = {}                  # of the lines that are run
        self._numbers = numbers                         # of the lines, in order; those before `_next` are on stdout
        self._next = 0
        self._results: dict[int, dict[str, Any]] = {}
        self._failed = False
        self._journal: Journal | None = None
        if target is not None:
            try:
                self._journal = Journal(target)
            except OSError as error:
                self._fail(error)
            if self._journal is not None and len(self._journal):
                typer.secho(f"{len(self._journal)} results of an earlier run are in {self._journal.path}", err=True)

    def has(self, number: int, key: str) -> bool:
        """Whether an earlier run has the result of this line, which is then taken."""
        result = self._journal and self._journal.get(key)
        if result:
            self._results[number] = result
        return bool(result)

    def put(self, number: int, result: dict[str, Any]) -> None:
        self._results[number] = {"line": number, **result}
        if self._journal is not None and not self._failed:
            try:
                self._journal.add(self.keys[number], self._results[number])
            except OSError as error:
                self._fail(error)
        self._print_next()

    def put_error(self, source: Path, number: int, error: ConfigError) -> None:
        """A bad line is named and skipped."""
        self.num_bad += 1
        self._results[number] = {"line": number, "error": str(error)}
        typer.secho(f"error: {source}, line {number}: {error}", fg="red", err=True)
        self._print_next()

    def interrupted(self) -> None:
        where = ""
        if self._journal is not None and not self._failed:
            where = f"; those that are there are in {self._journal.path}; the same command goes on from there"
        typer.secho(f"interrupted{where}", fg="red", err=True)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def finish(self) -> None:
        """Write the target. Exits with status 1 where that is not possible; the results then are on stdout."""
        if self.target is not None and not self._failed:
            try:
                with self.target.open("w", encoding="utf-8") as file:
                    file.writelines(_row(self._results[number]) for number in self._numbers)
            except OSError as error:
                self._fail(error)
        if self._failed:
            self._print_next()
            raise typer.Exit(1)
        if self._journal is not None:
            self._journal.remove()

    def _print_next(self) -> None:
        """To stdout: the results that are there, as far as none is missing before them."""
        if self.target is not None and not self._failed:
            return
        while self._next < len(self._numbers) and self._numbers[self._next] in self._results:
            sys.stdout.write(_row(self._results[self._numbers[self._next]]))
            self._next += 1
        sys.stdout.flush()

    def _fail(self, error: OSError) -> None:
        self._failed = True
        typer.secho(f"error: output={str(self.target)!r} cannot be written: {error.strerror}; the results follow on "
                    "standard output", fg="red", err=True)


def _row(result: dict[str, Any]) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"


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
    template_options = {name: data.pop(name) for name in _TEMPLATE_OPTIONS if kind == "messages" and name in data}
    params = SamplingParams.from_options(**(defaults | data))
    if kind == "messages":
        return Job(number, prompt, params, template_options)
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
