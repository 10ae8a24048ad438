"""Regime item 4: every state that small worlds can reach, and every call in each of them.

Breadth first over the canonical states of the real `PagedKVCacheManager` (search_tools.py says
what makes two states one). A world is a number of GPU and CPU blocks of two slots, at most so many
sequences alive at once, and perhaps a shared prefix; nothing else bounds the search: a sequence
grows until the pool is full. Time is relative to the clock and names do not count, so there are
finitely many states, and their number is exact: another number means that the manager behaves
differently, which may be meant.

What is to be refused is worked out from the block tables alone (search_paged.py). After each call
that is not refused, blocks taken and given back are as many as worked out; every sequence finds
through its table, after the copies and swaps that the call returned, block by block what it held
before; and no block that is written into is anybody else's. By induction over the calls that
holds for every history in the world. Slot identity, partition, reference counts and the rest are
checked once in every state.

    python -m pytest -m slow tests/core/test_exhaustive.py     # the large worlds
"""

import random

import pytest
from manager_tools import observable, random_manager
from search_paged import Moves, World
from search_tools import breadth_first, canonical_paged, copy_paged, frozen_paged, names, pairs

from allocators import BlockAllocator
from kv_cache_manager import OutOfBlocksError, PagedKVCacheManager


def search(world):
    return breadth_first(world.start(), copy_paged, canonical_paged, frozen_paged, Moves(world))


# What every search must have met: each call that succeeds, each that is refused, and why.
DONE = (
    "allocate, try_admit, admit, append 1, append 3, append_all 1, append_all 3, fork, "
    "truncate, reorder, swap_out, swap_in, recompute, free"
)
REFUSED = {
    "OutOfBlocksError": (
        "allocate, admit, append 1, append 3, append_all 1, append_all 3, swap_in"
    ),
    "DuplicateSequenceError": "allocate, admit, fork",
    "UnknownSequenceError": "append, fork, free, prefix, reorder, swap_in, swap_out, truncate",
    "ValueError": "append_all, truncate",
    "SharedBlockError": "swap_in, swap_out",
    "OutOfSwapSpaceError": "swap_out",
}
SEEN = (
    "copy on write, last holder writes in place, reorder of a parent that moves, swap_in of "
    "shared blocks, swap_out of shared blocks, truncate inside a shared block, try_admit declines"
)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "states", "transitions"),
    [
        (World(5, 2, 3), 1_331, 58_977),
        (World(5, 3, 3, prefix_len=3), 10_085, 449_252),
        pytest.param(World(5, 3, 4), 12_388, 634_327, marks=SLOW),
        pytest.param(World(6, 3, 3, prefix_len=3), 15_513, 722_772, marks=SLOW),
    ],
    ids=str,
)
def test_every_state_of_a_world(world, states, transitions, figure):
    found = search(world)
    behind = {"free prefix"} if world.prefix_len else set()
    assert found.done.keys() == names(DONE) | behind
    assert found.refused.keys() == pairs(REFUSED)
    assert {event for event, n in found.seen.items() if n} == names(SEEN)
    assert (found.states, found.transitions) == (states, transitions)
    figure(f"paged manager, {world}", **found.figures())


# ---- the tools, and that the search finds what is broken ---------------------------------------


def renamed(manager, rng):
    """The same state with other names of blocks and sequences, in other orders, at another time."""
    m, later = copy_paged(manager), rng.randrange(1, 9)
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
def test_the_tools_copy_everything_and_know_no_names(seed):
    manager, rng = random_manager(seed, steps=14, num_blocks=40), random.Random(seed)
    before, canonical = frozen_paged(manager), canonical_paged(manager)
    twin = copy_paged(manager)
    twin.check_invariants()
    assert observable(twin) == observable(manager)
    assert twin.__dict__.keys() == manager.__dict__.keys()
    assert canonical_paged(twin) == canonical
    for _ in range(5):
        assert canonical_paged(renamed(manager, rng)) == canonical
    # Whatever happens to the twin is seen in it, and not in the other.
    calls = [lambda: twin.allocate(500, 1), twin.append_all, lambda: twin.free(500)]
    for call in calls + [lambda i=i: twin.free(i) for i in manager.running_ids]:
        call()
        canonical, last = canonical_paged(twin), canonical
        assert canonical != last
    assert frozen_paged(manager) == before
    manager.check_invariants()


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


@pytest.mark.parametrize(
    "breaks",
    [
        lost_reference,
        no_copy_on_write,
        copy_of_the_wrong_block,
        swap_forgets_a_block,
        swap_leaks_a_block,
        step_half_taken,
        reorder_one_after_the_other,
        watermark_forgotten,
        sibling_frees_for_all,
    ],
)
def test_what_is_broken_is_found_in_a_tiny_world(breaks, monkeypatch):
    world = World(3, 2, 2)
    search(world)
    breaks(monkeypatch)
    with pytest.raises((AssertionError, OutOfBlocksError)):
        search(world)
