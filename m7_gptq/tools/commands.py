"""`serve`, `soak` and `stall` over this milestone's engine; `env`, `quantize` and `quality`."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from m0_basics.tools.documents.factbook import read_json_file
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.tools.commands import online_commands
from m4_flash_attn.kernels.cpu.build import BuildError
from m4_flash_attn.tools.commands import env as attention_env

from ..calibration import cut_windows
from ..config import EngineConfig
from ..kernels.cpu.build import int8_tier
from ..llm import LLM
from ..loading.memory import held_bytes
from .bench_views import choices_table, quality_table
from .perplexity import perplexity_of_llm
from .quantize_command import COMMAND
from .texts import evaluation_text

RESULTS = Path(__file__).parents[1] / "results"
_LENGTH = 512                           # tokens of a window


def env(engine_options: dict[str, Any]) -> None:
    """What this machine runs: attention, and the instructions that packed weights are multiplied with."""
    config = EngineConfig.from_options(**engine_options)
    own = {*config.options()} - {*attention_options()}
    attention_env({name: value for name, value in engine_options.items() if name not in own})
    console = Console()
    try:
        console.print(f"packed weights: activations of 8 bits by {int8_tier()}", soft_wrap=True)
    except BuildError as error:
        console.print(f"packed weights: dequantised at each use, which is slow: {error}", soft_wrap=True)


def attention_options() -> list[str]:
    """The options that milestone 4's `env` knows."""
    from m4_flash_attn.config import EngineConfig as AttentionConfig
    return list(AttentionConfig.options())


def quality(
    engine_options: dict[str, Any],
    measure: Annotated[int, typer.Option(help="Measure this model's own perplexity on so many windows of the held-out "
                                              "text, with its own kernels (0: show what is stored).", min=0)] = 0,
) -> None:
    """What fewer bits cost and what they are worth: perplexity, bytes and speed of every method, in one table."""
    console = Console()
    if measure:
        llm = LLM(**{"max_model_len": _LENGTH + 1, **engine_options})
        token_ids = llm.get_tokenizer().encode(evaluation_text("test"))
        windows = cut_windows(token_ids, _LENGTH, measure)
        console.print(f"{llm.config.model_config.model}: perplexity {perplexity_of_llm(llm, windows):.3f} of "
                      f"{windows.numel():,} tokens; weights of {held_bytes(engine_of(llm).runner.model):,} bytes",
                      highlight=False, soft_wrap=True)
        return
    stored, bench = read_json_file(RESULTS / "quality.json"), RESULTS / "bench.json"
    console.print(quality_table(stored["rows"], read_json_file(bench) if bench.is_file() else None))
    if chosen_by := stored.get("dev"):
        console.print(choices_table(chosen_by))
    console.print("Measured by: python -m m7_gptq.tools.quality_suite --output m7_gptq/results/quality.json, and "
                  "python -m m7_gptq bench", soft_wrap=True, highlight=False)


COMMANDS = [*online_commands(LLM), env, COMMAND, quality]
