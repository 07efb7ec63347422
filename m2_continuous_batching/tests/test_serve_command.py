"""F2.12: the server as a process of its own: start, SIGTERM with open streams, a port that is taken."""
from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest

from m2_continuous_batching.server.run import bind

ROOT = Path(__file__).resolve().parents[2]


def start(folder, *arguments, key=None):
    """A server process and its URL, which it prints when it is ready."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if key is None else {"LLM_LAB_API_KEY": key})
    process = subprocess.Popen(
        [sys.executable, "-m", "m2_continuous_batching", "serve", "--model", str(folder), "--dtype", "float32",
         "--port", "0", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment)
    line = process.stdout.readline()
    found = re.search(r"serving (\S+) at (http://\S+)", line)
    if found is None:
        process.kill()
        raise AssertionError(line + process.communicate()[1])
    return process, *found.groups()


@pytest.mark.slow
def test_sigterm_ends_open_streams_and_the_process(tiny_model):
    """A short request ends as usual, a long one is cut off with an error, nothing hangs, the status is 0."""
    process, name, url = start(tiny_model("qwen3"), "--grace", "1", "--served-model-name", "tiny", key="sesame")
    try:
        assert name == "tiny"
        assert 'Authorization: Bearer $LLM_LAB_API_KEY' in process.stdout.readline()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0)
        settings = {"model": name, "prompt": "the one", "temperature": 0}
        errors: list[str] = []

        def read(stream):
            try:
                list(stream)
            except openai.APIError as error:
                errors.append(str(error))

        # The short one gets a place at once. Three waves of 450 tokens take longer than the grace period.
        short = client.completions.create(**settings, max_tokens=20, stream=True)
        long = [client.completions.create(**settings, max_tokens=450, stream=True, extra_body={"ignore_eos": True})
                for _ in range(93)]
        readers = [threading.Thread(target=read, args=(stream,)) for stream in long]
        next(iter(long[0]))
        process.send_signal(signal.SIGTERM)
        assert list(short)[-1].choices[0].finish_reason in ("stop", "length")
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout=300)
        assert process.wait(timeout=300) == 0
        assert errors
        assert set(errors) == {"the server is shutting down"}
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_sigint_ends_an_idle_server(tiny_model):
    process, _, _ = start(tiny_model("qwen3"))
    try:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
    finally:
        process.kill()


def test_a_port_that_is_taken_is_one_clear_error(command, tiny_model):
    """Before the model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = command("serve", "--model", "no such folder", "--port", port, package="m2_continuous_batching")
    assert result.status == 2
    assert result.err.startswith(f"error: port={port} is not valid; allowed: one that is free on host '127.0.0.1'")
    assert len(result.err.splitlines()) == 1


def test_a_bad_option_is_one_clear_error(command, tiny_model):
    result = command("serve", "--model", tiny_model("qwen3"), "--port", 0, "--max-model-len", 9999,
                     package="m2_continuous_batching")
    assert result.status == 2
    assert "max_model_len=9999" in result.err


def test_an_empty_key_is_no_key(command, monkeypatch):
    """It would serve everybody: whoever sets the variable means to have a key."""
    monkeypatch.setenv("LLM_LAB_API_KEY", "")
    result = command("serve", "--model", "no such folder", "--port", 0, package="m2_continuous_batching")
    assert (result.status, result.err) == (
        2, "error: LLM_LAB_API_KEY='' is not valid; allowed: a key, or no such variable at all\n")
    monkeypatch.delenv("LLM_LAB_API_KEY")
    result = command("serve", "--model", "none", "--port", 0, "--api-key", "", package="m2_continuous_batching")
    assert result.status == 2
    assert "api_key=''" in result.err


def test_two_servers_at_one_port(command, tiny_model):
    """The second one is told before it loads its model, also while the first one still loads its own."""
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        result = command("serve", "--model", "no such folder", "--port", port, package="m2_continuous_batching")
    assert result.status == 2
    assert result.err.startswith(f"error: port={port} is not valid")
    bind("127.0.0.1", port).close()             # and is free again at once


@pytest.mark.parametrize(("flags", "part"), [
    (("--log-level", "loud"), "log_level='loud'"), (("--allowed-origins", "*"), "allowed_origins='*'"),
    (("--max-step-s", "0"), "max_step_s=0.0"), (("--max-grammar-chars", "0"), "max_grammar_chars=0")])
def test_a_bad_option_of_the_server(command, flags, part):
    result = command("serve", "--model", "no such folder", "--port", 0, *flags, package="m2_continuous_batching")
    assert result.status == 2
    assert part in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.slow
def test_the_log_of_a_process(tiny_model):
    """A line for each request on stderr, and nothing else."""
    process, name, url = start(tiny_model("qwen3"), "--served-model-name", "tiny")
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        client.completions.create(model=name, prompt="the", max_tokens=3, extra_headers={"X-Request-Id": "mine"})
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert re.fullmatch(r"\S+ \S+ INFO POST /v1/completions 200 1\+[123] tokens \d\S* s mine\n", err), err


@pytest.mark.slow
def test_a_worker_that_does_not_end_does_not_keep_the_process(tmp_path):
    """SIGTERM while a thread computes for ever: Python would wait for it, and the process ends all the same."""
    script = tmp_path / "hang.py"
    script.write_text(HANGING)
    process = subprocess.Popen([sys.executable, str(script), str(ROOT)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


HANGING = """
import sys, threading
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
from fastapi import FastAPI
from m2_continuous_batching.server import run
from m2_continuous_batching.server.workers import Workers

workers = Workers()

class Engine:
    is_working = True
    def start(self):
        workers._short.submit(threading.Event().wait)
    async def shutdown(self, drain_s):
        workers.close()

run.serve(FastAPI(), Engine(), run.bind("127.0.0.1", 0), 0.0, lambda: print("ready", flush=True))
"""


@pytest.mark.parametrize("when", ["importing", "running"])
def test_ctrl_c_leaves_no_traceback(when, tmp_path):
    """While torch is being imported, and afterwards."""
    source = tmp_path / "prompts.txt"
    source.write_text("x")
    process = subprocess.Popen([sys.executable, "-X", "importtime", "-m", "m0_basics", "chat"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wanted = "torch._" if when == "importing" else "m0_basics.llm"
    lines = []
    for line in process.stderr:
        lines.append(line)
        if wanted in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in "".join(lines) + rest


@pytest.mark.slow
def test_a_full_disk_is_one_line():
    """`/dev/full` is a disk without room."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "m0_basics", "facts"], stdout=full, stderr=subprocess.PIPE,
                              text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device\n"
