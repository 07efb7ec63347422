"""Build the book: `python -m m0_basics.tools.book [--output FOLDER]`."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from m0_basics.config import ConfigError

from .build import OUTPUT, build


def run(output: Annotated[Path, typer.Option(help="Where the site goes.")] = OUTPUT) -> None:
    """Build the book from the documents and notebooks."""
    typer.echo(f"open {build(output.resolve())}")


if __name__ == "__main__":
    try:
        typer.run(run)
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
