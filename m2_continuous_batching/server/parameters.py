"""From the body of a request to what the engine takes: sampling parameters, scheduling parameters, messages."""
from __future__ import annotations

from hashlib import sha256
from typing import Any

from m0_basics.config import ConfigError, reject
from m0_basics.sampling_params import SamplingParams, StructuredOutputsParams, is_utf8

from ..policies import SchedulingParams
from .config import ServerConfig
from .protocol import ChatBody, ChatMessage, CompletionBody, GenerationBody, TemplateOptions

# Fields that go to SamplingParams as they are.
_SAME = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "top_k", "min_p",
         "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "allowed_token_ids",
         "skip_special_tokens", "include_stop_str_in_output")


def completion_params(body: CompletionBody) -> SamplingParams:
    """Raises ConfigError. `max_tokens=0` runs one token, which the answer leaves out: the engine's least."""
    extra: dict[str, Any] = {"logprobs": body.logprobs, "max_tokens": body.max_tokens}
    if body.max_tokens == 0:
        if body.min_tokens:
            raise reject("min_tokens", body.min_tokens, "at most max_tokens, 0")
        extra["max_tokens"] = 1
    if body.best_of is not None:
        extra["best_of"] = body.best_of
        if body.stream and body.best_of != (body.n or 1):
            raise reject("best_of", body.best_of, "n where stream is true (the best are known at the end only)")
    if body.echo and body.logprobs is not None:
        extra["prompt_logprobs"] = body.logprobs
    return _params(body, extra)


def chat_params(body: ChatBody) -> SamplingParams:
    """Raises ConfigError."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _params(body, {"max_tokens": max_tokens, "logprobs": (body.top_logprobs or 0) if body.logprobs else None})


def scheduling_params(body: GenerationBody) -> SchedulingParams:
    """Raises ConfigError."""
    return SchedulingParams(body.priority or 0, body.sla_class, body.timeout)


def cache_salt(body: GenerationBody, config: ServerConfig, authorization: str | None) -> str:
    """What the request shares its cache under: its own salt, and who asks where the server tells them apart.

    Raises ConfigError for half a character.
    """
    salt = body.cache_salt or ""
    if not is_utf8(salt):
        raise reject("cache_salt", salt, "text that UTF-8 can write")
    if not config.salt_by_api_key:
        return salt
    key = (authorization or "").partition(" ")[2].strip()           # whatever the case of "Bearer"
    return f"{sha256(key.encode()).hexdigest()} {salt}"


def as_messages(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """What a chat template reads. The text parts of a message stand on lines of their own, as in vLLM.

    An answer without text, such as one that only called a tool, is the empty text.
    """
    result = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
        result.append({"role": message.role, "content": text} | ({"name": message.name} if message.name else {}))
    return result


def template_options(body: TemplateOptions) -> dict[str, Any]:
    """The arguments of `Tokenizer.apply_chat_template` beside the messages."""
    return {"add_generation_prompt": body.add_generation_prompt is not False,
            "continue_final_message": bool(body.continue_final_message),
            "chat_template_kwargs": body.chat_template_kwargs}


def _params(body: GenerationBody, extra: dict[str, Any]) -> SamplingParams:
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    return SamplingParams.from_options(**given, **extra, logit_bias=_logit_bias(body.logit_bias),
                                       structured_outputs=_structured_outputs(body))


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    """JSON has text for keys."""
    if bad := [key for key in bias or {} if not (key.isascii() and key.isdecimal())]:
        raise reject("logit_bias", bad[0], "token ids as keys")
    return None if bias is None else {int(key): value for key, value in bias.items()}


def _structured_outputs(body: GenerationBody) -> StructuredOutputsParams | None:
    """The constraint on the text, in whichever of the three ways it is asked for."""
    asked: list[dict[str, Any]] = []
    if body.structured_outputs is not None:
        given = body.structured_outputs
        asked.append({"json": given.json_schema, "regex": given.regex, "choice": given.choice})
    guided = {"json": body.guided_json, "regex": body.guided_regex, "choice": body.guided_choice}
    asked += [{name: value} for name, value in guided.items() if value is not None]
    form = body.response_format
    if form is not None and form.type == "json_object":
        asked.append({"json": {"type": "object"}})
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ConfigError("response_format of type json_schema needs json_schema; allowed: an object with name "
                              "and schema")
        asked.append({"json": form.json_schema.schema_})
    if len(asked) > 1:
        raise ConfigError("the output is constrained more than once; allowed: one of response_format, "
                          "structured_outputs, guided_json, guided_regex, guided_choice")
    return StructuredOutputsParams(**asked[0]) if asked else None
