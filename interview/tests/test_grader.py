"""The grader: what it asks, what it understands, and that whatever goes wrong over there is only a sentence here."""
from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from interview.grader import Grade, Grader, parse_grade
from interview.points import must_have
from interview.tests.helpers import question


@pytest.mark.parametrize(("reply", "expected"), [
    ('{"shares": [1, 0.5, 0], "comment": "Good."}', Grade((1.0, 0.5, 0.0), "Good.")),
    ('Sure! ```json\n{"shares": [2, -1, 0.25]}\n``` Bye {', Grade((1.0, 0.0, 0.25), "")),
    ('{"a": 1} {"shares": ["1", "0", "0.5"]}', Grade((1.0, 0.0, 0.5), "")),
    ('{"shares": [1, 1]}', None), ('{"shares": [1, 1, NaN]}', None), ('{"shares": 3}', None), ("8 of 10", None),
    ("", None),
    ('{"shares": [1, 1, "x"]}', None)])
def test_replies(reply: str, expected: Grade | None) -> None:
    assert parse_grade(reply, 3) == expected


def test_points_of_a_grade() -> None:
    grade, points = Grade((1.0, 0.5, 0.0), "So."), must_have(question().entry)
    assert grade.points(points) == 5.5
    assert grade.report(points) == "5.5 (3.0 + 2.5 + 0.0). So."


class Server(BaseHTTPRequestHandler):
    replies: ClassVar[list[tuple[int, str]]] = []
    asked: ClassVar[list[dict[str, object]]] = []

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, text = self.replies.pop(0)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
        self._send(status, reply if status == 200 else {"error": {"message": text}})

    def _send(self, status: int, data: object) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Silent."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Server, "replies", [])
    monkeypatch.setattr(Server, "asked", [])
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_openai_server_is_asked_for_a_share_of_each_point(url: str) -> None:
    Server.replies.append((200, '{"shares": [1, 1, 0], "comment": "No third."}'))
    grader = Grader(url)
    assert grader.grade(question().entry, "it is so") == Grade((1.0, 1.0, 0.0), "No third.")
    [asked] = Server.asked
    text = asked["messages"][0]["content"]                              # type: ignore[index]
    assert asked["model"] == "tiny" and asked["response_format"]["type"] == "json_schema"      # type: ignore[index]
    assert "it is so" in text and "- the second, over two lines" in text and "[3 numbers]" in text
    assert "SHORT" not in text


@pytest.mark.parametrize("status", [400, 422, 503])
def test_a_server_without_structured_output_is_asked_again(url: str, status: int) -> None:
    Server.replies += [(status, "response_format is not supported"), (200, '{"shares": [0, 0, 1]}')]
    assert Grader(url, "mine").grade(question().entry, "x") == Grade((0.0, 0.0, 1.0), "")
    assert [("response_format" in asked, asked["model"]) for asked in Server.asked] == [(True, "mine"), (False, "mine")]


def test_what_goes_wrong_is_a_sentence(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grader = Grader(url)
    Server.replies += [(500, "out of order"), (500, "out of order"), (200, "I would say eight.")]
    assert grader.grade(question().entry, "x") is None
    assert "InternalServerError" in grader.problem and "out of order" in grader.problem
    assert grader.grade(question().entry, "x") is None
    assert grader.problem == f"{url} did not reply with 3 shares but with 'I would say eight.'"
    nobody = Grader("http://127.0.0.1:9/v1")
    assert nobody.grade(question().entry, "x") is None
    assert "APIConnectionError" in nobody.problem
    monkeypatch.setitem(sys.modules, "openai", None)
    assert grader.grade(question().entry, "x") is None
    assert "pip install 'openai>=2.0'" in grader.problem
