"""F0.9: tokens, texts and chats equal transformers'; tokenizers rebuilt from GGUF headers are the right ones."""
from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m0_basics.config import DEFAULT_MODEL, ConfigError
from m0_basics.loading.gguf_tokenizer import build_tokenizer
from m0_basics.loading.loader import resolve_model
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.tools.testing.tiny_models import BOS, EOS, byte_level_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.", "Hello,  world!\n\n  Two  spaces\tand a tab ",
    "don't we'll I'M you've",
    "人工智能的未来是光明的。你好，世界！", "日本語 and 한국어 mixed",
    "😀👩‍👩‍👧‍👦🇨🇳 emoji", "1234567890 3.14159 2024-01-02",
    "def f(x):\n    return x ** 2  # comment\r\n", "café naïve e\u0301", "\x00\x7f\ufffd", "", " ", "\n", "ÿþ¡",
    f"{BOS}user\nhi{EOS}\n{BOS}assistant\n", f"no{EOS}space", "ٱلْعَرَبِيَّة हिन्दी", "a" * 300, "     indented", "x\n\n\n\ny",
]
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "为什么天是蓝的？"},
     {"role": "assistant", "content": "Rayleigh 😀"}, {"role": "user", "content": " {{ 1 }} <b>&amp;</b>"}],
]


@pytest.fixture(scope="module")
def folders(tiny_model) -> dict[str, Path]:
    return {"tiny": tiny_model("qwen3"), "default": resolve_model(DEFAULT_MODEL, torch.bfloat16)}


def transformers_tokenizer(folder: Path):
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["tiny", "default"])
class TestAgainstTransformers:
    def test_encode_and_decode(self, name, folders):
        ours, theirs = Tokenizer.from_folder(folders[name]), transformers_tokenizer(folders[name])
        assert len(ours) == len(theirs)
        for text in TEXTS:
            for special in (True, False):
                ids = ours.encode(text, add_special_tokens=special)
                assert ids == theirs(text, add_special_tokens=special).input_ids
            for skip in (True, False):
                decoded = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip_special_tokens=skip) == decoded
            if "\u0301" not in text:
                assert ours.decode(ids, skip_special_tokens=False) == text
            for stop in range(len(ids)):            # cut anywhere, also inside a character
                assert ours.decode(ids[:stop]) == theirs.decode(ids[:stop], skip_special_tokens=True,
                                                                clean_up_tokenization_spaces=False)

    def test_special_tokens(self, name, folders):
        ours, theirs = Tokenizer.from_folder(folders[name]), transformers_tokenizer(folders[name])
        assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)
        assert ours.eos_token_id is not None
        assert ours.encode(BOS) == [theirs.convert_tokens_to_ids(BOS)]

    @pytest.mark.parametrize("prompt", [True, False])
    def test_chat_template(self, name, prompt, folders):
        ours, theirs = Tokenizer.from_folder(folders[name]), transformers_tokenizer(folders[name])
        for chat in CHATS:
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat_template(chat, prompt) == expected
            assert chat[-1]["content"] in expected


@pytest.mark.real_model
def test_the_default_model_splits_numbers_into_digits(folders):
    tokenizer = Tokenizer.from_folder(folders["default"])
    assert [tokenizer.decode([i]) for i in tokenizer.encode("In 20245")] == ["In", " ", "2", "0", "2", "4", "5"]


@given(st.text(max_size=60))
def test_any_text_survives(text):
    tokenizer = Tokenizer(byte_level_tokenizer(), {})
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(st.binary(max_size=40))
def test_any_bytes_decode_as_python_decodes_them(data):
    """Bytes that form no character become U+FFFD, one for each broken piece, as in Unicode's recommendation."""
    backend = byte_level_tokenizer()
    byte_of = {c: b for b, c in zip(range(256), _byte_alphabet(), strict=True)}
    ids = [backend.token_to_id(c) for b in data for c in byte_of if byte_of[c] == b]
    assert Tokenizer(backend, {}).decode(ids) == data.decode("utf-8", errors="replace")


def _byte_alphabet() -> list[str]:
    """GPT-2's characters for the bytes 0 to 255: itself where it is printable, else the next one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


# ---------------------------------------------------------------- chat templates

def with_template(folder: Path, tmp_path: Path, template, **names) -> Tokenizer:
    target = shutil.copytree(folder, tmp_path / "model", dirs_exist_ok=True)
    data = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**data, "chat_template": template, **names}))
    return Tokenizer.from_folder(target)


@pytest.mark.parametrize("template", [
    "{{ messages | tojson }}", "{{ messages | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}",
    "{% for m in messages %}\n    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
    "    {{- m.content }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ strftime_now('%Y') }}{% if add_generation_prompt %}go{% endif %}", "{{ messages[-1]['content'] }}\n",
])
def test_the_dialect_of_templates(template, tiny_model, tmp_path):
    ours = with_template(tiny_model("qwen3"), tmp_path, template, bos_token=BOS)
    theirs = transformers_tokenizer(tmp_path / "model")
    for chat in CHATS:
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(chat) == expected


def test_a_template_in_a_file_of_its_own_comes_first(tiny_model, tmp_path):
    with_template(tiny_model("qwen3"), tmp_path, "from the settings")
    (tmp_path / "model" / "chat_template.jinja").write_text("from the file: {{ messages[0].content }} 中")
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    assert tokenizer.apply_chat_template(CHATS[0]) == "from the file: Hello 中"


def test_of_several_templates_the_default_one_is_used(tiny_model, tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert with_template(tiny_model("qwen3"), tmp_path, named).apply_chat_template(CHATS[0]) == "plain"


@pytest.mark.parametrize(("template", "message"), [
    (None, "this model has no chat template; use generate instead of chat"),
    ("{{ raise_exception('roles must alternate') }}", "the chat template refuses these messages: roles must alternate"),
    ("{% for %}", "the chat template refuses these messages"),
    ("{{ ''.__class__.__mro__ }}", "the chat template refuses these messages: .*unsafe"),
])
def test_a_template_that_does_not_render(template, message, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=message):
        with_template(tiny_model("qwen3"), tmp_path, template).apply_chat_template(CHATS[0])


@pytest.mark.parametrize("bad", [{"content": "x"}, {}, "text", None])
def test_messages_that_are_none(bad, tiny_model):
    tokenizer = Tokenizer.from_folder(tiny_model("qwen3"))
    with pytest.raises(ConfigError, match=r"messages\[1\]=.* is not valid; allowed: a dict with role and content"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}, bad])


# ---------------------------------------------------------------- tokenizers in GGUF headers

def byte_level_header(pre: str | None, **more) -> dict:
    data = json.loads(byte_level_tokenizer().to_str())
    tokens = [*data["model"]["vocab"], BOS, EOS]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
            "tokenizer.ggml.merges": [" ".join(m) for m in data["model"]["merges"]],
            **({"tokenizer.ggml.pre": pre} if pre else {}), **more}


def pieces(tokenizer, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def qwen2_reference():
    from transformers import Qwen2Tokenizer
    return Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer


def llama3_reference():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(TikTokenConverter().pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


@pytest.mark.parametrize(("pre", "reference"), [
    ("qwen2", qwen2_reference), ("llama-bpe", llama3_reference), ("gpt-2", byte_level_tokenizer),
    ("default", byte_level_tokenizer), (None, byte_level_tokenizer)])
def test_texts_are_split_as_transformers_splits_them(pre, reference):
    ours, theirs = build_tokenizer(byte_level_header(pre), Path("x.gguf")), reference()
    for text in TEXTS:
        assert pieces(ours, text) == pieces(theirs, text)


@pytest.mark.parametrize(("pre", "split"), [
    ("gpt-2", ["ab", "Ġ12345", "c"]), ("qwen2", ["ab", "Ġ", "1", "2", "3", "4", "5", "c"]),
    ("llama-bpe", ["ab", "Ġ", "123", "45", "c"]), ("smollm", ["ab", "Ġ", "1", "2", "3", "4", "5", "c"])])
def test_how_numbers_are_split(pre, split):
    assert pieces(build_tokenizer(byte_level_header(pre), Path("x.gguf")), "ab 12345c") == split


def test_special_and_added_tokens_of_a_header():
    header = byte_level_header("gpt-2")
    header["tokenizer.ggml.tokens"] += ["<tool>", "[PAD269]"]
    header["tokenizer.ggml.token_type"] += [4, 5]                        # user-defined, unused
    tokenizer = Tokenizer(build_tokenizer(header, Path("x.gguf")), {})
    ids = tokenizer.encode(f"a<tool>{EOS}[PAD269]")
    assert ids[:3] == [*tokenizer.encode("a"), 268, 267]
    assert 269 not in ids, "an unused token is plain text"
    assert tokenizer.decode(ids) == "a<tool>[PAD269]", "control tokens are left out, user-defined ones are not"


@pytest.mark.parametrize(("more", "begins"), [({}, False), ({"tokenizer.ggml.add_bos_token": True}, True),
                                              ({"tokenizer.ggml.add_bos_token": False}, False)])
def test_beginning_of_sequence(more, begins):
    header = byte_level_header("gpt-2", **more) | {"tokenizer.ggml.bos_token_id": 266}
    tokenizer = Tokenizer(build_tokenizer(header, Path("x.gguf")), {})
    plain = tokenizer.encode("abc", add_special_tokens=False)
    assert 266 not in plain
    assert tokenizer.encode("abc") == ([266, *plain] if begins else plain)


# A SentencePiece vocabulary: unknown, <s>, </s>, 256 bytes, single characters, and merged pieces with their scores.
PIECES = ["▁", *"abcdeh中", "▁a", "ab", "bc", "▁ab", "abc", "▁abc", "de", "cde", "▁▁", "he", "▁he", "中a"]


def sentencepiece_header(**more) -> dict:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
    scores = [0.0] * 259 + [-float(i) for i in (*[100] * 8, 7, 3, 1, 9, 4, 12, 2, 5, 11, 6, 8, 10)]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.unknown_token_id": 0, **more}


def sentencepiece_reference(text: str) -> list[int]:
    """The algorithm as it is described: join the neighbours whose piece scores highest, the leftmost first."""
    header = sentencepiece_header()
    ids = {token: i for i, token in enumerate(header["tokenizer.ggml.tokens"])}
    scores = header["tokenizer.ggml.scores"]
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        joined = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols))
                  if a + b in ids]
        if not joined:
            break
        _, i = min(joined)
        symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
    return [i for s in symbols
            for i in ([ids[s]] if s in ids else [ids[f"<0x{b:02X}>"] for b in s.encode()])]


@settings(max_examples=300)
@given(st.text(alphabet="abcdeh中 é😀z", max_size=20))
def test_sentencepiece(text):
    tokenizer = Tokenizer(build_tokenizer(sentencepiece_header(), Path("x.gguf")), {})
    expected = sentencepiece_reference(text)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(text) == [1, *expected]
    assert tokenizer.decode(expected) == text


def test_sentencepiece_without_its_leading_space():
    header = sentencepiece_header(**{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    tokenizer = Tokenizer(build_tokenizer(header, Path("x.gguf")), {})
    ids = {token: i for i, token in enumerate(header["tokenizer.ggml.tokens"])}
    assert tokenizer.encode("abc de") == [ids["abc"], ids["▁"], ids["de"]]
    assert tokenizer.decode(tokenizer.encode(" abc")) == " abc"


THINKING = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
            "{% endif %}")


def test_variables_of_a_template(tiny_model, tmp_path):
    """Qwen3's switch is one; names that are arguments of their own are none."""
    ours = with_template(tiny_model("qwen3"), tmp_path, THINKING)
    theirs = transformers_tokenizer(tmp_path / "model")
    for chat in CHATS:
        for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}, {"unknown": [1]}):
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **variables)
            assert ours.apply_chat_template(chat, chat_template_kwargs=variables) == expected
    for bad, part in (({"messages": []}, "messages"), ({"add_generation_prompt": 1}, "add_generation_prompt"),
                      (5, "a dict")):
        with pytest.raises(ConfigError, match="chat_template_kwargs") as error:
            ours.apply_chat_template(CHATS[0], chat_template_kwargs=bad)
        assert part in str(error.value)


@pytest.mark.parametrize("template", [
    THINKING, "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s> {% endfor %}",
    "{% for m in messages %}{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}"])
@pytest.mark.parametrize("content", ["The capital is", "The capital is ", "x", "a [user] <|im_end|>\n"])
def test_the_last_message_goes_on(template, content, tiny_model, tmp_path):
    """The text ends where its content does; a template that trims contents leaves no space at the end."""
    ours = with_template(tiny_model("qwen3"), tmp_path, template)
    theirs = transformers_tokenizer(tmp_path / "model")
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert ours.apply_chat_template(chat, False, continue_final_message=True) == expected
    assert expected.rstrip().endswith(content.strip())


def test_what_cannot_go_on(tiny_model, tmp_path):
    ours = with_template(tiny_model("qwen3"), tmp_path, THINKING)
    with pytest.raises(ConfigError, match="add_generation_prompt=True"):
        ours.apply_chat_template(CHATS[0], True, continue_final_message=True)
    with pytest.raises(ConfigError, match="content is text"):
        ours.apply_chat_template([{"role": "assistant"}], False, continue_final_message=True)
    deaf = with_template(tiny_model("qwen3"), tmp_path, "hello")
    with pytest.raises(ConfigError, match="leaves out the last message"):
        deaf.apply_chat_template([{"role": "assistant", "content": "x"}], False, continue_final_message=True)


def test_a_message_without_content_is_empty(tiny_model, tmp_path):
    """As vLLM reads it: an assistant that only called something has none."""
    ours = with_template(tiny_model("qwen3"), tmp_path, THINKING)
    empty = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]
    for last in ({"role": "assistant"}, {"role": "assistant", "content": None}):
        assert ours.apply_chat_template([empty[0], last]) == ours.apply_chat_template(empty)


def test_long_texts_as_short_ones():
    """The call that leaves the interpreter to others gives what the plain one gives; no token is longer than said."""
    backend = byte_level_tokenizer()
    tokenizer = Tokenizer(backend, {})
    for text in ("the 中 " * 2000, "", BOS * 3 + "x"):
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, False) == backend.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.encode_batch([text, "a", text], False) == [ids, tokenizer.encode("a"), ids]
        assert len(text) <= len(ids) * tokenizer.max_chars_per_token
    assert tokenizer.max_chars_per_token == len(BOS)
