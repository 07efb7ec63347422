"""`quantize`: a model in, a folder of packed weights out, for this lab and GPTQModel.

Others read less: transformers no packed output matrix (--no-lm-head), vLLM no asymmetric grids and no order of inputs
(--sym --act-group-aware).

The command checks all that can be checked before it works, keeps finished layers beside the target while it works, and
writes the folder as a whole at the end. Interrupted and called again, it goes on after the last finished layer.
"""
from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from m0_basics.config import ConfigError, ModelConfig, check_int, reject
from m0_basics.loading.files import read_json, read_text
from m0_basics.loading.loader import gguf_file, load_model, load_tokenizer, resolve_model
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.model import CausalLM
from m0_basics.tools.cli.options import flags_of, with_flags

from ..calibration import LENGTH, NUM_WINDOWS, cut_windows
from ..loading.export import plain_tensors, write_folder
from ..loading.part_store import PartStore
from ..loading.settings import FORMATS, GPTQSettings, tied_meta
from ..loading.whole_folder import check_target
from ..quantize import MatrixReport, QuantizedModel, quantize_model
from ..rtn import QuantizeOptions
from .texts import calibration_text


@dataclasses.dataclass(frozen=True)
class Written:
    """A folder that has been written."""

    folder: Path
    num_bytes: int                      # of all its files
    copy_bytes: int                     # of them the plain copy of the output matrix, for other readers
    source_bytes: int                   # of the same weights in 16 bits
    seconds: float
    resumed: int                        # parts that an interrupted run had finished
    quantized: QuantizedModel


def quantize(model: str, folder: Path, options: QuantizeOptions, *, calibration: Sequence[Path] = (),
             num_samples: int | None = None, length: int = LENGTH, checkpoint_format: str | None = None,
             force: bool = False, console: Console | None = None) -> Written:
    """Quantise `model` into `folder`. `calibration`: UTF-8 text files (default: the prose that comes with the lab);
    `num_samples` windows of `length` tokens are taken of it (default: `NUM_WINDOWS`, or as many as it has).

    `checkpoint_format`: "gptq" or "gptq_v2"; by default the first for symmetric grids, which every reader of the format
    knows, and the second for others, whose zero points GPTQModel takes from anybody only so.
    Raises ConfigError for whatever is wrong, before the work where that is possible.
    """
    start = time.perf_counter()
    if checkpoint_format is None:
        checkpoint_format = "gptq" if options.sym else "gptq_v2"
    if checkpoint_format not in FORMATS:
        raise reject("checkpoint_format", checkpoint_format, ", ".join(FORMATS))
    source, config = resolve_model(model, torch.float32), ModelConfig(model=model, dtype="float32", device="cpu")
    check_target(folder, force, source)
    windows = None if options.method == "rtn" else calibration_windows(
        load_tokenizer(config), calibration, num_samples, length)
    weights = load_model(config)
    settings = _settings(options, weights, checkpoint_format)
    total = weights.spec.num_hidden_layers + options.lm_head
    with PartStore(folder, run_of(weights, options, windows)) as store, _Bar(console, total) as bar:
        quantized = quantize_model(weights, windows, options, store=_Counting(store, bar), on_part=bar.report)
        plain = plain_tensors(weights, quantized.matrices, _dtype_of(model, source))
        num_bytes = write_folder(folder, source, plain, quantized.matrices, settings, force)
        resumed = store.resumed
    num_weights = sum(parameter.numel() for parameter in weights.parameters())
    copy_bytes = plain["model.embed_tokens.weight"].nbytes if settings.tied else 0
    return Written(folder, num_bytes, copy_bytes, 2 * num_weights, time.perf_counter() - start, resumed, quantized)


def calibration_windows(tokenizer: Tokenizer | None, files: Sequence[Path], num_samples: int | None,
                        length: int) -> Tensor:
    """Windows of `length` tokens from the files' text, int64 [num_samples, length]. Raises ConfigError."""
    check_int("num_samples", num_samples, 1, optional=True)
    check_int("length", length, 2)
    assert tokenizer is not None
    if missing := [file for file in files if not file.is_file()]:
        raise reject("calibration", str(missing[0]), "text files that exist")
    text = "\n".join(read_text(file) for file in files) if files else calibration_text()
    if not text.strip():
        raise ConfigError(f"calibration={', '.join(map(str, files))} holds no text; allowed: text of at least one "
                          f"window of length={length} tokens")
    token_ids = tokenizer.encode(text)
    if len(token_ids) < (num_samples or 1) * length:
        raise ConfigError(f"the calibration text has {len(token_ids):,} tokens, and {num_samples or 1} windows of "
                          f"length={length} take {(num_samples or 1) * length:,}; allowed: more text, a smaller "
                          "--length" + (f", or --num-samples {fits}" if (fits := len(token_ids) // length) else ""))
    return cut_windows(token_ids, length, num_samples or NUM_WINDOWS)


def run_of(model: CausalLM, options: QuantizeOptions, windows: Tensor | None) -> str:
    """A description of the run: the same weights, options and calibration text make the same matrices."""
    digest = hashlib.sha256(f"{version('llm-inference-lab')} {options} {model.spec}".encode())
    for name, tensor in [*model.named_parameters(), *([] if windows is None else [("windows", windows)])]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(options: QuantizeOptions, model: CausalLM, checkpoint_format: str) -> GPTQSettings:
    meta: Mapping[str, Any] = {"quantizer": [f"llm-inference-lab:{version('llm-inference-lab')}"],
                               "method": options.method}
    if options.lm_head and model.spec.tie_word_embeddings:
        meta = tied_meta(meta)
    ordered = options.method == "gptq" and options.desc_act and not options.act_group_aware
    return GPTQSettings(options.bits, options.group_size, ordered, options.sym, checkpoint_format, options.lm_head,
                        damp_percent=options.damp_percent if 0 < options.damp_percent < 1 else None, meta=meta)


def _dtype_of(model: str, source: Path) -> torch.dtype:
    """Of what stays plain: the model's own type; bfloat16 for a GGUF file, where 16 bits were the origin."""
    config = read_json(source / "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return torch.bfloat16 if gguf_file(model) is not None else getattr(torch, name, torch.float32)


class _Bar:
    """Progress, and the worst error of each finished part."""

    def __init__(self, console: Console | None, total: int) -> None:
        self.total, self.console = total, console or Console(quiet=True)
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, transient=True)
        self.task = self.progress.add_task("quantising", total=total)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self) -> None:
        self.progress.advance(self.task)

    def report(self, part: str, reports: list[MatrixReport]) -> None:
        errors = [f"{report.name.rpartition('.')[2]} {report.error:.2e}" for report in reports
                  if report.error is not None]
        self.progress.console.print(f"{part:18} {'  '.join(errors)}  {sum(r.seconds for r in reports):.1f} s",
                                    highlight=False, soft_wrap=True)
        self.advance()


class _Counting:
    """A store; parts that it held already count as progress too."""

    def __init__(self, store: PartStore, bar: _Bar) -> None:
        self.store, self.bar, self.put = store, bar, store.put

    def get(self, part: str) -> Any:
        if (known := self.store.get(part)) is not None:
            self.bar.advance()
        return known


def _command(
    quantize_options: dict[str, Any],
    model: Annotated[str | None, typer.Argument(
        help="Required: the default model's name, a Hugging Face folder or id, or a GGUF file.",
        show_default=False)] = None,
    folder: Annotated[Path | None, typer.Argument(help="Required: where the quantised model is written.",
                                                  show_default=False)] = None,
    calibration: Annotated[list[Path] | None, typer.Option(
        help="UTF-8 text to calibrate on; may be repeated (default: prose that comes with the lab).")] = None,
    num_samples: Annotated[int | None, typer.Option(
        help=f"Windows of calibration text (default: {NUM_WINDOWS}, or as many as it has).")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = LENGTH,
    checkpoint_format: Annotated[str | None, typer.Option(
        help="gptq (zero points less one) or gptq_v2 (default: gptq if symmetric, else gptq_v2).")] = None,
    force: Annotated[bool, typer.Option(help="Replace a model that is there.")] = False,
) -> None:
    """Quantise a model into a folder that this lab and GPTQModel read.

    Transformers reads it with --no-lm-head, vLLM with --sym --act-group-aware --no-lm-head.
    """
    if model is None or folder is None:
        raise ConfigError("quantize wants a model and a folder to write; allowed: such as quantize "
                          "smollm2-135m-instruct smollm2-4bit")
    console = Console()
    try:
        written = quantize(model, folder, QuantizeOptions(**quantize_options), calibration=calibration or (),
                           num_samples=num_samples, length=length, checkpoint_format=checkpoint_format, force=force,
                           console=console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on after the layers that are finished")
        raise typer.Exit(130) from None
    console.print(summary(written), highlight=False)


def summary(written: Written) -> Table:
    """What was made, in a few lines."""
    table, quantized = Table(show_header=False, box=None), written.quantized
    options, errors = quantized.options, [r for r in quantized.report if r.error is not None]
    table.add_row("folder", str(written.folder))
    table.add_row("weights", f"{options.method}, {options.bits} bits, groups of {options.group_size}, "
                             f"{'symmetric' if options.sym else 'asymmetric'}")
    table.add_row("bytes", f"{written.num_bytes:,} ({written.source_bytes:,} in 16 bits)")
    if written.copy_bytes:
        table.add_row("", f"{written.copy_bytes:,} of them are the output matrix once more, plain, for other readers")
    table.add_row("seconds", f"{written.seconds:.1f}")
    if quantized.num_tokens:
        table.add_row("calibration", f"{quantized.num_tokens:,} tokens")
    if errors:
        worst = max(errors, key=lambda report: report.error or 0.0)
        nearest = [report.nearest_error for report in errors if report.nearest_error]
        table.add_row("output error", f"{sum(r.error or 0 for r in errors) / len(errors):.2e} on average"
                      + (f" ({sum(nearest) / len(nearest):.2e} rounded to nearest)" if nearest else "")
                      + f", at most {worst.error:.2e} in {worst.name}")
    if written.resumed:
        table.add_row("resumed", f"{written.resumed} parts from an interrupted run")
    return table


COMMAND = with_flags(_command, {"quantize_options": flags_of(QuantizeOptions)})
COMMAND.__name__ = "quantize"
