"""F2.12: no request holds up all others: what is too much is refused before it is worked on, the rest runs aside.

How long others wait is measured by `python -m m2_continuous_batching stall`. Here stands why it cannot be long: what
is refused before anything is tokenised, compiled or made a list of complaints, and in which thread the rest runs.
"""
from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request

import pytest

from m0_basics.loading.tokenizer import Tokenizer
from m1_offline.detokenizer import StopAutomaton
from m2_continuous_batching import LLM
from m2_continuous_batching.server.bodies import count_nodes, parse_json
from m2_continuous_batching.server.errors import ApiError
from m2_continuous_batching.tools.hostile import HOSTILE, body_of
from m2_continuous_batching.tools.soak_server import ServerProcess
from m2_continuous_batching.tools.stall import save_stall_model
from m2_continuous_batching.tools.testing.server import RunningServer, wait_until

OPTIONS = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 64}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SECONDS = {"4 MB of text to /tokenize", "a large answer", "a penalty and n = 128", "9,000 optional properties"}


@pytest.fixture(scope="module")
def server(tiny_model):
    with RunningServer(lambda plugins: LLM(str(tiny_model("qwen3")), plugins=plugins, **OPTIONS),
                       max_queued_requests=1024) as running_server:
        yield running_server


@pytest.fixture
def worked(server, monkeypatch):
    """(what, in which thread) for everything that takes long."""
    done: list[tuple[str, str]] = []

    def watch(owner, name):
        inner = getattr(owner, name)

        def watched(*args, **kwargs):
            done.append((name, threading.current_thread().name.partition("_")[0]))
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(Tokenizer, "encode_batch")
    watch(server.llm.engine.sampler.grammars, "_compile_alone")
    watch(server.llm.input_processor, "process")
    return done


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in SECONDS else [])
    for name in HOSTILE if name != "4 MB of digits to /tokenize"])      # minutes
def test_a_hostile_request(server, worked, name):
    """It gets a short answer or a short complaint, and leaves nothing behind. What takes long runs in no thread of
    the server's own, and what is refused for its size has run nowhere.
    """
    case = HOSTILE[name]
    body = body_of(name)
    assert len(body) <= 4 * 2 ** 20
    status, answer = server.send(case.path, body)
    assert status == case.status, str(answer)[:500]
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert len(answer["error"]["message"]) <= 2000
        assert case.param in (None, answer["error"]["param"]), answer
    if case.is_refused_early:
        assert worked == []
    assert {thread for _, thread in worked} <= {"inputs", "long-inputs", "check", "compile"}
    assert server.send("/health") == (200, "")
    wait_until(server.is_empty, 60)


@pytest.mark.parametrize(("path", "body", "param"), [
    (COMPLETIONS, {"prompt": "x", "stop": ["y"] * 1025}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stop": "y" * 65_537}, "stop"),
    (COMPLETIONS, {"prompt": "x", "bad_words": ["y" * 40_000] * 2}, "bad_words"),
    (COMPLETIONS, {"prompt": "x", "stop": ["y" * 64] * 1009}, "stop"),      # 64,576 characters and an entry for each
    (COMPLETIONS, {"prompt": "x", "bad_words": ["y" * 64] * 1009}, "bad_words"),
    (COMPLETIONS, {"prompt": "x", "guided_choice": [""] * 120_001}, "guided_choice"),
    (COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": ["y"] * 60_001}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [1] * 1025}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "x", "allowed_token_ids": [1] * 1025}, "allowed_token_ids"),
    (COMPLETIONS, {"prompt": ["x"] * 1089}, "prompt"), (COMPLETIONS, {"prompt": [[1]] * 1089}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 9, "n": 128}, "n"),
    (COMPLETIONS, {"prompt": ["x"] * 9, "best_of": 128}, "best_of"),
    (COMPLETIONS, {"prompt": "x", "guided_regex": "a" * 120_001}, "guided_regex"),
    (COMPLETIONS, {"prompt": "x", "guided_json": json.dumps({"const": "a" * 120_000})}, "guided_json"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}] * 2049}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}] * 2}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "a" * 120_000}}}}, "response_format"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}],
            "structured_outputs": {"choice": ["a" * 60_000, "b" * 60_001]}}, "structured_outputs"),
])
def test_one_more_than_the_limit(server, worked, path, body, param):
    status, answer = server.send(path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert "allowed: at most" in answer["error"]["message"]
    assert worked == []


@pytest.mark.parametrize(("path", "body"), [
    (COMPLETIONS, {"prompt": "x", "stop": [f"{i}." for i in range(1024)]}),
    (COMPLETIONS, {"prompt": "x", "bad_words": [f"word {i}" for i in range(1024)]}),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(288)}}),
    (COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": [f"{i:05d}" for i in range(5000)]}}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 32}]}),
])
def test_as_much_as_the_limit(server, path, body):
    assert server.send(path, {"max_tokens": 3} | body)[0] == 200


@pytest.mark.parametrize(("body", "message"), [
    (b"[" * 60_000, "more lists"), (b'{"prompt": ' + b"[{}]," * 60_000, "more lists"),
    (b"{" + b'"a":1,' * 60_000, "more lists"), (b'"' + b":" * 50_001 + b'","\\\\"' * 250_000, "more texts"),
    (b'"' + b":" * 50_001 + b'\\\\"' + b"[" * 50_001 + b'"', "more lists"),
    (b"[" * 20_000, "not JSON"), (b"9" * 100_000, "not JSON"),
    (b'"' + b"\\" * 10 ** 6, "not JSON"), (b'{"a": "\xff"}', "UTF-8"), (b"{} x", "not JSON")])
def test_structure_is_counted_before_it_is_parsed(body, message):
    with pytest.raises(ApiError, match=message):
        parse_json(body)


def test_brackets_in_texts_do_not_count():
    """A program with many of them is one text."""
    text = '{"a": [1, "\\""]}' * 40_000
    body = json.dumps({"prompt": text}).encode()
    assert count_nodes(body) > 100_000
    assert parse_json(body) == {"prompt": text}


def test_a_million_mistakes_are_answered_with_a_few(server):
    for body in ({"prompt": [None] * 500_000}, {"prompt": "x", "logit_bias": {str(i): "a" for i in range(1000)}},
                 {"prompt": [[None] * 1000] * 500}):
        status, answer = server.send(COMPLETIONS, body)
        assert status == 400
        assert len(json.dumps(answer)) < 3000
    messages = [{"role": i, "content": 5} for i in range(2000)]
    status, answer = server.send(CHAT, {"messages": messages})
    assert status == 400
    assert len(json.dumps(answer)) < 3000


def test_a_text_that_cannot_fit_is_not_tokenised(server, worked):
    """By its characters: no token stands for more of them than the longest."""
    most = 255 + 1
    longest = server.llm.get_tokenizer().max_chars_per_token
    status, answer = server.send(COMPLETIONS, {"prompt": "x" * (most * longest + 1)})
    assert (status, answer["error"]["param"]) == (400, None)
    assert f"allowed: at most {most * longest} characters" in answer["error"]["message"]
    assert "encode_batch" not in dict(worked)
    assert server.send(COMPLETIONS, {"prompt": "x" * most * longest})[0] == 400
    assert "encode_batch" in dict(worked)


def watch_threads(monkeypatch, owner, name, wanted=lambda *args: True):
    """The threads in which `owner.name` is called with arguments that are `wanted`."""
    inner, threads = getattr(owner, name), []

    def watched(*args, **kwargs):
        if wanted(*args):
            threads.append(threading.current_thread().name.partition("_")[0])
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    return threads


@pytest.mark.parametrize("fields", [
    {"chat_template_kwargs": {"tools": ["x" * 1000] * 40}}, {"chat_template_kwargs": {"x": {"y" * 40_000: [1]}}},
    {"chat_template_kwargs": {"tools": [0] * 40_000}}, {"messages": [{"role": "x" * 40_000, "content": ""}]},
    {"messages": [{"role": "user", "content": "", "name": "x" * 40_000}]}])
def test_all_that_a_template_prints_counts(server, monkeypatch, fields):
    """Its text is made, and tokenised, where long ones are."""
    threads = watch_threads(monkeypatch, Tokenizer, "apply_chat_template")
    body = {"messages": [{"role": "user", "content": "x"}]} | fields
    assert server.send("/tokenize", body)[0] == 200
    assert server.send(CHAT, body | {"max_tokens": 1})[0] in (200, 400)
    assert threads == ["long-inputs"] * 2
    short = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": ["x"]}}
    assert server.send("/tokenize", short)[0] == 200
    assert threads[2:] == ["inputs"]


def test_token_ids_count(server, monkeypatch):
    """To look at each of two million takes half a second."""
    threads = watch_threads(monkeypatch, server.llm.input_processor, "process")
    for prompt in ([1] * 40_000, [1] * 40):
        server.send(COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
    assert threads == ["long-inputs", "inputs"]


def test_the_engine_builds_no_stop_automaton(server, monkeypatch):
    """It is there before the request is, once for all of its outputs; a long one waits for long ones only."""
    threads = watch_threads(monkeypatch, StopAutomaton, "__init__")
    for stop, thread in ((["\n", "one"], "inputs"), (HOSTILE["1,024 stop strings"].make()["stop"], "long-inputs")):
        threads.clear()
        body = {"prompt": ["x", "y"], "n": 4, "temperature": 1, "max_tokens": 3, "stop": stop}
        assert server.send(COMPLETIONS, body)[0] == 200
        assert threads == [thread]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_an_echo_is_made_once_for_a_prompt(server, monkeypatch, stream, logprobs):
    """And not in the event loop, whatever the number of outputs."""
    threads = watch_threads(monkeypatch, Tokenizer, "decode", lambda self, token_ids, *_: len(token_ids) == 200)
    prompts = [[66] * 200, [67] * 200]
    body = {"prompt": prompts, "n": 8, "temperature": 1, "max_tokens": 1, "echo": True, "logprobs": logprobs,
            "stream": stream}
    status, answer = server.send(COMPLETIONS, body)
    assert status == 200
    assert len(threads) == 2
    assert set(threads) <= {"inputs", "long-inputs"}
    texts = [server.llm.get_tokenizer().decode(prompt, False) for prompt in prompts]
    pieces = [answer]
    if stream:
        pieces = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    echoed = {}
    for choice in (choice for piece in pieces for choice in piece["choices"]):
        echoed.setdefault(choice["index"], choice["text"])
    assert len(echoed) == 16
    assert all(text.startswith(texts[index // 8]) for index, text in echoed.items())


@pytest.mark.slow
def test_another_request_is_answered_meanwhile(tmp_path):
    """By a server of its own. The bound is ten times what `stall` allows: no machine is that slow."""
    options = {"dtype": "float32", "max_num_seqs": 160, "model": str(save_stall_model(tmp_path))}
    with ServerProcess("m2_continuous_batching", options, "tiny") as server:
        def send(path, body):
            request = urllib.request.Request(server.url + path, body, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=300) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()

        def one_token():
            begin = time.perf_counter()
            status, answer = send(COMPLETIONS, b'{"prompt": "the", "max_tokens": 1, "temperature": 0}')
            assert status == 200
            waited.append(time.perf_counter() - begin)
            return json.loads(answer)["choices"][0]["text"]

        waited, statuses = [], []
        expected = one_token()
        for name in ("a million empty choices", "a million empty guided choices", "tools of 2 MB to /tokenize",
                     "1,024 stop strings", "a streamed echo"):
            hostile = threading.Thread(target=lambda path, body: statuses.append(send(path, body)[0]),
                                       args=(HOSTILE[name].path, body_of(name)))
            hostile.start()
            assert one_token() == expected
            while hostile.is_alive():
                assert one_token() == expected
            hostile.join()
            assert statuses.pop() == HOSTILE[name].status, name
        assert max(waited) < 5, "seconds"
