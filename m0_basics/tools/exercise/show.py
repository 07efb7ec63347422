"""What a learner sees: tensors with shape and numbers, objects with their fields, all of it short; text that fits."""
from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Mapping
from enum import Enum
from typing import Any

_MOST_NUMBERS, _LONGEST, _DEEPEST = 24, 420, 3


def show_call(signature: inspect.Signature, before: Any, after: Any, result: Any) -> str:
    """The arguments of a call, one a line; with `after`, also what it returned, and which arguments it changed."""
    args, kwargs = before
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    width = max((len(name) for name in arguments), default=0)
    lines = [f"{name:<{width}} = {show_value(value)}" for name, value in arguments.items()]
    if after is not None:
        lines.append(f"returns {show_value(result)}")
        later = dict(signature.bind(*after[0], **after[1]).arguments)
        lines += [f"{name} afterwards: {_changed(later[name], arguments[name], where)}"
                  for name in arguments if (where := differs(later[name], arguments[name]))]
    return "\n".join(lines)


def _changed(later: Any, before: Any, where: str) -> str:
    """A value that was changed; only where, if that cannot be seen from what is shown of it."""
    text = show_value(later)
    return text if text != show_value(before) else where


def show_value(value: Any, depth: int = 0) -> str:
    """One line, or a few for a tensor."""
    text = _show(value, depth)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _show(value: Any, depth: int) -> str:
    if _is_tensor(value):
        return _show_tensor(value)
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, bytes) and len(value) > 12:
        return f"b'{value[:4].hex()}...'"
    if value is None or isinstance(value, (bool, int, float, str, bytes, range)):
        return repr(value)
    if depth >= _DEEPEST:
        return f"{type(value).__name__}(...)"
    if isinstance(value, Mapping):
        pairs = [(show_value(k, depth + 1), show_value(v, depth + 1)) for k, v in list(value.items())[:8]]
        inside = ", ".join(f"{key}: {text}" for key, text in pairs)
        return f"{{{inside}{', ...' if len(value) > 8 else ''}}}"
    if isinstance(value, (list, tuple, set, frozenset)):
        inside = ", ".join(show_value(v, depth + 1) for v in list(value)[:12])
        brackets = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
        return f"{brackets[0]}{inside}{', ...' if len(value) > 12 else ''}{brackets[1]}"
    if fields := _fields(value):
        inside = ", ".join(f"{name}={show_value(v, depth + 1)}" for name, v in list(fields.items())[:8])
        return f"{type(value).__name__}({inside}{', ...' if len(fields) > 8 else ''})"
    if callable(value):
        return f"<{getattr(value, '__qualname__', type(value).__name__)}>"
    return repr(value)


def _show_tensor(value: Any) -> str:
    shape = ", ".join(map(str, value.shape))
    kind = str(value.dtype).removeprefix("torch.")
    count = math.prod(value.shape)
    if count == 0:
        return f"{kind} [{shape}]"
    if count > _MOST_NUMBERS:
        flat = value.reshape(-1)[:6].tolist()
        return f"{kind} [{shape}]: {', '.join(map(_number, flat))}, ..."
    return f"{kind} [{shape}]: {_numbers(value.tolist())}"


def _numbers(value: Any) -> str:
    return f"[{', '.join(map(_numbers, value))}]" if isinstance(value, list) else _number(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def differs(a: Any, b: Any, depth: int = 0) -> str:
    """Where two values first differ, in words; "" where they do not."""
    if a is b:
        return ""
    if _is_tensor(a) or _is_tensor(b):
        return _tensors_differ(a, b)
    if type(a) is not type(b):
        both_numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
        if not both_numbers or isinstance(a, bool) != isinstance(b, bool):
            return f"{_kind(a)} instead of {_kind(b)}"
    if isinstance(a, float):
        same = math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b))
        return "" if same else f"{a!r} instead of {b!r}"
    if isinstance(a, (str, bytes, int, range, Enum)) or a is None:
        return "" if a == b else f"{show_value(a)} instead of {show_value(b)}"
    if depth > 6:
        return ""
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{len(a)} elements instead of {len(b)}"
        parts = [(f"[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, Mapping):
        if set(map(repr, a)) != set(map(repr, b)):
            return f"keys {show_value(list(a))} instead of {show_value(list(b))}"
        parts = [(f"[{show_value(k)}]", a[k], b[k]) for k in a if k in b]
    elif isinstance(a, (set, frozenset)):
        return "" if len(a) == len(b) and set(map(repr, a)) == set(map(repr, b)) else (
            f"{show_value(a)} instead of {show_value(b)}")
    elif hasattr(a, "error"):                                   # both raised: of the same kind is enough
        return "" if type(a.error) is type(b.error) else f"{a!r} instead of {b!r}"
    else:
        mine, right = _fields(a), _fields(b)
        parts = [(f".{name}", mine[name], right.get(name)) for name in mine]
    for name, x, y in parts:
        if where := differs(x, y, depth + 1):
            return f"{name}{'' if where[0] in '[.' else ': '}{where}"
    return ""


def _tensors_differ(a: Any, b: Any) -> str:
    if not (_is_tensor(a) and _is_tensor(b)):
        return f"{_kind(a)} instead of {_kind(b)}"
    if tuple(a.shape) != tuple(b.shape):
        return f"shape {list(a.shape)} instead of {list(b.shape)}"
    if a.dtype != b.dtype:
        return f"{a.dtype} instead of {b.dtype}"
    x, y = _as_numpy(a), _as_numpy(b)
    import numpy as np
    coarse = any(kind in str(a.dtype) for kind in ("16", "8"))
    wrong = ~np.isclose(x, y, rtol=1e-2 if coarse else 1e-4, atol=1e-3 if coarse else 1e-6, equal_nan=True)
    if not wrong.any():
        return ""
    place = tuple(int(i[0]) for i in np.nonzero(wrong)) if wrong.ndim else ()
    return (f"[{', '.join(map(str, place))}] {_number(x[place].item())} instead of {_number(y[place].item())}; "
            f"{int(wrong.sum())} of {wrong.size} numbers differ")


def _as_numpy(value: Any) -> Any:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    return value


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "tolist")


def _kind(value: Any) -> str:
    return show_value(value) if value is None or isinstance(value, (int, float, str)) else (
        repr(value) if hasattr(value, "error") else type(value).__name__)


def _fields(value: Any) -> dict[str, Any]:
    """The fields of an object: of a module of torch, its parameters and buffers too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        own = {k: v for k, v in vars(value).items() if not k.startswith("_") and k != "training"}
        return own | dict(value.named_parameters(recurse=False)) | dict(value.named_buffers(recurse=False))
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {name: getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)}
    return found | dict(getattr(value, "__dict__", {}))


def filled(paragraph: str, width: int, indent: str = "  ") -> str:
    """A paragraph, or a list, in lines of a width; one that is laid out by hand as it is."""
    items = list[list[str]]()
    for line in paragraph.splitlines():
        hanging, indented = len(_item(items[-1][0])) if items else 0, len(line) - len(line.lstrip(" "))
        if items and not _item(line) and indented == hanging:
            items[-1].append(line)
        elif indented and items:
            return textwrap.indent(paragraph, indent)
        else:
            items.append([line])
    if any(item[0].startswith(("  ", "|")) for item in items):
        return textwrap.indent(paragraph, indent)
    return "\n".join(textwrap.fill(" ".join(map(str.strip, item)), width, initial_indent=indent,
                                   subsequent_indent=indent + " " * len(_item(item[0]))) for item in items)


def filled_signature(text: str, width: int) -> str:
    """`def name(...)` in lines of a width, the arguments below each other."""
    return textwrap.fill(text, width, subsequent_indent=" " * (text.index("(") + 1), break_long_words=False,
                         break_on_hyphens=False)


def _item(line: str) -> str:
    """The bullet or number that begins an item of a list, with its spaces; "" where none does."""
    found = re.match(r"(?:-|\d+\.) +", line)
    return found[0] if found else ""


__all__ = ["differs", "filled", "filled_signature", "show_call", "show_value"]
