"""The public face of every milestone: `generate`, `chat` and `stream` over whatever engine it composes.

Names and shapes of the results are vLLM's, so that what is written here runs there.
"""
from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from .config import ConfigError, EngineConfig, reject
from .engine import Engine
from .input_processor import InputProcessor, Prompt, as_prompt_list
from .loading.tokenizer import Message, Tokenizer
from .model_spec import ModelSpec
from .outputs import RequestOutput
from .request import Request
from .sampling_params import SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None
Options = dict[str, Any]                       # what goes to the engine with a request, by name


class BaseLLM(ABC):
    """Offline inference. A milestone's `LLM` builds the parts in its constructor and hands them to this one."""

    config_class: type[EngineConfig] = EngineConfig
    default_sampling_params = SamplingParams()

    def __init__(self, config: EngineConfig, engine: Engine, spec: ModelSpec, tokenizer: Tokenizer | None) -> None:
        assert config.model_config.max_model_len is not None
        self.config = config
        self.engine = engine
        self.spec = spec
        self.tokenizer = tokenizer
        self.input_processor = InputProcessor(spec, tokenizer, config.model_config.max_model_len,
                                              config.model_config.seed)
        self._mailboxes: dict[str, list[RequestOutput]] = {}

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError where none was loaded."""
        if self.tokenizer is None:
            raise ConfigError("no tokenizer was loaded: skip_tokenizer_init is set")
        return self.tokenizer

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, use_tqdm: bool = True,
                 **options: Any) -> list[RequestOutput]:
        """Complete each prompt: text, {"prompt": ...}, {"prompt_token_ids": [...]}, token ids, or a list of them.

        One SamplingParams serves all prompts, a list gives one to each. So do `options`, which are handed to the engine
        with each request: those of its `request_options`. Every prompt is checked before the first is run; the error
        names the bad one. Outputs come in the order of the prompts.
        """
        return self._run(self._requests(as_prompt_list(prompts), sampling_params, True, options), use_tqdm)

    def chat(self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None,
             use_tqdm: bool = True, add_generation_prompt: bool = True, continue_final_message: bool = False,
             chat_template_kwargs: Mapping[str, Any] | None = None, **options: Any) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, through the model's chat template.

        What the template is told is described in `Tokenizer.apply_chat_template`.
        """
        prompts = self._chat_prompts(messages, add_generation_prompt, continue_final_message, chat_template_kwargs)
        return self._run(self._requests(prompts, sampling_params, False, options), use_tqdm)

    def stream(self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None,
               chat_template_kwargs: Mapping[str, Any] | None = None, add_generation_prompt: bool = True,
               continue_final_message: bool = False, **options: Any) -> Iterator[RequestOutput]:
        """Yield what each step adds: `outputs[i].text` and `.token_ids` hold only the new part.

        A list of messages is a chat, and its template is told the same as by `chat`. With best_of above n everything
        comes at the end: which outputs are returned is not known before. Closing the iterator early, or dropping it,
        aborts the request.
        """
        params = sampling_params or self.default_sampling_params
        is_chat = isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], dict)
        messages: Any = prompt
        checked: Any = prompt
        if is_chat:
            checked = self.get_tokenizer().apply_chat_template(messages, add_generation_prompt, continue_final_message,
                                                               chat_template_kwargs)
        [request_options] = self._one_each(options, 1)
        request = self.input_processor.process(checked, params, stream=params.best_of == params.n,
                                               add_special_tokens=not is_chat)
        deltas = self._deltas(request, request_options)
        next(deltas)        # into the `try`: a generator that was never started would not abort when it is dropped
        return deltas

    def _chat_prompts(self, messages: Sequence[Message] | Sequence[Sequence[Message]],
                      *template_options: Any) -> list[str]:
        if not messages:
            raise ConfigError("messages is empty; allowed: at least one message")
        conversations: Any = [messages] if isinstance(messages[0], dict) else messages
        tokenizer = self.get_tokenizer()
        return [tokenizer.apply_chat_template(c, *template_options) for c in conversations]

    def _deltas(self, request: Request, options: Options) -> Iterator[RequestOutput]:
        seen: dict[int, tuple[int, int]] = {}
        try:
            self._add(request, options)
            yield RequestOutput.from_request(request)       # taken by `stream`
            finished = False
            while not finished:
                for output in self._next_outputs(request.request_id):
                    deltas = []
                    for part in output.outputs:
                        chars, tokens = seen.get(part.index, (0, 0))
                        seen[part.index] = (len(part.text), len(part.token_ids))
                        deltas.append(replace(part, text=part.text[chars:], token_ids=part.token_ids[tokens:],
                                              logprobs=part.logprobs and part.logprobs[tokens:]))
                    finished = output.finished
                    yield replace(output, outputs=deltas)
        finally:
            self.engine.abort_request(request.request_id)
            self._mailboxes.pop(request.request_id, None)

    def _run(self, requests: list[tuple[Request, Options]], use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        try:
            for request, options in requests:
                self._add(request, options)
            with tqdm(total=len(requests), desc="prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                for request, _ in requests:
                    while request.request_id not in outputs:
                        for output in self._next_outputs(request.request_id):
                            outputs[output.request_id] = output
                    bar.update()
        finally:
            for request, _ in requests:
                self.engine.abort_request(request.request_id)
                self._mailboxes.pop(request.request_id, None)
        return [outputs[request.request_id] for request, _ in requests]

    def _requests(self, prompts: Sequence[Prompt], sampling_params: Params, special: bool,
                  options: Options) -> list[tuple[Request, Options]]:
        """A checked request for each prompt, and the options that go to the engine with it."""
        if isinstance(sampling_params, Sequence):
            if len(sampling_params) != len(prompts):
                raise ConfigError(f"{len(sampling_params)} sampling_params for {len(prompts)} prompts; "
                                  "allowed: one, or one for each prompt")
            params = list(sampling_params)
        else:
            params = [sampling_params or self.default_sampling_params] * len(prompts)
        requests = []
        for i, (prompt, p, o) in enumerate(zip(prompts, params, self._one_each(options, len(prompts)), strict=True)):
            try:
                request = self.input_processor.process(prompt, p, add_special_tokens=special)
                self.engine.check_request(request, **o)
                requests.append((request, o))
            except ConfigError as error:
                raise type(error)(f"prompts[{i}]: {error}") from error
        return requests

    def _one_each(self, options: Options, num_prompts: int) -> list[Options]:
        """Options for each of `num_prompts` prompts. Raises ConfigError for those that the engine does not take."""
        known = self.engine.request_options
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(f"unknown option {', '.join(unknown)}; with a request this engine takes: "
                              f"{', '.join(sorted(known)) or 'none'}")
        each: list[Options] = [{} for _ in range(num_prompts)]
        for name, value in options.items():
            kind = known[name]
            if value is not None and not isinstance(value, (kind, list, tuple)):
                raise reject(name, value, f"None, {kind.__name__}, or a list of them")
            values = value if isinstance(value, (list, tuple)) else [value] * num_prompts
            if len(values) != num_prompts:
                raise ConfigError(f"{len(values)} {name} for {num_prompts} prompts; allowed: one, or one for each "
                                  "prompt")
            for i, one in enumerate(values):
                if isinstance(value, (list, tuple)) and not isinstance(one, kind):
                    raise reject(f"{name}[{i}]", one, kind.__name__)
                each[i][name] = one
        return each

    def _add(self, request: Request, options: Options) -> None:
        self.engine.add_request(request, **options)
        self._mailboxes[request.request_id] = []

    def _next_outputs(self, request_id: str) -> list[RequestOutput]:
        """Step the engine until this request has news. Others' news waits in their mailboxes."""
        while not self._mailboxes[request_id]:
            for output in self.engine.step():
                self._mailboxes[output.request_id].append(output)
        news, self._mailboxes[request_id] = self._mailboxes[request_id], []
        return news
