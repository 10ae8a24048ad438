"""Regime item 1: the free list with reference counts and the buddy, against plain counters."""

import copy
import random
from collections import Counter

import pytest
from manager_tools import add_to, assert_messages, pattern

from allocators import BlockAllocator, BuddyAllocator

# ---- BlockAllocator ---------------------------------------------------------------------------


def test_blocks_come_in_the_free_order_and_the_last_freed_is_the_first_reused():
    pool = BlockAllocator(5, order=[3, 1, 4, 0, 2])
    assert (pool.num_blocks, len(pool.free_blocks)) == (5, 5)
    first = pool.take(2)
    assert first == [3, 1]
    assert pool.take(0) == []
    assert pool.take(1) == [4]
    assert pool.drop(first) == [3, 1]
    # A dropped table comes back in its own order: the same request finds the same blocks.
    assert pool.take(3) == [3, 1, 0]
    assert BlockAllocator(3).take(3) == [0, 1, 2]


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 3], [1, 2, 3]])
def test_a_free_order_names_each_block_once(order):
    with pytest.raises(ValueError, match="each of the 3 blocks once"):
        BlockAllocator(3, order)


def test_take_refuses_what_is_not_there():
    pool = BlockAllocator(2)
    for count in (3, -1):
        with pytest.raises(AssertionError, match="only after the need was compared"):
            pool.take(count)
    assert len(pool.free_blocks) == 2


def test_replace_gives_up_one_reference_and_takes_one_block():
    pool = BlockAllocator(4)
    (block,) = pool.take(1)
    pool.share([block, block])
    assert pool.ref_count(block) == 3
    assert pool.replace(block) == 1
    assert pool.ref_count(block) == 2
    assert pool.replace(block) == 2
    assert pool.ref_count(block) == 1
    assert pool.extra_refs == {}  # a single holder must cost nothing
    with pytest.raises(KeyError):
        pool.replace(block)  # its only holder writes in place
    assert len(pool.free_blocks) == 1


@pytest.mark.parametrize("seed", range(20))
def test_block_allocator_against_a_counter(seed):
    rng = random.Random(seed)
    size = rng.randint(1, 12)
    pool = BlockAllocator(size, rng.sample(range(size), size))
    held = Counter()
    for _ in range(200):
        action = rng.choice(["take", "share", "drop", "drop", "replace"])
        live = sorted(held)
        if action == "take":
            taken = pool.take(rng.randint(0, len(pool.free_blocks)))
            assert held.keys().isdisjoint(taken) and len(set(taken)) == len(taken)
            held.update(taken)
        elif action == "share" and live:
            blocks = rng.sample(live, rng.randint(1, len(live)))
            pool.share(blocks)
            held.update(blocks)
        elif action == "drop" and live:
            blocks = rng.sample(live, rng.randint(1, len(live)))
            gone = [block for block in blocks if held[block] == 1]
            assert pool.drop(blocks) == gone
            held -= Counter(blocks)
        elif action == "replace" and pool.free_blocks:
            shared = [block for block in live if held[block] > 1]
            if shared:
                block = rng.choice(shared)
                held[block] -= 1
                taken = pool.replace(block)
                assert taken not in held
                held[taken] = 1
        assert sorted(pool.free_blocks) == [b for b in range(size) if b not in held]
        assert {b: pool.ref_count(b) for b in held} == dict(held)


@pytest.mark.parametrize("seed", range(10))
def test_move_takes_all_references_along(seed):
    rng = random.Random(seed)
    source, target = BlockAllocator(8), BlockAllocator(8, rng.sample(range(8), 8))
    blocks = source.take(6)
    target.take(2)
    counts = {block: rng.randint(1, 4) for block in blocks}
    for block, count in counts.items():
        source.share([block] * (count - 1))
    moving = {block: counts[block] for block in rng.sample(blocks, 4)}
    staying = {block: count for block, count in counts.items() if block not in moving}
    mapping = source.move(moving, target)
    assert list(mapping) == list(moving)
    assert {mapping[b]: c for b, c in moving.items()} == {
        b: target.ref_count(b) for b in mapping.values()
    }
    assert (len(source.free_blocks), len(target.free_blocks)) == (6, 2)
    assert set(source.free_blocks).isdisjoint(staying)
    assert {b: source.ref_count(b) for b in staying} == staying
    assert source.extra_refs.keys() <= staying.keys()
    assert source.move({}, target) == {}


# ---- BuddyAllocator ---------------------------------------------------------------------------


def chunks(buddy):
    """{size: starts} of the free chunks."""
    return {1 << o: sorted(starts) for o, starts in enumerate(buddy.free_chunks) if starts}


def free_runs(buddy, order):
    """How many aligned runs of 2**order blocks are free, from a bitmap of the taken chunks."""
    taken = [False] * buddy.num_blocks
    for start, chunk_order in buddy.chunk_order.items():
        for block in range(start, start + (1 << chunk_order)):
            assert not taken[block]
            taken[block] = True
    size = 1 << order
    if size > 1 << buddy.max_order:
        return 0
    starts = range(0, buddy.num_blocks - size + 1, size)
    return sum(not any(taken[start : start + size]) for start in starts)


def test_the_papers_pool_is_cut_into_powers_of_two():
    buddy = BuddyAllocator(983, 128)
    largest = [0, 128, 256, 384, 512, 640, 768]
    assert chunks(buddy) == {128: largest, 64: [896], 16: [960], 4: [976], 2: [980], 1: [982]}
    assert buddy.num_free == 983
    buddy.check_invariants()


@pytest.mark.parametrize("max_chunk", [1, 4, 16])
def test_any_pool_is_cut_without_a_gap(max_chunk):
    for blocks in range(1, 70):
        buddy = BuddyAllocator(blocks, max_chunk)
        buddy.check_invariants()
        assert len(chunks(buddy).get(max_chunk, ())) == blocks // max_chunk


@pytest.mark.parametrize("max_chunk", [0, -2, 3, 6, 100])
def test_the_largest_chunk_is_a_power_of_two(max_chunk):
    with pytest.raises(ValueError, match="power of two"):
        BuddyAllocator(16, max_chunk)


def test_a_split_keeps_the_lower_half_and_a_free_merges_again():
    buddy = BuddyAllocator(16, 16)
    assert buddy.take(3) == (0, 4)
    assert chunks(buddy) == {4: [4], 8: [8]}
    assert buddy.take(1) == (4, 1)  # the smallest chunk that is large enough is split
    assert chunks(buddy) == {1: [5], 2: [6], 8: [8]}
    assert buddy.num_free == 11
    buddy.give_back(4)
    assert chunks(buddy) == {4: [4], 8: [8]}
    buddy.give_back(0)
    assert chunks(buddy) == {16: [0]}
    assert buddy.num_free == 16


def test_the_last_chunk_freed_is_the_first_reused():
    buddy = BuddyAllocator(8, 2)
    assert buddy.take(2) == (6, 2)  # of the initial cut, the last one laid down
    assert [buddy.take(2)[0] for _ in range(3)] == [4, 2, 0]
    for start in (2, 6, 4):
        buddy.give_back(start)
    assert [buddy.take(2)[0] for _ in range(3)] == [4, 6, 2]


@pytest.mark.parametrize("seed", range(30))
def test_fits_predicts_take_exactly(seed):
    rng = random.Random(seed)
    buddy = BuddyAllocator(rng.randint(1, 60), 1 << rng.randint(0, 5))
    for _ in range(60):
        if buddy.chunk_order and rng.random() < 0.45:
            buddy.give_back(rng.choice(list(buddy.chunk_order)))
        else:
            want = rng.randint(1, 1 << buddy.max_order)
            if buddy.fits(want):
                start, size = buddy.take(want)
                assert want <= size < 2 * want and start % size == 0
        buddy.check_invariants()
        want = rng.randint(1, 2 << buddy.max_order)
        runs = free_runs(buddy, buddy.order_for(want))
        count = rng.randint(0, runs + 2)
        assert buddy.fits(want, count) == (count <= runs)
        assert buddy.fits(want) == (runs > 0)
        trial = copy.deepcopy(buddy)
        for _ in range(runs):
            trial.take(want)
        trial.check_invariants()
        with pytest.raises(AssertionError, match="only after fits"):
            trial.take(want)
        for start in list(trial.chunk_order):
            trial.give_back(start)
        # Whatever the history, all freed is the initial cut again.
        assert chunks(trial) == chunks(BuddyAllocator(buddy.num_blocks, 1 << buddy.max_order))


def test_nothing_always_fits():
    buddy = BuddyAllocator(8, 4)
    buddy.take(4)
    buddy.take(4)
    assert all(buddy.fits(want, count) for want in (1, 4, 100) for count in (0, -1))
    assert not any(buddy.fits(want, 1) for want in (1, 4, 100))


def shift_a_chunk(buddy):
    # Blocks 4 and 5 free, 6 and 7 free: now 4 free, 5 and 6 free, 7 free.
    buddy.free_chunks[1].clear()
    buddy.chunk_order.clear()
    for order, start in ((0, 4), (1, 5), (0, 7), (2, 0)):
        buddy.free_chunks[order][start] = None


def leave_buddies_apart(buddy):
    del buddy.chunk_order[4]
    buddy.free_chunks[1][4] = None
    buddy.num_free += 2


BUDDY_CORRUPTIONS = {
    "chunks overlap or leave a gap at block {}": (
        lambda buddy: buddy.chunk_order.pop(4),
        lambda buddy: buddy.chunk_order.update({6: 1}),  # free as well
    ),
    "chunk at {} is not aligned to its size": (shift_a_chunk,),
    "chunks cover {} of {} blocks": (add_to("num_blocks"), add_to("num_blocks", -1)),
    "num_free is wrong": (add_to("num_free"),),
    "free buddies at {} not merged": (leave_buddies_apart,),
}


@pytest.mark.parametrize(
    ("message", "corrupt"),
    [(message, corrupt) for message, several in BUDDY_CORRUPTIONS.items() for corrupt in several],
)
def test_the_buddys_invariants_catch(message, corrupt):
    buddy = BuddyAllocator(8, 4)
    for start in (4, 0):
        assert buddy.take(4) == (start, 4)
    buddy.give_back(4)
    assert buddy.take(2) == (4, 2)  # 0-3 taken, 4-5 taken, 6-7 free
    buddy.check_invariants()
    corrupt(buddy)
    with pytest.raises(AssertionError, match=pattern(message)):
        buddy.check_invariants()


@pytest.mark.parametrize("order", range(5))
def test_the_buddys_invariants_catch_unmerged_buddies_of_every_size(order):
    buddy = BuddyAllocator(64, 32)
    size = 1 << order
    buddy.free_chunks[5] = {32: None}
    rest = [(above, 1 << above) for above in range(order + 1, 5)]  # [order of chunk, start]
    for above, start in [(order, 0), (order, size), *rest]:
        buddy.free_chunks[above][start] = None
    with pytest.raises(AssertionError, match="free buddies at 0 not merged"):
        buddy.check_invariants()


def test_every_assert_of_the_buddys_invariants_is_seen_to_fail():
    assert sorted(assert_messages(BuddyAllocator.check_invariants)) == sorted(BUDDY_CORRUPTIONS)
