"""How long one request makes all others wait: hostile ones, one at a time, beside three that watch.

    stream   token token token ....... token         the longest gap between two tokens
    short    token  token  ...........  token        the longest answer of one token: also of what comes before a step
    health   200  200  200  ...........  200         the longest answer
    hostile              [ one request ]

The server is a process of its own with a tiny random model, so that a step takes next to nothing: what a gap shows is
the server and not the model. The bar is `BAR_S`, on two cores that do nothing else.
"""
from __future__ import annotations

import json
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from m0_basics.tools.bench.report import BenchReport
from m0_basics.tools.testing.tiny_models import save_tiny_model

from .hostile import HOSTILE, body_of
from .soak_server import ServerProcess

BAR_S = 0.5
_QUIET_S = 0.5              # for which the stream runs alone before each, and after it
_OPTIONS = {"dtype": "float32", "max_num_seqs": 160}


def run_stall(package: str, engine_options: Mapping[str, Any], names: list[str], output_dir: Path) -> bool:
    """Measure, print, write stall.json; return whether everybody waited for less than `BAR_S`."""
    options = {**_OPTIONS, **engine_options}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        options.setdefault("model", str(save_stall_model(Path(folder))))
        with ServerProcess(package, options, "tiny") as server:
            for name in names or HOSTILE:
                results[name] = beside(server.url, HOSTILE[name].path, body_of(name))
                server.wait_for_idle()
                typer.secho(f"{name:40} status {results[name]['status']:.0f} after {results[name]['seconds']:6.2f} s; "
                            f"longest gap {results[name]['token_gap_s']:.2f} s, "
                            f"one token {results[name]['one_token_s']:.2f} s, "
                            f"/health {results[name]['health_s']:.2f} s",
                            fg="red" if _worst(name, results[name]) > BAR_S else None)
    del options["model"]
    worst = max(_worst(name, result) for name, result in results.items())
    measured = {"bar_s": BAR_S, "worst_s": worst, "requests": results}
    report = BenchReport.create(package, options, (), {"stall": measured})
    report.save(output_dir / "stall.json")
    typer.echo(f"others wait for {worst:.2f} s at the most; allowed: {BAR_S} s")
    return worst <= BAR_S


def _worst(name: str, result: Mapping[str, float]) -> float:
    """The longest wait that is the request's doing, not the queue's."""
    waits = [result["token_gap_s"], result["health_s"]]
    return max(waits if HOSTILE[name].takes_all_places else [*waits, result["one_token_s"]])


def save_stall_model(folder: Path) -> Path:
    """A tiny random model whose chat template prints tools, as those of large models do."""
    save_tiny_model(folder, "qwen3")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = "{% if tools %}{{ tools | tojson }}{% endif %}" + settings["chat_template"]
    file.write_text(json.dumps(settings))
    return folder


def beside(url: str, path: str, body: bytes) -> dict[str, float]:
    """Send one request beside a stream, short requests and a watcher of /health: its status, and times in seconds."""
    over, gaps, shorts, answers = threading.Event(), list[float](), list[float](), list[float]()
    watchers = [threading.Thread(target=_watch_stream, args=(url, over, gaps)),
                threading.Thread(target=_watch_short, args=(url, over, shorts)),
                threading.Thread(target=_watch_health, args=(url, over, answers))]
    for watcher in watchers:
        watcher.start()
    time.sleep(_QUIET_S)
    begin = time.perf_counter()
    status = _post(url + path, body)
    seconds = time.perf_counter() - begin
    time.sleep(_QUIET_S)
    over.set()
    for watcher in watchers:
        watcher.join()
    return {"status": status, "seconds": seconds, "token_gap_s": max(gaps),
            "one_token_s": max(shorts), "health_s": max(answers)}


def _watch_stream(url: str, over: threading.Event, gaps: list[float]) -> None:
    """One stream after the other. A gap is the time from one token of a stream to the next.

    With log-probabilities each token is an event, also one that is no whole character and waits for the next.
    """
    body = json.dumps({"prompt": "the", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True,
                       "logprobs": 0})
    while not over.is_set():
        try:
            last = None
            with _open(url + "/v1/completions", body.encode()) as answer:
                for line in answer:
                    if line.startswith(b"data: "):
                        now = time.perf_counter()
                        gaps += [] if last is None else [now - last]
                        last = now
                    if over.is_set():
                        return
        except urllib.error.HTTPError as error:         # the queue is full: that is no stall
            error.read()
            time.sleep(0.02)


def _watch_short(url: str, over: threading.Event, answers: list[float]) -> None:
    """One short request after the other. All of its time is waiting: a token of the tiny model takes next to none."""
    body = json.dumps({"prompt": "the", "max_tokens": 1, "temperature": 0}).encode()
    while not over.is_set():
        begin = time.perf_counter()
        if _post(url + "/v1/completions", body) == 200:     # else the queue is full
            answers.append(time.perf_counter() - begin)
        time.sleep(0.02)


def _watch_health(url: str, over: threading.Event, answers: list[float]) -> None:
    while not over.is_set():
        begin = time.perf_counter()
        with urllib.request.urlopen(url + "/health", timeout=300) as answer:
            answer.read()
        answers.append(time.perf_counter() - begin)
        time.sleep(0.01)


def _post(url: str, body: bytes) -> int:
    try:
        with _open(url, body) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


def _open(url: str, body: bytes) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"}), timeout=300)
