"""`serve` and `soak` over this milestone's engine, and `env`."""
from __future__ import annotations

from m2_continuous_batching.tools.commands import online_commands
from m4_flash_attn.tools.commands import env

from ..llm import LLM

COMMANDS = [*online_commands(LLM), env]
