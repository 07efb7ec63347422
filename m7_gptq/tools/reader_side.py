"""A peer's half of "does it read our folders", run by the peer's interpreter: this file imports nothing of the lab.

    python reader_side.py JOB.json

JOB.json names the reader, a folder, prompts as token ids, and how many tokens to generate greedily. JOB.json.done gets
the tokens of each prompt and the reader's version, or what went wrong.
"""
from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

Tokens = list[list[int]]


def by_vllm(job: dict[str, Any]) -> tuple[Tokens, str]:
    """vLLM's offline engine, without its compiler, which takes a minute and changes no token."""
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(job["folder"], dtype="bfloat16", max_model_len=256, enforce_eager=True, skip_tokenizer_init=True)
    params = vllm.SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], str(vllm.__version__)


def by_transformers(job: dict[str, Any]) -> tuple[Tokens, str]:
    """`from_pretrained`, which takes its layers from GPTQModel."""
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float16, device_map="cpu")
    return _generate(model, job), transformers.__version__


def by_gptqmodel(job: dict[str, Any]) -> tuple[Tokens, str]:
    """GPTQModel's own loader, and its kernel in PyTorch."""
    import torch
    gptqmodel: Any = importlib.import_module("gptqmodel")
    model = gptqmodel.GPTQModel.load(job["folder"], backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float16)
    return _generate(model.model, job), str(gptqmodel.__version__)


def _generate(model: Any, job: dict[str, Any]) -> Tokens:
    import torch
    model.generation_config.eos_token_id = None         # the end is a token like any other, as in the comparison
    found = []
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": job["max_tokens"], "do_sample": False}
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        found.append(out[0, len(prompt):].tolist())
    return found


READERS = {"vllm": by_vllm, "transformers": by_transformers, "gptqmodel": by_gptqmodel}


def main(file: Path) -> None:
    """Do the job; whatever happens, the answer is written."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    job = json.loads(file.read_text())
    try:
        tokens, version = READERS[job["reader"]](job)
        done: dict[str, Any] = {"tokens": tokens, "version": version}
    except Exception as error:
        done = {"error": f"{type(error).__name__}: {error}"}
    Path(f"{file}.done").write_text(json.dumps(done))


if __name__ == "__main__":
    sys.path.pop(0)                     # this file's folder: its modules would hide others of the same name
    main(Path(sys.argv[1]).resolve())
