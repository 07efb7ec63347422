"""`--help` in panels, one for each group of options. A name is never cut: what does not fit goes to the next line.

    ╭─ Scheduler ─────────────────────────────╮
    │ --max-num-seqs INTEGER                  │
    │     How many sequences run at once. [8] │
"""
from __future__ import annotations

import inspect
import shutil
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperCommand

OWN = "This command"


class PanelCommand(TyperCommand):
    """A command whose help is written here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, what the command does, and a panel for each group of options, the command's own first."""
        console = Console(width=min(110, shutil.get_terminal_size().columns), force_terminal=None)
        arguments = [p for p in self.get_params(ctx) if _is_argument(p)]
        usage = " ".join([ctx.command_path, "[OPTIONS]", *(f"[{(p.name or '').upper()}]" for p in arguments)])
        console.print(Text(f"Usage: {usage}\n", style="bold"), soft_wrap=False)
        console.print(Text(inspect.cleandoc(self.help or "") + "\n"))
        groups: dict[str, list[Any]] = {OWN: list(arguments)}
        for parameter in self.get_params(ctx):
            if not _is_argument(parameter) and not getattr(parameter, "hidden", False):
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or OWN, []).append(parameter)
        for title, parameters in groups.items():
            if parameters:
                entries = [part for parameter in parameters for part in self._entry(ctx, parameter)]
                console.print(Panel(Group(*entries), title=title, title_align="left", border_style="bright_black"))

    def _entry(self, ctx: Any, parameter: Any) -> list[RenderableType]:
        names, about = parameter.get_help_record(ctx) or (parameter.name, "")
        line = Text(names, style="bold cyan", overflow="fold")
        return [line, Padding(Text(about), (0, 0, 0, 4))] if about else [line]


def _is_argument(parameter: Any) -> bool:
    """Whether it is given by its place and not by a name. (typer's classes for the two are not public.)"""
    return bool(parameter.param_type_name == "argument")
