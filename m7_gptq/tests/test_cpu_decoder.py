"""F7.3: all layers in one call over quantised weights: the bits of layer by layer, whatever the mix of matrices."""
from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from m0_basics.attention import ScheduledSequence
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import schedule
from m4_flash_attn.kernels import layer_kernels
from m4_flash_attn.kernels.cpu.decoder import CpuDecoder
from m4_flash_attn.kernels.cpu.runner import DecodeRunner, can_decode
from m4_flash_attn.layers import FusedDecoderLayer
from m4_flash_attn.tests.cpu_variants import own_products  # noqa: F401
from m7_gptq.kernels import fuse_packed as module
from m7_gptq.kernels.cpu.linear import Activations
from m7_gptq.kernels.fuse_packed import fuse_packed
from m7_gptq.rtn import QuantizeOptions
from m7_gptq.tests.cpu_models import Runnable, logits_of, nearest, over_cpu_attention, quantised_model
from m7_gptq.tests.cpu_references import compiled_for
from m7_gptq.tests.cpu_tiers import RUNNABLE

PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14], [100], list(range(20, 43)), [50, 3, 50]]
DTYPES = ["float32", "bfloat16"]


def mixed(name: str) -> QuantizeOptions | None:
    """Matrices of 4 and of 8 bits in one model, and some that stay plain."""
    if name in ("0.o_proj", "1.gate_up_proj"):
        return None
    return nearest(8, 32) if name == "lm_head" or name.endswith("down_proj") else nearest(4, 16)


@pytest.fixture(params=RUNNABLE)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    with compiled_for(request.param):
        yield request.param


def packed(tiny_model: TinyModels, name: str, dtype: str, activations: Activations) -> Runnable:
    return over_cpu_attention(fuse_packed(quantised_model(tiny_model(name), dtype, mixed), activations))


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_one_call_gives_the_bits_of_layer_by_layer(tiny_model: TinyModels, name: str, dtype: str,
                                                   activations: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = packed(tiny_model, name, dtype, activations)
    monkeypatch.setattr(module, "stack", lambda *parts, products: layer_kernels.one_by_one(*parts))
    apart = packed(tiny_model, name, dtype, activations)
    assert [type(layer) for layer in whole.runner.model.layers] == [CpuDecoder]
    assert {type(layer) for layer in apart.runner.model.layers} == {FusedDecoderLayer}
    for chunk in (1000, 5, 1):
        for ours, theirs in zip(logits_of(whole, PROMPTS, chunk), logits_of(apart, PROMPTS, chunk), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_every_tier(tiny_model: TinyModels, tier: str, dtype: str, activations: Activations) -> None:
    """Every row is the same bits in any chunks, beside any neighbours, on any number of threads."""
    runnable, rng = packed(tiny_model, "qwen3", dtype, activations), random.Random(0)
    prompts = [[rng.randrange(5, 200) for _ in range(n)] for n in (40, 1, 13)]
    torch.set_num_threads(1)
    alone = [logits_of(runnable, [prompt])[0] for prompt in prompts]
    for threads, chunk in ((1, 1), (1, 7), (2, 1000), (2, 3), (3, 5)):
        torch.set_num_threads(threads)
        for ours, expected in zip(logits_of(runnable, prompts, chunk), alone, strict=True):
            assert torch.equal(ours, expected), (threads, chunk)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_decode_step_ends_with_the_output_matrix(tiny_model: TinyModels, threads: int, dtype: str,
                                                   activations: Activations) -> None:
    runnable = packed(tiny_model, "qwen3", dtype, activations)
    assert can_decode(runnable.runner)
    torch.set_num_threads(threads)
    decoding = DecodeRunner(runnable.runner)
    sequences = [s.sequence for s in schedule(PROMPTS[:3])]
    for in_decode in (False, True):
        step = [ScheduledSequence(s, s.num_computed_tokens, 1 if in_decode else s.num_tokens - 1) for s in sequences]
        assert all(runnable.manager.allocate_slots(*s[:3]) for s in step)
        inputs = runnable.runner.prepare_inputs(step)
        logits = decoding.execute(inputs)
        assert torch.equal(logits, runnable.runner.execute(inputs))
        assert len(logits) == (3 if in_decode else 0)
        for s in step:
            s.sequence.num_computed_tokens = s.end


@pytest.mark.usefixtures("own_products")
def test_a_plain_output_matrix_ends_the_call_as_well(tiny_model: TinyModels) -> None:
    model = quantised_model(tiny_model("qwen3"), "bfloat16", lambda name: None if name == "lm_head" else nearest())
    assert can_decode(over_cpu_attention(fuse_packed(model, "int8")).runner)


def test_quantised_layers_of_float16_run_one_by_one(tiny_model: TinyModels) -> None:
    """The call is for what the kernels know: float32 and bfloat16."""
    model = fuse_packed(quantised_model(tiny_model("qwen3"), "float16"), "exact")
    assert {type(layer) for layer in model.layers} == {FusedDecoderLayer}
