"""What a smaller cache costs in exactness: the next token's distribution, position by position, over a long text.

    plain     writes a text, all keys and values in float32              what it says at each position:  p
    variant   is made to write the same text, with its own cache         what it would have said:        q

    error at a position  =  KL(p || q), in nats; and whether both prefer the same token

The texts run token by token through the engine, so that scales grow and blocks leave as they do in use. R texts side
by side, V vocabulary.
"""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from m0_basics.config import check_int
from m0_basics.request import Sequence as TokenSequence
from m0_basics.sampler import Sampler, SamplerOutput
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.engine import LLMEngine
from m2_continuous_batching.plugins import KVCompressionPlugin, Plugin, SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler

from ..llm import LLM
from ..plugins.eviction import AttentionSinks, HeavyHitters
from ..plugins.kv_quant import BlockQuantisation

# The prompt of every text: SmolLM2's token that begins a message. Not 0, its <|endoftext|>: after that one token alone
# the next token's distribution hangs on the last bits of the cache, and dwarfs the error at all other positions.
_START = 1
_TEMPERATURE = 0.8          # a greedy text soon repeats itself, and then any cache will do
_BLOCK = 16


@dataclass(frozen=True)
class Variant:
    """A cache to be compared: plugins, which serve one engine, and options of the engine."""

    plugins: Sequence[Plugin] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def all_variants(budget: int) -> dict[str, Variant]:
    """Fewer bits for all tokens, or all bits for `budget` tokens (rounded down to blocks; at least 4 of them)."""
    return {
        "16 bits": Variant(options={"kv_cache_dtype": "bfloat16"}),
        "8 bits, scale per token": Variant([KVCompressionPlugin()]),
        "8 bits, scale per block": Variant([BlockQuantisation(8, _BLOCK)]),
        "4 bits, scale per block": Variant([BlockQuantisation(4, _BLOCK)]),
        "4 bits, keys per channel": Variant([BlockQuantisation(4, _BLOCK, per_channel_keys=True)]),
        "attention sinks": Variant([AttentionSinks(num_sink_tokens=4, window=budget - 2 * _BLOCK)]),
        "heavy hitters": Variant([HeavyHitters(budget, recent=budget // 2)])}


class Recorder(Sampler):
    """Chooses as another sampler does, and keeps the log-probabilities [R, V] of each step."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.supported = sampler.supported
        self.logprobs: list[Tensor] = []

    def __call__(self, logits: Tensor, sequences: list[TokenSequence]) -> SamplerOutput:
        self.logprobs.append(logprobs_by_text(logits, sequences))
        return self.sampler(logits, sequences)


class Dictation(Sampler):
    """Chooses what the texts say, and notes how far the logits are from the plain engine's."""

    supported = ("temperature", "seed", "max_tokens", "ignore_eos", "detokenize")

    def __init__(self, texts: list[list[int]], plain: list[Tensor]) -> None:
        self.texts = texts
        self.plain = plain
        self.kl: list[float] = []               # by position, mean over the texts
        self.same: list[float] = []             # share of the texts in which both prefer the same token

    def __call__(self, logits: Tensor, sequences: list[TokenSequence]) -> SamplerOutput:
        position = len(self.kl)
        p, q = self.plain[position], logprobs_by_text(logits, sequences)
        self.kl.append(float((p.exp() * (p - q)).sum(dim=-1).mean()))
        self.same.append(float((p.argmax(dim=-1) == q.argmax(dim=-1)).float().mean()))
        return SamplerOutput.of_tokens([self.texts[s.seed][position] for s in sequences])


class MostBlocks(SchedulerPlugin):
    """The largest share of the blocks that was held at the end of any step, before anything was evicted."""

    def __init__(self) -> None:
        self.usage = 0.0

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.usage = max(self.usage, stats.kv_cache_usage)


def cache_errors(options: Mapping[str, Any], length: int = 320, num_texts: int = 4, budget: int = 128,
                 bucket: int = 32) -> dict[str, Any]:
    """Errors of every variant against a cache in float32, each the mean of a `bucket` of positions.

    `options` are the engine's; precision, block size and limits are set here. Sequences that forget keep `budget`
    tokens. Per variant: `bytes_per_token` stored, `held_bytes` of a text at most (whole blocks), `seconds`, the lists
    `kl` and `same_token` by bucket, and their means over all positions.
    """
    check_int("length", length, 1)
    check_int("budget", budget, 4 * _BLOCK)
    base = {**options, "dtype": "float32", "kv_cache_dtype": "auto", "block_size": _BLOCK,
            "max_model_len": length + 1, "max_num_seqs": num_texts, "num_blocks": num_texts * (length // _BLOCK + 1)}
    plain = LLM(**base)
    recorder = Recorder(plain.engine.sampler)
    texts, _ = write(plain, recorder, length, num_texts)
    del plain                                   # its weights, before the next ones are loaded
    variants = {name: _measure(base, variant, Dictation(texts, recorder.logprobs), bucket)
                for name, variant in all_variants(budget).items()}
    return {"length": length, "num_texts": num_texts, "budget": budget,
            "positions": [min(start + bucket, length) for start in range(0, length, bucket)], "variants": variants}


def _measure(base: Mapping[str, Any], variant: Variant, dictation: Dictation, bucket: int) -> dict[str, Any]:
    most = MostBlocks()
    llm = LLM(**{**base, **variant.options}, plugins=[*variant.plugins, most])
    num_texts = len(dictation.texts)
    _, seconds = write(llm, dictation, len(dictation.texts[0]), num_texts)
    pool = llm.manager.pool
    return {"bytes_per_token": llm.cache.nbytes / (pool.num_blocks * _BLOCK),
            "held_bytes": most.usage * llm.cache.nbytes / num_texts, "seconds": seconds,
            "kl": _means(dictation.kl, bucket), "same_token": _means(dictation.same, bucket),
            "mean_kl": sum(dictation.kl) / len(dictation.kl),
            "mean_same_token": sum(dictation.same) / len(dictation.same)}


def write(llm: LLM, sampler: Sampler, length: int, num_texts: int) -> tuple[list[list[int]], float]:
    """Texts of `length` tokens after the same first one, side by side, chosen by `sampler`; and the seconds it took."""
    parts = llm.engine
    engine = LLMEngine(parts.scheduler, parts.runner, sampler, parts.output_processor, parts.copy_slots, parts.plugins)
    start = time.perf_counter()
    requests = [llm.input_processor.process({"prompt_token_ids": [_START]}, SamplingParams(
        temperature=_TEMPERATURE, seed=text, max_tokens=length, ignore_eos=True, detokenize=False))
        for text in range(num_texts)]
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished_requests():
        engine.step()
    return [request.sequences[0].output_token_ids for request in requests], time.perf_counter() - start


def logprobs_by_text(logits: Tensor, sequences: list[TokenSequence]) -> Tensor:
    """logits [R, V] in the order of the sequences -> log-probabilities [R, V] in the order of the texts."""
    rows = sorted(range(len(sequences)), key=lambda row: sequences[row].seed)
    return logits[torch.tensor(rows, device=logits.device)].float().log_softmax(dim=-1)


def _means(values: list[float], bucket: int) -> list[float]:
    parts = [values[start:start + bucket] for start in range(0, len(values), bucket)]
    return [sum(part) / len(part) for part in parts]
