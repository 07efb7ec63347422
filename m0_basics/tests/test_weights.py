"""F0.9: the seam between a checkpoint and the model: who asks for which tensor, and what is left over."""
from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m0_basics import LLM
from m0_basics.attention import FullAttention
from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading.loader import load_model, load_spec, new_model, quantization_method
from m0_basics.loading.weights import LoadError, SafetensorsFolder, WeightSource, fill_linear, load_weights
from m0_basics.model import CausalLM
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.testing.parity import all_logits, reference_logits
from m0_basics.tools.testing.tiny_models import save_tiny_model

PROMPTS = [[5, 17, 200, 3, 3, 90, 250], [1, 2]]


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of a tiny model that a test may change."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def empty_model(folder: Path) -> CausalLM:
    return new_model(load_spec(folder), None, torch.float32, torch.device("cpu"))


class PackedSource(WeightSource):
    """Every linear layer as int8 rows (`.qweight`) and a scale for each row (`.scales`); the rest is plain."""

    def __init__(self, folder: Path) -> None:
        self.location = folder
        self.tensors: dict[str, Tensor] = {}
        self.plain: dict[str, Tensor] = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            if not name.endswith("_proj.weight"):
                self.tensors[name] = self.plain[name] = tensor
                continue
            scales = tensor.abs().amax(1, keepdim=True) / 127
            packed = (tensor / scales).round().to(torch.int8)
            layer = name.removesuffix(".weight")
            self.tensors |= {f"{layer}.qweight": packed, f"{layer}.scales": scales}
            self.plain[name] = packed * scales

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class PackedLinear(nn.Module):
    def __init__(self, qweight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.qweight, self.scales = qweight, scales

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scales).T


def fill_packed(linear: nn.Linear, parts: list[str], source: WeightSource, model: CausalLM) -> nn.Module:
    if f"{parts[0]}.qweight" not in source.names():
        return fill_linear(linear, parts, source, model)
    qweight, scales = (torch.cat([source.read(f"{part}.{kind}") for part in parts]) for kind in ("qweight", "scales"))
    return PackedLinear(qweight, scales)


def test_packed_tensors_reach_a_linear_layer_undecoded(folder):
    """A source and a way to fill, both from outside: the layers hold what is stored, and the logits are right."""
    source, model = PackedSource(folder), empty_model(folder)
    load_weights(model, source, fill_packed)
    qkv = model.layers[1].self_attn.qkv_proj
    assert isinstance(qkv, PackedLinear)
    assert qkv.qweight.dtype == torch.int8
    assert torch.equal(qkv.qweight[64:96], source.tensors["model.layers.1.self_attn.k_proj.qweight"])
    assert type(model.lm_head) is nn.Linear
    save_file(source.plain, folder / "model.safetensors", metadata={"format": "pt"})
    for prompt, logits in zip(PROMPTS, all_logits(ModelRunner(model.eval(), FullAttention()), PROMPTS), strict=True):
        torch.testing.assert_close(logits, reference_logits(folder, prompt), rtol=1e-4, atol=1e-4)


def test_packed_tensors_that_nobody_takes_are_left_over(folder):
    """A layer that takes its matrix and forgets its scales computes something else."""
    def forgetful(linear, parts, source, model):
        if f"{parts[0]}.qweight" in source.names():
            return PackedLinear(torch.cat([source.read(f"{part}.qweight") for part in parts]), torch.ones(1))
        return fill_linear(linear, parts, source, model)

    with pytest.raises(LoadError, match=r"tensor model\.layers\.0\.mlp\.down_proj\.scales of .*model has no place in "
                                        r"LlamaForCausalLM, nor have 20 more"):
        load_weights(empty_model(folder), PackedSource(folder), forgetful)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.up_proj.bias",
                                  "model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.q_norm.weight",
                                  "lm_head.bias", "model.layers.1.self_attn.sinks", "something.else"])
def test_a_tensor_that_the_model_does_not_use(name, folder):
    """Without a bias, a norm or a layer the model computes something else: it is refused, not left out."""
    change(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
    with pytest.raises(LoadError, match=rf"tensor {name} of .*model has no place in LlamaForCausalLM; without it"):
        LLM(str(folder))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_tables_of_old_checkpoints_do_no_harm(name, folder, tiny_model):
    change(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    expected = dict(load_model(ModelConfig(str(tiny_model("llama")), dtype="float32")).named_parameters())
    for name, parameter in load_model(ModelConfig(str(folder), dtype="float32")).named_parameters():
        assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_packed_numbers_are_no_weights(dtype, folder):
    """Read as they are they would be garbage: their scales lie elsewhere."""
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(LoadError, match=f"tensor {name} of .* is {str(dtype)[6:]}; allowed: float32, bfloat16"):
        LLM(str(folder))


def test_parts_of_another_size_that_fit_together(folder):
    """The rows of q, k and v add up, and yet each head would get the rows of another."""
    def move_rows(tensors):
        k, v = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv")
        tensors[k], tensors[v] = torch.cat((tensors[k], tensors[v][:16])), tensors[v][16:].clone()

    change(folder, move_rows)
    with pytest.raises(LoadError, match=r"v_proj\.weight has shape \(64, 64\) \+ \(48, 64\) \+ \(16, 64\), config"):
        LLM(str(folder))


@pytest.mark.parametrize("kept", ["both", "differing", "lm_head"])
def test_a_tied_matrix_that_is_stored_otherwise(kept, tmp_path):
    """As transformers reads it: two that differ are two, and one is stored under either name."""
    folder = save_tiny_model(tmp_path / "tied", "llama", tie=True)

    def edit(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.flip(0).contiguous() if kept == "differing" else embedding.clone()
        if kept == "lm_head":
            del tensors["model.embed_tokens.weight"]

    change(folder, edit)
    model = load_model(ModelConfig(str(folder), dtype="float32"))
    assert model.spec.tie_word_embeddings == (kept != "differing")
    for prompt, logits in zip(PROMPTS, all_logits(ModelRunner(model, FullAttention()), PROMPTS), strict=True):
        torch.testing.assert_close(logits, reference_logits(folder, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("file", "content", "method"), [
    ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ("config.json", {"quantization_config": {"bits": 4}}, "unknown"),
    ("config.json", {"quantization_config": "int4"}, "unknown"),
    ("config.json", {"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ("quantize_config.json", {"bits": 4}, "gptq"), ("quant_config.json", {"w_bit": 4}, "awq")])
def test_a_quantised_checkpoint_can_be_described_and_is_not_loaded(file, content, method, folder):
    """Its scales would be ignored, and the numbers would be garbage. What it would be is in its settings."""
    data = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(data | content))
    assert load_spec(folder).num_hidden_layers == 3
    assert quantization_method(folder) == method
    with pytest.raises(ConfigError, match=f"quantization_config of method '{method}' is not supported; allowed: "):
        LLM(str(folder))


def test_two_files_with_one_tensor(folder):
    """Where neither is the one that transformers would read, an alphabet does not decide."""
    expected = load_file(folder / "model.safetensors")["model.norm.weight"]
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "consolidated.safetensors")
    assert torch.equal(SafetensorsFolder(folder).read("model.norm.weight"), expected)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(LoadError, match=r"consolidated\.safetensors and weights\.safetensors both hold the tensor "
                                        r"model\.norm\.weight, and no model\.safetensors\.index\.json says"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("file", ["/etc/passwd", "../model.safetensors", "a/../../b", "..\\b", "\0"])
def test_an_index_that_leads_out_of_its_folder(file, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(LoadError, match=r"names the file .*; allowed: files inside the folder"):
        SafetensorsFolder(folder)
