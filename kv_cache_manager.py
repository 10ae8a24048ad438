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
and `free` and `reorder` the blocks that nobody holds any more. Every operation is all-or-nothing:
on an error nothing has changed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
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
    move_blocks,
)
from sequence import BlockTable, Clock, SequenceGroup

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


def check_count(what: str, value: int, least: int = 1) -> None:
    """ValueError unless `value` is an integer of at least `least` (a bool is not a count)."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} must be an integer of at least {least}, got {value!r}")


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


class CopyLedger:
    """Which blocks descend from which by copy-on-write: the source of `duplicates`.

    A copy of a block with f filled slots holds those f tokens a second time for as long as some
    other block that holds them lives. Copies of copies (beam search) form trees; a dead ancestor
    still tells its descendants apart, and disappears with the last of them.
    """

    __slots__ = ("nodes",)

    class Node:
        __slots__ = ("copied", "parent")

        def __init__(self, parent: CopyLedger.Node | None, copied: int) -> None:
            self.parent = parent
            self.copied = copied  # leading slots that came from the parent

    def __init__(self) -> None:
        self.nodes: dict[int, CopyLedger.Node] = {}

    def record(self, source: int, destination: int, filled: int) -> None:
        """`destination` now holds a copy of the first `filled` slots of `source`."""
        nodes = self.nodes
        parent = nodes.get(source)
        if parent is None:
            parent = nodes[source] = CopyLedger.Node(None, 0)
        nodes[destination] = CopyLedger.Node(parent, filled)

    def forget(self, blocks: Iterable[int]) -> None:
        """The blocks were freed."""
        if self.nodes:
            for block in blocks:
                self.nodes.pop(block, None)

    def move_to(self, other: CopyLedger, pairs: Iterable[tuple[int, int]]) -> None:
        """The blocks were swapped: their history goes along, here they are gone."""
        for source, destination in pairs:
            node = self.nodes.pop(source, None)
            if node is not None:
                other.nodes[destination] = node

    def duplicates(self) -> int:
        """Tokens held more than once, counting each extra holder, in slots of this pool."""
        here = set(self.nodes.values())
        seen: set[tuple[CopyLedger.Node, int]] = set()
        count = 0
        for node in here:
            for slot in range(node.copied):
                writer = node
                while slot < writer.copied:
                    assert writer.parent is not None
                    writer = writer.parent
                if writer in here or (writer, slot) in seen:
                    count += 1
                seen.add((writer, slot))
        return count


# (pool, block) -> its place in every table that holds it, slots filled, the block before it.
Fills = dict[tuple[str, int], tuple[int, int, int | None]]


def check_paged(manager: PagedKVCacheManager) -> None:
    """AssertionError at the first thing that does not hold."""
    m, size = manager, manager.block_size
    ids = [*m._tables, *m._swapped, *m._prefixes]
    assert len(ids) == len(set(ids)), "a sequence is in two places"

    kept = [t.blocks[: t.num_prefix_blocks] for t in m._swapped.values()]
    moved = [t.blocks[t.num_prefix_blocks :] for t in m._swapped.values()]
    on_gpu = [t.blocks for t in (*m._tables.values(), *m._prefixes.values())]
    _check_pool(m._gpu, Counter(b for blocks in on_gpu + kept for b in blocks), "GPU")
    _check_pool(m._cpu, Counter(b for blocks in moved for b in blocks), "CPU")
    assert m._cpu.num_blocks <= m._gpu.num_blocks, "swap space above the GPU's blocks"

    fills: Fills = {}
    for table in (*m._tables.values(), *m._prefixes.values()):
        _check_table(table, size, fills, "gpu")
    for table in m._swapped.values():
        _check_table(table, size, fills, "cpu")
        assert table.phase is None, "a swapped table runs with the clock"
    for table in m._prefixes.values():
        assert table.room == 0 and table.phase is None, "a shared prefix may grow"

    # Loose and in step partition the running tables; who waits where follows from the phase.
    in_step = {i: t for i, t in m._tables.items() if t.phase is not None}
    loose = {i: t for i, t in m._tables.items() if t.phase is None}
    assert m._loose == loose, "the set of loose tables"
    for phase, due in enumerate(m._due):
        expect = {i: t for i, t in in_step.items() if t.phase == phase}
        assert due.keys() == expect.keys(), "a table waits in the wrong bucket"
        assert all(due[i] is t.blocks for i, t in expect.items()), "a bucket feeds another table"
    for table in in_step.values():
        assert table.room == table.held == 0, "a table in step has slots of its own"
    for table in m._tables.values():
        writable = table.unfilled if table.phase is not None else table.room
        exclusive = m._gpu.ref_count(table.blocks[-1]) == 1
        assert exclusive or writable == 0, "a shared block could be written without a copy"

    assert m._in_step_unfilled == sum(t.unfilled for t in in_step.values()), "unfilled in step"
    running = m._tables.values()
    assert m._logical_blocks == sum(len(t.blocks) for t in running), "logical blocks"
    usage = m.usage()
    filled = {block: fill for (pool, block), (_, fill, _) in fills.items() if pool == "gpu"}
    assert usage.tokens == sum(filled.values()), "tokens, counting a shared slot once"
    assert usage.padding == usage.physical_blocks * size - usage.tokens, "padding"
    assert usage.logical_tokens == sum(t.num_tokens for t in running), "logical tokens"

    _check_ledger(m._gpu_copies, filled)
    _check_ledger(m._cpu_copies, {b: f for (pool, b), (_, f, _) in fills.items() if pool == "cpu"})
    assert 0 <= m.duplicates() <= max(0, usage.tokens - 1), "more duplicates than tokens"


def _check_pool(pool: BlockAllocator, held: Counter[int], name: str) -> None:
    free = pool.free_blocks
    assert len(free) == len(set(free)), f"a {name} block is twice on the free list"
    assert held.keys().isdisjoint(free), f"a {name} block is free and in a table"
    assert set(free) | held.keys() == set(range(pool.num_blocks)), f"a {name} block is lost"
    extra = {block: count - 1 for block, count in held.items() if count > 1}
    assert pool.extra_refs == extra, f"{name} reference counts differ from the tables"


def _check_table(table: BlockTable, size: int, fills: Fills, pool: str) -> None:
    assert table.room >= 0 and table.held >= 0, "negative room"
    assert 0 <= table.unfilled < size, "the last block is empty or over-full"
    assert table.blocks, "a table without a block"
    assert 0 <= table.num_prefix_blocks <= len(table.blocks), "prefix longer than the table"
    before = None
    for index, (block, filled) in enumerate(table.entries()):
        where = "gpu" if index < table.num_prefix_blocks else pool
        # Who shares a block shares all before it: reorder() compares tables from their ends.
        known = fills.setdefault((where, block), (index, filled, before))
        assert known == (index, filled, before), f"holders of block {block} disagree about it"
        before = block


def _check_ledger(ledger: CopyLedger, filled: dict[int, int]) -> None:
    for block, node in ledger.nodes.items():
        assert block in filled, f"the ledger knows block {block}, which is free"
        assert node.copied <= filled[block], f"more slots copied to {block} than it holds"
        assert node.parent is not None or node.copied == 0, "copied from nowhere"


ONE = 1  # compared by identity: True and 1.0, which equal it, are no counts and go the slow way


def find(tables: Mapping[int, BlockTable], seq_id: int, what: str) -> BlockTable:
    """The table of that id, or UnknownSequenceError."""
    table = tables.get(seq_id)
    if table is None:
        raise UnknownSequenceError(f"{seq_id} is not the id of {what}")
    return table


class PagedTables:
    """The running tables and shared prefixes over `num_blocks` blocks of `block_size` slots.

    A decode step costs nothing for a sequence whose last block has room: `append_all` advances
    all running sequences in time proportional to the blocks they need (see BlockTable).
    """

    def __init__(
        self, num_blocks: int, block_size: int, free_order: Iterable[int] | None = None
    ) -> None:
        check_count("number of blocks", num_blocks)
        check_count("block size", block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._gpu = BlockAllocator(num_blocks, free_order)
        self._gpu_copies = CopyLedger()
        self._clock = Clock()
        self._tables: dict[int, BlockTable] = {}  # running
        self._prefixes: dict[int, BlockTable] = {}  # held by the provider, never grow
        # Running tables are either loose or in step; those in step wait, by the step at which
        # their last block is full, in the bucket of that step modulo S (see BlockTable).
        self._loose: dict[int, BlockTable] = {}
        self._due: list[dict[int, list[int]]] = [{} for _ in range(block_size)]
        self._in_step_unfilled = 0
        self._logical_blocks = 0  # of running tables

    # -- queries ----------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        return len(self._gpu.free_blocks)

    @property
    def running_ids(self) -> list[int]:
        """Ids of the sequences in GPU memory, in the order in which they came."""
        return list(self._tables)

    def block_table(self, seq_id: int) -> BlockTable:
        """The table of a running sequence or a shared prefix; to be read, not written."""
        table = self._tables.get(seq_id) or self._prefixes.get(seq_id)
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
        """New blocks that `num_tokens` tokens take, after a shared prefix if one is named."""
        check_count("number of tokens", num_tokens)
        prefix_len = 0 if prefix_id is None else self._prefix(prefix_id).num_tokens
        # A part-filled last prefix block is copied on the first write: it counts as new.
        return -(-(prefix_len + num_tokens) // self.block_size) - prefix_len // self.block_size

    def allocate(self, seq_id: int, num_tokens: int, prefix_id: int | None = None) -> BlockPairs:
        """Give a new sequence blocks for `num_tokens` tokens, behind a shared prefix if named.

        Returns the copy of the prefix's last block if that is part-filled (section 4.4). Takes
        the watermark too: admission asks `can_allocate`. Raises OutOfBlocksError,
        DuplicateSequenceError, UnknownSequenceError (no such prefix), ValueError.
        """
        self._require_new(seq_id)
        need = self.blocks_for(num_tokens, prefix_id)
        if need > self.num_free_blocks:
            raise OutOfBlocksError(
                f"sequence {seq_id} needs {need} blocks, {self.num_free_blocks} are free"
            )
        if prefix_id is None:
            self._give(seq_id, need, num_tokens)
            return NO_COPIES
        prefix = self._prefixes[prefix_id]
        table = prefix.fork()
        table.num_prefix_blocks = prefix.num_tokens // self.block_size
        self._gpu.share(table.blocks)
        self._add(seq_id, table)
        return self._extend(seq_id, table, num_tokens)

    def allocate_prefix(self, prefix_id: int, num_tokens: int) -> None:
        """Reserve blocks for a predefined shared prefix (section 4.4); it is never swapped."""
        self._require_new(prefix_id)
        need = self.blocks_for(num_tokens)
        if need > self.num_free_blocks:
            raise OutOfBlocksError(
                f"prefix {prefix_id} needs {need} blocks, {self.num_free_blocks} are free"
            )
        table = BlockTable(self._gpu.take(need), self.block_size, num_tokens, self._clock)
        table.hold()  # its last block is copied by whoever continues it, never written again
        self._prefixes[prefix_id] = table

    def fork(self, parent_id: int, child_id: int) -> None:
        """A child that shares all blocks of a running parent (section 4.4, 5). Takes no block."""
        self._require_new(child_id)
        self._running(parent_id)
        self._fork_all(parent_id, [child_id])

    def free(self, seq_id: int) -> list[int]:
        """Drop a running sequence or a prefix; returns the blocks that became free."""
        table = self._tables.get(seq_id)
        if table is None:
            if seq_id in self._prefixes:
                return self._drop(self._prefixes.pop(seq_id).blocks)
            table = self._running(seq_id)  # raises
        if table.phase is None:
            del self._loose[seq_id]
        else:
            del self._due[table.phase][seq_id]
            self._in_step_unfilled -= (table.phase - self._clock.now) % self.block_size
        del self._tables[seq_id]
        self._logical_blocks -= len(table.blocks)
        return self._drop(table.blocks)

    # -- growth and copy-on-write (section 4.3, 4.4) ----------------------------------------

    def append(self, seq_id: int, num_tokens: int = 1) -> BlockPairs:
        """Room for `num_tokens` more tokens of one sequence; returns the copies to make first.

        Raises OutOfBlocksError, UnknownSequenceError (also for a swapped one), ValueError.
        """
        try:
            table = self._tables[seq_id]
        except KeyError:
            raise UnknownSequenceError(f"sequence {seq_id} is not running") from None
        if num_tokens is ONE:
            room = table.room
            if room:
                table.room = room - 1
                return NO_COPIES
            # The other frequent case, a full block of its own, without the detour.
            free = self._gpu.free_blocks
            if free and table.phase is None and not table.held:
                table.blocks.append(free.pop())
                table.room = self.block_size - 1
                self._logical_blocks += 1
                return NO_COPIES
        return self._extend(seq_id, table, num_tokens)

    def append_all(self, num_tokens: int = 1) -> BlockPairs:
        """Room for `num_tokens` more tokens of every running sequence, in one step.

        Returns all copies of the step. Raises OutOfBlocksError, and then none has advanced.
        """
        if num_tokens is not ONE:
            check_count("number of tokens", num_tokens)
        now, size = self._clock.now, self.block_size
        need = len(self._due[now % size]) + len(self._loose)  # at most, for a step of one
        if num_tokens > 1:  # a table's blocks, and a copy for each that is loose
            need = len(self._tables) * -(-num_tokens // size) + len(self._loose)
        if need > self.num_free_blocks:
            need = self.blocks_for_step(num_tokens)
            if need > self.num_free_blocks:
                raise OutOfBlocksError(
                    f"a step of {num_tokens} needs {need} blocks, {self.num_free_blocks} are free"
                )
        copies = self._enter_step() if self._loose else NO_COPIES
        pop = self._gpu.free_blocks.pop
        taken = 0
        for ahead in range(num_tokens if num_tokens < size else size):
            due = self._due[(now + ahead) % size]
            if due:
                # A table due `ahead` steps from now is due again every S steps after that.
                for _ in range(ahead, num_tokens, size):
                    for blocks in due.values():
                        blocks.append(pop())
                    taken += len(due)
        self._logical_blocks += taken
        self._in_step_unfilled += taken * size - (len(self._tables) * num_tokens)
        self._clock.now = now + num_tokens
        return copies

    def blocks_for_step(self, num_tokens: int = 1) -> int:
        """Exact number of new blocks that `append_all(num_tokens)` takes, copies included."""
        size, now = self.block_size, self._clock.now
        if num_tokens is ONE and not self._loose:
            return len(self._due[now % size])
        need = 0
        for ahead in range(min(num_tokens, size)):
            due = self._due[(now + ahead) % size]
            if due:
                need += len(due) * -(-(num_tokens - ahead) // size)
        held = []
        for table in self._loose.values():
            missing = num_tokens - table.room - table.held
            if missing > 0:
                need += -(-missing // size)
            if table.held:
                held.append(table.blocks[-1])
        return need + self._copies_for(Counter(held)) if held else need

    def steps_without_copies(self, at_most: int, reserve: int) -> int:
        """The most steps, `at_most` or fewer, that copy nothing and leave `reserve` blocks free.

        None while a running sequence has slots withheld, even if the next write needs no copy.
        """
        free, size, now = self.num_free_blocks - reserve, self.block_size, self._clock.now
        if free < 0:
            return 0
        rooms = []
        for table in self._loose.values():
            if table.held:
                return 0
            rooms.append(table.room)
        # A table takes a block in every S steps: whole rounds first, then step by step.
        tables = len(self._tables)
        rounds = free // tables if tables else at_most
        free -= rounds * tables
        for ahead in range(at_most - rounds * size):
            free -= len(self._due[(now + ahead) % size]) + rooms.count(ahead)
            if free < 0:
                return rounds * size + ahead
        return at_most

    def blocks_for_append(self, seq_ids: Iterable[int]) -> int:
        """Exact number of new blocks, copies included, for a token more in each of these."""
        need = 0
        due = self._clock.now % self.block_size
        held = []
        for seq_id in seq_ids:
            table = self._tables.get(seq_id) or self._running(seq_id)
            if table.phase is not None:
                need += table.phase == due
            elif table.held:
                held.append(table.blocks[-1])
            else:
                need += table.room == 0
        return need + self._copies_for(Counter(held)) if held else need

    def _copies_for(self, writers: Counter[int]) -> int:
        """Copies when so many tables write into each of these shared blocks.

        The last of all holders may write in place; the others each need a copy.
        """
        ref_count = self._gpu.ref_count
        return sum(min(count, ref_count(block) - 1) for block, count in writers.items())

    # -- the parts --------------------------------------------------------------------------

    def _running(self, seq_id: int) -> BlockTable:
        return find(self._tables, seq_id, "a running sequence")

    def _prefix(self, prefix_id: int) -> BlockTable:
        return find(self._prefixes, prefix_id, "a shared prefix")

    def _require_new(self, seq_id: int) -> None:
        if seq_id in self._tables or seq_id in self._prefixes:
            raise DuplicateSequenceError(f"sequence {seq_id} exists already")

    def _fork_all(self, parent_id: int, child_ids: list[int]) -> None:
        """Children of one running parent; all has been checked."""
        parent = self._tables[parent_id]
        self._leave_step(parent_id, parent)
        parent.hold()
        self._gpu.share(parent.blocks, len(child_ids))
        for child_id in child_ids:
            self._tables[child_id] = self._loose[child_id] = parent.fork()
        self._logical_blocks += len(child_ids) * len(parent.blocks)

    def _give(self, seq_id: int, num_blocks: int, num_tokens: int) -> None:
        """A table of its own for a new sequence; all has been checked."""
        blocks = self._gpu.take(num_blocks)
        table = BlockTable(blocks, self.block_size, num_tokens, self._clock)
        self._tables[seq_id] = self._loose[seq_id] = table
        self._logical_blocks += num_blocks

    def _add(self, seq_id: int, table: BlockTable) -> None:
        self._tables[seq_id] = self._loose[seq_id] = table
        self._logical_blocks += len(table.blocks)

    def _extend(self, seq_id: int, table: BlockTable, num_tokens: int) -> BlockPairs:
        """The slow path of append: copy-on-write, new blocks, or a table that is in step."""
        check_count("number of tokens", num_tokens)
        unfilled = table.unfilled
        new = max(0, -(-(num_tokens - unfilled) // self.block_size))
        copy = table.held > 0 and self._gpu.ref_count(table.blocks[-1]) > 1
        if new + copy > self.num_free_blocks:
            raise OutOfBlocksError(
                f"sequence {seq_id} needs {new + copy} blocks, {self.num_free_blocks} are free"
            )
        self._leave_step(seq_id, table)
        copies = (self._copy_last_block(table),) if copy else NO_COPIES
        table.blocks += self._gpu.take(new)
        table.held = 0
        table.room = unfilled + new * self.block_size - num_tokens
        self._logical_blocks += new
        return copies

    def _copy_last_block(self, table: BlockTable) -> tuple[int, int]:
        """Copy-on-write: a block of its own in place of the shared last one (section 4.4)."""
        source = table.blocks[-1]
        table.blocks[-1] = destination = self._gpu.replace(source)
        self._gpu_copies.record(source, destination, self.block_size - table.held)
        return source, destination

    def _enter_step(self) -> BlockPairs:
        """Let all loose tables grow with the clock from now on; returns the copies to make."""
        copies = []
        now, size = self._clock.now, self.block_size
        extra_refs = self._gpu.extra_refs
        for seq_id, table in self._loose.items():
            unfilled = table.room
            if table.held:
                if table.blocks[-1] in extra_refs:
                    copies.append(self._copy_last_block(table))
                unfilled += table.held
                table.held = 0
            table.room = 0
            table.phase = phase = (now + unfilled) % size
            self._due[phase][seq_id] = table.blocks
            self._in_step_unfilled += unfilled
        self._loose.clear()
        return tuple(copies)

    def _leave_step(self, seq_id: int, table: BlockTable) -> None:
        """Make a running table loose again: from here on it is counted by itself."""
        if table.phase is not None:
            del self._due[table.phase][seq_id]
            table.room = table.unfilled
            table.phase = None
            self._in_step_unfilled -= table.room
            self._loose[seq_id] = table

    def _drop(self, blocks: list[int]) -> list[int]:
        freed = self._gpu.drop(blocks)
        if self._gpu_copies.nodes:
            self._gpu_copies.forget(freed)
        return freed


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
        check_count("number of blocks", num_blocks)
        check_count("block size", block_size)
        check_count("maximum length", max_len)
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
        # (step at which it is full, a serial number, id, reservation): a heap, cleared lazily.
        self._full_at: list[tuple[int, int, int, Reservation]] = []
        self._serial = itertools.count()
        self._empty = BuddyAllocator(num_blocks, 1 << self._buddy.max_order)  # never taken from
        # Sums over the reservations, in slots.
        self._tokens = self._final = self._asked = self._given = 0

    # -- queries ----------------------------------------------------------------------------

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
            return self._held[seq_id]
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
        usual = type(num_tokens) is type(final_len) is int and max_len is None
        if not usual or not 0 < num_tokens <= final_len:
            check_count("number of tokens", num_tokens)
            check_count("maximum length", limit)
            check_count("final length", final_len, least=num_tokens)
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

    # -- operations -------------------------------------------------------------------------

    def can_allocate(
        self, num_tokens: int, final_len: int, max_len: int | None = None, number: int = 1
    ) -> bool:
        """Whether `number` such sequences find a chunk each."""
        asked = self.slots_to_ask(num_tokens, final_len, max_len)
        return self._buddy.fits(-(-asked // self.block_size), number)

    def refused_by_fragmentation(self, num_tokens: int, final_len: int) -> bool:
        """Whether it does not fit although as many slots as it asks for are free."""
        asked = self.slots_to_ask(num_tokens, final_len)
        enough = asked <= self.num_free_blocks * self.block_size
        return enough and not self.can_allocate(num_tokens, final_len)

    def allocate(
        self, seq_id: int, num_tokens: int, final_len: int, max_len: int | None = None
    ) -> None:
        """Reserve contiguous slots for a new sequence of `num_tokens` tokens so far.

        `final_len` is its true final length: the oracle and the accounting know it. Raises
        OutOfBlocksError, DuplicateSequenceError, ReservationError, ValueError.
        """
        if seq_id in self._held:
            raise DuplicateSequenceError(f"sequence {seq_id} exists already")
        asked = self.slots_to_ask(num_tokens, final_len, max_len)
        blocks = -(-asked // self.block_size)
        if not self._buddy.fits(blocks):
            raise OutOfBlocksError(
                f"sequence {seq_id} asks for {blocks} contiguous blocks; of "
                f"{self.num_free_blocks} free ones no chunk is large enough"
            )
        self._reserve(seq_id, blocks, asked, num_tokens, final_len)

    def _reserve(
        self, seq_id: int, blocks: int, asked: int, num_tokens: int, final_len: int
    ) -> None:
        """Take the chunk; all has been checked."""
        start, size = self._buddy.take(blocks)
        start_len = num_tokens - self._now
        held = Reservation(start, size, asked, final_len, start_len)
        self._held[seq_id] = held
        self._note_full(seq_id, held)
        self._tokens += num_tokens
        self._final += final_len
        self._asked += asked
        self._given += size

    def require_fits(self, group: SequenceGroup) -> None:
        """RequestTooLargeError unless an empty pool has a chunk for each of its sequences."""
        try:
            asked = max([self.slots_to_ask(s.num_tokens, s.final_len) for s in group.seqs])
        except ReservationError as error:
            raise RequestTooLargeError(f"request {group.group_id}: {error}") from None
        if not self._empty.fits(-(-asked // self.block_size), len(group.seqs)):
            raise RequestTooLargeError(
                f"request {group.group_id} needs {len(group.seqs)} chunks for {asked} slots; "
                f"the pool of {self.num_blocks} blocks has not so many"
            )

    def can_admit(self, group: SequenceGroup) -> bool:
        """Whether every sequence of the group finds a chunk of its own: nothing is shared."""
        seqs = group.unfinished()
        longest = max(seqs, key=lambda seq: self.slots_to_ask(seq.num_tokens, seq.final_len))
        return self.can_allocate(longest.num_tokens, longest.final_len, number=len(seqs))

    def try_admit(self, group: SequenceGroup) -> BlockPairs | None:
        """`admit` if `can_admit`: never a copy, or None and nothing has changed."""
        if len(group.seqs) == 1:  # most requests: no detour
            seq = group.seqs[0]
            num_tokens, final_len = seq.num_tokens, seq.final_len
            asked = self.slots_to_ask(num_tokens, final_len)
            blocks = -(-asked // self.block_size)
            if not self._buddy.fits(blocks):
                return None
            if seq.seq_id in self._held:
                raise DuplicateSequenceError(f"sequence {seq.seq_id} exists already")
            self._reserve(seq.seq_id, blocks, asked, num_tokens, final_len)
            return NO_COPIES
        return self.admit(group) if self.can_admit(group) else None

    def admit(self, group: SequenceGroup) -> BlockPairs:
        """A reservation for each sequence of the group, or for none. Raises as allocate does."""
        if not self.can_admit(group):
            raise OutOfBlocksError(f"group {group.group_id} does not find a chunk per sequence")
        for seq in group.unfinished():
            if seq.seq_id in self._held:
                raise DuplicateSequenceError(f"sequence {seq.seq_id} exists already")
        for seq in group.unfinished():
            self.allocate(seq.seq_id, seq.num_tokens, seq.final_len)
        return NO_COPIES

    def can_append(self, seq_ids: list[int]) -> bool:
        """Whether each has a slot left: always, short of its final length."""
        return all(self.num_tokens(i) < self.reservation(i).final_len for i in seq_ids)

    def append(self, seq_id: int, num_tokens: int = 1) -> BlockPairs:
        """Use `num_tokens` more reserved slots of one sequence; there is never a copy.

        Raises ReservationError past its final length, UnknownSequenceError, ValueError.
        """
        check_count("number of tokens", num_tokens)
        held = self.reservation(seq_id)
        if held.start_len + self._now + num_tokens > held.final_len:
            raise ReservationError(f"sequence {seq_id} ends at {held.final_len} tokens")
        held.start_len += num_tokens
        self._note_full(seq_id, held)
        self._tokens += num_tokens
        return NO_COPIES

    def append_all(self, num_tokens: int = 1) -> BlockPairs:
        """Use `num_tokens` more slots of every sequence, or of none (ReservationError)."""
        check_count("number of tokens", num_tokens)
        if self._held and self._now + num_tokens > self._first_full():
            raise ReservationError(f"a step of {num_tokens} overruns a final length")
        self._now += num_tokens
        self._tokens += num_tokens * len(self._held)
        return NO_COPIES

    def _note_full(self, seq_id: int, held: Reservation) -> None:
        """Put the step at which it is full on the heap; whatever was noted before is void."""
        heap = self._full_at
        heappush(heap, (held.final_len - held.start_len, next(self._serial), seq_id, held))
        if len(heap) > 64 + 4 * len(self._held):  # mostly void, and no step has cleared them
            heap[:] = [
                (r.final_len - r.start_len, next(self._serial), i, r) for i, r in self._held.items()
            ]
            heapify(heap)

    def _first_full(self) -> int:
        """The step at which the first reservation is full."""
        heap = self._full_at
        while True:
            step, _, seq_id, held = heap[0]
            if self._held.get(seq_id) is held and step == held.final_len - held.start_len:
                return step
            heappop(heap)

    def free(self, seq_id: int) -> list[int]:
        """Give the reservation back; returns its blocks."""
        held = self.reservation(seq_id)
        del self._held[seq_id]
        self._tokens -= held.start_len + self._now
        self._final -= held.final_len
        self._asked -= held.asked
        self._given -= held.num_blocks
        self._buddy.give_back(held.start_block)
        return list(range(held.start_block, held.start_block + held.num_blocks))

    def reorder(self, parents: dict[int, int]) -> list[SlotCopy]:
        """Beam search without sharing: each child gets a copy of its parent's whole K/V.

        Returns (source slot, destination slot, count), to be made as if at once. All lengths
        must be equal, as those of beams are; ReservationError otherwise.
        """
        for child, parent in parents.items():
            if self.num_tokens(child) != self.num_tokens(parent):
                raise ReservationError(f"beams {child} and {parent} differ in length")
        return [
            (self.start_slot(parent), self.start_slot(child), self.num_tokens(parent))
            for child, parent in parents.items()
            if child != parent
        ]

    # -- accounting -------------------------------------------------------------------------

    def usage(self) -> MemoryUsage:
        """Where every slot of the address space is, now."""
        return MemoryUsage(
            capacity=self.num_blocks * self.block_size,
            tokens=self._tokens,
            reserved=self._final - self._tokens,
            internal=self._asked - self._final,
            rounding=self._given * self.block_size - self._asked,
            free=self.num_free_blocks * self.block_size,
            logical_tokens=self._tokens,
            logical_blocks=self._given,
            physical_blocks=self._given,
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
        assert self._given == sum(r.num_blocks for r in held), "sum of blocks given"
        if held:
            first = min(r.final_len - r.start_len for r in held)
            assert self._first_full() == first, "the step at which the first reservation is full"
        used = self.num_blocks - self._buddy.num_free
        assert used == self._given, "free and reserved blocks partition the pool"
        self.usage()
