"""GPTQModel's half of the comparison, run by an interpreter that has it: this file imports nothing of the lab.

    python gptqmodel_side.py JOBS.json

JOBS.json is a list of jobs. "quantize" makes a packed folder from a model; "dequantise" loads a packed folder by
GPTQModel and saves the weights that its layers multiply with. The result of each job goes into JOBS.json.done: null,
or what went wrong.
"""
from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

_TEXT = "the quick brown fox jumps over the lazy dog and runs into the forest "


def quantize(job: dict[str, Any]) -> None:
    """Quantise job["model"] into job["folder"] with job["options"] of GPTQModel's QuantizeConfig."""
    gptqmodel: Any = importlib.import_module("gptqmodel")
    config = gptqmodel.QuantizeConfig(device="cpu", offload_to_disk=False, **job["options"])
    model = gptqmodel.GPTQModel.load(job["model"], config, backend=gptqmodel.BACKEND.TORCH)
    ids = [list((_TEXT * 8).encode()[i:i + 96]) for i in range(24)]
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
    model.save(job["folder"])


def dequantise(job: dict[str, Any]) -> None:
    """Save the weights [outputs, inputs] of job["folder"]'s packed layers to job["values"]: float32, and its own fp16.

    float32: the same formula with the scales in float32, where scale * (code - zero) is exact.
    """
    gptqmodel: Any = importlib.import_module("gptqmodel")
    import torch
    from safetensors.torch import save_file
    model = gptqmodel.GPTQModel.load(job["folder"], backend=gptqmodel.BACKEND.TORCH, device="cpu",
                                     dtype=torch.float16)           # by itself it rounds the scales to bfloat16
    values = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            half = module.dequantize_weight().T.contiguous()
            assert half.dtype is torch.float16
            module.scales = module.scales.float()
            values[f"{name}.half"] = half
            values[f"{name}.single"] = module.dequantize_weight().T.contiguous().float()
    save_file(values, job["values"])


def main(jobs_file: Path) -> None:
    """Do every job; one that fails does not keep the others from being done."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    jobs = json.loads(jobs_file.read_text())
    done: list[str | None] = []
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)                               # it leaves a folder of logs
        for job in jobs:
            try:
                {"quantize": quantize, "dequantise": dequantise}[job["do"]](job)
                done.append(None)
            except Exception as error:
                done.append(f"{type(error).__name__}: {error}")
        os.chdir("/")
    Path(f"{jobs_file}.done").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
