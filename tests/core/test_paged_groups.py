"""The paged manager's groups: beams that move, and sequences that are swapped together."""

import itertools

import pytest
from manager_tools import (
    blocks_of,
    clone,
    fill,
    group_of,
    manager_of,
    random_manager,
    refused,
    shape,
)

from allocators import BlockAllocator
from kv_cache_manager import (
    OutOfBlocksError,
    OutOfSwapSpaceError,
    SharedBlockError,
    UnknownSequenceError,
)

# ---- beam search ------------------------------------------------------------------------------


def beams(stepped=True):
    """Four beams of different contents, in the middle of a block."""
    manager = manager_of(40, 4)
    for seq_id in range(4):
        manager.allocate(seq_id, 5)
    if stepped:
        manager.append_all()
    return manager


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("first", range(4))
def test_reorder_is_simultaneous(first, stepped):
    """Permutations, cycles, chains: every child gets what its parent held before the step."""
    for rest in itertools.product(range(4), repeat=3):
        check_reorder((first, *rest), stepped)


def check_reorder(parents, stepped):
    manager = beams(stepped)
    old = blocks_of(manager, *range(4))
    copied = [list(blocks) for blocks in old]
    freed = manager.reorder(dict(enumerate(parents)))
    assert blocks_of(manager, *range(4)) == [copied[parent] for parent in parents]
    kept = set(parents)
    gone = {block for i, blocks in enumerate(copied) if i not in kept for block in blocks}
    assert len(freed) == len(gone) and set(freed) == gone
    assert manager.num_free_blocks == 40 - 2 * len(kept)
    for parent in kept:
        assert [manager.ref_count(b) for b in copied[parent]] == [parents.count(parent)] * 2
    assert manager.running_ids == [0, 1, 2, 3]
    manager.check_invariants()
    assert len(manager.append_all()) == 4 - len(kept)
    manager.check_invariants()


def test_reorder_may_name_some_sequences_only():
    manager = beams()
    before = blocks_of(manager, 0, 1, 2, 3)
    before = [list(blocks) for blocks in before]
    assert manager.reorder({0: 1, 1: 0}) == []
    assert blocks_of(manager, 0, 1, 2, 3) == [before[1], before[0], before[2], before[3]]
    assert manager.reorder({}) == manager.reorder({2: 2}) == []
    assert manager.append_all() == ()  # nothing is shared
    for wrong in ({0: 9}, {9: 0}, {0: 1, 9: 9}):
        refused(manager, UnknownSequenceError, lambda wrong=wrong: manager.reorder(wrong))


@pytest.mark.parametrize("longer", [None, 0, 1])
def test_reorder_touches_only_the_blocks_in_which_two_beams_differ(longer):
    """A beam that moves costs what it has apart from its parent, however long their context is."""
    manager = manager_of(64, 4)
    manager.allocate(0, 40)  # 10 blocks that both keep
    manager.fork(0, 1)
    manager.append_all(4)  # and one of its own each
    if longer is not None:  # two more for the child or the parent
        manager.append(longer, 8)
    child, parent = ([*blocks] for blocks in blocks_of(manager, 0, 1))
    assert child[:10] == parent[:10] and child[10] != parent[10]
    touched = []

    class Pool(BlockAllocator):
        def share(self, blocks, times=1):
            blocks = list(blocks)
            touched.extend(blocks)
            super().share(blocks, times)

    pool = Pool(64)
    pool.free_blocks, pool.extra_refs = manager._gpu.free_blocks, manager._gpu.extra_refs
    manager._gpu = pool
    assert manager.reorder({0: 1}) == child[10:]
    assert touched == parent[10:], "shared: what the child did not hold before"
    assert blocks_of(manager, 0, 1) == [parent, parent]
    manager.check_invariants()


def test_reorder_takes_the_prefix_along():
    manager = manager_of(40, 4, cpu=8)
    manager.allocate_prefix(100, 8)
    manager.allocate(0, 3, prefix_id=100)
    manager.allocate(1, 5)
    manager.reorder({1: 0})
    manager.swap_out([0, 1])  # only what is not the prefix's moves
    assert manager.num_free_cpu_blocks == 7
    manager.check_invariants()


# ---- swapping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_out_and_in_again_is_the_identity(seed):
    manager = random_manager(seed, num_blocks=24, num_cpu_blocks=24)
    everybody = manager.running_ids
    before, need = shape(manager), manager.blocks_for_step()
    tables = [manager.block_table(i) for i in everybody]
    unique = {b for t in tables for b in t.blocks[t.num_prefix_blocks :]}
    if not manager.can_swap_out(everybody):
        refused(manager, OutOfSwapSpaceError, lambda: manager.swap_out(everybody))
        return
    free, cpu_free = manager.num_free_blocks, manager.num_free_cpu_blocks
    out = manager.swap_out(everybody)
    assert {gpu for gpu, _ in out} == unique and len(out) == len(unique)  # a shared block once
    assert len({cpu for _, cpu in out}) == len(unique)
    assert manager.num_free_blocks == free + len(unique)
    assert manager.num_free_cpu_blocks == cpu_free - len(unique)
    assert manager.running_ids == []
    manager.check_invariants()
    back = manager.swap_in(everybody)
    assert {cpu for cpu, _ in back} == {cpu for _, cpu in out}
    assert shape(manager) == before
    assert manager.running_ids == everybody
    assert manager.blocks_for_step() == need
    assert manager.num_free_cpu_blocks == cpu_free
    manager.check_invariants()


def test_blocks_of_a_shared_prefix_stay():
    manager = manager_of(16, 4, cpu=8)
    manager.allocate_prefix(100, 10)  # two whole blocks and half of a third
    prefix = list(manager.block_table(100).blocks)
    for seq_id in range(2):
        manager.allocate(seq_id, 3, prefix_id=100)
    own = manager.block_table(0).blocks[2:]
    pairs = manager.swap_out([0])
    assert [gpu for gpu, _ in pairs] == own
    assert [manager.ref_count(block) for block in prefix] == [3, 3, 1]
    manager.check_invariants()
    # Even withdrawn, the prefix waits for those who are swapped out.
    assert manager.free(100) == [prefix[2]]
    assert manager.free(1) != []
    assert [manager.ref_count(block) for block in prefix[:2]] == [1, 1]
    manager.swap_in([0])
    assert manager.block_table(0).blocks[:2] == prefix[:2]
    assert manager.block_table(0).num_prefix_blocks == 2
    manager.swap_out([0])
    assert sorted(manager.free(0)) == sorted(prefix[:2])
    assert (manager.num_free_blocks, manager.num_free_cpu_blocks) == (16, 8)
    manager.check_invariants()


def test_a_group_is_swapped_whole():
    manager = manager_of(16, 4, cpu=8)
    manager.admit(group_of(range(3), 6))
    manager.allocate(9, 6)
    for part in ([0], [0, 1], [1, 9]):
        assert manager.can_swap_out(part)  # it asks for room alone
        refused(manager, SharedBlockError, lambda part=part: manager.swap_out(part))
    assert len(manager.swap_out([0, 1, 2])) == 2
    for part in ([2], [0, 1]):
        refused(manager, SharedBlockError, lambda part=part: manager.swap_in(part))
    # Swapped sequences take part in nothing until they are back.
    for call in (
        lambda: manager.append(0),
        lambda: manager.fork(0, 5),
        lambda: manager.reorder({9: 0}),
        lambda: manager.swap_out([0, 1, 2]),
        lambda: manager.block_table(0),
        lambda: manager.num_tokens(0),
        lambda: manager.swap_in([0, 1, 2, 9]),
        lambda: manager.can_swap_in([9]),
        lambda: manager.can_swap_out([1]),
    ):
        refused(manager, UnknownSequenceError, call)
    manager.append_all()
    assert manager.num_tokens(9) == 7
    manager.swap_in([2, 0, 1])
    assert [manager.num_tokens(i) for i in range(3)] == [6, 6, 6]
    assert len(manager.append_all()) == 2
    # Beams that share nothing any more may part.
    manager.reorder({1: 1})
    manager.free(0)
    manager.free(1)
    assert len(manager.swap_out([2])) == 2
    manager.check_invariants()


def test_a_full_cpu_pool_is_no_crash():
    """Section 4.5: where the CPU has no room, recomputation is what remains."""
    manager = manager_of(16, 4, cpu=3)
    manager.allocate(0, 9)
    manager.allocate(1, 2)
    assert manager.can_swap_out([0]) and not manager.can_swap_out([0, 1])
    refused(manager, OutOfSwapSpaceError, lambda: manager.swap_out([0, 1]))
    manager.swap_out([0])
    assert not manager.can_swap_out([1])
    refused(manager, OutOfSwapSpaceError, lambda: manager.swap_out([1]))
    without = manager_of(16, 4)
    without.allocate(0, 1)
    refused(without, OutOfSwapSpaceError, lambda: without.swap_out([0]))
    assert without.swap_out([]) == without.swap_in([]) == ()


@pytest.mark.parametrize("prefix_len", [6, 8])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_prompt_may_be_empty_behind_a_prefix(prefix_len, samples):
    """The first generated token is then the first of its own. A part-filled block of the prefix is
    copied at once, so that the group can be swapped before it has written anything."""
    manager, part_filled = manager_of(8, 4, cpu=8), prefix_len % 4 > 0
    manager.allocate_prefix(100, prefix_len)
    group = group_of(range(samples), 0, None, prefix_len, 100)
    assert manager.blocks_for(0, 100) == manager.blocks_for_group(group) == part_filled
    assert manager.can_admit(group)
    copies = manager.try_admit(group)
    manager.check_invariants()
    assert [source for source, _ in copies] == [1] * part_filled
    assert [manager.num_tokens(i) for i in range(samples)] == [prefix_len] * samples
    assert manager.num_free_blocks == 8 - 2 - part_filled
    ids = list(range(samples))
    assert len(manager.swap_out(ids)) == len(manager.swap_in(ids)) == part_filled
    assert len(manager.append_all()) == part_filled * (samples - 1)
    assert manager.num_free_blocks == 8 - 2 - samples
    manager.check_invariants()
    for seq_id in (*ids, 100):
        manager.free(seq_id)
    assert manager.num_free_blocks == 8


def test_the_cpu_pool_may_be_larger_than_the_gpus():
    """As the artifact's, 1,638 blocks for 983: one group after another finds its place there."""
    manager = manager_of(4, 4, cpu=10)
    for seq_id in range(3):
        manager.allocate(seq_id, 12)
        manager.swap_out([seq_id])
        manager.check_invariants()
    assert (manager.num_free_blocks, manager.num_free_cpu_blocks) == (4, 1)


@pytest.mark.parametrize("watermark", [0, 2])
def test_swapping_in_needs_a_block_more_for_each_and_the_watermark(watermark):
    manager = manager_of(16, 4, cpu=16, watermark=watermark / 16)
    manager.admit(group_of([0, 1], 6, [4, 4]))  # 10 tokens each: 1 shared, 2 of their own each
    manager.swap_out([0, 1])
    for free in range(5 + 2 + watermark + 2):
        held = clone(manager)
        fill(held, free)
        assert held.can_swap_in([0, 1]) == (free >= 5 + 2 + watermark)
        assert held.can_swap_in([0, 1], alone=True) == (free >= 5)  # their last blocks have room
        if free < 5:
            refused(held, OutOfBlocksError, lambda held=held: held.swap_in([0, 1]))
        else:
            assert len(held.swap_in([0, 1])) == 5
