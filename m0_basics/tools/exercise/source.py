"""Cutting a function's body out of a source file, and putting one back, without touching any other byte.

`ast` says where the body lies and the cut is made on the file's own lines: `ast.unparse` would lose comments
and layout. Decorators, signature and docstring stay.

    kept    @decorator / def name(...) -> ...: / "docstring"
    cut     all that follows, comments included; in its place: raise NotImplementedError("exercise: write ...")

Line numbers start at 1, columns are bytes, as in `ast`. Source: UTF-8 bytes, line ends \\n or \\r\\n.
"""
from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from m0_basics.config import ConfigError

Function = ast.FunctionDef | ast.AsyncFunctionDef
MARK = "exercise: write "


def blanks(text: str) -> tuple[str, ...]:
    """The functions whose blank bodies a text of pytest's speaks of, each once."""
    return tuple(dict.fromkeys(re.findall(re.escape(MARK) + r"([\w.]+)", text)))


def parse(source: bytes, path: Path) -> ast.Module:
    """The file's tree. Raises ConfigError with the place of a syntax error."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ConfigError(f"{path}{f', line {line}' if line else ''} is not valid Python: "
                          f"{getattr(error, 'msg', error)}") from error


def named_functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function below `node` with its dotted name: `Class.method`, `Outer.Inner.method`, `outer.inner`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield prefix + child.name, child
        scope = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        yield from named_functions(child, f"{prefix}{child.name}." if scope else prefix)   # type: ignore[attr-defined]


def find_function(source: bytes, symbol: str, path: Path) -> Function:
    """The one function called `symbol`. Raises ConfigError where there is none, or more than one."""
    functions = list(named_functions(parse(source, path)))
    found = [node for name, node in functions if name == symbol]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{path} has {len(found)} functions called {symbol}; an exercise needs exactly one")
    last = symbol.rpartition(".")[2]
    close = [name for name, _ in functions if name.rpartition(".")[2] == last]
    raise ConfigError(f"{path} has no function {symbol!r}" + (f"; it has {', '.join(close)}" if close else ""))


def function_lines(node: Function) -> tuple[int, int]:
    """First line (its decorators') and last line of a function."""
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno or node.lineno


def function_text(source: bytes, node: Function) -> bytes:
    """The lines of a function, from its first decorator to its last statement."""
    first, last = function_lines(node)
    return b"".join(source.splitlines(keepends=True)[first - 1:last])


def blank(source: bytes, node: Function, symbol: str) -> bytes:
    """`source` with the body of `node` replaced by a NotImplementedError that names `symbol`."""
    lines = source.splitlines(keepends=True)
    newline = b"\r\n" if lines[node.lineno - 1].endswith(b"\r\n") else b"\n"
    statement = f'raise NotImplementedError("{MARK}{symbol}")'.encode()
    has_docstring = ast.get_docstring(node, clean=False) is not None
    rest = node.body[1:] if has_docstring else node.body
    kept_to = _end(node.body[0]) if has_docstring else _colon_line(source, node)
    first, last = node.body[0], node.body[-1]
    head, tail = lines[:kept_to], lines[_end(last):]

    if rest and rest[0].lineno == kept_to:          # on one line: `def f(x): return x`, or `"doc"; return x`
        head[-1] = head[-1][:rest[0].col_offset] + statement + newline
    elif first.lineno == _colon_line(source, node):     # nothing but a docstring, on the line of the signature
        head[-1] = head[-1].rstrip(b"\r\n")[:first.end_col_offset] + b"; " + statement + newline
    else:
        indent = lines[first.lineno - 1][:first.col_offset]
        if rest:                                    # comments after the last statement belong to the body
            tail = tail[_trailing_comments(tail, indent):]
        elif not head[-1].endswith(b"\n"):          # the docstring ends a file without a last line end
            head[-1] += newline
        head.append(indent + statement + newline)
    if not source.endswith(b"\n") and not tail:
        head[-1] = head[-1].rstrip(b"\r\n")
    return b"".join(head + tail)


def replace_function(source: bytes, node: Function, text: bytes) -> bytes:
    """`source` with the lines of `node` replaced by `text`, the lines of another function."""
    lines = source.splitlines(keepends=True)
    first, last = function_lines(node)
    if not text.endswith(b"\n") and last < len(lines):
        text += b"\n"
    return b"".join([*lines[:first - 1], text, *lines[last:]])


def _end(statement: ast.stmt) -> int:
    assert statement.end_lineno is not None         # ast.parse always fills it
    return statement.end_lineno


def _colon_line(source: bytes, node: Function) -> int:
    """The line of the colon that ends the signature: the first one outside brackets, after any return type."""
    lines = [line.decode() for line in source.splitlines(keepends=True)[node.lineno - 1:]]
    start = (1, 0)
    if node.returns is not None:
        row = (node.returns.end_lineno or node.lineno) - node.lineno
        # Tokens count columns in characters, ast in bytes.
        start = (row + 1, len(lines[row].encode()[:node.returns.end_col_offset].decode()))
    depth = 0
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type != tokenize.OP or token.start < start:
            continue
        depth += (token.string in "([{") - (token.string in ")]}")      # below 0 after `-> (int)`, whose end is inside
        if token.string == ":" and depth <= 0:
            return node.lineno + token.start[0] - 1
    raise AssertionError("a function without a colon does not parse")


def _trailing_comments(lines: list[bytes], indent: bytes) -> int:
    """How many of `lines` are still the body's: comments at its indentation, and blank lines before one."""
    count = 0
    for i, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith(indent + b"#"):
            break
        if line.strip():
            count = i
    return count
