"""Requests that would hold up a server that works on them before it counts: 4 MiB at most, the size of a body.

Each was found to stop an earlier version of this server, or is a neighbour of one that did.
"""
from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_COMPLETIONS, _CHAT, _TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"
_BODY = 4 * 2 ** 20 - 200           # bytes


@dataclass(frozen=True)
class Hostile:
    """One request, and what comes of it with the server's default limits."""

    make: Callable[[], dict[str, Any] | bytes]
    status: int = 400
    path: str = _COMPLETIONS
    param: str | None = None
    is_refused_early: bool = False          # before anything is tokenised or compiled
    takes_all_places: bool = False          # who comes next waits for a place, as in every queue: no thread is held


def _early(make: Callable[[], dict[str, Any] | bytes], param: str | None = None, path: str = _COMPLETIONS) -> Hostile:
    return Hostile(make, 400, path, param, True)


def _prompt(**fields: Any) -> dict[str, Any]:
    return {"prompt": "the one", "max_tokens": 8, "temperature": 0} | fields


def _chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "the one"}], "max_tokens": 8} | fields


def _tokenize_tools(tools: list[Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "the one"}], "chat_template_kwargs": {"tools": tools}}


def _random_texts(number: int, length: int) -> list[str]:
    """Texts that have nothing in common, so that an automaton of them is as large as it gets."""
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=length)) for _ in range(number)]


def _packed(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, Hostile] = {
    "10,000 bad words": _early(lambda: _prompt(bad_words=[f"w{i}" for i in range(10_000)]), "bad_words"),
    "200,000 bad words": _early(lambda: _prompt(bad_words=[f"w{i}" for i in range(200_000)]), "bad_words"),
    "1,024 bad words": Hostile(lambda: _prompt(bad_words=[f"word number {i}" for i in range(1024)]), 200),
    "one long bad word": Hostile(lambda: _prompt(bad_words=["the " * 16_000], max_tokens=100), 200),
    "300,000 choices": _early(lambda: _prompt(structured_outputs={"choice": [f"c{i}" for i in range(300_000)]}),
                              "structured_outputs"),
    "a million empty choices": _early(
        lambda: _packed(_prompt(structured_outputs={"choice": [":" * 50_001] + [""] * 1_300_000}))),
    "a million empty guided choices": _early(
        lambda: _packed(_prompt(guided_choice=["yes"] + [""] * 1_300_000)), "guided_choice"),
    "20,000 choices": Hostile(lambda: _prompt(structured_outputs={"choice": [f"{i:05d}" for i in range(20_000)]}), 200),
    "an expensive regex": Hostile(lambda: _prompt(guided_regex="(a{1000}){1000}")),
    "another one": Hostile(lambda: _prompt(guided_regex="((((a{100}){100}){100}){100})")),
    "9,000 optional properties": Hostile(lambda: _prompt(guided_json={
        "type": "object", "properties": {f"p{i}": {} for i in range(9000)}})),
    "a deep schema": Hostile(lambda: _prompt(guided_json=_deep(300))),
    "4 MB of text": Hostile(lambda: _prompt(prompt="the one " * (_BODY // 8))),
    "4 MB of digits": Hostile(lambda: _prompt(prompt="1" * _BODY)),
    "4 MB of text to /tokenize": Hostile(lambda: {"prompt": "the one " * (_BODY // 8)}, 200, _TOKENIZE),
    "4 MB of digits to /tokenize": Hostile(lambda: {"prompt": "1" * _BODY, "return_token_strs": True}, 200, _TOKENIZE),
    "4 MB of text in a chat": Hostile(
        lambda: _chat(messages=[{"role": "user", "content": "the one " * (_BODY // 8 - 9)}]), 400, _CHAT),
    "2,000,000 token ids": Hostile(lambda: _prompt(prompt=[1] * (_BODY // 3))),
    "1,000,000 token ids to /detokenize": Hostile(lambda: {"tokens": [66] * 10 ** 6}, 200, "/detokenize"),
    "800,000 prompts": _early(lambda: _packed(_prompt(prompt=["x"] * 800_000)), "prompt"),
    "400,000 id lists": _early(lambda: _prompt(prompt=[[1]] * 400_000)),
    "1,000 prompts with n = 128": _early(lambda: _prompt(prompt=["x"] * 1000, n=128, temperature=1), "n"),
    "8 prompts with n = 128": Hostile(lambda: _prompt(prompt=["x"] * 8, n=128, temperature=1), 200,
                                      takes_all_places=True),
    "500,000 wrong types": _early(lambda: _prompt(prompt=[None] * 500_000)),
    "100,000 stop strings": _early(lambda: _prompt(stop=[f"s{i}" for i in range(100_000)]), "stop"),
    "1,024 stop strings": Hostile(lambda: _prompt(stop=_random_texts(1024, 63)), 200),
    "100,000 messages": _early(lambda: _chat(messages=[{"role": "user", "content": ""}] * 90_000), path=_CHAT),
    "2,048 messages": Hostile(lambda: _chat(messages=[{"role": "user", "content": "x"}] * 2048), 400, _CHAT),
    "100,000 parts": _early(
        lambda: _chat(messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 99_999}]), path=_CHAT),
    "200,000 unknown fields": _early(lambda: _prompt(**{f"f{i}": 1 for i in range(200_000)})),
    "200,000 biases": _early(lambda: _prompt(logit_bias={str(i): 1 for i in range(200_000)})),
    "500,000 stop tokens": _early(lambda: _prompt(stop_token_ids=[1] * 500_000), "stop_token_ids"),
    "1,400,000 lists": _early(lambda: b"[" + b"[]," * (_BODY // 3) + b"[]]"),
    "4 MB of brackets": _early(lambda: b"[" * _BODY),
    "a million strings": _early(lambda: b'{"x":[' + b'"[",' * (_BODY // 4 - 9) + b'""]}'),
    "a number of 4 MB": _early(lambda: b'{"prompt":"x","seed":' + b"9" * _BODY + b"}"),
    "template variables of 2 MB": Hostile(lambda: _chat(chat_template_kwargs={"x": "y" * 2 * 2 ** 20}), 200, _CHAT),
    "tools of 2 MB to /tokenize": Hostile(lambda: _tokenize_tools(["the one " * 240_000]), 200, _TOKENIZE),
    "an echo of ids and n = 128": Hostile(lambda: _prompt(prompt=[66] * 250, n=128, temperature=1, echo=True,
                                                          max_tokens=1), 200),
    "a streamed echo": Hostile(lambda: _prompt(prompt=[66] * 250, n=128, temperature=1, echo=True, max_tokens=1,
                                               stream=True), 200),
    "a large answer": Hostile(lambda: _chat(n=128, logprobs=True, top_logprobs=20, max_tokens=60, temperature=1,
                                            ignore_eos=True), 200, _CHAT),
    "a penalty and n = 128": Hostile(lambda: _prompt(prompt=[1] * 180, n=128, temperature=1, repetition_penalty=1.1,
                                                     max_tokens=60, ignore_eos=True), 200),
}


def body_of(name: str) -> bytes:
    """The bytes of a hostile request's body."""
    made = HOSTILE[name].make()
    return made if isinstance(made, bytes) else json.dumps(made).encode()
