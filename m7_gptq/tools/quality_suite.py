"""What each step of GPTQ is worth: perplexity on held-out text for rounding to nearest, GPTQ, and its refinements.

    python -m m7_gptq.tools.quality_suite --output m7_gptq/results/quality.json

Every row is one way to quantise the whole model, judged on "test", a text that no choice has seen, and "chinese",
unlike anything that was calibrated on. What the defaults were chosen by are rows on "dev", a third text, in a section
of their own. Rows are saved as they are finished; started again, the command goes on with the missing ones.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from torch import Tensor

from m0_basics.config import DEFAULT_MODEL, ModelConfig, reject
from m0_basics.loading.loader import load_model
from m0_basics.model import CausalLM
from m0_basics.tools.analysis.machine import describe_machine
from m0_basics.tools.bench.report import command_line

from ..quantize import QuantizedModel, quantize_model
from ..rtn import QuantizeOptions
from .fake_int8 import rounded_inputs
from .perplexity import perplexity, plain_logits, text_windows
from .q4_1_trap import q4_1_trap
from .sink import Watched, value_errors, watch
from .texts import calibration_text, evaluation_text

PARTS = ("full", "4", "3", "8", "q4_1", "tiny", "dev")
TINY_MODEL = Path(__file__).parents[1] / "tests" / "tiny_qwen3"
_NEAREST = QuantizeOptions(method="rtn", search=False, desc_act=False, act_group_aware=False, sink=0.0,
                           gptaq=0.0)
_TEXTBOOK = replace(_NEAREST, method="gptq")
# From rounding to nearest to the best, one thing more in each row.
METHODS: dict[str, QuantizeOptions] = {
    "nearest": _NEAREST,
    "nearest, searched grids": replace(_NEAREST, search=True),
    "GPTQ, textbook": _TEXTBOOK,
    "GPTQ, searched grids": replace(_TEXTBOOK, search=True),
    "GPTQ, + first token": replace(_TEXTBOOK, search=True, sink=0.1),
    "GPTQ, + activation order": replace(_TEXTBOOK, search=True, sink=0.1, desc_act=True),
    "GPTQ, group-aware order": replace(_TEXTBOOK, search=True, sink=0.1, desc_act=True, act_group_aware=True),
    "GPTQ, + GPTAQ": replace(_TEXTBOOK, search=True, sink=0.1, desc_act=True, act_group_aware=True, gptaq=0.5),
}
DEFAULT = "GPTQ, + GPTAQ"                   # whose options are those of `quantize`
# What the defaults were chosen among, on the text "dev", which is neither calibrated on nor reported: full precision,
# rounding, the default, and the default with one thing changed.
_BEST = METHODS[DEFAULT]
CHOICES: dict[str, QuantizeOptions] = {
    "nearest": _NEAREST,
    "the default": _BEST,
    "inputs as they come": replace(_BEST, desc_act=False, act_group_aware=False),
    "activation order": replace(_BEST, act_group_aware=False),
    **{f"GPTAQ {share:g}": replace(_BEST, gptaq=share) for share in (0.0, 0.25, 0.75, 1.0)},
    **{f"first token {weight:g}": replace(_BEST, sink=weight) for weight in (0.0, 0.3)},
    "grids not searched": replace(_BEST, search=False),
}
CHOICE_BITS = (4, 3)


@dataclass
class Material:
    """A model, what to calibrate it on, and what to judge it by."""

    model: str                              # a name or folder
    calibration: Tensor
    texts: dict[str, Tensor]                # windows by the name of the text
    watched: Tensor                         # a few windows to look at attention on

    @classmethod
    def of(cls, model: str, length: int, num_calibration: int, num_evaluation: int | None,
           names: Sequence[str] = ("test", "chinese")) -> Material:
        """Windows of `length`; at most `num_evaluation` of each text, and a few of the Chinese one."""
        most = {name: 4 if name == "chinese" else num_evaluation for name in names}
        texts = {name: text_windows(model, evaluation_text(name), length, most[name]) for name in names}
        return cls(model, text_windows(model, calibration_text(), length, num_calibration), texts,
                   text_windows(model, evaluation_text("dev"), length, 4))

    def load(self) -> CausalLM:
        """The model as it is, in float32."""
        return load_model(ModelConfig(model=self.model, dtype="float32", device="cpu"))

    def judge(self, model: CausalLM) -> dict[str, float]:
        """Perplexity on each text."""
        return {name: perplexity(plain_logits(model), windows) for name, windows in self.texts.items()}


class Results:
    """The file that rows are kept in: sections of rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def save(self) -> None:
        """Write the file anew, never half."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".partial")
        scratch.write_text(json.dumps(self.sections, indent=1) + "\n")
        scratch.replace(self.path)


class Suite:
    """The rows of one model, a section of the results."""

    def __init__(self, material: Material, results: Results, section: str,
                 report: Callable[[str], None] = print) -> None:
        self.material, self.results, self.report = material, results, report
        self.rows = results.sections.setdefault(section, {})
        self._full: Watched | None = None

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one row and save it, unless the file has it."""
        if name in self.rows:
            return
        start = time.perf_counter()
        self.rows[name] = measure()
        seconds = time.perf_counter() - start
        self.rows[name]["measured_in_s"] = round(seconds, 1)
        self.results.save()
        shown = self.rows[name].get("perplexity", {})
        self.report(f"{name:34}" + "".join(f" {text} {value:8.3f}" for text, value in shown.items())
                    + f"   {seconds:.0f} s")

    def full(self) -> dict[str, Any]:
        """The model as it is: its perplexity, and where its attention goes."""
        model = self.material.load()
        seen = watch(model, self.material.watched, weights=True)
        return {"perplexity": self.material.judge(model), "mass_of_first_token": seen.mass}

    def quantized(self, options: QuantizeOptions, activations: bool) -> dict[str, Any]:
        """One way to quantise it; `activations`: with 8-bit activations as well."""
        windows = self.material.watched
        if self._full is None:
            self._full = watch(self.material.load(), windows)
        model = self.material.load()
        result = quantize_model(model, self.material.calibration, options, use_tqdm=True)
        row = {"options": asdict(options), "seconds": round(result.seconds, 1),
               "perplexity": self.material.judge(model),
               "value_error": value_errors(self._full, watch(model, windows)), **_errors(result)}
        if activations:
            row["int8_activations"] = {}
            for name, size in (("by token", None), ("by group of 64", 64)):
                with rounded_inputs(model, size):
                    row["int8_activations"][name] = self.material.judge(model)
        return row

    def methods(self, bits: int, group_size: int, names: list[str] | None = None) -> None:
        """Every method at one number of bits."""
        for name, options in METHODS.items():
            if names is None or name in names:
                chosen = replace(options, bits=bits, group_size=group_size)
                self.row(f"{bits} bits: {name}", partial(
                    self.quantized, chosen, activations=bits == 4 and name in ("nearest", DEFAULT)))

    def choices(self) -> None:
        """What the defaults were chosen among: no more than its perplexity."""
        self.row("full precision", partial(self.judged, None))
        for bits in CHOICE_BITS:
            for name, options in CHOICES.items():
                self.row(f"{bits} bits: {name}", partial(self.judged, replace(options, bits=bits, group_size=64)))

    def judged(self, options: QuantizeOptions | None) -> dict[str, Any]:
        """The model's perplexity, quantised unless `options` is None."""
        model = self.material.load()
        if options is None:
            return {"perplexity": self.material.judge(model)}
        seconds = quantize_model(model, self.material.calibration, options, use_tqdm=True).seconds
        return {"options": asdict(options), "seconds": round(seconds, 1), "perplexity": self.material.judge(model)}


def _errors(result: QuantizedModel) -> dict[str, Any]:
    """Per matrix, and the mean over them."""
    layers = [asdict(report) for report in result.report if report.error is not None]
    return {"layers": layers, "mean_error": mean(layer["error"] for layer in layers),
            "mean_nearest_error": mean(layer["nearest_error"] for layer in layers)} if layers else {}


def about(material: Material) -> dict[str, Any]:
    """Where the rows come from."""
    return {"command": command_line(), "created": datetime.now(UTC).isoformat("T", "seconds"),
            "machine": describe_machine(), "model": Path(material.model).name,
            "calibration_tokens": material.calibration.numel(),
            "tokens": {name: windows.numel() for name, windows in material.texts.items()}}


def gap_closed(rows: dict[str, Any], bits: int, text: str = "test", method: str = DEFAULT) -> float:
    """The share of the gap between rounding to nearest and full precision that a method closes."""
    full, nearest, best = (rows[name]["perplexity"][text] for name in (
        "full precision", f"{bits} bits: nearest", f"{bits} bits: {method}"))
    return (nearest - best) / (nearest - full)


def run(suite: Suite, tiny: Suite, dev: Suite, parts: list[str]) -> None:
    """The rows of some parts, in an order that shows something early."""
    if "full" in parts:
        suite.row("full precision", suite.full)
    for part, names in (("4", None), ("3", None), ("8", ["nearest"])):
        if part in parts:
            suite.methods(int(part), 64, names)
    if "q4_1" in parts:
        suite.row("the Q4_1 trap", q4_1_trap)
    if "tiny" in parts:
        tiny.row("full precision", tiny.full)
        for bits in (4, 3, 2):
            tiny.methods(bits, 64)
    if "dev" in parts:
        dev.choices()


def main(output: Annotated[Path, typer.Option(help="The JSON file of the rows.")],
         parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
         model: Annotated[str, typer.Option(help="The model: a name, or a folder.")] = DEFAULT_MODEL,
         calibration: Annotated[int, typer.Option(help="Windows of 512 tokens to calibrate on.")] = 32,
         evaluation: Annotated[int | None, typer.Option(help="At most so many windows of each text.")] = 32) -> None:
    """Measure perplexity for every method, and save each row as it is done."""
    chosen = [part.strip() for part in parts.split(",")]
    if wrong := [part for part in chosen if part not in PARTS]:
        raise reject("parts", wrong[0], ", ".join(PARTS))
    start = time.perf_counter()
    results = Results(output)
    suite = Suite(Material.of(model, 512, calibration, evaluation), results, "rows")
    tiny = Suite(Material.of(str(TINY_MODEL), 128, 128, 128, ["test"]), results, "tiny")       # it has read no Chinese
    dev = Suite(Material.of(model, 512, calibration, evaluation, ["dev"]), results, "dev")
    for name, each in (("about", suite), ("about_tiny", tiny), ("about_dev", dev)):
        results.sections.setdefault(name, about(each.material))
    run(suite, tiny, dev, chosen)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
