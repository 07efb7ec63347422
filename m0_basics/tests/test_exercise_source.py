"""FX.7: a function's body is cut out of a file, and nothing else changes."""
from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m0_basics.config import ConfigError
from m0_basics.tools.exercise.source import (
    Function,
    blank,
    find_function,
    function_text,
    named_functions,
    replace_function,
)

REPO = Path(__file__).parents[2]
SOURCES = sorted(file for folder in REPO.glob("m*_*") for file in folder.rglob("*.py"))
HERE = Path("file.py")


def cut(source: str, symbol: str) -> str:
    data = source.encode()
    return blank(data, find_function(data, symbol, HERE), symbol).decode()


def stub(symbol: str) -> str:
    return f'raise NotImplementedError("exercise: write {symbol}")'


CASES = {
    "a method of a nested class, between its neighbours": ("Outer.Inner.b", '''
        class Outer:
            class Inner:
                def a(self): return 1

                def b(self):
                    """Two."""
                    # Because one is not enough.
                    x = 1
                    return x + 1  # two

                # About c.
                def c(self): return 3
        ''', '''
        class Outer:
            class Inner:
                def a(self): return 1

                def b(self):
                    """Two."""
                    STUB

                # About c.
                def c(self): return 3
        '''),
    "decorators and a signature of several lines stay": ("run", '''
        @functools.cache
        @torch.inference_mode()
        def run(  # noqa: PLR0913
            x: int = (lambda: 1)(),   # a colon: and a (bracket
            *, y: dict[str, int] | None = {"a": 1}["a":2],
        ) -> (
            int
        ):  # the end
            # A comment that explains the solution.
            return x
        z = 1
        ''', '''
        @functools.cache
        @torch.inference_mode()
        def run(  # noqa: PLR0913
            x: int = (lambda: 1)(),   # a colon: and a (bracket
            *, y: dict[str, int] | None = {"a": 1}["a":2],
        ) -> (
            int
        ):  # the end
            STUB
        z = 1
        '''),
    "an async generator": ("A.stream", '''
        class A:
            async def stream(self):
                async for x in self.y:

                    yield x
                # The end of the body.

            # Not the body any more.
        ''', '''
        class A:
            async def stream(self):
                STUB

            # Not the body any more.
        '''),
    "a docstring only": ("f", '''
        def f():
            """One
            two."""  # noqa
        x = 1
        ''', '''
        def f():
            """One
            two."""  # noqa
            STUB
        x = 1
        '''),
    "one line": ("f", '''
        def f(x: int = 1) -> int: return x + 1  # more
        y = 1
        ''', '''
        def f(x: int = 1) -> int: STUB
        y = 1
        '''),
    "one statement on one line and the next": ("f", '''
        def f(): return (1,
                         2)
        y = 1
        ''', '''
        def f(): STUB
        y = 1
        '''),
    "one line with a docstring": ("f", 'def f(): "doc"; x = 1; return x\ny = 1\n', 'def f(): "doc"; STUB\ny = 1\n'),
    "one line, a docstring only": ("f", 'def f(): "doc"\ny = 1\n', 'def f(): "doc"; STUB\ny = 1\n'),
    "a statement behind the docstring": ("f", '''
        def f():
            """doc"""; x = 1
            return x
        ''', '''
        def f():
            """doc"""; STUB
        '''),
    "a function in a function, outer": ("outer", '''
        def outer():
            @cache
            def inner():
                return 1
            return inner
        ''', '''
        def outer():
            STUB
        '''),
    "a function in a function, inner": ("outer.inner", '''
        def outer():
            @cache
            def inner():
                return 1
            # About the rest.
            return inner
        ''', '''
        def outer():
            @cache
            def inner():
                STUB
            # About the rest.
            return inner
        '''),
    "an annotation with a colon of its own": ("f", '''
        def f() -> "a: b":
            return 1
        ''', '''
        def f() -> "a: b":
            STUB
        '''),
    "wide characters before the cut": ("f", '''
        def f(中="中😀") -> "中": x = "中"; return x
        ''', '''
        def f(中="中😀") -> "中": STUB
        '''),
    "no line end at the end": ("f", "def f():\n    return 1", "def f():\n    STUB"),
    "a docstring at the very end": ("f", 'def f():\n    "doc"', 'def f():\n    "doc"\n    STUB'),
    "line ends of Windows": ("f", 'def f():\r\n    "doc"\r\n    return 1\r\ny = 1\r\n',
                             'def f():\r\n    "doc"\r\n    STUB\r\ny = 1\r\n'),
    "tabs, and a form feed that ends no line": ("f", "x = '\f'\ndef f():\n\treturn 1\n",
                                                "x = '\f'\ndef f():\n\tSTUB\n"),
}


@pytest.mark.parametrize("case", CASES)
def test_cut_by_hand(case: str) -> None:
    symbol, before, after = CASES[case]
    before, after = textwrap.dedent(before), textwrap.dedent(after)
    assert cut(before, symbol) == after.replace("STUB", stub(symbol))


def assert_only_the_body_changed(source: bytes, tree: ast.Module, name: str, node: Function) -> None:
    """Cut `node`, the function `name` of `tree` (the tree of `source`), and compare trees and bytes.

    Trees are compared where the function stands, at the top level of the file; the rest by its bytes, further down.
    """
    result = blank(source, node, name)
    new_tree = ast.parse(result)
    assert len(new_tree.body) == len(tree.body)
    index = next(i for i, statement in enumerate(tree.body) if node.lineno <= (statement.end_lineno or 0))
    whole_body, documented = node.body, ast.get_docstring(node, clean=False) is not None
    node.body = whole_body[:documented] + ast.parse(stub(name)).body
    try:
        assert ast.dump(new_tree.body[index]) == ast.dump(tree.body[index])
    finally:
        node.body = whole_body
    # The rest is the file's own bytes, and what was dropped behind the last statement are comments of the body.
    head, _, tail = result.partition(stub(name).encode())
    assert source.startswith(head.rstrip(b" \t\r\n;")) and source.endswith(tail)
    lines = source.splitlines(keepends=True)
    end = len(b"".join(lines[:node.end_lineno - 1])) + node.end_col_offset
    same_line, *below = source[end:len(source) - len(tail)].splitlines() or [b""]
    assert not same_line.strip(b" \t;") or same_line.strip(b" \t;").startswith(b"#")
    for line in below:
        assert not line.strip() or re.match(rb" {%d,}#" % (node.col_offset + 1), line)


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPO)))
def test_every_function_of_the_repository_can_be_cut(path: Path) -> None:
    source = path.read_bytes()
    tree = ast.parse(source)
    for name, node in list(named_functions(tree)):
        assert_only_the_body_changed(source, tree, name, node)


@st.composite
def functions(draw: st.DrawFn, depth: int = 0) -> str:
    """A random function in any layout, perhaps with functions and classes inside."""
    pick = lambda *options: draw(st.sampled_from(options))      # noqa: E731
    decorators = draw(st.lists(st.sampled_from(["@a", "@b.c(x={1: 2})", "@d(\n    1,\n)  # : ("]), max_size=2))
    arguments = pick("", "x: int = 1", "x=lambda y: y", "\n    x: int,  # why: (\n    *y: str,\n", "中: str = '中'")
    returns = pick("", " -> int", " -> (int)", " -> dict[str,\n    int]", ' -> ":"', " -> '中😀'")
    head = f"{pick('def', 'async def')} f({arguments}){returns}:"
    docstring = pick("", '"""Doc: #."""', '"""Two\nlines."""', "'''中''' '''more'''")
    simple = ["return 1", "x = (\n1,\n)", "x = '''\n# no comment\n'''", "pass;", "x = '中'"]
    if draw(st.booleans()):
        body = [docstring] * bool(docstring) + draw(st.lists(st.sampled_from(simple), max_size=2))
        line = head + " " + "; ".join(s.rstrip(";") for s in body or ["pass"]) + pick("", "  # end")
        return "\n".join([*decorators, line]) + "\n"
    statements = draw(st.lists(st.sampled_from([*simple, "# note", "", "if x:\n    # deep\n    return 2"]), max_size=3))
    if depth < 2 and draw(st.booleans()):
        statements.insert(0, draw(functions(depth + 1)).rstrip("\n"))
    if docstring:
        docstring += pick("", "  # after", "; x = 1")
    body_text = "\n".join([docstring] * bool(docstring) + statements + ["return 3"] * draw(st.booleans()))
    if not docstring and all(not s or s.startswith("#") for s in body_text.splitlines()):
        body_text += "\npass"
    head += pick("", "  # head: (")
    return "\n".join(decorators) + "\n" * bool(decorators) + head + "\n" + indent(body_text) + "\n"


def indent(text: str) -> str:
    """Indent by four spaces, but for the inside of strings that span lines."""
    lines, inside, result = text.split("\n"), "", []
    for line in lines:
        result.append(line if inside or not line else "    " + line)
        for quote in ('"""', "'''"):
            if line.count(quote) % 2 and inside in ("", quote):
                inside = "" if inside else quote
    return "\n".join(result)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(parts=st.lists(functions(), min_size=1, max_size=3), in_class=st.booleans(),
       newline=st.sampled_from(["\n", "\r\n"]), final=st.booleans())
def test_any_layout_can_be_cut(parts: list[str], in_class: bool, newline: str, final: bool) -> None:
    text = "\n# between\n".join(parts)
    text = "class A:\n" + indent(text) if in_class else text
    source = (text if final else text.rstrip("\n")).replace("\n", newline).encode()
    tree = ast.parse(source)
    for name, node in list(named_functions(tree)):
        assert_only_the_body_changed(source, tree, name, node)


@settings(max_examples=50, deadline=None)
@given(part=functions(), tail=st.sampled_from(["", "x = 1\n"]))
def test_putting_the_function_back_undoes_the_cut(part: str, tail: str) -> None:
    source = ("y = 0\n" + part + tail).encode()
    node = find_outer(source)
    text = function_text(source, node)
    cut_out = blank(source, node, "f")
    restored = replace_function(cut_out, find_outer(cut_out), text)
    assert ast.dump(ast.parse(restored)) == ast.dump(ast.parse(source))


def find_outer(source: bytes) -> ast.FunctionDef | ast.AsyncFunctionDef:
    return next(node for name, node in named_functions(ast.parse(source)) if name == "f")


def test_symbols_that_name_no_function_or_two() -> None:
    source = b"class A:\n    def f(self): ...\nclass B:\n    def f(self): ...\n    def f(self, x): ...\n"
    with pytest.raises(ConfigError, match=r"file.py has no function 'C\.f'; it has A\.f, B\.f"):
        find_function(source, "C.f", HERE)
    with pytest.raises(ConfigError, match=r"2 functions called B\.f"):
        find_function(source, "B.f", HERE)
    with pytest.raises(ConfigError, match=r"file\.py, line 2 is not valid Python"):
        find_function(b"x = 1\nx = = 1\n", "f", HERE)
