"""What the command line has from this milestone on: `serve`, and `soak`, which tries a server to its limits.

A later milestone has the same over its own engine: `COMMANDS = online_commands(LLM)`.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from m0_basics.base_llm import BaseLLM
from m0_basics.config import DEFAULT_MODEL, reject, require
from m0_basics.tools.cli.options import flags_of, with_flags

from ..engine import engine_of
from ..llm import LLM
from ..server.config import ServerConfig

API_KEY_VARIABLE = "LLM_LAB_API_KEY"


def online_commands(llm_class: type[BaseLLM]) -> list[Callable[..., None]]:
    """The commands over the engine of `llm_class`, whose package is named in the examples."""
    package = llm_class.__module__.partition(".")[0]

    def serve(
        engine_options: dict[str, Any],
        server_options: dict[str, Any],
        host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="Port to listen on (0: any that is free).", min=0, max=65535)] = 8000,
        api_key: Annotated[str | None, typer.Option(envvar=API_KEY_VARIABLE,
                                                    help="Clients have to send this key.")] = None,
        served_model_name: Annotated[str | None, typer.Option(
            help="The name that clients use for the model (default: as it was given).")] = None,
        max_queued_requests: Annotated[int, typer.Option(
            help="Outputs that may wait for a place; more are refused with status 503.", min=0)] = 1024,
        max_connections: Annotated[int, typer.Option(
            help="Connections at the same time; the longest idle one makes room for a new one.", min=1)] = 1000,
        grace: Annotated[float, typer.Option(help="Seconds that open requests get at the end.", min=0)] = 10.0,
        log_level: Annotated[str, typer.Option(
            help="debug, info (a line for each request), warning or error.")] = "info",
    ) -> None:
        """Serve the model over HTTP, with OpenAI's API."""
        for module in ("fastapi", "uvicorn"):
            require(module, "serve", extra="serve")
        from ..server import run
        from ..server.app import build_app
        from ..server.async_engine import AsyncLLMEngine
        from ..server.metrics import PrometheusMetrics

        if api_key is None and API_KEY_VARIABLE in os.environ:
            raise reject(API_KEY_VARIABLE, os.environ[API_KEY_VARIABLE], "a key, or no such variable at all")
        name = served_model_name or str(engine_options.get("model", DEFAULT_MODEL))
        config = ServerConfig(name, api_key, **server_options)
        _set_up_log(log_level)
        sock = run.bind(host, port)         # first: a port that is taken should not cost the loading of a model
        metrics = PrometheusMetrics(name)
        make_llm: Any = llm_class
        llm = make_llm(plugins=[metrics], **engine_options)
        metrics.show_counters_of(engine_of(llm).plugins)
        engine = AsyncLLMEngine(llm, max_queued_requests, config.max_compile_s)
        url = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
        run.serve(build_app(engine, metrics, config), engine, sock, grace,
                  lambda: typer.echo(_greeting(url, name, api_key is not None)), max_connections)

    def soak(
        engine_options: dict[str, Any],
        clients: Annotated[int, typer.Option(help="Clients at the same time.", min=1)] = 64,
        seconds: Annotated[float, typer.Option(help="For how long they send requests.", min=1)] = 120.0,
        output_dir: Annotated[Path | None, typer.Option(
            help="Where soak.json goes (default: the package's results).")] = None,
    ) -> None:
        """Start a server and send it good requests, bad ones, and clients that hang up; nothing may get lost."""
        for module in ("fastapi", "uvicorn", "openai"):
            require(module, "soak", extra="dev")
        from .soak import run_soak

        target = output_dir or Path(__file__).parents[2] / package / "results"
        if not run_soak(llm_class, engine_options, clients, seconds, target):
            raise typer.Exit(1)

    def stall(
        engine_options: dict[str, Any],
        request: Annotated[list[str] | None, typer.Option(help="Only this one, by name; may be repeated.")] = None,
        output_dir: Annotated[Path | None, typer.Option(
            help="Where stall.json goes (default: the package's results).")] = None,
    ) -> None:
        """Start a server with a tiny model and send it hostile requests: how long do all others wait?"""
        for module in ("fastapi", "uvicorn", "transformers"):
            require(module, "stall", extra="dev")
        from .hostile import HOSTILE
        from .stall import run_stall

        if unknown := [name for name in request or () if name not in HOSTILE]:
            raise reject("request", unknown[0], ", ".join(HOSTILE))
        target = output_dir or Path(__file__).parents[2] / package / "results"
        if not run_stall(package, engine_options, request or [], target):
            raise typer.Exit(1)

    server_flags = flags_of(ServerConfig, without=("served_model_name", "api_key"))
    return [with_flags(serve, {"server_options": server_flags}), soak, stall]


def _set_up_log(level: str) -> None:
    """One line for each request from `info` on, to stderr. Raises ConfigError for an unknown level."""
    levels = ("debug", "info", "warning", "error")
    if level not in levels:
        raise reject("log_level", level, ", ".join(levels))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger(__package__.partition(".")[0]).setLevel(level.upper())


def _greeting(url: str, name: str, has_key: bool) -> str:
    key = ' -H "Authorization: Bearer $' + API_KEY_VARIABLE + '"' if has_key else ""
    return (f"serving {name} at {url}\n"
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
            f"""    -d '{{"messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'""")


COMMANDS = online_commands(LLM)
