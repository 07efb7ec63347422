"""The quality suite on the tiny model: rows that mean something, saved one by one; and the tools behind its columns."""
from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading.loader import load_model
from m7_gptq.rtn import QuantizeOptions
from m7_gptq.tools.fake_int8 import rounded, rounded_inputs
from m7_gptq.tools.q4_1_trap import q4_1_trap, with_minimums
from m7_gptq.tools.quality_suite import (
    CHOICES,
    DEFAULT,
    METHODS,
    TINY_MODEL,
    Material,
    Results,
    Suite,
    gap_closed,
    main,
    run,
)
from m7_gptq.tools.sink import value_errors, watch


@pytest.fixture(scope="module")
def material() -> Material:
    return Material.of(str(TINY_MODEL), 128, 24, 12)


def test_rows_are_saved_and_not_measured_again(material: Material, tmp_path: Path) -> None:
    path, lines = tmp_path / "folder" / "quality.json", list[str]()
    suite = Suite(material, Results(path), "rows", lines.append)
    suite.row("full precision", suite.full)
    for name in ("nearest", DEFAULT):
        suite.methods(3, 64, [name])
    assert len(lines) == 3 and "test" in lines[0]
    rows = json.loads(path.read_text())["rows"]
    again = Suite(material, Results(path), "rows", lines.append)
    again.row("full precision", lambda: pytest.fail("measured again"))
    again.methods(3, 64, ["nearest"])
    assert again.rows == rows and len(lines) == 3
    assert 0.2 < gap_closed(rows, 3) < 1.0
    best = rows[f"3 bits: {DEFAULT}"]
    assert best["options"]["bits"] == 3 and len(best["layers"]) == 13
    assert best["mean_error"] < best["mean_nearest_error"]
    assert len(best["value_error"]["first"]) == 3 and len(rows["full precision"]["mass_of_first_token"]) == 3


def test_every_method_adds_one_thing() -> None:
    """The rows are a ladder: each differs from the one before it in one option, or in method."""
    rungs = list(METHODS.values())[2:]
    changed = [[name for name, value in vars(after).items() if value != getattr(before, name)]
               for before, after in pairwise(rungs)]
    assert changed == [["search"], ["sink"], ["desc_act"], ["act_group_aware"], ["gptaq"]]
    assert METHODS[DEFAULT] == QuantizeOptions()
    assert replace(METHODS["GPTQ, textbook"], method="rtn") == METHODS["nearest"]


def test_every_choice_changes_one_thing() -> None:
    """The default stands among the values that it was chosen from: of GPTAQ's share five, spread evenly."""
    default = QuantizeOptions()
    assert CHOICES["the default"] == default
    for name, options in CHOICES.items():
        changed = {key for key, value in vars(options).items() if value != getattr(default, key)}
        if name not in ("nearest", "the default"):
            assert len(changed - {"act_group_aware"}) == 1 or changed == {"act_group_aware"}
    assert sorted({options.gptaq for name, options in CHOICES.items() if name != "nearest"}) == [0, 0.25, 0.5, 0.75, 1]


def test_all_parts_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model in the place of the default one."""
    with pytest.raises(ConfigError, match=r"parts='5'.*full, 4, 3"):
        main(tmp_path / "a.json", parts="full,5")
    small = Material.of(str(TINY_MODEL), 64, 6, 3)
    results = Results(tmp_path / "a.json")
    suite, tiny = Suite(small, results, "rows"), Suite(small, results, "tiny")
    monkeypatch.setattr("m7_gptq.tools.quality_suite.METHODS", {n: METHODS[n] for n in ("nearest", DEFAULT)})
    dev = Suite(Material.of(str(TINY_MODEL), 64, 6, 3, ["dev"]), results, "dev")
    monkeypatch.setattr("m7_gptq.tools.quality_suite.CHOICES", {n: CHOICES[n] for n in ("nearest", "GPTAQ 1")})
    run(suite, tiny, dev, ["full", "4", "3", "8", "tiny", "dev"])
    assert list(suite.rows) == ["full precision", "4 bits: nearest", f"4 bits: {DEFAULT}", "3 bits: nearest",
                                f"3 bits: {DEFAULT}", "8 bits: nearest"]
    assert len(tiny.rows) == 7 and list(dev.rows) == ["full precision", *(f"{bits} bits: {name}" for bits in (4, 3)
                                                                          for name in ("nearest", "GPTAQ 1"))]
    assert all(list(row["perplexity"]) == ["dev"] for row in dev.rows.values())
    full, near = (dev.rows[name]["perplexity"]["dev"] for name in ("full precision", "3 bits: nearest"))
    assert full < dev.rows["3 bits: GPTAQ 1"]["perplexity"]["dev"] < near
    assert json.loads((tmp_path / "a.json").read_text()) == results.sections
    full, eight = (suite.rows[name]["perplexity"]["test"] for name in ("full precision", "8 bits: nearest"))
    assert eight == pytest.approx(full, rel=0.01)
    int8 = suite.rows["4 bits: nearest"]["int8_activations"]
    exact = suite.rows["4 bits: nearest"]["perplexity"]["test"]
    assert set(int8) == {"by token", "by group of 64"} and all(
        abs(texts["test"] / exact - 1) < 0.1 for texts in int8.values())


def test_activations_on_their_grid() -> None:
    x = torch.randn(5, 128) * torch.logspace(-2, 2, 128)
    x[2] = 0.0
    for size in (None, 64):
        out = rounded(x, size)
        scale = x.abs().unflatten(1, (-1, size or 128)).amax(2).repeat_interleave(size or 128, 1) / 127
        assert bool(((out - x).abs() <= scale / 2 + 1e-6).all()) and bool((out[2] == 0).all())
        steps = out / scale.masked_fill(scale == 0, 1.0)
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    linear = nn.Linear(128, 3)
    with rounded_inputs(linear, 64):
        inside = linear(x)
    torch.testing.assert_close(inside, linear(rounded(x, 64)))
    assert not torch.equal(inside, linear(x))


def test_the_mass_of_the_first_token_by_hand() -> None:
    """Keys all alike: attention is even, so the first of i + 1 tokens gets 1 / (i + 1)."""
    model = load_model(ModelConfig(model=str(TINY_MODEL), dtype="float32", device="cpu"))
    for layer in model.layers:
        attention = layer.self_attn
        attention.qkv_proj.weight[attention.num_heads * 32:(attention.num_heads + attention.num_kv_heads) * 32] = 0
    windows = torch.randint(256, (2, 10))
    seen = watch(model, windows, weights=True)
    expected = sum(1 / (i + 1) for i in range(1, 10)) / 9
    assert seen.mass == pytest.approx([expected] * 3) and seen.values[0].shape == (2, 10, 64)
    other = watch(model, windows)
    assert other.mass == [] and value_errors(seen, other) == {"first": [0.0] * 3, "others": [0.0] * 3}
    other.values[1] = other.values[1].clone()
    other.values[1][:, 0] *= 1.5
    errors = value_errors(seen, other)
    assert errors["first"] == pytest.approx([0.0, 0.5, 0.0]) and errors["others"] == [0.0] * 3


def test_the_trap_is_exact_only_on_the_same_kind_of_grid(material: Material) -> None:
    """Weights made to lie on Q4_1's grid, with both ends of it used in each block."""
    model = material.load()
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            codes = torch.randint(16, module.weight.shape).unflatten(1, (-1, 32))
            codes[:, :, 0], codes[:, :, 1] = 0, 15
            scale = (torch.randint(1, 64, codes.shape[:2]) / 1024).unsqueeze(2)
            module.weight.copy_((codes * scale - 7.3125 * scale).flatten(1))
    errors = q4_1_trap(model)["relative_error"]
    assert errors["floating-point minimum, groups of 32"] < 1e-6
    assert all(error > 0.02 for name, error in errors.items() if name != "floating-point minimum, groups of 32")
    assert with_minimums(torch.zeros(2, 32), 32).dequantise().abs().max() == 0
