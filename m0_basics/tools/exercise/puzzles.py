"""What a milestone's exercises say beyond its table: statements, hints, how long an answer is, and planted bugs.

    tools/puzzles.toml      [hints]         "model.py::RMSNorm.forward" = ["an idea"]
                            [statements]    "model.py::RMSNorm.forward" = "what the docstring leaves open"
                            [examples]      "model.py::RMSNorm.forward" = "regular expression: what a call should show"
                            [[bug]]         title, symptom, file, find, replace, tests, why; command, which shows it

The first hint is an idea in words. The last one is the milestone's own function with what matters cut out.
"""
from __future__ import annotations

import ast
import textwrap
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m0_basics.config import ConfigError

from .source import find_function, function_text

FILE = "tools/puzzles.toml"


@dataclass(frozen=True)
class Bug:
    """A known bug to be found: in `file`, the text `find` becomes `replace`; `tests` notice, `why` explains it.

    `command` (`python -m ...`) shows the symptom; "" where nothing does that is done in a minute.
    """

    title: str
    symptom: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    why: str
    command: str = ""


@dataclass(frozen=True)
class Puzzles:
    """The contents of the file."""

    hints: dict[str, list[str]] = field(default_factory=dict)           # exercise's name -> ideas in words
    statements: dict[str, str] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)              # exercise's name -> regular expression
    bugs: tuple[Bug, ...] = ()


def read_puzzles(folder: Path) -> Puzzles:
    """The puzzles of a milestone; empty where it has no file. Raises ConfigError for a damaged one."""
    file = folder / FILE
    if not file.is_file():
        return Puzzles()
    try:
        data: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        bugs = tuple(Bug(**{**bug, "tests": tuple(bug["tests"])}) for bug in data.get("bug", []))
    except (tomllib.TOMLDecodeError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} is not valid: {error}; allowed: [hints], [statements], [examples], and [[bug]] "
                          "with title, symptom, file, find, replace, tests, why, command") from error
    return Puzzles(data.get("hints", {}), data.get("statements", {}), data.get("examples", {}), bugs)


def expected_lines(source: bytes, symbol: str, path: Path) -> int:
    """Lines of code in a function's body: without docstring, comments and blank lines."""
    node = find_function(source, symbol, path)
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    lines = source.decode().splitlines()
    if not body:
        return 0
    first, last = body[0].lineno, body[-1].end_lineno or body[-1].lineno
    return sum(bool(text := line.strip()) and not text.startswith("#") for line in lines[first - 1:last])


def docstring(source: bytes, symbol: str, path: Path) -> str:
    """A function's docstring, or ""."""
    return ast.get_docstring(find_function(source, symbol, path)) or ""


def class_docstring(source: bytes, symbol: str) -> str:
    """The docstring of the class that a method belongs to, introduced by the class's name; "" of a function."""
    path, scope = symbol.split(".")[:-1], ast.parse(source).body
    text = ""
    for name in path:
        node = next((n for n in scope if isinstance(n, ast.ClassDef) and n.name == name), None)
        if node is None:
            return ""
        scope, text = node.body, ast.get_docstring(node) or ""
    return f"class {path[-1]}: {text}" if text else ""


def base_docstring(path: Path, symbol: str) -> str:
    """What a base class says of a method, introduced by its name; "" where none does.

    Bases are looked up by their names in the file, and in the files that it imports them from.
    """
    owner, _, method = symbol.rpartition(".")
    for base_path, base in _bases(path, owner) if owner else ():
        for node in base.body:
            named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == method
            if named and (text := ast.get_docstring(node)):     # type: ignore[arg-type]
                return f"{base.name}.{method}: {text}"
        if text := base_docstring(base_path, f"{base.name}.{method}"):
            return text
    return ""


def _bases(path: Path, name: str) -> list[tuple[Path, ast.ClassDef]]:
    """The base classes of a class of a file, each with the file that it stands in. Standard library's are left out."""
    tree = ast.parse(path.read_bytes())
    own = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    found = [_find_class(path, base.id) for base in own.bases if isinstance(base, ast.Name)] if own else []
    return [f for f in found if f is not None]


def _find_class(path: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    tree = ast.parse(path.read_bytes())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom):
            alias = next((a for a in node.names if (a.asname or a.name) == name), None)
            file = _module_file(path, node) if alias else None
            if alias and file:
                return _find_class(file, alias.name)
    return None


def _module_file(path: Path, node: ast.ImportFrom) -> Path | None:
    """The file that `from module import ...` in `path` reads, if it lies in the lab."""
    folder = path.parents[node.level - 1] if node.level else _root(path)
    place = folder.joinpath(*(node.module or "").split("."))
    return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if node.module and f.is_file()), None)


def _root(path: Path) -> Path:
    """The folder that holds the package of a file."""
    return next(folder for folder in path.parents if not (folder / "__init__.py").is_file())


def signature(source: bytes, symbol: str, path: Path) -> str:
    """`def name(...) -> ...:` of a function."""
    node = find_function(source, symbol, path)
    text = textwrap.dedent(function_text(source, node).decode())
    tree = ast.parse(text).body[0]
    assert isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
    kind = "async def" if isinstance(tree, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(tree.returns)}" if tree.returns else ""
    return f"{kind} {tree.name}({ast.unparse(tree.args)}){returns}"


def skeleton(source: bytes, symbol: str, path: Path) -> str:
    """A function with its expressions cut out: `____` stands for what is to be thought of."""
    text = textwrap.dedent(function_text(source, find_function(source, symbol, path)).decode())
    tree = ast.parse(text)
    node = tree.body[0]
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
        del node.body[0]
    node.decorator_list = []
    return ast.unparse(ast.fix_missing_locations(_Cut().visit(node)))


class _Cut(ast.NodeTransformer):
    """Names that are bound, and the flow of control, stay; what is computed goes."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        node.value = _cut(node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        node.value = _cut(node.value)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = _cut(node.value)
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is not None:
            node.value = _cut(node.value)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        node.value = _cut(node.value)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        node.test = _cut(node.test)
        return node

    def visit_While(self, node: ast.While) -> ast.AST:
        self.generic_visit(node)
        node.test = _cut(node.test)
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        node.iter = _cut(node.iter)
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return node


def _cut(node: ast.expr) -> ast.expr:
    """A call keeps the name of what is called; a constant or a name stays; anything else is a blank."""
    if isinstance(node, (ast.Constant, ast.Name)):
        return node
    if isinstance(node, ast.Call):
        if not (node.args or node.keywords):
            return _BLANK
        arguments: list[ast.expr] = [_BLANK]
        return ast.Call(node.func if _is_name(node.func) else _BLANK, arguments, [])
    if isinstance(node, ast.Tuple):
        return ast.Tuple([_cut(element) for element in node.elts], ast.Load())
    return _BLANK


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_name(node.value))


_BLANK = ast.Name("____", ast.Load())
