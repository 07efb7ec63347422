"""A small model as the drafter: it writes ahead, the large one checks.

It has a KV cache of its own, in which it follows each sequence. Where a guess was wrong it goes back to the last token
that was right: what lies behind is overwritten. It draws with the target's numbers (the hash of seed, index and
position), so the two agree wherever their distributions nearly do.
"""
from __future__ import annotations

import time
from dataclasses import replace

from m0_basics.attention import ScheduledSequence
from m0_basics.config import ConfigError
from m0_basics.loading.loader import load_model, load_tokenizer
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.model_runner import ModelRunner, Runner
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Request, Sequence
from m0_basics.sampler import Sampler
from m2_continuous_batching.slot_cache import SlotCache, slot_cache_bytes
from m3_paged_kv.block_pool import BlockPool
from m3_paged_kv.block_tables import BlockTables
from m4_flash_attn.backends import choose, situation_of
from m4_flash_attn.kernels.cpu.runner import with_decode_call
from m4_flash_attn.kernels.layer_kernels import layer_kernels_for
from m4_flash_attn.layers import fuse

from .config import EngineConfig
from .drafter import Drafter, Drafts

_CATCH_UP = 256             # tokens that are read between two steps: nobody waits for all of a long prompt
_SMOOTHING = 0.2            # weight of the newest measurement


class DraftModelDrafter(Drafter):
    """Runs a model of its own over the same sequences."""

    def __init__(self, runner: Runner, tables: BlockTables, sampler: Sampler, max_model_len: int) -> None:
        """The runner's backend reads `tables`. Sequences of more than `max_model_len` tokens get no guesses."""
        self.runner, self.tables, self.sampler, self.max_model_len = runner, tables, sampler, max_model_len
        self.seconds_per_token = 1e-9           # until it is measured; not 0, which would mean looked up
        self._followed: dict[int, Sequence] = {}            # by seq_id: what this model has seen, the latest used last

    def propose(self, sequences: list[Sequence], lengths: list[int]) -> Drafts:
        writing, in_step, num_to_read = list[tuple[Sequence, int]](), {s.seq_id for s in sequences}, _CATCH_UP
        for sequence, length in zip(sequences, lengths, strict=True):
            length = min(length, self.max_model_len - sequence.num_tokens)
            if length > 0:
                mine = self._follow(sequence)
                num_behind = mine.num_tokens - 1 - mine.num_computed_tokens
                if num_behind > max(num_to_read, 1):        # one is what a draft leaves that was right to its end
                    num_to_read -= self._read(mine, num_to_read, in_step)
                elif self._make_room(mine, num_behind + 1, in_step):
                    num_to_read = max(0, num_to_read - num_behind)
                    writing.append((mine, sequence.num_tokens + length))
        busy = writing
        while busy := [(mine, end) for mine, end in busy if mine.num_tokens < end and self._has_room(mine)]:
            self._write([mine for mine, _ in busy])
        drafts = {mine.seq_id: mine for mine, _ in writing}
        return [drafts[s.seq_id].data.token_slice(s.num_tokens, drafts[s.seq_id].num_tokens)
                if s.seq_id in drafts else [] for s in sequences]

    def on_request_completion(self, request: Request) -> None:
        for sequence in request.sequences:
            self._forget(sequence.seq_id)

    def _follow(self, sequence: Sequence) -> Sequence:
        """This model's view of a sequence: its tokens, as far computed as they are those that were computed."""
        mine, known = sequence.with_drafts(()), self._followed.pop(sequence.seq_id, None)
        if known is None:       # nobody reads this model's log-probabilities, and it follows no grammar
            mine.sampling_params = replace(mine.sampling_params, logprobs=None, prompt_logprobs=None,
                                           structured_outputs=None)
        else:
            mine.sampling_params = known.sampling_params
            written, truth = known.output_token_ids, mine.output_token_ids
            same = next((i for i, (a, b) in enumerate(zip(written, truth, strict=False)) if a != b),
                        min(len(written), len(truth)))
            mine.num_computed_tokens = min(known.num_computed_tokens, mine.num_prompt_tokens + same,
                                           mine.num_tokens - 1)
        self._followed[sequence.seq_id] = mine
        if mine not in self.tables:
            self.tables.open(mine)
        return mine

    def _read(self, mine: Sequence, num_tokens: int, in_step: set[int]) -> int:
        """Compute so many tokens that the sequence has got since the last time. Returns how many."""
        if not num_tokens or not self._make_room(mine, num_tokens, in_step):
            return 0
        self.runner.execute_model([ScheduledSequence(mine, mine.num_computed_tokens, num_tokens)])
        mine.num_computed_tokens += num_tokens
        return num_tokens

    def _make_room(self, mine: Sequence, num_tokens: int, in_step: set[int]) -> bool:
        """Room for the next tokens; of sequences that are not in the step the least recently used is forgotten."""
        while not self.tables.grow(mine, mine.num_computed_tokens, num_tokens):
            unused = next((seq_id for seq_id in self._followed if seq_id not in in_step), None)
            if unused is None:
                return False
            self._forget(unused)
        return True

    def _has_room(self, mine: Sequence) -> bool:
        """For all that has not run."""
        return self.tables.grow(mine, mine.num_computed_tokens, mine.num_tokens - mine.num_computed_tokens)

    def _write(self, sequences: list[Sequence]) -> None:
        """One more token for each. The first time it runs what they are behind as well, and tells no price."""
        start, scheduled = time.perf_counter(), [ScheduledSequence.rest(s) for s in sequences]
        logits = self.runner.execute_model(scheduled)
        for sequence, token_id in zip(sequences, self.sampler(logits, sequences).token_ids, strict=True):
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.append_token_id(token_id)
        if all(s.num_tokens == 1 for s in scheduled):
            self.seconds_per_token += _SMOOTHING * (time.perf_counter() - start - self.seconds_per_token)

    def _forget(self, seq_id: int) -> None:
        if (mine := self._followed.pop(seq_id, None)) is not None:
            self.tables.release(self.tables.close(mine))


class DraftModel:
    """A loaded draft model, which has no cache yet."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, tokenizer: Tokenizer | None) -> None:
        """Load `speculative_model` for a target of that `spec`. Raises ConfigError where their tokens differ."""
        name = config.speculative_config.speculative_model
        assert name is not None
        own = replace(config, model_config=replace(config.model_config, model=name, max_model_len=None))
        model, theirs = load_model(own.model_config), load_tokenizer(own.model_config)
        if model.spec.vocab_size != spec.vocab_size or (tokenizer and theirs and not tokenizer.has_same_vocab(theirs)):
            raise ConfigError(f"speculative_model={name!r} has another vocabulary than the model; allowed: a model "
                              "with the same tokens, under the same numbers")
        self.longest = min(config.scheduler_config.longest, model.spec.max_position_embeddings)
        self.situation = situation_of(own, model, [])
        self.backend = choose(own.attention_config.attention_backend, self.situation)
        if own.attention_config.fused_layers:
            model = fuse(model, layer_kernels_for(model.device, model.dtype))
        self.model = model

    @property
    def block_bytes(self) -> int:
        """Bytes of its cache for a block of tokens."""
        return slot_cache_bytes(self.model.spec, self.situation.block_size, self.model.dtype, [])

    def with_cache(self, num_blocks: int, sampler: Sampler) -> DraftModelDrafter:
        """The drafter, with a cache of that many blocks."""
        model, size = self.model, self.situation.block_size
        cache = SlotCache(model.spec, num_blocks * size, model.dtype, model.device, [], size)
        tables = BlockTables(BlockPool(num_blocks), size)
        runner = with_decode_call(ModelRunner(model, self.backend.make(self.situation, cache, tables)))
        return DraftModelDrafter(runner, tables, sampler, self.longest)
