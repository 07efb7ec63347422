"""F6.8: an engine that is started again finds what the one before has computed, and no token changes by it."""
from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

import m5_chunked_prefill as m5
from m0_basics import ConfigError, SamplingParams
from m0_basics.request import SequenceStatus
from m0_basics.tools.testing.fixtures import TinyModels
from m3_paged_kv.block_pool import BlockPool
from m6_prefix_cache import LLM
from m6_prefix_cache.block_store import BlockStore
from m6_prefix_cache.disk_tier import DiskTier
from m6_prefix_cache.kv_cache_manager import PrefixKVCacheManager

BASE: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "block_size": 8, "num_blocks": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = list(range(20, 62))


def start(model: str, folder: Path, **options: Any) -> LLM:
    llm = LLM(model, prefix_cache_dir=str(folder), **BASE | options)
    disk_of(llm).seconds_to_read = -1.0                     # a tiny model computes faster than any disk reads
    return llm


def disk_of(llm: LLM) -> DiskTier:
    assert isinstance(llm.manager, PrefixKVCacheManager)
    assert isinstance(llm.manager.below, DiskTier)
    return llm.manager.below


def host_pool_of(llm: LLM) -> BlockPool:
    assert isinstance(llm.manager, PrefixKVCacheManager)
    pool = llm.manager.paged.swapped.host_pool
    assert isinstance(pool, BlockPool)
    return pool


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
    disk_of(first).flush()
    again = start(model, tmp_path, **options)
    assert ask(again) == (expected, 40)
    assert disk_of(again).num_read_blocks == 5
    assert ask(again) == (expected, 40 if "prefix_index" in options else 41), "from the device this time"
    assert disk_of(again).num_read_blocks == 5
    assert again.manager.usage == 0
    assert host_pool_of(again).num_used == 0


def test_it_goes_on_where_the_device_ends(model: str, tmp_path: Path) -> None:
    first = start(model, tmp_path)
    ask(first)
    disk_of(first).flush()
    again = start(model, tmp_path)
    ask(again, PROMPT[:18])                                 # two blocks
    assert ask(again) == (ask(first)[0], 40)
    assert disk_of(again).num_read_blocks == 2 + 3


def test_a_corrupt_file_costs_a_warning(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = start(model, tmp_path)
    expected, _ = ask(first)
    disk_of(first).flush()
    hashes = first.manager.hasher.hashes(first.input_processor.process({"prompt_token_ids": PROMPT}, GREEDY)
                                         .sequences[0], 5)
    path = disk_of(first).store.folder / hashes[2].hex()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = start(model, tmp_path)
    assert ask(again) == (expected, 16)
    assert "is left out and removed" in caplog.text


def test_another_model_or_type_finds_nothing(tiny_model: TinyModels, model: str, tmp_path: Path) -> None:
    first = start(model, tmp_path)
    ask(first)
    disk_of(first).flush()
    other = str(tiny_model("qwen2"))
    for name, options in ((other, {}), (model, {"dtype": "bfloat16"}), (model, {"block_size": 4})):
        assert ask(start(name, tmp_path, **options))[1] == 0


def test_nothing_is_read_where_computing_is_cheaper(model: str, tmp_path: Path) -> None:
    first = start(model, tmp_path)
    ask(first)
    disk_of(first).flush()
    again = start(model, tmp_path)
    disk_of(again).seconds_to_read = 100.0
    ask(again, [7] * 30)                                    # steps ran: it is known what computing takes
    assert ask(again, [7] * 30)[1] == 29
    for _ in range(6):
        ask(again, [8, 9])
    assert ask(again)[1] == 0
    assert disk_of(again).num_read_blocks == 0


def test_salts_are_kept_apart_on_disk(model: str, tmp_path: Path) -> None:
    first = start(model, tmp_path)
    first.generate([{"prompt_token_ids": PROMPT, "cache_salt": "a"}], GREEDY, use_tqdm=False)
    disk_of(first).flush()
    again = start(model, tmp_path)
    assert ask(again)[1] == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_several_at_once(model: str, tmp_path: Path, ahead: bool) -> None:
    """What is read for one must not lie where a copy for another is still to be read."""
    prompts = [[first + i for i in range(42)] for first in (10, 60, 110, 160)]
    plain = m5.LLM(model, **BASE)
    expected = [ask(plain, prompt)[0] for prompt in prompts]
    first = start(model, tmp_path)
    for prompt in prompts:
        ask(first, prompt)
    disk_of(first).flush()
    for _ in range(5):
        again = start(model, tmp_path, async_scheduling=ahead, swap_space=12 * disk_of(first).num_bytes / 2**30)
        outputs = again.generate([{"prompt_token_ids": p} for p in prompts], GREEDY, use_tqdm=False)
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected
        assert disk_of(again).num_read_blocks >= 5
        assert host_pool_of(again).num_used == 0


def test_others_run_while_it_is_read(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who decodes waits for the disk; an abort while it is read gives everything back."""
    first = start(model, tmp_path)
    ask(first)
    disk_of(first).flush()
    again, release = start(model, tmp_path), threading.Event()
    get = BlockStore.get

    def slow(*args: Any) -> bytes | None:
        release.wait(30)
        return get(*args)

    monkeypatch.setattr(BlockStore, "get", slow)
    long = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    requests = [again.input_processor.process({"prompt_token_ids": p}, long) for p in ([5, 6, 7], PROMPT, PROMPT)]
    again.engine.add_request(requests[0])
    again.engine.step()
    for request in requests[1:]:
        again.engine.add_request(request)
    for _ in range(5):
        again.engine.step()
    assert len(requests[0].sequences[0].output_token_ids) == 6
    assert requests[1].sequences[0].num_computed_tokens == 0
    assert host_pool_of(again).num_used == 10
    again.engine.abort_request(requests[1].request_id)
    assert host_pool_of(again).num_used == 10, "the thread may write into them"
    release.set()
    while again.engine.has_unfinished_requests():
        again.engine.step()
    assert requests[2].num_cached_tokens == 40
    again.generate([{"prompt_token_ids": [1]}], GREEDY, use_tqdm=False)
    assert host_pool_of(again).num_used == 0


def test_what_was_handed_over_is_written_before_the_process_ends(model: str, tmp_path: Path) -> None:
    """A script that generates once, and ends."""
    code = (f"from m6_prefix_cache import LLM, SamplingParams\n"
            f"llm = LLM({model!r}, prefix_cache_dir={str(tmp_path)!r}, **{BASE!r})\n"
            f"llm.generate([{{'prompt_token_ids': {PROMPT!r}}}], SamplingParams(max_tokens=1), use_tqdm=False)\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert ask(start(model, tmp_path))[1] == 40


def test_the_engine_is_forgotten_with_its_tier(model: str, tmp_path: Path) -> None:
    llm = start(model, tmp_path)
    ask(llm)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None


def test_roots_outlive_what_stands_on_them(model: str, tmp_path: Path) -> None:
    """vllm-metal#500, on disk: with room for two blocks of five, those that are left are the first two."""
    first = start(model, tmp_path)
    ask(first)
    disk_of(first).flush()
    size = max(path.stat().st_size for path in disk_of(first).store.folder.iterdir())
    again = start(model, tmp_path, prefix_cache_disk=2.5 * size / 2**30)
    disk_of(again).seconds_to_read = 0.0        # on a busy machine it may seem slower than computing
    assert ask(again)[1] == 16


def test_the_pace_of_the_process_before_decides_at_first(model: str, tmp_path: Path) -> None:
    """Nothing ran yet, and reading would take longer than computing took: it is computed."""
    first = start(model, tmp_path)
    for _ in range(3):
        ask(first)
    disk_of(first).flush()
    assert disk_of(first).store.pace is not None
    again = start(model, tmp_path)
    disk_of(again).seconds_to_read = 100.0
    assert ask(again)[1] == 0
    again = start(model, tmp_path)
    (disk_of(again).store.folder / "seconds-per-token").unlink()
    again = start(model, tmp_path)
    disk_of(again).seconds_to_read = 100.0
    assert ask(again)[1] == 40, "nothing is known: it is tried"
    assert 0 < disk_of(again).seconds_to_read < 100 or disk_of(again).num_read_blocks < 8


def test_an_abort_of_a_resumed_sequence_keeps_nothing_that_is_not_there(model: str, tmp_path: Path) -> None:
    """Steps are chosen ahead: what a sequence brings from the host is copied later than it is noted."""
    options = {"async_scheduling": True, "num_blocks": 20, "max_num_seqs": 4}
    first = start(model, tmp_path, **options)
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    requests = [first.input_processor.process({"prompt_token_ids": [i, *PROMPT]}, long) for i in range(4)]
    for request in requests:
        first.engine.add_request(request)
    swapped, num_aborted = set[str](), 0
    while any(not r.is_finished for r in requests):
        first.engine.step()
        for request in requests:
            status = request.sequences[0].status
            if status is SequenceStatus.SWAPPED:
                swapped.add(request.request_id)
            elif request.request_id in swapped and status is SequenceStatus.RUNNING:
                first.engine.abort_request(request.request_id)          # as soon as it is chosen for a step
                num_aborted += 1
    assert num_aborted > 0
    disk_of(first).flush()
    plain = m5.LLM(model, **BASE)
    again = start(model, tmp_path)
    for i in range(4):
        assert ask(again, [i, *PROMPT])[0] == ask(plain, [i, *PROMPT])[0]


@pytest.mark.parametrize("options", [{"swap_space": 0}, {"enable_prefix_caching": False}, {"swap_space": 1e-9}])
def test_what_it_needs(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="prefix_cache_dir"):
        LLM(model, prefix_cache_dir=str(tmp_path), **BASE, **options)
