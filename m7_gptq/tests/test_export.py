"""The written folder: its tensors, its settings, and that it runs as the model in memory does."""
import errno
import json
import os
import resource

import pytest
import torch

from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.loading.weights import SafetensorsFolder
from m7_gptq.calibration import hidden_states
from m7_gptq.loading import export
from m7_gptq.loading.checkpoint import read_matrix
from m7_gptq.loading.export import plain_tensors, write_folder
from m7_gptq.loading.settings import GPTQSettings, read_settings, tied_meta
from m7_gptq.quantize import quantize_model
from m7_gptq.rtn import QuantizeOptions

WINDOWS = torch.randint(0, 268, (4, 64), generator=torch.Generator().manual_seed(0))


def quantised(folder, **options):
    """The tiny model in `folder`, its values dequantised in place, with its matrices."""
    model = load_model(ModelConfig(model=str(folder), dtype="float32"))
    return model, quantize_model(model, WINDOWS, QuantizeOptions(group_size=32, **options)).matrices


def written(folder, target, settings, dtype=torch.float32, **options):
    model, matrices = quantised(folder, **options)
    num_bytes = write_folder(target, folder, plain_tensors(model, matrices, dtype), matrices, settings)
    return model, matrices, num_bytes


ORDERED = GPTQSettings(4, 32, desc_act=True, checkpoint_format="gptq_v2", lm_head=True)


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen2", "llama"])
def test_every_tensor_and_the_settings(tmp_path, tiny_model, family):
    source = tiny_model(family)
    tied = family.endswith("tied")
    settings = GPTQSettings(4, 32, True, checkpoint_format="gptq_v2", lm_head=True,
                            meta=tied_meta({}) if tied else {})
    _, matrices, num_bytes = written(source, tmp_path / "made", settings)
    assert num_bytes == sum(file.stat().st_size for file in (tmp_path / "made").iterdir())
    folder, original = SafetensorsFolder(tmp_path / "made"), SafetensorsFolder(source)
    packed = {f"{name}.{kind}" for name in matrices for kind in ("qweight", "qzeros", "scales", "g_idx")}
    plain = set(original.names()) - {f"{name}.weight" for name in matrices}
    assert set(folder.names()) == packed | plain | {"model.embed_tokens.weight"}
    assert any(name.endswith("q_proj.bias") for name in plain) == (family == "qwen2")
    for name in plain - {"model.embed_tokens.weight"}:
        assert torch.equal(folder.read(name), original.read(name)), name
    for name, matrix in matrices.items():
        assert torch.equal(read_matrix(folder, name, settings).dequantise(), matrix.dequantise())
    embedding = folder.read("model.embed_tokens.weight")
    assert torch.equal(embedding, matrices["lm_head"].dequantise() if tied
                       else original.read("model.embed_tokens.weight"))
    assert read_settings(tmp_path / "made") == settings
    config, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "made", source))
    changed = {"dtype", "torch_dtype", "quantization_config", "tie_word_embeddings"}
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed}
    assert config["tie_word_embeddings"] is False and config["dtype"] == "float32"
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "made" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("family", ["qwen3_tied", "llama_bias"])
def test_any_reader_of_plain_weights_computes_the_same(tmp_path, tiny_model, family):
    """The layers of the folder, dequantised by the formula of the format, in transformers' own model."""
    import transformers
    source = tiny_model(family)
    model, _, _ = written(source, tmp_path / "made", ORDERED)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    del config["quantization_config"]
    folder, weights = SafetensorsFolder(tmp_path / "made"), {}
    for name in folder.names():
        part, _, kind = name.rpartition(".")
        if kind == "g_idx":
            g, scales = folder.read(name).long(), folder.read(f"{part}.scales").float()
            codes = torch.stack([folder.read(f"{part}.qweight") >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
            zeros = torch.stack([folder.read(f"{part}.qzeros") >> 4 * i & 15 for i in range(8)], 2).flatten(1)
            weights[f"{part}.weight"] = (scales[g] * (codes - zeros[g])).t()
        elif kind not in ("qweight", "qzeros", "scales"):
            weights[name] = folder.read(name)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float().eval()
    assert not theirs.load_state_dict(weights, strict=True).unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(theirs(WINDOWS).logits, model.compute_logits(hidden_states(model, WINDOWS)),
                                   rtol=1e-3, atol=1e-3)


def test_what_stays_plain_takes_the_models_dtype(tmp_path, tiny_model):
    _, matrices, _ = written(tiny_model("llama"), tmp_path / "made",
                                 GPTQSettings(4, 32, True, checkpoint_format="gptq_v2"), torch.bfloat16, lm_head=False)
    folder = SafetensorsFolder(tmp_path / "made")
    assert "lm_head" not in matrices and folder.read("lm_head.weight").dtype is torch.bfloat16
    assert folder.read("model.layers.0.self_attn.q_proj.scales").dtype is torch.float16
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tied_output_matrix_that_stays_plain_is_stored_once(tmp_path, tiny_model):
    settings = GPTQSettings(4, 32, True, checkpoint_format="gptq_v2")
    written(tiny_model("llama_tied"), tmp_path / "made", settings, lm_head=False)
    names = SafetensorsFolder(tmp_path / "made").names()
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    assert json.loads((tmp_path / "made" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(("options", "settings", "message"), [
    ({}, GPTQSettings(8, 32, True, lm_head=True), r"has 4 bits in groups of 32; allowed: 8 bits in groups of 32"),
    ({}, GPTQSettings(4, 16, True, lm_head=True), r"has 4 bits in groups of 32; allowed: 4 bits in groups of 16"),
    ({}, GPTQSettings(4, -1, True, lm_head=True), r"allowed: 4 bits in groups of 64"),
    ({"act_group_aware": False}, GPTQSettings(4, 32, False, lm_head=True), r"an order of its own; allowed: none"),
    ({}, GPTQSettings(4, 32, True, True, lm_head=True), r"has zero points from .* allowed: 8 everywhere"),
])
def test_matrices_that_the_settings_do_not_describe(tmp_path, tiny_model, options, settings, message):
    with pytest.raises(ConfigError, match=message):
        written(tiny_model("llama"), tmp_path / "made", settings, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, tiny_model, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "_write_json", full)
    with pytest.raises(ConfigError, match="made cannot be written: No space left on device; nothing was changed"):
        written(tiny_model("llama"), tmp_path / "made", ORDERED)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_of_tensors_reports_what_the_disk_refuses(tmp_path, tiny_model):
    """Safetensors has an error class of its own. Here the system lets no file grow beyond 20 kB."""
    model, matrices = quantised(tiny_model("llama"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"made cannot be written: .*File too large.*; nothing was changed"):
            write_folder(tmp_path / "made", tiny_model("llama"), plain_tensors(model, matrices, torch.float32),
                         matrices, ORDERED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
