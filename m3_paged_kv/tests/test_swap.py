"""F3.6: what a GPU does in batches and on a stream of its own equals the copies made one by one."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from m0_basics.model_spec import ModelSpec
from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.kv_cache_manager import SlotCopy
from m2_continuous_batching.plugins.kv_compression import KVCompressionPlugin
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv import LLM
from m3_paged_kv.swap import HostCache, PinnedHostCache, consecutive, independent

SPEC = ModelSpec("LlamaForCausalLM", 8, 8, 8, 3, 2, 2, 4, 64, rms_norm_eps=1e-5, rope_theta=1e4,
                 tie_word_embeddings=False)
SIZE, NUM_BLOCKS, NUM_HOST = 4, 6, 5


def make_cache(num_blocks: int = NUM_BLOCKS, plugins: tuple[KVCompressionPlugin, ...] = ()) -> SlotCache:
    cache = SlotCache(SPEC, num_blocks * SIZE, torch.float32, torch.device("cpu"), plugins, SIZE)
    for i, pool in enumerate((cache.kv_cache.k, cache.kv_cache.v)):
        pool.copy_((torch.arange(pool.numel()) + i * 10_000).view(pool.shape))
    return cache


@st.composite
def copies(draw: st.DrawFn) -> SlotCopy:
    """Part of a block within the device, as copy-on-write makes them, or a whole one out or in."""
    device, other = (draw(st.integers(0, NUM_BLOCKS - 1)) * SIZE for _ in range(2))
    host = (NUM_BLOCKS + draw(st.integers(0, NUM_HOST - 1))) * SIZE
    source, target = draw(st.sampled_from([(device, host), (host, device), (device, other)]))
    return SlotCopy(source, target, SIZE if host in (source, target) else draw(st.integers(1, SIZE)))


@settings(max_examples=200, deadline=None)
@given(work=st.lists(copies(), max_size=24), most=st.integers(1, 8))
def test_batches_equal_one_by_one(work: list[SlotCopy], most: int) -> None:
    """F3.6: whatever depends on what: a block freed and filled again, read twice, sent out and brought back."""
    one_by_one, batched = HostCache(make_cache(), NUM_HOST * SIZE), PinnedHostCache(make_cache(), SIZE, NUM_HOST)
    batched.most = most
    for pool in (one_by_one.k, one_by_one.v, batched.blocks):
        pool.fill_(-1)
    one_by_one.copy_slots(work)
    batched.copy_slots(work)
    ours, theirs = batched.device_cache.kv_cache, one_by_one.device_cache.kv_cache
    assert torch.equal(ours.k, theirs.k)
    assert torch.equal(ours.v, theirs.v)
    for i, pool in enumerate((one_by_one.k, one_by_one.v)):
        blocks = pool.view(pool.shape[0], NUM_HOST, -1).transpose(0, 1)
        assert torch.equal(batched.blocks[:, i], blocks)


@pytest.mark.parametrize("make", [lambda: HostCache(make_cache(), NUM_HOST * SIZE),
                                  lambda: PinnedHostCache(make_cache(), SIZE, NUM_HOST)], ids=["CPU", "pinned"])
def test_blocks_that_others_bring(make: Callable[[], HostCache | PinnedHostCache]) -> None:
    """Copies of the device's blocks, filled into the host's and swapped in elsewhere: the same numbers."""
    cache = make()
    pools = cache.device_cache.kv_cache.k, cache.device_cache.kv_cache.v
    data, is_there = cache.device_blocks([4, 1], SIZE)
    is_there()
    for pool, halves in zip(pools, data.transpose(0, 1), strict=True):
        assert torch.equal(halves[0], pool[:, 4 * SIZE:5 * SIZE].flatten(1))
        assert torch.equal(halves[1], pool[:, SIZE:2 * SIZE].flatten(1))
    before = [pool.clone() for pool in pools]
    cache.fill_host_block(2, SIZE, data[0])
    cache.fill_host_block(0, SIZE, data[1])
    cache.copy_slots([SlotCopy((NUM_BLOCKS + 2) * SIZE, 0, SIZE), SlotCopy(NUM_BLOCKS * SIZE, 5 * SIZE, SIZE)])
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool[:, :SIZE], old[:, 4 * SIZE:5 * SIZE])
        assert torch.equal(pool[:, 5 * SIZE:], old[:, SIZE:2 * SIZE])
        assert torch.equal(pool[:, SIZE:5 * SIZE], old[:, SIZE:5 * SIZE])


def test_batches_by_hand() -> None:
    """Blocks of 4, six on the device. The fourth goes another way, the fifth too, the sixth reads what that wrote."""
    ends = [(0, 6), (1, 7), (2, 9), (7, 3), (3, 4), (4, 5), (0, 1), (0, 2)]
    work = [SlotCopy(a * SIZE, b * SIZE, SIZE) for a, b in ends]

    def lengths(most: int) -> list[int]:
        return [len(batch) for batch in independent(work, SIZE, NUM_BLOCKS, most)]

    assert lengths(8) == [3, 1, 1, 3]
    assert lengths(2) == [2, 1, 1, 1, 2, 1]
    assert [c for batch in independent(work, SIZE, NUM_BLOCKS, 2) for c in batch] == work
    assert list(independent([], SIZE, NUM_BLOCKS, 2)) == []


def test_runs_by_hand() -> None:
    assert consecutive([3, 4, 5, 9]) == [(3, 3), (9, 1)]
    assert consecutive([7]) == [(7, 1)]


class Operations(TorchDispatchMode):
    """Counts what is launched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func not in (torch.ops.aten.view.default, torch.ops.aten.slice.Tensor)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["out", "in", "within"])
def test_many_blocks_cost_as_many_operations_as_one(way: str) -> None:
    """F3.6: hundreds of small copies are not hundreds of launches."""
    host = PinnedHostCache(make_cache(num_blocks=400), SIZE, 200)

    def operations(n: int) -> int:
        ends = {"out": lambda i: (2 * i, 400 + i), "in": lambda i: (400 + i, 2 * i), "within": lambda i: (i, 399 - i)}
        work = [SlotCopy(a * SIZE, b * SIZE, SIZE) for a, b in map(ends[way], range(n))]
        with Operations() as mode:
            host.copy_slots(work)
        return mode.count

    assert operations(200) == operations(1) < 20


def test_staging_is_bounded() -> None:
    """A batch stays below 64 MiB, so that a long sequence does not need its own length of spare memory."""
    cache = make_cache()
    host = PinnedHostCache(cache, SIZE, NUM_HOST)
    block_bytes = cache.nbytes // NUM_BLOCKS
    assert host.most * block_bytes <= 64 * 2**20 < (host.most + 1) * block_bytes


def test_plugins_hear_of_copies() -> None:
    """What a plugin keeps beside the slots is copied as well."""
    plugin = KVCompressionPlugin()
    cache = SlotCache(SPEC, NUM_BLOCKS * SIZE, torch.float32, torch.device("cpu"), [plugin], SIZE)
    vectors = torch.randn(SIZE, 2, 4)
    cache.store(0, vectors, vectors, torch.arange(SIZE))
    PinnedHostCache(cache, SIZE, 0).copy_slots([SlotCopy(0, 2 * SIZE, SIZE)])
    assert torch.equal(cache.read(0, slice(2 * SIZE, 3 * SIZE), torch.float32)[0],
                       cache.read(0, slice(0, SIZE), torch.float32)[0])


class FakeStream:
    """Writes down who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} has gathered")
        return "gathered"


def test_who_waits_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    """F3.6: out: after the last write, and no overwriting before the gather. In: no reading before it is there."""
    log: list[str] = []
    host = PinnedHostCache(make_cache(), SIZE, NUM_HOST)
    monkeypatch.setattr(host, "stream", FakeStream("side", log))
    monkeypatch.setattr(host, "_compute_stream", lambda: FakeStream("compute", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    host.copy_slots([SlotCopy(0, NUM_BLOCKS * SIZE, SIZE)])
    assert log == ["side waits for compute", "side has gathered", "compute waits for gathered"]
    log.clear()
    host.copy_slots([SlotCopy(NUM_BLOCKS * SIZE, 0, SIZE)])
    assert log == ["side waits for compute", "compute waits for side"]


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_an_engine_with_batched_copies(tiny_model: TinyModels, async_scheduling: bool) -> None:
    """F3.6: swapped in batches, no token changes."""
    options = {"dtype": "float32", "max_model_len": 64, "block_size": 4, "skip_tokenizer_init": True}
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 17, 9, 23, 12, 3)]
    folder, params = str(tiny_model("qwen3")), greedy(24, n=1)
    roomy = LLM(folder, num_blocks=256, **options)
    tight = LLM(folder, num_blocks=16, async_scheduling=async_scheduling, **options)
    host = PinnedHostCache(tight.cache, 4, tight.manager.swapped.host_pool.num_blocks)
    made: list[SlotCopy] = []

    def copy_slots(copies: list[SlotCopy]) -> None:
        made.extend(copies)
        host.copy_slots(copies)

    tight.engine.copy_slots = copy_slots
    assert ids_of(tight.generate(prompts, params, use_tqdm=False)) == (
        ids_of(roomy.generate(prompts, params, use_tqdm=False)))
    assert sum(c.source >= 16 * 4 for c in made) > 10, "blocks came back from host memory"
    assert (tight.manager.usage, tight.manager.swapped.host_pool.num_used) == (0.0, 0)
