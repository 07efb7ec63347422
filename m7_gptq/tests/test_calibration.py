"""What calibration sums up, against the model's own forward and the formulas written out."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m0_basics.attention import AttentionMetadata, FullAttention
from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model import CausalLM
from m0_basics.tools.testing.tiny_models import FAMILIES_UNDER_TEST, VOCAB_SIZE, save_tiny_model
from m7_gptq.calibration import (
    InputStatistics,
    WindowAttention,
    collect,
    corrected_weight,
    cut_batches,
    cut_windows,
    hidden_states,
    run_layer,
    set_aside,
)


def load(folder: Path, name: str) -> CausalLM:
    tiny = FAMILIES_UNDER_TEST[name]
    save_tiny_model(folder, tiny.family, tie=tiny.tie, **tiny.overrides)
    return load_model(ModelConfig(model=str(folder), dtype="float32", device="cpu"))


def by_the_model(model: CausalLM, windows: Tensor) -> Tensor:
    """Hidden states by m0's own forward and attention."""
    num, length = windows.shape
    metadata = AttentionMetadata(list(range(0, num * length + 1, length)))
    hidden = model(windows.flatten(), torch.arange(length).repeat(num), FullAttention(), metadata)
    return hidden.view(num, length, -1)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_tied", "llama3_rope"])
def test_hidden_states_are_the_models_own(name: str, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    windows = torch.randint(VOCAB_SIZE, (5, 37))
    torch.testing.assert_close(hidden_states(model, windows), by_the_model(model, windows), rtol=1e-4, atol=1e-4)


def test_windows_do_not_see_each_other() -> None:
    q, k, v = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    attention, metadata = WindowAttention(4), AttentionMetadata([0, 4, 8, 12])
    out = attention.forward(0, q, k, v, metadata)
    torch.testing.assert_close(out, FullAttention().forward(0, q, k, v, metadata))
    v[:4] += 1.0
    assert torch.equal(attention.forward(0, q, k, v, metadata)[4:], out[4:])


def test_a_layer_runs_as_the_model_runs_it_and_shows_its_inputs(tmp_path: Path) -> None:
    """Against forward hooks on the model's own forward; several batches."""
    model = load(tmp_path, "qwen3_bias")
    windows = torch.randint(VOCAB_SIZE, (9, 250))              # batches of 8 windows and of one
    expected = dict[str, Tensor]()
    hooks = [module.register_forward_pre_hook(lambda _, x, name=name: expected.__setitem__(name, x[0]))
             for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hidden = by_the_model(model, windows)
    for hook in hooks:
        hook.remove()
    batches, ids = cut_batches(model, windows)
    assert [batch.num_windows for batch in batches] == [8, 1]
    x, seen = [model.embed_tokens(part) for part in ids], dict[str, Tensor]()
    for i, layer in enumerate(model.layers):
        x = run_layer(layer, x, batches,
                      lambda name, inputs, i=i: seen.__setitem__(f"layers.{i}.{name}", torch.cat(inputs)))
    assert seen.keys() == expected.keys() and len(seen) == 12
    for name, inputs in seen.items():
        torch.testing.assert_close(inputs, expected[name], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.norm(torch.cat(x)), hidden.flatten(0, 1), rtol=1e-3, atol=1e-3)


def test_a_changed_weight_counts_from_its_own_layer_on(tmp_path: Path) -> None:
    model = load(tmp_path, "llama")
    windows = torch.randint(VOCAB_SIZE, (2, 16))
    batches, ids = cut_batches(model, windows)
    layer = model.layers[0]

    def halve(name: str, inputs: list[Tensor]) -> None:
        layer.get_submodule(name).weight.mul_(0.5)

    x = [model.embed_tokens(part) for part in ids]
    with torch.no_grad():
        out = run_layer(layer, x, batches, halve)               # each product halved before it ran
        again = run_layer(layer, x, batches, lambda *_: None)   # the same weights now
    torch.testing.assert_close(out, again)


def test_the_last_product_comes_back_whatever_happens() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    last = module[1]
    with pytest.raises(ValueError, match="stop"), set_aside(module, "1") as product:
        assert product is last and isinstance(module[1], nn.Identity)
        raise ValueError("stop")
    assert module[1] is last


def test_statistics_are_the_formulas() -> None:
    length, parts = 8, [torch.randn(32, 6), torch.randn(16, 6)]
    full = [part + 0.1 * torch.randn(part.shape) for part in parts]
    x, y = torch.cat(parts).double(), torch.cat(full).double()
    heads, full_heads = x[::length], y[::length]
    for sink in (0.0, 0.5):
        statistics = collect(parts, full, length, sink)
        hessian = 2 / 48 * x.T @ x + sink * 2 / 6 * heads.T @ heads
        difference = 2 / 48 * (y - x).T @ x + sink * 2 / 6 * (full_heads - heads).T @ heads
        torch.testing.assert_close(statistics.hessian.double(), hessian, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.difference.double(), difference, rtol=1e-4, atol=1e-5)
        assert collect(parts, None, length, sink).difference is None


def test_corrected_weights_are_the_least_squares_answer() -> None:
    """With hardly any damping no other weights come closer to the full-precision outputs."""
    x, weight = torch.randn(200, 12), torch.randn(5, 12)
    full = x + 0.3 * torch.randn(200, 12)
    statistics = collect([x], [full], 10, 0.0)
    corrected = corrected_weight(weight, statistics, 1e-9, 1.0)
    answer = torch.linalg.lstsq(x.double(), full.double() @ weight.double().T).solution.T
    torch.testing.assert_close(corrected.double(), answer, rtol=1e-3, atol=1e-4)
    half = corrected_weight(weight, statistics, 1e-9, 0.5)
    torch.testing.assert_close(half, (weight + corrected) / 2, rtol=1e-4, atol=1e-5)
    same = corrected_weight(weight, collect([x], [x], 10, 0.1), 0.05, 1.0)
    torch.testing.assert_close(same, weight)
    assert corrected_weight(weight, InputStatistics(statistics.hessian), 0.05, 1.0) is weight


def test_windows_are_whole_and_spread_over_the_text() -> None:
    assert cut_windows(list(range(10)), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_windows(list(range(100)), 10, 3)[:, 0].tolist() == [0, 40, 90]
    assert cut_windows(list(range(100)), 10, 99).shape == (10, 10)
    with pytest.raises(ConfigError, match="the text has 2 tokens; allowed: at least 3"):
        cut_windows([1, 2], 3)
