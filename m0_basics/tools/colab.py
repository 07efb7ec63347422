"""Where the notebooks come from: the address that `Open in Colab` leads to, and that Colab installs the lab from.

The notebooks cannot know it before the repository has one. Write it into all of them with

    python -m m0_basics.tools.colab https://github.com/OWNER/NAME

Sources and executed notebooks are changed alike, so nothing has to run again. Without an address the link leads to
Colab's own dialogue for opening a notebook from GitHub, and the first cell asks for the address.
"""
from __future__ import annotations

import re
import sys
from pathlib import Path

import typer

from m0_basics.config import ConfigError, reject

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
COLAB = "https://colab.research.google.com/github/"
_ADDRESS = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")
_LINK = re.compile(r"(?<=\[Open in Colab\]\()" + re.escape(COLAB) + r"[^)\s]*(?=\))")
VARIABLE = re.compile(r'(?<=REPOSITORY = )(\\?")[^"\\]*\\?"')


def write_address(address: str, folder: Path = NOTEBOOKS, branch: str = "main") -> list[Path]:
    """Write the repository's address into all notebooks of a folder; "" takes it out. Returns what was changed."""
    match = _ADDRESS.fullmatch(address)
    if address and match is None:
        raise reject("address", address, "https://github.com/OWNER/NAME")
    name = match[1] if match else ""
    changed = []
    for file in sorted([*folder.glob("*.py"), *folder.glob("*.ipynb")]):
        old = file.read_text(encoding="utf-8")
        link = f"{COLAB}{name}/blob/{branch}/notebooks/{file.stem}.ipynb" if name else COLAB
        home = f"https://github.com/{name}" if name else ""
        new = VARIABLE.sub(rf"\g<1>{home}\g<1>", _LINK.sub(link, old))
        if new != old:
            file.write_text(new, encoding="utf-8")
            changed.append(file)
    return changed


def main(address: str, branch: str = "main") -> None:
    """Write the address of the repository, https://github.com/OWNER/NAME, into all notebooks; "" takes it out."""
    try:
        changed = write_address(address, branch=branch)
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    for file in changed:
        typer.echo(f"notebooks/{file.name}")


if __name__ == "__main__":
    typer.run(main)
