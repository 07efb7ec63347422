"""A model that drafts for itself: its packed weights guess ahead, its full ones check. (QSpec, arXiv 2410.11305.)

    cache   [ ... known tokens ... | t   g1   g2 |                the packed weights run t, g1, g2 and write theirs
            [ ... known tokens ... | t   g1   g2   g3 |           the full ones run t g1 g2 g3 and write over them

Both are the same model, so one cache serves both: drafts read what the full weights have computed, there is nothing to
catch up with, and no token of the cache is the draft's once the step has run. What is accepted does not change.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from weakref import WeakKeyDictionary

from m0_basics.attention import ScheduledSequence
from m0_basics.config import ConfigError
from m0_basics.loading.loader import new_model
from m0_basics.model import CausalLM
from m0_basics.model_runner import Runner
from m0_basics.request import Sequence
from m0_basics.sampler import Sampler
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.kv_cache_manager import KVCacheManager, SlotCopy
from m3_paged_kv.block_tables import HasBlocks
from m5_chunked_prefill.drafter import Drafter, Drafts

from .config import SELF, EngineConfig
from .loading.fill import load_packed, round_model
from .loading.source import find_checkpoint

_SMOOTHING = 0.2            # weight of the newest measurement
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


class SelfDrafter(Drafter):
    """Runs the packed twin over the target's own cache."""

    def __init__(self, runner: Runner, manager: KVCacheManager, sampler: Sampler,
                 copy_slots: Callable[[list[SlotCopy]], None]) -> None:
        """The runner's backend reads and writes the cache whose blocks `manager` hands out, and `copy_slots` copies."""
        assert isinstance(manager, HasBlocks)
        self.runner, self.manager, self.tables, self.sampler = runner, manager, manager.tables, sampler
        self.copy_slots = copy_slots
        self.seconds_per_token = 1e-9           # until it is measured; not 0, which would mean looked up
        self._params: WeakKeyDictionary[Sequence, SamplingParams] = WeakKeyDictionary()

    def propose(self, sequences: list[Sequence], lengths: list[int]) -> Drafts:
        writing = [(self._view(s), s.num_tokens + length) for s, wanted in zip(sequences, lengths, strict=True)
                   if (length := self._make_room(s, wanted))]
        if writing:
            self._make_copies()
        busy = writing
        while busy := [(mine, end) for mine, end in busy if mine.num_tokens < end]:
            self._write([mine for mine, _ in busy])
        drafts = {mine.seq_id: mine for mine, _ in writing}
        return [drafts[s.seq_id].data.token_slice(s.num_tokens, drafts[s.seq_id].num_tokens)
                if s.seq_id in drafts else [] for s in sequences]

    def _make_room(self, sequence: Sequence, length: int) -> int:
        """Blocks for so many guesses, or for fewer: all but the last one run. Returns how many."""
        while length and not self.manager.allocate_slots(sequence, sequence.num_tokens - 1, length):
            length //= 2
        return length

    def _make_copies(self) -> None:
        """What the step is about to copy, now: blocks that drafts write into may be a victim's, not yet swapped out,
        and a fork's first block of its own may be empty yet."""
        copies, self.tables.copies = self.tables.copies, []
        self.copy_slots(copies)

    def _view(self, sequence: Sequence) -> Sequence:
        """The sequence as the sampler draws for it, to be written on. Nobody reads log-probabilities of guesses, and
        they follow no grammar: a wrong one is not accepted."""
        mine = sequence.with_drafts(())
        if sequence not in self._params:
            self._params[sequence] = replace(sequence.sampling_params, logprobs=None, prompt_logprobs=None,
                                             structured_outputs=None)
        mine.sampling_params = self._params[sequence]
        return mine

    def _write(self, sequences: list[Sequence]) -> None:
        """One more token for each."""
        start = time.perf_counter()
        logits = self.runner.execute_model([ScheduledSequence(s, s.num_tokens - 1, 1) for s in sequences])
        for sequence, token_id in zip(sequences, self.sampler(logits, sequences).token_ids, strict=True):
            sequence.append_token_id(token_id)
        self.seconds_per_token += _SMOOTHING * (time.perf_counter() - start - self.seconds_per_token)


def with_full_weights(config: EngineConfig) -> EngineConfig:
    """The configuration of what checks: where a model drafts for itself, its weights are not packed."""
    if config.speculative_config.speculative_method != SELF:
        return config
    return replace(config, model_config=replace(config.model_config, quantization="none"))


def load_twin(config: EngineConfig, model: CausalLM) -> CausalLM | None:
    """The packed twin of `model`, where one is to draft. To be asked before layers are fused.

    From `speculative_model`, or the model's own files where those are packed, or else rounded to nearest here.
    Raises ConfigError for a model that cannot share the cache.
    """
    name = config.speculative_config.speculative_model
    if config.speculative_config.speculative_method != SELF:
        return None
    own = replace(config.model_config, model=name or config.model_config.model, quantization="auto",
                  max_model_len=model.max_model_len)
    checkpoint = find_checkpoint(own)
    if checkpoint.method == "none":
        if name is not None:
            raise ConfigError(f"speculative_model={name!r} has plain weights, and a draft of the model itself is there "
                              "to read fewer bytes; allowed: a GGUF file, a folder of method gptq, or no "
                              "speculative_model (rounded while loading)")
        return round_model(_second_view(model), own, embedding=False)         # there it costs no reading
    for field in _SHAPE:
        ours, theirs = getattr(model.spec, field), getattr(checkpoint.spec, field)
        if ours != theirs:
            raise ConfigError(f"speculative_model={name!r} has {field}={theirs}, and the model {ours}: it is no packed "
                              "form of it; allowed: the same model, packed")
    return load_packed(own, checkpoint)


def _second_view(model: CausalLM) -> CausalLM:
    """Another model over the same weights, whose modules can be exchanged apart."""
    view = new_model(model.spec, 1, model.dtype, model.device)
    view.load_state_dict(model.state_dict(), assign=True)
    view.rotary, view.max_model_len = model.rotary, model.max_model_len
    return view.requires_grad_(False).eval()
