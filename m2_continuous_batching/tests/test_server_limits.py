"""F2.12: what a server must not fall over: bad bodies, hang-ups, too much of everything, a dead engine."""
from __future__ import annotations

import asyncio
import json
import random
import resource
import socket
import threading
import time

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from m0_basics import SamplingParams
from m0_basics.tools.testing.parity import mixed_length_prompts
from m2_continuous_batching import LLM
from m2_continuous_batching.plugins import SchedulerPlugin
from m2_continuous_batching.server import connections
from m2_continuous_batching.tools.testing.server import MODEL, RunningServer, wait_until

OPTIONS = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"model": MODEL, "prompt": "the one", "temperature": 0, "max_tokens": 200}
OPENAI_LONG = LONG | {"extra_body": {"ignore_eos": True}}


class Watch(SchedulerPlugin):
    """Counts on its own what the metrics are to show, and can slow the engine down or break it."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.fail_with: BaseException | None = None
        self.completed = []
        self.num_steps = 0

    def before_step(self, scheduler):
        if self.fail_with is not None:
            raise self.fail_with
        time.sleep(self.step_s)

    def after_step(self, scheduler, stats):
        self.num_steps += 1

    def on_request_completion(self, request):
        self.completed.append(request)


def make_server(folder, **settings):
    """A server, and the watch in its engine."""
    watch = Watch()

    def make_llm(plugins):
        return LLM(str(folder), plugins=[*plugins, watch], **OPTIONS)

    return RunningServer(make_llm, **settings), watch


@pytest.fixture(scope="module")
def server_and_watch(tiny_model):
    server, watch = make_server(tiny_model("qwen3"), max_body_bytes=20_000)
    with server:
        yield server, watch


@pytest.fixture
def server(server_and_watch):
    server, watch = server_and_watch
    watch.step_s = 0.0
    wait_until(server.is_empty)
    return server


@pytest.fixture
def watch(server, server_and_watch):
    return server_and_watch[1]


def assert_error(answer, status, *parts):
    """OpenAI's form of an error, with `parts` in its message."""
    assert answer[0] == status, answer
    error = answer[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for part in parts:
        assert part in error["message"]


@pytest.mark.parametrize(("body", "parts"), [
    (b"", ["body"]), (b"{", ["not JSON"]), (b"\xff\xfe", []), (b"[1]", []), (b"null", []), (b"[" * 9000, []),
    ({}, ["prompt"]), ({"prompt": None}, ["prompt"]), ({"prompt": 5}, ["prompt"]), ({"prompt": []}, ["prompt=[]"]),
    ({"prompt": ""}, ["empty"]), ({"prompt": [[]]}, ["empty"]), ({"prompt": ["x", ""]}, ["empty"]),
    ({"prompt": [9999]}, ["9999", "vocabulary"]), ({"prompt": [-1]}, ["-1"]), ({"prompt": [1, "x"]}, ["prompt"]),
    ({"prompt": [True]}, ["prompt"]), ({"prompt": "x" * 300}, ["300 tokens", "at most 255"]),
    (b'{"prompt": "\\ud800"}', ["surrogate"]), (b'{"prompt": "x", "stop": "\\ud800"}', ["stop"]),
    (b'{"prompt": "x", "request_id": "\\ud800"}', ["request_id"]),
    (b'{"prompt": "x", "temperature": NaN}', ["temperature"]),
    ({"prompt": "x", "temperature": -1}, ["temperature=-1", "allowed"]),
    ({"prompt": "x", "temperature": "1"}, ["temperature='1'"]), ({"prompt": "x", "n": 0}, ["n=0"]),
    ({"prompt": "x", "n": 10 ** 9}, ["n=1000000000", "128"]), ({"prompt": "x", "n": 2, "temperature": 0}, ["n=2"]),
    ({"prompt": "x", "n": 3, "best_of": 2}, ["best_of=2"]), ({"prompt": "x", "max_tokens": -1}, ["max_tokens=-1"]),
    ({"prompt": "x", "max_tokens": 0, "min_tokens": 1}, ["min_tokens=1"]), ({"prompt": "x", "top_p": 0}, ["top_p=0"]),
    ({"prompt": "x", "logprobs": 21}, ["logprobs=21", "20"]), ({"prompt": "x", "logprobs": True}, ["logprobs=True"]),
    ({"prompt": "x", "logit_bias": {"a": 1}}, ["logit_bias='a'"]),
    ({"prompt": "x", "logit_bias": {"99999": 1}}, ["99999"]), ({"prompt": "x", "stop": [""]}, ["stop"]),
    ({"prompt": "x", "best_of": 2, "stream": True}, ["best_of=2"]), ({"prompt": "x", "timeout": 0}, ["timeout"]),
    ({"prompt": "x", "priority": 10 ** 400}, ["priority"]), ({"prompt": "x", "sla_class": "gold"}, ["gold"]),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, ["stream_options"]),
    ({"prompt": "x", "suffix": "y"}, ["suffix", "not supported"]),
    ({"prompt": "x", "mirostat": 2}, ["mirostat is not supported"]),
    ({"prompt": "x", "structured_outputs": {}}, ["structured_outputs"]),
])
def test_a_bad_body_is_a_400_that_names_it(server, body, parts):
    assert_error(server.send(COMPLETIONS, body), 400, *parts)
    assert server.is_empty()


@pytest.mark.parametrize(("body", "parts"), [
    ({}, ["messages"]), ({"messages": []}, ["messages"]), ({"messages": [{"role": "user"}]}, ["content"]),
    ({"messages": [{"role": "user", "content": None}]}, ["content"]),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, ["type"]),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, ["tool_calls"]),
    ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, ["logprobs"]),
    ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "max_completion_tokens": 4}, ["differ"]),
    ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}}, ["json_schema"]),
    ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}}, ["'xml'"]),
])
def test_a_bad_chat_is_a_400_that_names_it(server, body, parts):
    assert_error(server.send(CHAT, body), 400, *parts)


def test_other_routes_and_methods(server):
    assert_error(server.send("/v1/nothing"), 404)
    assert_error(server.send(COMPLETIONS), 405)
    assert_error(server.send("/v1/models/other"), 404, "'other'")
    assert server.send("/v1/models/tiny")[1]["id"] == MODEL
    models = server.client().models.list().data
    assert [(m.id, m.max_model_len) for m in models] == [(MODEL, 256)]
    assert server.send("/health") == (200, "")
    assert server.send("/ping") == (200, "")
    assert server.send("/version")[1]["version"] == server.app.version


def test_tokenize_and_back(server):
    tokenizer = server.llm.get_tokenizer()
    text = "on the 中 <|im_end|>"
    status, answer = server.send("/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200
    assert answer["tokens"] == tokenizer.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 256)
    assert answer["token_strs"] == [tokenizer.decode([i], False) for i in answer["tokens"]]
    assert server.send("/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": text})
    messages = [{"role": "user", "content": "on"}]
    chat = server.send("/tokenize", {"messages": messages})[1]["tokens"]
    assert chat == tokenizer.encode(tokenizer.apply_chat_template(messages), False)
    assert_error(server.send("/detokenize", {"tokens": [9999]}), 400, "tokens=9999")
    assert_error(server.send("/tokenize", {}), 400, "exactly one")
    assert_error(server.send("/tokenize", b'{"prompt": "\\ud800"}'), 400, "surrogate")


def test_a_body_that_is_too_large(server):
    """By its declared length, and, where it comes in chunks without one, by counting."""
    large = {"prompt": "x" * 20_000}
    assert_error(server.send(COMPLETIONS, large), 413, "20000 bytes")
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Transfer-Encoding: chunked\r\n\r\n")
        data = json.dumps(large).encode()
        connection.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_api_key(tiny_model):
    server, _ = make_server(tiny_model("qwen3"), api_key="sesame")
    with server:
        assert_error(server.send(COMPLETIONS, LONG), 401, "API key")
        assert_error(server.send("/v1/models"), 401)
        assert_error(server.send("/tokenize", {"prompt": "x"}, {"authorization": "Bearer sesam"}), 401)
        assert server.send("/health")[0] == server.send("/metrics")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").models.list()
        client = server.client(api_key="sesame")
        assert client.completions.create(**(LONG | {"max_tokens": 2})).usage.completion_tokens == 2


def test_a_closed_stream_frees_the_request(server, watch):
    watch.step_s = 0.005
    stream = server.client().completions.create(**OPENAI_LONG, stream=True)
    next(iter(stream))
    assert not server.is_empty()
    stream.close()
    wait_until(server.is_empty)
    assert watch.completed[-1].sequences[0].status.finish_reason == "abort"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wait_for_steps", [0, 3])
def test_a_client_that_hangs_up_frees_the_request(server, watch, stream, wait_for_steps):
    """Also one that waits for the whole answer."""
    watch.step_s = 0.005
    body = json.dumps(LONG | {"stream": stream, "ignore_eos": True, "n": 1}).encode()
    before, steps = len(watch.completed), watch.num_steps
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        wait_until(lambda: server.engine.num_open_requests == 1 and watch.num_steps >= steps + wait_for_steps)
    wait_until(lambda: server.is_empty() and len(watch.completed) == before + 1)
    assert watch.completed[-1].sequences[0].status.finish_reason == "abort"


def test_time_limit(server, watch):
    watch.step_s = 0.02
    answer = server.client().completions.create(**LONG, extra_body={"ignore_eos": True, "timeout": 0.2})
    assert answer.choices[0].finish_reason == "abort"
    assert answer.choices[0].stop_reason == "time limit"


@pytest.mark.slow
def test_sixteen_clients_some_of_which_hang_up(server, tiny_model):
    """Every answer that is read to its end equals the offline engine's, and nothing is left."""
    prompts = mixed_length_prompts(260, 16, seed=5)
    params = SamplingParams(temperature=0, max_tokens=24)
    offline = LLM(str(tiny_model("qwen3")), **OPTIONS).generate(prompts, params, use_tqdm=False)
    rng = random.Random(0)

    async def one(client, prompt, leave):
        stream = await client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=24,
                                                 stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if leave:
                await stream.close()
                return None
        return text

    async def run():
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, prompts[i % 16], rng.random() < 0.3) for i in range(64)))

    texts = asyncio.run(run())
    finished = [(text, i % 16) for i, text in enumerate(texts) if text is not None]
    assert 20 < len(finished) < 64
    assert [text for text, _ in finished] == [offline[i].outputs[0].text for _, i in finished]
    wait_until(server.is_empty)


def test_a_full_queue_is_a_503(tiny_model):
    server, watch = make_server(tiny_model("qwen3"), max_queued_requests=1)
    with server:
        watch.step_s = 0.005
        streams = [server.client().completions.create(**OPENAI_LONG, stream=True) for _ in range(4)]
        threads = [threading.Thread(target=lambda: server.send(COMPLETIONS, LONG | {"max_tokens": 2}))]
        threads[0].start()
        wait_until(lambda: server.engine.num_open_requests == 5)
        assert_error(server.send(COMPLETIONS, LONG), 503, "max_queued_requests=1")
        for stream in streams:
            stream.close()
        threads[0].join()
        assert server.send(COMPLETIONS, LONG | {"max_tokens": 2})[0] == 200


def test_a_failing_request_is_a_500_and_the_others_go_on(server, monkeypatch):
    """The engine isolates it; the answer says so, streamed or not."""
    runner = server.llm.engine.runner
    prepare_inputs = runner.prepare_inputs

    def broken(scheduled):
        if any(s.sequence.data.prompt_token_ids[0] == 77 for s in scheduled):
            raise ArithmeticError("cursed")
        return prepare_inputs(scheduled)

    monkeypatch.setattr(runner, "prepare_inputs", broken)
    results = {}
    other = threading.Thread(target=lambda: results.update(
        good=server.send(COMPLETIONS, LONG | {"max_tokens": 40, "ignore_eos": True})))
    other.start()
    assert_error(server.send(COMPLETIONS, LONG | {"prompt": [77, 1]}), 500, "ArithmeticError: cursed")
    with pytest.raises(openai.APIError, match="cursed"):
        list(server.client().completions.create(**(LONG | {"prompt": [77, 1]}), stream=True))
    other.join()
    assert results["good"][0] == 200
    assert results["good"][1]["usage"]["completion_tokens"] == 40


def test_the_death_of_the_engine(tiny_model):
    """Streams get an error event, waiting clients and new ones a 503, health turns red."""
    server, watch = make_server(tiny_model("qwen3"))
    with server:
        watch.step_s = 0.005
        stream = server.client().completions.create(**OPENAI_LONG, stream=True)
        chunks = iter(stream)
        next(chunks)
        results = {}
        waiting = threading.Thread(target=lambda: results.update(whole=server.send(COMPLETIONS, LONG)))
        waiting.start()
        wait_until(lambda: server.engine.num_open_requests == 2)
        watch.fail_with = MemoryError("gone")
        with pytest.raises(openai.APIError, match="gone"):
            list(chunks)
        waiting.join()
        assert_error(results["whole"], 503, "MemoryError: gone")
        assert_error(server.send(COMPLETIONS, LONG), 503, "gone")
        assert server.send("/health")[0] == 503


def scrape(server):
    """{(sample name, labels other than the model's): value}."""
    result = {}
    for family in text_string_to_metric_families(server.send("/metrics")[1]):
        for sample in family.samples:
            assert sample.labels["model_name"] == MODEL
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))
            result[sample.name.removeprefix("vllm:"), labels] = sample.value
    return result


def test_metrics_equal_independent_counts(tiny_model):
    """F2.12: a Prometheus parser reads /metrics; totals equal what the clients and a plugin of the test counted."""
    server, watch = make_server(tiny_model("qwen3"))
    with server:
        prompts = mixed_length_prompts(260, 7, seed=2)
        answers = [server.send(COMPLETIONS, {"prompt": p, "max_tokens": 5 + i, "ignore_eos": True})[1]
                   for i, p in enumerate(prompts)]
        watch.step_s = 0.005
        stream = server.client().completions.create(**OPENAI_LONG, stream=True)
        next(iter(stream))
        during = scrape(server)
        assert during["num_requests_running", ()] == 1
        assert during["kv_cache_usage_perc", ()] == 0.25
        stream.close()
        wait_until(server.is_empty)
        metrics = scrape(server)
    aborted = watch.completed[-1]
    num_aborted_tokens = len(aborted.sequences[0].output_token_ids)
    num_prompt = sum(map(len, prompts)) + len(aborted.prompt_token_ids)
    num_output = sum(a["usage"]["completion_tokens"] for a in answers) + num_aborted_tokens
    expected = {
        "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0, "num_preemptions_total": 0,
        "prompt_tokens_total": num_prompt, "generation_tokens_total": num_output,
        "request_prompt_tokens_sum": num_prompt, "request_prompt_tokens_count": 8,
        "request_generation_tokens_sum": num_output, "request_generation_tokens_count": 8,
        "iteration_tokens_total_count": watch.num_steps, "iteration_tokens_total_sum": num_prompt + num_output,
        "time_to_first_token_seconds_count": 8, "inter_token_latency_seconds_count": num_output - 8,
        "request_time_per_output_token_seconds_count": 8, "e2e_request_latency_seconds_count": 8,
        "request_queue_time_seconds_count": 8, "request_prefill_time_seconds_count": 8,
        "request_decode_time_seconds_count": 8,
    }
    assert {name: metrics[name, ()] for name in expected} == expected
    assert metrics["request_success_total", (("finished_reason", "length"),)] == 7
    assert metrics["request_success_total", (("finished_reason", "abort"),)] == 1
    times = [r.metrics for r in watch.completed]
    assert metrics["e2e_request_latency_seconds_sum", ()] == pytest.approx(
        sum(t.finished_time - t.arrival_time for t in times))
    assert metrics["time_to_first_token_seconds_sum", ()] == pytest.approx(
        sum(t.token_times[0] - t.arrival_time for t in times))
    assert metrics["time_to_first_token_seconds_sum", ()] == pytest.approx(
        metrics["request_queue_time_seconds_sum", ()] + metrics["request_prefill_time_seconds_sum", ()])


@pytest.mark.parametrize("many", [300, 1 << 20])
def test_the_limit_of_open_files(many, monkeypatch):
    """As many as are wanted, or as the process may have, is what it has then; and never fewer than before."""
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(connections, "_MANY_FILES", many)
    wanted = many if hard == resource.RLIM_INFINITY else min(many, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert connections.raise_file_limit(10 ** 9) == wanted - 64
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, hard)
        assert connections.raise_file_limit(7) == 7
        monkeypatch.setattr(connections, "_MANY_FILES", 10)
        assert connections.raise_file_limit(10 ** 9) == wanted - 64
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
        assert connections.raise_file_limit(7) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
