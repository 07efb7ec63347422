"""Race all milestones: one prompt, then eight at once; the same model, the same time, each with the machine to itself.

    python -m m0_basics.tools.race                          some fifty seconds
    python -m m0_basics.tools.race --picture demo.svg       also as an animated picture
"""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from m0_basics.config import ConfigError, reject

from .board import Board, Lane
from .picture import animated_svg
from .runner import PROMPT, milestones, race

_BUSY = 0.25                    # from this share on the race is not what it would be alone


def run(only: Annotated[list[str] | None, typer.Option(help="Only this milestone; may be repeated.")] = None,
        seconds: Annotated[float, typer.Option(help="For each engine and heat.", min=0.1)] = 2.0,
        model: Annotated[str | None, typer.Option(help="Another model (default: the lab's own).")] = None,
        picture: Annotated[Path | None, typer.Option(help="Write the race there, as an animated SVG.")] = None) -> None:
    """Race all milestones."""
    packages = milestones()
    if unknown := set(only or ()) - set(packages):
        raise reject("only", sorted(unknown), ", ".join(packages))
    packages = [p for p in packages if not only or p in only]
    board = Board([Lane(f"{p[:2]} {p[3:].replace('_', ' ')}") for p in packages])
    options = {"model": model} if model else {}
    console = Console()
    # The whole race, for terminals of any size; where there is none, a line for each engine.
    console.print(f'the prompt: "{PROMPT}"', soft_wrap=True, highlight=False)
    if (share := busy_share()) > _BUSY:
        console.print(f"other programs use {share:.0%} of this machine. Engines whose threads wait for each other "
                      "suffer most, so the order may be wrong: race again when it is quiet", style="yellow",
                      soft_wrap=True, highlight=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            for lane, package in zip(board.lanes, packages, strict=True):
                for event in race(package, seconds, options):
                    lane.take(event)
                    live.update(board.render(console.width, console.height - 2), refresh=True)
    else:
        for number, (lane, package) in enumerate(zip(board.lanes, packages, strict=True)):
            for event in race(package, seconds, options):
                lane.take(event)
            console.print(board.lines()[number], soft_wrap=True, highlight=False)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(animated_svg(board, machine()), encoding="utf-8")
        console.print(f"{picture} is written")
    console.print("Talk to the last one: python -m " + packages[-1] + " chat", highlight=False)
    if any(lane.state == "failed" for lane in board.lanes):
        raise typer.Exit(1)


def busy_share() -> float:
    """How much of the processors others use, as a share, looked at for a moment."""
    import psutil
    return float(psutil.cpu_percent(interval=0.3)) / 100


def machine() -> str:
    """What a reader has to know of the machine: its processor and how many cores of it there are."""
    from ..analysis.machine import describe_machine
    about = describe_machine()
    return f"{about['cpu']}, {os.cpu_count()} cores" if about["gpu"] in (None, "none") else str(about["gpu"])


if __name__ == "__main__":
    try:
        typer.run(run)
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
