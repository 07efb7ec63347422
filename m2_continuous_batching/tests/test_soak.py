"""F2.12: the soak test passes over a good server, and says what is wrong with a bad one."""
from __future__ import annotations

import dataclasses
import json

import pytest

from m2_continuous_batching.soak import Soak
from m2_continuous_batching.soak_server import as_flags

GOOD = Soak(clients=2, seconds=1.0, counts=dict.fromkeys(
    ("whole", "stream", "malformed", "leave_stream", "leave_whole"), 3), different=[], errors=[], lost=0,
    output_tokens=9, rss_early=100.0, rss_end=105.0, gauges_at_end={"vllm:num_requests_running": 0.0}, exit_status=0)


def test_a_short_soak_of_a_tiny_model(command, tiny_model, tmp_path):
    """A real server process and three clients."""
    result = command("soak", "--model", tiny_model("qwen3"), "--clients", 3, "--seconds", 4, "--output-dir", tmp_path,
                     package="m2_continuous_batching")
    assert result.status == 0, result.out + result.err
    assert result.out.splitlines()[-1] == "passed"
    soak = json.loads((tmp_path / "soak.json").read_text())["measurements"]["soak"]
    assert soak["complaints"] == []
    assert min(soak["counts"].values()) > 0
    assert soak["gauges_at_end"] == {"vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0,
                                     "vllm:kv_cache_usage_perc": 0}


@pytest.mark.parametrize(("change", "complaint"), [
    ({"different": [{}]}, "1 answers differ"), ({"errors": ["whole: oops"]}, "the first: whole: oops"),
    ({"lost": 2}, "2 requests were lost"), ({"rss_end": 120.0}, "memory grew from 100 to 120 MiB"),
    ({"gauges_at_end": {"vllm:num_requests_running": 1.0}}, "vllm:num_requests_running is 1.0 at the end"),
    ({"exit_status": -9}, "status -9"), ({"counts": {"whole": 1}}, "no client did stream"),
])
def test_every_fault_is_named(change, complaint):
    assert GOOD.complaints == []
    assert complaint in "; ".join(dataclasses.replace(GOOD, **change).complaints)


def test_flags_of_engine_options():
    assert as_flags({"max_num_seqs": 4, "async_scheduling": True, "skip_tokenizer_init": False}) == [
        "--max-num-seqs", "4", "--async-scheduling", "--no-skip-tokenizer-init"]
