"""What every `LLM` over a paged cache has on top of `BaseLLM`: beam search whose beams share their blocks."""
from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError
from m0_basics.input_processor import Prompt, as_prompt_list
from m0_basics.sampling_params import BeamSearchParams, SamplingParams
from m1_offline.beam_search import BeamSearchOutput, beam_search
from m2_continuous_batching.engine import LLMEngine

from .beam_cache import BeamBlocks


class PagedLLM(BaseLLM, ABC):
    """Abstract: a milestone's `LLM` builds the parts and hands them over."""

    engine: LLMEngine
    _beams: BeamBlocks

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The `beam_width` most probable outputs found for each prompt, best first. Beams share their blocks.

        Raises ConfigError while requests are unfinished: copies that their next step needs may be listed already, and
        not made, so that beams would write into blocks that are still to be read.
        """
        if self.engine.has_unfinished_requests():
            raise ConfigError("beam_search runs alone: it would take blocks that unfinished requests still need; "
                              "allowed: once all other requests have finished or were aborted")
        requests = self._requests(as_prompt_list(prompts), SamplingParams(temperature=0, max_tokens=params.max_tokens),
                                  True, {})
        return [beam_search(self.engine.runner, self._beams, request, params, self.tokenizer,
                            self.engine.output_processor.max_model_len) for request, _ in requests]
