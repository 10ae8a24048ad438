"""Regime item 4: every state that small worlds can reach, and every call in each of them.

The search of `vllm_sim/conformance` over our paged manager. A world bounds blocks and sequences
alive at once, nothing else: a sequence grows until the pool is full. Time is relative to the clock
and names do not count, so there are finitely many states, and their number is exact: another number
means that the manager behaves differently, which may be meant.

    python -m pytest -m slow tests/conformance/test_exhaustive.py     # the large worlds
"""

import copy
import random

import pytest
from manager_tools import observable, random_manager
from searches import figures, search

from allocators import BlockAllocator
from kv_cache_manager import OutOfBlocksError, PagedKVCacheManager
from vllm_sim.conformance.adapters.paged_manager import PagedManager, World, copied

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "states", "transitions"),
    [
        ("small", 1_331, 58_977),
        ("prefix", 10_085, 449_312),
        pytest.param("large", 12_388, 634_327, marks=SLOW),
        pytest.param("large-prefix", 15_513, 722_840, marks=SLOW),
    ],
)
def test_every_state_of_the_paged_manager(world, states, transitions, figure):
    found = search(PagedManager, PagedManager.worlds[world])
    went = figures(found)
    assert found.missing == () and (found.states, found.transitions) == (states, transitions)
    figure(f"paged manager, {PagedManager.worlds[world]}", **went)


# ---- states are copied whole, and known by no names ---------------------------------------------


def adapter_of(manager):
    """The adapter of a manager that has a past; what its slots hold does not matter here."""
    adapter = PagedManager()
    adapter.start(World(manager.num_blocks, manager.num_cpu_blocks, 1))
    adapter.manager = manager
    adapter.tokens = {i: () for i, *_ in adapter._blocks()}
    return adapter


def renamed(manager, rng):
    """The same state with other names of blocks and sequences, in other orders, at another time."""
    m, later = copied(manager), rng.randrange(1, 9)
    m._clock.now += later
    names = {}
    for pool in (m._gpu, m._cpu):
        count = pool.num_blocks
        names[pool] = new = dict(zip(range(count), rng.sample(range(count), count)))
        pool.free_blocks = [new[b] for b in rng.sample(pool.free_blocks, len(pool.free_blocks))]
        pool.extra_refs = {new[b]: n for b, n in pool.extra_refs.items()}
    ids = [*m._tables, *m._swapped, *m._prefixes]
    other = dict(zip(ids, rng.sample(range(100), len(ids))))
    for field in ("_tables", "_swapped", "_prefixes", "_tails"):
        held = getattr(m, field)
        setattr(m, field, {other[i]: held[i] for i in rng.sample(list(held), len(held))})
    for tables in (m._tables, m._swapped, m._prefixes):
        for t in tables.values():
            keep = t.num_prefix_blocks if tables is m._swapped else len(t.blocks)
            behind = [names[m._cpu][b] for b in t.blocks[keep:]]
            t.blocks[:] = [names[m._gpu][b] for b in t.blocks[:keep]] + behind
            t.offset -= later if tables is m._tables else 0
    m._offsets -= later * len(m._tables)
    m._due = [{} for _ in m._due]
    for i, t in m._tables.items():
        m._due[-t.offset % m.block_size][i] = t.blocks
    m.check_invariants()
    return m


@pytest.mark.parametrize("seed", range(40))
def test_states_are_copied_whole_and_known_by_no_names(seed):
    manager, rng = random_manager(seed, steps=14, num_blocks=40), random.Random(seed)
    adapter, before = adapter_of(manager), observable(manager)
    key, twin = adapter.key(), copy.deepcopy(adapter)
    twin.manager.check_invariants()
    assert observable(twin.manager) == before and twin.key() == key
    assert twin.manager.__dict__.keys() == manager.__dict__.keys()
    for _ in range(5):
        adapter.manager = renamed(manager, rng)
        assert adapter.key() == key
    # Whatever happens to the twin is seen in it, and not in the other.
    m = twin.manager
    calls = [lambda: m.allocate(500, 1), m.append_all, lambda: m.free(500)]
    for call in calls + [lambda i=i: m.free(i) for i in manager.running_ids]:
        call()
        key, last = twin.key(), key
        assert key != last
    assert observable(manager) == before
    manager.check_invariants()


# ---- what is broken is found --------------------------------------------------------------------


def lost_reference(monkeypatch):
    share = BlockAllocator.share
    monkeypatch.setattr(BlockAllocator, "share", lambda a, b, times=1: share(a, b[:-1], times))


def no_copy_on_write(monkeypatch):
    """Where a parent's block is part-filled is not noted: nobody looks for a copy."""
    fork_all = PagedKVCacheManager._fork_all

    def forgets(m, *rest):
        fork_all(m, *rest)
        m._tails.clear()

    monkeypatch.setattr(PagedKVCacheManager, "_fork_all", forgets)


def copy_of_the_wrong_block(monkeypatch):
    copy = PagedKVCacheManager._copy_last_block
    turned = lambda m, table: copy(m, table)[::-1]  # noqa: E731
    monkeypatch.setattr(PagedKVCacheManager, "_copy_last_block", turned)


def swap_forgets_a_block(monkeypatch):
    swap_out = PagedKVCacheManager.swap_out
    monkeypatch.setattr(PagedKVCacheManager, "swap_out", lambda m, ids: swap_out(m, ids)[1:])


def swap_leaks_a_block(monkeypatch):
    move = BlockAllocator.move

    def leaks(pool, held, target):
        mapping = move(pool, held, target)
        pool.free_blocks.pop()
        return mapping

    monkeypatch.setattr(BlockAllocator, "move", leaks)


def step_half_taken(monkeypatch):
    """The clock advances although the blocks are not there."""
    step = PagedKVCacheManager.append_all

    def half(m, num_tokens=1):
        try:
            return step(m, num_tokens)
        except OutOfBlocksError:
            m._clock.now += 1
            raise

    monkeypatch.setattr(PagedKVCacheManager, "append_all", half)


def reorder_one_after_the_other(monkeypatch):
    reorder = PagedKVCacheManager.reorder
    in_turn = lambda m, parents: [b for p in parents.items() for b in reorder(m, dict([p]))]  # noqa: E731
    monkeypatch.setattr(PagedKVCacheManager, "reorder", in_turn)


def watermark_forgotten(monkeypatch):
    count = PagedKVCacheManager.blocks_for_group
    monkeypatch.setattr(
        PagedKVCacheManager, "blocks_for_group", lambda m, g: max(0, count(m, g) - 1)
    )


def sibling_frees_for_all(monkeypatch):
    """Freeing a sequence twice over: its swapped sibling loses the block too."""
    drop = BlockAllocator.drop

    def drops_all(pool, blocks):
        pool.extra_refs.pop(blocks[0] if blocks else None, None)
        return drop(pool, blocks)

    monkeypatch.setattr(BlockAllocator, "drop", drops_all)


PAGED = (lost_reference, no_copy_on_write, copy_of_the_wrong_block, swap_forgets_a_block)
PAGED += (swap_leaks_a_block, step_half_taken, reorder_one_after_the_other, watermark_forgotten)
PAGED += (sibling_frees_for_all,)


@pytest.mark.parametrize("breaks", PAGED)
def test_what_is_broken_is_found_in_a_tiny_world(breaks, monkeypatch):
    assert search(PagedManager, PagedManager.worlds["tiny"]).fault is None
    breaks(monkeypatch)
    assert search(PagedManager, PagedManager.worlds["tiny"]).fault is not None
