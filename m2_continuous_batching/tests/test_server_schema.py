"""F2.12: whatever fits the server's own OpenAPI schema, and what does not, is answered without a server error."""
from __future__ import annotations

from functools import partial

import hypothesis
import pytest
import schemathesis

from m2_continuous_batching import LLM
from m2_continuous_batching.testing.server import RunningServer, wait_until

NUM_EXAMPLES = 12


@pytest.fixture(scope="module")
def server(tiny_model):
    options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8}
    with RunningServer(partial(LLM, str(tiny_model("qwen3")), **options)) as running:
        yield running


def test_no_request_makes_the_server_fail(server):
    """Every operation, good and bad bodies alike; the engine is as good as new afterwards."""
    schema = schemathesis.openapi.from_dict(server.app.openapi())
    statuses = dict[str, set[int]]()

    def send(case):
        answer = case.call(base_url=server.url, timeout=30)
        statuses.setdefault(case.operation.label, set()).add(answer.status_code)
        assert answer.status_code < 500, answer.text

    settings = hypothesis.settings(max_examples=NUM_EXAMPLES, deadline=None, database=None, derandomize=True,
                                   suppress_health_check=list(hypothesis.HealthCheck))
    for result in schema.get_all_operations():
        settings(hypothesis.given(case=result.ok().as_strategy())(send))()
    assert {"POST /v1/completions", "POST /v1/chat/completions", "GET /v1/models", "POST /tokenize",
            "POST /detokenize", "GET /health", "GET /metrics"} <= set(statuses)
    assert 400 in statuses["POST /v1/completions"]
    wait_until(server.is_empty)
    assert server.engine.is_healthy
