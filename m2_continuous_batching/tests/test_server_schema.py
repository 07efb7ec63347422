"""F2.12: whatever fits the server's own OpenAPI schema, and what does not, is answered without a server error."""
from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode

from m2_continuous_batching import LLM
from m2_continuous_batching.tools.testing.server import MODEL, RunningServer, wait_until

pytestmark = pytest.mark.slow
NUM_EXAMPLES = {GenerationMode.POSITIVE: 300, GenerationMode.NEGATIVE: 150}
SUBJECTS = ("prompt", "messages", "tokens")         # what a request is about
COMPLETIONS, CHAT, TOKENIZE = "POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize"


@pytest.fixture(scope="module")
def server(tiny_model):
    options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8}
    with RunningServer(partial(LLM, str(tiny_model("qwen3")), **options)) as running:
        yield running


def narrow(body, num_options, model):
    """The body with its first `num_options` options (None: all of them), and a model that exists (or its own).

    Of many options one is nearly always out of range, and so is any name of a model; most messages are drawn
    without a content, which the assistant's alone may lack. Of bodies as they are drawn hardly one would get past
    the checks.
    """
    options = [name for name in body if name not in (*SUBJECTS, "model")][:num_options]
    kept = {name: value for name, value in body.items() if name in (*SUBJECTS, *options)}
    if num_options is not None:
        for message in kept.get("messages") or ():
            message.setdefault("content", "hi")
    if model == "its own":
        return kept | {name: body[name] for name in ("model",) if name in body}
    return kept | ({"model": model} if model else {})


def send_all(server, mode):
    """{operation: how often it answered with which status}. Fails at the first server error."""
    statuses = defaultdict[str, Counter[int]](Counter)

    def send(case, num_options, model):
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = narrow(case.body, num_options, model)
        answer = case.call(base_url=server.url, timeout=300)
        statuses[case.operation.label][answer.status_code] += 1
        assert answer.status_code < 500, answer.text

    settings = hypothesis.settings(max_examples=NUM_EXAMPLES[mode], deadline=None, database=None, derandomize=True,
                                   suppress_health_check=list(hypothesis.HealthCheck))
    num_options = st.sampled_from([0, 1, 2, 4, None])
    model = st.sampled_from([None, MODEL, None, MODEL, "its own", "missing"])
    for result in schemathesis.openapi.from_dict(server.app.openapi()).get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.POSITIVE or operation.body:
            settings(hypothesis.given(operation.as_strategy(mode), num_options, model)(send))()
    wait_until(server.is_empty)
    assert server.engine.is_healthy
    return statuses


def test_no_request_that_fits_the_schema_makes_the_server_fail(server):
    """Every operation; requests are served, refused, and sent to the wrong model. The engine is as good as new."""
    statuses = send_all(server, GenerationMode.POSITIVE)
    assert {COMPLETIONS, CHAT, TOKENIZE, "POST /detokenize", "GET /v1/models", "GET /health",
            "GET /metrics"} <= set(statuses)
    for operation in (COMPLETIONS, CHAT, TOKENIZE):
        assert {200, 400} <= set(statuses[operation]), statuses
        assert statuses[operation][200] >= 5, statuses


def test_no_request_that_breaks_the_schema_makes_the_server_fail(server):
    """Fields of wrong types, missing ones, unknown ones: next to none of it is served."""
    statuses = send_all(server, GenerationMode.NEGATIVE)
    for operation in (COMPLETIONS, CHAT, TOKENIZE, "POST /detokenize"):
        assert statuses[operation][400] > NUM_EXAMPLES[GenerationMode.NEGATIVE] // 2, statuses
