"""F4.7: fused layers give milestone 0's hidden states, with plugins or without, and keep no second copy of weights."""
from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m0_basics.attention import AttentionMetadata, FullAttention, ScheduledSequence
from m0_basics.config import ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens, reference_greedy, schedule
from m0_basics.tools.testing.tiny_models import FAMILIES_UNDER_TEST
from m2_continuous_batching.plugins import AttentionPlugin
from m2_continuous_batching.plugins.base import Attend
from m4_flash_attn import LLM
from m4_flash_attn.elementwise import TorchOps
from m4_flash_attn.kernels import layer_kernels
from m4_flash_attn.kernels.cpu import linear
from m4_flash_attn.kernels.cpu.decoder import CpuDecoder
from m4_flash_attn.kernels.cpu.linear import PackedLinear
from m4_flash_attn.kernels.cpu.runner import DecodeRunner
from m4_flash_attn.kernels.layer_kernels import layer_kernels_for, plain_layer_kernels
from m4_flash_attn.layers import FusedDecoderLayer, fuse

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(tiny_model: TinyModels, name: str = "qwen3", **settings: Any) -> LLM:
    return LLM(str(tiny_model(name)), **{"dtype": "float32", "max_model_len": 96, "num_blocks": 64, **settings})


@torch.inference_mode()
def hidden_states(llm: LLM, prompts: list[list[int]], cuts: tuple[int, ...]) -> list[Tensor]:
    """Hidden states [tokens, hidden] of each prompt, run side by side in steps that end at `cuts` and at its end."""
    runner = llm.engine.runner
    runner = runner.runner if isinstance(runner, DecodeRunner) else runner
    assert isinstance(runner, ModelRunner)
    sequences = [s.sequence for s in schedule(prompts)]
    rows: list[list[Tensor]] = [[] for _ in prompts]
    for cut in (*cuts, max(map(len, prompts))):
        step = [ScheduledSequence(s, s.num_computed_tokens, min(cut, s.num_tokens) - s.num_computed_tokens)
                for s in sequences if s.num_computed_tokens < min(cut, s.num_tokens)]
        for s in step:
            assert llm.manager.allocate_slots(s.sequence, s.sequence.num_computed_tokens, s.num_tokens)
        hidden = runner.forward(runner.prepare_inputs(step))
        for s, part in zip(step, hidden.split([s.num_tokens for s in step]), strict=True):
            rows[sequences.index(s.sequence)].append(part)
            s.sequence.num_computed_tokens = s.end
    for sequence in sequences:
        llm.manager.free(sequence)
    return [torch.cat(parts) for parts in rows]


@torch.inference_mode()
def expected_states(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    runner = ModelRunner(model, FullAttention())
    return list(runner.forward(runner.prepare_inputs(schedule(prompts))).split([len(p) for p in prompts]))


def m0_model(tiny_model: TinyModels, name: str, dtype: str = "float32") -> Any:
    return load_model(ModelConfig(str(tiny_model(name)), dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"attention_backend": "sdpa"}, {"attention_backend": "naive"},
                                      {"fused_layers": False}], ids=["cpu", "sdpa", "naive", "not fused"])
@pytest.mark.parametrize("name", FAMILIES_UNDER_TEST)
def test_hidden_states_equal_m0s(tiny_model: TinyModels, name: str, settings: dict[str, Any]) -> None:
    """Norms of q and k, biases, tied weights; prefill, chunks behind a prefix, and single tokens."""
    llm = make(tiny_model, name, **settings)
    expected = expected_states(m0_model(tiny_model, name), PROMPTS)
    for cuts in ((), (1, 20, 21, 22, 40)):
        for ours, theirs in zip(hidden_states(llm, PROMPTS, cuts), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_on_other_processors(tiny_model: TinyModels, name: str, variant: str) -> None:
    """All layers in one call, with the products of AVX2 and of plain code."""
    llm = make(tiny_model, name)
    assert any(isinstance(layer, CpuDecoder) for layer in llm.engine.runner.model.layers)
    expected = expected_states(m0_model(tiny_model, name), PROMPTS)
    for ours, theirs in zip(hidden_states(llm, PROMPTS, (1, 20, 21)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("name", FAMILIES_UNDER_TEST)
def test_threads_wait_for_each_other(tiny_model: TinyModels, name: str, threads: int) -> None:
    """Between the parts of a layer threads wait for all pieces, which one thread need not: tests run on one."""
    expected = expected_states(m0_model(tiny_model, name), PROMPTS)
    llm = make(tiny_model, name)
    torch.set_num_threads(threads)
    for cuts in ((), (1, 20, 21, 22)):
        for ours, theirs in zip(hidden_states(llm, PROMPTS, cuts), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES_UNDER_TEST)
def test_bfloat16_is_as_exact_as_m0s(tiny_model: TinyModels, name: str, threads: int) -> None:
    """Against the same weights in float32: the kernels round less often, so the error is no larger than m0's."""
    exact = torch.cat(expected_states(m0_model(tiny_model, name, "bfloat16").float(), PROMPTS))
    theirs = torch.cat(expected_states(m0_model(tiny_model, name, "bfloat16"), PROMPTS)).float()
    llm = make(tiny_model, name, dtype="bfloat16")
    assert llm.attention_backend == "cpu"
    torch.set_num_threads(threads)
    for cuts in ((), (1, 20, 21, 22)):
        ours = torch.cat(hidden_states(llm, PROMPTS, cuts)).float()
        assert 0 < (ours - exact).abs().mean() <= 1.05 * (theirs - exact).abs().mean()


@pytest.mark.usefixtures("own_products")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_bfloat16_on_other_processors(tiny_model: TinyModels, name: str, variant: str) -> None:
    """Weights of 16 bits, widened by AVX2 and by plain code, in all layers of a model."""
    exact = torch.cat(expected_states(m0_model(tiny_model, name, "bfloat16").float(), PROMPTS))
    theirs = torch.cat(expected_states(m0_model(tiny_model, name, "bfloat16"), PROMPTS)).float()
    llm = make(tiny_model, name, dtype="bfloat16")
    assert any(isinstance(layer, CpuDecoder) for layer in llm.engine.runner.model.layers)
    ours = torch.cat(hidden_states(llm, PROMPTS, (1, 20, 21))).float()
    assert 0 < (ours - exact).abs().mean() <= 1.05 * (theirs - exact).abs().mean()


def test_what_runs_on_a_cpu(tiny_model: TinyModels) -> None:
    """One module for all layers; nothing of milestone 0's is left between embedding and output."""
    model = make(tiny_model).engine.runner.model
    assert [type(layer) for layer in model.layers] == [CpuDecoder]
    assert type(model.norm) is nn.Identity, "the decoder has done it"
    assert type(model.lm_head) is PackedLinear
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    plain = make(tiny_model, fused_layers=False).engine.runner.model
    assert not any(isinstance(module, CpuDecoder | FusedDecoderLayer) for module in plain.modules())
    assert sum(isinstance(module, nn.Linear) for module in plain.modules()) == 3 * 4 + 1


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES_UNDER_TEST)
def test_one_call_gives_the_same_bits_as_layer_by_layer(tiny_model: TinyModels, name: str, dtype: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """F4.7: the same kernels in the same order, the last norm included."""
    whole = make(tiny_model, name, dtype=dtype)
    monkeypatch.setattr(layer_kernels, "stack", layer_kernels.one_by_one)
    apart = make(tiny_model, name, dtype=dtype)
    assert [type(layer) for layer in apart.engine.runner.model.layers] == [FusedDecoderLayer] * 3
    for cuts in ((), (1, 20, 21, 22)):
        for ours, theirs in zip(*(hidden_states(llm, PROMPTS, cuts) for llm in (whole, apart)), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_decode_step_ends_with_the_output_matrix(tiny_model: TinyModels, dtype: str, threads: int) -> None:
    """In one call: the bits of the layers' call and then the output matrix. Other steps do not."""
    llm = make(tiny_model, dtype=dtype)
    torch.set_num_threads(threads)
    runner, sequences = llm.engine.runner, [s.sequence for s in schedule(PROMPTS[:3])]
    assert isinstance(runner, DecodeRunner)
    with pytest.MonkeyPatch.context() as patch:
        decodes: list[int] = []
        decode = CpuDecoder.decode
        patch.setattr(CpuDecoder, "decode", lambda self, x, *rest: decodes.append(len(x)) or decode(self, x, *rest))
        for in_decode in (False, True):
            step = [ScheduledSequence(s, s.num_computed_tokens, 1 if in_decode else s.num_tokens - 1)
                    for s in sequences]
            assert all(llm.manager.allocate_slots(*s[:3]) for s in step)
            inputs = runner.prepare_inputs(step)
            logits, expected = runner.execute(inputs), runner.runner.execute(inputs)
            assert torch.equal(logits, expected)
            assert len(logits) == (3 if in_decode else 0)
            assert decodes == ([3] if in_decode else [])
            for s in step:
                s.sequence.num_computed_tokens = s.end


def test_with_something_around_the_attention_decode_goes_layer_by_layer(tiny_model: TinyModels) -> None:
    for settings in ({"plugins": [Watch()]}, {"attention_backend": "sdpa"}, {"fused_layers": False}):
        assert type(make(tiny_model, **settings).engine.runner) is ModelRunner


class Doubled(nn.Module):
    """A linear layer of another kind: what quantised weights look like from outside."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.halved = nn.Parameter(linear.weight / 2, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.halved * 2, self.bias)


@pytest.mark.parametrize("name", ["qwen3", "llama_bias"])
def test_linear_modules_of_other_kinds_stay(tiny_model: TinyModels, name: str) -> None:
    """Quantised ones, for example: they run as they are, between the same fused parts."""
    model = m0_model(tiny_model, name)
    expected = torch.cat(expected_states(model, PROMPTS))
    for layer in model.layers:
        layer.self_attn.qkv_proj = Doubled(layer.self_attn.qkv_proj)
        layer.mlp.gate_up_proj = Doubled(layer.mlp.gate_up_proj)
    model.lm_head = Doubled(model.lm_head)
    model = fuse(model, layer_kernels_for(CPU, torch.float32))
    assert type(model.lm_head) is Doubled
    assert [type(layer.qkv_proj) for layer in model.layers] == [Doubled] * 3
    torch.testing.assert_close(torch.cat(expected_states(model, PROMPTS)), expected, rtol=1e-5,
                               atol=1e-5 * float(expected.abs().max()))


def test_without_kernels_the_layers_are_fused_in_torch(tiny_model: TinyModels) -> None:
    """Any device's layers: TorchOps, linear layers as they are."""
    expected = torch.cat(expected_states(m0_model(tiny_model, "qwen3"), PROMPTS))
    model = fuse(m0_model(tiny_model, "qwen3"), plain_layer_kernels(TorchOps()))
    assert [type(layer) for layer in model.layers] == [FusedDecoderLayer] * 3
    torch.testing.assert_close(torch.cat(expected_states(model, PROMPTS)), expected, rtol=1e-6, atol=1e-6)


def test_layers_of_other_kinds_run_one_after_the_other(tiny_model: TinyModels,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the products are not ours (matrix tiles), there is nothing that runs all layers at once."""
    monkeypatch.setattr(layer_kernels, "choose", lambda *_: "torch")
    monkeypatch.setattr(linear, "choose", lambda *_: "torch")
    llm = make(tiny_model)
    assert [type(layer) for layer in llm.engine.runner.model.layers] == [FusedDecoderLayer] * 3
    assert llm.attention_backend == "cpu"
    expected = expected_states(m0_model(tiny_model, "qwen3"), PROMPTS)
    for ours, theirs in zip(hidden_states(llm, PROMPTS, (1, 20, 21)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


class Watch(AttentionPlugin):
    """What passes: per layer the shapes and the first values of q, k and v."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata,
                attend: Attend) -> Tensor:
        self.seen.append((layer_idx, q.clone(), k.clone(), v.clone()))
        return attend(q, k, v)


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_an_attention_plugin_sees_q_k_and_v(tiny_model: TinyModels, name: str) -> None:
    """F4.7: what it sees in a fused model is what it sees in milestone 0's: normed, rotated. Tokens stay the same."""
    watch, plain = Watch(), Watch()
    llm = make(tiny_model, name, plugins=[watch])
    assert llm.attention_backend == "cpu"
    assert_same_tokens(ids_of(llm.generate(PROMPTS, greedy(16), use_tqdm=False)),
                       reference_greedy(tiny_model(name), PROMPTS, 16))
    make(tiny_model, name, plugins=[plain], fused_layers=False).generate(PROMPTS, greedy(16), use_tqdm=False)
    assert [layer for layer, *_ in watch.seen] == [0, 1, 2] * 16
    for ours, theirs in zip(watch.seen, plain.seen, strict=True):
        assert ours[0] == theirs[0]
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


class Zero(AttentionPlugin):
    """Takes the place of attention."""

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata,
                attend: Attend) -> Tensor:
        return torch.zeros_like(q)


def test_an_attention_plugin_can_replace_attention(tiny_model: TinyModels) -> None:
    fused, plain = (make(tiny_model, plugins=[Zero()], fused_layers=on) for on in (True, False))
    ours = ids_of(fused.generate(PROMPTS, greedy(8), use_tqdm=False))
    assert_same_tokens(ours, ids_of(plain.generate(PROMPTS, greedy(8), use_tqdm=False)))
    assert ours != reference_greedy(tiny_model("qwen3"), PROMPTS, 8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_tied", "llama_bias"])
def test_packed_weights_take_the_place_of_the_originals(tiny_model: TinyModels, name: str, dtype: str) -> None:
    """Nothing holds a linear layer's weights but their packed form; a tied output matrix stays, as the embedding."""
    model = m0_model(tiny_model, name, dtype)
    tied = model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    assert tied == name.endswith("tied")
    weights = {path: weakref.ref(module.weight) for path, module in model.named_modules()
               if isinstance(module, nn.Linear)}
    assert len(weights) == 3 * 4 + 1
    fuse(model, layer_kernels_for(CPU, DTYPES[dtype]))
    gc.collect()
    assert {path for path, weight in weights.items() if weight() is not None} == ({"lm_head"} if tied else set())


def test_a_model_is_fused_once(tiny_model: TinyModels) -> None:
    model = fuse(m0_model(tiny_model, "llama"), plain_layer_kernels(TorchOps()))
    with pytest.raises(AssertionError, match="a model is fused once"):
        fuse(model, plain_layer_kernels(TorchOps()))
