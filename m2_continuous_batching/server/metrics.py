"""Prometheus metrics under vLLM's names, so that dashboards made for vLLM read this server.

Counters and the size of each step are updated after the step, what concerns one request when it ends. The gauges
are read from the scheduler at the moment of the scrape: an engine that has gone idle says so.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from m0_basics.config import require
from m0_basics.request import Request, RequestMetrics

from ..plugins.base import SchedulerPlugin, StepStats
from ..scheduler import Scheduler

_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_STEP_TOKENS = tuple(2.0 ** i for i in range(15))
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_LATENCY = (0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class PrometheusMetrics(SchedulerPlugin):
    """Give it to the `LLM` as a plugin and to the server. It keeps a registry of its own."""

    def __init__(self, model_name: str) -> None:
        """Raises ConfigError where prometheus-client is not installed."""
        client = require("prometheus_client", "the server's /metrics", extra="serve")
        self._client = client
        self.registry = client.CollectorRegistry()
        self._model_name = model_name
        self._scheduler: Scheduler | None = None
        self._gauge("num_requests_running", "Sequences that are running.", lambda s: len(s.running))
        self._gauge("num_requests_waiting", "Sequences that wait for a place.", lambda s: len(s.waiting))
        self._gauge("kv_cache_usage_perc", "Share of the KV cache that is in use, 0 to 1.",
                    lambda s: s.kv_cache_manager.usage)
        self._preemptions = self._counter("num_preemptions", "Sequences that were sent back to the queue.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prefill tokens that were run, recomputed ones included.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens of one step.", _STEP_TOKENS)
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _TTFT)
        self._itl = self._histogram("inter_token_latency_seconds", "From one token to the next.", _PER_TOKEN)
        self._tpot = self._histogram("request_time_per_output_token_seconds",
                                     "Mean time per token of a request, after its first.", _PER_TOKEN)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _LATENCY)
        self._queue_time = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _LATENCY)
        self._prefill_time = self._histogram("request_prefill_time_seconds", "From the first step to the first token.",
                                             _LATENCY)
        self._decode_time = self._histogram("request_decode_time_seconds", "From the first token to the last.",
                                            _LATENCY)
        self._request_prompt = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._request_generation = self._histogram("request_generation_tokens", "Tokens that a request generated.",
                                                   _TOKENS)
        self._success = client.Counter("vllm:request_success", "Requests that have ended, by reason.",
                                       ("model_name", "finished_reason"), registry=self.registry)

    def show_counters_of(self, plugins: Sequence[SchedulerPlugin]) -> None:
        """Add what an engine's plugins count. A name may come with its first number: all are asked at each scrape."""
        self.registry.register(_PluginCounters(plugins, self._model_name))

    def render(self) -> tuple[bytes, str]:
        """What /metrics returns, and its content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST

    def before_step(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self._preemptions.inc(stats.num_preempted)
        self._prompt_tokens.inc(stats.num_prompt_tokens)
        self._generation_tokens.inc(stats.num_generation_tokens)
        self._step_tokens.observe(stats.num_prompt_tokens + stats.num_generation_tokens)

    def on_request_completion(self, request: Request) -> None:
        self._success.labels(self._model_name, _reason(request)).inc()
        self._request_prompt.observe(len(request.prompt_token_ids))
        self._request_generation.observe(sum(len(s.output_token_ids) for s in request.sequences))
        self._observe_times(request.metrics, max(len(s.output_token_ids) for s in request.sequences))

    def _observe_times(self, times: RequestMetrics, num_tokens: int) -> None:
        """What is known of them: a request may end before its first token, or in the queue.

        `num_tokens` is the longest output's: outputs of one request grow side by side.
        """
        if times.finished_time is not None:
            self._e2e.observe(times.finished_time - times.arrival_time)
        if times.first_scheduled_time is None:
            return
        self._queue_time.observe(times.first_scheduled_time - times.arrival_time)
        if times.first_token_time is None:
            return
        self._ttft.observe(times.first_token_time - times.arrival_time)
        self._prefill_time.observe(times.first_token_time - times.first_scheduled_time)
        decode_time = times.token_times[-1] - times.first_token_time
        self._decode_time.observe(decode_time)
        if num_tokens > 1:
            self._tpot.observe(decode_time / (num_tokens - 1))
        for earlier, later in pairwise(times.token_times):
            if later > earlier:                     # tokens that came together have no gap
                self._itl.observe(later - earlier)

    def _gauge(self, name: str, text: str, read: Callable[[Scheduler], float]) -> None:
        gauge = self._client.Gauge(f"vllm:{name}", text, ("model_name",), registry=self.registry)
        gauge.labels(self._model_name).set_function(
            lambda: 0.0 if self._scheduler is None else float(read(self._scheduler)))

    def _counter(self, name: str, text: str) -> Any:
        """The client appends `_total`."""
        counter = self._client.Counter(f"vllm:{name}", text, ("model_name",), registry=self.registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        histogram = self._client.Histogram(f"vllm:{name}", text, ("model_name",), registry=self.registry,
                                           buckets=buckets)
        return histogram.labels(self._model_name)


class _PluginCounters:
    """Reads what plugins count at the moment of the scrape."""

    def __init__(self, plugins: Sequence[SchedulerPlugin], model_name: str) -> None:
        self._family = require("prometheus_client.core", "the server's /metrics", extra="serve").CounterMetricFamily
        self._plugins, self._model_name = plugins, model_name

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        families: dict[str, Any] = {}
        for plugin in self._plugins:
            for counter in plugin.counters():
                labels = {"model_name": self._model_name, **counter.labels}
                if counter.name not in families:
                    families[counter.name] = self._family(f"vllm:{counter.name}", counter.text, labels=tuple(labels))
                families[counter.name].add_metric(tuple(labels.values()), counter.value)
        yield from families.values()


def _reason(request: Request) -> str:
    first = request.sequences[0]
    failed = isinstance(first.stop_reason, str) and first.stop_reason.startswith("error: ")
    return "error" if first.status.finish_reason == "abort" and failed else str(first.status.finish_reason)
