"""FX.4, F7.5: the benchmark runs every part, small; its numbers are found again under the facts' names."""
from __future__ import annotations

from pathlib import Path

import pytest

from m0_basics.tools.bench import BenchReport
from m0_basics.tools.documents.factbook import read_json_file, read_result
from m0_basics.tools.testing.fixtures import TinyModels
from m7_gptq import benchmark
from m7_gptq.loading.memory import gptq_form, predict
from m7_gptq.rtn import QuantizeOptions
from m7_gptq.tools import contenders, linear_bench
from m7_gptq.tools.bench_views import choices_table, form_of, in_order, quality_table
from m7_gptq.tools.facts import bench_results

from .packed_models import pack_gguf, use_cache

OPTIONS = {"dtype": "bfloat16", "block_size": 8}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    return use_cache(tmp_path / "cache", monkeypatch)


@pytest.mark.slow
def test_every_part_is_there(tmp_path: Path, tiny_model: TinyModels) -> None:
    model, folder = pack_gguf(tmp_path / "model", tiny_model("qwen3"), "Q4_1"), tmp_path / "results"
    benchmark.run({"model": str(model.packed), **OPTIONS}, rounds=1, quick=True, peers=["transformers-static"],
                  output_dir=folder)
    report = BenchReport.load(folder / "bench.json")
    ours = ["m4", "m6", "m7", "m7-a16", "m7-8bit", "m7-gguf"]
    assert [[c.name for c in comparison.contenders] for comparison in report.comparisons] == [
        [*ours, "transformers-static"]] * 2
    found = report.measurements
    for comparison in report.comparisons:
        assert comparison["m4"].identical_requests == comparison.workload["num_requests"]
    assert set(found["weight_bytes"]) == set(ours) == set(found["limits"]["share"])
    assert found["weight_bytes"]["m7"] < found["weight_bytes"]["m7-8bit"] < found["weight_bytes"]["m6"]
    assert found["weight_bytes"]["m7"] == found["weight_bytes"]["m7-a16"]
    assert set(found["perplexity"]) == set(ours) - {"m4"}
    [entry] = found["drafts"]
    assert entry["contenders"]["own"]["acceptance"] > 0.5
    assert not (folder / "unfinished.json").exists()
    assert {path.stem for path in folder.glob("*.png")} == {"ragged", "single", "drafts"}
    results = bench_results(read_json_file(folder / "bench.json"))
    assert {"bench.ragged.m7.ratio", "bench.single.m7_over.m6", "bench.decode.m7_a16.tokens_per_s",
            "bench.single.m7_gguf.limit_share", "bench.memory.bf16.bytes", "bench.draft.gain",
            "bench.perplexity.m7"} <= set(results)
    for name, result in results.items():
        assert isinstance(read_result(tmp_path, result.file, result.path), int | float), name


def test_folders_are_quantised_once(tiny_model: TinyModels, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = QuantizeOptions(method="rtn", group_size=32, search=False)
    model = str(tiny_model("qwen3"))
    first = contenders.packed_folder(model, options)
    assert first.parent == cache

    def fail(*_: object) -> None:
        raise AssertionError("quantised a second time")

    monkeypatch.setattr(contenders, "quantize", fail)
    assert contenders.packed_folder(model, options) == first
    with pytest.raises(AssertionError, match="a second time"):
        contenders.packed_folder(model, QuantizeOptions(method="rtn", group_size=32))


def test_bytes_of_the_engines_are_the_predicted_ones(tiny_model: TinyModels) -> None:
    ours = contenders.make_ours({"model": str(tiny_model("llama")), "max_model_len": 64, **OPTIONS}, quick=True)
    assert list(ours.llms) == ["m4", "m6", "m7", "m7-a16", "m7-8bit"]
    spec, form = ours.llms["m7"].spec, gptq_form(4, 32)
    import torch

    from m7_gptq.kernels.cpu.build import library
    predicted = predict(spec, torch.bfloat16, form, form, library().quantized_panel(), plain_embedding=True)
    assert ours.weight_bytes()["m7"] == predicted.total


def test_the_table_joins_quality_and_speed() -> None:
    quality = {"about": {}, "full precision": {"perplexity": {"dev": 10.0, "test": 11.0}},
               "4 bits: nearest": {"perplexity": {"dev": 12.0, "test": 13.0},
                                   "int8_activations": {"by group of 64": {"test": 13.5}}},
               "3 bits: nearest": {"perplexity": {"dev": 22.0, "test": 23.0}}}
    bench = {"measurements": {"weight_bytes": {"m6": 4e6, "m7": 1e6, "m7-a16": 1e6},
                              "decode_tokens_per_s": {"m6": 50.0, "m7": 150.0, "m7-a16": 120.0}},
             "comparisons": [{"contenders": [{"name": n, "output_throughput": v}
                                             for n, v in (("m6", 400.0), ("m7", 600.0), ("m7-a16", 350.0))]}]}
    table = quality_table(quality, bench)
    cells = [[str(c) for c in column.cells] for column in table.columns]
    assert cells[0] == ["full precision", "4 bits: nearest", "  + activations of 8 bits, by group of 64",
                        "3 bits: nearest"]
    assert cells[1:3] == [["10.00", "12.00", "-", "22.00"], ["11.00", "13.00", "13.50", "23.00"]]
    assert cells[3:] == [["4", "1", "1", "1"], ["50", "120", "150", "120"], ["400", "350", "600", "350"]]
    bench["measurements"]["perplexity"] = {"m7": 13.25}
    last = [list(column.cells)[-1] for column in quality_table(quality, bench).columns]
    assert last == ["m7, as it runs", "-", "13.25", "1", "150", "600"]
    assert quality_table(quality, None).row_count == 4
    assert "of one folder for each number of bits" in str(table.caption)
    assert form_of("the Q4_1 trap", {}) is None


def test_an_order_of_inputs_has_no_speed_of_another_form() -> None:
    """Only activation order in groups of its own needs a gather; groups that stay what they are need none."""
    orders = [{"desc_act": False, "act_group_aware": False}, {"desc_act": True, "act_group_aware": True},
              {"desc_act": True, "act_group_aware": False}]
    assert [form_of("4 bits: x", options) for options in orders] == ["m7-a16", "m7-a16", None]


def test_rows_from_the_simplest_to_the_best() -> None:
    """Whatever was measured last."""
    names = ["full precision", "4 bits: nearest", "4 bits: GPTQ, + GPTAQ", "3 bits: GPTQ, textbook", "3 bits: nearest",
             "4 bits: GPTQ, textbook", "8 bits: nearest"]
    assert in_order(dict.fromkeys(names)) == [
        "full precision", "4 bits: nearest", "4 bits: GPTQ, textbook", "4 bits: GPTQ, + GPTAQ", "3 bits: nearest",
        "3 bits: GPTQ, textbook", "8 bits: nearest"]


def test_the_table_of_what_defaults_were_chosen_by() -> None:
    def row(value: float) -> dict[str, dict[str, float]]:
        return {"perplexity": {"dev": value}}

    table = choices_table({"full precision": row(10), "4 bits: the default": row(11), "4 bits: GPTAQ 0": row(12.5),
                           "3 bits: the default": row(14)})
    assert [str(column.header) for column in table.columns] == ["", "4 bits", "3 bits"]
    assert [list(column.cells) for column in table.columns] == [
        ["full precision", "the default", "GPTAQ 0"], ["10.00", "11.00", "12.50"], ["10.00", "14.00", "-"]]
    assert choices_table({"4 bits: nearest": row(1)}).row_count == 1


def test_products_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of rows, and each of the three ways to hold the weights."""
    monkeypatch.setattr(linear_bench, "_READ_BYTES", 4096)
    found = benchmark.linear_products(1, (1, 2), 1)
    assert [entry["rows"] for entry in found] == [1, 2]
    assert all(set(entry) == {"rows", "bf16_ms", "w4a8_ms", "w4a16_ms"} and min(entry.values()) > 0 for entry in found)
