"""The bodies of requests: OpenAI's fields, and vLLM's on top.

A field that would change the answer, and that this server cannot honour, is refused by name, unless it has the value
that asks for nothing. Any other that it does not know is left out and logged, as vLLM, llama.cpp and Ollama do: clients
send what they like. Ranges are left to `SamplingParams`, which says what is allowed; a null is the default.
"""
from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from m0_basics.config import short

logger = logging.getLogger(__name__)
UNSUPPORTED = "unsupported"     # the type of an error about a field that is named in its context

MAX_OUTPUTS = 128           # n and best_of; OpenAI's limit
MAX_LOGPROBS = 20           # OpenAI's limit for chats, vLLM's for everything

Outputs = Annotated[int, Field(ge=1, le=MAX_OUTPUTS)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
RequestId = Annotated[str, Field(pattern="^[!-~]{1,128}$")]         # ASCII without spaces
CacheSalt = Annotated[str, Field(min_length=1, max_length=256)]
Priority = Annotated[int, Field(ge=-2 ** 31, le=2 ** 31)]
# A list of half a million mistakes is answered with the first.
Texts = Annotated[list[str], Field(fail_fast=True)]
Integers = Annotated[list[int], Field(fail_fast=True)]

# llama.cpp's and Ollama's ways to sample and to constrain that are none of vLLM's -> the values that turn them off.
_OTHER_SERVERS: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,), "dynatemp_range": (0,), "typical_p": (1,), "tfs_z": (1,), "top_n_sigma": (-1,),
    "xtc_probability": (0,), "dry_multiplier": (0,), "repeat_penalty": (1,), "grammar": ("",), "json_schema": (),
    "n_predict": (-1,), "samplers": (), "lora": ([],), "format": ("",), "options": ({},), "think": (False,),
    "raw": (False,)}


class Body(BaseModel):
    """Strict: the text "5" is no number, and true is none either."""

    model_config = ConfigDict(extra="ignore", strict=True)
    # Fields that would change the answer, and cannot here -> the values that ask for nothing (beside null).
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, values in cls.neutral.items():
                if data.get(name) is not None and data[name] not in values:
                    allowed = ", ".join(["null", *map(repr, values)])
                    raise unsupported(name, f"is not supported by this server; allowed: {allowed}")
            known = {field.alias or name for name, field in cls.model_fields.items()}
            if ignored := [name for name in data if name not in known and name not in cls.neutral]:
                logger.info("fields without a meaning here are ignored: %s", short(ignored))
        return data


def unsupported(name: str, complaint: str) -> PydanticCustomError:
    """An error about a field of a body that is checked as a whole."""
    return PydanticCustomError(UNSUPPORTED, "{complaint}", {"complaint": complaint, "field": name})


class StreamOptions(Body):
    """What a stream reports beside the text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False     # vLLM's: the tokens so far with every piece

    @model_validator(mode="after")
    def _check_together(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats needs include_usage=true; allowed: false without it")
        return self


class StructuredOutputs(Body):
    """Exactly one of a JSON schema, a regular expression, and a list of choices."""

    neutral: ClassVar = {"grammar": (), "json_object": (False,), "structural_tag": (), "whitespace_pattern": (),
                         "disable_any_whitespace": (False,), "disable_additional_properties": (False,)}
    json_schema: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None


class JSONSchema(Body):
    """The constraint of `response_format`."""

    name: str                                   # `strict` is ignored: a constraint always is, here
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
        "return_token_ids": (False,), "guided_grammar": (), "structural_tag": (), "prompt_embeds": (),
        "thinking_token_budget": (), **_OTHER_SERVERS}
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
    stop: str | Texts | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Integers | None = None
    bad_words: Texts | None = None
    allowed_token_ids: Integers | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None      # such as BOS; null: to a text, and not to what a template wrote
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    priority: Priority | None = None
    request_id: RequestId | None = None         # what the client calls it: part of the answer's id
    cache_salt: CacheSalt | None = None         # requests of different salts share nothing
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
    prompt: str | Texts | Integers | Annotated[list[Integers], Field(fail_fast=True)]
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
    """One message. An answer may be sent back as it came, with what it does not have, such as calls, empty."""

    neutral: ClassVar = {"refusal": (), "audio": (), "function_call": (), "tool_calls": ([],), "tool_call_id": ()}
    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise unsupported("content", "is missing; allowed: text, or a list of text parts (null for an assistant)")
        return self


class TemplateOptions(Body):
    """vLLM's fields about how messages become a prompt."""

    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False         # the answer goes on with the last message
    chat_template_kwargs: dict[str, Any] | None = None  # for the template, such as {"enable_thinking": false}


class ChatBody(GenerationBody, TemplateOptions):
    """`POST /v1/chat/completions`."""

    neutral: ClassVar = GenerationBody.neutral | {
        "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
        "modalities": (["text"],), "audio": (), "reasoning_effort": ("none",), "verbosity": ("medium",),
        "web_search_options": (),
        # vLLM's
        "chat_template": (), "documents": ([],), "echo": (False,), "best_of": (1,),
        "return_tokens_as_token_ids": (False,)}
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
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


class TokenizeBody(TemplateOptions):
    """`POST /tokenize`: of one text, or of a chat."""

    neutral: ClassVar = {"chat_template": (), "tools": ([],)}
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = None      # null: to a text, and not to a chat
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("allowed: exactly one of prompt and messages")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Integers
