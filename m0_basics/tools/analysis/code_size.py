"""How much there is to read: what each milestone's folder shows, its engine in lines of code, the longest parts.

    python -m m0_basics.tools.analysis.code_size [FOLDER]     another checkout, an older one perhaps, to compare with

Lines of code are lines that hold code: no blank lines, comments or docstrings. The engine is the Python files at the
top of a package; its decode path is what a plain request runs through, without the parts named in BESIDE.
"""
from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parents[3]
NOT_ENGINE = ("__init__", "__main__", "benchmark", "idea")
ROOMS = ("tools", "server", "plugins", "loading", "kernels")
# Parts of an engine beside its decode path: features that a plain request does not meet, and readable twins.
BESIDE = {
    "m2_continuous_batching": ("policies", "structured_output", "async_scheduling"),
    "m3_paged_kv": ("swap",),
    "m4_flash_attn": ("online_softmax", "reference"),
}
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Size:
    """Lines of code of a file or a function."""

    name: str
    lines: int


def code_lines(source: str) -> set[int]:
    """The numbers of the lines of `source` that hold code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - docstrings


def functions(source: str) -> Iterator[Size]:
    """Every function of `source`, with its signature; a function inside another counts for both."""
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Size(node.name, len(lines & set(range(node.lineno, (node.end_lineno or 0) + 1))))


def entries(package: Path) -> list[str]:
    """What a listing of the folder shows, but for the empty `py.typed`, which tells type checkers to look inside."""
    return sorted(entry.name + "/" * entry.is_dir() for entry in package.iterdir()
                  if entry.name not in ("__pycache__", "py.typed") and not entry.name.startswith("."))


def engine_files(package: Path, rooms: Path | None = None) -> list[Path]:
    """The engine's files at the top of the folder.

    `rooms`: the same package in a tree with rooms. What lies in one of its rooms but `kernels` is no engine file of
    `package` either, though it may stand at the top there: older trees kept their tools beside the engine.
    """
    moved = {file.stem for room in ROOMS if room != "kernels" for file in ((rooms or package) / room).rglob("*.py")}
    here = {file.stem for file in (rooms or package).glob("*.py")}
    return [file for file in sorted(package.glob("*.py")) if file.stem not in {*NOT_ENGINE, *(moved - here)}]


def report(root: Path, rooms: Path = HERE) -> str:
    """The text for the milestones in `root`."""
    packages = [file.parent for file in sorted(root.glob("m[0-7]_*/__init__.py"))]
    engines = {package: engine_files(package, rooms / package.name) for package in packages}
    text = []
    for package, files in engines.items():
        sizes = {file.stem: len(code_lines(file.read_text(encoding="utf-8"))) for file in files}
        path = sum(n for name, n in sizes.items() if name not in BESIDE.get(package.name, ()))
        listing = entries(package)
        text.append(f"{package.name}: {len(listing)} entries; engine {sum(sizes.values())} lines of code in "
                    f"{len(sizes)} files, decode path {path}")
        text.append("  " + " ".join(listing))
        text.append("  " + ", ".join(f"{name} {n}" for name, n in sizes.items()))
        text += [f"  {room}/: {_folder_lines(package / room)}" for room in ROOMS if (package / room).is_dir()]
    sources = {file: file.read_text(encoding="utf-8") for files in engines.values() for file in files}
    longest = max((Size(_short(file, root), len(source.splitlines())) for file, source in sources.items()), key=_lines)
    longest_function = max((Size(f"{_short(file, root)}::{function.name}", function.lines)
                            for file, source in sources.items() for function in functions(source)), key=_lines)
    text.append(f"longest engine file: {longest.name}, {longest.lines} lines")
    text.append(f"longest engine function: {longest_function.name}, {longest_function.lines} lines of code")
    return "\n".join(text)


def _folder_lines(folder: Path) -> int:
    return sum(len(code_lines(file.read_text(encoding="utf-8"))) for file in folder.rglob("*.py"))


def _short(file: Path, root: Path) -> str:
    return str(file.relative_to(root))


def _lines(size: Size) -> int:
    return size.lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="the top of a checkout (default: this one)")
    print(report(parser.parse_args().folder.resolve()))


if __name__ == "__main__":
    main()
