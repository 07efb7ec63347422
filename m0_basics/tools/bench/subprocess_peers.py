"""Peers that live in an interpreter of their own, because their dependencies exclude the lab's.

The process is started once and kept: it gets one order per round, so that it takes turns with the others like any
contender. In between it is stopped: an engine that polls for work would take a core from the others. What it runs is
`peer_worker.py`.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import psutil
import torch

from m0_basics.config import ConfigError, reject

from .contender import BenchError, Contender, Served
from .metrics import RequestRecord
from .workloads import Workload

# Engine -> the module that shows that an interpreter has it.
ENGINES = {"vllm": "vllm", "llama.cpp": "llama_cpp"}
WORKER = Path(__file__).with_name("peer_worker.py")
_START_TIMEOUT = 600.0          # seconds: vLLM on a CPU takes minutes
_RUN_TIMEOUT = 3600.0


def engines_of(python: Path) -> list[str]:
    """Which peers this interpreter has. Raises ConfigError where it has none, or does not run."""
    code = ("import importlib.util as u, json; "
            f"print(json.dumps([n for n, m in {ENGINES!r}.items() if u.find_spec(m)]))")
    try:
        result = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=True)
        found: list[str] = json.loads(result.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"peer_python={str(python)!r} does not run as a Python interpreter: {error}") from error
    if not found:
        raise reject("peer_python", str(python), f"an interpreter that can import one of {', '.join(ENGINES.values())}")
    return found


class SubprocessPeer(Contender):
    """A peer engine in another process, spoken to by lines of JSON."""

    def __init__(self, name: str, python: Path, settings: Mapping[str, Any], note: str = "",
                 worker: Path = WORKER) -> None:
        """Start the process and wait until it has loaded its model. Raises ConfigError where it cannot."""
        super().__init__(name, note)
        # Read on failure only, and then its end; a pipe would fill up and stall the peer.
        self._errors: IO[bytes] = tempfile.TemporaryFile()      # noqa: SIM115
        self._process = subprocess.Popen([str(python), str(worker), json.dumps(dict(settings))], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                                         env=peer_environment())
        self.pid = self._process.pid
        try:
            ready = self._read(_START_TIMEOUT)["ready"]
        except BenchError as error:
            self.close()
            raise ConfigError(f"peer {name} ({python}) did not start: {error}") from error
        self.startup_s = float(ready["startup_s"])
        self.note = "; ".join(filter(None, [str(ready["version"]), note, f"start-up {self.startup_s:.0f} s"]))
        self._signal("suspend")

    def serve(self, workload: Workload) -> Served:
        with self._awake():
            return self._serve(workload)

    def _serve(self, workload: Workload) -> Served:
        order = json.dumps({"requests": [dataclasses.asdict(r) for r in workload.requests]})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise BenchError(f"{self.name} has ended: {self._last_words()}") from error
        answer = self._read(_RUN_TIMEOUT)
        if len(answer["requests"]) != len(workload.requests):
            raise BenchError(f"{self.name} answered {len(answer['requests'])} of {len(workload.requests)} requests")
        records = tuple(
            RequestRecord(r.arrival_time, tuple(a["token_times"]), max(a["token_times"], default=answer["duration_s"]),
                          len(r.prompt_token_ids), (len(a["token_ids"]),))
            for r, a in zip(workload.requests, answer["requests"], strict=True))
        return Served(answer["duration_s"], records, tuple(tuple(a["token_ids"]) for a in answer["requests"]))

    def close(self) -> None:
        """End the process: it stops when its orders end, and is killed if it does not."""
        self._signal("resume")
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):      # an order that a dead peer has not read
                    stream.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """The process and its children run in here, and in here alone."""
        self._signal("resume")
        try:
            yield
        finally:
            self._signal("suspend")

    def _signal(self, what: Literal["suspend", "resume"]) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):         # it has ended: whoever speaks to it next will say so
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    getattr(each, what)()

    def _read(self, timeout: float) -> dict[str, Any]:
        """The next line. A peer that stays silent for too long is killed, which ends the wait."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(timeout, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise BenchError(f"{self.name} has ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        """The end of what the process wrote to standard error, from its last line upwards."""
        self._process.wait(timeout=30)
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:]) or f"exit status {self._process.returncode}, nothing on standard error"


def peer_environment() -> dict[str, str]:
    """This process's environment, with what vLLM's CPU build needs to use the same cores as the lab's engines."""
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    if hasattr(os, "sched_getaffinity"):        # Linux
        cores = sorted(os.sched_getaffinity(0))[:torch.get_num_threads()]
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return defaults | dict(os.environ)
