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
checked once in every state (invariants.py).

    python -m pytest -m slow -rP tests/test_exhaustive.py     # the large worlds; prints figures
"""

import random
import time

import pytest
from manager_tools import observable, random_manager
from search_paged import SIZE, Moves, World
from search_tools import breadth_first, canonical_paged, copy_paged, frozen_paged

import kv_cache_manager
from allocators import BlockAllocator
from kv_cache_manager import OutOfBlocksError, PagedKVCacheManager
from sequence import BlockTable


def search(world, record=lambda *_: None):
    """Searches a world, prints what it went through and hands it to `record`."""
    begin = time.process_time()
    found = breadth_first(world.start(), copy_paged, canonical_paged, frozen_paged, Moves(world))
    seconds = time.process_time() - begin
    print(f"{world}: {found.states:,} states, {found.transitions:,} transitions, ", end="")
    print(f"{found.depth} calls deep, {seconds:.0f} s of CPU")
    record("states", found.states)
    record("transitions", found.transitions)
    record("cpu_s", round(seconds, 1))
    return found


# What every search must have met: each call that succeeds, each that is refused, and why.
DONE = {
    "allocate",
    "try_admit",
    "admit",
    "append 1",
    "append 3",
    "append_all 1",
    "append_all 3",
    "fork",
    "reorder",
    "swap_out",
    "swap_in",
    "recompute",
    "free",
}
REFUSED = {
    ("allocate", "OutOfBlocksError"),
    ("allocate", "DuplicateSequenceError"),
    ("admit", "OutOfBlocksError"),
    ("admit", "DuplicateSequenceError"),
    ("append", "UnknownSequenceError"),
    ("append_all", "ValueError"),
    ("append 1", "OutOfBlocksError"),
    ("append 3", "OutOfBlocksError"),
    ("append_all 1", "OutOfBlocksError"),
    ("append_all 3", "OutOfBlocksError"),
    ("fork", "DuplicateSequenceError"),
    ("fork", "UnknownSequenceError"),
    ("free", "UnknownSequenceError"),
    ("prefix", "UnknownSequenceError"),
    ("reorder", "UnknownSequenceError"),
    ("swap_in", "OutOfBlocksError"),
    ("swap_in", "SharedBlockError"),
    ("swap_in", "UnknownSequenceError"),
    ("swap_out", "OutOfSwapSpaceError"),
    ("swap_out", "SharedBlockError"),
    ("swap_out", "UnknownSequenceError"),
}
SEEN = {
    "copy on write",
    "last holder writes in place",
    "reorder of a parent that moves",
    "swap_in of shared blocks",
    "swap_out of shared blocks",
    "try_admit declines",
}


def search_all(world, states, transitions, record):
    found = search(world, record)
    behind = {"free prefix"} if world.prefix_len else set()
    assert found.done.keys() == DONE | behind
    assert found.refused.keys() == REFUSED
    assert {event for event, n in found.seen.items() if n} == SEEN
    assert (found.states, found.transitions) == (states, transitions)


@pytest.mark.parametrize(
    ("world", "states", "transitions"),
    [(World(5, 2, 3), 8_323, 303_390), (World(5, 3, 3, prefix_len=3), 26_786, 982_061)],
    ids=str,
)
def test_every_state_of_a_small_world(world, states, transitions, record_property):
    search_all(world, states, transitions, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "states", "transitions"),
    [(World(5, 3, 4), 113_871, 4_851_469), (World(6, 3, 3, prefix_len=3), 53_966, 2_046_694)],
    ids=str,
)
def test_every_state_of_a_large_world(world, states, transitions, record_property):
    search_all(world, states, transitions, record_property)


# ---- the tools, and that the search finds what is broken ---------------------------------------


def renamed(manager, rng):
    """The same state with other names of blocks and sequences, in other orders, at another time."""
    m, later = copy_paged(manager), rng.randrange(1, 9)
    m._clock.now += later
    names = {}
    for pool, ledger in ((m._gpu, m._gpu_copies), (m._cpu, m._cpu_copies)):
        count = pool.num_blocks
        names[pool] = new = dict(zip(range(count), rng.sample(range(count), count)))
        pool.free_blocks = rng.sample([new[b] for b in pool.free_blocks], pool.num_free)
        pool.extra_refs = {new[b]: n for b, n in pool.extra_refs.items()}
        ledger.nodes = {new[b]: node for b, node in ledger.nodes.items()}
    ids = [*m._tables, *m._swapped, *m._prefixes]
    other = dict(zip(ids, rng.sample(range(100), len(ids))))
    for field in ("_tables", "_swapped", "_prefixes", "_loose"):
        held = getattr(m, field)
        setattr(m, field, {other[i]: held[i] for i in rng.sample(list(held), len(held))})
    for tables in (m._tables, m._swapped, m._prefixes):
        for t in tables.values():
            keep = t.num_prefix_blocks if tables is m._swapped else len(t.blocks)
            behind = [names[m._cpu][b] for b in t.blocks[keep:]]
            t.blocks[:] = [names[m._gpu][b] for b in t.blocks[:keep]] + behind
            if t.phase is not None:
                t.phase = (t.phase + later) % m.block_size
    m._due = [{} for _ in m._due]
    for i, t in m._tables.items():
        if t.phase is not None:
            m._due[t.phase][i] = t.blocks
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


def test_the_canonical_form_tells_who_holds_a_token_twice():
    """Tables alike in all but their history: a copy, and a block written anew."""
    copied, anew = (PagedKVCacheManager(4, SIZE) for _ in range(2))
    copied.allocate(0, 1)
    copied.fork(0, 1)
    copied.append(0)
    copied.append(1)
    for i in (0, 1):
        anew.allocate(i, 1)
        anew.append(i)
    assert [m.duplicates() for m in (copied, anew)] == [1, 0]
    assert canonical_paged(copied) != canonical_paged(anew)
    copied.free(0)
    anew.free(0)
    assert canonical_paged(copied) == canonical_paged(anew)


def lost_reference(monkeypatch):
    share = BlockAllocator.share
    monkeypatch.setattr(BlockAllocator, "share", lambda a, b, times=1: share(a, b[:-1], times))


def no_copy_on_write(monkeypatch):
    monkeypatch.setattr(BlockTable, "hold", lambda table: None)


def copy_of_the_wrong_block(monkeypatch):
    copy = PagedKVCacheManager._copy_last_block
    turned = lambda m, table: copy(m, table)[::-1]  # noqa: E731
    monkeypatch.setattr(PagedKVCacheManager, "_copy_last_block", turned)


def swap_forgets_a_block(monkeypatch):
    move = PagedKVCacheManager._move
    monkeypatch.setattr(PagedKVCacheManager, "_move", lambda m, *rest: move(m, *rest)[1:])


def swap_leaks_a_block(monkeypatch):
    move = kv_cache_manager.move_blocks

    def leaks(held, source, target):
        mapping = move(held, source, target)
        source.free_blocks.pop()
        return mapping

    monkeypatch.setattr(kv_cache_manager, "move_blocks", leaks)


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
