"""Regime item 4 for the baseline: every state of small pools of reservations and buddy chunks.

First the buddy allocator alone, over pools of every size up to 10 blocks; then the real
`BaselineCacheManager` under each policy, with everything that can be called in each state. Two
states are one if they differ only in the ids of sequences and in the time. Addresses do count, and
so does the order of the free lists: both decide what is found free later.

What is free is worked out here from a map of blocks, one by one; what a policy asks for is section
6.1 written once more.

    python -m pytest -m slow tests/core/test_exhaustive_baseline.py     # the large worlds
"""

from dataclasses import dataclass

import pytest
from search_tools import breadth_first, names, pairs

from allocators import BuddyAllocator
from kv_cache_manager import (
    BaselineCacheManager,
    DuplicateSequenceError,
    OutOfBlocksError,
    Reservation,
    ReservationError,
    UnknownSequenceError,
)
from sequence import Sequence, SequenceGroup

STRANGER = 10**6
SLOW = pytest.mark.slow


def free_runs(taken, num_blocks, length):
    """Aligned runs of `length` blocks, none of them taken."""
    starts = range(0, num_blocks - length + 1, length)
    return sum(taken.isdisjoint(range(start, start + length)) for start in starts)


def power_from(count):
    power = 1
    while power < count:
        power *= 2
    return power


# ---- the buddy allocator ----------------------------------------------------------------------


def copy_buddy(buddy):
    new = object.__new__(BuddyAllocator)
    new.num_blocks, new.num_free, new.max_order = buddy.num_blocks, buddy.num_free, buddy.max_order
    new.free_chunks = [starts.copy() for starts in buddy.free_chunks]
    new.chunk_order = buddy.chunk_order.copy()
    return new


def frozen_buddy(buddy):
    free = tuple(map(tuple, buddy.free_chunks))
    return free, tuple(sorted(buddy.chunk_order.items())), buddy.num_free


def taken_blocks(buddy):
    return {b for start, order in buddy.chunk_order.items() for b in range(start, start + 2**order)}


def buddy_moves(buddy, seen):
    taken = taken_blocks(buddy)
    free = {2**o: free_runs(taken, buddy.num_blocks, 2**o) for o in range(buddy.max_order + 1)}
    for count in range(1, 2**buddy.max_order + 1):
        size = power_from(count)
        runs = free[size]
        for chunks in range(runs + 2):
            assert buddy.fits(count, chunks) == (chunks <= runs)

        def check(trial, chunk, size=size):
            start, given = chunk
            assert given == size and start % size == 0
            mine = set(range(start, start + size))
            assert not taken & mine and taken_blocks(trial) == taken | mine

        if runs:
            yield f"take {size}", None, lambda b, n=count: b.take(n), check
        else:
            seen[f"no chunk of {size}"] += 1
            enough = buddy.num_free >= size
            seen["no chunk although as many blocks are free"] += enough
    for start, order in buddy.chunk_order.items():

        def check(trial, _, start=start, order=order):
            assert taken_blocks(trial) == taken.difference(range(start, start + 2**order))

        yield "give back", None, lambda b, s=start: b.give_back(s), check


def search_buddy(num_blocks, max_chunk):
    start = BuddyAllocator(num_blocks, max_chunk)
    return breadth_first(start, copy_buddy, frozen_buddy, frozen_buddy, buddy_moves)


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
    found = [search_buddy(num_blocks, max_chunk) for num_blocks in sizes]
    for one in found:
        assert one.done["give back"] and one.done["take 1"]
    assert found[-1].seen["no chunk although as many blocks are free"] or max_chunk == 1
    total = sum(one.states for one in found), sum(one.transitions for one in found)
    assert total == (states, transitions)
    name = f"buddy, {sizes[0]} to {sizes[-1]} blocks in chunks of up to {max_chunk}"
    seconds = round(sum(one.seconds for one in found), 1)
    figure(name, states=states, transitions=transitions, seconds=seconds)


# ---- the manager --------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    policy: str
    num_blocks: int
    block_size: int
    max_len: int
    num_seqs: int

    def __str__(self):
        return (
            f"{self.policy}, {self.num_blocks} blocks of {self.block_size}, {self.num_seqs} "
            f"sequences of up to {self.max_len}"
        )

    def start(self):
        return BaselineCacheManager(
            self.num_blocks, self.block_size, policy=self.policy, max_len=self.max_len
        )


def copy_baseline(m):
    new = object.__new__(BaselineCacheManager)
    new.__dict__ |= m.__dict__
    new._buddy = copy_buddy(m._buddy)
    new._held = {
        i: Reservation(r.start_block, r.num_blocks, r.asked, r.final_len, r.start_len)
        for i, r in m._held.items()
    }
    return new


def frozen_baseline(m):
    held = [
        (i, r.start_block, r.num_blocks, r.asked, r.final_len, r.start_len)
        for i, r in m._held.items()
    ]
    sums = m._now, m._tokens, m._final, m._asked
    return tuple(held), frozen_buddy(m._buddy), sums


def canonical_baseline(m):
    """Without ids, and with lengths in place of times of start."""
    held = [
        (r.start_block, r.num_blocks, r.asked, r.final_len, r.start_len + m._now)
        for r in m._held.values()
    ]
    sums = m._tokens, m._final, m._asked
    return tuple(sorted(held)), frozen_buddy(m._buddy), sums


def canonical_with_the_past(m):
    """The same, and whether the step at which the first is full has been looked up."""
    return *canonical_baseline(m), m._full_at is None


class Moves:
    """Everything that is called in a state, with what it must do."""

    def __init__(self, world):
        self.world = world
        self.runs = {}  # of a state: {size: aligned runs of free blocks}

    def asked(self, num_tokens, final_len, limit):
        """Section 6.1's three answers."""
        if self.world.policy == "max":
            return limit
        if self.world.policy == "oracle":
            return final_len
        return min(num_tokens + power_from(max(1, final_len - num_tokens)), limit)

    def chunks(self, m, num_slots):
        """How many chunks for so many slots are free, and how large they are."""
        size = power_from(-(-num_slots // self.world.block_size))
        if size not in self.runs:
            self.runs[size] = free_runs(taken_blocks(m._buddy), m.num_blocks, size)
        return self.runs[size], size

    def __call__(self, m, seen):
        world, held = self.world, m._held
        self.runs.clear()
        taken = [
            b for r in held.values() for b in range(r.start_block, r.start_block + r.num_blocks)
        ]
        assert len(taken) == len(set(taken)) == m.num_blocks - m.num_free_blocks
        assert set(taken) == taken_blocks(m._buddy)
        lengths = {i: (r.start_len + m._now, r.final_len) for i, r in held.items()}
        assert all(m.num_tokens(i) == length for i, (length, _) in lengths.items())
        usage, tokens = m.usage(), sum(length for length, _ in lengths.values())
        assert usage.tokens == usage.logical_tokens == tokens
        assert usage.reserved == sum(final for _, final in lengths.values()) - tokens
        unused = [i for i in range(world.num_seqs) if i not in held]
        if unused:
            yield from self.allocations(m, unused[0], lengths)
        if len(unused) > 1:
            yield from self.groups(m, unused, lengths)
        for i, (length, final) in lengths.items():
            assert m.can_append([i]) == (length < final)
            for count in (1, 2):
                error = ReservationError if length + count > final else None
                after = lengths | {i: (length + count, final)}
                call = lambda t, i=i, n=count: t.append(i, n)  # noqa: E731
                yield f"append {count}", error, call, self.same_places(m, after)
            for keep in range(1, length + 2):
                error = ValueError if keep > length else None
                after = lengths | {i: (keep, final)}
                call = lambda t, i=i, n=keep: t.truncate(i, n)  # noqa: E731
                yield "truncate", error, call, self.same_places(m, after)
            rest = {j: of for j, of in lengths.items() if j != i}
            yield "free", None, lambda t, i=i: t.free(i), self.given_back(m, i, rest)
        for count in (1, 2):
            short = any(length + count > final for length, final in lengths.values())
            error = ReservationError if short else None
            after = {i: (length + count, final) for i, (length, final) in lengths.items()}
            call = lambda t, n=count: t.append_all(n)  # noqa: E731
            yield f"append_all {count}", error, call, self.same_places(m, after)
        for child, (length, _) in lengths.items():
            for parent, (other, _) in lengths.items():
                error = None if length == other else ReservationError
                call = lambda t, c=child, p=parent: t.reorder({c: p})  # noqa: E731
                yield "reorder", error, call, self.copied(m, child, parent, lengths)
        yield from self.illegal(m, lengths)

    def allocations(self, m, new, lengths):
        for tokens in range(1, self.world.max_len + 1):
            for final in range(tokens, self.world.max_len + 1):
                yield from self.allocation(m, new, tokens, final, None, lengths)
        limit = self.world.max_len - 1
        if limit > 1:
            yield from self.allocation(m, new, 1, 2, limit, lengths)
            call = lambda t: t.allocate(new, 1, limit + 1, limit)  # noqa: E731
            yield "allocate", ReservationError, call, None

    def allocation(self, m, new, tokens, final, limit, lengths):
        asked = self.asked(tokens, final, limit or self.world.max_len)
        runs, size = self.chunks(m, asked)
        for number in (runs, runs + 1):
            assert m.can_allocate(tokens, final, limit, number) == (number <= runs)
        if limit is None:
            enough = asked <= m.num_free_blocks * self.world.block_size
            assert m.refused_by_fragmentation(tokens, final) == (enough and not runs)
        check = self.same_places(m, lengths | {new: (tokens, final)}, {new: (asked, size)})
        error = None if runs else OutOfBlocksError
        call = lambda t: t.allocate(new, tokens, final, limit)  # noqa: E731
        yield "allocate", error, call, check

    def groups(self, m, unused, lengths):
        for generated in ((0, 0), (0, 1)):
            seqs = [Sequence(i, 1, 2, 0, n) for i, n in zip(unused, generated)]
            group = SequenceGroup(0, seqs)
            asked = {
                s.seq_id: self.asked(s.num_tokens, s.final_len, self.world.max_len) for s in seqs
            }
            # Cautious where they differ: a chunk of the larger size is asked for each.
            fits = self.chunks(m, max(asked.values()))[0] >= len(seqs)
            assert m.can_admit(group) == fits
            new = {i: (slots, self.chunks(m, slots)[1]) for i, slots in asked.items()}
            after = lengths | {s.seq_id: (s.num_tokens, s.final_len) for s in seqs}
            check = self.same_places(m, after, new)
            if fits:
                yield "try_admit", None, lambda t, g=group: t.try_admit(g), check
            else:
                before = frozen_baseline(m)
                assert m.try_admit(group) is None and frozen_baseline(m) == before
                yield "admit", OutOfBlocksError, lambda t, g=group: t.admit(g), None

    def same_places(self, m, lengths, new=None):
        """Nobody is moved, the new ones have chunks of their own, lengths are these."""
        places = m._held

        def check(trial, result):
            assert trial._held.keys() == lengths.keys()
            now = trial._now
            for i, r in trial._held.items():
                assert (r.start_len + now, r.final_len) == lengths[i]
                if (old := places.get(i)) is not None:
                    at = old.start_block, old.num_blocks, old.asked
                    assert (r.start_block, r.num_blocks, r.asked) == at
                else:
                    assert (r.asked, r.num_blocks) == new[i]
                    assert r.start_block % r.num_blocks == 0

        return check

    def given_back(self, m, i, rest):
        same, r = self.same_places(m, rest), m._held[i]

        def check(trial, blocks):
            same(trial, None)
            assert blocks == list(range(r.start_block, r.start_block + r.num_blocks))

        return check

    def copied(self, m, child, parent, lengths):
        same, size = self.same_places(m, lengths), self.world.block_size

        def check(trial, copies):
            same(trial, None)
            first, second = (m._held[i].start_block * size for i in (parent, child))
            assert copies == ([] if child == parent else [(first, second, lengths[parent][0])])

        return check

    def illegal(self, m, lengths):
        for name in ("append", "free", "num_tokens"):
            call = lambda t, name=name: getattr(t, name)(STRANGER)  # noqa: E731
            yield name, UnknownSequenceError, call, None
        yield "truncate", UnknownSequenceError, lambda t: t.truncate(STRANGER, 1), None
        yield "append_all", ValueError, lambda t: t.append_all(0), None
        for i in list(lengths)[:1]:
            yield "allocate", DuplicateSequenceError, lambda t, i=i: t.allocate(i, 1, 1), None
            yield "append", ValueError, lambda t, i=i: t.append(i, 0), None
            both = {i: STRANGER}
            yield "reorder", UnknownSequenceError, lambda t, p=both: t.reorder(p), None
            group = SequenceGroup(0, [Sequence(j, 1, 1) for j in (STRANGER, i)])
            if self.chunks(m, self.asked(1, 2, self.world.max_len))[0] >= 2:
                yield "admit", DuplicateSequenceError, lambda t, g=group: t.admit(g), None


DONE = (
    "allocate, try_admit, append 1, append 2, append_all 1, append_all 2, truncate, reorder, free"
)
REFUSED = {
    "OutOfBlocksError": "allocate, admit",
    "ReservationError": "allocate, append 1, append 2, append_all 1, append_all 2, reorder",
    "DuplicateSequenceError": "allocate, admit",
    "UnknownSequenceError": "append, free, num_tokens, reorder, truncate",
    "ValueError": "append, append_all, truncate",
}


def search_world(world, canonical=canonical_baseline):
    return breadth_first(world.start(), copy_baseline, canonical, frozen_baseline, Moves(world))


@pytest.mark.parametrize(
    ("world", "states", "transitions"),
    [
        (World("max", 13, 1, 4, 4), 2_238, 103_872),
        (World("pow2", 6, 2, 6, 3), 7_833, 306_265),
        (World("oracle", 13, 1, 4, 4), 27_230, 1_310_324),
        pytest.param(World("max", 17, 1, 4, 4), 29_688, 1_447_104, marks=SLOW),
        pytest.param(World("pow2", 17, 1, 4, 4), 193_020, 9_538_020, marks=SLOW),
        pytest.param(World("oracle", 15, 1, 4, 4), 51_737, 2_513_892, marks=SLOW),
    ],
    ids=str,
)
def test_every_state_of_a_world(world, states, transitions, figure):
    found = search_world(world)
    # A pool with room for the longest reservation of every sequence never runs dry.
    dry = world.num_blocks < world.num_seqs * world.max_len
    refused = {call for call in pairs(REFUSED) if dry or call[1] != "OutOfBlocksError"}
    assert found.done.keys() == names(DONE) and found.refused.keys() == refused
    assert (found.states, found.transitions) == (states, transitions)
    figure(f"contiguous manager, {world}", **found.figures())


@pytest.mark.parametrize("policy", ["max", "pow2", "oracle"])
def test_every_state_and_every_past_of_a_tiny_world(policy):
    world = World(policy, 5, 1, 3, 2)
    with_the_past = search_world(world, canonical_with_the_past)
    assert with_the_past.states > search_world(world).states


# ---- what is broken is found --------------------------------------------------------------------


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


@pytest.mark.parametrize("breaks", [*IN_THE_BUDDY, *IN_THE_MANAGER])
def test_what_is_broken_is_found_in_a_tiny_world(breaks, monkeypatch):
    world = World("oracle", 7, 1, 4, 2)
    search_world(world, canonical_with_the_past)
    breaks(monkeypatch)
    with pytest.raises(AssertionError):
        search_world(world, canonical_with_the_past)
    if breaks in IN_THE_BUDDY:
        with pytest.raises(AssertionError):
            search_buddy(7, 4)
