"""F2.9: memory by step and by context, and leaks: an injected one is flagged, a clean run is not."""
from __future__ import annotations

import gc
import logging
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching import LLM, ConfigError
from m2_continuous_batching.plugins import SchedulerPlugin, StepStats
from m2_continuous_batching.plugins.profiling import (
    DetailedMemoryProfiler,
    MemoryLeakDetector,
    MemoryProfiler,
    live_tensor_bytes,
    live_tensors,
    resident_bytes,
)

PROMPTS = [[7, 8, 9], [20, 21], [5] * 9]
KILOBYTE = 1024


@pytest.fixture(autouse=True)
def _no_garbage() -> Iterator[None]:
    """What earlier tests left behind must not be collected in the middle of a count, and need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Leaky(SchedulerPlugin):
    """Keeps a tensor of four kilobytes for every step."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def after_step(self, scheduler: Any, stats: StepStats) -> None:
        self.kept.append(torch.zeros(KILOBYTE))


def make(tiny_model: TinyModels, *plugins: SchedulerPlugin, **options: Any) -> LLM:
    return LLM(str(tiny_model("qwen3")), plugins=plugins, dtype="float32", max_model_len=128, **options)


def run(llm: LLM, num_tokens: int) -> None:
    llm.generate(PROMPTS, greedy(num_tokens), use_tqdm=False)


def test_live_tensors_counts_each_storage_once() -> None:
    """A view is a tensor more and no byte more."""
    count, size = live_tensors()
    x = torch.zeros(1000, dtype=torch.float64)
    views = [x[:10], x.view(10, 100)]
    assert live_tensors() == (count + 3, size + 8000)
    del x, views
    assert live_tensors() == (count, size)


def test_memory_profiler_in_the_engine(tiny_model: TinyModels) -> None:
    """A sample for every step; cache bytes are the cache's, used ones by the rows in use."""
    profiler = MemoryProfiler(max_samples=5)
    llm = make(tiny_model, profiler, max_num_seqs=4)
    profiler.cache = llm.cache
    run(llm, 6)
    assert [index for index, _ in profiler.samples] == [1, 2, 3, 4, 5]
    # The 4 rows hold 3 sequences until the last step, after which they are given back.
    assert [s.kv_cache_used_bytes for _, s in profiler.samples] == [*[llm.cache.nbytes * 3 // 4] * 4, 0]
    assert {s.kv_cache_bytes for _, s in profiler.samples} == {llm.cache.nbytes}
    assert profiler.current == profiler.samples[-1][1]
    assert profiler.peak.kv_cache_used_bytes == llm.cache.nbytes * 3 // 4
    assert profiler.peak.rss_bytes >= max(s.rss_bytes for _, s in profiler.samples) > 0


def test_memory_profiler_sees_resident_memory() -> None:
    """64 MiB that are written are in RAM; the peak remembers them once they are gone.

    Fresh pages from the operating system: an allocator may hand out memory that this process has had all along.
    """
    profiler = MemoryProfiler()
    before = profiler.current.rss_bytes
    pages = mmap.mmap(-1, 64 * KILOBYTE * KILOBYTE)
    pages.write(b"x" * len(pages))
    during = profiler.measure()
    assert during.rss_bytes - before > 50 * KILOBYTE * KILOBYTE
    assert profiler.peak.highest(during).rss_bytes == during.rss_bytes
    pages.close()
    assert resident_bytes() < during.rss_bytes


def test_contexts_say_what_they_left_behind() -> None:
    """Exactly the tensors that are kept, run by run; also where the block raises."""
    profiler, kept = DetailedMemoryProfiler(), []
    for size in (100, 300, 200):
        with profiler.context("outer"):
            with profiler.context("inner"):
                kept.append(torch.zeros(size))
            gone = torch.zeros(5000)
            del gone
    inner, outer = profiler.contexts["inner"], profiler.contexts["outer"]
    assert (inner.count, inner.num_tensors, inner.tensor_bytes, inner.largest_tensor_bytes) == (3, 3, 2400, 1200)
    assert (outer.count, outer.num_tensors, outer.tensor_bytes) == (3, 3, 2400)
    with pytest.raises(RuntimeError, match="broken"), profiler.context("broken"):
        kept.append(torch.zeros(7))
        raise RuntimeError("broken")
    assert profiler.contexts["broken"].tensor_bytes == 28


def test_contexts_of_the_engine(tiny_model: TinyModels) -> None:
    """As a plugin it files every step, and finds the step that keeps something."""
    class KeepsPrefills(SchedulerPlugin):
        kept: list[torch.Tensor] = []       # noqa: RUF012

        def after_step(self, scheduler: Any, stats: StepStats) -> None:
            if stats.num_prompt_tokens:
                self.kept.append(torch.zeros(512))

    profiler = DetailedMemoryProfiler()
    llm = make(tiny_model, KeepsPrefills(), profiler)
    run(llm, 2)                             # what the first run makes for good is not the question
    profiler.contexts.clear()
    run(llm, 4)
    assert {name: c.count for name, c in profiler.contexts.items()} == {"prefill": 1, "decode": 3}
    assert profiler.contexts["prefill"].tensor_bytes == 2048
    assert profiler.contexts["decode"].tensor_bytes == 0


def detector(**options: Any) -> MemoryLeakDetector:
    return MemoryLeakDetector(**{"warmup": 10, "window": 5, "num_windows": 4, "min_growth_bytes": 100, **options})


def feed(values: list[int], **options: Any) -> tuple[MemoryLeakDetector, bool]:
    """The detector, and whether it ever saw a leak."""
    found, one = False, detector(**options)
    for value in values:
        one.sample(value)
        found = found or one.leak is not None
    return one, found


@given(st.integers(10, 1000), st.data())
def test_a_steady_leak_is_flagged(per_sample: int, data: st.DataObject) -> None:
    """Whatever comes and goes on top of it, up to what one window adds."""
    noise = data.draw(st.lists(st.integers(0, 5 * per_sample - 1), min_size=40, max_size=40))
    one, _ = feed([10_000 + i * per_sample + n for i, n in enumerate(noise)])
    assert one.leak is not None
    assert one.leak.bytes_per_sample == one.leak.growth_bytes / 15
    assert abs(one.leak.bytes_per_sample - per_sample) <= per_sample * 5 / 15


@given(st.lists(st.integers(0, 99), min_size=30, max_size=200))
def test_noise_is_not_flagged(values: list[int]) -> None:
    """Whatever its order: a rise by chance is smaller than what counts."""
    assert not feed(values)[1]


@given(st.lists(st.integers(0, 10 ** 9), min_size=40, max_size=80), st.integers(0, 4))
def test_peaks_are_not_flagged(peaks: list[int], offset: int) -> None:
    """Memory that comes back to its floor once in every window, however high the peaks are and however they rise."""
    assert not feed([0 if i % 5 == offset else peak for i, peak in enumerate(sorted(peaks))])[1]


@given(st.lists(st.integers(0, 10 ** 6), min_size=10, max_size=10), st.integers(0, 10 ** 6))
def test_growth_during_warm_up_is_not_flagged(increments: list[int], rest: int) -> None:
    values = [sum(increments[:i + 1]) for i in range(10)]
    assert not feed([*values, *[values[-1] + rest] * 60])[1]


def test_growth_that_ends_is_forgiven() -> None:
    """A leak while it lasts: afterwards the windows are all the same."""
    one, found = feed([1000 * min(i, 40) for i in range(80)])
    assert found
    assert one.leak is None


def test_the_first_leak_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="m2_continuous_batching.plugins.profiling"):
        feed([100 * i for i in range(60)])
    assert [record.getMessage() for record in caplog.records] == [
        "memory grows by 100 bytes a sample, and does not come back"]


@pytest.mark.parametrize(("leaking", "every"), [(False, 1), (True, 1), (True, 2)])
def test_in_the_engine(tiny_model: TinyModels, leaking: bool, every: int) -> None:
    """F2.9: a plugin that keeps a tensor per step is flagged, by the right amount; a clean run is not."""
    one = MemoryLeakDetector(live_tensor_bytes, warmup=3, window=3, num_windows=3, min_growth_bytes=8 * KILOBYTE,
                             every=every)
    llm = make(tiny_model, *([Leaky()] if leaking else []), one)
    run(llm, 12 * every)
    assert len(one.floors) == 3
    if leaking:
        assert one.leak is not None
        assert one.leak.bytes_per_sample == 4 * KILOBYTE * every
    else:
        assert one.leak is None


@pytest.mark.parametrize("options", [{"warmup": -1}, {"window": 0}, {"num_windows": 1}, {"min_growth_bytes": 0},
                                     {"every": 0}])
def test_bad_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        MemoryLeakDetector(**options)
