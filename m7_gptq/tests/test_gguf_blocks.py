"""F7.2: GGUF files of Q4_0, Q4_1 and Q8_0 run as they lie on the disk, with the values of their definition."""
from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.attention import FullAttention
from m0_basics.loading.gguf import GGUFError
from m0_basics.model import CausalLM
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.gguf_blocks import BLOCKS
from m0_basics.tools.testing.gguf_files import decode
from m0_basics.tools.testing.parity import all_logits, mixed_length_prompts, reference_logits
from m0_basics.tools.testing.tiny_models import VOCAB_SIZE
from m7_gptq.config import ModelConfig
from m7_gptq.linear import QuantizedEmbedding, QuantizedLinear
from m7_gptq.loading.fill import load_model
from m7_gptq.loading.fingerprint import matrices_of
from m7_gptq.loading.gguf_blocks import BLOCK_BYTES, unpack_blocks

from .packed_models import pack_gguf, use_cache

PROMPTS = mixed_length_prompts(VOCAB_SIZE, 3, seed=5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    return use_cache(tmp_path / "cache", monkeypatch)


def load(path: Path, **options: str) -> CausalLM:
    return load_model(ModelConfig(str(path), dtype="float32", **options))


@given(kind=st.sampled_from(sorted(BLOCK_BYTES)), data=st.data())
def test_blocks_keep_their_values(kind: str, data: st.DataObject) -> None:
    """Every bit of a block at random, its float16 numbers finite: the values are exactly those of the definition."""
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    halves = st.floats(width=16, allow_nan=False, allow_infinity=False)
    num_halves = 2 if kind == "Q4_1" else 1
    raw = b"".join(
        struct.pack(f"<{num_halves}e", *data.draw(st.tuples(*[halves] * num_halves)))
        + data.draw(st.binary(min_size=size, max_size=size))
        for size in [BLOCK_BYTES[kind] - 2 * num_halves] * (rows * blocks))
    matrix = unpack_blocks(torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(rows, -1), kind)
    assert matrix.bits == (8 if kind == "Q8_0" else 4)
    assert matrix.group_size == BLOCKS[kind][1] == 32
    assert torch.equal(matrix.dequantise(), decode(raw, kind, (rows, 32 * blocks)))


@pytest.mark.parametrize("kind", sorted(BLOCK_BYTES))
@pytest.mark.parametrize("variant", ["qwen3", "qwen2_tied", "llama", "llama_bias"])
def test_a_file_runs_as_it_is(tiny_model: TinyModels, tmp_path: Path, cache: Path, variant: str, kind: str) -> None:
    """transformers' logits of the dequantised weights; llama.cpp's order of rows is undone. No weights are written."""
    model = pack_gguf(tmp_path / "model", tiny_model(variant), kind)
    ours = load(model.packed)
    assert {type(m) for name, m in ours.named_modules() if name.endswith(("_proj", "lm_head"))} == {QuantizedLinear}
    assert isinstance(ours.embed_tokens, QuantizedEmbedding)
    for prompt, logits in zip(PROMPTS, all_logits(ModelRunner(ours, FullAttention()), PROMPTS), strict=True):
        torch.testing.assert_close(logits, reference_logits(model.plain, prompt), rtol=1e-4, atol=1e-4)
    assert not list(cache.rglob("*.safetensors"))


def test_one_matrix_for_input_and_output(tiny_model: TinyModels, tmp_path: Path) -> None:
    ours = load(pack_gguf(tmp_path / "model", tiny_model("llama_tied"), "Q8_0").packed)
    assert isinstance(ours.embed_tokens, QuantizedEmbedding)
    assert isinstance(ours.lm_head, QuantizedLinear)
    assert ours.embed_tokens.matrix is ours.lm_head.matrix
    assert ours.spec.tie_word_embeddings


@pytest.mark.parametrize("kind", ["F16", "Q5_1"])
def test_other_formats_come_dequantised(tiny_model: TinyModels, tmp_path: Path, kind: str) -> None:
    model = pack_gguf(tmp_path / "model", tiny_model("qwen3"), kind)
    ours = load(model.packed)
    assert not list(matrices_of(ours))
    [logits] = all_logits(ModelRunner(ours, FullAttention()), PROMPTS[:1])
    torch.testing.assert_close(logits, reference_logits(model.plain, PROMPTS[0]), rtol=1e-4, atol=1e-4)


def test_a_file_can_be_dequantised(tiny_model: TinyModels, tmp_path: Path) -> None:
    model = pack_gguf(tmp_path / "model", tiny_model("qwen3"), "Q4_1")
    plain = load(model.packed, quantization="none")
    assert not list(matrices_of(plain))
    assert torch.equal(plain.layers[0].mlp.down_proj.weight, load(model.plain).layers[0].mlp.down_proj.weight)


def test_a_file_that_is_cut_short(tiny_model: TinyModels, tmp_path: Path) -> None:
    file = pack_gguf(tmp_path / "model", tiny_model("qwen3"), "Q4_1").packed
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(GGUFError, match="cut short"):
        load(file)
