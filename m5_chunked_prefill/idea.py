"""The idea of this milestone: a step is not a prompt or a batch of decodes, it is so many tokens of anybody.

    budget 8     step 1          step 2          step 3          step 4
    A decodes    [a]             [a]             [a]             [a]
    B            [0 .. 7)        [7 .. 14)       [14 .. 20)      [b]        a prompt of 20 tokens, in pieces

A piece of a prompt attends to all before it, through the cache, and computes the very numbers that the whole prompt
would have. Then guesses cost next to nothing: they are one more piece behind a decode, and the step says which were
right. T tokens, D dimensions. Run me: python m5_chunked_prefill/idea.py
"""
from __future__ import annotations

import torch
from torch import Tensor

D, VOCAB = 16, 11
torch.manual_seed(0)
EMBED, WQ, WK, WV = torch.randn(VOCAB, D), torch.randn(D, D) / 4, torch.randn(D, D) / 4, torch.randn(D, D)


class Text:
    """A sequence: its tokens, and the keys and values of those that are computed."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.k, self.v = tokens, torch.empty(0, D), torch.empty(0, D)

    @property
    def num_computed(self) -> int:
        return len(self.k)

    def run(self, tokens: list[int]) -> Tensor:
        """The next tokens, behind those that are computed -> what each says comes after it: [T]."""
        x = EMBED[tokens]
        self.k, self.v = torch.cat([self.k, x @ WK]), torch.cat([self.v, x @ WV])
        scores = (x @ WQ) @ self.k.T
        first = self.num_computed - len(tokens)
        mask = torch.arange(self.num_computed) > first + torch.arange(len(tokens))[:, None]
        out = torch.softmax(scores.masked_fill(mask, float("-inf")), dim=1) @ self.v
        return (out @ EMBED.T).argmax(dim=1)


def step(texts: list[Text], budget: int) -> list[int]:
    """Decodes first, then pieces of prompts while the budget lasts. Returns how many tokens each ran."""
    ran = dict.fromkeys(texts, 0)
    for text in sorted(texts, key=lambda t: len(t.tokens) - t.num_computed > 1):        # False, the decodes, first
        piece = text.tokens[text.num_computed:][:budget - sum(ran.values())]
        if piece:
            following = text.run(piece)
            ran[text] = len(piece)
            if text.num_computed == len(text.tokens):                                   # the newest token ran
                text.tokens.append(int(following[-1]))
    return list(ran.values())


def verify(text: Text, guesses: list[int]) -> list[int]:
    """Run the newest token and the guesses as one piece; keep the tokens up to the first that was not foreseen."""
    start = text.num_computed
    following = text.run([text.tokens[-1], *guesses]).tolist()
    right = next((i for i, guess in enumerate(guesses) if guess != following[i]), len(guesses))
    text.k, text.v = text.k[:start + 1 + right], text.v[:start + 1 + right]             # wrong ones are taken back
    text.tokens += following[:right + 1]
    return following[:right + 1]


if __name__ == "__main__":
    prompt = [int(t) for t in torch.randint(VOCAB, (20,))]
    whole, a, b = Text(prompt.copy()), Text([3]), Text(prompt.copy())
    whole.tokens.append(int(whole.run(prompt)[-1]))
    for number in range(1, 5):
        print(f"step {number}: A runs {step([a, b], budget=8)[0]} token, B has {min(b.num_computed, 20)} of 20")
    assert len(a.tokens) == 5 and b.tokens[:21] == whole.tokens
    assert torch.allclose(b.k[:20], whole.k, atol=1e-6)
    truth = Text(whole.tokens.copy())
    truth.k, truth.v = whole.k, whole.v
    for _ in range(5):
        step([truth], budget=8)
    right = truth.tokens[21:24]
    kept = verify(whole, [*right[:2], (right[2] + 1) % VOCAB, 0])
    assert kept == right and whole.tokens == truth.tokens[:24]
    print(f"4 guesses, 2 right: {len(kept)} tokens from one step, the same that 3 steps give")
