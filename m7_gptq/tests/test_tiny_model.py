"""The trained tiny model: its trainer learns, and its folder holds what the trainer writes."""
from __future__ import annotations

import json
from pathlib import Path

import torch

from m0_basics.config import ModelConfig
from m0_basics.loading.loader import load_model
from m6_prefix_cache import LLM, SamplingParams
from m7_gptq.tools.perplexity import perplexity, plain_logits, text_windows
from m7_gptq.tools.texts import calibration_text, evaluation_text
from m7_gptq.tools.tiny_model import CONFIG, byte_tokenizer, fresh_model, save, train

TINY = Path(__file__).parent / "tiny_qwen3"


def test_a_few_steps_teach_it_something(tmp_path: Path) -> None:
    ids = torch.tensor(byte_tokenizer().encode(calibration_text()[:20_000]).ids)
    model = fresh_model(seed=1)
    windows = ids[:1024].view(8, 128)
    before = perplexity(plain_logits(model), windows)
    train(model, ids, steps=12)
    after = perplexity(plain_logits(model), windows)
    assert before > 150 and after < 0.3 * before
    save(model.requires_grad_(False), tmp_path)
    loaded = load_model(ModelConfig(model=str(tmp_path), dtype="float32", device="cpu"))
    assert abs(perplexity(plain_logits(loaded), windows) / after - 1) < 0.01        # float16 on the way


def test_the_folder_is_the_trainers() -> None:
    assert json.loads((TINY / "config.json").read_text()) == CONFIG
    assert json.loads((TINY / "tokenizer.json").read_text("utf-8")) == json.loads(byte_tokenizer().to_str())
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 2_000_000


def test_a_byte_is_a_token() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("Aé中\n").ids
    assert len(ids) == len("Aé中\n".encode()) and tokenizer.decode(ids) == "Aé中\n"
    assert tokenizer.get_vocab_size() == 258 <= CONFIG["vocab_size"] == 272


def test_it_has_learnt_english() -> None:
    """Text that it was not trained on: far fewer than 256 choices a byte."""
    model = load_model(ModelConfig(model=str(TINY), dtype="float32", device="cpu"))
    assert perplexity(plain_logits(model), text_windows(str(TINY), evaluation_text("test"), 128, 32)) < 5.5


def test_it_goes_on_with_a_sentence() -> None:
    llm = LLM(model=str(TINY), dtype="float32", device="cpu")
    [output] = llm.generate(["Alice was beginning to"], SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    text = output.outputs[0].text
    assert text.isascii() and " the " in f" {text} "
