"""F2.12: what the field's clients and machines expect around the answers: fields, headers, origins, ids, the log."""
from __future__ import annotations

import json
import logging
import re
import socket
import urllib.error
import urllib.request

import openai
import pydantic
import pytest

from m0_basics.config import ConfigError
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
    assert server.send(CHAT, chat(chat_template_kwargs={"enable_thinking": False}))[0] == 200
    assert server.send(CHAT, chat(chat_template_kwargs={"messages": []}))[0] == 400


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
        wait_until(lambda: sum("tokens" in r.getMessage() for r in caplog.records) == 3)
    first, second, third = (r.getMessage() for r in caplog.records if "tokens" in r.getMessage())
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
