"""Chat templates: the Jinja dialect of Hugging Face, rendered in a sandbox and within a budget.

A template is a program that came with a model. Jinja's sandbox keeps it away from Python; it does not keep it from
running for ever or from filling the memory, so loops, calls and growing texts are counted here.
"""
from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2 import pass_environment

_MAX_SECONDS = 3.0
_MAX_CHARS = 16 << 20                   # of one text: several times what any context takes
_MAX_NUMBER = 1 << 53                   # exact in JSON; a power beyond it is a way to fill the memory


@lru_cache(maxsize=16)
def compile_template(source: str) -> Callable[..., str]:
    """A function from the template's variables to its text. Raises jinja2.TemplateError for what does not compile."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True,
                               extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters.update({name: _bounded(name, method) for name, method in environment.filters.items()})
    environment.filters["_counted"] = _counted
    environment.filters["_joined"] = _joined
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    for name in ("lipsum", "cycler"):               # of no use in a prompt, and without a limit
        environment.globals.pop(name)
    template = environment.from_string(source)

    def render(**variables: Any) -> str:
        environment.clock.deadline = time.monotonic() + _MAX_SECONDS
        pieces, length = [], 0
        for piece in template.generate(**variables):
            environment.tick()
            length += len(piece)
            if length > _MAX_CHARS:
                raise jinja2.TemplateError(f"its text exceeds {_MAX_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)

    return render


class _Clock(threading.local):
    """When the rendering of this thread has to end: a server renders in several."""

    deadline = float("inf")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a clock that loops and calls look at, and a limit to what an operator may make."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    clock = _Clock()

    def tick(self) -> None:
        if time.monotonic() > self.clock.deadline:
            raise jinja2.TemplateError(f"it takes more than {_MAX_SECONDS:g} s")

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:      # every call, macros' too
        self.tick()
        _check_numbers(*args, *kwargs.values())
        if getattr(obj, "__name__", "") in ("replace", "join") and isinstance(getattr(obj, "__self__", None), str):
            _check_growth(obj.__self__, args)
        return _check_size(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "**":
            _check_size(abs(left) ** min(abs(right), 64) if isinstance(left, int) and isinstance(right, int) else 0)
        elif operator == "*":
            for text, number in ((left, right), (right, left)):
                if isinstance(number, int) and isinstance(text, (str, list, tuple)):
                    _check_size(range(max(0, number) * len(text)))
        elif operator == "%" and isinstance(left, str):
            _check_numbers(*map(int, _digits(left)), *(right if isinstance(right, tuple) else [right]))
        return _check_size(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filter(loop.iter, "_counted")
        return _without_concat(tree)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: marks what the assistant wrote, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filter(node: Any, name: str) -> Any:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _without_concat(node: Any) -> Any:
    """`a ~ b` becomes a filter over [a, b]: the operator itself has no hook."""
    for field, value in node.iter_fields():
        if isinstance(value, jinja2.nodes.Node):
            setattr(node, field, _without_concat(value))
        elif isinstance(value, list):
            setattr(node, field, [_without_concat(v) if isinstance(v, jinja2.nodes.Node) else v for v in value])
    if isinstance(node, jinja2.nodes.Concat):
        return _filter(jinja2.nodes.List(node.nodes, lineno=node.lineno), "_joined")
    return node


def _bounded(name: str, method: Any) -> Any:
    """A filter that is given no huge numbers and makes no huge text."""
    @wraps(method)                      # with the marks that say what else Jinja passes
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(*args[1:], *kwargs.values())
        if name in ("replace", "join"):
            for text in args:
                if isinstance(text, str):
                    _check_growth(text, args)
        return _check_size(method(*args, **kwargs))

    return call


@pass_environment
def _counted(environment: _Environment, items: Iterable[Any]) -> Any:
    """The items of a loop, with a look at the clock for each. A list keeps its length, which `loop.length` asks for."""
    if hasattr(items, "__len__"):
        return _Counted(environment, items)
    return iter(_Counted(environment, items))


class _Counted:
    def __init__(self, environment: _Environment, items: Any) -> None:
        self._environment, self._items = environment, items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._environment.tick()
            yield item


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(range(sum(map(len, texts))))
    return "".join(texts)


def _check_size(value: Any) -> Any:
    """`value`, unless it is a text or a list (or stands for the length of one) that nothing needs."""
    if isinstance(value, (str, list, tuple, range)) and len(value) > _MAX_CHARS:
        raise jinja2.TemplateError(f"a text or a list in it exceeds {_MAX_CHARS} items")
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise jinja2.TemplateError(f"a number in it exceeds {_MAX_NUMBER}")
    return value


def _check_numbers(*values: Any) -> None:
    """A width, a count: `ljust(10 ** 9)` makes a gigabyte."""
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_CHARS:
            raise jinja2.TemplateError(f"a number in it exceeds {_MAX_CHARS}")


def _check_growth(text: str, args: tuple[Any, ...]) -> None:
    """`replace` and `join` multiply lengths."""
    for other in args:
        if isinstance(other, (str, list, tuple)) and (len(text) + 1) * (len(other) + 1) > 16 * _MAX_CHARS:
            raise jinja2.TemplateError("replace or join in it multiplies long texts")


def _digits(form: str) -> list[str]:
    return "".join(c if c.isdecimal() and c.isascii() else " " for c in form).split()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
