"""Why two engines disagree: the first token that differs, and how close the decision was.

Greedy decoding turns a difference in the last bit of a logit into a different token, and from there on into a
different text. So "the texts differ" says nothing. What says something is the gap between the two candidate
tokens at the first step that differs, measured in units of the last place of the precision that computed it.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base_llm import BaseLLM
from ..config import ConfigError
from ..input_processor import Prompt
from ..loading.loader import resolve_model
from ..sampling_params import SamplingParams
from .progress import Progress

RESOLUTION_ULPS = 2
DEFAULT_PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at",
                   "The three laws of motion are", "从前有一座山，", "人工智能是", "北京是中国的")
LogitsFn = Callable[[list[int]], Tensor]        # token ids of a sequence -> logits [vocab] for its next token


@dataclass(frozen=True)
class Candidate:
    """One of the two tokens that the engines chose, and its logit under each."""

    token_id: int
    text: str | None
    logit_a: float
    logit_b: float


@dataclass(frozen=True)
class Divergence:
    """The first step at which engine A and engine B chose different tokens.

    A gap is the logit of A's token less the logit of B's: positive where the engine prefers A's token. `ulp` is
    one unit in the last place of `dtype` at the larger of the candidates' logits.
    """

    step: int                       # index among the output tokens
    position: int                   # index in the sequence, prompt included
    token_a: Candidate
    token_b: Candidate
    gap_a: float
    gap_b: float
    ulp: float
    max_logit_difference: float     # largest |A - B| over the vocabulary at this step
    dtype: torch.dtype

    @property
    def within_resolution(self) -> bool:
        """Whether rounding alone can explain the choice: in A and in B the gap is at most RESOLUTION_ULPS ulp.

        A correct engine may still be off by half an ulp where it rounds the logit to `dtype`, and by about as
        much again because the hidden state it multiplied was rounded to `dtype` too: one ulp for each of the
        two candidates, in opposite directions at worst, which is two. The rule is meant for logits produced in
        16 bits, whose sums are kept in float32. In float32 the sums themselves round at every addition, and
        honest engines differ by some ten ulp; there a gap beyond two ulp is no proof of an error.
        """
        return max(abs(self.gap_a), abs(self.gap_b)) <= RESOLUTION_ULPS * self.ulp

    def report(self) -> str:
        """Some lines of text for a person."""
        name = str(self.dtype).removeprefix("torch.")

        def line(label: str, candidate: Candidate) -> str:
            text = "" if candidate.text is None else repr(candidate.text)
            return f"  {label} {candidate.token_id:>7} {text:<20} {candidate.logit_a:>14.6f} {candidate.logit_b:>14.6f}"

        verdict = ("within the resolution of {}: rounding alone can explain it" if self.within_resolution else
                   "beyond the resolution of {}: rounding of the logits alone does not explain it")
        return "\n".join((
            f"first difference at output token {self.step} (position {self.position})",
            f"  {'':<8} {'id':>7} {'text':<20} {'logit in A':>14} {'logit in B':>14}",
            line("A chose ", self.token_a),
            line("B chose ", self.token_b),
            f"  {'gap':<37} {self.gap_a:>14.6f} {self.gap_b:>14.6f}",
            f"  {'gap in ulp':<37} {self.gap_a / self.ulp:>14.2f} {self.gap_b / self.ulp:>14.2f}",
            f"  one ulp of {name} here is {self.ulp:.3g}; over the whole vocabulary A and B differ by at most "
            f"{self.max_logit_difference:.3g} ({self.max_logit_difference / self.ulp:.1f} ulp)",
            f"  verdict: {verdict.format(name)} ({RESOLUTION_ULPS} ulp)",
        ))


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from |value| to the next larger number of `dtype`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.smallest_normal)))


def explain_divergence(prompt_token_ids: Sequence[int], tokens_a: Sequence[int], tokens_b: Sequence[int],
                       logits_fn_a: LogitsFn, logits_fn_b: LogitsFn, dtype: torch.dtype,
                       decode: Callable[[list[int]], str] | None = None) -> Divergence | None:
    """Describe the first token in which two greedy outputs differ; None where they are the same.

    The functions are called once, with the prompt and the tokens that both outputs share. `dtype` is the
    precision in which both engines compute. Raises ValueError where one output is the beginning of the other:
    then the engines stop by different rules, and no logit explains that.
    """
    step = next((i for i, (a, b) in enumerate(zip(tokens_a, tokens_b, strict=False)) if a != b), None)
    if step is None:
        if len(tokens_a) != len(tokens_b):
            raise ValueError(f"the outputs have {len(tokens_a)} and {len(tokens_b)} tokens and differ in nothing else: "
                             "the engines stop by different rules")
        return None
    prefix = [*prompt_token_ids, *tokens_a[:step]]
    a, b = (logits_fn(prefix).detach().float().cpu() for logits_fn in (logits_fn_a, logits_fn_b))

    def candidate(token_id: int) -> Candidate:
        return Candidate(token_id, decode([token_id]) if decode else None, a[token_id].item(), b[token_id].item())

    first, second = candidate(tokens_a[step]), candidate(tokens_b[step])
    largest = max(abs(x) for c in (first, second) for x in (c.logit_a, c.logit_b))
    return Divergence(step, len(prefix), first, second, first.logit_a - second.logit_a, first.logit_b - second.logit_b,
                      ulp(largest, dtype), (a - b).abs().max().item(), dtype)


@dataclass(frozen=True)
class GreedyRun:
    """One greedy output with the logits that decided each of its tokens."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    logits: list[Tensor]            # one [vocab] per output token

    def logits_fn(self, token_ids: list[int]) -> Tensor:
        """The recorded logits for the token after `token_ids`, which has to be a beginning of this run."""
        step = len(token_ids) - len(self.prompt_token_ids)
        assert token_ids == self.prompt_token_ids + self.token_ids[:step], "this run did not pass here"
        return self.logits[step]


def run_engine(llm: BaseLLM, prompt: Prompt, max_tokens: int) -> GreedyRun:
    """Generate greedily with `llm`, recording the logits as they leave the runner.

    Recording the run itself, instead of computing its logits again, keeps what distinguishes the engine: its
    cache, its chunks, its kernels.
    """
    runner: Any = llm.engine.runner                 # type: ignore[attr-defined]
    execute, rows = runner.execute, list[Tensor]()

    def recorded(inputs: Any) -> Tensor:
        logits: Tensor = execute(inputs)
        rows.extend(logits.to("cpu", torch.float32, copy=True).unbind(0))      # valid until the next call
        return logits

    runner.execute = recorded
    try:
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)[0]
    finally:
        del runner.execute
    token_ids = output.outputs[0].token_ids
    if len(rows) != len(token_ids):
        raise ConfigError(f"{len(rows)} rows of logits for {len(token_ids)} tokens; allowed: an engine that computes "
                          "one row for each token (no drafts)")
    return GreedyRun(output.prompt_token_ids, token_ids, rows)


def run_transformers(model: Any, prompt_token_ids: list[int], max_tokens: int,
                     eos_token_ids: Sequence[int] = ()) -> GreedyRun:
    """The same with a transformers model."""
    input_ids = torch.tensor([prompt_token_ids], device=model.device)
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False,
                            max_new_tokens=max_tokens, eos_token_id=list(eos_token_ids) or None, pad_token_id=0,
                            output_logits=True, return_dict_in_generate=True)
    token_ids = output.sequences[0, len(prompt_token_ids):].tolist()
    return GreedyRun(prompt_token_ids, token_ids, [logits[0].float().cpu() for logits in output.logits])


def compare_with_transformers(llm: BaseLLM, prompts: Sequence[Prompt], max_tokens: int = 64,
                              folder: Path | None = None) -> list[Divergence | None]:
    """Run each prompt with `llm` (A) and with transformers (B), both greedily and in the precision of `llm`.

    Returns one entry per prompt: where they part, or None. transformers loads `folder`; by default the folder
    that `llm` was loaded from. Raises ConfigError where transformers is missing or cannot load it.
    """
    engine: Any = llm.engine
    dtype: torch.dtype = engine.runner.model.dtype
    model = _load_transformers(folder or resolve_model(llm.config.model_config.model, dtype), dtype,
                               engine.runner.model.device)
    decode = llm.tokenizer.decode if llm.tokenizer else None
    result = []
    with Progress("divergence", len(prompts)) as progress:
        for prompt in prompts:
            progress.now(str(prompt))
            ours = run_engine(llm, prompt, max_tokens)
            theirs = run_transformers(model, ours.prompt_token_ids, _room(llm, ours, max_tokens),
                                      llm.spec.eos_token_ids)
            result.append(explain_divergence(ours.prompt_token_ids, ours.token_ids, theirs.token_ids, ours.logits_fn,
                                             theirs.logits_fn, dtype, decode))
            progress.step()
    return result


def _room(llm: BaseLLM, run: GreedyRun, max_tokens: int) -> int:
    """As many tokens as our engine could have given: transformers knows no max_model_len."""
    longest = llm.config.model_config.max_model_len
    assert longest is not None
    return min(max_tokens, longest - len(run.prompt_token_ids))


def _load_transformers(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        from transformers import AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        raise ConfigError("comparing with transformers needs it; get it with: pip install 'llm-inference-lab[bench]'"
                          ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).to(device).eval()
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {folder}: {error}") from error
    model.generation_config = GenerationConfig()        # a folder may bring sampling settings of its own
    return model
