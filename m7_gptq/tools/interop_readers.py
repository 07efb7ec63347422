"""Which programs read the folders that `quantize` writes, and do they compute with them what this lab does?

    python -m m7_gptq.tools.interop_readers --peer-python ~/vllm/bin/python --peer-python ~/gptqmodel/bin/python

Each reader (vLLM, transformers over GPTQModel, GPTQModel itself) loads each form of folder in a process of its own and
continues some prompts greedily, in 16 bits. Near ties fall either way in 16 bits, so beside the number of equal tokens
stands the largest gap: how far, in nats, this lab's own float32 logits put any of the reader's tokens behind the best
one. A folder that is read wrongly is off by many nats. What a reader refuses is recorded as well.
"""
from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from m0_basics.config import DEFAULT_MODEL, ConfigError, reject
from m0_basics.model import CausalLM
from m0_basics.tools.bench.report import command_line
from m0_basics.tools.bench.subprocess_peers import peer_environment

from ..config import ModelConfig
from ..loading.fill import load_model
from ..rtn import QuantizeOptions
from .interop import RESULTS
from .perplexity import plain_logits, text_windows
from .quantize_command import quantize
from .texts import evaluation_text

_SIDE = Path(__file__).with_name("reader_side.py")
# Reader -> the modules that an interpreter needs for it.
READERS = {"vllm": ("vllm",), "transformers": ("transformers", "gptqmodel", "optimum"), "gptqmodel": ("gptqmodel",)}
_FEW = 4                              # windows of text for a GPTQ that only has to be one
CLOSE = 0.25                            # nats: a near tie in 16 bits; wrong weights are off by far more
_PROMPTS, _PROMPT, _TOKENS = 2, 24, 24
_PLAIN = QuantizeOptions(method="rtn", search=False, lm_head=False)
_ORDERED = replace(_PLAIN, method="gptq", sym=True, desc_act=True, gptaq=0.0)
FORMS: dict[str, QuantizeOptions] = {
    "symmetric": replace(_PLAIN, sym=True),
    "symmetric, groups in activation order": replace(_ORDERED, act_group_aware=True),
    "symmetric, activation order": replace(_ORDERED, act_group_aware=False),
    "asymmetric": _PLAIN,
    "asymmetric, output matrix packed": replace(_PLAIN, lm_head=True),
}
# What export.py says of each reader: it has to come out so. What else one reads or not is recorded, and no failure.
CLAIMED = {"gptqmodel": tuple(FORMS), "transformers": tuple(form for form in FORMS if "packed" not in form),
           "vllm": ("symmetric", "symmetric, groups in activation order")}


@dataclass(frozen=True)
class Reading:
    """How one reader got on with one form."""

    reader: str
    form: str
    version: str | None = None
    num_tokens: int = 0
    equal_tokens: int = 0               # up to the first that differs, in each answer
    largest_gap: float | None = None    # nats
    error: str | None = None

    @property
    def same(self) -> bool:
        """Whether the reader computes what this lab does, up to near ties."""
        return self.largest_gap is not None and self.largest_gap <= CLOSE


def readers_of(python: Path) -> list[str]:
    """What an interpreter has. Raises ConfigError where it has none of them, or does not run."""
    code = ("import importlib.util as u, json; "
            f"print(json.dumps([n for n, ms in {READERS!r}.items() if all(map(u.find_spec, ms))]))")
    try:
        ran = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=True,
                             env=_environment())
        found: list[str] = json.loads(ran.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"peer_python={str(python)!r} does not run as a Python interpreter: {error}") from error
    if not found:
        raise reject("peer_python", str(python), f"an interpreter that has one of {', '.join(READERS)}")
    return found


def read(reader: str, python: Path, form: str, folder: Path, prompts: list[list[int]], ours: CausalLM) -> Reading:
    """Let `reader` load `folder` and continue the prompts; compare with this lab's model of the same folder."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps({"reader": reader, "folder": str(folder), "prompts": prompts,
                                    "max_tokens": _TOKENS}))
        ran = subprocess.run([str(python), str(_SIDE), str(file)], capture_output=True, text=True, cwd=scratch,
                             env=_environment())
        answer = Path(f"{file}.done")
        done: dict[str, Any] = json.loads(answer.read_text()) if answer.is_file() else {
            "error": (ran.stderr.strip().splitlines() or ["it ended without a word"])[-1]}
    if "error" in done:
        return Reading(reader, form, error=without_places(done["error"]))
    equal, gap = compare(ours, prompts, done["tokens"])
    return Reading(reader, form, done["version"], sum(map(len, done["tokens"])), equal, gap)


def compare(ours: CausalLM, prompts: list[list[int]], answers: list[list[int]]) -> tuple[int, float]:
    """(tokens that are ours up to the first that is not, in all answers; the largest gap in nats).

    Every token is judged after the reader's own ones before it. Raises ConfigError for answers of another length.
    """
    equal, worst = 0, 0.0
    logits = plain_logits(ours)
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(answer) != _TOKENS:
            raise ConfigError(f"an answer has {len(answer)} tokens; allowed: {_TOKENS}")
        judged = logits(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].float()
        gaps = judged.amax(1) - judged.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        differing = (gaps > 0).nonzero()
        equal += int(differing[0]) if len(differing) else len(answer)
        worst = max(worst, float(gaps.max()))
    return equal, worst


def without_places(message: str) -> str:
    """An error in one line, its absolute paths cut to their last part, without what pydantic appends."""
    line = " ".join(message.split()).partition(" [type=")[0]
    return re.sub(r"(?<![\w.<])/(?:[^\s'\":,/]+/)+([^\s'\":,/]*)", r"<\1>", line)[:200]


def _environment() -> dict[str, str]:
    """For a peer's interpreter: nothing of this one's."""
    return {name: value for name, value in peer_environment().items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def run(pythons: Sequence[Path], model: str, forms: Sequence[str], scratch: Path,
        console: Console | None = None) -> list[Reading]:
    """Every reader of the interpreters, on every form of `model`."""
    readers = [(reader, python) for python in pythons for reader in readers_of(python)]
    prompts = text_windows(model, evaluation_text("test"), _PROMPT, _PROMPTS).tolist()
    found: list[Reading] = []
    for form in forms:
        folder = scratch / form.replace(", ", "-").replace(" ", "_")
        quantize(model, folder, FORMS[form], num_samples=None if FORMS[form].method == "rtn" else _FEW, length=128)
        ours = load_model(ModelConfig(str(folder), dtype="float32", device="cpu", quantization="none"))
        for reader, python in readers:
            found.append(read(reader, python, form, folder, prompts, ours))
            if console is not None:
                console.print(f"{reader}, {form}: {verdict(found[-1])}", highlight=False, soft_wrap=True)
    return found


def verdict(reading: Reading) -> str:
    """In words."""
    if reading.error is not None:
        return f"not read: {reading.error}"
    return (f"{'read' if reading.same else 'READ WRONGLY'}: {reading.equal_tokens} of {reading.num_tokens} tokens as "
            f"ours, the largest gap {reading.largest_gap:.3f} nats")


def table(found: Sequence[Reading]) -> Table:
    """A row for each form, a column for each reader."""
    readers = list(dict.fromkeys(reading.reader for reading in found))
    shown = Table("form", *readers)
    for form in dict.fromkeys(reading.form for reading in found):
        shown.add_row(form, *(verdict(r) for name in readers for r in found if (r.reader, r.form) == (name, form)))
    return shown


def main(
    peer_python: Annotated[list[Path], typer.Option(help="A Python interpreter that has one of the readers; may be "
                                                         "repeated.")],
    model: Annotated[str, typer.Option(help="The model whose folders are read.")] = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option(help="Where the results go, beside those that are there.")] = RESULTS,
) -> None:
    """Let other programs read this lab's folders and generate: a table, and JSON."""
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as scratch:
        found = run([python.absolute() for python in peer_python], model, list(FORMS), Path(scratch), console)
    console.print(table(found))
    stored = json.loads(output.read_text()) if output.is_file() else {}
    stored["readers"] = {"command": command_line(), "model": Path(model).name, "close": CLOSE,
                         "readings": [asdict(reading) for reading in found]}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(stored, indent=1) + "\n")
    if any(reading.form in CLAIMED[reading.reader] and not reading.same for reading in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
