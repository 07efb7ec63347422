"""The milestone's idea in 80 lines gives what its engine gives, and runs by itself."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m0_basics.model_spec import ModelSpec
from m0_basics.tools.analysis.flop_count import count_flops
from m0_basics.tools.testing.idea import run_idea
from m1_offline import idea
from m1_offline.attention import ContiguousAttention, ContiguousMetadata
from m1_offline.kv_cache import CacheRows, KVCache

FIRST = 200             # of the slots in the engine's cache; others stay as they are


def make_model() -> dict[str, Tensor]:
    torch.manual_seed(0)
    width, layers = idea.WIDTH, idea.LAYERS
    shapes = {"embedding": (idea.VOCAB, width), "qkv": (layers, width, 3 * width), "out": (layers, width, width),
              "head": (width, idea.VOCAB)}
    return {name: torch.randn(shape) / shape[-2] ** 0.5 for name, shape in shapes.items()}


@pytest.mark.slow
def test_it_runs_by_itself() -> None:
    assert "the same tokens" in run_idea("m1_offline")


def test_same_logits_and_cache_as_over_the_engines_attention() -> None:
    """The same model over `ContiguousAttention`: a prompt, a piece of three tokens, then one by one."""
    model, cache = make_model(), idea.KVCache()
    spec = ModelSpec("LlamaForCausalLM", 8, 8, 8, idea.LAYERS, idea.HEADS, idea.HEADS, idea.HEAD_DIM, 64,
                     rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False)
    engine_cache = KVCache(spec, 400, torch.float32, torch.device("cpu"))
    backend = ContiguousAttention(engine_cache, CacheRows(engine_cache, 2, FIRST))
    for ids in ([5, 6, 7, 8, 9], [10, 11, 12], [13], [14], [15]):
        start, end = cache.length, cache.length + len(ids)
        metadata = ContiguousMetadata([0, len(ids)], [end], [FIRST], torch.arange(FIRST + start, FIRST + end))
        x = model["embedding"][ids]
        for layer in range(idea.LAYERS):
            q, k, v = (x @ model["qkv"][layer]).view(-1, 3, idea.HEADS, idea.HEAD_DIM).unbind(1)
            x = x + backend.forward(layer, q, k, v, metadata).flatten(1) @ model["out"][layer]
        torch.testing.assert_close(idea.forward(ids, cache, model), x[-1] @ model["head"], rtol=1e-5, atol=1e-5)
    held = slice(FIRST, FIRST + cache.length)
    torch.testing.assert_close(cache.k[:, :cache.length], engine_cache.k[:, held], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache.v[:, :cache.length], engine_cache.v[:, held], rtol=1e-5, atol=1e-5)
    assert cache.length == 11
    assert cache.k[:, 11:].isnan().all(), "nothing is written behind the end"


def test_the_multiplications_are_those_that_torch_counts() -> None:
    model, cache = make_model(), idea.KVCache()
    for ids in ([1, 2, 3, 4, 5], [6], [7]):
        flops = count_flops(lambda: idea.forward(ids, cache, model))        # noqa: B023 - called at once
        assert flops == 2 * idea.multiplications(len(ids), cache.length)


def test_what_is_kept_is_what_would_be_computed_again() -> None:
    """Key for key: the cache after token-by-token decoding is the cache after one run over all of the tokens."""
    model, grown, at_once = make_model(), idea.KVCache(), idea.KVCache()
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    for token in ids:
        logits = idea.forward([token], grown, model)
    torch.testing.assert_close(logits, idea.forward(ids, at_once, model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grown.k, at_once.k, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(grown.v, at_once.v, rtol=1e-5, atol=1e-5, equal_nan=True)
