"""`serve` and `soak` over this milestone's engine, `env`, and `train-draft`."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from m0_basics.config import DEFAULT_MODEL
from m2_continuous_batching.tools.commands import online_commands
from m4_flash_attn.tools.commands import env

from ..llm import LLM


def train_draft(engine_options: dict[str, Any], folder: Annotated[Path, typer.Argument(help="Where it is written.")],
                num_layers: Annotated[int, typer.Option(min=1, help="Layers of the draft model.")] = 2,
                num_prompts: Annotated[int, typer.Option(min=1, help="Training prompts for each task.")] = 96) -> None:
    """Train a draft model for the model, in minutes: its own first layers, taught to write as it does."""
    from .train_draft import train_draft as train
    losses = train(folder, str(engine_options.get("model", DEFAULT_MODEL)), num_layers, num_prompts)
    Console().print(f"{folder}: loss by pass {', '.join(f'{loss:.2f}' for loss in losses)}")


COMMANDS = [*online_commands(LLM), env, train_draft]
