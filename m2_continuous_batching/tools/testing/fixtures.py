"""A tiny model behind a server, and the same model without one to compare with: fixtures of a test module."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from m0_basics.base_llm import BaseLLM
from m0_basics.tools.testing.fixtures import TinyModels

from .server import RunningServer


def server_and_offline(make_llm: Callable[..., BaseLLM], **options: Any) -> tuple[Any, Any]:
    """Two fixtures, to be named `server` and `offline` in the test module; `options` are the `LLM`'s."""
    options = {"dtype": "float32", "max_num_seqs": 4, **options}

    @pytest.fixture(scope="module")
    def server(tiny_model: TinyModels) -> Iterator[RunningServer]:
        with RunningServer(partial(make_llm, str(tiny_model("qwen3")), **options)) as running:
            yield running

    @pytest.fixture(scope="module")
    def offline(tiny_model: TinyModels) -> BaseLLM:
        return make_llm(str(tiny_model("qwen3")), **options)

    return server, offline
