"""F7.3: the weights take the bytes that the calculator says, before anything is loaded; to the byte."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m7_gptq import LLM
from m7_gptq.config import ModelConfig
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.kernels.cpu.build import library
from m7_gptq.linear import QuantizedLinear
from m7_gptq.loading.fill import load_model
from m7_gptq.loading.memory import GGUF_FORMS, Form, gptq_form, held_bytes, predict

from .packed_models import pack_gguf, pack_gptq, use_cache


def held_and_predicted(path: Path, dtype: str, layers: Form, head: Form, plain_embedding: bool) -> tuple[int, int]:
    llm = LLM(str(path), dtype=dtype, max_model_len=64)
    model = engine_of(llm).runner.model
    return held_bytes(model), predict(model.spec, model.dtype, layers, head, library().quantized_panel(),
                                      plain_embedding).total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "settings"), [
    ("qwen3", {}), ("qwen2", {"bits": 8, "desc_act": True}), ("llama_bias", {"bits": 3, "sym": True}),
    ("qwen2_tied", {"desc_act": True}), ("llama_tied", {"bits": 2, "group_size": 16, "sym": True})])
def test_folders_weigh_what_is_predicted(tiny_model: TinyModels, tmp_path: Path, variant: str, settings: dict[str, Any],
                                         dtype: str) -> None:
    model = pack_gptq(tmp_path / "m", tiny_model(variant), **settings)
    form = gptq_form(settings.get("bits", 4), settings.get("group_size", 32), settings.get("sym", False),
                     settings.get("desc_act", False))
    held, predicted = held_and_predicted(model.packed, dtype, form, form, "tied" not in variant)
    assert held == predicted


@pytest.mark.parametrize("kind", sorted(GGUF_FORMS))
@pytest.mark.parametrize("variant", ["qwen3", "llama_tied"])
def test_files_weigh_what_is_predicted(tiny_model: TinyModels, tmp_path: Path, variant: str, kind: str,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of its own is packed in the file as well, and looked up in that."""
    use_cache(tmp_path / "cache", monkeypatch)
    model, form = pack_gguf(tmp_path / "m", tiny_model(variant), kind), GGUF_FORMS[kind]
    held, predicted = held_and_predicted(model.packed, "bfloat16", form, form, False)
    spec = load_model(ModelConfig(str(model.packed))).spec
    again = 0 if spec.tie_word_embeddings else form.nbytes(spec.vocab_size, spec.hidden_size,
                                                           library().quantized_panel())
    assert held == predicted + again


def test_bytes_by_hand() -> None:
    """64 outputs, 128 inputs, groups of 32: 4 KiB of codes, two bytes a scale, one a zero point."""
    panel = library().quantized_panel()
    assert 64 % panel == 0
    assert gptq_form(4, 32).nbytes(64, 128, panel) == 64 * 128 // 2 + 64 * 4 * 2 + 64 * 4
    assert gptq_form(4, 32, sym=True).nbytes(64, 128, panel) == 64 * 128 // 2 + 64 * 4 * 2
    assert gptq_form(8, 32, desc_act=True).nbytes(64, 128, panel) == 64 * 128 + 64 * 4 * 3 + 128 * 4
    assert GGUF_FORMS["Q4_1"].nbytes(64, 128, panel) == 64 * 128 * 5 // 8


def test_shared_memory_counts_once() -> None:
    codes, scales = torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2)
    matrix = QuantizedMatrix(codes, scales, 4, zeros=torch.zeros(8, 2, dtype=torch.uint8))
    one, other = (QuantizedLinear(matrix, bias, torch.float32) for bias in (None, torch.nn.Parameter(torch.zeros(8))))
    assert held_bytes(torch.nn.ModuleList([one, other])) == 8 * 64 + 8 * 2 * 4 + 8 * 2 + 8 * 4


@pytest.mark.real_model
def test_the_default_model_weighs_what_is_predicted() -> None:
    """4-bit layers, an 8-bit output matrix that is the embedding too: less than half of what bfloat16 takes."""
    held, predicted = held_and_predicted(Path("smollm2-135m-instruct"), "bfloat16", GGUF_FORMS["Q4_1"],
                                         GGUF_FORMS["Q8_0"], False)
    assert held == predicted < 130e6
    assert held < 2 * 134_515_008 / 2
