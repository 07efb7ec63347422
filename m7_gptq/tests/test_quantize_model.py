"""A whole model: what is quantised, on which inputs, what an interruption leaves, and what it is worth."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.loading.weights import hf_parts
from m0_basics.model import CausalLM
from m0_basics.tools.testing.tiny_models import FAMILIES_UNDER_TEST, VOCAB_SIZE, save_tiny_model
from m7_gptq.calibration import collect, hidden_states
from m7_gptq.gptq import quantize_matrix
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.quantize import Matrices, QuantizedModel, quantize_model
from m7_gptq.rtn import QuantizeOptions, round_to_nearest
from m7_gptq.tools.perplexity import perplexity, plain_logits, text_windows
from m7_gptq.tools.texts import calibration_text, evaluation_text

TINY = str(Path(__file__).parent / "tiny_qwen3")
SMALL = QuantizeOptions(bits=3, group_size=32)


def load(folder: str | Path = TINY) -> CausalLM:
    return load_model(ModelConfig(model=str(folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return text_windows(TINY, calibration_text(), 128, 24)


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return text_windows(TINY, evaluation_text("dev"), 128, 48)


class Notes:
    """A store in memory that may fail at one part."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.kept, self.asked, self.fails_at = dict[str, Matrices](), list[str](), fails_at

    def get(self, part: str) -> Matrices | None:
        self.asked.append(part)
        return self.kept.get(part)

    def put(self, part: str, matrices: Matrices) -> None:
        if part == self.fails_at:
            raise OSError("no space left on device")
        self.kept[part] = matrices


def same(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    return (torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and torch.equal(a.zeros, b.zeros)
            and (a.order is b.order or torch.equal(a.order, b.order)))


def linear_names(model: CausalLM) -> list[str]:
    return [part for name, module in model.named_modules() if isinstance(module, nn.Linear) for part in hf_parts(name)]


def values_of(model: CausalLM, result: QuantizedModel) -> None:
    """Every linear layer of the model holds what its matrices are worth."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            expected = torch.cat([result.matrices[part].dequantise() for part in hf_parts(name)])
            assert torch.equal(module.weight, expected), name


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen2", "llama_bias"])
@pytest.mark.parametrize("options", [SMALL, replace(SMALL, gptaq=0.5, act_group_aware=True),
                                     replace(SMALL, method="rtn"), replace(SMALL, desc_act=False, sym=True)])
def test_every_linear_layer_of_any_family(name: str, options: QuantizeOptions, tmp_path: Path) -> None:
    tiny = FAMILIES_UNDER_TEST[name]
    model = load(save_tiny_model(tmp_path, tiny.family, tie=tiny.tie, **tiny.overrides))
    heard = list[str]()
    result = quantize_model(model, torch.randint(VOCAB_SIZE, (6, 48)), options,
                            on_part=lambda part, reports: heard.append(f"{part} {len(reports)}"))
    assert sorted(result.matrices) == sorted(linear_names(model)) and len(result.report) == 13
    values_of(model, result)
    layers = [f"model.layers.{i} 4" for i in range(3)]
    assert heard == (["lm_head 1", *layers] if tiny.tie and options.method == "gptq" else [*layers, "lm_head 1"])
    assert (model.embed_tokens.weight is model.lm_head.weight) == tiny.tie
    q, k = (result.matrices[f"model.layers.1.self_attn.{part}_proj"] for part in "qk")
    assert q.shape[0] >= k.shape[0] and q.bits == 3 and q.group_size == 32
    if options.method == "gptq":
        assert (q.order is None) == (options.act_group_aware or not options.desc_act)
        assert q.order is k.order, "one order for all that read the same inputs"
        assert all(r.error is not None and r.nearest_error is not None and 0 < r.error < 0.2 for r in result.report)


def test_the_output_matrix_is_left_alone_if_asked(windows: Tensor) -> None:
    model, before = load(), load().lm_head.weight
    result = quantize_model(model, windows[:4], replace(SMALL, lm_head=False))
    assert "lm_head" not in result.matrices and len(result.matrices) == 21
    assert torch.equal(model.lm_head.weight, before) and torch.equal(model.embed_tokens.weight, before)


def test_a_layer_is_calibrated_on_what_the_quantised_layers_before_it_give(windows: Tensor) -> None:
    """The last layer's inputs by the finished model, with that layer's own matrix put back."""
    options, original = replace(SMALL, sink=0.0, gptaq=0.0), load()
    model = load()
    result = quantize_model(model, windows, options)
    inputs = list[Tensor]()
    last = model.layers[-1].mlp.down_proj
    hook = last.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    hidden_states(model, windows)
    hook.remove()
    weight = original.layers[-1].mlp.down_proj.weight
    expected = quantize_matrix(weight, collect(inputs, None, 128, 0.0).hessian, options)
    got = result.matrices["model.layers.2.mlp.down_proj"]
    assert float((expected.codes == got.codes).float().mean()) > 0.97
    assert result.report[-1].name == "layers.2.mlp.down_proj"


def test_the_sink_counts_for_queries_keys_and_values_alone(windows: Tensor) -> None:
    with_sink, without = (quantize_model(load(), windows[:8], replace(SMALL, sink=sink)) for sink in (5.0, 0.0))
    first = "model.layers.0."
    assert same(with_sink.matrices["lm_head"], without.matrices["lm_head"])
    assert not same(with_sink.matrices[first + "self_attn.q_proj"], without.matrices[first + "self_attn.q_proj"])
    reports = [{r.name: r for r in run.report} for run in (with_sink, without)]
    assert reports[0]["layers.0.self_attn.qkv_proj"].nearest_error != (
        reports[1]["layers.0.self_attn.qkv_proj"].nearest_error)


@pytest.mark.parametrize("gptaq", [0.0, 0.5])
def test_an_interrupted_run_goes_on_after_its_last_finished_part(gptaq: float, windows: Tensor) -> None:
    options = replace(SMALL, gptaq=gptaq)
    whole = quantize_model(load(), windows[:8], options)
    store = Notes(fails_at="model.layers.1")
    with pytest.raises(OSError, match="no space"):
        quantize_model(load(), windows[:8], options, store=store)
    assert list(store.kept) == ["lm_head", "model.layers.0"]
    store.fails_at, heard, model = None, list[str](), load()
    resumed = quantize_model(model, windows[:8], options, store=store, on_part=lambda part, _: heard.append(part))
    assert heard == ["model.layers.1", "model.layers.2"] and len(resumed.report) == 8
    assert resumed.matrices.keys() == whole.matrices.keys()
    assert all(same(resumed.matrices[name], matrix) for name, matrix in whole.matrices.items())
    values_of(model, resumed)
    again = Notes()
    again.kept = store.kept
    assert quantize_model(load(), windows[:8], options, store=again).report == []


def test_a_store_of_another_model_is_refused(windows: Tensor) -> None:
    store = Notes()
    store.kept["lm_head"] = {"lm_head": round_to_nearest(torch.zeros(8, 128), SMALL)}
    with pytest.raises(ConfigError, match=r"lm_head: the store holds a matrix of \(8, 128\)"):
        quantize_model(load(), windows, SMALL, store=store)
    store.kept["lm_head"] = {}
    with pytest.raises(ConfigError, match="allowed: lm_head"):
        quantize_model(load(), windows, SMALL, store=store)


@pytest.mark.parametrize(("bits", "closed"), [(2, 0.4), (3, 0.3)])
def test_it_beats_rounding_to_nearest_on_text_that_it_has_not_seen(bits: int, closed: float, windows: Tensor,
                                                                    held_out: Tensor) -> None:
    options = QuantizeOptions(bits=bits, group_size=64)
    full, results = perplexity(plain_logits(load()), held_out), []
    for each in (replace(options, method="rtn", search=False), options):
        model = load()
        quantize_model(model, windows, each)
        results.append(perplexity(plain_logits(model), held_out))
    nearest, gptq = results
    assert full < gptq < nearest
    assert (nearest - gptq) / (nearest - full) > closed


def test_one_clear_error_for_what_cannot_be_quantised(windows: Tensor, tmp_path: Path) -> None:
    model = load()
    model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    with pytest.raises(ConfigError, match=r"^layers.1.mlp.down_proj: the weight holds NaN"):
        quantize_model(model, None, replace(SMALL, method="rtn"))
    with pytest.raises(ConfigError, match=r"NaN or infinity"):
        quantize_model(model, windows[:2], SMALL)
    with pytest.raises(ConfigError, match=r"^layers.0.self_attn.qkv_proj: group_size=96 .* 128 inputs"):
        quantize_model(load(), windows, replace(SMALL, group_size=96))
    for none in (None, windows[:0]):
        with pytest.raises(ConfigError, match="no calibration text"):
            quantize_model(load(), none, SMALL)
    with pytest.raises(ConfigError, match="holds token 272; allowed: 0 to 271"):
        quantize_model(load(), windows + (272 - int(windows.max())), SMALL)
    with pytest.raises(ConfigError, match="windows of 600 tokens exceed max_model_len; allowed: at most 512"):
        quantize_model(load(), torch.zeros(1, 600, dtype=torch.int64), SMALL)
    half = load_model(ModelConfig(model=TINY, dtype="bfloat16", device="cpu"))
    with pytest.raises(ConfigError, match="dtype=bfloat16 is not quantised; allowed: float32"):
        quantize_model(half, windows, SMALL)
