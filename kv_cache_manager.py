"""The two managers of KV-cache memory: who may use which slot.

Reproduces: `PagedKVCacheManager`, sections 4.2-4.5 of the paper (block tables, reference counts,
copy-on-write, fork, swap, the 1 % admission watermark of the authors' artifact), and
`BaselineCacheManager` (baseline_manager.py), sections 3.1 and 6.1 (contiguous reservations).

    >>> order = [7, 1, 3, 0, 2, 4, 5, 6, 8]        # the physical blocks of Fig. 6
    >>> manager = PagedKVCacheManager(num_blocks=9, block_size=4, free_order=order)
    >>> manager.allocate(seq_id=0, num_tokens=7)
    ()
    >>> manager.append(0), manager.append(0), manager.block_table(0).entries()
    ((), (), [(7, 4), (1, 4), (3, 1)])

Bookkeeping only: no tensor is touched. What moves data returns the map of it: appends the block
copies (source, destination) that copy-on-write asks for, swaps their (source, destination) pairs,
and `free` and `reorder` the blocks that nobody holds any more. Every operation is all-or-nothing:
on an error nothing has changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from allocator import (
    BlockAllocator,
    CacheError,
    DuplicateSequenceError,
    OutOfBlocksError,
    OutOfSwapSpaceError,
    RequestTooLargeError,
    ReservationError,
    SharedBlockError,
    UnknownSequenceError,
    move_blocks,
)
from baseline_manager import BaselineCacheManager
from copy_ledger import CopyLedger
from invariants import check_paged
from memory_usage import NO_COPIES, BlockPairs, MemoryUsage, check_count
from paged_tables import PagedTables, find
from sequence import BlockTable, SequenceGroup

__all__ = [
    "NO_COPIES", "BaselineCacheManager", "BlockPairs", "CacheError", "DuplicateSequenceError",
    "MemoryUsage", "OutOfBlocksError", "OutOfSwapSpaceError", "PagedKVCacheManager",
    "RequestTooLargeError", "ReservationError", "SharedBlockError", "UnknownSequenceError",
]  # fmt: skip


class PagedKVCacheManager(PagedTables):
    """Paged allocation of `num_blocks` GPU blocks of `block_size` slots (sections 4.2-4.5).

    Block tables, fork, append and copy-on-write are those of PagedTables; here are admission,
    beam search, the CPU pool and the accounting.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_cpu_blocks: int = 0,
        watermark: float = 0.01,
        free_order: Iterable[int] | None = None,
    ) -> None:
        super().__init__(num_blocks, block_size, free_order)
        check_count("number of CPU blocks", num_cpu_blocks, least=0)
        if num_cpu_blocks > num_blocks:
            raise ValueError(
                f"{num_cpu_blocks} CPU blocks for {num_blocks} GPU blocks: swap space is bounded "
                "by the GPU's KV blocks (section 4.5)"
            )
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"the watermark is a share of the blocks in [0, 1), got {watermark}")
        self.watermark_blocks = int(watermark * num_blocks)
        self._cpu = BlockAllocator(num_cpu_blocks)
        self._cpu_copies = CopyLedger()
        self._swapped: dict[int, BlockTable] = {}  # their blocks are CPU blocks

    @property
    def num_free_cpu_blocks(self) -> int:
        return self._cpu.num_free

    @property
    def num_cpu_blocks(self) -> int:
        return self._cpu.num_blocks

    # -- admission (the authors' rules, section 4.5) ------------------------------------------

    def can_allocate(self, num_tokens: int, prefix_id: int | None = None) -> bool:
        """Whether the tokens fit and the watermark stays free."""
        need = self.blocks_for(num_tokens, prefix_id)
        return self.num_free_blocks - need >= self.watermark_blocks

    def can_append(self, seq_ids: list[int]) -> bool:
        """Whether each of these sequences could take a new block now.

        The authors' rule: it asks for a block per sequence even where the last block has room.
        """
        return len(seq_ids) <= self.num_free_blocks

    def blocks_for_group(self, group: SequenceGroup) -> int:
        """New blocks for the unfinished sequences of a group: the prompt once, then each's own.

        Generated tokens count as well: after a recomputation they come back as prompt.
        """
        seqs, size = group.unfinished(), self.block_size
        prompt_len, prefix_id = group.own_prompt_len, group.prefix_id
        need = self.blocks_for(prompt_len, prefix_id)
        grown = [seq.num_generated for seq in seqs if seq.num_generated]
        if grown:
            context = prompt_len + (0 if prefix_id is None else self._prefix(prefix_id).num_tokens)
            need += sum(-(-(context + count) // size) - context // size for count in grown)
            if len(grown) == len(seqs) and context % size:
                need -= 1  # the last to write into the prompt's last block does so in place
        return need

    def require_fits(self, group: SequenceGroup) -> None:
        """RequestTooLargeError unless the group, alone, can always be admitted and resumed.

        That needs all its blocks at full length, one more per sequence and the watermark.
        """
        seqs, size = group.seqs, self.block_size
        first = seqs[0]
        shared = first.context_len // size  # whole blocks of the prompt: once for all
        need = shared + len(seqs) + self.watermark_blocks
        for seq in seqs:
            need += -(-(seq.final_len - 1) // size) - shared
        if group.prefix_id is not None:
            need -= first.prefix_len // size
        there = self.num_blocks
        for table in self._prefixes.values():
            there -= len(table.blocks)
        if need > there:
            raise RequestTooLargeError(
                f"request {group.group_id} may need {need} blocks, the watermark included; "
                f"the pool has {there}"
            )

    def can_admit(self, group: SequenceGroup) -> bool:
        """Whether the whole group fits and the watermark stays free."""
        return self.num_free_blocks - self.blocks_for_group(group) >= self.watermark_blocks

    def try_admit(self, group: SequenceGroup) -> BlockPairs | None:
        """`admit` if `can_admit`: the copies to make, or None and nothing has changed."""
        seqs = group.seqs
        if len(seqs) == 1 and group.prefix_id is None:  # most requests: no detour
            seq = seqs[0]
            num_tokens = seq.prefix_len + seq.prompt_len + seq.num_generated
            need = -(-num_tokens // self.block_size)
            if len(self._gpu.free_blocks) - need < self.watermark_blocks:
                return None
            self._require_new(seq.seq_id)
            self._give(seq.seq_id, need, num_tokens)
            return NO_COPIES
        return self.admit(group) if self.can_admit(group) else None

    def admit(self, group: SequenceGroup) -> BlockPairs:
        """Allocate the prompt once, fork the other sequences from it, and make room in each for
        what it had generated before a recomputation. Raises as allocate does."""
        first, *others = seqs = group.unfinished()
        need = self.blocks_for_group(group)
        if need > self.num_free_blocks:
            raise OutOfBlocksError(
                f"group {group.group_id} needs {need} blocks, {self.num_free_blocks} are free"
            )
        for seq in seqs:
            self._require_new(seq.seq_id)
        copies = self.allocate(first.seq_id, group.own_prompt_len, group.prefix_id)
        if others:
            self._fork_all(first.seq_id, [seq.seq_id for seq in others])
        for seq in seqs:
            if seq.num_generated:
                copies += self.append(seq.seq_id, seq.num_generated)
        # All are made at once: a copy of the copy of a prefix's last block starts from the prefix.
        first_source = {new: old for old, new in copies}
        return tuple((first_source.get(old, old), new) for old, new in copies)

    def free(self, seq_id: int) -> list[int]:
        """Drop a sequence or prefix, wherever it is; returns the GPU blocks that became free."""
        if seq_id not in self._swapped:
            return super().free(seq_id)
        table = self._swapped.pop(seq_id)
        keep = table.num_prefix_blocks
        self._cpu_copies.forget(self._cpu.drop(table.blocks[keep:]))
        return self._drop(table.blocks[:keep])

    # -- beam search and preemption (section 4.4, 4.5) -------------------------------------

    def reorder(self, parents: Mapping[int, int]) -> list[int]:
        """Continue each sequence `child` from `parents[child]`, the whole generation at once.

        All new tables are built before any old one is dropped, so a beam may take the place of
        another that moves away in the same step. Returns the blocks nobody holds any more.
        """
        tables = self._tables
        moves = []
        for child_id, parent_id in parents.items():
            child = tables.get(child_id) or self._running(child_id)
            parent = tables.get(parent_id) or self._running(parent_id)
            if child is not parent:
                moves.append((child_id, child, parent_id, parent))
        new_tables = []
        for child_id, child, parent_id, parent in moves:
            if parent.phase is not None:
                self._leave_step(parent_id, parent)
            parent.hold()
            # A block is shared only together with all before it: compare from the end.
            old, new = child.blocks, parent.blocks
            same = len(new) if len(new) < len(old) else len(old)
            while same and old[same - 1] != new[same - 1]:
                same -= 1
            blocks = new[same:]
            self._gpu.share(blocks)
            shape = parent.held, parent.num_prefix_blocks
            new_tables.append((child_id, child, same, blocks, shape))
        freed: list[int] = []
        for child_id, child, same, blocks, shape in new_tables:
            if child.phase is not None:
                self._leave_step(child_id, child)
            old = child.blocks[same:]
            freed += self._gpu.drop(old)
            self._logical_blocks += len(blocks) - len(old)
            child.blocks[same:] = blocks
            child.room = 0
            child.held, child.num_prefix_blocks = shape
        if self._gpu_copies.nodes:
            self._gpu_copies.forget(freed)
        return freed

    def can_swap_out(self, seq_ids: list[int]) -> bool:
        """Whether the CPU pool has room for the blocks of these running sequences."""
        held = self._movable([self._running(seq_id) for seq_id in seq_ids])
        return len(held) <= self.num_free_cpu_blocks

    def swap_out(self, seq_ids: list[int]) -> BlockPairs:
        """Move all sequences of a group to CPU blocks; returns (GPU block, CPU block) pairs.

        A shared block moves once. Blocks of a shared prefix stay where they are. Raises
        SharedBlockError if others hold a block of theirs, OutOfSwapSpaceError.
        """
        tables = {seq_id: self._running(seq_id) for seq_id in seq_ids}
        held = self._swappable(tables, self._gpu)
        if len(held) > self.num_free_cpu_blocks:
            raise OutOfSwapSpaceError(
                f"{len(held)} blocks to swap out, {self.num_free_cpu_blocks} CPU blocks are free"
            )
        for seq_id, table in tables.items():
            self._leave_step(seq_id, table)
            del self._tables[seq_id], self._loose[seq_id]
            self._logical_blocks -= len(table.blocks)
        self._swapped |= tables
        return self._move(
            tables, held, (self._gpu, self._gpu_copies), (self._cpu, self._cpu_copies)
        )

    def can_swap_in(self, seq_ids: list[int]) -> bool:
        """Whether they fit, with a block more for each and the watermark left (the artifact)."""
        need = len(self._movable([self._swapped_out(seq_id) for seq_id in seq_ids]))
        return self.num_free_blocks - need - len(seq_ids) >= self.watermark_blocks

    def swap_in(self, seq_ids: list[int]) -> BlockPairs:
        """Bring swapped sequences back; returns (CPU block, GPU block) pairs.

        Raises SharedBlockError for a part of a group, OutOfBlocksError.
        """
        tables = {seq_id: self._swapped_out(seq_id) for seq_id in seq_ids}
        held = self._swappable(tables, self._cpu)
        if len(held) > self.num_free_blocks:
            raise OutOfBlocksError(
                f"{len(held)} blocks to swap in, {self.num_free_blocks} are free"
            )
        pairs = self._move(
            tables, held, (self._cpu, self._cpu_copies), (self._gpu, self._gpu_copies)
        )
        for seq_id, table in tables.items():
            del self._swapped[seq_id]
            self._add(seq_id, table)
        return pairs

    # -- accounting -------------------------------------------------------------------------

    def usage(self) -> MemoryUsage:
        """Where every slot of the GPU pool is, now (the slot identity of memory_usage.py)."""
        used = self.num_blocks - self.num_free_blocks
        exclusive = self._in_step_unfilled + sum(t.room for t in self._loose.values())
        withheld = [t for t in self._loose.values() if t.held]
        tails = [t for t in self._prefixes.values() if t.held]
        shared = {t.blocks[-1]: t.held for t in withheld + tails}  # once for each block
        padding = exclusive + sum(shared.values())
        unfilled = exclusive + sum(t.held for t in withheld)  # once for each running table
        return MemoryUsage(
            capacity=self.num_blocks * self.block_size,
            tokens=used * self.block_size - padding,
            padding=padding,
            free=self.num_free_blocks * self.block_size,
            logical_tokens=self._logical_blocks * self.block_size - unfilled,
            logical_blocks=self._logical_blocks,
            physical_blocks=used,
        )

    def duplicates(self) -> int:
        """Tokens that GPU blocks hold a second time because of copy-on-write, in slots."""
        return self._gpu_copies.duplicates()

    def check_invariants(self) -> None:
        """Recompute everything from the tables alone; AssertionError at the first difference."""
        check_paged(self)

    # -- the parts --------------------------------------------------------------------------

    def _require_new(self, seq_id: int) -> None:
        super()._require_new(seq_id)
        if seq_id in self._swapped:
            raise DuplicateSequenceError(f"sequence {seq_id} exists already, swapped out")

    def _swapped_out(self, seq_id: int) -> BlockTable:
        return find(self._swapped, seq_id, "a sequence that is swapped out")

    def _movable(self, tables: Iterable[BlockTable]) -> Counter[int]:
        """The blocks that swapping these tables moves, in table order, and how many hold each."""
        return Counter(b for t in tables for b in t.blocks[t.num_prefix_blocks :])

    def _swappable(self, tables: Mapping[int, BlockTable], pool: BlockAllocator) -> Counter[int]:
        """The same, after checking that nobody else holds them: a group is swapped whole."""
        held = self._movable(tables.values())
        extra = pool.extra_refs
        for block, count in held.items():
            if extra.get(block, 0) + 1 != count:
                raise SharedBlockError(
                    f"block {block} is also held outside of {sorted(tables)}; "
                    "a group is swapped whole"
                )
        return held

    def _move(
        self,
        tables: Mapping[int, BlockTable],
        held: Counter[int],
        source: tuple[BlockAllocator, CopyLedger],
        target: tuple[BlockAllocator, CopyLedger],
    ) -> BlockPairs:
        mapping = move_blocks(held, source[0], target[0])
        source[1].move_to(target[1], mapping.items())
        for table in tables.values():
            keep = table.num_prefix_blocks
            table.blocks[keep:] = [mapping[block] for block in table.blocks[keep:]]
        return tuple(mapping.items())
