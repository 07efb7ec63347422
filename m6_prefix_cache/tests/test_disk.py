"""F6.8: an engine that is started again finds what the one before has computed, and no token changes by it."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import m5_chunked_prefill as m5
from m0_basics import ConfigError, SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m6_prefix_cache import LLM

BASE: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "block_size": 8, "num_blocks": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = list(range(20, 62))


def start(model: str, folder: Path, **options: Any) -> LLM:
    llm = LLM(model, prefix_cache_dir=str(folder), **BASE | options)
    llm.manager.disk.seconds_to_read = 0.0                  # a tiny model computes faster than any disk reads
    return llm


def ask(llm: Any, prompt: list[int] = PROMPT) -> tuple[list[int], int]:
    [output] = llm.generate([{"prompt_token_ids": prompt}], GREEDY, use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


@pytest.fixture(scope="module")
def model(tiny_model: TinyModels) -> str:
    return str(tiny_model("qwen3"))


@pytest.mark.parametrize("options", [{}, {"prefix_index": "hash"}, {"async_scheduling": True}, {"dtype": "bfloat16"}],
                         ids=["radix", "hash", "ahead", "bfloat16"])
def test_a_warm_restart(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    expected, _ = ask(m5.LLM(model, **BASE | {k: v for k, v in options.items() if k != "prefix_index"}))
    first = start(model, tmp_path, **options)
    assert ask(first) == (expected, 0)
    first.manager.disk.flush()
    again = start(model, tmp_path, **options)
    assert ask(again) == (expected, 40)
    assert again.manager.disk.num_read_blocks == 5
    assert ask(again) == (expected, 40 if "prefix_index" in options else 41), "from the device this time"
    assert again.manager.disk.num_read_blocks == 5
    assert again.manager.usage == 0
    assert again.manager.paged.swapped.host_pool.num_used == 0


def test_it_goes_on_where_the_device_ends(model: str, tmp_path: Path) -> None:
    first = start(model, tmp_path)
    ask(first)
    first.manager.disk.flush()
    again = start(model, tmp_path)
    ask(again, PROMPT[:18])                                 # two blocks
    assert ask(again) == (ask(first)[0], 40)
    assert again.manager.disk.num_read_blocks == 2 + 3


def test_a_corrupt_file_costs_a_warning(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = start(model, tmp_path)
    expected, _ = ask(first)
    first.manager.disk.flush()
    hashes = first.manager.hasher.hashes(first.input_processor.process({"prompt_token_ids": PROMPT}, GREEDY)
                                         .sequences[0], 5)
    path = first.manager.disk.store.folder / hashes[2].hex()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = start(model, tmp_path)
    assert ask(again) == (expected, 16)
    assert "is left out and removed" in caplog.text


def test_another_model_or_type_finds_nothing(tiny_model: TinyModels, model: str, tmp_path: Path) -> None:
    first = start(model, tmp_path)
    ask(first)
    first.manager.disk.flush()
    other = str(tiny_model("qwen2"))
    for name, options in ((other, {}), (model, {"dtype": "bfloat16"}), (model, {"block_size": 4})):
        assert ask(start(name, tmp_path, **options))[1] == 0


def test_nothing_is_read_where_computing_is_cheaper(model: str, tmp_path: Path) -> None:
    first = start(model, tmp_path)
    ask(first)
    first.manager.disk.flush()
    again = start(model, tmp_path)
    again.manager.disk.seconds_to_read = 100.0
    ask(again, [7] * 30)                                    # steps ran: it is known what computing takes
    assert ask(again, [7] * 30)[1] == 29
    for _ in range(6):
        ask(again, [8, 9])
    assert ask(again)[1] == 0
    assert again.manager.disk.num_read_blocks == 0


def test_salts_are_kept_apart_on_disk(model: str, tmp_path: Path) -> None:
    first = start(model, tmp_path)
    first.generate([{"prompt_token_ids": PROMPT, "cache_salt": "a"}], GREEDY, use_tqdm=False)
    first.manager.disk.flush()
    again = start(model, tmp_path)
    assert ask(again)[1] == 0


def test_an_abort_gives_back_what_was_brought(model: str, tmp_path: Path) -> None:
    first = start(model, tmp_path)
    ask(first)
    first.manager.disk.flush()
    again = start(model, tmp_path, max_num_seqs=1)
    requests = [again.input_processor.process({"prompt_token_ids": p}, GREEDY) for p in ([5, 6, 7], PROMPT)]
    for request in requests:
        again.engine.add_request(request)
    again.engine.step()
    again.manager.get_num_computed_tokens(requests[1].sequences[0])
    assert again.manager.paged.swapped.host_pool.num_used == 5
    again.engine.abort_request(requests[1].request_id)
    assert again.manager.paged.swapped.host_pool.num_used == 0


@pytest.mark.parametrize("options", [{"swap_space": 0}, {"enable_prefix_caching": False}])
def test_what_it_needs(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="prefix_cache_dir"):
        LLM(model, prefix_cache_dir=str(tmp_path), **BASE, **options)
