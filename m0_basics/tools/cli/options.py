"""Command-line flags made from the fields of dataclasses, so that a new option is written down once."""
from __future__ import annotations

import dataclasses
import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from m0_basics.config import ConfigError, EngineConfig
from m0_basics.sampling_params import SamplingParams

# The command line is greedy and generous where the library, like vLLM, samples and stops after 16 tokens.
SAMPLING_DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 256}
_LEFT_OUT = {"detokenize"}
# Options that know one value only: they are named in errors, not offered.
_NOT_YET = {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"}
# Parameters that are given as JSON: what is made of the parsed value, and an example.
_JSON: dict[str, tuple[Callable[[Any], Any], str]] = {
    "logit_bias": (lambda value: {int(key): number for key, number in value.items()}, '{"42": -1.5}'),
    "structured_outputs": (dict, '{"regex": "[0-9]+"}'),
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag: how typer parses it, and what it is when the user says nothing."""

    name: str
    type: Any
    default: Any
    help: str
    is_json: bool = False
    panel: str | None = None                    # of the help
    hidden: bool = False

    def parameter(self) -> inspect.Parameter:
        option = typer.Option(self.default, help=self.help, show_default=self.default is not None,
                              rich_help_panel=self.panel, hidden=self.hidden)
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=self.type)

    def parse(self, value: Any) -> Any:
        if not self.is_json or value is None:
            return value
        convert, example = _JSON[self.name]
        try:
            return convert(json.loads(value))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self.name}={value!r} is not valid; allowed: JSON such as {example}") from error


def engine_flags(config_class: type[EngineConfig], without: Iterable[str] = ()) -> dict[str, Flag]:
    """A flag for each option of the engine, but for those that another group of flags has."""
    flags = {}
    for name, (layer, field) in config_class.options().items():
        if name in without:
            continue
        hint = get_type_hints(config_class.layers()[layer])[name]
        panel = layer.removesuffix("_config").replace("_", " ").capitalize()
        flags[name] = dataclasses.replace(_flag(field, hint, field.default), panel=panel, hidden=name in _NOT_YET)
    return flags


def flags_of(options_class: type, without: Iterable[str] = ()) -> dict[str, Flag]:
    """A flag for each field of a dataclass of options."""
    hints = get_type_hints(options_class)
    return {f.name: _flag(f, hints[f.name], f.default) for f in dataclasses.fields(options_class)
            if f.name not in without}


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Engine options -> the words of a command line; None is left to its default. The inverse of `engine_flags`."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


def sampling_flags() -> dict[str, Flag]:
    """A flag for each sampling parameter."""
    hints = get_type_hints(SamplingParams)
    return {f.name: dataclasses.replace(_flag(f, hints[f.name], SAMPLING_DEFAULTS.get(f.name, f.default)),
                                        panel="Sampling")
            for f in dataclasses.fields(SamplingParams) if f.name not in _LEFT_OUT}


def _flag(field: dataclasses.Field[Any], hint: Any, default: Any) -> Flag:
    options = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    help_text = str(field.metadata.get("help", ""))
    for kind in (list[str], list[int], bool, int, float, str):
        if kind in options:
            optional = default is None and get_origin(kind) is None
            return Flag(field.name, kind | None if optional or default is None else kind, default, help_text)
    return Flag(field.name, str | None, default, help_text + " As JSON.", is_json=True)


def with_flags(command: Callable[..., None], groups: Mapping[str, Mapping[str, Flag]]) -> Callable[..., None]:
    """Give `command` the flags of each group; it receives what the user set as one dict per group.

    `command(prompt, engine_options, sampling_options)` with groups of those names becomes a function of
    `prompt` and all flags. Values left at their default are not passed on, so that the library's own defaults hold
    (but those of SAMPLING_DEFAULTS, which differ on purpose).
    """
    own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name not in groups]

    def run(**values: Any) -> None:
        for group, flags in groups.items():
            chosen = {name: flag.parse(values.pop(name)) for name, flag in flags.items()}
            values[group] = {name: value for name, value in chosen.items()
                             if value not in (flags[name].default, None) or name in SAMPLING_DEFAULTS}
        command(**values)

    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters = [*own, *(flag.parameter() for flags in groups.values() for flag in flags.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run
