"""Check documents, or bring them up to date.

    python -m m0_basics.tools.documents check  m3_paged_kv README.md     numbers, code, links to code, tidiness
    python -m m0_basics.tools.documents update m3_paged_kv               rewrite the numbers whose facts have changed
    python -m m0_basics.tools.documents tidy   m3_paged_kv               fold answers, move markers beside the text

A path is a document, or a folder with documents. To quote a number, write `16<!-- fact: block.size -->` and tidy.
"""
from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from m0_basics.config import ConfigError, reject

from .checks import check_code_references, check_document, update_document
from .factbook import Fact
from .interview import check_interview
from .quotes import lost_quotes
from .tidy import is_interview, tidy, untidy

ROOT = Path(__file__).parents[3]
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
_Paths = Annotated[list[Path], typer.Argument(help="Documents, or folders of documents.", show_default=False)]


@app.command()
def check(paths: _Paths) -> None:
    """Name every number that is not its fact, code that does not exist, and what is not tidy."""
    problems = []
    for document in documents(paths):
        problems += check_document(document, facts_of(document)) + check_code_references(document, ROOT)
        problems += untidy(document) + (check_interview(document) if is_interview(document) else [])
    for problem in problems:
        typer.echo(problem)
    raise typer.Exit(bool(problems))


@app.command()
def update(paths: _Paths) -> None:
    """Rewrite the numbers whose facts have changed. Read the sentences around them: prose does not update itself."""
    for document in documents(paths):
        typer.echo(f"{document}: {update_document(document, facts_of(document))} numbers rewritten")


@app.command("tidy")
def tidy_documents(paths: _Paths, drop: Annotated[bool, typer.Option(
        "--drop", help="Forget quotes whose words or number are no longer in the text.")] = False) -> None:
    """Fold the answers of interview documents, and move the markers of numbers beside the text."""
    for document in documents(paths):
        if (lost := lost_quotes(document)) and not drop:
            raise ConfigError(f"{document} has lost the places of {', '.join(q.fact for q in lost)}; allowed: mend the "
                              "text, or --drop, which forgets them")
        typer.echo(f"{document}: {'tidied' if tidy(document) else 'is tidy'}")


def documents(paths: Iterable[Path]) -> list[Path]:
    """The Markdown files that are meant. Raises ConfigError for a path that is none and holds none."""
    found: list[Path] = []
    for path in paths:
        files = sorted(path.glob("*.md")) if path.is_dir() else [path] if path.suffix == ".md" else []
        if not files or not all(file.is_file() for file in files):
            raise reject("paths", str(path), "Markdown files, and folders that hold some")
        found += [file.resolve() for file in files]
    return found


def facts_of(document: Path) -> dict[str, Fact]:
    """The facts that a document may quote: those of its package; none for a document that is in no package."""
    package = document.parent.name
    if document.parent.parent != ROOT or importlib.util.find_spec(package) is None:
        return {}
    for module in (f"{package}.tools.facts", f"{package}.facts"):
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if spec is not None:
            facts: dict[str, Fact] = importlib.import_module(module).FACTS.all()
            return facts
    return {}


if __name__ == "__main__":
    try:
        app(prog_name="python -m m0_basics.tools.documents")
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
