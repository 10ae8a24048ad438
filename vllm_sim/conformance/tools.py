"""What adapters share: a world of requests, slots of blocks, states without the names of blocks."""

from __future__ import annotations

import marshal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations, product


@dataclass(frozen=True)
class Engine:
    """A world that engines share: requests, each a prompt and how many tokens it generates.

    A prompt of letters is one token a letter, so that prompts share what they begin with.
    """

    num_blocks: int
    block_size: int
    requests: tuple[tuple[str, int], ...]
    max_batched_tokens: int = 8
    max_num_seqs: int = 4

    def __str__(self) -> str:
        asked = ", ".join(f"{prompt}+{count}" for prompt, count in self.requests)
        return f"{self.num_blocks} blocks of {self.block_size}, requests {asked}"

    def prompt(self, number: int) -> list[int]:
        return [ord(letter) for letter in self.requests[number][0]]


def slots_of(blocks: Sequence[int], count: int, size: int) -> list[int]:
    """The slots of a sequence's first `count` positions."""
    return [blocks[position // size] * size + position % size for position in range(count)]


def slot_pairs(pairs: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """(source, target) blocks as slots."""
    return [(old * size + at, new * size + at) for old, new in pairs for at in range(size)]


def canonical(rows: Iterable[tuple[tuple, Sequence[int]]]) -> bytes:
    """Tables without the names of blocks and sequences: rows of (what is known of it, its blocks).

    Blocks are named in the order in which they are met, going through the tables in the order of
    what is known of them; where that leaves a choice, all choices are tried and the least counts.
    """
    rows = sorted((known, tuple(blocks)) for known, blocks in rows)
    # Tables that hold the same blocks are equal in all respects: they stay together.
    ties: list[list[list]] = []
    last: tuple | None = None
    for known, blocks in rows:
        if known != last:
            ties.append([])
            last = known
        if not ties[-1] or ties[-1][-1][0] != blocks:
            ties[-1].append([blocks, 0])
        ties[-1][-1][1] += 1
    if all(len(tie) == 1 for tie in ties):
        named = _named([tie[0] for tie in ties])
    else:
        orders = product(*map(permutations, ties))
        named = min(_named([table for tie in order for table in tie]) for order in orders)
    return marshal.dumps(([known for known, _ in rows], named), 0)  # as bytes it is small


def _named(tables: list[list]) -> list[int]:
    """Tables (blocks, how many hold just these) with blocks named in order."""
    names: dict[int, int] = {}
    result = []
    for blocks, count in tables:
        result.append(count)
        result += [names.setdefault(block, len(names)) for block in blocks]
    return result
