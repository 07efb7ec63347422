"""Metrics of the benchmarks against values worked out by hand, and their invariants (F1.7)."""
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.config import ConfigError
from m0_basics.request import Request, SequenceData
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench.memory import MemoryMeter
from m0_basics.tools.bench.metrics import SLO, PeakMemory, RequestRecord, RunMetrics, Stats, compute_metrics

# Arrives at 1 s, tokens at 3, 4 and 6.5 s.
THREE_TOKENS = RequestRecord(1.0, (3.0, 4.0, 6.5), 6.5, 10, (3,))
# Arrives at 2 s, its only token at 2.5 s.
ONE_TOKEN = RequestRecord(2.0, (2.5,), 2.5, 4, (1,))


def test_one_request_by_hand():
    assert THREE_TOKENS.latency == 5.5
    assert THREE_TOKENS.ttft == 2.0
    assert THREE_TOKENS.tpot == (5.5 - 2.0) / 2
    assert THREE_TOKENS.itls == [1.0, 2.5]


def test_one_output_token_has_no_tpot():
    assert (ONE_TOKEN.ttft, ONE_TOKEN.latency) == (0.5, 0.5)
    assert ONE_TOKEN.tpot is None
    assert ONE_TOKEN.itls == []


def test_run_by_hand():
    metrics = compute_metrics([THREE_TOKENS, ONE_TOKEN], 8.0)
    assert (metrics.num_requests, metrics.num_prompt_tokens, metrics.num_output_tokens) == (2, 14, 4)
    assert (metrics.request_throughput, metrics.output_throughput, metrics.total_token_throughput) == (
        0.25, 0.5, 18 / 8)
    assert metrics.ttft_ms == Stats(1250.0, 1250.0, pytest.approx(500 + 0.99 * 1500))
    assert metrics.tpot_ms == Stats(1750.0, 1750.0, 1750.0)         # of the one request that has a TPOT
    assert metrics.itl_ms == Stats(1750.0, 1750.0, pytest.approx(1000 + 0.99 * 1500))
    assert metrics.e2el_ms == Stats(3000.0, 3000.0, pytest.approx(500 + 0.99 * 5000))
    assert metrics.request_goodput is None


def test_run_of_single_tokens_has_neither_tpot_nor_itl():
    metrics = compute_metrics([ONE_TOKEN], 1.0)
    assert metrics.tpot_ms is None
    assert metrics.itl_ms is None
    assert RunMetrics.from_dict(metrics.to_dict()) == metrics


def test_peer_that_does_not_time_tokens():
    metrics = compute_metrics([RequestRecord(0.0, (), 4.0, 5, (8,))], 4.0, SLO(ttft_ms=1e9))
    assert metrics.ttft_ms is metrics.tpot_ms is metrics.itl_ms is None
    assert metrics.e2el_ms.mean == 4000.0
    assert metrics.output_throughput == 2.0
    assert metrics.request_goodput == 0.0       # nobody can say that it met the objective


def test_several_sequences_per_request():
    """Four steps gave tokens: to both sequences at first, then to the longer one alone."""
    record = RequestRecord(0.0, (1.0, 2.0, 3.0, 5.0), 5.0, 6, (2, 4))
    assert record.tpot == (5.0 - 1.0) / 3
    assert record.itls == [1.0, 1.0, 2.0]
    assert compute_metrics([record], 5.0).num_output_tokens == 6


def test_several_tokens_in_one_step():
    """Speculative decoding: five tokens came at two times. TPOT is per token, ITL between the times."""
    record = RequestRecord(0.0, (1.0, 3.0), 3.0, 6, (5,))
    assert record.tpot == 2.0 / 4
    assert record.itls == [2.0]


@pytest.mark.parametrize(("slo", "good"), [
    (SLO(), 2),
    (SLO(ttft_ms=2000.0), 2),
    (SLO(ttft_ms=1999.0), 1),
    (SLO(tpot_ms=1749.0), 1),           # the request without a TPOT meets it, as in vLLM
    (SLO(tpot_ms=1750.0, e2el_ms=5000.0), 1),
    (SLO(ttft_ms=1.0), 0),
])
def test_goodput(slo, good):
    assert compute_metrics([THREE_TOKENS, ONE_TOKEN], 4.0, slo).request_goodput == good / 4


def test_slo_refuses_what_is_no_limit():
    with pytest.raises(ConfigError, match="tpot_ms=0"):
        SLO(tpot_ms=0)


def test_nothing_measured_is_an_error():
    with pytest.raises(ConfigError, match="at least one request"):
        compute_metrics([], 1.0)
    with pytest.raises(ConfigError, match="above 0"):
        compute_metrics([ONE_TOKEN], 0.0)


def test_record_reads_the_engines_times():
    params = SamplingParams(temperature=0)
    request = Request("r", None, [1, 2, 3], params)
    request.metrics.arrival_time, request.metrics.token_times = 100.0, [101.0, 103.0]
    request.metrics.finished_time = 103.5
    request.sequences[0].data = SequenceData([1, 2, 3], [7, 8])
    request.sequences.append(request.sequences[0].fork(99, 1))
    request.sequences[1].append_token_id(9)
    record = RequestRecord.from_request(request, start=90.0)
    assert record == RequestRecord(10.0, (11.0, 13.0), 13.5, 3, (2, 3))


def records():
    gaps = st.lists(st.floats(0.001, 100.0), min_size=1, max_size=20)
    return st.builds(_record, st.floats(0.0, 1000.0), gaps, st.integers(1, 500))


def _record(arrival, gaps, prompt):
    times = tuple(arrival + t for t in np.cumsum(gaps).tolist())
    return RequestRecord(arrival, times, times[-1], prompt, (len(times),))


@given(record=records())
def test_parts_of_a_request_add_up(record):
    assert record.ttft + sum(record.itls) == pytest.approx(record.latency)
    tokens = record.output_lens[0]
    if tokens > 1:
        assert record.tpot == pytest.approx(sum(record.itls) / (tokens - 1))
    else:
        assert record.tpot is None


@given(batch=st.lists(records(), min_size=1, max_size=8), duration=st.floats(0.1, 1e4))
def test_json_round_trip_and_order_of_statistics(batch, duration):
    metrics = compute_metrics(batch, duration, SLO(ttft_ms=100.0), PeakMemory(5, 3, None))
    assert RunMetrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics
    for stats in (metrics.ttft_ms, metrics.e2el_ms):
        assert stats.median <= stats.p99 * (1 + 1e-12)
    assert metrics.output_throughput * duration == pytest.approx(metrics.num_output_tokens)
    assert metrics.total_token_throughput >= metrics.output_throughput
    assert 0 <= metrics.request_goodput <= metrics.request_throughput


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_p99_by_its_definition(values):
    """Linear interpolation at rank 0.99 * (n - 1) of the sorted values."""
    ordered, rank = sorted(values), 0.99 * (len(values) - 1)
    low = ordered[int(rank)]
    high = ordered[min(int(rank) + 1, len(values) - 1)]
    assert Stats.of(values).p99 == pytest.approx(low + (rank - int(rank)) * (high - low), rel=1e-6, abs=1e-6)


def test_reading_refuses_another_schema():
    data = compute_metrics([ONE_TOKEN], 1.0).to_dict()
    without_version = {key: value for key, value in data.items() if key != "schema_version"}
    without_duration = {key: value for key, value in data.items() if key != "duration_s"}
    for wrong, message in ((data | {"schema_version": 2}, "schema_version=2"),
                           (without_version, "schema_version=None"),
                           (data | {"surprise": 1}, "surprise"),
                           (without_duration, "duration_s")):
        with pytest.raises(ConfigError, match=message):
            RunMetrics.from_dict(wrong)


def test_memory_meter_sees_what_is_held_for_a_while(monkeypatch):
    """Until the meter has looked twice: of the two looks one at least began while it was held.

    In a process of its own: what other tests leave to the collector, or to threads that are just ending, would go
    in the same moments.
    """
    size, looks = 200 * 2**20, []
    look = MemoryMeter._resident
    monkeypatch.setattr(MemoryMeter, "_resident", lambda meter: looks.append(look(meter)) or looks[-1])
    code = f"print('up', flush=True); input(); held = b'x' * {size}; print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "up\n"
        with MemoryMeter(holder.pid) as meter:
            holder.stdin.write("\n")
            holder.stdin.flush()
            assert holder.stdout.readline() == "held\n"
            before = len(looks)
            while len(looks) < before + 2:
                time.sleep(0.01)
            holder.communicate("\n")
    assert size * 0.9 < meter.peak.rss_added_bytes < size * 1.5
    assert meter.peak.rss_bytes > meter.peak.rss_added_bytes


def test_memory_meter_starts_anew():
    """The high-water mark of the operating system would still show the first run's memory."""
    held = np.ones(200 * 2**20, dtype=np.uint8)
    del held
    with MemoryMeter(os.getpid()) as meter:
        pass
    assert meter.peak.rss_added_bytes < 50 * 2**20
