"""Do GPTQModel and this lab read each other's folders, weight for weight?

    python -m m7_gptq.tools.interop --gptqmodel-python ~/gptqmodel/bin/python

GPTQModel (7.6; the successor of AutoGPTQ, which is archived) needs an environment of its own, which it fills with pins
that the lab does not want: `python -m venv ~/gptqmodel && ~/gptqmodel/bin/pip install gptqmodel==7.6.0`.
For each form of the format it quantises a tiny random model, and the lab reads the folder; then the lab writes folders,
and GPTQModel reads them. Equal means: every dequantised weight, bit for bit.
"""
from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from m0_basics.config import ConfigError
from m0_basics.loading.weights import SafetensorsFolder
from m0_basics.tools.testing.tiny_models import build_tiny_model, save_model

from ..loading.checkpoint import read_matrix
from ..loading.settings import read_settings
from ..rtn import QuantizeOptions
from .quantize_command import quantize

RESULTS = Path(__file__).parents[1] / "results" / "interop.json"
_SIDE = Path(__file__).with_name("gptqmodel_side.py")
_GROUP = 16
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 2, "head_dim": 16}
# The forms that the tests keep: what GPTQModel wrote, and in VALUES the weights that it makes of it.
VALUES = "gptqmodel_values.safetensors"
FIXTURES = ("gptqmodel-qwen3-4bits-asym-order-gptq", "gptqmodel-llama-8bits-asym-gptq_v2",
            "gptqmodel-llama-4bits-sym-gptq", "gptqmodel-qwen3-3bits-asym-gptq")


@dataclasses.dataclass(frozen=True)
class Form:
    """One way of writing a folder."""

    writer: str                         # "gptqmodel" or "lab"
    family: str
    bits: int
    sym: bool
    desc_act: bool
    checkpoint_format: str

    @property
    def name(self) -> str:
        return "-".join([self.writer, self.family, f"{self.bits}bits", "sym" if self.sym else "asym",
                         *(["order"] if self.desc_act else []), self.checkpoint_format])


@dataclasses.dataclass(frozen=True)
class Found:
    """How one form was read by the other side."""

    form: Form
    num_layers: int = 0
    num_weights: int = 0
    zero_points_of_0: int = 0           # the ones that borrow over the packed word in format 1
    equal: bool = False
    error: str | None = None


def all_forms() -> list[Form]:
    """4 and 8 bits in every combination, 2 and 3 bits in one each. GPTQModel takes asymmetric format 1 from itself
    alone (it asks who wrote it), so the lab writes that as format 2."""
    forms = []
    for writer, bits, sym, desc_act, form in itertools.product(
            ("gptqmodel", "lab"), (4, 8), (True, False), (False, True), ("gptq", "gptq_v2")):
        if writer == "gptqmodel" or sym or form == "gptq_v2":
            family = "qwen3" if desc_act else "llama"
            forms.append(Form(writer, family, bits, sym, desc_act, form))
    forms += [Form("gptqmodel", "qwen3", 3, False, False, "gptq"), Form("gptqmodel", "qwen3", 2, False, True, "gptq"),
              Form("lab", "qwen3", 3, False, True, "gptq_v2"), Form("lab", "llama", 2, True, False, "gptq")]
    return forms


def run(python: Path, forms: Sequence[Form], scratch: Path) -> list[Found]:
    """Write and read every form. Raises ConfigError where `python` has no GPTQModel."""
    models = {family: _one_sided_model(scratch / family, family) for family in ("qwen3", "llama")}
    jobs: list[dict[str, Any]] = []
    for form in forms:
        folder = scratch / form.name
        options: dict[str, Any] = {"bits": form.bits, "group_size": _GROUP, "desc_act": form.desc_act, "sym": form.sym}
        if form.writer == "gptqmodel":
            jobs.append({"do": "quantize", "model": str(models[form.family]), "folder": str(folder),
                         "options": {**options, "format": form.checkpoint_format}})
        else:
            quantize(str(models[form.family]), folder, QuantizeOptions(**options), num_samples=8, length=64,
                     checkpoint_format=form.checkpoint_format)
        jobs.append({"do": "dequantise", "folder": str(folder), "values": str(_values(folder))})
    return [compare(form, scratch / form.name, errors) for form, errors in
            zip(forms, _errors_by_folder(jobs, _run_side(python, jobs, scratch)), strict=True)]


def compare(form: Form, folder: Path, error: str | None = None) -> Found:
    """The lab's reading of `folder`, and GPTQModel's, which lies beside it."""
    from safetensors.torch import load_file
    if error is not None:
        return Found(form, error=error)
    settings, source, values = read_settings(folder), SafetensorsFolder(folder), load_file(str(_values(folder)))
    packed = {name.removesuffix(".qweight") for name in source.names() if name.endswith(".qweight")}
    if packed != {name.rpartition(".")[0] for name in values}:
        return Found(form, error="the two sides find different layers packed")
    equal, num_weights, zeros = True, 0, 0
    for part in sorted(packed):
        matrix = read_matrix(source, part, settings)
        assert matrix is not None and matrix.zeros is not None
        mine = matrix.dequantise()
        equal &= torch.equal(mine, values[f"{part}.single"]) and torch.equal(mine.half(), values[f"{part}.half"])
        num_weights, zeros = num_weights + mine.numel(), zeros + int((matrix.zeros == 0).sum())
    return Found(form, len(packed), num_weights, zeros, equal)


def write_fixtures(scratch: Path, target: Path) -> None:
    """Keep what the tests need of the forms FIXTURES: the folder, and GPTQModel's own weights in fp16."""
    from safetensors.torch import load_file, save_file
    for name in FIXTURES:
        kept = target / name.removeprefix("gptqmodel-")
        kept.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "quantize_config.json", "model.safetensors"):
            shutil.copyfile(scratch / name / file, kept / file)
        values = load_file(str(_values(scratch / name)))
        save_file({part: tensor for part, tensor in values.items() if part.endswith(".half")},
                  str(kept / VALUES), metadata={"format": "pt"})


def _one_sided_model(folder: Path, family: str) -> Path:
    """A tiny random model. Half of each matrix's rows have no negative weight: their zero points are 0."""
    model = build_tiny_model(family, tie=True, **_SIZES)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data[::2].abs_()
    return save_model(folder, model)


def _values(folder: Path) -> Path:
    return folder.with_name(folder.name + ".values")


def _run_side(python: Path, jobs: list[dict[str, Any]], scratch: Path) -> list[str | None]:
    """The jobs in one process of GPTQModel's interpreter; what went wrong with each."""
    file = scratch / "jobs.json"
    file.write_text(json.dumps(jobs))
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        ran = subprocess.run([str(python), str(_SIDE), str(file)], capture_output=True, text=True, cwd=scratch,
                             env=outside | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"})
    except OSError as error:
        raise ConfigError(f"gptqmodel_python={str(python)!r} cannot be run: {error.strerror}") from error
    done = Path(f"{file}.done")
    if not done.is_file():
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"gptqmodel_python={str(python)!r} did not finish: {last}; allowed: a Python with gptqmodel")
    errors: list[str | None] = json.loads(done.read_text())
    return errors


def _errors_by_folder(jobs: list[dict[str, Any]], errors: list[str | None]) -> list[str | None]:
    """The first error for each folder, in the order of the folders."""
    found: dict[str, str | None] = {}
    for job, error in zip(jobs, errors, strict=True):
        found[job["folder"]] = found.get(job["folder"]) or error
    return list(found.values())


def table(found: Sequence[Found]) -> Table:
    """One row a form."""
    shown = Table("written by", "read by", "model", "bits", "grid", "order", "format", "weights", "zero points of 0",
                  "equal")
    for one in found:
        form, other = one.form, "lab" if one.form.writer == "gptqmodel" else "gptqmodel"
        shown.add_row(form.writer, other, form.family, str(form.bits), "sym" if form.sym else "asym",
                      "desc_act" if form.desc_act else "", form.checkpoint_format, f"{one.num_weights:,}",
                      str(one.zero_points_of_0), one.error or ("bit for bit" if one.equal else "NO"))
    return shown


def main(
    gptqmodel_python: Annotated[Path, typer.Option(help="A Python interpreter that has gptqmodel.")],
    output: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
    fixtures: Annotated[Path | None, typer.Option(help="Also write the folders that the tests keep, here.")] = None,
) -> None:
    """Compare this lab with GPTQModel on folders that either wrote: a table, and JSON."""
    Console().print(f"{len(all_forms())} forms; GPTQModel takes some minutes")
    with tempfile.TemporaryDirectory() as folder:
        found = run(gptqmodel_python.absolute(), all_forms(), Path(folder))
        if fixtures is not None:
            write_fixtures(Path(folder), fixtures)
    Console(width=160).print(table(found))
    versions = subprocess.run(
        [str(gptqmodel_python), "-c", "from importlib.metadata import version as v; print(v('gptqmodel'), v('torch'))"],
        capture_output=True, text=True, check=True).stdout.split()
    output.parent.mkdir(parents=True, exist_ok=True)
    others = json.loads(output.read_text()) if output.is_file() else {}         # interop_readers.py's
    output.write_text(json.dumps(others | {
        "command": "python -m m7_gptq.tools.interop --gptqmodel-python PYTHON", "gptqmodel": versions[0],
        "gptqmodel_torch": versions[1], "forms": [dataclasses.asdict(one) for one in found]}, indent=1) + "\n")
    if not all(one.equal for one in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
