"""Our buddy allocator alone: every call in every state.

Searches the chunks that section 6.1 of the paper reserves. What is free is worked out from a map of
blocks, one by one. Addresses count, and so does the order of the free lists: both decide what is
found free later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from allocators import BuddyAllocator
from vllm_sim.conformance.adapter import NOTHING, Operation, Step, Tables


def power_from(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << (count - 1).bit_length()


def copied(buddy: BuddyAllocator) -> BuddyAllocator:
    new = object.__new__(BuddyAllocator)
    new.num_blocks, new.num_free, new.max_order = buddy.num_blocks, buddy.num_free, buddy.max_order
    new.free_chunks = [starts.copy() for starts in buddy.free_chunks]
    new.chunk_order = buddy.chunk_order.copy()
    return new


def frozen(buddy: BuddyAllocator) -> tuple:
    free = tuple(map(tuple, buddy.free_chunks))
    return free, tuple(sorted(buddy.chunk_order.items())), buddy.num_free


def free_of(buddy: BuddyAllocator) -> list[int]:
    chunks = enumerate(buddy.free_chunks)
    return [b for order, starts in chunks for s in starts for b in range(s, s + (1 << order))]


def free_runs(buddy: BuddyAllocator, length: int) -> int:
    """Aligned runs of `length` blocks that no chunk touches."""
    taken = {b for s, order in buddy.chunk_order.items() for b in range(s, s + (1 << order))}
    starts = range(0, buddy.num_blocks - length + 1, length)
    return sum(taken.isdisjoint(range(start, start + length)) for start in starts)


@dataclass(frozen=True)
class Chunks:
    """A buddy allocator over so many blocks."""

    num_blocks: int
    max_chunk: int
    block_size: int = 1


class Buddy:
    """The adapter of the allocator: a chunk is the table of its start, and holds nothing."""

    worlds: ClassVar = {
        f"{blocks} in {chunk}": Chunks(blocks, chunk)
        for chunk, most in {1: 6, 2: 7, 4: 12, 8: 10}.items()
        for blocks in range(1, most + 1)
    }
    required = ("take", "give_back")

    def start(self, world: Chunks) -> None:
        self.buddy = BuddyAllocator(world.num_blocks, world.max_chunk)

    def __deepcopy__(self, _: dict) -> Buddy:
        new = object.__new__(Buddy)
        new.buddy = copied(self.buddy)
        return new

    def tables(self) -> Tables:
        return {s: (range(s, s + (1 << o)), ()) for s, o in self.buddy.chunk_order.items()}

    def free(self) -> list[int]:
        return free_of(self.buddy)

    def key(self) -> tuple:
        return frozen(self.buddy)

    def ref_counts(self) -> None:
        return None

    def cached(self) -> dict:
        return {}

    def operations(self) -> Iterator[Operation]:
        buddy, found = self.buddy, []
        buddy.check_invariants()
        for count in range(1, 2**buddy.max_order + 1):
            size, runs = power_from(count), free_runs(buddy, power_from(count))
            for chunks in range(runs + 2):
                assert buddy.fits(count, chunks) == (chunks <= runs), f"fits({count}, {chunks})"
            found += [Operation("take", (count,), None, size)] if runs else []
        chunks = buddy.chunk_order.items()
        return found + [Operation("give_back", (s,), None, -(1 << order)) for s, order in chunks]

    def apply(self, operation: Operation) -> Step:
        result = getattr(self.buddy, operation.name)(*operation.arguments)
        if operation.name == "take":
            start, given = result
            assert (given, start % given) == (operation.takes, 0), "another chunk"
            assert self.buddy.chunk_order[start] == given.bit_length() - 1
        return NOTHING
