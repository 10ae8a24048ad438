"""Regime item 4 for the baseline: every state of small pools of reservations and buddy chunks.

First the real `BaselineCacheManager` under each policy, with everything that can be called in each
state, then the buddy allocator alone, over pools of every size up to 10 blocks.

    python -m pytest -m slow tests/conformance/test_exhaustive_contiguous.py     # the large worlds
"""

import pytest
from searches import figures, search

from allocators import BuddyAllocator
from kv_cache_manager import BaselineCacheManager
from vllm_sim.conformance.adapters.buddy import Buddy, Chunks
from vllm_sim.conformance.adapters.contiguous import ContiguousManager, World

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "states", "transitions"),
    [
        ("max", 2_238, 103_872),
        ("pow2", 7_833, 306_265),
        pytest.param("oracle", 27_230, 1_310_324, marks=SLOW),
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
    world = World(policy, 5, 1, 3, 2)
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
def test_what_is_broken_of_reservations_is_found_in_a_tiny_world(breaks, monkeypatch):
    world = World("oracle", 7, 1, 4, 2)
    assert search(WithThePast, world).fault is None
    breaks(monkeypatch)
    assert search(WithThePast, world).fault is not None
    if breaks in IN_THE_BUDDY:
        assert search(Buddy, Chunks(7, 4)).fault is not None
