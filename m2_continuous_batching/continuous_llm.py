"""What every `LLM` over the `LLMEngine` has on top of `BaseLLM`: scheduling parameters per request."""
from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from functools import partial

from m0_basics.base_llm import BaseLLM, Params
from m0_basics.config import ConfigError, reject
from m0_basics.input_processor import Prompt, as_prompt_list
from m0_basics.loading.tokenizer import Message
from m0_basics.outputs import RequestOutput
from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams

from .engine import LLMEngine
from .policies import SchedulingParams

Scheduling = SchedulingParams | Sequence[SchedulingParams] | None


class ContinuousLLM(BaseLLM, ABC):
    """Abstract: a milestone's `LLM` builds the parts and hands them over."""

    engine: LLMEngine

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, use_tqdm: bool = True,
                 scheduling_params: Scheduling = None) -> list[RequestOutput]:
        """As `BaseLLM.generate`; `scheduling_params` says how urgent the requests are: one for all, or one each."""
        prompts = as_prompt_list(prompts)
        scheduling = one_each(scheduling_params, len(prompts))
        return self._run_scheduled(self._requests(prompts, sampling_params, True), scheduling, use_tqdm)

    def chat(self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None,
             use_tqdm: bool = True, add_generation_prompt: bool = True,
             scheduling_params: Scheduling = None) -> list[RequestOutput]:
        """As `BaseLLM.chat`; `scheduling_params` as in `generate`, one for each conversation."""
        prompts = self._chat_prompts(messages, add_generation_prompt)
        scheduling = one_each(scheduling_params, len(prompts))
        return self._run_scheduled(self._requests(prompts, sampling_params, False), scheduling, use_tqdm)

    def stream(self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None,
               scheduling_params: SchedulingParams | None = None) -> Iterator[RequestOutput]:
        """As `BaseLLM.stream`; `scheduling_params` says how urgent the request is."""
        [scheduling] = one_each(scheduling_params, 1)
        request = self._stream_request(prompt, sampling_params)
        return self._start_stream(request, partial(self.engine.add_request, scheduling_params=scheduling))

    def _run_scheduled(self, requests: list[Request], scheduling: Sequence[SchedulingParams],
                       use_tqdm: bool) -> list[RequestOutput]:
        params = {r.request_id: p for r, p in zip(requests, scheduling, strict=True)}
        return self._run_requests(requests, use_tqdm,
                                  lambda request: self.engine.add_request(request, params[request.request_id]))


def one_each(scheduling_params: Scheduling, num_prompts: int) -> list[SchedulingParams]:
    """Scheduling parameters for each of `num_prompts` prompts. Raises ConfigError for what are none."""
    if scheduling_params is None or isinstance(scheduling_params, SchedulingParams):
        return [scheduling_params or SchedulingParams()] * num_prompts
    if not isinstance(scheduling_params, (list, tuple)):
        raise reject("scheduling_params", scheduling_params, "None, SchedulingParams, or a list of them")
    for i, params in enumerate(scheduling_params):
        if not isinstance(params, SchedulingParams):
            raise reject(f"scheduling_params[{i}]", params, "SchedulingParams")
    if len(scheduling_params) != num_prompts:
        raise ConfigError(f"{len(scheduling_params)} scheduling_params for {num_prompts} prompts; "
                          "allowed: one, or one for each prompt")
    return list(scheduling_params)
