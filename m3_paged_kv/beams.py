"""Beam search over blocks: children share their parent's cache until they write, instead of copying a row."""
from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence

from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError
from m0_basics.input_processor import Prompt, as_prompt_list
from m0_basics.request import Sequence as TokenSequence
from m0_basics.sampling_params import BeamSearchParams, SamplingParams
from m1_offline.beam_search import BeamSearchOutput, beam_search
from m2_continuous_batching.engine import LLMEngine
from m2_continuous_batching.kv_cache_manager import SlotCopy

from .kv_cache_manager import PagedKVCacheManager


class BeamBlocks:
    """What `m1_offline.beam_search` asks of a cache, answered by a `PagedKVCacheManager`."""

    def __init__(self, manager: PagedKVCacheManager, copy_slots: Callable[[list[SlotCopy]], None]) -> None:
        self.manager = manager
        self.copy_slots = copy_slots

    @property
    def num_free(self) -> int:
        """Beams that there may be: each needs at least a block of its own."""
        return self.manager.pool.num_free

    def allocate(self, sequence: TokenSequence) -> None:
        """Nothing yet: blocks come with `reserve`."""

    def reserve(self, sequence: TokenSequence, num_tokens: int) -> None:
        """Make room for the next tokens; copy what is shared and about to be written. ConfigError: out of blocks."""
        if not self.manager.allocate_slots(sequence, sequence.num_computed_tokens, num_tokens):
            raise ConfigError(f"the beams need more than the {self.manager.pool.num_blocks} blocks of the cache; "
                              "allowed: a smaller beam_width or max_tokens, or a larger num_blocks")
        self.copy_slots(self.manager.take_copies())

    def fork(self, parent: TokenSequence, child: TokenSequence) -> None:
        self.manager.fork(parent, child)

    def free(self, sequence: TokenSequence) -> None:
        self.manager.free(sequence)


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
