"""Block hashes: one number for a block's tokens and all that stands before them.

    h0 = H(root, tokens 0 .. 15)      h1 = H(h0, tokens 16 .. 31)      h2 = H(h1, tokens 32 .. 47)
    root = H(what the numbers in the cache depend on, salt)

Two sequences have the same h2 exactly if their first 48 tokens are the same (and their salts): one look into a table
finds a block, however long the prefix. SHA-256, because a collision would show one user another's text; tokens are
compared all the same.
"""
from __future__ import annotations

from array import array
from hashlib import sha256
from weakref import WeakKeyDictionary

from m0_basics.request import Sequence

from .prefix_index import NOTHING, Match, PrefixIndex, Tokens

BlockHash = bytes


class BlockHasher:
    """Hashes of sequences' blocks; each is worked out once."""

    def __init__(self, block_size: int, fingerprint: str) -> None:
        """`fingerprint`: the model, the type of the cache, and whatever else the numbers in a block depend on."""
        self.block_size = block_size
        self.fingerprint = fingerprint
        self._known: WeakKeyDictionary[Sequence, list[BlockHash]] = WeakKeyDictionary()

    def root(self, salt: str) -> BlockHash:
        """What the first block of a salt's sequences follows."""
        fingerprint = self.fingerprint.encode()
        return sha256(len(fingerprint).to_bytes(8, "little") + fingerprint + salt.encode()).digest()

    def hashes(self, sequence: Sequence, num_blocks: int) -> list[BlockHash]:
        """Of a sequence's first `num_blocks` blocks, which are whole. At least so many: do not change the list."""
        known = self._known.setdefault(sequence, [])
        while len(known) < num_blocks:
            start = len(known) * self.block_size
            tokens = sequence.data.token_slice(start, start + self.block_size)
            known.append(self.next_hash(known[-1] if known else self.root(sequence.cache_salt), tokens))
        return known

    @staticmethod
    def next_hash(parent: BlockHash, tokens: list[int] | Tokens) -> BlockHash:
        """H(parent, tokens): the tokens as 8 bytes each."""
        return sha256(parent + array("q", tokens).tobytes()).digest()


class _Entry:
    """What the table knows of a block."""

    __slots__ = ("children", "key", "parent", "serial", "tokens")

    def __init__(self, key: BlockHash, parent: int | None, tokens: Tokens, serial: int) -> None:
        self.key, self.parent, self.tokens, self.serial = key, parent, tokens, serial
        self.children: list[int] = []


class HashIndex(PrefixIndex):
    """A table from hash to block. Whole blocks only; a look-up costs the same in a full cache as in an empty one."""

    def __init__(self, hasher: BlockHasher) -> None:
        super().__init__(hasher.block_size)
        self.hasher = hasher
        self._block_of: dict[BlockHash, int] = {}
        self._entries: dict[int, _Entry] = {}           # by block

    def __len__(self) -> int:
        return len(self._entries)

    def serial(self, block: int) -> int | None:
        return entry.serial if (entry := self._entries.get(block)) else None

    def match(self, sequence: Sequence, max_tokens: int, earlier: Match = NOTHING) -> Match:
        num_blocks = sequence.num_tokens // self.block_size
        hashes = self.hasher.hashes(sequence, num_blocks)
        blocks = self._still_known(earlier)
        num_kept = len(blocks)
        for number in range(num_kept, num_blocks):
            block = self._find(hashes[number], blocks[-1] if blocks else None, self.tokens_of(sequence, number))
            if block is None:
                break
            blocks.append(block)
        num_whole, rest = divmod(max_tokens, self.block_size)
        if num_whole < len(blocks):         # a block is known, but not all of it is wanted: its first tokens are
            return self._matched(blocks[:num_whole], earlier, min(num_kept, num_whole),
                                 blocks[num_whole] if rest else None, rest)
        return self._matched(blocks, earlier, num_kept)

    def insert(self, sequence: Sequence, number: int, parent: int | None, block: int) -> int | None:
        if parent is not None and parent not in self._entries:
            return None
        key, tokens = self.hasher.hashes(sequence, number + 1)[number], self.tokens_of(sequence, number)
        known = self._find(key, parent, tokens)
        if known is not None:
            return known
        if key in self._block_of:           # a collision: the older one stays
            return None
        self._block_of[key] = block
        self._entries[block] = _Entry(key, parent, tokens, self._next_serial())
        if parent is not None:
            self._entries[parent].children.append(block)
        return block

    def remove(self, block: int) -> None:
        if (entry := self._entries.get(block)) is None:
            return
        if entry.parent is not None:
            self._entries[entry.parent].children.remove(block)
        behind = [block]
        while behind:                                   # leaves go first, so there is but one as a rule
            lost = self._entries.pop(behind.pop())
            del self._block_of[lost.key]
            behind += lost.children
        self.version += 1

    def _find(self, key: BlockHash, parent: int | None, tokens: Tokens) -> int | None:
        """The block of a hash, if it holds these tokens behind that parent."""
        block = self._block_of.get(key)
        if block is None:
            return None
        entry = self._entries[block]
        return block if entry.parent == parent and entry.tokens == tokens else None
