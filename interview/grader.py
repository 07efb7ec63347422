"""A grader for typed answers: any server that speaks OpenAI's API, this lab's own `serve` too.

It proposes a share for each must-have point; the learner decides. It fails softly: without the package, without a
server, or with a reply that is not what was asked for, `grade` returns None and `problem` says why.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m0_basics.tools.documents.interview import Entry

from .points import Point, must_have
from .screen import plain

_TIMEOUT = 120.0
_ASK = """You grade an interview answer. Question: {question}

The answer must have these points:
{points}

The answer:
{answer}

For each point give a share from 0 (missing or wrong) to 1 (said and right). Judge only what the answer says.
Reply with JSON only: {{"shares": [{count} numbers], "comment": "one sentence"}}"""


@dataclass(frozen=True)
class Grade:
    """What the grader proposes: a share from 0 to 1 for each point, and a sentence."""

    shares: tuple[float, ...]
    comment: str

    def points(self, points: Sequence[Point]) -> float:
        return sum(p.points * share for p, share in zip(points, self.shares, strict=True))

    def report(self, points: Sequence[Point]) -> str:
        parts = " + ".join(f"{p.points * share:.1f}" for p, share in zip(points, self.shares, strict=True))
        return f"{self.points(points):.1f} ({parts}). {self.comment}".strip()


class Grader:
    """Asks the server at `url` ("http://127.0.0.1:8000/v1"). `model` None: the first one that it lists."""

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url
        self.model = model
        self.problem = ""
        self._client: Any = None

    def grade(self, entry: Entry, answer: str) -> Grade | None:
        """A proposal for `answer`, or None, with `problem` set."""
        points = must_have(entry)
        try:
            reply = self._ask(_ASK.format(question=entry.question, answer=answer, count=len(points),
                                          points="\n".join(f"- {plain(p.text)}" for p in points)), len(points))
        except ImportError:
            self.problem = "the package openai is not installed; get it with: pip install 'openai>=2.0'"
            return None
        except Exception as error:          # whatever goes wrong over there, the quiz goes on
            self.problem = f"{self.url}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            return None
        found = parse_grade(reply, len(points))
        if found is None:
            self.problem = f"{self.url} did not reply with {len(points)} shares but with {reply[:80]!r}"
        return found

    def _ask(self, text: str, count: int) -> str:
        import openai
        if self._client is None:
            key = os.environ.get("OPENAI_API_KEY", "not needed")
            self._client = openai.OpenAI(base_url=self.url, api_key=key, timeout=_TIMEOUT, max_retries=0)
            self.model = self.model or self._client.models.list().data[0].id
        call: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": 256,
                                "messages": [{"role": "user", "content": text}]}
        schema = {"type": "object", "properties": {
            "shares": {"type": "array", "items": {"type": "number"}, "minItems": count, "maxItems": count},
            "comment": {"type": "string"}}, "required": ["shares", "comment"]}
        form = {"type": "json_schema", "json_schema": {"name": "grade", "schema": schema}}
        try:
            reply = self._client.chat.completions.create(**call, response_format=form)
        except openai.APIStatusError:       # a server without structured output, or too busy for it
            reply = self._client.chat.completions.create(**call)
        return str(reply.choices[0].message.content or "")


def parse_grade(reply: str, count: int) -> Grade | None:
    """The first JSON object of a reply that has `count` shares, clipped to 0..1; None if there is none."""
    for start in (m.start() for m in re.finditer(r"\{", reply)):
        try:
            data, _ = json.JSONDecoder().raw_decode(reply[start:])
            shares = [float(share) for share in data["shares"]]
        except (ValueError, KeyError, TypeError):
            continue
        if len(shares) == count and all(share == share for share in shares):
            return Grade(tuple(min(1.0, max(0.0, s)) for s in shares), str(data.get("comment", "")).strip())
    return None
