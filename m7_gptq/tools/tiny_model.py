"""A tiny model that has learnt something: a byte-level Qwen3, trained on the calibration books.

    python -m m7_gptq.tools.tiny_model --output FOLDER

Random weights say little about quantisation: all inputs matter alike, and there is no text that the model is good at.
This one predicts bytes of English well enough for lost bits to show in its perplexity. Its folder lies in the tests.
"""
from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from m0_basics.loading.loader import new_model
from m0_basics.loading.weights import hf_parts, part_rows
from m0_basics.model import CausalLM
from m0_basics.model_spec import ModelSpec
from m0_basics.tools.testing.tiny_models import BOS, CHAT_TEMPLATE, EOS

from ..calibration import cut_windows, hidden_states
from .perplexity import perplexity, plain_logits
from .texts import calibration_text, evaluation_text

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 272, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_bias": False, "eos_token_id": 257, "bos_token_id": 256, "dtype": "float16",
}
_LENGTH, _WINDOWS, _RATE = 128, 16, 4e-3    # bytes of a training window, windows of a step, highest learning rate


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer`: 256 bytes and two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, normalized=False), AddedToken(EOS, normalized=False)])
    return tokenizer


def fresh_model(seed: int = 0) -> CausalLM:
    """The model before training, float32, its parameters open to gradients."""
    spec = ModelSpec.from_hf_config(CONFIG)
    model = new_model(spec, None, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in model.named_parameters():
        deviation = 1 / math.sqrt(parameter.shape[-1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= math.sqrt(2 * spec.num_hidden_layers)
        state[name] = (torch.ones(parameter.shape) if name.endswith("norm.weight")
                       else deviation * torch.randn(parameter.shape, generator=generator))
    model.load_state_dict(state, assign=True)
    model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(True)


def train(model: CausalLM, token_ids: Tensor, steps: int, seed: int = 0, report_every: int = 100) -> None:
    """AdamW on random windows of the text, the learning rate warmed up and let down along a cosine."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
                                  lr=_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))))
    generator, start, recent = torch.Generator().manual_seed(seed), time.perf_counter(), list[float]()
    for step in range(1, steps + 1):
        first = torch.randint(len(token_ids) - _LENGTH, (_WINDOWS, 1), generator=generator)
        windows = token_ids[first + torch.arange(_LENGTH)]
        logits = model.compute_logits(hidden_states(model, windows)[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % report_every == 0:
            print(f"step {step} of {steps}: perplexity of a byte {math.exp(sum(recent) / len(recent)):.3f}, "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
            recent.clear()


def save(model: CausalLM, folder: Path) -> None:
    """As a Hugging Face folder, the weights in float16."""
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.named_parameters():
        parts = hf_parts(name)
        rows = part_rows(parts, parameter.shape[0], model.spec)
        for part, tensor in zip(parts, parameter.detach().half().split(rows), strict=True):
            tensors[part] = tensor.clone()
    tensors.pop("lm_head.weight", None)                 # the embedding, under its other name
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
                "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def main(output: Annotated[Path, typer.Option(help="The folder to write.")],
         steps: Annotated[int, typer.Option(help="Training steps.")] = 1200,
         seed: Annotated[int, typer.Option(help="Of the first weights, and of the windows.")] = 0) -> None:
    """Train the tiny byte-level Qwen3 and write it to a folder."""
    def ids(text: str) -> list[int]:
        encoded: list[int] = byte_tokenizer().encode(text).ids
        return encoded

    model = fresh_model(seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, torch.tensor(ids(calibration_text())), steps, seed)
    save(model.requires_grad_(False), output)
    held_out = perplexity(plain_logits(model), cut_windows(ids(evaluation_text("test")), _LENGTH))
    print(f"perplexity of a byte of held-out text: {held_out:.3f}")


if __name__ == "__main__":
    typer.run(main)
