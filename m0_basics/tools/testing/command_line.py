"""The command line, run inside the test's process: what every milestone's tests of its commands start from."""
from __future__ import annotations

import dataclasses
import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m0_basics.sampling_params import SamplingParams

from ..cli.app import main


@dataclasses.dataclass
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `python -m <package> <arguments>` in this process: `command("generate", "text", package="m1_offline")`."""

    def run(*arguments: Any, stdin: str = "", package: str = "m1_offline") -> Result:
        monkeypatch.setattr(sys, "argv", [package, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        status: Any = 0
        try:
            main(package)
        except SystemExit as ended:
            status = ended.code or 0
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


def options(folder: Path) -> list[Any]:
    """The flags that make a command run a tiny model."""
    return ["--model", folder, "--dtype", "float32", "--max-model-len", 96]


def text_of(folder: Path, prompt: Any, params: SamplingParams, package: str = "m1_offline") -> str:
    """What the same model says through Python; a list is a chat."""
    llm = importlib.import_module(package).LLM(str(folder), dtype="float32", max_model_len=96)
    run = llm.chat if isinstance(prompt, list) else llm.generate
    text: str = run(prompt, params, use_tqdm=False)[0].outputs[0].text
    return text
