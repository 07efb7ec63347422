"""The default model as transformers sees it: its own reading of the GGUF file, and 100 greedy tokens per prompt.

Computed once per machine (about two minutes) and kept in a folder that git ignores, keyed by everything that
the result depends on. transformers dequantises the file with its own code, so this checks ours as well.
"""
from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from m0_basics.loading.loader import default_model_file
from m0_basics.tools.divergence import DEFAULT_PROMPTS, run_transformers

NUM_TOKENS = 100


@dataclass(frozen=True)
class RealReference:
    """What transformers makes of the default model in float32, going on after an end-of-sequence token."""

    folder: Path                            # the model as transformers saved it: safetensors and tokenizer
    prompts: list[str]
    prompt_token_ids: list[list[int]]       # from transformers' own tokenizer
    token_ids: list[list[int]]              # NUM_TOKENS per prompt
    smallest_gap: float                     # between the best and the second best logit, over all those tokens


def real_reference(cache: Path) -> RealReference:
    """Return the reference, from the folder `cache` or computed into it."""
    folder = cache / f"smollm2-reference-{_key()}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):        # a second process waits for what the first one computes
        if not folder.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix="computing-", dir=cache))
            try:
                _compute(scratch)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return RealReference(folder, **json.loads((folder / "reference.json").read_text(encoding="utf-8")))


def _key() -> str:
    import transformers
    digest = hashlib.sha256(default_model_file().read_bytes())
    digest.update(repr((torch.__version__, transformers.__version__, DEFAULT_PROMPTS, NUM_TOKENS)).encode())
    return digest.hexdigest()[:16]


def _compute(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    file = default_model_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True)).eval()
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    model.generation_config = GenerationConfig()
    prompts = [tokenizer(prompt).input_ids for prompt in DEFAULT_PROMPTS]
    runs = [run_transformers(model, prompt, NUM_TOKENS) for prompt in prompts]
    best = torch.stack([logits for run in runs for logits in run.logits]).topk(2, dim=-1).values
    (folder / "reference.json").write_text(json.dumps({
        "prompts": DEFAULT_PROMPTS, "prompt_token_ids": prompts, "token_ids": [run.token_ids for run in runs],
        "smallest_gap": (best[:, 0] - best[:, 1]).min().item()}), encoding="utf-8")
