"""`quantize`: what it writes, what it refuses and when, and that an interrupted run goes on where it stopped."""
import dataclasses
import errno
import io
import json
import os

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading.loader import load_model, load_tokenizer
from m0_basics.loading.weights import SafetensorsFolder
from m0_basics.tools.cli.options import with_flags
from m0_basics.tools.testing.gguf_files import write_gguf
from m7_gptq.calibration import cut_windows
from m7_gptq.loading import export
from m7_gptq.loading.checkpoint import read_matrix
from m7_gptq.loading.settings import read_settings
from m7_gptq.quantize import quantize_model
from m7_gptq.rtn import QuantizeOptions
from m7_gptq.tools import quantize_command
from m7_gptq.tools.quantize_command import COMMAND, calibration_windows, quantize, summary
from m7_gptq.tools.texts import calibration_text

OPTIONS = QuantizeOptions(group_size=32)
SMALL = {"num_samples": 4, "length": 64}


def everything_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_what_the_algorithm_makes(tmp_path, tiny_model):
    source = tiny_model("qwen3_tied")
    written = quantize(str(source), tmp_path / "made", OPTIONS, **SMALL)
    config = ModelConfig(model=str(source), dtype="float32")
    windows = cut_windows(load_tokenizer(config).encode(calibration_text()), 64, 4)
    wanted = quantize_model(load_model(config), windows, OPTIONS)
    assert written.quantized.matrices.keys() == wanted.matrices.keys() and written.resumed == 0
    settings, folder = read_settings(tmp_path / "made"), SafetensorsFolder(tmp_path / "made")
    assert (settings.bits, settings.group_size, settings.desc_act, settings.sym) == (4, 32, False, False)
    assert settings.checkpoint_format == "gptq_v2" and settings.lm_head and settings.tied
    for name, matrix in wanted.matrices.items():
        assert torch.equal(read_matrix(folder, name, settings).dequantise(), matrix.dequantise())
    assert everything_in(tmp_path) == ["made"]
    assert written.num_bytes == sum(file.stat().st_size for file in (tmp_path / "made").iterdir())
    assert written.copy_bytes == 288 * 64 * 4           # the plain embedding, in the model's float32
    assert written.source_bytes == 2 * sum(p.numel() for p in load_model(config).parameters())


@pytest.mark.parametrize(("options", "form", "ordered"), [
    ({"sym": True, "act_group_aware": False}, "gptq", True),
    ({"desc_act": False}, "gptq_v2", False),
    ({"act_group_aware": True}, "gptq_v2", False),
    ({"method": "rtn", "lm_head": False}, "gptq_v2", False),
])
def test_the_settings_say_what_was_done(tmp_path, tiny_model, options, form, ordered):
    quantize(str(tiny_model("llama")), tmp_path / "made", dataclasses.replace(OPTIONS, **options), **SMALL)
    settings, folder = read_settings(tmp_path / "made"), SafetensorsFolder(tmp_path / "made")
    assert settings.checkpoint_format == form and settings.desc_act == ordered and not settings.tied
    g_idx = folder.read("model.layers.0.self_attn.q_proj.g_idx").tolist()
    assert (g_idx != [k // 32 for k in range(64)]) == ordered
    assert ("lm_head.qweight" in folder.names()) == settings.lm_head == options.get("lm_head", True)


def test_a_gguf_file(tmp_path, tiny_model, monkeypatch):
    """What stays plain is written in 16 bits, as it was before it became a GGUF file."""
    monkeypatch.setenv("LLM_LAB_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "Q8_0")
    quantize(str(tmp_path / "model.gguf"), tmp_path / "made", OPTIONS, **SMALL)
    folder = SafetensorsFolder(tmp_path / "made")
    assert folder.read("model.norm.weight").dtype is torch.bfloat16
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "made" / "tokenizer.json").is_file()


# --- interrupted ---------------------------------------------------------------------------------------------------

def stopping_after(num_parts, error=KeyboardInterrupt):
    """`quantize_model`, interrupted when some parts are finished."""
    def quantise(model, windows, options, *, store, on_part):
        finished = []

        def heard(part, reports):
            on_part(part, reports)
            finished.append(part)
            if len(finished) == num_parts:
                raise error

        return quantize_model(model, windows, options, store=store, on_part=heard)

    return quantise


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, tiny_model, monkeypatch):
    source = str(tiny_model("qwen3_tied"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_command, "quantize_model", stopping_after(2))
        quantize(source, tmp_path / "made", OPTIONS, **SMALL)
    assert everything_in(tmp_path) == [".made.quantizing"]
    assert everything_in(tmp_path / ".made.quantizing") == [
        "lm_head.safetensors", "model.layers.0.safetensors", "run.json"]
    written = quantize(source, tmp_path / "made", OPTIONS, **SMALL)
    assert written.resumed == 2 and len(written.quantized.report) == 2 * 4
    quantize(source, tmp_path / "at_once", OPTIONS, **SMALL)
    assert everything_in(tmp_path) == ["at_once", "made"]
    for file in everything_in(tmp_path / "made"):
        assert (tmp_path / "made" / file).read_bytes() == (tmp_path / "at_once" / file).read_bytes(), file


@pytest.mark.parametrize("change", ["options", "text", "model"])
def test_another_run_does_not_go_on_from_it(tmp_path, tiny_model, monkeypatch, change):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_command, "quantize_model", stopping_after(1))
        quantize(str(tiny_model("llama")), tmp_path / "made", OPTIONS, **SMALL)
    written = quantize(str(tiny_model("llama_tied" if change == "model" else "llama")), tmp_path / "made",
                       dataclasses.replace(OPTIONS, sym=True) if change == "options" else OPTIONS,
                       **(SMALL | ({"length": 65} if change == "text" else {})))
    assert written.resumed == 0 and everything_in(tmp_path) == ["made"]


def test_a_damaged_leftover_is_made_again(tmp_path, tiny_model, monkeypatch):
    source = str(tiny_model("llama"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_command, "quantize_model", stopping_after(2))
        quantize(source, tmp_path / "made", OPTIONS, **SMALL)
    left = tmp_path / ".made.quantizing" / "model.layers.0.safetensors"
    left.write_bytes(left.read_bytes()[:-1])
    assert quantize(source, tmp_path / "made", OPTIONS, **SMALL).resumed == 1
    quantize(source, tmp_path / "at_once", OPTIONS, **SMALL)
    assert (tmp_path / "made/model.safetensors").read_bytes() == (tmp_path / "at_once/model.safetensors").read_bytes()


def test_a_full_disk_at_the_end_leaves_nothing(tmp_path, tiny_model, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "_write_json", full)
    with pytest.raises(ConfigError, match="made cannot be written: No space left on device"):
        quantize(str(tiny_model("llama")), tmp_path / "made", OPTIONS, **SMALL)
    assert everything_in(tmp_path) == []


# --- refused before the work ---------------------------------------------------------------------------------------

def refused(tmp_path, tiny_model, monkeypatch, message, options=OPTIONS, **arguments):
    def work(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(quantize_command, "load_model", work)
    with pytest.raises(ConfigError, match=message):
        quantize(str(tiny_model("llama")), tmp_path / "made", options, **arguments)


def test_a_target_that_exists(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text("{}")
    refused(tmp_path, tiny_model, monkeypatch, r"made' exists; allowed: a new folder, or --force to replace it")


def test_the_model_itself_as_target(tiny_model):
    source = tiny_model("llama")
    with pytest.raises(ConfigError, match="is the model that is read"):
        quantize(str(source), source, OPTIONS, force=True)


@pytest.mark.parametrize(("text", "arguments", "message"), [
    (None, {}, r"calibration='.*text' is not valid; allowed: text files that exist"),
    (b"", {}, r"calibration=.*text holds no text; allowed: text of at least one window of length=512 tokens"),
    (b" \n\n ", {}, "holds no text"),
    (b"\xff\xfe", {}, "cannot be read"),
    (b"a short story", {}, r"has 13 tokens, and 1 windows of length=512 take 512; allowed: more text, a smaller"),
    (b"a" * 100, {"num_samples": 3, "length": 40}, r"100 tokens, and 3 windows .* take 120; .*--num-samples 2"),
    (b"a" * 100, {"num_samples": 0}, r"num_samples=0"),
    (b"a" * 100, {"length": 1}, r"length=1"),
    (b"a" * 100, {"checkpoint_format": "v2"}, r"checkpoint_format='v2' is not valid; allowed: gptq, gptq_v2"),
])
def test_calibration_text_and_arguments(tmp_path, tiny_model, monkeypatch, text, arguments, message):
    if text is not None:
        (tmp_path / "text").write_bytes(text)
    refused(tmp_path, tiny_model, monkeypatch, message, calibration=[tmp_path / "text"], **arguments)


def test_no_windows_are_lost_in_texts_that_fit(tmp_path, tiny_model):
    (tmp_path / "a").write_bytes(b"x" * 60)
    (tmp_path / "b").write_bytes(b"y" * 60)
    tokenizer = load_tokenizer(ModelConfig(model=str(tiny_model("llama"))))
    windows = calibration_windows(tokenizer, [tmp_path / "a", tmp_path / "b"], None, 40)
    assert windows.shape == (3, 40) and tokenizer.decode(windows.flatten().tolist()) == "x" * 60 + "\n" + "y" * 59


def test_rounding_to_nearest_needs_no_text(tmp_path, tiny_model):
    written = quantize(str(tiny_model("llama")), tmp_path / "made", QuantizeOptions(group_size=32, method="rtn"),
                       calibration=[tmp_path / "nowhere"])
    assert written.quantized.num_tokens == 0


def test_a_group_that_does_not_divide_leaves_nothing(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match=r"layers.0.*group_size=48 is not valid; allowed: -1, or a divisor of"):
        quantize(str(tiny_model("llama")), tmp_path / "made", QuantizeOptions(group_size=48), **SMALL)
    assert everything_in(tmp_path) == []


# --- the command line ----------------------------------------------------------------------------------------------

def test_the_command(tmp_path, tiny_model):
    app = typer.Typer()
    app.command("quantize", help=COMMAND.__doc__)(with_flags(COMMAND, {}))
    (tmp_path / "text").write_text("the in " * 100)
    arguments = [str(tiny_model("llama")), str(tmp_path / "made"), "--bits", "3", "--group-size", "32", "--sym",
                 "--no-desc-act", "--no-lm-head", "--damp-percent", "0.1", "--sink", "0", "--calibration",
                 str(tmp_path / "text"), "--num-samples", "2", "--length", "32"]
    ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    settings = read_settings(tmp_path / "made")
    assert (settings.bits, settings.sym, settings.desc_act, settings.lm_head, settings.damp_percent) == (
        3, True, False, False, 0.1)
    for said in ("model.layers.2", "3 bits, groups of 32, symmetric", "64 tokens", "output error"):
        assert said in ran.output
    assert f"{sum(f.stat().st_size for f in (tmp_path / 'made').iterdir()):,}" in ran.output


@pytest.mark.parametrize("arguments", [[], ["smollm2-135m-instruct"]])
def test_the_command_without_its_arguments(arguments):
    """One line that says what is missing; the help says it before."""
    app = typer.Typer()
    app.command("quantize")(with_flags(COMMAND, {}))
    ran = CliRunner().invoke(app, arguments)
    assert isinstance(ran.exception, ConfigError)
    assert str(ran.exception).startswith("quantize wants a model and a folder to write; allowed: such as quantize smol")
    assert "\n" not in str(ran.exception)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "160"}).output
    assert "Required: the default model's name" in shown and "Required: where the" in shown


def test_the_command_interrupted(tmp_path, tiny_model, monkeypatch):
    app = typer.Typer()
    app.command("quantize")(with_flags(COMMAND, {}))
    arguments = [str(tiny_model("llama")), str(tmp_path / "made"), "--group-size", "32", "--num-samples", "4",
                 "--length", "64"]
    with monkeypatch.context() as patch:
        patch.setattr(quantize_command, "quantize_model", stopping_after(1))
        ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 130 and "interrupted: the same command goes on" in ran.output
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0 and "1 parts from an interrupted run" in ran.output


def test_the_summary_names_the_worst_layer(tmp_path, tiny_model):
    written = quantize(str(tiny_model("llama")), tmp_path / "made", OPTIONS, **SMALL)
    console = Console(file=io.StringIO(), width=200)
    console.print(summary(written))
    worst = max(written.quantized.report, key=lambda report: report.error)
    said = console.file.getvalue()
    assert f"at most {worst.error:.2e} in {worst.name}" in said and "once more" not in said
    console.print(summary(dataclasses.replace(written, copy_bytes=12345)))
    assert "12,345 of them are the output matrix once more" in console.file.getvalue()
