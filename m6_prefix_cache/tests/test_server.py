"""F6.3, F6.7: what clients and operators see: cached tokens in `usage`, hits in /metrics, salts by request or key."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest

from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.tools.testing.server import MODEL, RunningServer
from m6_prefix_cache import LLM

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "block_size": 8}
PROMPT = list(range(20, 60))


@pytest.fixture
def server(tiny_model: TinyModels, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A server of its own for each test: its cache is empty."""
    config = getattr(request, "param", {})
    with RunningServer(partial(LLM, str(tiny_model("qwen3")), **OPTIONS), **config) as running:
        yield running


def cached(server: RunningServer, key: str = "none", **extra: Any) -> int:
    """Tokens of PROMPT that were in the cache, as a client reads it."""
    client = server.client(api_key=key)
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_usage_tells_what_was_cached(server: RunningServer) -> None:
    assert [cached(server), cached(server)] == [0, 39]


def test_a_stream_tells_it_as_well(server: RunningServer) -> None:
    cached(server)
    *_, last = server.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=2, stream=True,
                                         stream_options={"include_usage": True})
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 39


def test_a_chat_finds_its_last_turn(server: RunningServer) -> None:
    client = server.client()
    messages: list[Any] = [{"role": "user", "content": "one two three four five six"}]
    found = []
    for turn in range(3):
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6, temperature=0)
        messages += [{"role": "assistant", "content": answer.choices[0].message.content},
                     {"role": "user", "content": f"and {turn}"}]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        found.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    assert found[0] == 0 < found[1] < found[2]


def test_a_salt_of_the_request(server: RunningServer) -> None:
    assert [cached(server, cache_salt=s) for s in ("a", "b", "a")] == [0, 0, 39]
    assert cached(server) == 0
    with pytest.raises(openai.BadRequestError, match="cache_salt"):
        cached(server, cache_salt="")


@pytest.mark.parametrize("server", [{"salt_by_api_key": True}], indirect=True)
def test_a_salt_by_key(server: RunningServer) -> None:
    """CVE-2025-46570: how fast an answer comes tells one tenant what another has asked."""
    assert [cached(server, key=k) for k in ("alice", "bob", "alice")] == [0, 0, 39]
    assert cached(server, key="bob", cache_salt="alice") == 0


def test_hits_are_counted(server: RunningServer) -> None:
    for _ in range(2):
        cached(server)
    _, text = server.send("/metrics")
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
              if line.startswith("vllm:prefix")}
    assert values["vllm:prefix_cache_queries_total"] == 80
    assert values["vllm:prefix_cache_hits_total"] == 39
