"""F7.2: a server over packed weights: answers, streams, cached tokens, and drafts counted."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

import m6_prefix_cache as m6
from m0_basics import SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.tools.testing.server import MODEL, RunningServer
from m7_gptq import LLM

from .packed_models import PackedModel, pack_gptq

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "block_size": 8}
PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def model(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack_gptq(tmp_path_factory.mktemp("packed") / "m", tiny_model("qwen3"))


@pytest.fixture
def server(model: PackedModel, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    options = OPTIONS | getattr(request, "param", {})
    with RunningServer(partial(LLM, str(model.packed), **options)) as running:
        yield running


@pytest.mark.parametrize("server", [{}, {"speculative_method": "self", "adaptive_drafts": False}], indirect=True,
                         ids=["packed", "drafting for itself"])
def test_answers_are_those_of_the_values(server: RunningServer, model: PackedModel) -> None:
    answer = server.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0)
    parts = server.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    plain = m6.LLM(str(model.plain), **OPTIONS)
    [expected] = plain.generate({"prompt_token_ids": PROMPT}, SamplingParams(temperature=0, max_tokens=12),
                                use_tqdm=False)
    assert answer.choices[0].text == expected.outputs[0].text
    assert "".join(part.choices[0].text for part in parts) == expected.outputs[0].text


def test_a_known_prompt_is_not_computed_again(server: RunningServer) -> None:
    found = []
    for _ in range(2):
        answer = server.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        found.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    assert found == [0, 39]


@pytest.mark.parametrize("server", [{"speculative_method": "self", "adaptive_drafts": False}], indirect=True)
def test_drafts_are_counted(server: RunningServer) -> None:
    server.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0,
                                       extra_body={"ignore_eos": True})
    _, text = server.send("/metrics")
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
              if line.startswith("vllm:spec_decode")}
    assert values["vllm:spec_decode_num_draft_tokens_total"] > 20
    assert values["vllm:spec_decode_num_accepted_tokens_total"] > 0
