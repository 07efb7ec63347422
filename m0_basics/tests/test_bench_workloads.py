"""Workloads of the benchmarks: the same name must mean the same work everywhere (FX.2)."""
import hashlib
import json
import random
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.config import ConfigError
from m0_basics.tools.bench.workloads import BenchRequest, Workload, get_workload, workload_names

# sha256 of json.dumps([[prompt token ids, output length], ...]) of the public definition of ragged-64.
RAGGED_64 = "00c19193d0730d1491d4d6aa0e268c8ef22761319dcd6d481a150fc726e9e496"


def test_ragged_64_is_the_public_workload():
    workload = get_workload("ragged-64")
    pairs = [[list(r.prompt_token_ids), r.output_len] for r in workload.requests]
    assert hashlib.sha256(json.dumps(pairs).encode()).hexdigest() == RAGGED_64
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (8416, 4323)
    assert all(r.arrival_time == 0 for r in workload.requests)


def test_ragged_with_parameters_draws_length_ids_output_in_turn():
    rng = random.Random(7)
    for request in get_workload("ragged:num_requests=3,seed=7,prompt_min=2,prompt_max=5,output_max=20").requests:
        length = rng.randint(2, 5)
        assert request.prompt_token_ids == tuple(rng.randrange(100, 49_000) for _ in range(length))
        assert request.output_len == rng.randint(16, 20)


def test_number_in_the_name_and_parameters_behind_it():
    whole = get_workload("ragged-64")
    few = get_workload("ragged-64:num_requests=16")
    assert few.requests == whole.requests[:16]
    assert few.name == "ragged-64:num_requests=16"
    assert get_workload("ragged-16").requests == few.requests
    assert get_workload("ragged", num_requests=16).requests == few.requests
    assert get_workload("ragged:num_requests=3", num_requests=16).requests == few.requests     # keywords win


def test_single_is_the_first_request_of_ragged():
    single = get_workload("single")
    assert single.requests[0].prompt_token_ids == get_workload("ragged-64").requests[0].prompt_token_ids
    assert [r.output_len for r in single.requests] == [64]
    assert get_workload("single:output_len=5").requests[0].output_len == 5


def test_decode_and_equal():
    (request,) = get_workload("decode-300:prompt_len=4").requests
    assert (len(request.prompt_token_ids), request.output_len) == (4, 300)
    lengths = {(len(r.prompt_token_ids), r.output_len) for r in get_workload("equal-32").requests}
    assert lengths == {(128, 64)}
    assert len(get_workload("equal-32").requests) == 32


def test_poisson_is_ragged_with_arrivals():
    workload = get_workload("poisson-2000:rate=5,prompt_max=16,output_max=16")
    arrivals = [r.arrival_time for r in workload.requests]
    gaps = [b - a for a, b in pairwise(arrivals)]
    assert arrivals[0] == 0
    assert min(gaps) > 0
    # Exponential gaps: mean 1 / rate, and a share of 1 / e longer than the mean; bounds are 4 standard errors.
    assert mean(gaps) == pytest.approx(0.2, abs=4 * 0.2 / 2000 ** 0.5)
    assert mean(gap > 0.2 for gap in gaps) == pytest.approx(0.3679, abs=4 * 0.48 / 2000 ** 0.5)
    plain = get_workload("ragged-64").requests
    timed = get_workload("poisson-64").requests
    assert [(r.prompt_token_ids, r.output_len) for r in timed] == [(r.prompt_token_ids, r.output_len) for r in plain]
    assert get_workload("poisson-64") == get_workload("poisson-64")
    assert get_workload("poisson-64:seed=1").requests[1].arrival_time != timed[1].arrival_time


@pytest.mark.parametrize(("text", "words"), [
    ("nonsense", ["nonsense", *workload_names()]),
    ("ragged-", ["ragged-", "ragged-64"]),
    ("Ragged-64", ["Ragged-64"]),
    ("ragged-64:size=3", ["size", "num_requests", "output_max"]),
    ("ragged-64:seed", ["'seed'", "key=value"]),
    ("ragged-64:num_requests=0", ["num_requests=0", ">= 1"]),
    ("ragged-0", ["num_requests=0", ">= 1"]),
    ("ragged-64:num_requests=2.5", ["num_requests='2.5'", "an integer"]),
    ("ragged-64:prompt_min=300", ["prompt_min=300", "at most prompt_max, 256"]),
    ("ragged-64:output_max=3", ["output_min=16", "at most output_max, 3"]),
    ("ragged-64:vocab_size=100", ["vocab_size", ">= 101"]),
    ("poisson:rate=0", ["rate=0.0", "above 0"]),
    ("poisson:rate=nan", ["rate=nan", "above 0"]),
    ("poisson:rate=fast", ["rate='fast'", "a number"]),
])
def test_errors_name_the_value_and_what_is_allowed(text, words):
    with pytest.raises(ConfigError) as caught:
        get_workload(text)
    for word in words:
        assert word in str(caught.value)


def test_keywords_are_checked_too():
    with pytest.raises(ConfigError, match=r"num_requests=2\.5"):
        get_workload("ragged", num_requests=2.5)


@pytest.mark.parametrize("name", workload_names())
def test_every_listed_name_can_be_built(name):
    workload = get_workload(name)
    assert workload.name == name
    assert workload.summary()["num_requests"] == len(workload.requests)


def test_workload_checks_itself():
    with pytest.raises(ConfigError, match="at least one request"):
        Workload("empty", ())
    with pytest.raises(ConfigError, match="arrival"):
        Workload("backwards", (BenchRequest((1,), 1, 2.0), BenchRequest((1,), 1, 1.0)))


def test_warm_up_is_a_small_taste():
    warm = get_workload("poisson-64").warm_up()
    assert [(r.output_len, r.arrival_time) for r in warm.requests] == [(4, 0.0), (4, 0.0)]
    assert [r.output_len for r in get_workload("single:output_len=2").warm_up().requests] == [2]


@given(vocab_size=st.integers(1, 60_000))
def test_fit_vocabulary_keeps_lengths(vocab_size):
    workload = get_workload("ragged-4")
    fitted = workload.fit_vocabulary(vocab_size)
    assert all(0 <= i < vocab_size for r in fitted.requests for i in r.prompt_token_ids)
    assert [(len(r.prompt_token_ids), r.output_len) for r in fitted.requests] == [
        (len(r.prompt_token_ids), r.output_len) for r in workload.requests]
    largest = max(i for r in workload.requests for i in r.prompt_token_ids)
    assert (fitted is workload) == (largest < vocab_size)


def test_mixed_is_streams_and_long_prompts_that_come_meanwhile():
    """Streams from the start; lengths grow by equal factors, one at a time."""
    workload = get_workload("mixed-3:num_long=4,long_min=100,long_max=800,first=1,every=2", stream_prompt=8,
                            stream_output=9)
    streams, long = workload.requests[:3], workload.requests[3:]
    assert all((len(r.prompt_token_ids), r.output_len, r.arrival_time) == (8, 9, 0.0) for r in streams)
    assert [len(r.prompt_token_ids) for r in long] == [100, 200, 400, 800]
    assert [r.arrival_time for r in long] == [1, 3, 5, 7]
    assert {r.output_len for r in long} == {1}
    assert get_workload("mixed-3").requests == get_workload("mixed-3").requests
    assert get_workload("mixed-3:seed=1").requests != get_workload("mixed-3").requests
