"""Other programs read this lab's folders: what is stored, how answers are judged, and readers that are not there."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m0_basics.config import ConfigError
from m7_gptq.config import ModelConfig
from m7_gptq.loading.fill import load_model
from m7_gptq.tools import interop_readers as module
from m7_gptq.tools.interop import RESULTS
from m7_gptq.tools.interop_readers import CLAIMED, FORMS, Reading, compare, readers_of, table, verdict, without_places
from m7_gptq.tools.perplexity import plain_logits
from m7_gptq.tools.quality_suite import TINY_MODEL


@pytest.fixture(scope="module")
def ours() -> Any:
    return load_model(ModelConfig(str(TINY_MODEL), dtype="float32"))


def greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(plain_logits(model)(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def test_answers_are_judged_by_our_own_logits(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best tokens have no gap; after another one, what follows is judged in its place."""
    monkeypatch.setattr(module, "_TOKENS", 6)
    prompts = [list(b"the sea "), list(b"a house ")]
    answers = [greedy(ours, prompt, 6) for prompt in prompts]
    assert compare(ours, prompts, answers) == (12, 0.0)
    logits = plain_logits(ours)(torch.tensor([prompts[1] + answers[1][:2]]))[0, -1]
    second = int(logits.topk(2).indices[1])
    changed = [*answers[1][:2], second]
    changed += greedy(ours, prompts[1] + changed, 3)
    equal, gap = compare(ours, prompts, [answers[0], changed])
    assert equal == 6 + 2 and gap == pytest.approx(float(logits.max() - logits[second]), abs=1e-5)
    with pytest.raises(ConfigError, match="an answer has 5 tokens; allowed: 6"):
        compare(ours, prompts, [answers[0], changed[:5]])


def test_what_readers_are_said_to_do() -> None:
    right, wrong = Reading("vllm", "a", "1", 48, 40, 0.1), Reading("vllm", "b", "1", 48, 0, 7.5)
    refused = Reading("other", "a", error="ValueError: no")
    assert right.same and not wrong.same and not refused.same
    assert verdict(right) == "read: 40 of 48 tokens as ours, the largest gap 0.100 nats"
    assert verdict(wrong).startswith("READ WRONGLY: 0 of 48") and verdict(refused) == "not read: ValueError: no"
    shown = table([right, refused, wrong])
    assert [str(column.header) for column in shown.columns] == ["form", "vllm", "other"] and shown.row_count == 2


def test_errors_tell_no_place() -> None:
    assert without_places("\nOSError: '/a/b/d.json' and /x/y/z:\n  a/b is 1/2 [type=x, input={}]\nmore") == (
        "OSError: '<d.json>' and <z>: a/b is 1/2")
    assert len(without_places("long " * 100)) == 200


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
def test_no_interpreter(python: str) -> None:
    with pytest.raises(ConfigError, match=f"peer_python='{python}' does not run as a Python interpreter"):
        readers_of(Path(python))


def test_a_reader_that_is_not_there(ours: Any, tmp_path: Path) -> None:
    """This interpreter has no vLLM: that is said, and counts as not read."""
    found = module.read("vllm", Path(sys.executable), "symmetric", tmp_path, [[1, 2]], ours)
    assert not found.same and found.error == "ModuleNotFoundError: No module named 'vllm'"


def test_what_is_stored() -> None:
    """Every form by every reader; what the documents say that others read was read, and nothing else was."""
    stored = json.loads(RESULTS.read_text())["readers"]
    found = {(one["reader"], one["form"]): Reading(**one) for one in stored["readings"]}
    assert set(found) == {(reader, form) for reader in module.READERS for form in FORMS}
    assert {(reader, form) for reader, forms in CLAIMED.items() for form in forms} == {
        key for key, reading in found.items() if reading.same}
