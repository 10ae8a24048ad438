"""The raw allocators under the two managers, and the errors that they all share.

Reproduces: the free list with reference counts of section 4.2-4.4 (`BlockAllocator`), the buddy
allocation that section 6.1 assumes for Orca (`BuddyAllocator`). Both count in blocks and neither
knows a sequence: who holds what is the managers' business (kv_cache_manager.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class CacheError(Exception):
    """Base of every error of the managers. Whoever catches one finds nothing changed."""


class OutOfBlocksError(CacheError):
    """More GPU blocks are needed than are free (the buddy: no chunk is large enough)."""


class OutOfSwapSpaceError(CacheError):
    """The CPU pool has too few free blocks for a swap; recompute instead (section 4.5)."""


class UnknownSequenceError(CacheError):
    """No such sequence where the operation needs one (never allocated, freed, or swapped out)."""


class DuplicateSequenceError(CacheError):
    """The id is already in use."""


class ReservationError(CacheError):
    """A contiguous reservation would be overrun, or a request exceeds the model's maximum."""


class RequestTooLargeError(CacheError):
    """The request could not be served even alone: refused when it is submitted."""


class SharedBlockError(CacheError):
    """Part of a group cannot be swapped: the rest still holds its blocks (section 4.5)."""


class BlockAllocator:
    """Free list and reference counts over `num_blocks` equal blocks (section 4.2, 4.4).

    Only references beyond the first are counted one by one: a block that one table holds, which
    is nearly every block, costs nothing but its place on the free list.
    """

    __slots__ = ("extra_refs", "free_blocks", "num_blocks")

    def __init__(self, num_blocks: int, order: Iterable[int] | None = None) -> None:
        """`order`: the order in which blocks are first handed out (default 0, 1, 2, ...)."""
        blocks = list(range(num_blocks) if order is None else order)
        if sorted(blocks) != list(range(num_blocks)):
            raise ValueError(f"the free order must name each of the {num_blocks} blocks once")
        blocks.reverse()  # a stack: the last block freed is the first reused
        self.num_blocks = num_blocks
        self.free_blocks = blocks
        self.extra_refs: dict[int, int] = {}

    def take(self, count: int) -> list[int]:
        """`count` blocks, one reference each. The caller has checked that they are there."""
        free = self.free_blocks
        left = len(free) - count
        assert 0 <= left <= len(free), "take() is called only after the need was compared"
        taken = free[left:]
        del free[left:]
        taken.reverse()
        return taken

    def share(self, blocks: Iterable[int], times: int = 1) -> None:
        """So many more references to each block."""
        extra = self.extra_refs
        for block in blocks:
            extra[block] = extra.get(block, 0) + times

    def drop(self, blocks: list[int]) -> list[int]:
        """One reference less to each block; returns those that became free, in table order."""
        extra = self.extra_refs
        if not extra or extra.keys().isdisjoint(blocks):
            freed = blocks.copy()
        else:
            freed = []
            for block in blocks:
                others = extra.pop(block, 0)
                if others > 1:
                    extra[block] = others - 1
                elif not others:
                    freed.append(block)
        self.free_blocks += freed[::-1]
        return freed

    def replace(self, block: int) -> int:
        """A fresh block instead of one reference to a shared one: copy-on-write (section 4.4)."""
        others = self.extra_refs.pop(block)
        if others > 1:
            self.extra_refs[block] = others - 1
        return self.free_blocks.pop()

    def move(self, held: Mapping[int, int], target: BlockAllocator) -> dict[int, int]:
        """Move blocks with all their references to another pool: {old block: new block}.

        `held[b]` is b's reference count; the caller has checked that the target has room.
        """
        mapping = dict(zip(held, target.take(len(held))))
        for block, count in held.items():
            if count > 1:
                target.extra_refs[mapping[block]] = count - 1
                del self.extra_refs[block]
        self.free_blocks.extend(held)
        return mapping

    def ref_count(self, block: int) -> int:
        """References to a block that is allocated (a free one is not counted here)."""
        return 1 + self.extra_refs.get(block, 0)


class BuddyAllocator:
    """Power-of-two chunks over `num_blocks` blocks (section 6.1; Knuth's buddy system).

    The pool is cut into aligned chunks of `max_chunk` blocks and, for what is left, ever smaller
    powers of two; a chunk is split in halves on demand and merged with its buddy when both are
    free. Start addresses and sizes are in blocks. The last chunk freed is the first reused, as
    in the authors' artifact, so that the same trace gives the same holes.
    """

    __slots__ = ("chunk_order", "free_chunks", "max_order", "num_blocks", "num_free")

    def __init__(self, num_blocks: int, max_chunk: int) -> None:
        if max_chunk < 1 or max_chunk & (max_chunk - 1):
            raise ValueError(f"the largest chunk must be a power of two, got {max_chunk}")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.max_order = max_chunk.bit_length() - 1
        # free_chunks[order]: start -> None, an ordered set of free chunks of 2**order blocks.
        self.free_chunks: list[dict[int, None]] = [{} for _ in range(self.max_order + 1)]
        self.chunk_order: dict[int, int] = {}  # start -> order, of allocated chunks
        start = 0
        for order in range(self.max_order, -1, -1):
            while start + (1 << order) <= num_blocks:
                self.free_chunks[order][start] = None
                start += 1 << order

    def order_for(self, num_blocks: int) -> int:
        """The smallest order whose chunk holds `num_blocks`."""
        return (num_blocks - 1).bit_length()

    def fits(self, num_blocks: int, count: int = 1) -> bool:
        """Whether `count` chunks for `num_blocks` blocks each could be taken now."""
        order = self.order_for(num_blocks)
        # Chunks never merge while allocating, so each free one yields its size over ours.
        available = 0
        for larger in range(order, self.max_order + 1):
            available += len(self.free_chunks[larger]) << (larger - order)
            if available >= count:
                return True
        return count <= 0

    def take(self, num_blocks: int) -> tuple[int, int]:
        """(start, size) of a chunk for `num_blocks` blocks; the caller has checked `fits`."""
        order = self.order_for(num_blocks)
        source = order
        while source <= self.max_order and not self.free_chunks[source]:
            source += 1
        assert source <= self.max_order, "take() is called only after fits()"
        start, _ = self.free_chunks[source].popitem()
        while source > order:  # keep the lower half, return the upper one
            source -= 1
            self.free_chunks[source][start + (1 << source)] = None
        self.chunk_order[start] = order
        self.num_free -= 1 << order
        return start, 1 << order

    def give_back(self, start: int) -> None:
        """Free the chunk that starts at `start`, merging it with its free buddies."""
        order = self.chunk_order.pop(start)
        self.num_free += 1 << order
        while order < self.max_order:
            buddy = start ^ (1 << order)
            if buddy not in self.free_chunks[order]:
                break
            del self.free_chunks[order][buddy]
            start = min(start, buddy)
            order += 1
        self.free_chunks[order][start] = None

    def check_invariants(self) -> None:
        """Free and allocated chunks partition the pool; each is aligned; no free pair unmerged."""
        chunks = [(s, o, True) for o, starts in enumerate(self.free_chunks) for s in starts]
        chunks += [(s, o, False) for s, o in self.chunk_order.items()]
        end = 0
        for start, order, _ in sorted(chunks):
            assert start == end, f"chunks overlap or leave a gap at block {end}"
            assert start % (1 << order) == 0, f"chunk at {start} is not aligned to its size"
            end = start + (1 << order)
        assert end == self.num_blocks, f"chunks cover {end} of {self.num_blocks} blocks"
        assert self.num_free == sum(1 << o for _, o, free in chunks if free), "num_free is wrong"
        for order, starts in enumerate(self.free_chunks[:-1]):
            for start in starts:
                assert start ^ (1 << order) not in starts, f"free buddies at {start} not merged"
