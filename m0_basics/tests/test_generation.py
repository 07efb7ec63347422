"""F0.8, F0.11, FX.1: cache-free generation gives transformers' greedy tokens, on tiny models and on a real one."""
from __future__ import annotations

import pytest
import torch

from m0_basics import LLM, SamplingParams
from m0_basics.attention import ScheduledSequence
from m0_basics.request import Sequence, SequenceData
from m0_basics.tools.testing.bad_input_conformance import BadInputConformance
from m0_basics.tools.testing.conformance import (
    AbortConformance,
    GreedyConformance,
    StopTokenConformance,
    StreamingConformance,
    greedy,
)
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.real_model import NUM_TOKENS, RealReference


class TestConformance(GreedyConformance, StopTokenConformance, StreamingConformance, AbortConformance,
                      BadInputConformance):
    llm_class = LLM


@pytest.fixture(scope="module", params=["gguf", "safetensors"])
def llm(request: pytest.FixtureRequest, default_model_reference: RealReference) -> LLM:
    """The default model in float32, from its GGUF file and from the folder that transformers saved."""
    options = {"dtype": "float32", "max_model_len": 256}
    return LLM(**options) if request.param == "gguf" else LLM(str(default_model_reference.folder), **options)


@pytest.mark.real_model
class TestRealModel:
    """SmolLM2-135M against transformers, which read and dequantised the GGUF file by itself."""

    def test_prompts_have_the_same_tokens(self, llm: LLM, default_model_reference: RealReference) -> None:
        encode = llm.get_tokenizer().encode
        assert_same_tokens([encode(prompt) for prompt in default_model_reference.prompts],
                           default_model_reference.prompt_token_ids)

    def test_every_reference_token_is_the_best_one(self, llm: LLM, default_model_reference: RealReference) -> None:
        """8 x 100 tokens in eight forward passes.

        If after the prompt and any number of reference tokens the best token is the next reference token, then,
        by induction over the steps, cache-free generation gives the reference: it does the same passes, cut short.
        """
        reference, ours = default_model_reference, []
        assert reference.smallest_gap > 1e-4, "a tie would be decided by rounding"
        for prompt, tokens in zip(reference.prompt_token_ids, reference.token_ids, strict=True):
            sequence = Sequence(0, SequenceData(prompt, tokens[:-1]), SamplingParams(temperature=0), seed=0)
            runner = llm.engine.runner
            with torch.inference_mode():
                hidden = runner.forward(runner.prepare_inputs([ScheduledSequence.rest(sequence)]))
                logits = runner.model.compute_logits(hidden[len(prompt) - 1:])
            ours.append(logits.argmax(-1).tolist())
        assert len(ours) == 8
        assert all(len(tokens) == NUM_TOKENS for tokens in ours)
        assert_same_tokens(ours, reference.token_ids)

    def test_generated_tokens(self, llm: LLM, default_model_reference: RealReference) -> None:
        chosen = [0, 5]                     # one in English, one in Chinese
        outputs = llm.generate([default_model_reference.prompts[i] for i in chosen], greedy(24), use_tqdm=False)
        assert_same_tokens([output.outputs[0].token_ids for output in outputs],
                           [default_model_reference.token_ids[i][:24] for i in chosen])
