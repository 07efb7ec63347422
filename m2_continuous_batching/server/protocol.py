"""The bodies of requests: OpenAI's fields, and vLLM's on top.

A field that neither knows is refused, and so is one of theirs that this server cannot honour, unless it has the value
that asks for nothing. Ranges are left to `SamplingParams`, which says what is allowed; a null is the default.
"""
from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_OUTPUTS = 128           # n and best_of; OpenAI's limit
MAX_LOGPROBS = 20           # OpenAI's limit for chats, vLLM's for everything

Outputs = Annotated[int, Field(ge=1, le=MAX_OUTPUTS)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
RequestId = Annotated[str, Field(pattern="^[!-~]{1,128}$")]         # ASCII without spaces
Priority = Annotated[int, Field(ge=-2 ** 31, le=2 ** 31)]


class Body(BaseModel):
    """Strict: the text "5" is no number, and true is none either."""

    model_config = ConfigDict(extra="forbid", strict=True)
    # Their fields that this server has no use for -> the values that ask for nothing (beside null).
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, values in cls.neutral.items():
            if data.get(name) is not None and data[name] not in values:
                allowed = ", ".join(["null", *map(repr, values)])
                raise ValueError(f"{name} is not supported by this server; allowed: {allowed}")
        return {name: value for name, value in data.items() if name not in cls.neutral}


class StreamOptions(Body):
    """What a stream reports beside the text."""

    neutral: ClassVar = {"include_obfuscation": (True, False)}      # padding against observers; we send none
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False     # vLLM's: the tokens so far with every piece

    @model_validator(mode="after")
    def _check_together(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats needs include_usage=true; allowed: false without it")
        return self


class StructuredOutputs(Body):
    """Exactly one of a JSON schema, a regular expression, and a list of choices."""

    json_schema: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None


class JSONSchema(Body):
    """The constraint of `response_format`."""

    neutral: ClassVar = {"strict": (True, False)}                   # a constraint is always strict here
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """Text, any JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class GenerationBody(Body):
    """What completions and chats have in common."""

    neutral: ClassVar = {
        "use_beam_search": (False,), "length_penalty": (1.0,), "detokenize": (True,), "truncate_prompt_tokens": (),
        "spaces_between_special_tokens": (True,), "logits_processors": ([],), "prompt_logprobs": (),
        "return_token_ids": (False,)}
    model: str | None = None
    user: str | None = None                     # who asks; nothing depends on it
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Outputs | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    priority: Priority | None = None
    request_id: RequestId | None = None         # what the client calls it: part of the answer's id
    cache_salt: str | None = None               # for caches that requests share: this server has none
    # this engine's
    sla_class: str | None = None
    timeout: float | None = None                # seconds after which the request is aborted

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true; allowed: null without it")
        return self


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    neutral: ClassVar = GenerationBody.neutral | {"suffix": ("",)}
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16     # 0 with echo scores the prompt
    best_of: Outputs | None = None
    echo: bool | None = False
    logprobs: NumLogprobs | None = None
    return_tokens_as_token_ids: bool | None = False         # vLLM's: "token_id:42" in place of text


class TextPart(Body):
    """One piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message. Fields of an answer that is sent back are accepted where they are empty."""

    neutral: ClassVar = {"refusal": (), "annotations": ([],), "audio": (), "function_call": (), "tool_calls": ([],),
                         "tool_call_id": ()}
    role: str
    content: str | list[TextPart]
    name: str | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    neutral: ClassVar = GenerationBody.neutral | {
        "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
        "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (),
        "reasoning_effort": ("none",), "verbosity": ("medium",), "web_search_options": (), "store": (False,),
        "metadata": ({},), "service_tier": ("auto", "default"),
        # vLLM's
        "add_generation_prompt": (True,), "continue_final_message": (False,), "chat_template": (),
        "chat_template_kwargs": ({},), "documents": ([],), "echo": (False,), "include_reasoning": (True, False),
        "best_of": (1,)}
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: NumLogprobs | None = None
    # OpenAI's; nothing depends on them
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true; allowed: null without it")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
                self.max_tokens != self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; allowed: one of them")
        return self


class TokenizeBody(Body):
    """`POST /tokenize`: of one text, or of a chat."""

    neutral: ClassVar = {"add_generation_prompt": (True,), "continue_final_message": (False,), "chat_template": (),
                         "chat_template_kwargs": ({},)}
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("allowed: exactly one of prompt and messages")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]
