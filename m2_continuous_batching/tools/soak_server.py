"""A server in a process of its own, and what can be seen of it from outside: its metrics and its memory."""
from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from m0_basics.tools.cli.options import as_flags

GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


class ServerError(RuntimeError):
    """The server did not start, or did not end."""


class ServerProcess:
    """`with ServerProcess("m2_continuous_batching", options, "name") as server:` on any free port."""

    def __init__(self, package: str, engine_options: Mapping[str, Any], served_model_name: str) -> None:
        """Raises ServerError where the server ends before it is ready; what it says goes to stderr."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", package, "serve", "--port", "0", "--served-model-name", served_model_name,
             "--log-level", "warning", *as_flags(engine_options)], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        found = re.search(r" at (http://\S+)", self._process.stdout.readline())
        if found is None:
            self._process.kill()
            raise ServerError(f"the server did not start (status {self._process.wait()})")
        self.url = found.group(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    def rss_mib(self) -> float:
        """Resident memory."""
        return float(psutil.Process(self._process.pid).memory_info().rss / 2 ** 20)

    def gauges(self) -> dict[str, float]:
        """What runs, what waits, and how full the cache is."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return {f.name: f.samples[0].value for f in families if f.name in GAUGES}

    def wait_for_idle(self, seconds: float = 60.0) -> dict[str, float]:
        """The gauges once they are all 0, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while any((gauges := self.gauges()).values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return gauges

    def stop(self, seconds: float = 60.0) -> int:
        """Send SIGTERM; return the exit status. Raises ServerError where it does not end."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"the server did not end within {seconds:g} s") from error
