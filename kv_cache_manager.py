"""The two managers of KV-cache memory: who may use which slot.

Reproduces: `PagedKVCacheManager`, sections 4.2-4.5 of the paper (block tables, reference counts,
copy-on-write, fork, swap, the 1 % admission watermark of the authors' artifact), and
`BaselineCacheManager` sections 3.1 and 6.1 (contiguous reservations).

    >>> order = [7, 1, 3, 0, 2, 4, 5, 6, 8]        # the physical blocks of Fig. 6
    >>> manager = PagedKVCacheManager(num_blocks=9, block_size=4, free_order=order)
    >>> manager.allocate(seq_id=0, num_tokens=7)
    ()
    >>> manager.append(0), manager.append(0), manager.block_table(0).entries()
    ((), (), [(7, 4), (1, 4), (3, 1)])

Bookkeeping only: no tensor is touched. What moves data returns the map of it: appends the block
copies (source, destination) that copy-on-write asks for, swaps their (source, destination) pairs,
and `free` and `reorder` the blocks that nobody holds any more. Every operation checks first, so on
an error nothing has changed: OutOfBlocksError, UnknownSequenceError for an id that the operation
does not know, DuplicateSequenceError for one in use, ValueError for a count that makes no sense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from allocators import (
    BlockAllocator,
    BuddyAllocator,
    CacheError,
    DuplicateSequenceError,
    OutOfBlocksError,
    OutOfSwapSpaceError,
    RequestTooLargeError,
    ReservationError,
    SharedBlockError,
    UnknownSequenceError,
)
from sequence import BlockTable, Clock, Sequence, SequenceGroup, check_count, check_id

__all__ = [
    "NO_COPIES",
    "BaselineCacheManager",
    "BlockPairs",
    "CacheError",
    "DuplicateSequenceError",
    "MemoryUsage",
    "OutOfBlocksError",
    "OutOfSwapSpaceError",
    "PagedKVCacheManager",
    "RequestTooLargeError",
    "ReservationError",
    "SharedBlockError",
    "UnknownSequenceError",
]

BlockPairs = tuple[tuple[int, int], ...]
NO_COPIES: BlockPairs = ()


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """One moment's slots by part, and what sharing saves. All in slots unless named blocks."""

    capacity: int
    tokens: int  # hold a live token's K and V; a shared slot counts once
    free: int  # not allocated
    # Allocated, and this request will fill it later. As in the artifact that counts the last
    # token generated, whose K and V are in fact never stored.
    reserved: int = 0
    internal: int = 0  # allocated beyond what this request will ever use
    rounding: int = 0  # given by the allocator beyond what was asked for
    padding: int = 0  # unfilled slots of last blocks
    logical_tokens: int = 0  # what the running sequences think they hold
    logical_blocks: int = 0  # what they would take without sharing
    physical_blocks: int = 0  # blocks allocated

    PARTS: ClassVar = ("tokens", "reserved", "internal", "rounding", "padding", "free")

    def __post_init__(self) -> None:
        parts = [getattr(self, part) for part in self.PARTS]
        if min(parts) < 0 or sum(parts) != self.capacity:
            named = ", ".join(f"{p} {v}" for p, v in zip(self.PARTS, parts))
            raise AssertionError(f"slot identity broken: capacity {self.capacity} != {named}")

    @property
    def saved(self) -> float:
        """Share of blocks that sharing saves: (logical - physical) / logical (Fig. 15).

        Negative while blocks held for others (an unused shared prefix) outweigh what is saved.
        """
        if not self.logical_blocks:
            return 0.0
        return 1.0 - self.physical_blocks / self.logical_blocks

    def share(self, part: str) -> float:
        """A part as a share of the capacity (0 to 1), as in Fig. 2."""
        return getattr(self, part) / self.capacity

    @property
    def external_and_others(self) -> float:
        """Fig. 2's last part: rounding, padding and unallocated memory, as a share."""
        return (self.rounding + self.padding + self.free) / self.capacity


ONE = 1  # compared by identity: True and 1.0 equal it, and must reach check_count to be refused


class PagedKVCacheManager:
    """Paged allocation of `num_blocks` GPU blocks of `block_size` slots (sections 4.2-4.5).

    A running table's length is its offset plus the clock (see BlockTable), so a decode step costs
    nothing but the blocks that it takes. A table takes one when the clock is -offset modulo S:
    `_due` keeps the running tables in S buckets by that remainder. A table whose last block is
    shared and part-filled stands in `_tails` as well, until it is written: a write looks for
    copy-on-write (section 4.4) there and nowhere else.
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
        num_blocks = check_count("number of blocks", num_blocks)
        block_size = check_count("block size", block_size)
        num_cpu_blocks = check_count("number of CPU blocks", num_cpu_blocks, least=0)
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"the watermark is a share of the blocks in [0, 1), got {watermark}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_cpu_blocks = num_cpu_blocks
        self.watermark_blocks = int(watermark * num_blocks)
        self._gpu = BlockAllocator(num_blocks, free_order)
        self._cpu = BlockAllocator(num_cpu_blocks)
        self._clock = Clock()
        self._tables: dict[int, BlockTable] = {}  # running
        self._swapped: dict[int, BlockTable] = {}  # on CPU blocks, behind those of a prefix
        self._prefixes: dict[int, BlockTable] = {}  # held by the provider, never grow
        self._due: list[dict[int, list[int]]] = [{} for _ in range(block_size)]
        self._tails: dict[int, BlockTable] = {}
        self._offsets = self._logical_blocks = 0  # sums over the running tables

    @property
    def num_free_blocks(self) -> int:
        return len(self._gpu.free_blocks)

    @property
    def num_free_cpu_blocks(self) -> int:
        return len(self._cpu.free_blocks)

    @property
    def running_ids(self) -> list[int]:
        """Ids of the sequences in GPU memory, in the order in which they came."""
        return list(self._tables)

    def block_table(self, seq_id: int) -> BlockTable:
        """The table of a running sequence or a shared prefix; to be read, not written."""
        table = self._tables.get(check_id(seq_id)) or self._prefixes.get(seq_id)
        if table is None:
            raise UnknownSequenceError(f"sequence {seq_id} has no GPU blocks")
        return table

    def num_tokens(self, seq_id: int) -> int:
        """Tokens of a running sequence or prefix that the cache holds."""
        return self.block_table(seq_id).num_tokens

    def ref_count(self, block: int) -> int:
        """How many tables hold this allocated GPU block (section 4.4)."""
        return self._gpu.ref_count(block)

    # -- allocation and sharing (section 4.3, 4.4) ------------------------------------------

    def blocks_for(self, num_tokens: int, prefix_id: int | None = None) -> int:
        """New blocks that `num_tokens` tokens take, after a shared prefix if one is named.

        Behind a prefix there may be none: the first that is generated is then the first.
        """
        num_tokens = check_count("number of tokens", num_tokens, least=int(prefix_id is None))
        prefix_len = 0 if prefix_id is None else self._prefix(prefix_id).num_tokens
        # A part-filled last prefix block is copied on the first write: it counts as new.
        return -(-(prefix_len + num_tokens) // self.block_size) - prefix_len // self.block_size

    def can_allocate(self, num_tokens: int, prefix_id: int | None = None) -> bool:
        """Whether the tokens fit and the watermark stays free."""
        return (
            self.num_free_blocks - self.blocks_for(num_tokens, prefix_id) >= self.watermark_blocks
        )

    def allocate(self, seq_id: int, num_tokens: int, prefix_id: int | None = None) -> BlockPairs:
        """Give a new sequence blocks for `num_tokens` tokens, behind a shared prefix if named.

        Returns the copy of the prefix's last block if that is part-filled (section 4.4): it is
        made even for no tokens at all. Takes the watermark too: admission asks `can_allocate`.
        """
        seq_id = self._new_id(seq_id)
        need = self.blocks_for(num_tokens, prefix_id)
        self._require_free(need, "sequence", seq_id)
        if prefix_id is None:
            self._give(seq_id, need, int(num_tokens))
            return NO_COPIES
        self._fork_all(prefix_id, self._prefixes[prefix_id], [seq_id])
        if num_tokens:
            return self.append(seq_id, num_tokens)
        shared = self._tails.pop(seq_id, None)
        return NO_COPIES if shared is None else (self._copy_last_block(shared),)

    def allocate_prefix(self, prefix_id: int, num_tokens: int) -> None:
        """Reserve blocks for a predefined shared prefix (section 4.4); it is never swapped."""
        prefix_id = self._new_id(prefix_id)
        num_tokens = check_count("number of tokens", num_tokens)
        need = self.blocks_for(num_tokens)
        self._require_free(need, "prefix", prefix_id)
        size, blocks = self.block_size, self._gpu.take(need)
        self._prefixes[prefix_id] = BlockTable(blocks, size, num_tokens, None, num_tokens // size)

    def fork(self, parent_id: int, child_id: int) -> None:
        """A child that shares all blocks of a running parent (section 4.4, 5). Takes no block."""
        child_id = self._new_id(child_id)
        self._fork_all(parent_id, self._running(parent_id), [child_id])

    def free(self, seq_id: int) -> list[int]:
        """Drop a sequence or prefix, wherever it is; returns the GPU blocks that became free."""
        seq_id = check_id(seq_id)
        if seq_id in self._swapped:
            table = self._swapped.pop(seq_id)
            keep = table.num_prefix_blocks
            self._cpu.drop(table.blocks[keep:])
            return self._gpu.drop(table.blocks[:keep])
        table = self._prefixes.pop(seq_id, None)
        if table is None:
            table = self._tables.get(seq_id) or self._running(seq_id)
            self._leave(seq_id, table)
        return self._gpu.drop(table.blocks)

    def truncate(self, seq_id: int, num_tokens: int) -> list[int]:
        """Forget a running sequence's tokens but the first `num_tokens`, at least one.

        Its blocks behind them are given back, those that others hold are kept for them. Returns
        the GPU blocks that became free. ValueError if it has fewer tokens.
        """
        table = self._running(seq_id)
        num_tokens = check_count("number of tokens", num_tokens)
        removed = table.num_tokens - num_tokens
        if removed < 0:
            raise ValueError(f"sequence {seq_id} has {table.num_tokens} tokens, not {num_tokens}")
        size, due = self.block_size, self._due
        keep = -(-num_tokens // size)
        self._logical_blocks -= len(table.blocks) - keep
        freed = self._gpu.drop(table.blocks[keep:])
        del table.blocks[keep:]
        # A block that it shares with a prefix only in part is not of its prefix any more.
        table.num_prefix_blocks = min(table.num_prefix_blocks, num_tokens // size)
        blocks = due[-table.offset % size].pop(seq_id)
        table.offset -= removed
        due[-table.offset % size][seq_id] = blocks
        self._offsets -= removed
        self._tails.pop(seq_id, None)
        if table.unfilled and table.blocks[-1] in self._gpu.extra_refs:
            self._tails[seq_id] = table
        return freed

    # -- growth and copy-on-write (section 4.3, 4.4) ----------------------------------------

    def append(self, seq_id: int, num_tokens: int = 1) -> BlockPairs:
        """Room for `num_tokens` more tokens of one sequence; returns the copies to make first."""
        if type(seq_id) is not int:
            seq_id = check_id(seq_id)
        table = self._tables.get(seq_id) or self._running(seq_id)
        if num_tokens is not ONE:
            num_tokens = check_count("number of tokens", num_tokens)
        pool, size, offset = self._gpu, self.block_size, table.offset
        unfilled = -(offset + self._clock.now) % size
        new = -(-(num_tokens - unfilled) // size) if num_tokens > unfilled else 0
        tails, copies = self._tails, NO_COPIES
        copy = seq_id in tails and table.blocks[-1] in pool.extra_refs
        if new or copy:
            self._require_free(new + copy, "sequence", seq_id)
            if copy:
                copies = (self._copy_last_block(table),)
            table.blocks += pool.take(new)
            self._logical_blocks += new
        if tails:
            tails.pop(seq_id, None)
        due = self._due
        del due[-offset % size][seq_id]
        table.offset = offset = offset + num_tokens
        due[-offset % size][seq_id] = table.blocks
        self._offsets += num_tokens
        return copies

    def append_all(self, num_tokens: int = 1) -> BlockPairs:
        """Room for `num_tokens` more tokens of every running sequence, in one step, or of none.

        Returns all copies of the step. The last of the holders of a block writes in place.
        """
        clock, size, tails = self._clock, self.block_size, self._tails
        free, extra_refs = self._gpu.free_blocks, self._gpu.extra_refs
        now = clock.now
        if num_tokens is ONE:
            need = len(self._due[now % size])
        else:
            num_tokens = check_count("number of tokens", num_tokens)
            need = len(self._tables) * -(-num_tokens // size)
        if need + len(tails) > len(free):  # at most so many; rarely worth an exact count
            self._require_free(self.blocks_for_step(num_tokens), "a step of", num_tokens)
        copies = NO_COPIES
        if tails:
            still = (table for table in tails.values() if table.blocks[-1] in extra_refs)
            copies = tuple(map(self._copy_last_block, still))
            tails.clear()
        pop, before = free.pop, len(free)
        for ahead in range(num_tokens if num_tokens < size else size):
            due = self._due[(now + ahead) % size]
            if due:
                # A table due `ahead` steps from now is due again every S steps after that.
                for _ in range(ahead, num_tokens, size):
                    for blocks in due.values():
                        blocks.append(pop())
        self._logical_blocks += before - len(free)
        clock.now = now + num_tokens
        return copies

    def blocks_for_step(self, num_tokens: int = 1) -> int:
        """Exact number of new blocks that `append_all(num_tokens)` takes, copies included."""
        now, size, due = self._clock.now, self.block_size, self._due
        if num_tokens is ONE:  # asked in every iteration
            need = len(due[now % size])
        else:
            need = num_tokens // size * len(self._tables)
            need += sum([len(due[step % size]) for step in range(now, now + num_tokens % size)])
        return need + _copies_for(self._tails.values(), self._gpu) if self._tails else need

    def steps_without_copies(self, at_most: int, reserve: int) -> int:
        """The most steps, `at_most` or fewer, that copy nothing and leave `reserve` blocks free.

        None while a shared tail was not yet written, even if its next write needs no copy.
        """
        free, size, tables = self.num_free_blocks - reserve, self.block_size, len(self._tables)
        if free < 0 or self._tails:
            return 0
        # In every S steps each table takes a block: whole rounds first, then step by step.
        rounds = free // tables if tables else at_most
        free -= rounds * tables
        for steps in range(rounds * size, at_most):
            free -= len(self._due[(self._clock.now + steps) % size])
            if free < 0:
                return steps
        return at_most

    def can_append(self, seq_ids: list[int]) -> bool:
        """The authors' rule: a block for each must be free, even where its last one has room."""
        return len(seq_ids) <= self.num_free_blocks

    def blocks_for_append(self, seq_ids: Iterable[int]) -> int:
        """Exact number of new blocks, copies included, for a token more in each of these."""
        tables = [self._running(seq_id) for seq_id in seq_ids]
        size, now = self.block_size, self._clock.now
        due = sum([(table.offset + now) % size == 0 for table in tables])
        return due + _copies_for(tables, self._gpu) if self._tails else due

    # -- admission (the authors' rules, section 4.5) ----------------------------------------

    def blocks_for_group(self, group: SequenceGroup, generated: list[int] | None = None) -> int:
        """New blocks for a group: those of its prompt once, then those of each sequence.

        `generated` are the tokens that each has generated, by default those of its unfinished
        sequences: after a recomputation they come back as prompt.
        """
        size, prefix_id = self.block_size, group.prefix_id
        prefix_len = 0 if prefix_id is None else self._prefix(prefix_id).num_tokens
        context = prefix_len + group.own_prompt_len
        full = context // size
        if generated is None:
            generated = [seq.num_generated for seq in group.unfinished()]
        need = full - prefix_len // size
        need += sum([-(-(context + count) // size) - full for count in generated if count])
        # The prompt's part-filled block stays with those that have generated nothing; without
        # them the last to write into it does so in place.
        return need + (context % size > 0 and 0 in generated)

    def require_fits(self, group: SequenceGroup) -> None:
        """RequestTooLargeError unless the pool holds the group alone, at each of its lengths.

        Beams are taken to share no more than samples do: how they fork is not known beforehand.
        """
        lengths = [seq.output_len for seq in group.seqs]
        # Most just before one of them ends: until then they only grow.
        need = max(
            self.blocks_for_group(group, [last - 1 for length in lengths if length >= last])
            for last in {*lengths}
        )
        if need > self.room:
            raise RequestTooLargeError(
                f"request {group.group_id} may need {need} blocks; the pool has {self.room}"
            )

    @property
    def room(self) -> int:
        """GPU blocks but those of shared prefixes."""
        return self.num_blocks - sum([len(table.blocks) for table in self._prefixes.values()])

    def can_admit(self, group: SequenceGroup, alone: bool = False) -> bool:
        """Whether the whole group fits and the watermark stays free; `alone` it needs none."""
        watermark = 0 if alone else self.watermark_blocks
        return self.num_free_blocks - self.blocks_for_group(group) >= watermark

    def try_admit(self, group: SequenceGroup, alone: bool = False) -> BlockPairs | None:
        """`admit` if `can_admit`: the copies to make, or None and nothing has changed."""
        seqs = group.seqs
        if len(seqs) == 1 and group.prefix_id is None:  # most requests: no detour
            seq = seqs[0]
            num_tokens = seq.prefix_len + seq.prompt_len + seq.num_generated
            need = -(-num_tokens // self.block_size)
            if len(self._gpu.free_blocks) - need < (0 if alone else self.watermark_blocks):
                return None
            self._give(self._new_id(seq.seq_id), need, num_tokens)
            return NO_COPIES
        return self.admit(group) if self.can_admit(group, alone) else None

    def admit(self, group: SequenceGroup) -> BlockPairs:
        """Allocate the prompt once, fork the other sequences from it, and make room in each for
        what it had generated before a recomputation. Raises as allocate does."""
        first, *others = seqs = group.unfinished()
        self._require_free(self.blocks_for_group(group), "group", group.group_id)
        for seq in seqs:
            self._new_id(seq.seq_id)
        copies = self.allocate(first.seq_id, group.own_prompt_len, group.prefix_id)
        if others:
            prompt = self._tables[first.seq_id]
            self._fork_all(first.seq_id, prompt, [seq.seq_id for seq in others])
        for seq in seqs:
            if seq.num_generated:
                copies += self.append(seq.seq_id, seq.num_generated)
        # All are made at once: a copy of the copy of a prefix's last block starts from the prefix.
        first_source = {new: old for old, new in copies}
        return tuple((first_source.get(old, old), new) for old, new in copies)

    # -- beam search and preemption (section 4.4, 4.5) --------------------------------------

    def reorder(self, parents: Mapping[int, int]) -> list[int]:
        """Continue each sequence `child` from `parents[child]`, the whole generation at once.

        All new tables are built before any old one is dropped, so a beam may take the place of
        another that moves away in the same step. Returns the blocks nobody holds any more.
        """
        tails, due, pool = self._tails, self._due, self._gpu
        size, now = self.block_size, self._clock.now
        moves = [(a, self._running(a), b, self._running(b)) for a, b in parents.items()]
        moved = []
        for child_id, child, parent_id, parent in moves:
            if child is parent:
                continue
            if (parent.offset + now) % size:
                tails[parent_id] = parent
            # A block is shared only together with all before it: compare from the end.
            old, new = child.blocks, parent.blocks
            same = len(new) if len(new) < len(old) else len(old)
            while same and old[same - 1] != new[same - 1]:
                same -= 1
            blocks = new[same:]
            pool.share(blocks)
            moved.append((child_id, child, same, blocks, parent.offset, parent.num_prefix_blocks))
        freed: list[int] = []
        for child_id, child, same, blocks, offset, keep in moved:
            old = child.blocks[same:]
            freed += pool.drop(old)
            child.blocks[same:] = blocks
            child.num_prefix_blocks = keep
            self._logical_blocks += len(blocks) - len(old)
            if offset != child.offset:
                self._offsets += offset - child.offset
                due[-offset % size][child_id] = due[-child.offset % size].pop(child_id)
                child.offset = offset
            if (offset + now) % size:
                tails[child_id] = child
            else:
                tails.pop(child_id, None)
        return freed

    def can_swap_out(self, seq_ids: list[int]) -> bool:
        """Whether the CPU pool has room for the blocks of these running sequences."""
        return len(_movable(map(self._running, seq_ids))) <= self.num_free_cpu_blocks

    def swap_out(self, seq_ids: list[int]) -> BlockPairs:
        """Move all sequences of a group to CPU blocks; returns (GPU block, CPU block) pairs.

        A shared block moves once. Blocks of a shared prefix stay where they are. Raises
        SharedBlockError if others hold a block of theirs, OutOfSwapSpaceError if the CPU is full.
        """
        tables = {check_id(seq_id): self._running(seq_id) for seq_id in seq_ids}
        moving = _swappable(tables, self._gpu)
        if len(moving) > self.num_free_cpu_blocks:
            raise OutOfSwapSpaceError(
                f"{len(moving)} blocks to swap out, {self.num_free_cpu_blocks} CPU blocks are free"
            )
        mapping = self._gpu.move(moving, self._cpu)
        for seq_id, table in tables.items():
            self._leave(seq_id, table)
            self._swapped[seq_id] = table.twin(None, mapping)
        return tuple(mapping.items())

    def can_swap_in(self, seq_ids: list[int], alone: bool = False) -> bool:
        """Whether they fit, with a block more for each and the watermark left (the artifact).

        `alone` nothing must be left but the blocks that their next tokens take.
        """
        tables = [self._swapped_out(seq_id) for seq_id in seq_ids]
        need = len(_movable(tables))
        if alone:
            need += sum([not table.unfilled for table in tables]) + _copies_for(tables, self._cpu)
            return need <= self.num_free_blocks
        return self.num_free_blocks - need - len(seq_ids) >= self.watermark_blocks

    def swap_in(self, seq_ids: list[int]) -> BlockPairs:
        """Bring back a group that was swapped out; returns (CPU block, GPU block) pairs."""
        tables = {check_id(seq_id): self._swapped_out(seq_id) for seq_id in seq_ids}
        moving = _swappable(tables, self._cpu)
        free = self.num_free_blocks
        if len(moving) > free:
            raise OutOfBlocksError(f"{len(moving)} blocks to swap in, {free} are free")
        mapping = self._cpu.move(moving, self._gpu)
        for seq_id in tables:
            table = self._swapped.pop(seq_id).twin(self._clock, mapping)
            self._enter(seq_id, table)
            if table.unfilled and table.blocks[-1] in self._gpu.extra_refs:
                self._tails[seq_id] = table
        return tuple(mapping.items())

    def _running(self, seq_id: int) -> BlockTable:
        return _find(self._tables, seq_id, "a running sequence")

    def _prefix(self, prefix_id: int) -> BlockTable:
        return _find(self._prefixes, prefix_id, "a shared prefix")

    def _swapped_out(self, seq_id: int) -> BlockTable:
        return _find(self._swapped, seq_id, "a sequence that is swapped out")

    def _new_id(self, seq_id: int) -> int:
        seq_id = check_id(seq_id)
        if seq_id in self._tables or seq_id in self._prefixes:
            raise DuplicateSequenceError(f"sequence {seq_id} exists already")
        if seq_id in self._swapped:
            raise DuplicateSequenceError(f"sequence {seq_id} exists already, swapped out")
        return seq_id

    def _require_free(self, need: int, what: str, number: int) -> None:
        free = len(self._gpu.free_blocks)
        if need > free:
            raise OutOfBlocksError(f"{what} {number} needs {need} blocks, {free} are free")

    def _enter(self, seq_id: int, table: BlockTable) -> None:
        """A table is among the running ones from now on."""
        self._tables[seq_id] = table
        self._due[-table.offset % self.block_size][seq_id] = table.blocks
        self._offsets += table.offset
        self._logical_blocks += len(table.blocks)

    def _leave(self, seq_id: int, table: BlockTable) -> None:
        """A table is not among the running ones any more."""
        del self._tables[seq_id], self._due[-table.offset % self.block_size][seq_id]
        if self._tails:
            self._tails.pop(seq_id, None)
        self._offsets -= table.offset
        self._logical_blocks -= len(table.blocks)

    def _give(self, seq_id: int, num_blocks: int, num_tokens: int) -> None:
        """A table of its own for a new sequence; all has been checked."""
        blocks = self._gpu.take(num_blocks)
        self._enter(seq_id, BlockTable(blocks, self.block_size, num_tokens, self._clock))

    def _fork_all(self, parent_id: int, parent: BlockTable, child_ids: list[int]) -> None:
        """Children of a running parent, or of a prefix; all has been checked."""
        part_filled = parent.unfilled > 0
        if part_filled and parent.clock is not None:  # a prefix is never written again
            self._tails[parent_id] = parent
        self._gpu.share(parent.blocks, len(child_ids))
        for child_id in child_ids:
            child = parent.twin(self._clock)
            self._enter(child_id, child)
            if part_filled:
                self._tails[child_id] = child

    def _copy_last_block(self, table: BlockTable) -> tuple[int, int]:
        """Copy-on-write: a block of its own in place of the shared last one (section 4.4)."""
        source = table.blocks[-1]
        table.blocks[-1] = destination = self._gpu.replace(source)
        return source, destination

    def usage(self) -> MemoryUsage:
        """Where every slot of the GPU pool is, now."""
        size, num_free = self.block_size, self.num_free_blocks
        used = self.num_blocks - num_free
        logical_tokens = self._offsets + len(self._tables) * self._clock.now
        padding = self._logical_blocks * size - logical_tokens  # once for each running table
        if self._tails or self._prefixes:  # of a shared block, once for all its holders
            padding -= sum([table.unfilled for table in self._tails.values()])
            tails: dict[int, list[int]] = {}
            for table in (*self._prefixes.values(), *self._tails.values()):
                tails.setdefault(table.blocks[-1], []).append(table.unfilled)
            # Who was truncated may fill less of a block than others, who need not stand here.
            for block, unfilled in tails.items():
                if len(unfilled) == self.ref_count(block):
                    padding += min(unfilled)
        return MemoryUsage(
            capacity=self.num_blocks * size,
            tokens=used * size - padding,
            padding=padding,
            free=num_free * size,
            logical_tokens=logical_tokens,
            logical_blocks=self._logical_blocks,
            physical_blocks=used,
        )

    def check_invariants(self) -> None:
        """Recompute everything from the tables alone; AssertionError at the first difference."""
        size, running, swapped = self.block_size, self._tables, self._swapped
        tables = running | swapped | self._prefixes
        places = len(running) + len(swapped) + len(self._prefixes)
        assert len(tables) == places, "a sequence is in two places"
        # (pool, block): how many hold it; its place in all their tables, block before; slots filled
        held: Counter[tuple[str, int]] = Counter()
        known: dict[tuple[str, int], tuple[int, int | None]] = {}
        fills: dict[tuple[str, int], int] = {}
        for seq_id, table in tables.items():
            clock, keep = self._clock if seq_id in running else None, table.num_prefix_blocks
            assert table.clock is clock, "a table grows that does not run, or the other way round"
            assert table.block_size == size, "a table counts in blocks of another size"
            assert table.blocks, "a table without a block"
            assert 0 <= table.unfilled < size, "the last block is empty or over-full"
            full = table.num_tokens // size
            assert 0 <= keep <= full, "a part-filled block is taken for one of a shared prefix"
            assert keep == full or seq_id not in self._prefixes, "not all full blocks of a prefix"
            before = None
            for index, (block, filled) in enumerate(table.entries()):
                where = "CPU" if seq_id in swapped and index >= keep else "GPU", block
                held[where] += 1
                # Who shares a block shares all before it: reorder() compares from the ends.
                same = known.setdefault(where, (index, before)) == (index, before)
                assert same, f"holders of block {block} disagree about it"
                fills[where] = max(filled, fills.get(where, 0))
                before = block
        for pool, name in ((self._gpu, "GPU"), (self._cpu, "CPU")):
            refs = {block: count for (where, block), count in held.items() if where == name}
            once = sorted([*pool.free_blocks, *refs]) == list(range(pool.num_blocks))
            assert once, f"a {name} block is lost, twice free, or both free and held"
            extra = {block: count - 1 for block, count in refs.items() if count > 1}
            assert pool.extra_refs == extra, f"{name} reference counts differ from the tables"

        for remainder, due in enumerate(self._due):
            expect = {i: t.blocks for i, t in running.items() if -t.offset % size == remainder}
            assert due.keys() == expect.keys(), "a table waits in the wrong bucket"
            assert all(due[i] is expect[i] for i in due), "a bucket feeds another table"
        part_filled = {i: t for i, t in running.items() if t.unfilled}
        for seq_id, table in self._tails.items():
            assert part_filled.get(seq_id) is table, "a tail that nobody is going to write"
        shared = {i for i, t in part_filled.items() if self.ref_count(t.blocks[-1]) > 1}
        assert shared <= self._tails.keys(), "a shared block could be written without a copy"

        on_gpu = [filled for (pool, _), filled in fills.items() if pool == "GPU"]
        usage = MemoryUsage(
            capacity=self.num_blocks * size,
            tokens=sum(on_gpu),
            padding=len(on_gpu) * size - sum(on_gpu),
            free=(self.num_blocks - len(on_gpu)) * size,
            logical_tokens=sum(t.num_tokens for t in running.values()),
            logical_blocks=sum(len(t.blocks) for t in running.values()),
            physical_blocks=len(on_gpu),
        )
        assert self.usage() == usage, "the usage differs from the tables"


def _find(tables: Mapping[int, BlockTable], seq_id: int, what: str) -> BlockTable:
    """The table of that id, or UnknownSequenceError."""
    table = tables.get(seq_id if type(seq_id) is int else check_id(seq_id))
    if table is None:
        raise UnknownSequenceError(f"{seq_id} is not the id of {what}")
    return table


def _movable(tables: Iterable[BlockTable]) -> Counter[int]:
    """The blocks that swapping these tables moves, in table order, and how many hold each."""
    return Counter(b for t in tables for b in t.blocks[t.num_prefix_blocks :])


def _copies_for(writers: Iterable[BlockTable], pool: BlockAllocator) -> int:
    """Copies when these tables are written: the last of a block's holders makes none."""
    tails = Counter([table.blocks[-1] for table in writers if table.unfilled])
    return sum(min(count, pool.ref_count(tail) - 1) for tail, count in tails.items())


def _swappable(tables: Mapping[int, BlockTable], pool: BlockAllocator) -> Counter[int]:
    """The same, after checking that nobody else holds them: a group is swapped whole."""
    moving = _movable(tables.values())
    for block, count in moving.items():
        if pool.ref_count(block) != count:
            others = f"block {block} is also held outside of {sorted(tables)}"
            raise SharedBlockError(f"{others}; a group is swapped whole")
    return moving


POLICIES = ("max", "pow2", "oracle")
# (first source slot, first destination slot, number of slots): a copy between reservations.
SlotCopy = tuple[int, int, int]


@dataclass(slots=True, eq=False)
class Reservation:
    """A sequence's contiguous slots. `start_len` counts from the manager's clock at zero."""

    start_block: int
    num_blocks: int  # the buddy's chunk
    asked: int  # slots the policy asked for
    final_len: int  # tokens this sequence will hold once it is complete
    start_len: int


class BaselineCacheManager:
    """Contiguous allocation over an address space of `num_blocks` x `block_size` slots."""

    def __init__(
        self, num_blocks: int, block_size: int, *, policy: str = "max", max_len: int = 2048
    ) -> None:
        num_blocks = check_count("number of blocks", num_blocks)
        block_size = check_count("block size", block_size)
        max_len = check_count("maximum length", max_len)
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: choose one of {', '.join(POLICIES)}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.policy = policy
        self.max_len = max_len
        largest = -(-max_len // block_size)
        self._buddy = BuddyAllocator(num_blocks, 1 << (largest - 1).bit_length())
        self._held: dict[int, Reservation] = {}
        self._now = 0  # steps taken by all sequences together
        self._full_at: int | None = None  # step at which the first is full; None: to be found
        self._empty = BuddyAllocator(num_blocks, 1 << self._buddy.max_order)  # never taken from
        self._tokens = self._final = self._asked = 0  # sums over the reservations, in slots

    @property
    def num_free_blocks(self) -> int:
        return self._buddy.num_free

    @property
    def running_ids(self) -> list[int]:
        """Ids of the sequences that hold a reservation, in the order in which they came."""
        return list(self._held)

    def reservation(self, seq_id: int) -> Reservation:
        """The contiguous slots of a sequence; to be read, not written."""
        try:
            return self._held[check_id(seq_id)]
        except KeyError:
            raise UnknownSequenceError(f"sequence {seq_id} has no reservation") from None

    def num_tokens(self, seq_id: int) -> int:
        """Tokens of the sequence that the cache holds."""
        return self.reservation(seq_id).start_len + self._now

    def start_slot(self, seq_id: int) -> int:
        """The slot of the sequence's first token; token p is at start_slot + p."""
        return self.reservation(seq_id).start_block * self.block_size

    def slots_to_ask(self, num_tokens: int, final_len: int, max_len: int | None = None) -> int:
        """Slots that the policy reserves for a prompt of `num_tokens` that ends at `final_len`.

        `max_len` is the request's own maximum if below the model's (Fig. 3's second request).
        Raises ReservationError if the final length exceeds it, ValueError for bad counts.
        """
        limit = self.max_len if max_len is None else max_len
        num_tokens = check_count("number of tokens", num_tokens)
        limit = check_count("maximum length", limit)
        final_len = check_count("final length", final_len, least=num_tokens)
        if final_len > limit or limit > self.max_len:
            raise ReservationError(
                f"a final length of {final_len} with a maximum of {limit}: "
                f"the model's maximum is {self.max_len}"
            )
        if self.policy == "max":
            return limit
        if self.policy == "pow2":
            output = max(1, final_len - num_tokens)
            return min(num_tokens + (1 << (output - 1).bit_length()), limit)
        return final_len

    def can_allocate(
        self, num_tokens: int, final_len: int, max_len: int | None = None, number: int = 1
    ) -> bool:
        """Whether `number` such sequences find a chunk each."""
        return self._fits(self.slots_to_ask(num_tokens, final_len, max_len), number)

    def refused_by_fragmentation(self, num_tokens: int, final_len: int) -> bool:
        """Whether it does not fit although as many slots as it asks for are free."""
        asked = self.slots_to_ask(num_tokens, final_len)
        return asked <= self.num_free_blocks * self.block_size and not self._fits(asked)

    def allocate(
        self, seq_id: int, num_tokens: int, final_len: int, max_len: int | None = None
    ) -> None:
        """Reserve contiguous slots for a new sequence of `num_tokens` tokens so far.

        `final_len` is its true final length: the oracle and the accounting know it.
        """
        seq_id = self._new_id(seq_id)
        asked = self.slots_to_ask(num_tokens, final_len, max_len)
        if not self._fits(asked):
            raise OutOfBlocksError(
                f"sequence {seq_id} asks for {-(-asked // self.block_size)} contiguous blocks; of "
                f"{self.num_free_blocks} free ones no chunk is large enough"
            )
        self._reserve(seq_id, int(num_tokens), int(final_len), asked)

    def _fits(self, asked: int, number: int = 1) -> bool:
        return self._buddy.fits(-(-asked // self.block_size), number)

    def _reserve(self, seq_id: int, num_tokens: int, final_len: int, asked: int) -> None:
        """Take the chunk; all has been checked."""
        start, size = self._buddy.take(-(-asked // self.block_size))
        self._held[seq_id] = Reservation(start, size, asked, final_len, num_tokens - self._now)
        self._full_at = None
        self._tokens += num_tokens
        self._final += final_len
        self._asked += asked

    def _new_id(self, seq_id: int) -> int:
        seq_id = check_id(seq_id)
        if seq_id in self._held:
            raise DuplicateSequenceError(f"sequence {seq_id} exists already")
        return seq_id

    def _most_slots(self, seqs: list[Sequence]) -> int:
        """Slots that the largest of these reservations asks for."""
        return max([self.slots_to_ask(seq.num_tokens, seq.final_len) for seq in seqs])

    def require_fits(self, group: SequenceGroup) -> None:
        """RequestTooLargeError unless an empty pool has a chunk for each of its sequences."""
        try:
            asked = self._most_slots(group.seqs)
        except ReservationError as error:
            raise RequestTooLargeError(f"request {group.group_id}: {error}") from None
        if not self._empty.fits(-(-asked // self.block_size), len(group.seqs)):
            raise RequestTooLargeError(
                f"request {group.group_id} needs {len(group.seqs)} chunks for {asked} slots; "
                f"the pool of {self.num_blocks} blocks has not so many"
            )

    def can_admit(self, group: SequenceGroup, alone: bool = False) -> bool:
        """Whether every sequence of the group finds a chunk of its own: nothing is shared."""
        seqs = group.unfinished()
        return self._fits(self._most_slots(seqs), len(seqs))

    def try_admit(self, group: SequenceGroup, alone: bool = False) -> BlockPairs | None:
        """`admit` if `can_admit`: never a copy, or None and nothing has changed."""
        if not self.can_admit(group):
            return None
        seqs = group.unfinished()
        for seq in seqs:
            self._new_id(seq.seq_id)
        for seq in seqs:
            lengths = seq.num_tokens, seq.final_len
            self._reserve(seq.seq_id, *lengths, self.slots_to_ask(*lengths))
        return NO_COPIES

    def admit(self, group: SequenceGroup) -> BlockPairs:
        """A reservation for each sequence of the group, or for none. Raises as allocate does."""
        if self.try_admit(group) is None:
            raise OutOfBlocksError(f"group {group.group_id} does not find a chunk per sequence")
        return NO_COPIES

    def can_append(self, seq_ids: list[int]) -> bool:
        """Whether each has a slot left: always, short of its final length."""
        return all(self.num_tokens(i) < self.reservation(i).final_len for i in seq_ids)

    def append(self, seq_id: int, num_tokens: int = 1) -> BlockPairs:
        """Use more reserved slots of one sequence: ReservationError past its final length."""
        num_tokens = check_count("number of tokens", num_tokens)
        held = self.reservation(seq_id)
        if held.start_len + self._now + num_tokens > held.final_len:
            raise ReservationError(f"sequence {seq_id} ends at {held.final_len} tokens")
        held.start_len += num_tokens
        self._full_at = None
        self._tokens += num_tokens
        return NO_COPIES

    def truncate(self, seq_id: int, num_tokens: int) -> list[int]:
        """Forget a sequence's tokens but the first `num_tokens`, at least one; its slots stay
        reserved. Returns no block; ValueError if it has fewer tokens."""
        held = self.reservation(seq_id)
        num_tokens = check_count("number of tokens", num_tokens)
        removed = held.start_len + self._now - num_tokens
        if removed < 0:
            raise ValueError(f"sequence {seq_id} has fewer than {num_tokens} tokens")
        held.start_len -= removed
        self._full_at = None
        self._tokens -= removed
        return []

    def append_all(self, num_tokens: int = 1) -> BlockPairs:
        """Use `num_tokens` more slots of every sequence, or of none (ReservationError)."""
        num_tokens = check_count("number of tokens", num_tokens)
        if self._full_at is None and self._held:
            self._full_at = min([r.final_len - r.start_len for r in self._held.values()])
        if self._held and self._now + num_tokens > self._full_at:
            raise ReservationError(f"a step of {num_tokens} overruns a final length")
        self._now += num_tokens
        self._tokens += num_tokens * len(self._held)
        return NO_COPIES

    def free(self, seq_id: int) -> list[int]:
        """Give the reservation back; returns its blocks."""
        held = self.reservation(seq_id)
        del self._held[seq_id]
        self._full_at = None
        self._tokens -= held.start_len + self._now
        self._final -= held.final_len
        self._asked -= held.asked
        self._buddy.give_back(held.start_block)
        return list(range(held.start_block, held.start_block + held.num_blocks))

    def reorder(self, parents: dict[int, int]) -> list[SlotCopy]:
        """Beam search without sharing: each child gets a copy of its parent's whole K/V.

        Returns (source slot, destination slot, count), to be made as if at once. All lengths
        must be equal, as those of beams are; ReservationError otherwise.
        """
        copies = []
        for child, parent in parents.items():
            length = self.num_tokens(child)
            if self.num_tokens(parent) != length:
                raise ReservationError(f"beams {child} and {parent} differ in length")
            if child != parent:
                copies.append((self.start_slot(parent), self.start_slot(child), length))
        return copies

    def usage(self) -> MemoryUsage:
        """Where every slot of the address space is, now."""
        given = self.num_blocks - self.num_free_blocks
        return MemoryUsage(
            capacity=self.num_blocks * self.block_size,
            tokens=self._tokens,
            reserved=self._final - self._tokens,
            internal=self._asked - self._final,
            rounding=given * self.block_size - self._asked,
            free=self.num_free_blocks * self.block_size,
            logical_tokens=self._tokens,
            logical_blocks=given,
            physical_blocks=given,
        )

    def check_invariants(self) -> None:
        """Recompute everything from the reservations alone; AssertionError at a difference."""
        self._buddy.check_invariants()
        chunks = {r.start_block: r.num_blocks for r in self._held.values()}
        assert len(chunks) == len(self._held), "two sequences hold the same chunk"
        assert chunks == {s: 1 << o for s, o in self._buddy.chunk_order.items()}, "chunk lost"
        held = self._held.values()
        lengths = [r.start_len + self._now for r in held]
        for length, r in zip(lengths, held):
            assert 0 < length <= r.final_len <= r.asked, "length, final length, slots asked for"
            assert r.asked <= r.num_blocks * self.block_size, "chunk smaller than asked for"
            least = -(-r.asked // self.block_size)
            assert r.num_blocks == 1 << (least - 1).bit_length(), "chunk not the next power of two"
        assert self._tokens == sum(lengths), "sum of tokens"
        assert self._final == sum(r.final_len for r in held), "sum of final lengths"
        assert self._asked == sum(r.asked for r in held), "sum of slots asked for"
        first = min((r.final_len - r.start_len for r in held), default=None)
        assert self._full_at in (None, first), "the step at which the first reservation is full"
        used = self.num_blocks - self.num_free_blocks
        assert used == sum(r.num_blocks for r in held), "free and reserved blocks part the pool"
        self.usage()
