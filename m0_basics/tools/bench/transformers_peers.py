"""Peers in this process: three ways in which a user of transformers generates.

One request at a time, static batches with left padding, and transformers' own continuous batching. The three
share one copy of the weights. Tokens are timed as the library reports them, so that a peer's latencies are what
its user would see if it streamed.
"""
from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from m0_basics.config import require

from .contender import Arrivals, BenchError, Contender, Served
from .metrics import RequestRecord
from .workloads import BenchRequest, Workload

_ANSWER_TIMEOUT = 600.0         # seconds without any news from continuous batching after which it counts as stuck
_PAGE_SIZE = 256                # tokens in a page of its cache: the default

class TransformersModel:
    """The weights, loaded when first used, and never told of an end-of-sequence token."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """`folder` is a Hugging Face folder."""
        self.transformers = require("transformers", "a transformers peer")
        self.folder, self.dtype, self.device = folder, dtype, device

    @cached_property
    def model(self) -> Any:
        """The model, with a generation configuration that ignores the folder's own."""
        self.transformers.utils.logging.disable_progress_bar()
        model = self.transformers.AutoModelForCausalLM.from_pretrained(str(self.folder), dtype=self.dtype)
        model.generation_config = self.generation_config()
        return model.to(self.device).eval()

    def generation_config(self, **settings: Any) -> Any:
        """Greedy, without an end; id 0 is the padding, which the mask hides."""
        return self.transformers.GenerationConfig(do_sample=False, eos_token_id=None, bos_token_id=None,
                                                  pad_token_id=0, **settings)


class _TokenClock:
    """Called by `generate` after each token: a stopping criterion that never stops, and notes the time."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()        # the token is not there before the GPU has made it
        self.times.append(self._arrivals.elapsed())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class TransformersGenerate(Contender):
    """`model.generate`, with as many requests at a time as `batch_size` says."""

    def __init__(self, name: str, source: TransformersModel, batch_size: int = 1, use_cache: bool = True,
                 note: str = "") -> None:
        super().__init__(name, note)
        self.source, self.batch_size, self.use_cache = source, batch_size, use_cache

    @torch.inference_mode()
    def serve(self, workload: Workload) -> Served:
        """A batch is made of what has arrived, and runs until its longest output is done.

        Surplus tokens of shorter outputs are work for nothing: they are dropped and not counted. A request counts
        as finished with its own last token, which is kinder to the peer than the end of the batch.
        """
        model = self.source.model
        arrivals = Arrivals(workload)
        records: dict[int, RequestRecord] = {}
        outputs: dict[int, tuple[int, ...]] = {}
        while arrivals:
            batch = arrivals.due(self.batch_size)
            if not batch:
                arrivals.wait()
                continue
            requests = [r for _, r in batch]
            clock = _TokenClock(arrivals)
            new_tokens = self._generate(model, requests, clock)
            for (index, r), row in zip(batch, new_tokens, strict=True):
                times = tuple(clock.times[:r.output_len])
                records[index] = RequestRecord(r.arrival_time, times, times[-1], len(r.prompt_token_ids),
                                               (r.output_len,))
                outputs[index] = tuple(row[:r.output_len])
        order = range(len(workload.requests))
        return Served(arrivals.elapsed(), tuple(records[i] for i in order), tuple(outputs[i] for i in order))

    def _generate(self, model: Any, requests: list[BenchRequest], clock: _TokenClock) -> list[list[int]]:
        """The new tokens of each request, all of the longest output's length."""
        width = max(len(r.prompt_token_ids) for r in requests)
        padding = [width - len(r.prompt_token_ids) for r in requests]
        ids = torch.tensor([[0] * p + list(r.prompt_token_ids) for p, r in zip(padding, requests, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in padding])
        settings = self.source.generation_config(max_new_tokens=max(r.output_len for r in requests),
                                                 use_cache=self.use_cache)
        criteria = self.source.transformers.StoppingCriteriaList([clock])
        result = model.generate(ids.to(model.device), attention_mask=mask.to(model.device),
                                generation_config=settings, stopping_criteria=criteria)
        new_tokens: list[list[int]] = result[:, width:].tolist()
        return new_tokens


class TransformersContinuous(Contender):
    """transformers' continuous batching. Its manager is made anew for each run, outside the time that counts."""

    def __init__(self, name: str, source: TransformersModel, note: str = "") -> None:
        super().__init__(name, note)
        self.source = source

    def serve(self, workload: Workload) -> Served:
        config = self.source.generation_config(max_new_tokens=max(r.output_len for r in workload.requests))
        config.eos_token_id = -1                # its way of saying "none"
        # Left alone, it would take most of the machine's memory for its cache, and every page of it is touched.
        pages = sum(-(-(len(r.prompt_token_ids) + r.output_len) // _PAGE_SIZE) for r in workload.requests)
        cache = self.source.transformers.ContinuousBatchingConfig(page_size=_PAGE_SIZE, num_blocks=pages + 1)
        manager = self.source.model.init_continuous_batching(generation_config=config,
                                                             continuous_batching_config=cache)
        manager.warmup()
        manager.start()
        try:
            return self._drive(manager, workload)
        finally:
            manager.stop(block=True)
            manager.destroy()

    def _drive(self, manager: Any, workload: Workload) -> Served:
        arrivals = Arrivals(workload)
        results: dict[int, Any] = {}
        last_news = time.perf_counter()
        while len(results) < len(workload.requests):
            for i, r in arrivals.due():
                manager.add_request(list(r.prompt_token_ids), request_id=str(i), max_new_tokens=r.output_len,
                                    record_timestamps=True)
            result = manager.get_result(timeout=0.01 if arrivals else 1.0)
            if result is not None and result.error is not None:
                raise BenchError(f"{self.name}: request {result.request_id} failed: {result.error}")
            if result is not None and result.is_finished():
                results[int(result.request_id)] = result
                last_news = time.perf_counter()
            elif time.perf_counter() - last_news > _ANSWER_TIMEOUT or not manager.is_running():
                raise BenchError(f"{self.name}: continuous batching stopped after {len(results)} of "
                                 f"{len(workload.requests)} requests")
        duration = arrivals.elapsed()
        records, outputs = [], []
        for i, r in enumerate(workload.requests):
            times = tuple(t - arrivals.start for t in results[i].timestamps)
            outputs.append(tuple(results[i].generated_tokens))
            records.append(RequestRecord(r.arrival_time, times, times[-1], len(r.prompt_token_ids),
                                         (len(outputs[-1]),)))
        return Served(duration, tuple(records), tuple(outputs))
