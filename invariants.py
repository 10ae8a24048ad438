"""What must hold of a PagedKVCacheManager after every operation, recomputed from its tables.

Reproduces nothing: it is the safety net under everything that does. `check_paged` trusts no
counter; it rebuilds reference counts, fills and sums from the block tables alone and compares.
Called as `manager.check_invariants()`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from allocator import BlockAllocator
from copy_ledger import CopyLedger
from sequence import BlockTable

if TYPE_CHECKING:
    from kv_cache_manager import PagedKVCacheManager

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
