"""F2.12: the soak test passes over a good server, and says what is wrong with a bad one."""
from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from functools import partial

import pytest

from m0_basics.tools.cli.options import as_flags
from m2_continuous_batching import LLM
from m2_continuous_batching.tools import soak_clients
from m2_continuous_batching.tools.soak import Soak, offline_answers
from m2_continuous_batching.tools.soak_clients import ACTIONS, SYNC_ACTIONS, run_client, run_sync_client, send_raw
from m2_continuous_batching.tools.soak_server import GAUGES
from m2_continuous_batching.tools.testing.server import MODEL, RunningServer

IDLE = dict.fromkeys(GAUGES, 0.0)
GOOD = Soak(clients=2, seconds=1.0, counts=dict.fromkeys((*ACTIONS, *SYNC_ACTIONS), 3), different=[], errors=[], lost=0,
            output_tokens=9, rss_early=100.0, rss_end=105.0, gauges_at_end=IDLE, exit_status=0)


@pytest.mark.slow
def test_a_short_soak_of_a_tiny_model(command, tiny_model, tmp_path):
    """A real server process and three clients."""
    result = command("soak", "--model", tiny_model("qwen3"), "--clients", 3, "--seconds", 2, "--output-dir", tmp_path,
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
    ({"gauges_at_end": IDLE | {"vllm:num_requests_running": 1.0}}, "vllm:num_requests_running is 1.0 at the end"),
    ({"gauges_at_end": {}}, "vllm:num_requests_waiting is not in /metrics"),
    ({"exit_status": -9}, "status -9"), ({"counts": {"whole": 1}}, "no client did stream"),
])
def test_every_fault_is_named(change, complaint):
    assert GOOD.complaints == []
    assert complaint in "; ".join(dataclasses.replace(GOOD, **change).complaints)


@pytest.mark.slow
def test_the_clients_notice_a_server_that_answers_something_else(tiny_model, monkeypatch):
    """Every good action compares: with other texts expected, each finds a difference; and no bad body is served."""
    options = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8}
    folder = str(tiny_model("qwen3"))
    monkeypatch.setattr(soak_clients, "MODEL", MODEL)
    answers = offline_answers(LLM, {"model": folder, **options})
    expected = [dataclasses.replace(answer, text="something else") for answer in answers]
    with RunningServer(partial(LLM, folder, **options)) as server:
        now = time.monotonic()          # a round each: however late it is, a client does all that it does once
        sync = run_sync_client(server.url, 0, now, expected)
        tally = asyncio.run(run_client(server.url, 0, now, expected))
        assert asyncio.run(send_raw(server.url, b'{"prompt": "x", "max_tokens": 1}')) == 200
    assert (sync.counts, tally.counts) == (SYNC_ACTIONS, ACTIONS)
    assert len(sync.different) == sum(sync.counts.values())
    compared = sum(tally.counts[action] for action in ("whole", "stream", "chat", "chat_stream"))
    assert len(tally.different) == compared > 0
    assert (tally.errors, sync.errors) == ([], [])


def test_flags_of_engine_options():
    assert as_flags({"max_num_seqs": 4, "async_scheduling": True, "skip_tokenizer_init": False}) == [
        "--max-num-seqs", "4", "--async-scheduling", "--no-skip-tokenizer-init"]
