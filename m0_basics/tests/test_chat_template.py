"""F0.9: chat templates render what transformers renders, and end whatever they are."""
from __future__ import annotations

import json
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest

from m0_basics.config import ConfigError
from m0_basics.loading import chat_template
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.tests.test_tokenizer import CHATS, transformers_tokenizer
from m0_basics.tools.testing.tiny_models import BOS


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
    "{% if tools is not none %}tools{% endif %}{% if documents is none %}no documents{% endif %}",
    "{% if tools %}tools{% else %}{{ tools }}{% endif %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}\n  {%- generation -%}\n {{ m.role }}\n  {%- endgeneration %}\n{% endfor %}",
    "{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}", "{{ messages | tojson(separators=(',', ':')) }}",
    "{{ {'b': 1, 'a': [none, '中']} | tojson(false, 1, (', ', ' = '), true) }}",
    "{{ 'a' ~ 3 ~ none ~ messages | length }}{% for k, v in messages[0].items() %}{{ loop.index ~ k ~ v }}{% endfor %}",
    "{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ loop.previtem.role if loop.previtem }}{% else %}x"
    "{% endfor %}",
    "{% macro show(m) %}{{ m.content + '!' * 3 }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content.split(' ') | join('-') | replace('a', 'b') }}{% endfor %}",
    "{{ messages[::-1] | map(attribute='role') | list }}{{ dict(a=1) }}{{ range(3) | list }}{{ '%s %d' % ('x', 3) }}",
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


HOSTILE = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(60) }}",
    "a loop in itself": "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "long text": "{% for i in range(100000) %}" + "x" * 500 + "{% endfor %}",
    **{f"growing: {step}": "{% set n = namespace(x='a' * 99, i=9) %}{% for i in range(99) %}{% set " + step
       + " %}{% endfor %}"
       for step in ("n.x = n.x ~ n.x", "n.x = n.x + n.x", "n.i = n.i * n.i", "n.x = n.x.replace('a', n.x)",
                    "n.x = n.x | replace('a', n.x)", "n.x = n.x.join(n.x)")},
    **{expression: "{{ " + expression + " }}"
       for expression in ("'x' * 10**9", "10 ** 10 ** 10", "'x'.ljust(10**9)", "'%1000000000d' % 3",
                          "'%*d' % (1000000000, 3)", "'x' | center(1000000000)", "'{:1000000000}'.format(3)",
                          "[0] * 10**9", "1 / 0", "[][5] + 1", "('{0}' * 99999).format('x' * 99999)",
                          "('%(a)s' * 99999) % {'a': 'x' * 99999}", "range(99999) | join('x' * 99999)",
                          "('x' * 99999).join(messages | map(attribute='role') | list * 99999)")},
}
_DOUBLING = "{% set n = namespace(x='a', y='a') %}{% for i in range(26) %}{% set n.x = [n.x, n.x] %}"
HOSTILE |= {f"nested: {name}": template for name, template in {
    "a list": _DOUBLING + "{% endfor %}{{ n.x }}",
    "a tuple": _DOUBLING.replace("[n.x, n.x]", "n.x, n.x") + "{% endfor %}{{ n.x }}",
    "a dict": _DOUBLING.replace("[n.x, n.x]", "{1: n.x, 2: n.x}") + "{% endfor %}{{ n.x | tojson }}",
    "by a call": _DOUBLING.replace("[n.x, n.x]", "dict(a=n.x, b=n.x)") + "{% endfor %}{{ n.x | string }}",
    "by an operator": _DOUBLING.replace("[n.x, n.x]", "[n.x] * 2") + "{% endfor %}{{ n.x ~ 1 }}",
    "by a filter": _DOUBLING.replace("'a'", "['a']").replace("[n.x, n.x]", "n.x | batch(2, n.x) | list")
                   + "{% endfor %}{{ '%s' % n.x }}",
    "by a macro": "{% macro f() %}{% set n.x = varargs %}{% endmacro %}"
                  + _DOUBLING.replace("{% set n.x = [n.x, n.x] %}", "{{ f(n.x, n.x) }}")
                  + "{% endfor %}{{ n.x | length }}",
    "compared": _DOUBLING + "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "namespaces": "{% set n = namespace(x='a') %}{% for i in range(26) %}{% set n.x = namespace(a=n.x, b=n.x) %}"
                  "{% endfor %}{{ '{}'.format(n.x) }}",
    "an error": _DOUBLING + "{% endfor %}{{ raise_exception(n.x) }}",
}.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_would_never_end_or_fill_the_memory(name, tiny_model, tmp_path, monkeypatch):
    """One line, in bounded time and memory."""
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 0.3)
    tokenizer = with_template(tiny_model("qwen3"), tmp_path, HOSTILE[name])
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"the chat template refuses these messages: .+") as caught:
        tokenizer.apply_chat_template(CHATS[1])
    assert time.monotonic() - begin < 60        # stands for: not for ever
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("write", ["{{ X }}", "{{ X | string | length }}", "{{ X | tojson }}", "{{ X ~ '' }}",
                                   "{{ '%s' % [X] }}", "{{ '{}'.format(X) }}", "{{ '%s' | format(X) }}",
                                   "{{ X | upper }}", "{{ [X] | join('x') }}", "{{ raise_exception(X) }}"])
def test_namespaces_that_are_filled_from_the_outside(write, tiny_model, tmp_path):
    """No list is long when it is made: it is when the last name gets its value."""
    names = [f"n{i}" for i in range(25)]
    source = "".join(f"{{% set {name} = namespace() %}}" for name in names)
    source += "".join(f"{{% set {a}.x = [{b}, {b}] %}}" for a, b in pairwise(names))
    tokenizer = with_template(tiny_model("qwen3"), tmp_path, source + write.replace("X", names[0]))
    with pytest.raises(ConfigError, match=r"a list in it, with the lists in that, exceeds"):
        tokenizer.apply_chat_template(CHATS[1])


@pytest.mark.parametrize("template", [
    "{{ M | replace('a', 'b') }}", "{{ M.replace('a', 'b') }}", "{{ M | replace('x', 'b' * 1000) }}",
    "{{ M.replace(M, 'b') }}", "{{ M | replace(M, M) }}", "{{ M.split('c') | join('--') }}", "{{ ''.join(M) }}",
    "{{ 'on %s' % M }}", "{{ 'on {}'.format(M) }}", "{{ messages | tojson }}"])
def test_long_messages(template, tiny_model, tmp_path):
    """As transformers writes them, however long: what counts is how much a template adds."""
    content = "abc " * 100_000
    chat = [{"role": "user", "content": content}]
    ours = with_template(tiny_model("qwen3"), tmp_path, template.replace("M", "messages[0].content"))
    theirs = transformers_tokenizer(tmp_path / "model")
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, tokenize=False)


def test_a_length_in_each_loop(tiny_model, tmp_path, monkeypatch):
    """As Qwen3's template asks for it: it must not look at every message for every message."""
    monkeypatch.setattr(chat_template, "_MAX_ITEMS", 5000)
    template = "{% for m in messages %}{{ messages | length - 1 }}{% endfor %}"
    ours = with_template(tiny_model("qwen3"), tmp_path, template)
    assert ours.apply_chat_template([{"role": "user", "content": "x"}] * 3000) == "2999" * 3000


@pytest.mark.parametrize("template", [5, {"a": 1}, [5], [{"name": "default", "template": 5}]])
def test_a_template_that_is_no_text(template, tiny_model, tmp_path):
    """A list that holds no template is none."""
    if template == [5]:
        assert with_template(tiny_model("qwen3"), tmp_path, template).chat_template is None
        return
    with pytest.raises(ConfigError, match=r"chat_template=.* of the tokenizer's settings is not valid; allowed: text"):
        with_template(tiny_model("qwen3"), tmp_path, template)


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

