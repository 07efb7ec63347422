"""Chat templates: the Jinja dialect of Hugging Face, rendered in a sandbox and within a budget.

A template is a program that came with a model. Jinja's sandbox keeps it away from Python; it does not keep it from
running for ever or from filling the memory, so loops, calls, growing texts and nested lists are counted here.
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
from jinja2 import pass_environment, pass_eval_context
from jinja2.filters import sync_do_join
from jinja2.runtime import Macro
from jinja2.utils import Namespace

_MAX_SECONDS = 3.0
_MAX_CHARS = 16 << 20                   # of one text: several times what any context takes
_MAX_ITEMS = 1 << 18                    # of a list and of all the lists in it: five times what a body may hold
_MAX_NUMBER = 1 << 53                   # exact in JSON; a power beyond it is a way to fill the memory
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
# Filters that do not look at the items of what they are given: some templates ask for a length in each loop.
_SHALLOW = frozenset({"attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map",
                      "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice"})


@lru_cache(maxsize=16)
def compile_template(source: str) -> Callable[..., str]:
    """A function from the template's variables to its text. Raises jinja2.TemplateError for what does not compile."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True,
                               extensions=[_Generation, jinja2.ext.loopcontrols], finalize=_check_items)
    environment.filters.update(tojson=_to_json, replace=_replace, join=_join)
    environment.filters.update({name: _bounded(name, method) for name, method in environment.filters.items()})
    environment.filters["_counted"] = _counted
    environment.filters["_joined"] = _joined
    environment.filters["_literal"] = _check_items
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
        method = getattr(obj, "__wrapped__", obj)           # the sandbox wraps `format`
        if isinstance(text := getattr(method, "__self__", None), str):
            args = _check_method(method.__name__, text, args, kwargs)
        elif isinstance(obj, Macro) and (obj.catch_varargs or obj.catch_kwargs):
            _check_items([args, kwargs])
        return _check_items(_check_size(super().call(context, obj, *args, **kwargs)))

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
            _check_product(left.count("%"), _num_chars(right))
        return _check_items(_check_size(super().call_binop(context, operator, left, right)))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filter(loop.iter, "_counted")
        return _replace_nodes(tree)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: marks what the assistant wrote, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filter(node: Any, name: str) -> Any:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _replace_nodes(node: Any) -> Any:
    """Filters where Jinja has no hook: `a ~ b` becomes one over [a, b], and a list that is written out is counted."""
    for field, value in node.iter_fields():
        if isinstance(value, jinja2.nodes.Node):
            setattr(node, field, _replace_nodes(value))
        elif isinstance(value, list):
            setattr(node, field, [_replace_nodes(v) if isinstance(v, jinja2.nodes.Node) else v for v in value])
    if isinstance(node, jinja2.nodes.Concat):
        return _filter(jinja2.nodes.List(node.nodes, lineno=node.lineno), "_joined")
    if (isinstance(node, (jinja2.nodes.List, jinja2.nodes.Tuple, jinja2.nodes.Dict))
            and getattr(node, "ctx", "load") == "load"          # others are targets, such as `a, b` of a loop
            and not all(isinstance(child, jinja2.nodes.Const) for child in node.iter_child_nodes())):
        return _filter(node, "_literal")
    return node


def _bounded(name: str, method: Any) -> Any:
    """A filter that is given no huge numbers and lists, and makes no huge text."""
    @wraps(method)                      # with the marks that say what else Jinja passes
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(*args[1:], *kwargs.values())
        if name not in _SHALLOW:
            _check_items([args, kwargs])
        if name == "format":
            _check_product(str(args[0]).count("%"), _num_chars([args[1:], kwargs]))
        return _check_items(_check_size(method(*args, **kwargs)))

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
    texts = [str(part) for part in _check_items(parts)]
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


def _check_method(name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments for a method of a text, where they do not make it huge."""
    if name == "join" and len(args) == 1 and not isinstance(args[0], str):
        args = (list(args[0]),)             # also what can be read once only
    num_chars = _num_chars([args, kwargs])
    if name == "replace":
        _check_replace(text, *args[:2])
    elif name == "join" and args:
        _check_product(len(args[0]), len(text))
    elif name in ("format", "format_map"):
        _check_product(text.count("{"), num_chars)
    return args


def _check_replace(text: str, old: Any = None, new: Any = "") -> None:
    """What is found counts, as often as it is found, and not how long the text is."""
    if isinstance(old, str) and isinstance(new, str):
        _check_product(text.count(old), len(new))


def _check_product(count: int, size: int) -> None:
    """Putting something of `size` characters in `count` places."""
    if count * size > _MAX_CHARS:
        raise jinja2.TemplateError(f"replacing, joining or formatting in it makes more than {_MAX_CHARS} characters")


def _check_items(value: Any) -> Any:
    """`value`, unless writing or comparing it takes long."""
    _num_chars(value)
    return value


def _num_chars(value: Any) -> int:
    """Characters of the texts in a value, where an item counts each time that it is met.

    A list may hold one list twice, which holds another one twice: few objects, and an endless text. So the walk stops.
    """
    if isinstance(value, (str, int, float)) or value is None:       # nearly always
        return len(value) if isinstance(value, str) else 1
    num_items, num_chars = 0, 0
    waiting: list[Any] = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (str, bytes)):
            num_chars += len(item)
            continue
        if isinstance(item, Namespace):
            item = item._Namespace__attrs       # what its text shows
        if isinstance(item, dict):
            waiting += item
            item = item.values()
        if not isinstance(item, (list, tuple, set, frozenset, *_VIEWS)):
            continue
        items: Any = item
        num_items += len(items)
        if num_items > _MAX_ITEMS:
            break
        waiting += items
    if num_items > _MAX_ITEMS or num_chars > _MAX_CHARS:
        raise jinja2.TemplateError(f"a list in it, with the lists in that, exceeds {_MAX_ITEMS} items or {_MAX_CHARS} "
                                   "characters")
    return num_items + num_chars


def _digits(form: str) -> list[str]:
    return "".join(c if c.isdecimal() and c.isascii() else " " for c in form).split()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(_check_items(message))


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Jinja's, which replaces in the text of anything."""
    text, old, new = str(s), str(old), str(new)
    _check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


@pass_eval_context
def _join(context: Any, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    """Jinja's, over items that are there."""
    items = value if isinstance(value, str) else list(value)
    _check_items(items)
    _check_product(len(items), len(str(d)))
    return sync_do_join(context, items, d, attribute)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
