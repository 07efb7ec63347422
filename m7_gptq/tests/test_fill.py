"""F7.2: what a packed folder holds goes to its place: joined layers, biases, output matrix, or one clear error."""
from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from m0_basics.attention import FullAttention
from m0_basics.config import ConfigError
from m0_basics.loading.files import LoadError
from m0_basics.loading.loader import load_model as load_plain_model
from m0_basics.loading.weights import WeightSource
from m0_basics.model import CausalLM
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import all_logits, mixed_length_prompts, reference_logits
from m0_basics.tools.testing.tiny_models import VOCAB_SIZE
from m7_gptq.config import ModelConfig
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.linear import QuantizedEmbedding, QuantizedLinear
from m7_gptq.loading.fill import group_size, join, load_model
from m7_gptq.loading.fingerprint import fingerprint_of, matrices_of
from m7_gptq.rtn import QuantizeOptions, round_to_nearest

from .packed_models import PackedModel, pack_gptq

PROMPTS = mixed_length_prompts(VOCAB_SIZE, 3, seed=5)
EVERYTHING = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}


def load(path: Path, **options: Any) -> CausalLM:
    return load_model(ModelConfig(str(path), dtype="float32", **options))


def packed_parts(model: CausalLM) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def check_logits(ours: CausalLM, model: PackedModel) -> None:
    for prompt, logits in zip(PROMPTS, all_logits(ModelRunner(ours, FullAttention()), PROMPTS), strict=True):
        torch.testing.assert_close(logits, reference_logits(model.plain, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("variant", "settings"), [
    ("qwen3", {}), ("qwen2", {"bits": 8, "version": 2}), ("llama_bias", {"bits": 3, "desc_act": True}),
    ("qwen3_bias", {"desc_act": True, "sym": True}), ("llama", {"bits": 2, "group_size": 16})])
def test_a_folder_has_the_logits_of_its_values(tiny_model: TinyModels, tmp_path: Path, variant: str,
                                               settings: dict[str, Any]) -> None:
    model = pack_gptq(tmp_path / "m", tiny_model(variant), **settings)
    ours = load(model.packed)
    assert packed_parts(ours) == EVERYTHING
    check_logits(ours, model)
    plain = load(model.packed, quantization="none")
    assert not list(matrices_of(plain))
    check_logits(plain, model)


@pytest.mark.parametrize("stored", [True, False])
def test_one_matrix_for_input_and_output(tiny_model: TinyModels, tmp_path: Path, stored: bool) -> None:
    """Other readers find the embedding's values beside it; here rows are looked up in the packed output matrix."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen2_tied"), desc_act=True)
    if not stored:
        edit(model.packed, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    ours = load(model.packed)
    assert isinstance(ours.embed_tokens, QuantizedEmbedding)
    assert isinstance(ours.lm_head, QuantizedLinear)
    assert ours.embed_tokens.matrix is ours.lm_head.matrix
    assert ours.spec.tie_word_embeddings
    check_logits(ours, model)


@pytest.mark.parametrize("variant", ["qwen3", "qwen3_tied"])
def test_a_plain_output_matrix(tiny_model: TinyModels, tmp_path: Path, variant: str) -> None:
    model = pack_gptq(tmp_path / "m", tiny_model(variant), lm_head=False)
    ours = load(model.packed)
    assert packed_parts(ours) == EVERYTHING - {"lm_head"}
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == (variant == "qwen3_tied")
    check_logits(ours, model)


def test_an_output_matrix_apart_from_a_tied_embedding(tiny_model: TinyModels, tmp_path: Path) -> None:
    """Without this lab's mark, an embedding that is stored counts, whatever the packed output matrix holds."""
    model = pack_gptq(tmp_path / "m", tiny_model("llama_tied"))
    edit(model.packed, lambda t: t["model.embed_tokens.weight"].add_(1))
    config = model.packed / "config.json"
    config.write_text(config.read_text().replace('"tied_lm_head": true', '"note": true'))
    ours = load(model.packed)
    assert torch.equal(ours.embed_tokens.weight, load_file(model.packed / "model.safetensors")
                       ["model.embed_tokens.weight"])
    assert isinstance(ours.lm_head, QuantizedLinear)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t["model.embed_tokens.weight"][-1, 3].add_(1), r"the values of model\.embed_tokens\.weight are others"),
    (lambda t: t["lm_head.scales"][0, 5].mul_(2), r"the values of model\.embed_tokens\.weight are others"),
    (lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:-1].contiguous()}),
     r"model\.embed_tokens\.weight has shape \(287, 64\), config\.json says \(288, 64\)"),
    (lambda t: [t.pop(f"lm_head.{n}") for n in ("qweight", "qzeros", "scales", "g_idx")],
     r"is marked as one .* and lacks the tensor lm_head\.qweight")])
def test_a_mark_that_lies(tiny_model: TinyModels, tmp_path: Path, message: str,
                          change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """The mark says that the packed output matrix is the embedding; what the folder holds says something else."""
    model = pack_gptq(tmp_path / "m", tiny_model("llama_tied"))
    edit(model.packed, change)
    with pytest.raises(LoadError, match=message):
        load(model.packed)


def test_parts_that_do_not_go_together_are_dequantised(tiny_model: TinyModels, tmp_path: Path) -> None:
    """A key that is stored plain, as GPTQModel's rules allow: that layer is plain, and all others are packed."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    plain = load_file(model.plain / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"model.layers.1.self_attn.k_proj.{name}"]
        tensors["model.layers.1.self_attn.k_proj.weight"] = plain

    edit(model.packed, unpack)
    ours = load(model.packed)
    assert isinstance(ours.layers[1].self_attn.qkv_proj, torch.nn.Linear)
    assert isinstance(ours.layers[0].self_attn.qkv_proj, QuantizedLinear)
    check_logits(ours, model)


def matrix(kind: str, seed: int) -> QuantizedMatrix:
    """A random matrix [3, 64] in one of GGUF's formats."""
    generator = torch.Generator().manual_seed(seed)
    bits = 8 if kind == "Q8_0" else 4
    codes = torch.randint(2 ** bits, (3, 64), generator=generator, dtype=torch.uint8)
    scales, minimums = torch.randn(2, 3, 2, generator=generator).half().float()
    zeros = None if kind == "Q4_1" else torch.full((3, 2), 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedMatrix(codes, scales, bits, zeros, minimums if zeros is None else None)


@pytest.mark.parametrize("kinds", [("Q4_1", "Q4_0", "Q8_0"), ("Q4_0", "Q8_0"), ("Q4_1", "Q4_1")])
def test_formats_that_mix_in_one_layer(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """llama.cpp gives single matrices more bits. They stay packed, as one, and no value changes by a bit."""
    parts = [matrix(kind, seed) for seed, kind in enumerate(kinds)]
    whole = join(parts, list(kinds), Nowhere())
    assert whole is not None
    assert torch.equal(whole.dequantise(), torch.cat([part.dequantise() for part in parts]))
    assert whole.bits == max(part.bits for part in parts)
    other = replace(parts[0], scales=parts[0].scales[:, :1], zeros=None, minimums=parts[0].scales[:, 1:])
    assert join([*parts, other], list(kinds), Nowhere()) is None
    assert join([*parts, None], list(kinds), Nowhere()) is None


class Nowhere(WeightSource):
    location = Path("nowhere")

    def names(self) -> list[str]:
        return []

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(name)


def test_other_orders_for_query_and_key_are_refused(tiny_model: TinyModels, tmp_path: Path) -> None:
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"), desc_act=True)
    edit(model.packed, lambda t: t["model.layers.1.self_attn.k_proj.g_idx"].copy_(
        t["model.layers.1.self_attn.k_proj.g_idx"].flip(0)))
    with pytest.raises(LoadError, match=r"layers\.1\.self_attn\.q_proj, .*different orders \(g_idx\)"):
        load(model.packed)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("model.layers.2.mlp.up_proj.scales"), r"lacks the tensor model\.layers\.2\.mlp\.up_proj\.scales"),
    (lambda t: t.pop("model.layers.1.input_layernorm.weight"), r"lacks the tensor model\.layers\.1\.input_layernorm"),
    (lambda t: t.update({"model.layers.0.mlp.extra.qweight": torch.zeros(4, 4, dtype=torch.int32)}), "has no place"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}), "has no place"),
    (lambda t: t.update({n: x[:, :32].contiguous() if "qzeros" not in n else x[:, :4].contiguous()
                         for n, x in t.items() if ".0.mlp.up_proj." in n and x.dim() == 2}),
     r"layers\.0\.mlp\.up_proj has shape \(32, 64\), config\.json says \(96, 64\)"),
    (lambda t: t.pop("model.layers.1.mlp.down_proj.qweight"),
     r"lacks the tensor model\.layers\.1\.mlp\.down_proj\.qweight, and holds model\.layers\.1\.mlp\.down_proj\.qzeros"),
    (lambda t: t.pop("lm_head.qweight"), r"lacks the tensor lm_head\.qweight, and holds lm_head\.qzeros")])
def test_folders_that_do_not_fit(tiny_model: TinyModels, tmp_path: Path, message: str,
                                 change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    edit(model.packed, change)
    with pytest.raises(LoadError, match=message):
        load(model.packed)


def test_zero_biases_of_old_tools_are_left_out(tiny_model: TinyModels, tmp_path: Path) -> None:
    """AutoGPTQ wrote them into models that have none."""
    model = pack_gptq(tmp_path / "m", tiny_model("llama"))
    edit(model.packed, lambda t: t.update({n.replace("scales", "bias"): torch.zeros(x.shape[1])
                                           for n, x in t.items() if n.endswith("scales")}))
    check_logits(load(model.packed), model)


def test_earlier_milestones_refuse_packed_folders(tiny_model: TinyModels, tmp_path: Path) -> None:
    import m6_prefix_cache as m6
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    for load_it in (lambda: load_plain_model(ModelConfig(str(model.packed))), lambda: m6.LLM(str(model.packed))):
        with pytest.raises(ConfigError, match="quantization_config of method 'gptq' is not supported"):
            load_it()


@pytest.mark.parametrize(("wanted", "kind"), [("gguf", "gptq"), ("gptq", "plain")])
def test_a_packing_that_is_not_there(tiny_model: TinyModels, tmp_path: Path, wanted: str, kind: str) -> None:
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    with pytest.raises(ConfigError, match=f"quantization='{wanted}' does not fit .* weights are {kind}"):
        load(model.packed if kind == "gptq" else model.plain, quantization=wanted)


@pytest.mark.parametrize("variant", ["qwen3", "qwen2_tied"])
def test_rounding_while_loading(tiny_model: TinyModels, variant: str) -> None:
    """Each matrix by itself, to its nearest; 96 inputs have groups of 48 where 64 are asked for."""
    ours = load(tiny_model(variant), quantization="rtn", quantization_bits=3)
    plain = load(tiny_model(variant))
    assert packed_parts(ours) == EVERYTHING
    down = ours.layers[0].mlp.down_proj.matrix
    assert (down.bits, down.group_size, ours.lm_head.matrix.group_size) == (3, 48, 64)
    expected = round_to_nearest(plain.layers[0].mlp.down_proj.weight, QuantizeOptions(3, 48, method="rtn"))
    assert torch.equal(down.dequantise(), expected.dequantise())
    assert (getattr(ours.embed_tokens, "matrix", None) is ours.lm_head.matrix) == (variant == "qwen2_tied")


def test_group_sizes() -> None:
    assert [group_size(width, 64) for width in (576, 1536, 96, 40, 100)] == [64, 64, 48, 40, 50]


def test_the_fingerprint_covers_codes_and_activations(tiny_model: TinyModels, tmp_path: Path) -> None:
    """vllm#57810: a cache on the disk whose key knew nothing of the weights."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    first = fingerprint_of(load(model.packed), "exact")
    assert first == fingerprint_of(load(model.packed), "exact")
    assert first != fingerprint_of(load(model.packed), "int8")
    assert first != fingerprint_of(load(model.packed, quantization="none"), "exact")
    edit(model.packed, lambda t: t["model.layers.2.mlp.down_proj.qweight"][0, 0].bitwise_xor_(1))
    changed = fingerprint_of(load(model.packed), "exact")
    assert changed != first
    edit(model.packed, lambda t: t["model.layers.2.mlp.down_proj.scales"][0, 0].mul_(2))
    assert fingerprint_of(load(model.packed), "exact") not in (first, changed)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder on the disk."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors.new", {"format": "pt"})
    shutil.move(folder / "model.safetensors.new", folder / "model.safetensors")


@pytest.mark.parametrize(("change", "message"), [
    (lambda k: torch.cat((k, k[:8])), "has shape"), (lambda k: k[:-8], "has shape"),
    (lambda k: k.to(torch.int8), "is int8; allowed: float32")])
def test_a_plain_part_beside_packed_ones_is_checked(tiny_model: TinyModels, tmp_path: Path, message: str,
                                                    change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """q packed, k plain: a k of another shape would shift the rows of v."""
    model = pack_gptq(tmp_path / "m", tiny_model("llama"))
    file = model.packed / "model.safetensors"
    tensors, layer = load_file(file), "model.layers.0.self_attn.k_proj"
    plain = load_file(model.plain / "model.safetensors")[f"{layer}.weight"]
    kept = {name: x for name, x in tensors.items() if not name.startswith(f"{layer}.")}
    save_file(kept | {f"{layer}.weight": plain}, file, {"format": "pt"})
    load(model.packed)
    save_file(kept | {f"{layer}.weight": change(plain).contiguous()}, file, {"format": "pt"})
    with pytest.raises(LoadError, match=message):
        load(model.packed)


def test_zero_biases_of_old_files(tiny_model: TinyModels, tmp_path: Path) -> None:
    """AutoGPTQ wrote a bias of zeros for every layer: packed or dequantised, the model has none."""
    model = pack_gptq(tmp_path / "m", tiny_model("llama"))
    file = model.packed / "model.safetensors"
    tensors, bias = load_file(file), "model.layers.0.mlp.down_proj.bias"
    zeros = torch.zeros(tensors[bias.replace("bias", "scales")].shape[1])
    for values in (zeros, zeros + 1):
        save_file(tensors | {bias: values}, file, {"format": "pt"})
        for quantization in ("auto", "none"):
            if values is zeros:
                check_logits(load(model.packed, quantization=quantization), model)
            else:
                with pytest.raises(LoadError, match="bias"):
                    load(model.packed, quantization=quantization)
