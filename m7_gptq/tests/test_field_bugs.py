"""F7.1 to F7.3: what broke in other engines over quantised weights. Each test names whose fault it was; the inputs are
our own, and the right answer is m6's on the dequantised weights. Those that stand beside what they are about are there:
test_checkpoint.py and test_pack.py (formats), test_gptq.py (the algorithm), test_fill.py (joined layers, biases of
zeros), test_engine.py (weights in the key of a cache, NaN), test_cpu_quantized_linear.py and
test_objdump.py (saturation, instructions)."""
from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import m6_prefix_cache as m6
from m0_basics.base_llm import BaseLLM
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m7_gptq import LLM
from m7_gptq.config import ModelConfig
from m7_gptq.kernels.cpu.linear import CpuQuantizedLinear
from m7_gptq.loading.checkpoint import PackedLabelWarning
from m7_gptq.loading.fill import load_model
from m7_gptq.loading.fingerprint import matrices_of

from .packed_models import PackedModel, pack_gptq

BASE: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "block_size": 8, "num_blocks": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [[30 + i, *range(20, 24 + 9 * i)] for i in range(4)]


def ask(llm: BaseLLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def check(model: PackedModel, **options: Any) -> LLM:
    """The packed model gives the tokens of its values."""
    llm = LLM(str(model.packed), **BASE | options)
    assert ask(llm) == ask(m6.LLM(str(model.plain), **BASE))
    return llm


def relabel(model: PackedModel, **settings: Any) -> None:
    """Change the settings that a folder states."""
    config = json.loads((model.packed / "config.json").read_text())
    config["quantization_config"] |= settings
    (model.packed / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("version", [1, 2])
def test_a_wrong_label_of_a_symmetric_folder(tiny_model: TinyModels, tmp_path: Path, version: int) -> None:
    """vllm#38966: folders that say "gptq" and hold the zero points of "gptq_v2" ran one step off: nonsense."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"), sym=True, version=version)
    relabel(model, checkpoint_format="gptq" if version == 2 else "gptq_v2")
    with pytest.warns(PackedLabelWarning, match="is wrong"):
        check(model)


def test_symmetric_weights(tiny_model: TinyModels, tmp_path: Path) -> None:
    """vllm#45656: a change for asymmetric grids broke all others."""
    for number, (sym, bits) in enumerate(((True, 4), (False, 4), (True, 8), (False, 8))):
        check(pack_gptq(tmp_path / str(number), tiny_model("llama"), sym=sym, bits=bits))


def test_activation_order_keeps_its_kernel(tiny_model: TinyModels, tmp_path: Path) -> None:
    """vllm#46561, #7374: with desc_act the fast kernels gave up, or took other inputs' groups."""
    llm = check(pack_gptq(tmp_path / "m", tiny_model("qwen2"), desc_act=True))
    [decoder] = engine_of(llm).runner.model.layers
    for layer in decoder.layers:
        assert isinstance(layer.qkv_proj, CpuQuantizedLinear)
        assert layer.qkv_proj.packed.order is not None


def test_scales_keep_their_digits_in_bfloat16(tiny_model: TinyModels, tmp_path: Path) -> None:
    """A scale is float16. Loaded in the model's type it loses three bits, and logits move by a tenth."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    stored = load_file(model.packed / "model.safetensors")
    loaded = dict(matrices_of(load_model(ModelConfig(str(model.packed), dtype="bfloat16"))))
    scales = loaded["layers.1.mlp.down_proj"].scales
    assert torch.equal(scales.T, stored["model.layers.1.mlp.down_proj.scales"].float())
    assert not torch.equal(scales, scales.bfloat16().float())


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_guesses_change_no_token_of_a_packed_target(tiny_model: TinyModels, tmp_path: Path, activations: str) -> None:
    """llama.cpp#25618: a batch of drafts took another product than a single token, and greedy text changed."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    options = BASE | {"dtype": "bfloat16", "activations": activations}
    plain = ask(LLM(str(model.packed), **options), params)
    for method in ("ngram", "suffix"):
        llm = LLM(str(model.packed), speculative_method=method, adaptive_drafts=False, **options)
        assert ask(llm, params) == plain


def test_runs_do_not_differ(tiny_model: TinyModels, tmp_path: Path) -> None:
    """vllm#53436: the same request gave other tokens from run to run, by the number of threads or their order."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    options = BASE | {"dtype": "bfloat16"}
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(ask(LLM(str(model.packed), **options)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_a_sharded_folder(tiny_model: TinyModels, tmp_path: Path) -> None:
    """A layer's four tensors may lie in two files."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    tensors = load_file(model.packed / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, model.packed / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model.packed / "model.safetensors").unlink()
    (model.packed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check(model)


def test_settings_in_their_old_place(tiny_model: TinyModels, tmp_path: Path) -> None:
    """AutoGPTQ wrote quantize_config.json, and config.json knew nothing of it."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    config = json.loads((model.packed / "config.json").read_text())
    settings = config.pop("quantization_config")
    (model.packed / "config.json").write_text(json.dumps(config))
    (model.packed / "quantize_config.json").write_text(json.dumps(settings))
    check(model)


def test_no_group_index(tiny_model: TinyModels, tmp_path: Path) -> None:
    """Older writers left it out: without activation order g_idx says nothing."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    tensors = {name: t for name, t in load_file(model.packed / "model.safetensors").items()
               if not name.endswith("g_idx")}
    save_file(tensors, tmp_path / "new", {"format": "pt"})
    shutil.move(tmp_path / "new", model.packed / "model.safetensors")
    check(model)


def test_dead_groups(tiny_model: TinyModels, tmp_path: Path) -> None:
    """AutoGPTQ#708, #196: inputs without weights or activations. Their group has next to no scale, and no NaN."""
    source = tmp_path / "source"
    shutil.copytree(tiny_model("qwen3"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][:, :32] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    model = pack_gptq(tmp_path / "m", source)
    check(model)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
    for output in LLM(str(model.packed), activations="int8", **BASE).generate(PROMPTS, params, use_tqdm=False):
        assert math.isfinite(output.outputs[0].cumulative_logprob or 0)


def test_one_request_and_a_crowd_round_alike(tiny_model: TinyModels, tmp_path: Path) -> None:
    """vllm RFC#54506: activations rounded over the whole batch make a request's tokens depend on its neighbours."""
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    llm = LLM(str(model.packed), activations="int8", **BASE | {"dtype": "bfloat16"}, enable_prefix_caching=False)
    alone = [llm.generate({"prompt_token_ids": p}, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for p in PROMPTS]
    assert ask(llm) == alone
