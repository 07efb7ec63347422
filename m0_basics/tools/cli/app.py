"""The command line, the same in every milestone: `python -m m1_offline generate|chat|bench|facts|exercise`.

`main("m1_offline")` builds the commands over that package's `LLM`, `benchmark` and `facts`. What else a package
offers stands in its module `commands`, as the list `COMMANDS`; one with a parameter `engine_options` gets the flags.
"""
from __future__ import annotations

import errno
import importlib
import importlib.util
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError, reject
from m0_basics.outputs import RequestOutput
from m0_basics.sampling_params import SamplingParams

from ..documents.factbook import Facts
from ..exercise.commands import exercise_app
from ..exercise_overlay import WORKSPACE_VARIABLE, learner_modules
from .batch_file import run_batch_file
from .options import engine_flags, sampling_flags, with_flags
from .panels import PanelCommand
from .run_stats import RunStats

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_CHAT_HELP = "Type a message; /reset forgets the conversation, /quit (or Ctrl-D) ends it."


def main(package: str) -> None:
    """Run the command line of a milestone. A ConfigError becomes one line on stderr and exit status 2.

    So does a full disk, with status 1: what was to be written is lost, and a traceback would not bring it back.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:           # set while torch was imported: see `m0_basics`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            app = build_app(package)
            say_whose_code_runs()
            app(prog_name=f"python -m {package}")
        finally:
            sys.stdout.flush()
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        typer.secho(f"error: the output cannot be written: {error.strerror}", fg="red", err=True)
        with Path(os.devnull).open("w") as nowhere:                 # for what Python writes at its end
            os.dup2(nowhere.fileno(), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        sys.exit(1)


def say_whose_code_runs() -> None:
    """Name the learner's modules that are loaded by now; where a workspace is wanted and empty, say so."""
    if not (folder := os.environ.get(WORKSPACE_VARIABLE)):
        return
    if yours := learner_modules():
        typer.secho(f"your code is in use: {', '.join(yours)}", fg="bright_black", err=True)
    elif "exercise" not in sys.argv[1:2]:                                       # which makes it, and fills it
        if not Path(folder).is_dir():
            raise reject(WORKSPACE_VARIABLE, folder, "a folder that `exercise start` has made")
        if not any(Path(folder).glob("*/**/*.py")):
            typer.secho(f"no code of yours in {folder}", fg="bright_black", err=True)


def build_app(package: str) -> typer.Typer:
    """The commands of one milestone."""
    milestone = importlib.import_module(package)
    llm_class: type[BaseLLM] = milestone.LLM
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                      help=(milestone.__doc__ or "").strip())
    engine, sampling = engine_flags(llm_class.config_class), sampling_flags()
    engine_for_requests = engine_flags(llm_class.config_class, without=sampling)     # --seed is the request's here

    def add(command: Callable[..., None], **groups: Any) -> None:
        name = command.__name__.replace("_", "-")
        app.command(name, help=command.__doc__, cls=PanelCommand)(with_flags(command, groups))

    def generate(
        engine_options: dict[str, Any],
        sampling_options: dict[str, Any],
        prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
        prompts_file: Annotated[Path | None, typer.Option(
            help="Run every line of a file: plain text, or JSON objects if it ends in .jsonl.")] = None,
        output: Annotated[Path | None, typer.Option(help="Write the results there, one JSON object a line.")] = None,
        stats: Annotated[bool, typer.Option(help="Print time to first token, tokens/s and peak memory.")] = True,
    ) -> None:
        """Continue a text, or every line of a file."""
        if (prompt is None) == (prompts_file is None):
            raise ConfigError("generate needs one of a prompt and --prompts-file; allowed: exactly one")
        if prompts_file is not None:
            failed = run_batch_file(lambda: llm_class(**engine_options), prompts_file, output, sampling_options,
                                    {"package": package, **engine_options})
            raise typer.Exit(1 if failed else 0)
        if output is not None:
            raise ConfigError("output needs --prompts-file; allowed: shell redirection for a single prompt")
        params = SamplingParams.from_options(**sampling_options)
        llm = llm_class(**engine_options)
        assert prompt is not None
        _print_stream(llm, prompt, params, stats)

    def chat(
        engine_options: dict[str, Any],
        sampling_options: dict[str, Any],
        message: Annotated[str | None, typer.Argument(help="One message; without it, a conversation.")] = None,
        system: Annotated[str | None, typer.Option(help="The system message.")] = None,
        chat_template_kwargs: Annotated[str | None, typer.Option(
            help='Variables of the chat template, as JSON: {"enable_thinking": false}.')] = None,
        stats: Annotated[bool, typer.Option(help="Print time to first token, tokens/s and peak memory.")] = True,
    ) -> None:
        """Talk to the model through its chat template."""
        params = SamplingParams.from_options(**sampling_options)
        variables = _json_object("chat_template_kwargs", chat_template_kwargs)
        llm = llm_class(**engine_options)
        opening = [{"role": "system", "content": system}] if system else []
        if message is not None:
            _print_stream(llm, [*opening, {"role": "user", "content": message}], params, stats, variables)
        else:
            _converse(llm, opening, params, stats, variables)

    def bench(
        engine_options: dict[str, Any],
        workload: Annotated[str | None, typer.Option(help="Named workload, such as ragged-64 (default: all).")] = None,
        rounds: Annotated[int, typer.Option(help="Rounds in which the contenders alternate.", min=1)] = 3,
        quick: Annotated[bool, typer.Option(help="A small version, to see that it runs.")] = False,
        peer: Annotated[list[str] | None, typer.Option(help="Also run this peer; may be repeated.")] = None,
        peer_python: Annotated[list[Path] | None, typer.Option(
            help="Interpreter that has vLLM or llama-cpp-python; may be repeated.")] = None,
        output_dir: Annotated[Path | None, typer.Option(help="Where results go (default: the package's own).")] = None,
        redraw: Annotated[bool, typer.Option("--redraw", help="Only draw the saved results' figures again.")] = False,
    ) -> None:
        """Compare with earlier milestones and peers: a table, JSON and a figure."""
        benchmark = importlib.import_module(f"{package}.benchmark")
        target = output_dir or Path(benchmark.__file__ or ".").parent / "results"
        if redraw:
            from ..bench.report import BenchReport
            benchmark.draw(BenchReport.load(target / "bench.json"), target)
            return
        benchmark.run(engine_options, workload=workload, rounds=rounds, quick=quick, peers=peer or [],
                      peer_python=peer_python or [], output_dir=target)

    def divergence(
        engine_options: dict[str, Any],
        prompt: Annotated[list[str] | None, typer.Argument(help="Prompts (default: eight built-in ones).")] = None,
        max_tokens: Annotated[int, typer.Option(help="Tokens to compare.", min=1)] = 100,
    ) -> None:
        """Explain the first token at which this engine and transformers differ."""
        from ..divergence import DEFAULT_PROMPTS, compare_with_transformers
        prompts = prompt or list(DEFAULT_PROMPTS)
        for text, found in zip(prompts, compare_with_transformers(llm_class(**engine_options), prompts, max_tokens),
                               strict=True):
            typer.secho(f"prompt {text!r}", bold=True)
            typer.echo(found.report() if found else f"  the same {max_tokens} tokens, or the same tokens up to the end")

    def changes(
        part: Annotated[str | None, typer.Argument(help="A part of the table, or llm (default: the table).")] = None,
        write: Annotated[bool, typer.Option("--write", help="Write the page CHANGES.md again.")] = False,
    ) -> None:
        """What this milestone changes: its parts beside those that they replace."""
        from ..documents import changes as page
        if write:
            typer.echo(f"{package}/{page.write_page(package).name} is written")
        else:
            page.show(package, part, Console())

    def facts(
        names: Annotated[list[str] | None, typer.Argument(
            help="Only facts whose name holds one of these words (default: all).", show_default=False)] = None,
        measure: Annotated[list[str] | None, typer.Option(
            help="Measure this group again and store it (all: every group); may be repeated.")] = None,
    ) -> None:
        """Print, as JSON, every number that this milestone's documents quote."""
        book: Facts = importlib.import_module(f"{package}.tools.facts").FACTS
        if measure:
            book.measure(None if "all" in measure else measure)
        typer.echo(book.to_json(names or ()))

    add(generate, engine_options=engine_for_requests, sampling_options=sampling)
    add(chat, engine_options=engine_for_requests, sampling_options=sampling)
    add(bench, engine_options=engine)
    add(divergence, engine_options=engine)
    app.command("facts", help=facts.__doc__)(facts)
    app.command("changes", help=changes.__doc__)(changes)
    if importlib.util.find_spec(f"{package}.tools.commands") is not None:
        for command in importlib.import_module(f"{package}.tools.commands").COMMANDS:
            add(command, **({"engine_options": engine} if "engine_options" in inspect.signature(command).parameters
                            else {}))
    app.add_typer(exercise_app(package), name="exercise", help="Write the milestone's central functions yourself.")
    return app


def _json_object(name: str, text: str | None) -> dict[str, Any] | None:
    """A flag that is given as JSON."""
    try:
        value = None if text is None else json.loads(text)
    except ValueError:
        value = text
    if not isinstance(value, dict | None):
        raise reject(name, text, "a JSON object")
    return value


def _print_stream(llm: BaseLLM, prompt: Any, params: SamplingParams, stats: bool,
                  variables: dict[str, Any] | None = None) -> str:
    """Print the text as it comes; return it whole. `variables` are those of the chat template."""
    text, last = "", None
    for last in llm.stream(prompt, params, chat_template_kwargs=variables):
        delta = last.outputs[0].text
        text += delta
        typer.echo(delta, nl=False)
    typer.echo()
    if len(last.outputs if last else []) > 1:
        _print_other_outputs(last)
    if stats and last is not None and last.metrics is not None:
        typer.secho(RunStats.of(last.metrics, last.num_cached_tokens).line(), fg="bright_black", err=True)
    return text


def _print_other_outputs(last: RequestOutput | None) -> None:
    typer.secho(f"(output 1 of {len(last.outputs) if last else 0} was streamed; use --prompts-file for all)", err=True)


def _converse(llm: BaseLLM, opening: list[dict[str, str]], params: SamplingParams, stats: bool,
              variables: dict[str, Any] | None) -> None:
    typer.secho(_CHAT_HELP, fg="bright_black", err=True)
    messages = list(opening)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
        elif re.fullmatch(r"/\w+", line):
            typer.secho(f"error: {line} is no command; allowed: /reset, /quit", fg="red", err=True)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                text = _print_stream(llm, messages, params, stats, variables)
                messages.append({"role": "assistant", "content": text})
            except ConfigError as error:        # too long by now, say: the conversation is still there
                messages.pop()
                typer.secho(f"error: {error}", fg="red", err=True)
