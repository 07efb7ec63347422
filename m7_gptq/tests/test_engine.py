"""F7.2, F7.3: everything that earlier engines do goes on over packed weights: caches, chunks, drafts, beams, a disk."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import m6_prefix_cache as m6
from m0_basics import ConfigError, SamplingParams
from m0_basics.base_llm import BaseLLM
from m0_basics.sampling_params import BeamSearchParams, StructuredOutputsParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m4_flash_attn.kernels.cpu.decoder import CpuDecoder
from m4_flash_attn.kernels.cpu.runner import DecodeRunner
from m6_prefix_cache.disk_tier import DiskTier
from m7_gptq import LLM
from m7_gptq.rtn import QuantizeOptions, round_to_nearest

from .packed_models import PackedModel, pack_gptq, write_twin

BASE: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "block_size": 8, "num_blocks": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[30 + i, *range(20, 24 + 7 * i)] for i in range(5)]


@pytest.fixture(scope="module")
def model(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack_gptq(tmp_path_factory.mktemp("packed") / "m", tiny_model("qwen3"), desc_act=True)


def ask(llm: BaseLLM, prompts: list[list[int]] = PROMPTS, params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(c.token_ids) for o in outputs for c in o.outputs]


@pytest.fixture(scope="module")
def expected(model: PackedModel) -> Iterator[list[list[int]]]:
    """What m6 makes of the dequantised weights."""
    yield ask(m6.LLM(str(model.plain), **BASE))


@pytest.mark.parametrize("options", [
    {}, {"max_num_batched_tokens": 3}, {"async_scheduling": True}, {"enable_prefix_caching": False},
    {"prefix_index": "hash"}, {"speculative_method": "ngram"}, {"attention_backend": "sdpa"}, {"fused_layers": False},
    {"num_blocks": 20, "swap_space": 0}, {"policy": "round-robin:2"}], ids=str)
def test_tokens_are_those_of_the_values(model: PackedModel, expected: list[list[int]], options: dict[str, Any]) -> None:
    llm = LLM(str(model.packed), **{**BASE, **options})
    for _ in range(2):
        assert ask(llm) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_company_changes_no_bit(model: PackedModel, dtype: str, activations: str) -> None:
    """Log-probabilities alone, in a batch, in chunks, behind a known prefix and after preemption: the same bits."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)

    def run(llm: LLM, prompts: list[list[int]]) -> list[Any]:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]

    options = BASE | {"dtype": dtype, "activations": activations}
    alone = [run(LLM(str(model.packed), **options), [p])[0] for p in PROMPTS]
    for more in ({}, {"max_num_batched_tokens": 5}, {"num_blocks": 20, "swap_space": 0},
                 {"speculative_method": "suffix", "adaptive_drafts": False}):
        llm = LLM(str(model.packed), **options | more)
        for _ in range(2):
            assert run(llm, PROMPTS) == alone, more


def test_all_layers_are_one_call(model: PackedModel) -> None:
    runner = engine_of(LLM(str(model.packed), **BASE)).runner
    assert isinstance(runner, DecodeRunner)
    [decoder] = runner.model.layers
    assert isinstance(decoder, CpuDecoder)
    assert decoder.has_head


def test_several_outputs_beams_and_grammars(model: PackedModel) -> None:
    llm, plain = LLM(str(model.packed), **BASE), m6.LLM(str(model.plain), **BASE)
    for params in (SamplingParams(n=3, temperature=0.9, seed=4, max_tokens=12, ignore_eos=True),
                   SamplingParams(temperature=0, max_tokens=12,
                                  structured_outputs=StructuredOutputsParams(regex="(ab|cd)+"))):
        assert ask(llm, PROMPTS[:2], params) == ask(plain, PROMPTS[:2], params)
    beams, prompt = BeamSearchParams(beam_width=3, max_tokens=6), {"prompt_token_ids": PROMPTS[1]}
    assert ([[b.tokens for b in o.sequences] for o in llm.beam_search([prompt], beams)]
            == [[b.tokens for b in o.sequences] for o in plain.beam_search([prompt], beams)])
    assert llm.manager.usage == 0


def test_a_draft_model_beside_packed_weights(model: PackedModel, expected: list[list[int]]) -> None:
    llm = LLM(str(model.packed), speculative_method="draft_model", speculative_model=str(model.plain),
              adaptive_drafts=False, **BASE)
    assert ask(llm) == expected


def test_blocks_on_the_disk_belong_to_their_weights(model: PackedModel, tiny_model: TinyModels, tmp_path: Path) -> None:
    """vllm#57810: what one model has computed is nothing to another, nor with rounded activations to exact ones."""
    three = pack_gptq(tmp_path / "three", tiny_model("qwen3"), bits=3)
    folder = str(tmp_path / "blocks")
    prompt = list(range(20, 70))

    def cached(path: Path, **options: Any) -> int:
        llm = LLM(str(path), prefix_cache_dir=folder, **{**BASE, **options})
        below = llm.manager.below
        assert isinstance(below, DiskTier)
        below.seconds_to_read = -1.0                    # always quicker than computing
        [output] = llm.generate({"prompt_token_ids": prompt}, GREEDY, use_tqdm=False)
        below.flush()
        return output.num_cached_tokens

    assert cached(model.packed) == 0
    assert cached(model.packed) >= 40
    assert cached(three.packed) == 0
    assert cached(model.packed, activations="int8") == 0
    assert cached(model.packed) >= 40


def test_preempted_sequences_come_back(model: PackedModel, expected: list[list[int]]) -> None:
    collector = MetricsCollector()
    llm = LLM(str(model.packed), plugins=[collector], **BASE | {"num_blocks": 12})
    assert ask(llm) == expected
    assert collector.totals.num_preemptions > 0


def test_rounding_while_loading_runs(tiny_model: TinyModels, tmp_path: Path) -> None:
    """Every matrix to its nearest, and input and output matrix held once."""
    source, options = tiny_model("qwen2_tied"), QuantizeOptions(4, 32, method="rtn")
    tensors = {name: round_to_nearest(t, options).dequantise() if t.dim() == 2 else t
               for name, t in load_file(source / "model.safetensors").items()}
    llm = LLM(str(source), quantization="rtn", quantization_group_size=32, **BASE)
    assert ask(llm) == ask(m6.LLM(str(write_twin(tmp_path / "twin", source, tensors)), **BASE))
    weights = engine_of(llm).runner.model
    assert weights.embed_tokens.packed is weights.lm_head.packed


def test_plain_models_are_m6s(tiny_model: TinyModels) -> None:
    for dtype in ("float32", "bfloat16"):
        options = BASE | {"dtype": dtype}
        path = str(tiny_model("llama"))
        assert ask(LLM(path, **options)) == ask(m6.LLM(path, **options))


def test_nan_in_a_model_stays_visible(model: PackedModel) -> None:
    """A damaged norm makes every logit NaN. Rounded to 8 bits it must not become a plausible number."""
    for activations in ("exact", "int8"):
        llm = LLM(str(model.packed), activations=activations, **BASE)
        runner = engine_of(llm).runner
        runner.model.layers[0].layers[1].input_norm.data[3] = float("nan")
        request = llm.input_processor.process({"prompt_token_ids": PROMPTS[0]}, GREEDY)
        engine_of(llm).add_request(request)
        logits: list[torch.Tensor] = []
        execute = runner.execute

        def remember(inputs: Any, run: Any = execute, kept: list[torch.Tensor] = logits) -> torch.Tensor:
            kept.append(run(inputs))
            return kept[-1]

        runner.execute = remember                       # type: ignore[method-assign]
        engine_of(llm).step()
        assert torch.isnan(logits[0]).all(), activations


def test_errors_name_the_option(model: PackedModel) -> None:
    with pytest.raises(ConfigError, match="unknown option load_in_4bit"):
        LLM(str(model.packed), load_in_4bit=True)
