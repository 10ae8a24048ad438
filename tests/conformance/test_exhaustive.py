"""Regime item 4: every state that small worlds can reach, and every call in each of them.

The search of `vllm_sim/conformance` over our own managers. A world bounds blocks and sequences
alive at once, nothing else: a sequence grows until the pool is full. Time is relative to the clock
and names do not count, so there are finitely many states, and their number is exact: another number
means that the manager behaves differently, which may be meant.

    python -m pytest -m slow tests/conformance/test_exhaustive.py     # the large worlds
"""

import copy
import random

import pytest
from manager_tools import observable, random_manager

from allocators import BlockAllocator, BuddyAllocator
from kv_cache_manager import BaselineCacheManager, OutOfBlocksError, PagedKVCacheManager
from vllm_sim.conformance.adapters.contiguous import Buddy, Chunks, ContiguousManager
from vllm_sim.conformance.adapters.contiguous import World as Reserved
from vllm_sim.conformance.adapters.paged_manager import PagedManager, World, copied
from vllm_sim.conformance.search import Search

SLOW = pytest.mark.slow


def search(adapter, world):
    return Search(adapter, world, seconds=10**6).run()


def figures(*found):
    """What several searches went through together, each to its end."""
    assert all(one.closed and one.fault is None for one in found)
    sums = {
        "states": sum(f.states for f in found),
        "transitions": sum(f.transitions for f in found),
    }
    return sums | {"seconds": round(sum(f.seconds for f in found), 1)}


@pytest.mark.parametrize(
    ("world", "states", "transitions"),
    [
        ("small", 1_331, 58_977),
        ("prefix", 10_085, 449_312),
        pytest.param("large", 12_388, 634_327, marks=SLOW),
        pytest.param("large-prefix", 15_513, 722_772, marks=SLOW),
    ],
)
def test_every_state_of_the_paged_manager(world, states, transitions, figure):
    found = search(PagedManager, PagedManager.worlds[world])
    went = figures(found)
    assert found.missing == () and (found.states, found.transitions) == (states, transitions)
    figure(f"paged manager, {PagedManager.worlds[world]}", **went)


@pytest.mark.parametrize(
    ("world", "states", "transitions"),
    [
        ("max", 2_238, 103_872),
        ("pow2", 7_833, 306_265),
        ("oracle", 27_230, 1_310_324),
        pytest.param("large-max", 29_688, 1_447_104, marks=SLOW),
        pytest.param("large-pow2", 193_020, 9_538_020, marks=SLOW),
        pytest.param("large-oracle", 51_737, 2_513_892, marks=SLOW),
    ],
)
def test_every_state_of_the_contiguous_manager(world, states, transitions, figure):
    world = ContiguousManager.worlds[world]
    found = search(ContiguousManager, world)
    went = figures(found)
    assert found.missing == () and (found.states, found.transitions) == (states, transitions)
    # A pool with room for the longest reservation of every sequence never runs dry.
    dry = world.num_blocks < world.num_seqs * world.max_len
    assert dry == ("allocate: OutOfBlocksError" in found.happened)
    figure(f"contiguous manager, {world}", **went)


class WithThePast(ContiguousManager):
    """Tells apart whether the step at which the first is full was looked up: refusals may do so."""

    frozen = ContiguousManager.key

    def key(self):
        return super().key(), self.manager._full_at is None


@pytest.mark.parametrize("policy", ["max", "pow2", "oracle"])
def test_every_state_and_every_past_of_a_tiny_world(policy):
    world = Reserved(policy, 5, 1, 3, 2)
    past, state = search(WithThePast, world), search(ContiguousManager, world)
    assert past.fault is state.fault is None and past.states > state.states


@pytest.mark.parametrize(
    ("max_chunk", "sizes", "states", "transitions"),
    [
        (1, range(1, 7), 2_371, 4_730),
        (2, range(1, 8), 1_139, 4_888),
        (4, range(1, 11), 30_111, 179_788),
        (8, range(1, 9), 2_956, 14_694),
        pytest.param(4, [12], 229_652, 1_680_753, marks=SLOW),
        pytest.param(8, [10], 19_001, 119_986, marks=SLOW),
    ],
)
def test_every_state_of_a_buddy_allocator(max_chunk, sizes, states, transitions, figure):
    went = figures(*(search(Buddy, Chunks(blocks, max_chunk)) for blocks in sizes))
    assert (went["states"], went["transitions"]) == (states, transitions)
    figure(f"buddy, {sizes[0]} to {sizes[-1]} blocks in chunks of up to {max_chunk}", **went)


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


def never_merged(monkeypatch):
    merged_with_a_neighbour(monkeypatch, at=0)


def merged_with_a_neighbour(monkeypatch, at=1):
    """Any two chunks of a size side by side, halves of one or not; with at=0 there are none."""

    def give_back(buddy, start):
        order = buddy.chunk_order.pop(start)
        buddy.num_free += 1 << order
        while order < buddy.max_order:
            others = [s for s in buddy.free_chunks[order] if abs(s - start) == at << order]
            if not others:
                break
            del buddy.free_chunks[order][others[0]]
            start, order = min(start, others[0]), order + 1
        buddy.free_chunks[order][start] = None

    monkeypatch.setattr(BuddyAllocator, "give_back", give_back)


def a_half_is_lost(monkeypatch):
    take = BuddyAllocator.take

    def loses(buddy, num_blocks):
        start, size = take(buddy, num_blocks)
        if start + size in buddy.free_chunks[size.bit_length() - 1] and size > 1:
            del buddy.free_chunks[size.bit_length() - 1][start + size]
        return start, size

    monkeypatch.setattr(BuddyAllocator, "take", loses)


def fits_by_sum(monkeypatch):
    """Free blocks are counted wherever they lie."""
    monkeypatch.setattr(
        BuddyAllocator,
        "fits",
        lambda buddy, n, count=1: buddy.num_free >= count << buddy.order_for(n),
    )


def first_full_is_remembered(monkeypatch):
    """The step at which the first is full, not looked up anew: one long gone still ends others."""
    free = BaselineCacheManager.free

    def remembers(m, seq_id):
        step, blocks = m._full_at, free(m, seq_id)
        m._full_at = step
        return blocks

    monkeypatch.setattr(BaselineCacheManager, "free", remembers)


def group_counted_as_one(monkeypatch):
    monkeypatch.setattr(
        BaselineCacheManager,
        "can_admit",
        lambda m, group: m.can_allocate(group.seqs[0].num_tokens, group.seqs[0].final_len),
    )


def chunk_not_given_back(monkeypatch):
    def free(m, seq_id):
        held = m.reservation(seq_id)
        m._tokens -= m.num_tokens(seq_id)
        m._final, m._asked = m._final - held.final_len, m._asked - held.asked
        del m._held[seq_id]
        return list(range(held.start_block, held.start_block + held.num_blocks))

    monkeypatch.setattr(BaselineCacheManager, "free", free)


IN_THE_BUDDY = (never_merged, merged_with_a_neighbour, a_half_is_lost, fits_by_sum)
IN_THE_MANAGER = (first_full_is_remembered, group_counted_as_one, chunk_not_given_back)


PAGED = (lost_reference, no_copy_on_write, copy_of_the_wrong_block, swap_forgets_a_block)
PAGED += (swap_leaks_a_block, step_half_taken, reorder_one_after_the_other, watermark_forgotten)
PAGED += (sibling_frees_for_all,)


@pytest.mark.parametrize("breaks", PAGED)
def test_what_is_broken_is_found_in_a_tiny_world(breaks, monkeypatch):
    assert search(PagedManager, PagedManager.worlds["tiny"]).fault is None
    breaks(monkeypatch)
    assert search(PagedManager, PagedManager.worlds["tiny"]).fault is not None


@pytest.mark.parametrize("breaks", [*IN_THE_BUDDY, *IN_THE_MANAGER])
def test_what_is_broken_of_reservations_is_found_in_a_tiny_world(breaks, monkeypatch):
    world = Reserved("oracle", 7, 1, 4, 2)
    assert search(WithThePast, world).fault is None
    breaks(monkeypatch)
    assert search(WithThePast, world).fault is not None
    if breaks in IN_THE_BUDDY:
        assert search(Buddy, Chunks(7, 4)).fault is not None
