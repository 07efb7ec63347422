"""Which block holds what: the seam, and what both indexes share.

    tokens      [ t0 .. t15 | t16 .. t31 | t32 .. ]
    block       [     7     |      2     ]              "2" is what follows 7: the same tokens behind others are another

Keys and values of a token depend on all tokens before it. So a block is known by its tokens *and* by the block before
it, up to the root of its salt. Nothing here is a tensor, and no block is ever handed out by its hash alone: tokens are
compared.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from dataclasses import dataclass

from m0_basics.request import Sequence

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """The longest known beginning of a sequence: whole blocks, and maybe the first tokens of one more."""

    blocks: Items[int] = ()
    partial: int | None = None              # the block whose first `num_partial` tokens are the next ones
    num_partial: int = 0
    serials: Items[int] = ()                # of `blocks`: what `PrefixIndex.serial` said

    def num_tokens(self, block_size: int) -> int:
        """Tokens whose keys and values are known."""
        return len(self.blocks) * block_size + self.num_partial


NOTHING = Match()


class PrefixIndex(ABC):
    """Finds cached blocks by the tokens that they hold. Every block in it stands behind its parent, which is in it."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.version = 0                    # counts the changes: while it stays, a match stays
        self._num_inserted = 0

    @abstractmethod
    def __len__(self) -> int:
        """Blocks in the index."""

    @abstractmethod
    def serial(self, block: int) -> int | None:
        """The number under which a block was inserted, another one each time; None for a block that is not there."""

    def __contains__(self, block: int) -> bool:
        return self.serial(block) is not None

    @abstractmethod
    def match(self, sequence: Sequence, max_tokens: int, earlier: Match = NOTHING) -> Match:
        """The longest known beginning of a sequence's first `max_tokens` tokens.

        `earlier`: what was found for the same sequence before; the search goes on from what is left of it.
        """

    @abstractmethod
    def insert(self, sequence: Sequence, number: int, parent: int | None, block: int) -> int | None:
        """`block` holds a sequence's whole block `number`; `parent` holds the one before it (None: it is the first).

        Returns the block that is known for these tokens from now on: `block`, or one that was known before. None where
        `parent` is not in the index: then nothing can be found behind it.
        """

    @abstractmethod
    def remove(self, block: int) -> None:
        """A block is about to hold something else: it, and what stands behind it, is not found any more."""

    def _still_known(self, match: Match) -> list[int]:
        """The blocks of an earlier match that are in the index as they were then: those before one that is."""
        num_left = len(match.blocks)
        while num_left and self.serial(match.blocks[num_left - 1]) != match.serials[num_left - 1]:
            num_left -= 1
        return list(match.blocks[:num_left])

    def _matched(self, blocks: list[int], earlier: Match, num_kept: int, partial: int | None = None,
                 num_partial: int = 0) -> Match:
        """A match whose first `num_kept` blocks are those of an earlier one."""
        serials = [*earlier.serials[:num_kept], *(s for b in blocks[num_kept:] if (s := self.serial(b)) is not None)]
        return Match(blocks, partial, num_partial, serials)

    def _next_serial(self) -> int:
        self.version += 1
        self._num_inserted += 1
        return self._num_inserted

    def tokens_of(self, sequence: Sequence, number: int) -> Tokens:
        """A sequence's tokens in its block `number`."""
        return tuple(sequence.data.token_slice(number * self.block_size, (number + 1) * self.block_size))
