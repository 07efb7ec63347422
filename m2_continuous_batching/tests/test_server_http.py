"""F2.12: what the field's clients and machines expect around the answers: fields, headers, origins, ids, the log."""
from __future__ import annotations

import json
import logging
import re
import socket
import threading
import urllib.error
import urllib.request

import openai
import pydantic
import pytest

from m0_basics.config import ConfigError
from m0_basics.tests.test_chat_template import THINKING, with_template
from m0_basics.tools.testing.tiny_models import BOS
from m2_continuous_batching import LLM
from m2_continuous_batching.server.config import ServerConfig
from m2_continuous_batching.tools.testing.server import MODEL, RunningServer, wait_until

OPTIONS = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "on the 中"}
ORIGIN = "http://localhost:3000"


@pytest.fixture(scope="module")
def server(tiny_model):
    with RunningServer(lambda plugins: LLM(str(tiny_model("qwen3")), plugins=plugins, **OPTIONS)) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tiny_model):
    with RunningServer(lambda plugins: LLM(str(tiny_model("qwen3")), plugins=plugins, **OPTIONS), api_key="sesame",
                       allowed_origins=f'["{ORIGIN}"]', allow_credentials=True) as running:
        yield running


def send(server, method, path, body=None, **headers):
    """(status, headers, text) of any request."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, data, names, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def chat(**fields):
    return {"messages": [USER], "temperature": 0, "max_tokens": 3} | fields


@pytest.mark.parametrize(("path", "body"), [
    (CHAT, chat(metadata={"a": "b"}, store=True, user="me", service_tier="flex", prediction={"type": "content"})),
    (CHAT, chat(cache_prompt=True, id_slot=3, keep_alive="5m", parallel_tool_calls=True, safety_identifier="x")),
    (CHAT, chat(tools=[], tool_choice="auto", functions=None, mirostat=0, repeat_penalty=1.0, typical_p=1, grammar="")),
    (CHAT, chat(messages=[USER | {"type": "text", "cache_control": {"type": "ephemeral"}}])),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": "on the 中", "cache_control": {}}]}])),
    (CHAT, chat(include_reasoning=False, stream_options=None, response_format={"type": "text", "x": 1})),
    (COMPLETIONS, {"prompt": "x", "blah": 1}), (COMPLETIONS, {"prompt": "x", "cache_prompt": False}),
    (COMPLETIONS, b'{"prompt": "x", "\\ud800": 1}'),
    (COMPLETIONS, {"prompt": "x", "stream": True, "stream_options": {"a": 1}}),
    ("/tokenize", {"prompt": "x", "parse_special": True}), ("/detokenize", {"tokens": [1], "x": 1}),
])
def test_a_field_that_cannot_change_the_answer_is_ignored(server, path, body):
    """vLLM, llama.cpp and Ollama do the same; clients send what they like."""
    assert server.send(path, body)[0] == 200
    if path == CHAT:
        expected = server.send(CHAT, chat())[1]["choices"][0]["message"]
        assert server.send(CHAT, body)[1]["choices"][0]["message"] == expected


def test_what_is_ignored_is_logged_in_a_line(server, caplog):
    with caplog.at_level(logging.INFO, "m2_continuous_batching"):
        server.send(COMPLETIONS, {"prompt": "x", "max_tokens": 1} | {f"field\n{i}": i for i in range(1000)})
    [line] = [r.getMessage() for r in caplog.records if "ignored" in r.getMessage()]
    assert "field\\n0" in line
    assert len(line) < 400


@pytest.mark.parametrize(("path", "body", "param"), [
    (CHAT, chat(tools=[{"type": "function"}]), "tools"), (CHAT, chat(tool_choice="required"), "tool_choice"),
    (CHAT, chat(reasoning_effort="high"), "reasoning_effort"), (CHAT, chat(modalities=["audio"]), "modalities"),
    (CHAT, chat(chat_template="x"), "chat_template"), (CHAT, chat(documents=[{}]), "documents"),
    (CHAT, chat(repeat_penalty=1.1), "repeat_penalty"), (CHAT, chat(options={"seed": 1}), "options"),
    (CHAT, chat(guided_grammar="x"), "guided_grammar"), (CHAT, chat(structured_outputs={"grammar": "x"}),
                                                        "structured_outputs"),
    (CHAT, chat(messages=[USER | {"tool_calls": [{}]}]), "messages"),
    (CHAT, chat(messages=[{"role": "user"}]), "messages"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"), (COMPLETIONS, {"prompt": "x", "grammar": "x"}, "grammar"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "structured_outputs": {"regex": "("}}, "structured_outputs"),
    (COMPLETIONS, {"prompt": ""}, None), (COMPLETIONS, b"{", None), (COMPLETIONS, b"", None),
    (COMPLETIONS, b"[1]", None),
])
def test_a_field_that_would_change_it_is_refused_by_name(server, path, body, param):
    status, answer = server.send(path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_an_answer_may_be_sent_back_as_it_came(server):
    """LiteLLM and the official client's `parse` return their own messages, with fields that only answers have."""
    class Point(pydantic.BaseModel):
        x: bool

    client = server.client()
    first = client.chat.completions.parse(model=MODEL, messages=[USER], response_format=Point, max_tokens=60,
                                          temperature=0)
    own = first.choices[0].message
    assert isinstance(own.parsed, Point)
    again = client.chat.completions.create(model=MODEL, messages=[USER, own, USER], max_tokens=3, temperature=0)
    plain = [USER, {"role": "assistant", "content": own.content}, USER]
    assert again.choices[0].message.content == client.chat.completions.create(
        model=MODEL, messages=plain, max_tokens=3, temperature=0).choices[0].message.content


def test_an_answer_without_text(server):
    """What an assistant only called has null for a text, which is an empty one."""
    def tokens(message):
        return server.send("/tokenize", {"messages": [USER, message]})[1]["tokens"]

    empty = tokens({"role": "assistant", "content": ""})
    assert tokens({"role": "assistant", "content": None, "tool_calls": None}) == tokens({"role": "assistant"}) == empty


def test_template_options(server):
    """As the tokenizer renders them; what the answer goes on with is not in it."""
    tokenizer = server.llm.get_tokenizer()
    messages = [USER, {"role": "assistant", "content": "the one "}]
    own = {"add_generation_prompt": False, "continue_final_message": True}
    text = tokenizer.apply_chat_template(messages, **own)
    assert text.endswith("<|im_start|>assistant\nthe one ")
    assert server.send("/tokenize", {"messages": messages} | own)[1]["tokens"] == tokenizer.encode(text, False)
    expected = server.send(COMPLETIONS, {"prompt": tokenizer.encode(text, False), "temperature": 0, "max_tokens": 5})
    answer = server.send(CHAT, chat(messages=messages, max_tokens=5, **own))
    assert answer[1]["choices"][0]["message"]["content"] == expected[1]["choices"][0]["text"]
    status, answer = server.send(CHAT, chat(messages=messages, continue_final_message=True))
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")
    assert server.send(CHAT, chat(chat_template_kwargs={"messages": []}))[0] == 400


@pytest.fixture(scope="module")
def thinking(tiny_model, tmp_path_factory):
    """Its template reads a variable, and its tokenizer begins a text with a token."""
    folder = tmp_path_factory.mktemp("thinking")
    with_template(tiny_model("qwen3"), folder, THINKING)
    file = folder / "model" / "tokenizer.json"
    data = json.loads(file.read_text())
    [bos] = [token["id"] for token in data["added_tokens"] if token["content"] == BOS]
    first, text = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    data["post_processor"] = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text],
                              "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}}}
    file.write_text(json.dumps(data))
    with RunningServer(lambda plugins: LLM(str(folder / "model"), plugins=plugins, **OPTIONS)) as running:
        assert running.llm.get_tokenizer().encode("") == [bos]
        yield running


def test_variables_of_the_template(thinking):
    """They reach it: from a chat as from /tokenize."""
    tokenizer = thinking.llm.get_tokenizer()
    lengths = []
    for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        text = tokenizer.apply_chat_template([USER], chat_template_kwargs=variables)
        ids = tokenizer.encode(text, False)
        assert thinking.send("/tokenize", {"messages": [USER], "chat_template_kwargs": variables})[1]["tokens"] == ids
        answer = thinking.send(CHAT, chat(chat_template_kwargs=variables))[1]
        expected = thinking.send(COMPLETIONS, {"prompt": ids, "temperature": 0, "max_tokens": 3})[1]
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["choices"][0]["message"]["content"] == expected["choices"][0]["text"]
        lengths.append(len(ids))
    assert lengths[0] == lengths[2] < lengths[1]


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_of_a_chat(thinking, stream):
    """vLLM adds none by default, because templates write their own, and does where it is asked to."""
    tokenizer = thinking.llm.get_tokenizer()
    text = tokenizer.apply_chat_template([USER])
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    for given, added in (({}, False), ({"add_special_tokens": None}, False), ({"add_special_tokens": False}, False),
                         ({"add_special_tokens": True}, True)):
        ids = tokenizer.encode(text, added)
        assert thinking.send("/tokenize", {"messages": [USER]} | given)[1]["tokens"] == ids
        answer = thinking.send(CHAT, chat(**given, **options))[1]
        usage = json.loads(answer.split("data: ")[-2])["usage"] if stream else answer["usage"]
        assert usage["prompt_tokens"] == len(ids)
    for given, added in (({}, True), ({"add_special_tokens": None}, True), ({"add_special_tokens": False}, False)):
        ids = tokenizer.encode("on", added)
        assert thinking.send("/tokenize", {"prompt": "on"} | given)[1]["tokens"] == ids
        body = {"prompt": "on", "max_tokens": 1} | given
        assert thinking.send(COMPLETIONS, body)[1]["usage"]["prompt_tokens"] == len(ids)


def test_an_error_that_nobody_expected(server, caplog, monkeypatch):
    """A 500 like any other answer, with its headers and its line, and one traceback in the log."""
    def broken(body):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("m2_continuous_batching.server.chat.chat_params", broken)
    monkeypatch.setattr("m2_continuous_batching.server.metrics.PrometheusMetrics.render", lambda self: 1 / 0)
    for method, path, body in (("POST", CHAT, chat()), ("GET", "/metrics", None)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            status, headers, text = send(server, method, path, body, content_type="application/json", origin=ORIGIN,
                                         x_request_id="mine")
            wait_until(lambda path=path: any(f"{path} 500 0+0 tokens" in r.getMessage() for r in caplog.records))
        assert (status, headers["X-Request-Id"], headers["access-control-allow-origin"]) == (500, "mine", "*")
        assert json.loads(text)["error"] == {"message": "internal error", "type": "server_error", "param": None,
                                             "code": None}
        assert [r.exc_info[0] for r in caplog.records if r.exc_info] == [ZeroDivisionError]


def test_a_request_that_the_end_cuts_before_its_first_byte(tiny_model, caplog):
    """The grace period is over while an answer is still made: its client is told in the form of any error."""
    server = RunningServer(lambda plugins: LLM(str(tiny_model("qwen3")), plugins=plugins, **OPTIONS))
    server._uvicorn.config.timeout_graceful_shutdown = 0.1
    result = []

    with server, caplog.at_level(logging.INFO, "m2_continuous_batching"):
        release = threading.Event()
        original = server.llm.engine.runner.prepare_inputs
        server.llm.engine.runner.prepare_inputs = lambda *args: (release.wait(60), original(*args))[1]
        client = threading.Thread(target=lambda: result.append(send(
            server, "POST", COMPLETIONS, {"prompt": "x"}, content_type="application/json", x_request_id="mine")))
        client.start()
        wait_until(lambda: server.engine.num_open_requests == 1)
        server._uvicorn.should_exit = True
        client.join()
        release.set()
        # The line is written after the answer, by another thread than the client's.
        wait_until(lambda: any(r.getMessage().startswith("POST /v1/completions 503 ") for r in caplog.records))
    [(status, headers, text)] = result
    assert (status, headers["X-Request-Id"], headers["Retry-After"]) == (503, "mine", "1")
    assert json.loads(text)["error"]["message"] == "the server is shutting down"


def test_slash_and_scheme(locked):
    """Clients join URLs as they like, and a scheme is the same in any case (RFC 9110)."""
    for scheme in ("Bearer", "bearer", "BEARER"):
        for path in ("/v1/models", "/v1/models/"):
            status, _, text = send(locked, "GET", path, authorization=f"{scheme} sesame")
            assert (status, json.loads(text)["data"][0]["id"]) == (200, MODEL)
    for wrong in ("sesame", "Basic sesame", "Bearer", "Bearer  ", "bearer sesam", "Bearer sesame x", "Bearersesame"):
        status, headers, _ = send(locked, "GET", "/v1/models", authorization=wrong)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), wrong


def test_errors_say_what_to_do(server, monkeypatch):
    status, headers, text = send(server, "POST", COMPLETIONS, b'{"prompt": "x"}', content_type="")
    assert status == 415
    assert "Content-Type: application/json" in json.loads(text)["error"]["message"]
    assert send(server, "POST", COMPLETIONS, b"a=b", content_type="application/x-www-form-urlencoded")[0] == 415
    good = "application/json; charset=utf-8"
    assert send(server, "POST", COMPLETIONS, b'{"prompt": "x"}', content_type=good)[0] == 200
    status, headers, text = send(server, "GET", COMPLETIONS)
    assert (status, headers["Allow"]) == (405, "POST")
    assert json.loads(text)["error"]["type"] == "invalid_request_error"
    monkeypatch.setattr(server.engine, "_accepting", False)
    status, headers, text = send(server, "POST", COMPLETIONS, {"prompt": "x"}, content_type="application/json")
    assert (status, headers["Retry-After"]) == (503, "1")
    assert json.loads(text)["error"]["type"] == "server_error"


def test_browsers(server, locked):
    """By default from anywhere, as vLLM; else from where it is said, and a preflight carries no key."""
    ask = {"origin": ORIGIN, "access_control_request_method": "POST",
           "access_control_request_headers": "authorization,content-type"}
    for each, key in ((server, {}), (locked, {"authorization": "Bearer sesame"})):
        status, headers, _ = send(each, "OPTIONS", CHAT, **ask)
        assert status == 200
        assert headers["access-control-allow-origin"] in ("*", ORIGIN)
        assert "POST" in headers["access-control-allow-methods"]
        assert "authorization" in headers["access-control-allow-headers"]
        status, headers, _ = send(each, "POST", CHAT, chat(), origin=ORIGIN, content_type="application/json", **key)
        assert (status, headers["access-control-allow-origin"]) == (200, "*" if each is server else ORIGIN)
    assert send(locked, "POST", CHAT, chat(), origin=ORIGIN)[1]["access-control-allow-origin"] == ORIGIN    # also a 401
    assert send(locked, "OPTIONS", CHAT, **(ask | {"origin": "http://evil.example"}))[0] == 400
    status, headers, _ = send(locked, "OPTIONS", CHAT)
    assert (status, headers["Allow"]) == (405, "POST")


def test_request_ids_and_the_log(server, caplog):
    """One line with method, path, status, tokens, time and id; the answer carries the same id."""
    with caplog.at_level(logging.INFO, "m2_continuous_batching"):
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
        status, headers, text = send(server, "POST", COMPLETIONS, body, content_type="application/json",
                                     x_request_id="mine-1")
        assert (status, headers["X-Request-Id"], json.loads(text)["id"]) == (200, "mine-1", "cmpl-mine-1")
        status, headers, text = send(server, "POST", CHAT, chat(stream=True), content_type="application/json",
                                     x_request_id="a b")
        own = headers["X-Request-Id"]
        assert re.fullmatch("[0-9a-f]{32}", own), "what is no id is not repeated"
        assert f'"id":"chatcmpl-{own}"' in text
        assert len(send(server, "GET", "/nothing%0Aat%20all", x_request_id="y" * 129)[1]["X-Request-Id"]) == 32
        mine = ("mine-1", own, "/nothing")              # a line of an earlier test may come late

        def lines():
            return [line for part in mine for line in map(logging.LogRecord.getMessage, caplog.records) if part in line]

        wait_until(lambda: len(lines()) == 3)
    first, second, third = lines()
    assert re.fullmatch(r"POST /v1/completions 200 3\+4 tokens \d+\.\d{3} s mine-1", first)
    assert re.fullmatch(rf"POST /v1/chat/completions 200 \d+\+3 tokens \d+\.\d{{3}} s {own}", second)
    assert third.startswith(r"GET /nothing\nat all 404 0+0 tokens")


def test_a_request_id_in_the_body_comes_first(server):
    _, headers, text = send(server, "POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1, "request_id": "b"},
                            content_type="application/json", x_request_id="h")
    assert (json.loads(text)["id"], headers["X-Request-Id"]) == ("cmpl-b", "h")
    with pytest.raises(openai.NotFoundError) as error:
        server.client().models.retrieve("other")
    assert error.value.request_id == error.value.response.headers["x-request-id"]


@pytest.mark.parametrize(("options", "part"), [
    ({"api_key": ""}, "api_key=''"), ({"api_key": " "}, "api_key=' '"), ({"api_key": "a\n"}, "space at its ends"),
    ({"salt_by_api_key": True, "api_key": "a"}, "salt_by_api_key=True"),
    ({"max_step_s": 0}, "max_step_s=0"), ({"max_list_items": 0}, "max_list_items=0"),
    ({"allowed_origins": "*"}, "allowed_origins='*'"), ({"allowed_headers": "[1]"}, "allowed_headers")])
def test_bad_options(options, part):
    with pytest.raises(ConfigError) as error:
        ServerConfig(**options)
    assert part in str(error.value)


def test_silent_connections_make_room(tiny_model, monkeypatch):
    """The longest idle one gives way, so /health is answered; and what trickles in is given up after a time."""
    monkeypatch.setattr("m2_continuous_batching.tools.testing.server.PROTOCOL_LIMITS", (10, 0.5))
    with RunningServer(lambda plugins: LLM(str(tiny_model("qwen3")), plugins=plugins, **OPTIONS)) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        connections = [socket.create_connection(address) for _ in range(40)]
        for _ in range(5):
            assert server.send("/health") == (200, "")
        assert len(server.connections) <= 10
        slow = socket.create_connection(address)
        slow.settimeout(0.1)
        slow.sendall(b"GET /health HTTP/1.1\r\n")

        def is_closed():
            try:
                slow.sendall(b"x-slow: 1\r\n")          # a byte now and then does not keep it
                return slow.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        wait_until(is_closed)
        for connection in connections:
            connection.close()
        assert server.send(COMPLETIONS, {"prompt": "x", "max_tokens": 200, "ignore_eos": True})[0] == 200


def test_bodies_that_do_not_come_make_room(tiny_model, monkeypatch):
    """The longest awaited gives way; what is complete, or came last, does not."""
    monkeypatch.setattr("m2_continuous_batching.tools.testing.server.PROTOCOL_LIMITS", (10, 20.0))
    with RunningServer(lambda plugins: LLM(str(tiny_model("qwen3")), plugins=plugins, **OPTIONS)) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        head = (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n")
        waiting = []
        for i in range(12):
            waiting.append(socket.create_connection(address))
            waiting[i].sendall(head)
            port = waiting[i].getsockname()[1]
            wait_until(lambda port=port: any(c.client and c.client[1] == port and not c.is_idle
                                             for c in list(server.connections)), 20)
        for _ in range(3):
            assert server.send("/health") == (200, "")
        for connection in waiting:
            connection.settimeout(0.5)
        body = b'{"prompt": "x", "max_tokens": 1}'.ljust(100)
        waiting[-1].settimeout(60)
        waiting[-1].sendall(body)
        assert waiting[-1].recv(100).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionError):
            waiting[0].sendall(body)
            waiting[0].recv(100)
            raise ConnectionResetError          # closed in order is closed as well
        for connection in waiting:
            connection.close()
