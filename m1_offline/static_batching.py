"""Static batching with left padding: the baseline that later milestones have to beat.

    . . . P P P | D D D D D D      prompts are padded on the left, so that all end in the same column
    P P P P P P | D D x x x x      a finished row keeps its place (x) until the longest one is done
    . P P P P P | D D D D x x

Every row pays for the longest prompt and for the longest output. A new request waits until the whole batch
is finished.

B rows, L tokens per row in this step, S columns so far, H_q / H_kv heads, D head size.
"""
from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence
from m0_basics.base_llm import BaseLLM
from m0_basics.config import DEFAULT_MODEL, DTYPES, reject
from m0_basics.engine import Engine
from m0_basics.loading.loader import load_model, load_tokenizer
from m0_basics.model import CausalLM
from m0_basics.outputs import RequestOutput
from m0_basics.request import Request, Sequence, SequenceStatus
from m0_basics.sampler import Sampler

from .config import EngineConfig
from .kv_cache import check_memory, kv_cache_bytes
from .output_processor import OutputProcessor
from .sampler import FullSampler


@dataclass(frozen=True)
class PaddedMetadata(AttentionMetadata):
    """One rectangular step: columns [first_column, first_column + L) of every row."""

    first_column: int
    mask: Tensor                    # [B, 1, L, S] bool: which columns each token may see


class PaddedAttention(AttentionBackend):
    """A rectangle of keys and values, [layers, B, S_max, H_kv, D], padding included."""

    def __init__(self, model: CausalLM, num_rows: int, num_columns: int, dtype: torch.dtype) -> None:
        spec = model.spec
        shape = (spec.num_hidden_layers, num_rows, num_columns, spec.num_key_value_heads, spec.head_dim)
        # Zeroed, because padding is read: masked scores are dropped, but 0 * NaN would not be.
        self.k = torch.zeros(shape, dtype=dtype, device=model.device)
        self.v = torch.zeros(shape, dtype=dtype, device=model.device)

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        raise TypeError("a padded batch is a rectangle; use build_padded_metadata")

    def build_padded_metadata(self, padding: Tensor, first_column: int, num_tokens: int) -> PaddedMetadata:
        """padding [B]: how many columns at the left of each row are padding."""
        query = torch.arange(first_column, first_column + num_tokens, device=padding.device).view(1, -1, 1)
        key = torch.arange(first_column + num_tokens, device=padding.device).view(1, 1, -1)
        # Causal, and no padding; a padding token sees itself, so that its softmax has something to sum over.
        visible = (key <= query) & (key >= padding.view(-1, 1, 1)) | (key == query)
        starts = [row * num_tokens for row in range(len(padding) + 1)]
        return PaddedMetadata(starts, first_column, visible.unsqueeze(1))

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        assert isinstance(metadata, PaddedMetadata)
        num_rows, _, length, end = metadata.mask.shape
        columns = slice(metadata.first_column, end)
        self.k[layer_idx, :, columns] = k.view(num_rows, length, *k.shape[1:])
        self.v[layer_idx, :, columns] = v.view(num_rows, length, *v.shape[1:])
        keys, values = (x[layer_idx, :, :end].to(q.dtype).transpose(1, 2) for x in (self.k, self.v))  # [B, H_kv, S, D]
        if length == 1:
            # As in ContiguousAttention: the heads of a group take the place of the query dimension.
            grouped = q.view(num_rows, keys.shape[1], -1, q.shape[-1])
            out = F.scaled_dot_product_attention(grouped, keys, values, metadata.mask)
            return out.reshape(q.shape)
        batched = q.view(num_rows, length, *q.shape[1:]).transpose(1, 2)
        out = F.scaled_dot_product_attention(batched, keys, values, metadata.mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(q.shape)


class StaticBatchEngine(Engine):
    """Takes up to `max_num_seqs` requests, runs them to the end together, then takes the next ones."""

    def __init__(self, model: CausalLM, sampler: Sampler, output_processor: OutputProcessor,
                 config: EngineConfig) -> None:
        assert config.scheduler_config.max_model_len is not None
        self.model = model
        self.sampler = sampler
        self.output_processor = output_processor
        self.max_num_seqs = config.scheduler_config.max_num_seqs
        self.max_model_len = config.scheduler_config.max_model_len
        self.kv_cache_dtype = DTYPES.get(config.cache_config.kv_cache_dtype, model.dtype)
        self.backend: PaddedAttention | None = None
        self.waiting: deque[Request] = deque()
        self.batch: list[Request] = []
        self.column = 0                             # columns computed so far
        self.padding = torch.empty(0)               # [B]
        self.num_slots_run = 0                      # token slots computed, padding and finished rows included

    def check_request(self, request: Request) -> None:
        self.sampler.check(request.sampling_params)
        params = request.sampling_params
        if params.best_of != 1:
            raise reject("best_of" if params.best_of != params.n else "n", params.best_of, "1 (a row holds one output)")
        if params.prompt_logprobs is not None:
            raise reject("prompt_logprobs", params.prompt_logprobs, "None (padded prompts keep no logits)")

    def add_request(self, request: Request) -> None:
        self.check_request(request)
        self.waiting.append(request)

    def abort_request(self, request_id: str) -> None:
        for request in [r for r in (*self.waiting, *self.batch) if r.request_id == request_id]:
            sequence = request.sequences[0]
            if not sequence.is_finished:
                sequence.set_status(SequenceStatus.FINISHED_ABORTED)
                self.output_processor.close(sequence)
            if request in self.waiting:
                self.waiting.remove(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting) or not all(_is_aborted(r) for r in self.batch)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run the next column of the batch; start a batch where none runs."""
        if self.batch and all(r.is_finished for r in self.batch):
            return self._finish_batch()             # its last running rows were aborted since the last step
        tokens = self._next_column() if self.batch else self._start_batch()
        num_rows, num_tokens = tokens.shape
        assert self.backend is not None
        metadata = self.backend.build_padded_metadata(self.padding, self.column, num_tokens)
        columns = torch.arange(self.column, self.column + num_tokens, device=tokens.device)
        # Clamped: padding has no position, and a finished row may run past the last one.
        positions = (columns - self.padding.unsqueeze(1)).clamp(0, self.max_model_len - 1)
        hidden = self.model(tokens.flatten(), positions.flatten(), self.backend, metadata)
        self.column += num_tokens
        self.num_slots_run += tokens.numel()
        logits = self.model.compute_logits(hidden.view(num_rows, num_tokens, -1)[:, -1])
        return self._update(logits)

    def _start_batch(self) -> Tensor:
        """Pad the next requests on the left -> token ids [B, longest prompt]."""
        self.batch = [self.waiting.popleft() for _ in range(min(self.max_num_seqs, len(self.waiting)))]
        prompts = [r.prompt_token_ids for r in self.batch]
        width = max(map(len, prompts))
        # The last token of an output is never run.
        outputs = [min(r.sampling_params.max_tokens or self.max_model_len, self.max_model_len - len(p)) - 1
                   for r, p in zip(self.batch, prompts, strict=True)]
        self.backend = PaddedAttention(self.model, len(prompts), width + max(outputs), self.kv_cache_dtype)
        self.column = 0
        self.padding = torch.tensor([width - len(p) for p in prompts], device=self.model.device)
        now = time.perf_counter()
        for request in self.batch:
            request.sequences[0].set_status(SequenceStatus.RUNNING)
            request.metrics.first_scheduled_time = now
        return torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.model.device)

    def _next_column(self) -> Tensor:
        """The newest token of each row -> [B, 1]; a finished row repeats its last one."""
        newest = [r.sequences[0].data.token_slice(r.sequences[0].num_tokens - 1, r.sequences[0].num_tokens)
                  for r in self.batch]
        return torch.tensor(newest, device=self.model.device)

    def _update(self, logits: Tensor) -> list[RequestOutput]:
        running = [(i, r) for i, r in enumerate(self.batch) if not r.sequences[0].is_finished]
        sequences: list[Sequence] = [r.sequences[0] for _, r in running]
        sampled = self.sampler(logits[[i for i, _ in running]], sequences)
        now = time.perf_counter()
        for (_, request), token_id, logprobs in zip(running, sampled.token_ids, sampled.logprobs, strict=True):
            self.output_processor.process(request.sequences[0], token_id, logprobs)
            request.metrics.token_times.append(now)
            if request.is_finished:
                request.metrics.finished_time = now
        outputs = [RequestOutput.from_request(r) for _, r in running if r.stream and not r.is_finished]
        return outputs + (self._finish_batch() if all(r.is_finished for r in self.batch) else [])

    def _finish_batch(self) -> list[RequestOutput]:
        """The batch returns as one: that is what makes it static."""
        outputs = [RequestOutput.from_request(r) for r in self.batch if not _is_aborted(r)]
        self.batch, self.backend = [], None
        return outputs


def _is_aborted(request: Request) -> bool:
    return request.sequences[0].status is SequenceStatus.FINISHED_ABORTED


class StaticBatchLLM(BaseLLM):
    """The baseline as an `LLM`: `max_num_seqs` is the batch size."""

    config_class = EngineConfig

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        config = EngineConfig.from_options(model=model, **options)
        weights = load_model(config.model_config)
        tokenizer = load_tokenizer(config.model_config)
        config = config.with_max_model_len(weights.spec.max_position_embeddings)
        num_rows, longest = config.scheduler_config.max_num_seqs, config.scheduler_config.max_model_len
        assert longest is not None
        # At worst a long prompt pads a short one whose output is as long again.
        num_columns = 2 * longest
        dtype = DTYPES.get(config.cache_config.kv_cache_dtype, weights.dtype)
        check_memory(kv_cache_bytes(weights.spec, num_rows * num_columns, dtype), config.cache_config, num_rows,
                     num_columns, weights.device)
        engine = StaticBatchEngine(weights, FullSampler(tokenizer), OutputProcessor(tokenizer, longest), config)
        super().__init__(config, engine, weights.spec, tokenizer)
