"""F0.9: special and added tokens, wherever a folder names them; limits that a trainer saved: as transformers reads."""
from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from m0_basics import LLM
from m0_basics.config import ConfigError
from m0_basics.loading.loader import load_spec
from m0_basics.loading.special_tokens import eos_token_id
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.tiny_models import BOS, EOS, byte_level_tokenizer, sentencepiece_tokenizer

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
TEXTS = [f"a<think>b</think>{BOS}the{EOS} end", "<think> <tool>x", "plain"]


def write(folder: Path, file: str, content: object) -> None:
    (folder / file).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tokenizer without settings: BOS and EOS are ids 266 and 267."""
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return tmp_path


def added(text: str, **flags) -> dict:
    return {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
            "special": False, **flags}


CASES = {
    "special_tokens_map": {"special_tokens_map.json": {"bos_token": BOS, "eos_token": {"content": EOS}}},
    "map over config": {"tokenizer_config.json": {"bos_token": EOS}, "special_tokens_map.json": {"bos_token": BOS}},
    "no map beside a decoder": {"tokenizer_config.json": {"added_tokens_decoder": {"268": added("<think>")}},
                                "special_tokens_map.json": {"bos_token": BOS}},
    "added_tokens.json": {"added_tokens.json": {"<think>": 268, "</think>": 269, "<tool>": 270}},
    "a special one of them": {"added_tokens.json": {"<tool>": 268}, "special_tokens_map.json": {"eos_token": "<tool>"}},
    "added_tokens_decoder": {"tokenizer_config.json": {"eos_token": EOS, "added_tokens_decoder": {
        "268": added("<think>"), "269": added("</think>"), "270": added("<tool>", special=True, rstrip=True),
        "267": added(EOS, special=True)}}},
    "known already": {"added_tokens.json": {EOS: 267}, "special_tokens_map.json": {"eos_token": EOS}},
    "a word of the vocabulary": {"tokenizer_config.json": {"pad_token": "the"}},
    "among others": {"tokenizer_config.json": {"additional_special_tokens": ["the", "in"]}},
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_named_outside_of_tokenizer_json(case, folder):
    from transformers import PreTrainedTokenizerFast
    for file, content in CASES[case].items():
        write(folder, file, {"tokenizer_class": "PreTrainedTokenizerFast"} | content if "config" in file else content)
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    for role in ROLES[:2]:
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_id"), role
    assert len(ours) == len(theirs)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip,
                                                           clean_up_tokenization_spaces=False)
    template = "".join(f"{role}={{{{ {role} }}}}" for role in ROLES)
    ours.chat_template = template
    chat = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, chat_template=template, tokenize=False)
    assert eos_token_id(folder) == ours.eos_token_id


@pytest.mark.parametrize("settings", [
    {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    {"padding": {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "!"}},
    {"padding": {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 16, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "!"}}])
def test_truncation_and_padding_that_a_trainer_saved(settings, folder):
    """A prompt is taken as it is, and in an engine too."""
    expected = Tokenizer.from_folder(folder).encode("the one in the end")
    assert len(expected) > 4
    data = json.loads((folder / "tokenizer.json").read_text())
    write(folder, "tokenizer.json", data | settings)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("the one in the end") == expected
    assert json.loads(tokenizer.to_json())["truncation"] is json.loads(tokenizer.to_json())["padding"] is None


def test_an_output_ends_at_the_tokenizers_end_too(tiny_model, tmp_path):
    """The settings of the model name another token; vLLM stops at both."""
    folder = shutil.copytree(tiny_model("parrot_eos"), tmp_path / "model")
    for file in ("config.json", "generation_config.json"):
        write(folder, file, json.loads((folder / file).read_text()) | {"eos_token_id": 0})
    assert load_spec(folder).eos_token_ids == (0, 267)
    params = greedy(40, ignore_eos=False)
    output = LLM(str(folder), dtype="float32").generate(BOS, params, use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, output.token_ids[-1]) == ("stop", 267)
    assert 1 < len(output.token_ids) < 40


@pytest.mark.parametrize("where", ["decoder", "added_tokens.json", "tokenizer.json", "vocabulary", "Unigram",
                                   "nowhere"])
def test_where_the_id_of_the_end_is_found(where, folder):
    text = {"vocabulary": "the", "Unigram": "▁the", "nowhere": "<none>", "tokenizer.json": EOS}.get(where, "<end>")
    settings = {"eos_token": {"content": text}}
    if where == "Unigram":
        sentencepiece_tokenizer("always").save(str(folder / "tokenizer.json"))
    if where == "decoder":
        settings["added_tokens_decoder"] = {"268": added("<end>", special=True)}
    if where == "added_tokens.json":
        write(folder, where, {"<end>": 268})
    write(folder, "tokenizer_config.json", settings)
    assert eos_token_id(folder) == Tokenizer.from_folder(folder).eos_token_id
    assert (eos_token_id(folder) is None) == (where == "nowhere")


def sentencepiece_model(pieces: list[str]) -> bytes:
    """The file of that library: a field 1 for each piece (text, score, kind), then settings that are of no use here."""
    def message(field: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([field << 3 | 2, len(content)]) + content

    scores = struct.pack("<f", -1.5)
    return b"".join(message(1, message(1, piece.encode()) + b"\x15" + scores + b"\x18\x03") for piece in pieces) + \
        message(2, b"\x08\x80\x81\x02" + message(3, b"</s>") + b"\x11" + bytes(8))


@pytest.mark.parametrize(("eos", "expected"), [("</s>", 2), ("▁the", 3), ({"content": "▁中"}, 4), ("<none>", None),
                                               (None, None)])
def test_the_end_of_a_sentencepiece_model(eos, expected, tmp_path):
    """Without tokenizer.json, and without the library: where the settings name it, the model has its number."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(["<unk>", "<s>", "</s>", "▁the", "▁中"]))
    write(tmp_path, "tokenizer_config.json", {"eos_token": eos})
    assert eos_token_id(tmp_path) == expected


@pytest.mark.parametrize("content", [b"", b"no SentencePiece model", b"\x0a", b"\xff" * 50, b"IQ== 0\nIg== 1\n", None])
def test_the_end_of_a_model_that_is_none(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>"})
    assert eos_token_id(tmp_path) is None


@pytest.mark.parametrize(("settings", "message"), [
    ({"eos_token": 5}, "=5 of the tokenizer's settings is not valid; allowed: text"),
    ({"bos_token": ["<s>"]}, r"=\['<s>'\] of the tokenizer's settings is not valid"),
    ({"added_tokens_decoder": {"x": added("<a>")}}, "added_tokens_decoder of the tokenizer's settings is not valid"),
    ({"added_tokens_decoder": [1]}, "added_tokens_decoder of the tokenizer's settings is not valid"),
    ({"added_tokens_decoder": {"268": {"content": None}}}, "added token .* is not valid; allowed: one with a text"),
    ({"added_tokens_decoder": {"300": added("<a>")}}, "the token '<a>' the id 300, but the next free one .* is 268")])
def test_settings_that_make_no_sense(settings, message, folder):
    write(folder, "tokenizer_config.json", settings)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_folder(folder)
