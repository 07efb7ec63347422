"""What every `LLM` over the `LLMEngine` has on top of `BaseLLM`: scheduling parameters per request."""
from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

from m0_basics.base_llm import BaseLLM, Params
from m0_basics.config import ConfigError, EngineConfig
from m0_basics.input_processor import Prompt, as_prompt_list
from m0_basics.model_spec import ModelSpec
from m0_basics.outputs import RequestOutput
from m0_basics.request import Request
from m0_basics.tokenizer import Tokenizer

from .engine import LLMEngine
from .policies import SchedulingParams


class ContinuousLLM(BaseLLM, ABC):
    """Abstract: a milestone's `LLM` builds the parts and hands them over."""

    engine: LLMEngine

    def __init__(self, config: EngineConfig, engine: LLMEngine, spec: ModelSpec, tokenizer: Tokenizer | None) -> None:
        super().__init__(config, engine, spec, tokenizer)
        self._scheduling: dict[str, SchedulingParams] = {}      # of requests on their way into the engine

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, use_tqdm: bool = True,
                 scheduling_params: SchedulingParams | Sequence[SchedulingParams] | None = None,
                 ) -> list[RequestOutput]:
        """As `BaseLLM.generate`; `scheduling_params` says how urgent the requests are: one for all, or one each."""
        prompts = as_prompt_list(prompts)
        if isinstance(scheduling_params, Sequence):
            if len(scheduling_params) != len(prompts):
                raise ConfigError(f"{len(scheduling_params)} scheduling_params for {len(prompts)} prompts; "
                                  "allowed: one, or one for each prompt")
            each = list(scheduling_params)
        else:
            each = [scheduling_params or SchedulingParams()] * len(prompts)
        requests = self._requests(prompts, sampling_params, True)
        self._scheduling = {r.request_id: p for r, p in zip(requests, each, strict=True)}
        try:
            return self._run_requests(requests, use_tqdm)
        finally:
            self._scheduling = {}

    def _add_to_engine(self, request: Request) -> None:
        self.engine.add_request(request, self._scheduling.get(request.request_id))
