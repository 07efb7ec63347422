"""A row's result is the same bits whatever runs beside it: any batch, any chunks, any number of threads."""
from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from m0_basics.attention import ScheduledSequence
from m0_basics.request import Sequence
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import schedule
from m4_flash_attn import LLM
from m4_flash_attn.kernels.cpu.bindings import CpuOps, PagedKernels, make_step
from m4_flash_attn.kernels.cpu.linear import PackedGatedLinear, PackedLinear
from m4_flash_attn.reference import PagedBatch, random_paged_batch

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 7, 8, 12, 13, 16, 64, 300]
THREADS = [1, 2, 3]


pytestmark = pytest.mark.usefixtures("own_products")        # a library's promise nothing of the kind


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "depth"), [(70, 401), (33, 7)])
def test_linear(variant: str, dtype: torch.dtype, columns: int, depth: int) -> None:
    """Tiles of other heights and widths, blocks of rows, odd depths: one order of sums."""
    x, weight = draw(300, depth, dtype=dtype), draw(2 * columns, depth, dtype=dtype, seed=1)
    bias = draw(2 * columns, dtype=dtype, seed=2)
    layers = [PackedLinear(weight, kind="native"), PackedLinear(weight, bias, torch.float32, kind="native"),
              PackedGatedLinear(weight)]
    torch.set_num_threads(1)
    alone = [torch.cat([layer(row) for row in x.split(1)]) for layer in layers]
    for threads in THREADS:
        torch.set_num_threads(threads)
        for rows in ROWS:
            start = (300 - rows) // 2
            for layer, expected in zip(layers, alone, strict=True):
                assert torch.equal(layer(x[start:start + rows]), expected[start:start + rows]), (rows, threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(variant: str, dtype: torch.dtype) -> None:
    ops, x, weight = CpuOps(dtype), draw(300, 1000, dtype=dtype), draw(1000, dtype=dtype, seed=1)
    alone = [torch.cat([run(row) for row in x.split(1)]) for run in (lambda r: ops.add_rms_norm(r, None, weight, 1e-5),
                                                                     ops.silu_mul)]
    for threads in THREADS:
        torch.set_num_threads(threads)
        for rows in ROWS:
            assert torch.equal(ops.add_rms_norm(x[:rows], None, weight, 1e-5), alone[0][:rows])
            assert torch.equal(ops.silu_mul(x[:rows]), alone[1][:rows])


def attend(batch: PagedBatch, spans: list[tuple[int, int, int]], window: int | None) -> list[Tensor]:
    """The rows of some sequences' tokens: (sequence, first, end), each with the keys up to its last token."""
    starts = [0]
    for _, first, end in spans:
        starts.append(starts[-1] + end - first)
    begins = batch.query_start_loc.tolist()
    rows = [slice(begins[i] + first, begins[i] + end) for i, first, end in spans]
    num_heads, head_dim = batch.q.shape[1:]
    kernels = PagedKernels(num_heads, batch.k.shape[1], head_dim, batch.block_size, batch.q.dtype, batch.scale, window,
                           3 if window else 0)
    step = make_step(torch.tensor(starts, dtype=torch.int32),
                     torch.tensor([end for _, _, end in spans], dtype=torch.int32),
                     batch.block_table[[i for i, _, _ in spans]].contiguous(),
                     torch.cat([batch.slot_mapping[r] for r in rows]).contiguous())
    out = kernels.attend(step, torch.cat([batch.q[r] for r in rows]), batch.k_cache, batch.v_cache)
    return list(out.split([end - first for _, first, end in spans]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_attention(variant: str, dtype: torch.dtype, window: int | None) -> None:
    """Prompts, chunks and decodes, alone and side by side: the keys of a row are cut at the same places."""
    lengths = [1, 64, 255, 256, 257, 300, 700]
    batch = random_paged_batch([(0, n) for n in lengths], num_heads=6, num_kv_heads=2, head_dim=32, dtype=dtype)
    torch.set_num_threads(1)
    expected = attend(batch, [(i, 0, n) for i, n in enumerate(lengths)], window)
    rng = random.Random(0)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for chunk in ((1, 7, 100) if threads == 1 else (64,)):
            for i, n in enumerate(lengths):
                cuts = [*range(0, n, chunk), n] if n < 300 or chunk > 1 else [0, n - 5, *range(n - 4, n + 1)]
                pieces = [piece for first, end in pairwise(cuts) for piece in attend(batch, [(i, first, end)], window)]
                assert torch.equal(torch.cat(pieces), expected[i]), (n, chunk, threads)
        for _ in range(20):             # any sequences, each with its last tokens, some of them with one
            spans = []
            for i in rng.sample(range(len(lengths)), rng.randint(1, len(lengths))):
                end = rng.randint(1, lengths[i])
                spans.append((i, rng.choice([end - 1, rng.randint(0, end - 1)]), end))
            for (i, first, end), out in zip(spans, attend(batch, spans, window), strict=True):
                assert torch.equal(out, expected[i][first:end]), (spans, threads)


def make(tiny_model: TinyModels, name: str, dtype: str) -> LLM:
    return LLM(str(tiny_model(name)), dtype=dtype, max_model_len=512, num_blocks=600, block_size=8,
               skip_tokenizer_init=True)


@torch.inference_mode()
def logits_of(llm: LLM, prompts: list[list[int]], chunk: int) -> list[Tensor]:
    """Logits [tokens, vocab] of each prompt, `chunk` tokens at a time, side by side."""
    runner = llm.engine.runner
    sequences: list[Sequence] = [s.sequence for s in schedule(prompts)]
    rows: list[list[Tensor]] = [[] for _ in prompts]
    while running := [s for s in sequences if s.num_computed_tokens < s.num_tokens]:
        step = [ScheduledSequence(s, s.num_computed_tokens, min(chunk, s.num_tokens - s.num_computed_tokens))
                for s in running]
        assert all(llm.manager.allocate_slots(*s[:3]) for s in step)
        inputs = runner.prepare_inputs(step)
        hidden = runner.model(inputs.input_ids, inputs.positions, runner.backend, inputs.metadata)
        for s, part in zip(step, hidden.split([s.num_tokens for s in step]), strict=True):
            rows[sequences.index(s.sequence)].append(runner.model.compute_logits(part))
            s.sequence.num_computed_tokens = s.end
    for sequence in sequences:
        llm.manager.free(sequence)
    return [torch.cat(parts) for parts in rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_logits_of_a_model(tiny_model: TinyModels, name: str, dtype: str) -> None:
    """Every row, in any chunks, beside any neighbours, on any number of threads."""
    llm, rng = make(tiny_model, name, dtype), random.Random(0)
    prompts = [[rng.randrange(5, 200) for _ in range(n)] for n in (270, 1, 13, 64)]
    torch.set_num_threads(1)
    alone = [logits_of(llm, [prompt], 1000)[0] for prompt in prompts]
    for threads in THREADS:
        torch.set_num_threads(threads)
        for chunk in ((1, 7, 100, 1000) if threads == 1 else (3, 64)):
            for ours, expected in zip(logits_of(llm, prompts, chunk), alone, strict=True):
                assert torch.equal(ours, expected), (chunk, threads)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_tokens_of_64_requests_are_those_of_each_alone(tiny_model: TinyModels, name: str) -> None:
    """In bfloat16, where two candidates are often equal but for the last bit."""
    llm, rng = make(tiny_model, name, "bfloat16"), random.Random(1)
    prompts = [{"prompt_token_ids": [rng.randrange(5, 200) for _ in range(rng.randint(1, 90))]} for _ in range(64)]
    params = [SamplingParams(temperature=0, max_tokens=rng.randint(4, 24), ignore_eos=True) for _ in prompts]
    torch.set_num_threads(2)
    together = [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]
    alone = [llm.generate(prompt, each, use_tqdm=False)[0].outputs[0].token_ids
             for prompt, each in zip(prompts, params, strict=True)]
    assert together == alone
