"""`serve` and `soak` over this milestone's engine."""
from __future__ import annotations

from m2_continuous_batching.tools.commands import online_commands

from ..llm import LLM

COMMANDS = online_commands(LLM)
