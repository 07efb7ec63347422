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

ROOT = Path(__file__).resolve().parents[2]


def start(folder, *arguments, key=None):
    """A server process and its URL, which it prints when it is ready."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"LLM_LAB_API_KEY": key} if key else {})
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
