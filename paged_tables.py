"""Block tables over a pool of blocks: allocation, sharing, growth and copy-on-write.

Reproduces: sections 4.2-4.4 of the paper. Blocks are filled from left to right, a new one is
taken only when all before it are full; reference counts let tables share blocks, and a write into
a shared block first copies it (only a part-filled last block ever needs that).

This is the base of `PagedKVCacheManager` (kv_cache_manager.py), which adds what section 4.5 asks
for: admission, beam search, swapping. Import the manager from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from allocator import BlockAllocator, DuplicateSequenceError, OutOfBlocksError, UnknownSequenceError
from copy_ledger import CopyLedger
from memory_usage import NO_COPIES, BlockPairs, check_count
from sequence import BlockTable, Clock

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
