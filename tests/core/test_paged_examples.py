"""The paper's own examples on the paged manager: Figs. 6 to 10 and section 4.5 (regime item 7)."""

import pytest
from manager_tools import (
    blocks_of,
    group_of,
    manager_of,
)

from vllm_sim.paper import figures as paper_figures

# ---- the paper's examples ---------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_fig_6_a_block_is_taken_only_when_all_before_it_are_full(together):
    figure = paper_figures.FIG6
    manager = manager_of(9, figure["block_size"], order=[7, 1, 3])
    manager.allocate(0, figure["prompt"])
    tables = [manager.block_table(0).entries()]
    for _ in range(2):
        assert (manager.append_all() if together else manager.append(0)) == ()
        tables.append(manager.block_table(0).entries())
    assert tables == [list(table) for table in figure["tables"]]


def test_fig_7_two_requests_have_no_block_in_common():
    """Logical neighbours need not be physical ones, and both sequences fill the same pool."""
    manager = manager_of(9, 4, order=[7, 1, 5, 2, 3, 8])
    manager.allocate(0, 7)
    manager.allocate(1, 6)
    for _ in range(4):
        assert manager.append_all() == ()
    first, second = blocks_of(manager, 0, 1)
    assert [first, second] == [[7, 1, 3], [5, 2, 8]]
    assert all(manager.ref_count(block) == 1 for block in first + second)
    assert manager.block_table(0).entries()[-1] == (3, 3)
    assert manager.block_table(1).entries()[-1] == (8, 2)
    usage = manager.usage()
    assert (usage.tokens, usage.padding, usage.free) == (21, 3, 12)
    assert usage.saved == 0.0


@pytest.mark.parametrize("together", [False, True])
def test_fig_8_exactly_one_copy(together):
    """Two samples of one prompt: the first to write copies block 1, the other writes in place."""
    manager = manager_of(9, 4, order=[7, 1, 3])
    manager.allocate(0, 7)
    manager.fork(0, 1)
    assert blocks_of(manager, 0, 1) == [[7, 1], [7, 1]]
    assert [manager.ref_count(block) for block in (7, 1)] == [2, 2]
    assert manager.num_free_blocks == 7
    if together:
        assert manager.append_all() == ((1, 3),)
    else:
        assert manager.append(0) == ((1, 3),)
        assert manager.ref_count(1) == 1
        assert manager.append(1) == ()
    assert blocks_of(manager, 0, 1) == [[7, 3], [7, 1]]
    assert [manager.ref_count(block) for block in (7, 1, 3)] == [2, 1, 1]
    manager.append_all()  # both fill a block now, and nothing is shared with the next one
    assert manager.num_free_blocks == 4
    manager.check_invariants()


def fig_9(size):
    """Fig. 9's tree: 0 is shared by all, 1 and 3 by candidates 0-2, and each ends in its own."""
    manager = manager_of(16, size)
    manager.allocate(0, size)  # block 0
    manager.fork(0, 3)
    for seq_id in (0, 3, 0, 3):  # blocks 1 and 2, then 3 and 4
        manager.append(seq_id, size)
    manager.fork(0, 1)
    manager.fork(0, 2)
    for seq_id in range(4):  # blocks 5 to 8
        manager.append(seq_id, size)
    assert blocks_of(manager, 0, 1, 2) == [[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7]]
    assert blocks_of(manager, 3) == [[0, 2, 4, 8]]
    return manager


@pytest.mark.parametrize("size", [1, 4])
def test_fig_9_a_beam_generation(size):
    """All four go on from candidates 1 and 2: 2, 4, 5 and 8 are freed, four are allocated."""
    manager = fig_9(size)
    free = manager.num_free_blocks
    freed = manager.reorder({0: 1, 1: 1, 2: 2, 3: 2})
    assert sorted(freed) == list(paper_figures.FIG9["freed"])
    assert manager.num_free_blocks == free + 4
    assert [manager.ref_count(block) for block in (0, 1, 3, 6, 7)] == [4, 4, 4, 2, 2]
    manager.check_invariants()
    assert manager.append_all() == ()  # full blocks are shared without any copy
    assert manager.num_free_blocks == free + 4 - len(paper_figures.FIG9["allocated"])
    last = [blocks[-1] for blocks in blocks_of(manager, 0, 1, 2, 3)]
    assert len(set(last)) == paper_figures.FIG9["beam_width"]
    assert [blocks[:4] for blocks in blocks_of(manager, 0, 1, 2, 3)] == (
        [[0, 1, 3, 6]] * 2 + [[0, 1, 3, 7]] * 2
    )


def test_a_beam_generation_in_the_middle_of_a_block_copies_one_block_per_extra_child():
    manager = manager_of(32, 4)
    manager.admit(group_of(range(4), 6))
    assert len(manager.append_all()) == 3
    manager.append_all()
    assert manager.append_all() == ()
    before = manager.num_free_blocks
    assert len(manager.reorder({0: 2, 1: 2, 3: 2})) == 6  # 2 blocks each of three lost beams
    assert len(manager.append_all()) == 3
    assert manager.num_free_blocks == before + 6 - 3
    manager.check_invariants()


def test_a_shared_prefix_of_whole_blocks_costs_no_copy():
    manager = manager_of(32, 4)
    manager.allocate_prefix(100, 8)
    (prefix,) = blocks_of(manager, 100)
    for seq_id in range(3):
        assert manager.allocate(seq_id, 5, prefix_id=100) == ()
        assert manager.block_table(seq_id).blocks[:2] == prefix
        assert manager.num_tokens(seq_id) == 13
    assert [manager.ref_count(block) for block in prefix] == [4, 4]
    assert manager.num_free_blocks == 32 - 2 - 3 * 2
    assert manager.append_all() == ()
    # The provider may withdraw the prefix; whoever continues it keeps the blocks.
    assert manager.free(100) == []
    for seq_id in range(2):
        assert len(manager.free(seq_id)) == 2
    assert set(prefix) <= set(manager.free(2))
    assert manager.num_free_blocks == 32
    manager.check_invariants()


def test_a_part_filled_prefix_block_is_copied_once_per_request():
    """Section 4.4: the last block of a shared prefix is marked copy-on-write."""
    manager = manager_of(32, 4)
    manager.allocate_prefix(100, 6)
    (prefix,) = blocks_of(manager, 100)
    for seq_id in range(3):
        copies = manager.allocate(seq_id, 3, prefix_id=100)
        assert [source for source, _ in copies] == [prefix[1]]
        assert copies[0][1] == manager.block_table(seq_id).blocks[1]
        assert manager.block_table(seq_id).blocks[0] == prefix[0]
        for _ in range(3):
            assert manager.append(seq_id) == ()
    assert manager.block_table(100).entries() == [(prefix[0], 4), (prefix[1], 2)]
    assert manager.ref_count(prefix[1]) == 1
    manager.check_invariants()


def test_samples_behind_a_part_filled_prefix_copy_from_the_prefix_itself():
    """All copies of an admission are made at once, so none may start from another's result."""
    manager = manager_of(32, 8)
    manager.allocate_prefix(100, 3)
    ((tail,),) = blocks_of(manager, 100)
    copies = manager.admit(group_of(range(3), 2, [1, 2, 1], prefix_len=3, prefix_id=100))
    assert [source for source, _ in copies] == [tail] * 3
    assert sorted(destination for _, destination in copies) == sorted(
        blocks[-1] for blocks in blocks_of(manager, 0, 1, 2)
    )
