"""One line about a finished request: time to first token, speed, memory."""
from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from m0_basics.request import RequestMetrics


@dataclass(frozen=True)
class RunStats:
    """Times in seconds, memory in bytes. TTFT counts from the request's arrival, start-up from the process's."""

    ttft: float
    output_tokens: int
    tokens_per_second: float | None         # after the first token; None where there was only one
    peak_memory: int
    start_to_first_token: float
    cached_tokens: int = 0                  # of the prompt, that an engine with a prefix cache did not compute

    @classmethod
    def of(cls, metrics: RequestMetrics, cached_tokens: int = 0) -> RunStats:
        """From a request that has at least one token; its outputs run side by side, and all their tokens count."""
        times = metrics.token_times
        first, last = times[0], times[-1]
        after_first = sum(t > first for t in times)         # a step may give several tokens at once
        return cls(ttft=first - metrics.arrival_time, output_tokens=len(times),
                   tokens_per_second=after_first / (last - first) if after_first else None,
                   peak_memory=peak_memory_bytes(), start_to_first_token=first - process_start(),
                   cached_tokens=cached_tokens)

    def line(self) -> str:
        speed = f"{self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else "one token"
        cached = f", {self.cached_tokens} prompt tokens from the cache" if self.cached_tokens else ""
        return (f"TTFT {self.ttft * 1000:.0f} ms{cached} | {self.output_tokens} tokens, {speed} | peak memory "
                f"{self.peak_memory / 1e6:.0f} MB | command to first token {self.start_to_first_token:.1f} s")


def process_start() -> float:
    """When this process started, on the clock of `time.perf_counter`."""
    import psutil
    return time.perf_counter() - (time.time() - psutil.Process().create_time())


def peak_memory_bytes() -> int:
    """Most memory this process has held: on the GPU where it used one, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024      # Linux counts in kilobytes, macOS in bytes
