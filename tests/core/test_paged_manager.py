"""Regime items 1 and 7: the paged manager's invariants, the paper's own examples, refusals."""

import dataclasses
import itertools
import random

import pytest
from manager_tools import (
    add_to,
    assert_messages,
    clone,
    fill,
    group_of,
    observable,
    pattern,
    prefix_ids,
    random_manager,
    refused,
    shape,
)

from allocators import BlockAllocator
from kv_cache_manager import (
    DuplicateSequenceError,
    MemoryUsage,
    OutOfBlocksError,
    OutOfSwapSpaceError,
    PagedKVCacheManager,
    RequestTooLargeError,
    SharedBlockError,
    UnknownSequenceError,
)
from sequence import BeamHistory, BlockTable, Clock, Sequence, SequenceGroup, SequenceStatus
from vllm_sim.paper import figures as paper_figures


def manager_of(num_blocks=32, size=4, cpu=0, watermark=0.0, order=()):
    """A manager that hands out the blocks of `order` first, then the others upwards."""
    order = [*order, *(block for block in range(num_blocks) if block not in order)]
    return PagedKVCacheManager(
        num_blocks, size, num_cpu_blocks=cpu, watermark=watermark, free_order=order
    )


def blocks_of(manager, *ids):
    return [manager.block_table(i).blocks for i in ids]


def of_40(tokens, free, padding=0, running=(0, 0), blocks=0):
    """The usage of a pool of 40 slots; `running`: the tokens and blocks that sequences think of."""
    logical = {"logical_tokens": running[0], "logical_blocks": running[1]}
    return MemoryUsage(40, tokens, free, padding=padding, physical_blocks=blocks, **logical)


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


# ---- admission --------------------------------------------------------------------------------


def test_one_percent_of_the_papers_pool_stays_free():
    manager = PagedKVCacheManager(983, 16)
    assert manager.watermark_blocks == 9
    assert manager.can_allocate(974 * 16)
    assert not manager.can_allocate(974 * 16 + 1)
    # The watermark binds admission alone.
    manager.allocate(0, 974 * 16)
    assert not manager.can_allocate(1)
    manager.append(0, 9 * 16)
    assert manager.num_free_blocks == 0


@pytest.mark.parametrize(
    ("blocks", "share", "kept"), [(100, 0.0, 0), (99, 0.01, 0), (100, 0.01, 1), (8, 0.5, 4)]
)
def test_the_watermark_is_rounded_down(blocks, share, kept):
    manager = PagedKVCacheManager(blocks, 4, watermark=share)
    assert manager.watermark_blocks == kept
    assert manager.can_allocate((blocks - kept) * 4)
    assert not manager.can_allocate((blocks - kept) * 4 + 1)
    assert manager.can_admit(group_of([0], (blocks - kept) * 4))
    assert not manager.can_admit(group_of([0], (blocks - kept) * 4 + 1))


def test_can_append_asks_for_a_block_per_sequence():
    manager = manager_of(4, 4)
    manager.allocate(0, 9)
    manager.fork(0, 1)
    assert manager.can_append([0])
    assert not manager.can_append([0, 1])  # the artifact's rule, although one copy would do
    assert manager.blocks_for_step() == 1
    assert manager.can_append([])


@pytest.mark.parametrize("prefix_len", [0, 4, 6])
def test_a_fresh_group_holds_its_prompt_once(prefix_len):
    manager = manager_of(32, 4)
    prefix_id = None
    if prefix_len:
        prefix_id = 100
        manager.allocate_prefix(prefix_id, prefix_len)
    arrived = group_of(range(3), 7, prefix_len=prefix_len, prefix_id=prefix_id)
    free, need = manager.num_free_blocks, manager.blocks_for_group(arrived)
    copies = manager.admit(arrived)
    assert len(copies) == (prefix_len % 4 > 0)
    assert free - manager.num_free_blocks == need == -(-(prefix_len % 4 + 7) // 4)
    assert blocks_of(manager, 0, 1, 2) == blocks_of(manager, 0) * 3
    assert manager.usage().logical_tokens == 3 * (prefix_len + 7)
    manager.check_invariants()


def test_a_recomputed_group_comes_back_with_its_tokens_and_without_the_finished():
    manager = manager_of(64, 4)
    arrived = group_of(range(4), 6, [5, 3, 9, 0])
    arrived.seqs[1].status = SequenceStatus.FINISHED
    need = manager.blocks_for_group(arrived)
    copies = manager.admit(arrived)
    assert manager.running_ids == [0, 2, 3]  # section 4.5's trap: a finished sibling revived
    assert [manager.num_tokens(i) for i in (0, 2, 3)] == [11, 15, 6]
    # Block 0 is shared by all, then 2, 3 and 1 blocks of their own.
    assert 64 - manager.num_free_blocks == need == 1 + 2 + 3 + 1
    assert len(copies) == 2
    manager.check_invariants()


@pytest.mark.parametrize("seed", range(150))
def test_blocks_for_group_are_the_blocks_taken(seed):
    rng = random.Random(seed)
    manager = manager_of(200, rng.randint(1, 5))
    prefix_id, prefix_len = None, 0
    if rng.random() < 0.6:
        prefix_id, prefix_len = 100, rng.randint(1, 12)
        manager.allocate_prefix(prefix_id, prefix_len)
    count = rng.randint(1, 5)
    generated = [rng.choice((0, rng.randint(1, 9))) for _ in range(count)]
    arrived = group_of(range(count), rng.randint(1, 9), generated, prefix_len, prefix_id)
    for seq in arrived.seqs[1:]:
        if rng.random() < 0.2:
            seq.status = SequenceStatus.FINISHED
    need = manager.blocks_for_group(arrived)
    # Exactly enough is enough, and one block less changes nothing.
    short = clone(manager)
    fill(short, need - 1)
    refused(short, OutOfBlocksError, lambda: short.admit(arrived))
    fill(manager, need)
    manager.admit(arrived)
    assert manager.num_free_blocks == 0
    assert {i: manager.num_tokens(i) for i in manager.running_ids} == {
        seq.seq_id: seq.num_tokens for seq in arrived.unfinished()
    }
    manager.check_invariants()


@pytest.mark.parametrize("seed", range(120))
def test_try_admit_admits_whatever_can_be_admitted_and_else_changes_nothing(seed):
    """The short way of single sequences comes to the same as the long way of every group."""
    rng = random.Random(seed)
    manager = random_manager(seed)
    manager.watermark_blocks = rng.choice((0, 2))
    prefixes = [(i, manager.num_tokens(i)) for i in prefix_ids(manager)]
    prefix_id, prefix_len = rng.choice([(None, rng.randint(0, 3)), *prefixes])
    ids = range(500, 500 + rng.choice((1, 1, 3)))
    generated = [rng.choice((0, rng.randint(1, 5))) for _ in ids]
    arrived = group_of(ids, rng.randint(1, 6), generated, prefix_len, prefix_id)
    need = manager.blocks_for_group(arrived)
    for free in range(min(manager.num_free_blocks, need + manager.watermark_blocks + 1) + 1):
        short, long = (clone(manager) for _ in range(2))
        fill(short, free)
        fill(long, free)
        before = observable(short)
        copies = short.try_admit(arrived)
        assert (copies is not None) == long.can_admit(arrived)
        if copies is None:
            assert observable(short) == before
            continue
        assert copies == long.admit(arrived)
        assert observable(short) == observable(long)
        assert free - short.num_free_blocks == need
        short.check_invariants()
        again = group_of(ids, 1)
        if short.can_admit(again):
            refused(short, DuplicateSequenceError, lambda m=short, g=again: m.try_admit(g))


def test_a_group_wider_than_a_batch_is_admitted_and_swapped_whole():
    """300 samples: nothing but the limits of the scheduler says how many share a block."""
    manager = manager_of(1000, 4, cpu=1000)
    samples = group_of(range(300), 6, [1] * 300)
    assert manager.blocks_for_group(samples) == 1 + 300
    assert len(manager.try_admit(samples)) == 299, "the last writes in place"
    assert manager.num_free_blocks == 1000 - 301
    everybody = manager.running_ids
    assert len(manager.swap_out(everybody)) == 301
    assert len(manager.swap_in(everybody)) == 301
    assert manager.ref_count(blocks_of(manager, 7)[0][0]) == 300
    manager.check_invariants()


def test_the_prefix_that_is_there_counts_and_not_what_the_sequences_say():
    manager = manager_of(10, 4)
    manager.allocate_prefix(100, 7)
    wrong = group_of([0, 1], 4, [6, 6], prefix_len=0, prefix_id=100)
    need = manager.blocks_for_group(wrong)
    # 17 tokens each on 5 blocks: the prefix's, one that both fill behind it, and 3 of their own.
    assert need == 1 + 2 * 3
    fill(manager, need - 1)
    refused(manager, OutOfBlocksError, lambda: manager.admit(wrong))


def test_groups_that_admission_refuses():
    manager = manager_of(16, 4, cpu=4)
    manager.allocate_prefix(100, 4)
    manager.allocate(1, 4)
    manager.allocate(2, 4)
    manager.swap_out([2])
    for taken in (1, 2, 100):
        for ids in ([taken], [7, taken], [taken, 7]):
            refused(
                manager, DuplicateSequenceError, lambda ids=ids: manager.admit(group_of(ids, 3))
            )
    refused(manager, UnknownSequenceError, lambda: manager.admit(group_of([7], 3, prefix_id=1)))
    refused(manager, OutOfBlocksError, lambda: manager.admit(group_of([7, 8], 60, [1, 1])))


@pytest.mark.parametrize("seed", range(40))
def test_what_require_fits_accepts_can_be_served_alone(seed):
    """Admission, every step, recomputation at any length, and the way to the CPU and back."""
    rng = random.Random(seed)
    size, count, output_len = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 8)
    prompt_len, prefix_len = rng.randint(1, 9), rng.choice((0, rng.randint(1, 9)))
    prefix_id = 100 if prefix_len else None
    for num_blocks in itertools.count(1):
        manager = manager_of(num_blocks, size, cpu=num_blocks, watermark=0.125)
        if -(-prefix_len // size) > num_blocks:
            continue
        if prefix_len:
            manager.allocate_prefix(prefix_id, prefix_len)
        arrived = group_of(
            range(count), prompt_len, None, prefix_len, prefix_id, output_len=output_len
        )
        try:
            manager.require_fits(arrived)
            break
        except RequestTooLargeError:
            refused(manager, RequestTooLargeError, lambda m=manager, g=arrived: m.require_fits(g))
    assert manager.can_admit(arrived)
    manager.admit(arrived)
    for step in range(output_len - 1):
        manager.append_all()
        for seq in arrived.seqs:
            seq.num_generated = step + 1
        other = clone(manager)
        for seq in arrived.seqs:
            other.free(seq.seq_id)
        assert other.can_admit(arrived)
        ids = manager.running_ids
        manager.swap_out(ids)
        assert manager.can_swap_in(ids)
        manager.swap_in(ids)
    assert manager.num_tokens(0) == arrived.seqs[0].final_len - 1


# ---- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_waste_per_sequence_is_less_than_a_block(size):
    manager = manager_of(400, size)
    for seq_id in range(20):
        manager.allocate(seq_id, seq_id + 1)
    for _ in range(2 * size + 1):
        usage = manager.usage()
        lengths = [manager.num_tokens(i) for i in range(20)]
        assert usage.padding == sum(-n % size for n in lengths) <= 20 * (size - 1)
        assert usage.tokens == usage.logical_tokens == sum(lengths)
        assert usage.physical_blocks == sum(-(-n // size) for n in lengths)
        assert usage.reserved == usage.internal == usage.rounding == 0
        manager.append_all()


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("samples", [1, 2, 4, 6])
@pytest.mark.parametrize("how", ["append", "append_all", "append_all(3)"])
def test_n_samples_cost_n_minus_1_copies_if_the_prompt_ends_within_a_block(size, samples, how):
    for prompt_len in range(1, 3 * size + 2):
        manager = manager_of(200, size)
        manager.admit(group_of(range(samples), prompt_len))
        copies = []
        for _ in range(2 * size):
            if how == "append":
                for seq_id in range(samples):
                    copies += manager.append(seq_id)
            else:
                copies += manager.append_all(3 if "3" in how else 1)
        part = prompt_len % size
        assert len(copies) == (samples - 1 if part else 0)
        assert len({source for source, _ in copies}) <= 1
        # Fig. 15: what is shared in the end is the prompt's full blocks.
        usage, full = manager.usage(), prompt_len // size
        each = -(-manager.num_tokens(0) // size)
        assert usage.logical_blocks == samples * each
        assert usage.physical_blocks == full + samples * (each - full)
        assert usage.saved == pytest.approx((samples - 1) * full / (samples * each))
        assert usage.tokens == usage.logical_tokens - (samples - 1) * full * size
        manager.check_invariants()


def test_usage_of_a_worked_example():
    manager = manager_of(10, 4)
    assert manager.usage() == of_40(tokens=0, free=40)
    assert manager.usage().saved == 0.0
    manager.allocate(0, 7)
    manager.fork(0, 1)
    assert manager.usage() == of_40(tokens=7, free=32, padding=1, running=(14, 4), blocks=2)
    assert manager.usage().saved == 0.5
    manager.append(1)  # copies block 1 and fills the copy
    assert manager.usage() == of_40(tokens=12 - 1, free=28, padding=1, running=(15, 4), blocks=3)
    manager.append_all()
    usage = manager.usage()
    assert usage == of_40(tokens=4 + 4 + 4 + 1, free=24, padding=3, running=(17, 5), blocks=4)
    assert usage.share("tokens") == 13 / 40
    assert usage.external_and_others == 27 / 40
    manager.free(0)
    assert manager.usage() == of_40(tokens=9, free=28, padding=3, running=(9, 3), blocks=3)


def test_usage_counts_what_swapped_sequences_leave_behind():
    manager = manager_of(10, 4, cpu=4)
    manager.allocate_prefix(100, 6)
    manager.allocate(0, 3, prefix_id=100)  # 9 tokens on 3 blocks, one of them the prefix's
    assert manager.usage() == of_40(tokens=11, free=24, padding=2 + 3, running=(9, 3), blocks=4)
    manager.swap_out([0])
    assert manager.usage() == of_40(tokens=6, free=32, padding=2, blocks=2)
    manager.free(100)
    assert manager.usage() == of_40(tokens=4, free=36, blocks=1)
    assert len(manager.free(0)) == 1
    assert manager.usage() == of_40(tokens=0, free=40)
    assert manager.num_free_cpu_blocks == 4


def test_one_user_of_a_shared_prefix_saves_nothing_and_two_save_one_copy_of_it():
    manager = manager_of(50, 4)
    manager.allocate_prefix(100, 80)
    assert manager.usage().saved == 0.0, "nobody runs"
    manager.allocate(0, 4, prefix_id=100)
    assert manager.usage().saved == 0.0, "21 blocks, with or without sharing"
    manager.allocate(1, 4, prefix_id=100)
    assert manager.usage().saved == pytest.approx((42 - 22) / 42)


# ---- growth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_append_n_is_n_appends(seed):
    manager = random_manager(seed)
    for seq_id in manager.running_ids:
        for count in (2, 3, 2 * manager.block_size + 1):
            at_once, one_by_one = clone(manager), clone(manager)
            try:
                copies = at_once.append(seq_id, count)
            except OutOfBlocksError:
                continue
            singles = [one_by_one.append(seq_id) for _ in range(count)]
            assert tuple(itertools.chain(*singles)) == copies
            assert shape(at_once) == shape(one_by_one)
            at_once.check_invariants()
            one_by_one.check_invariants()


@pytest.mark.parametrize("seed", range(60))
def test_a_step_of_n_is_n_steps_is_an_append_to_each(seed):
    manager = random_manager(seed)
    for count in (1, 2, 3, 2 * manager.block_size + 1):
        need = manager.blocks_for_step(count)
        if need > manager.num_free_blocks:
            refused(manager, OutOfBlocksError, lambda n=count: manager.append_all(n))
            continue
        at_once, steps, each = clone(manager), clone(manager), clone(manager)
        copies = at_once.append_all(count)
        assert manager.num_free_blocks - at_once.num_free_blocks == need
        one_by_one = [pair for _ in range(count) for pair in steps.append_all()]
        separately = [pair for i in manager.running_ids for pair in each.append(i, count)]
        assert len(copies) == len(one_by_one) == len(separately)
        assert sorted(s for s, _ in copies) == sorted(s for s, _ in separately)
        assert shape(at_once) == shape(steps) == shape(each)
        for other in (at_once, steps, each):
            other.check_invariants()


@pytest.mark.parametrize("seed", range(60))
def test_blocks_for_append_are_the_blocks_taken(seed):
    manager = random_manager(seed)
    rng = random.Random(seed)
    for _ in range(5):
        ids = rng.sample(manager.running_ids, rng.randint(0, len(manager.running_ids)))
        need = manager.blocks_for_append(ids)
        assert need == manager.blocks_for_append(iter(ids))
        if need <= manager.num_free_blocks:
            each = clone(manager)
            fill(each, need)
            for seq_id in ids:
                each.append(seq_id)
            assert each.num_free_blocks == 0
    assert manager.blocks_for_append(manager.running_ids) == manager.blocks_for_step()


def test_blocks_for_append_where_blocks_are_large():
    """Small integers are one object each; slots above 256 are equal without being the same."""
    manager = manager_of(8, 512)
    manager.allocate(0, 1)
    manager.append_all(300)
    manager.allocate(1, 511)
    manager.allocate(2, 1)
    manager.append_all()  # for 1 the last slot of its first block
    manager.check_invariants()
    assert manager.blocks_for_append([0, 1]) == manager.blocks_for_step() == 1
    manager.append_all()
    assert manager.blocks_for_append([0, 1]) == manager.blocks_for_step() == 0


def test_a_table_of_many_blocks():
    manager = manager_of(400, 1)
    manager.allocate(0, 300)
    manager.append_all(50)
    manager.check_invariants()
    assert manager.block_table(0).entries() == [(block, 1) for block in range(350)]


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_steps_without_copies_are_as_many_as_there_are_blocks_for(seed, stepped):
    """None where the next step would copy, and perhaps none where a tail was shared before it."""
    manager = random_manager(seed, num_blocks=48)
    if manager.blocks_for_step() > manager.num_free_blocks:
        return
    copies = clone(manager).append_all()
    if stepped:
        manager.append_all()
        copies = ()  # from now on no tail is shared
    size, free = manager.block_size, manager.num_free_blocks
    needs = [0, *(manager.blocks_for_step(n) for n in range(1, 4 * size + 3))]
    for at_most in (0, 1, 2, size, size + 1, 3 * size, len(needs) - 1):
        for reserve in range(free + 2):
            enough = [n for n in range(at_most + 1) if needs[n] <= free - reserve]
            steps = manager.steps_without_copies(at_most, reserve)
            assert steps == (enough[-1] if enough and not copies else 0) or not (steps or stepped)


def test_no_step_is_without_copies_until_a_shared_tail_is_written():
    manager = manager_of(16, 4)
    manager.allocate(0, 6)
    manager.fork(0, 1)
    assert manager.steps_without_copies(9, 0) == 0
    manager.free(1)
    assert manager.steps_without_copies(9, 0) == 0, "0 shares its tail no more, and has not written"
    assert manager.append(0) == ()
    assert manager.steps_without_copies(9, 0) == 9


def test_a_refusal_says_how_many_blocks_are_needed_the_copy_included():
    manager = manager_of(4, 4)
    manager.allocate(0, 6)
    manager.fork(0, 1)
    fill(manager, 1)
    message = "sequence 1 needs 2 blocks, 1 are free"
    refused(manager, OutOfBlocksError, lambda: manager.append(1, 3), match=message)


@pytest.mark.parametrize("together", [False, True])
def test_one_sequence_and_all_of_them_may_grow_in_turn(together):
    manager = manager_of(32, 4)
    manager.allocate(0, 5)
    manager.allocate(1, 6)
    if together:
        manager.append_all()
    else:
        manager.append(0)
        manager.append(1)
    manager.append(0, 3)
    manager.append_all(2)
    manager.append(0)
    assert [manager.num_tokens(i) for i in (0, 1)] == [12, 9]
    assert [len(blocks) for blocks in blocks_of(manager, 0, 1)] == [3, 3]
    manager.check_invariants()


def test_a_step_without_sequences_takes_nothing():
    manager = manager_of(4, 4)
    assert manager.append_all() == ()
    assert manager.append_all(9) == ()
    manager.allocate(0, 4)
    assert manager.blocks_for_step() == 1
    manager.append_all()
    assert manager.block_table(0).entries() == [(0, 4), (1, 1)]


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


def test_the_cpu_pool_is_never_above_the_gpus():
    assert manager_of(8, 4, cpu=8).num_cpu_blocks == 8
    with pytest.raises(ValueError, match="bounded by the GPU's KV blocks"):
        manager_of(8, 4, cpu=9)


@pytest.mark.parametrize("watermark", [0, 2])
def test_swapping_in_needs_a_block_more_for_each_and_the_watermark(watermark):
    manager = manager_of(16, 4, cpu=16, watermark=watermark / 16)
    manager.admit(group_of([0, 1], 6, [4, 4]))  # 10 tokens each: 1 shared, 2 of their own each
    manager.swap_out([0, 1])
    for free in range(5 + 2 + watermark + 2):
        held = clone(manager)
        fill(held, free)
        assert held.can_swap_in([0, 1]) == (free >= 5 + 2 + watermark)
        if free < 5:
            refused(held, OutOfBlocksError, lambda held=held: held.swap_in([0, 1]))
        else:
            assert len(held.swap_in([0, 1])) == 5


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        *((counts, {}) for counts in ((0, 4), (-1, 4), (True, 4), (8.0, 4), (8, 0), (8, True))),
        *(((8, 4), {"num_cpu_blocks": count}) for count in (-1, True, 9)),
        *(((8, 4), {"watermark": share}) for share in (-0.1, 1.0, 1.5, float("nan"))),
        *(((8, 4), {"free_order": order}) for order in ([0, 1], [0, 0, 2, 3, 4, 5, 6, 7])),
    ],
)
def test_a_manager_that_cannot_be(arguments, options):
    with pytest.raises(ValueError):
        PagedKVCacheManager(*arguments, **options)


def test_what_a_manager_is_unless_told():
    """No swap space, the artifact's watermark, blocks from 0 upwards; options go by name."""
    manager = PagedKVCacheManager(200, 4)
    assert (manager.num_cpu_blocks, manager.num_free_cpu_blocks) == (0, 0)
    assert manager.watermark_blocks == 2
    manager.allocate(0, 9)
    assert blocks_of(manager, 0) == [[0, 1, 2]]
    with pytest.raises(TypeError, match="positional"):
        PagedKVCacheManager(8, 4, 2)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("length", [5, 8])
@pytest.mark.parametrize("free", [0, 8])
@pytest.mark.parametrize("count", [0, -1, True, False, 1.0, 2.0, None, "1"])
def test_counts_that_are_none(count, free, length, stepped):
    """A bool or a float is refused wherever the sequence stands, and 1.0 is no 1."""
    manager = manager_of(16, 4)
    manager.allocate_prefix(100, 6)
    manager.allocate(0, length)
    if stepped:
        manager.append_all()
    fill(manager, free)
    for call in (
        lambda: manager.append(0, count),
        lambda: manager.append_all(count),
        lambda: manager.allocate(1, count),
        lambda: manager.allocate(1, count, prefix_id=100),
        lambda: manager.allocate_prefix(1, count),
        lambda: manager.can_allocate(count),
        lambda: manager.blocks_for(count),
    ):
        refused(manager, ValueError, call)


def test_ids_in_use_and_ids_of_nobody():
    manager = manager_of(16, 4, cpu=4)
    manager.allocate_prefix(100, 6)
    manager.allocate(0, 5)
    manager.allocate(1, 5)
    manager.swap_out([1])
    for taken in (0, 1, 100):
        for call in (
            lambda i: manager.allocate(i, 1),
            lambda i: manager.allocate(i, 1, prefix_id=100),
            lambda i: manager.allocate_prefix(i, 1),
            lambda i: manager.fork(0, i),
        ):
            refused(manager, DuplicateSequenceError, lambda i=taken, call=call: call(i))
    for nobody in (5, 100):  # a prefix is no sequence: it neither grows nor is forked
        for call in (
            manager.append,
            lambda i: manager.append(i, 2),
            lambda i: manager.fork(i, 6),
            lambda i: manager.swap_out([i]),
            lambda i: manager.swap_out([0, i]),
            lambda i: manager.can_swap_out([i]),
            lambda i: manager.blocks_for_append([0, i]),
            lambda i: manager.swap_in([i]),
            lambda i: manager.can_swap_in([i]),
            lambda i: manager.reorder({0: i}),
        ):
            refused(manager, UnknownSequenceError, lambda i=nobody, call=call: call(i))
    for nobody in (5, 0, 1):
        for call in (
            lambda i: manager.allocate(6, 1, prefix_id=i),
            lambda i: manager.can_allocate(1, prefix_id=i),
            lambda i: manager.blocks_for(1, prefix_id=i),
        ):
            refused(manager, UnknownSequenceError, lambda i=nobody, call=call: call(i))
    for call in (manager.free, manager.block_table, manager.num_tokens):
        refused(manager, UnknownSequenceError, lambda call=call: call(5))
    manager.free(0)
    refused(manager, UnknownSequenceError, lambda: manager.free(0))  # no double free
    manager.allocate(0, 3)  # the id may be used again


@pytest.mark.parametrize("lengths", [(0, 1, 0), (1, 0, 0), (-1, 1, 0), (1, 1, -1)])
def test_sequences_that_cannot_be(lengths):
    prompt, output, prefix = lengths
    with pytest.raises(ValueError, match="at least one token"):
        Sequence(0, prompt, output, prefix)


@pytest.mark.parametrize(
    ("seqs", "message"),
    [
        ([], "has no sequence"),
        ([(0, 5, 3), (1, 5, 3), (0, 5, 3)], "names a sequence twice"),
        ([(0, 5, 3), (1, 6, 3)], "differ in their prompt"),
        ([(0, 5, 3, 2), (1, 5, 3, 0)], "differ in their prompt"),
    ],
)
def test_groups_that_cannot_be(seqs, message):
    """Admission forks one prompt: a group of two prompts, or a double id, would stop half-way."""
    with pytest.raises(ValueError, match=message):
        SequenceGroup(0, [Sequence(*arguments) for arguments in seqs])


@pytest.mark.parametrize("outputs", [(5, 6), (5, 6, 5), (7, 6, 5)])
def test_beams_of_unlike_length_cannot_be(outputs):
    """All continue one another, so all end at once; samples may end when they like."""
    seqs = [Sequence(i, 4, output) for i, output in enumerate(outputs)]
    with pytest.raises(ValueError, match="differ in their output length"):
        SequenceGroup(0, seqs, beam_parents=[[0] * len(seqs)] * 7)
    assert SequenceGroup(0, seqs).seqs == seqs


def test_a_group_is_there_from_the_start_unless_told():
    groups = [SequenceGroup(1, [Sequence(1, 4, 5)]), SequenceGroup(0, [Sequence(0, 4, 5)], 0.5)]
    assert [one.arrival_s for one in groups] == [0.0, 0.5]
    assert sorted(groups, key=lambda one: one.order) == groups, "by arrival, then by number"


def test_the_next_step_in_which_a_beam_changes_parents():
    """A step in which all beams continue themselves is none, and after the last there is none."""
    history = BeamHistory([[0, 1], [1, 1], [0, 1], [0, 1], [1, 0], [0, 1]])
    assert [history.next_move(step) for step in range(8)] == [1, 1, 4, 4, 4, None, None, None]
    assert BeamHistory().next_move(0) is None
    assert BeamHistory([[0, 1]] * 3).next_move(0) is None
    every = BeamHistory([[1, 0]] * 300)
    assert [every.next_move(step) for step in (0, 150, 299, 300)] == [0, 150, 299, None]


def test_a_group_is_finished_when_its_last_sequence_is():
    group = group_of(range(2), 5, [1, 3])
    assert (group.seqs[0].context_len, group.seqs[1].num_tokens, group.seqs[1].final_len) == (
        5,
        8,
        69,
    )
    for seq in group.seqs:
        assert not group.finished
        seq.status = SequenceStatus.FINISHED
    assert group.finished and group.unfinished() == []


def test_a_table_grows_with_its_clock_and_not_without_one():
    clock = Clock()
    clock.now = 5
    table = BlockTable([1, 2], 4, 7, clock)
    assert repr(table) == "BlockTable([1, 2], num_tokens=7)"
    clock.now += 1
    still, twin = table.twin(None, {1: 5, 2: 6}), table.twin(clock)
    clock.now -= 3
    assert (table.num_tokens, twin.num_tokens, still.num_tokens) == (5, 5, 8)
    assert (table.entries(), still.entries()) == ([(1, 4), (2, 1)], [(5, 4), (6, 4)])
    twin.blocks.append(3)
    assert table.blocks == [1, 2], "a list of its own"
    assert BlockTable([], 4, 0, Clock()).entries() == []


# ---- the invariants are seen to fail ----------------------------------------------------------


def example():
    """Every kind of table: alone, shared, once shared, behind a prefix, swapped, a prefix."""
    manager = manager_of(32, 4, cpu=16)
    manager.allocate_prefix(100, 6)
    manager.allocate(0, 5)
    manager.allocate(1, 6)
    manager.append_all()
    manager.allocate(2, 6)
    manager.fork(2, 3)
    manager.allocate(4, 3, prefix_id=100)
    manager.swap_out([4])
    manager.allocate(5, 5)
    manager.allocate(6, 3, prefix_id=100)
    manager.fork(5, 7)
    manager.append(7)
    return manager


def put(place, key, value):
    """An item or a field, for use in a lambda."""
    if isinstance(place, dict):
        place[key] = value
    else:
        setattr(place, key, value)


def longer_by(count, table="_tables", seq_id=0):
    """A table whose length is not what its blocks say, in the bucket of its new length."""

    def corrupt(m):
        changed = getattr(m, table)[seq_id]
        if table == "_tables":
            del m._due[-changed.offset % 4][seq_id]
            m._due[-(changed.offset + count) % 4][seq_id] = changed.blocks
            m._offsets += count
        changed.offset += count

    return corrupt


def kept_prefix_free(m):
    m.free(6)
    m.free(100)
    m._gpu.free_blocks.append(m._swapped[4].blocks[0])


def cpu_larger(m):
    m.free(4)
    m._cpu = BlockAllocator(33)


def holders_differ_in_place(m):
    m._tables[3].blocks.reverse()
    longer_by(2, seq_id=3)(m)


def bucket(m, seq_id, ahead=0):
    """The bucket in which a table waits, or one that many steps on."""
    return m._due[(ahead - m._tables[seq_id].offset) % 4]


def tail_that_is_full(m):
    m.append(0, 2)
    assert m.block_table(0).unfilled == 0
    m._tails[0] = m._tables[0]


def padding_kept_on_the_gpu(m):
    """A swapped table that leaves a part-filled block behind: nobody counts its padding."""
    m._leave(1, table := m._tables[1])
    m._swapped[1] = table.twin(None)
    m._swapped[1].num_prefix_blocks = len(table.blocks)


def wrong(name, count, total="free"):
    """A part of the usage that is off, at the cost of another."""

    def corrupt(m):
        right = m.usage()
        parts = {name: getattr(right, name) + count}
        if name in right.PARTS:
            parts[total] = getattr(right, total) - count
        m.usage = lambda: dataclasses.replace(right, **parts)

    return corrupt


CORRUPTIONS = {
    "a sequence is in two places": (
        lambda m: put(m._swapped, 0, m._tables[0]),
        lambda m: put(m._prefixes, 5, m._tables[5]),
    ),
    "a table grows that does not run, or the other way round": (
        lambda m: put(m._tables, 0, m._tables[0].twin(None)),
        lambda m: put(m._tables[0], "clock", Clock()),
        lambda m: put(m._swapped, 4, m._swapped[4].twin(m._clock)),
        lambda m: put(m._prefixes, 100, m._prefixes[100].twin(m._clock)),
    ),
    "a table without a block": (lambda m: put(m._tables, 9, BlockTable([], 4, 0, m._clock)),),
    "the last block is empty or over-full": (
        longer_by(3),
        longer_by(-2),
        longer_by(4, "_swapped", 4),
        longer_by(-2, "_prefixes", 100),
    ),
    "a table counts in blocks of another size": (
        lambda m: put(m._tables[0], "block_size", 3),
        lambda m: put(m._swapped[4], "block_size", 5),
    ),
    "a part-filled block is taken for one of a shared prefix": (
        lambda m: put(m._tables[5], "num_prefix_blocks", 2),
        lambda m: put(m._tables[5], "num_prefix_blocks", -1),
        padding_kept_on_the_gpu,
    ),
    "not all full blocks of a prefix": (lambda m: put(m._prefixes[100], "num_prefix_blocks", 0),),
    "holders of block {} disagree about it": (
        longer_by(1, seq_id=3),
        longer_by(-1, seq_id=3),
        holders_differ_in_place,
    ),
    "swap space above the GPU's blocks": (cpu_larger,),
    "a {} block is lost, twice free, or both free and held": (
        lambda m: m._gpu.free_blocks.append(m._gpu.free_blocks[0]),
        lambda m: m._cpu.free_blocks.append(m._cpu.free_blocks[0]),
        lambda m: m._gpu.free_blocks.append(m._tables[0].blocks[0]),
        lambda m: m._cpu.free_blocks.append(m._swapped[4].blocks[-1]),
        lambda m: m._gpu.free_blocks.append(m.num_blocks),
        lambda m: m._gpu.free_blocks.pop(),
        lambda m: m._cpu.free_blocks.pop(),
        kept_prefix_free,
    ),
    "{} reference counts differ from the tables": (
        lambda m: m._gpu.share([m._tables[0].blocks[0]]),
        lambda m: m._gpu.extra_refs.pop(m._tables[2].blocks[0]),
        lambda m: m._cpu.share([m._swapped[4].blocks[-1]]),
    ),
    "a table waits in the wrong bucket": (
        lambda m: put(bucket(m, 0, 1), 0, bucket(m, 0).pop(0)),
        lambda m: bucket(m, 0).pop(0),
        lambda m: put(bucket(m, 0), 4, m._swapped[4].blocks),
        lambda m: put(bucket(m, 0, 1), 0, m._tables[0].blocks),
    ),
    "a bucket feeds another table": (lambda m: put(bucket(m, 0), 0, m._tables[0].blocks.copy()),),
    "a tail that nobody is going to write": (
        lambda m: put(m._tails, 4, m._swapped[4]),
        lambda m: put(m._tails, 0, m._tables[5]),
        tail_that_is_full,
    ),
    "a shared block could be written without a copy": (lambda m: m._tails.pop(3),),
    "the usage differs from the tables": (
        *(add_to(name, count) for name in ("_offsets", "_logical_blocks") for count in (1, -1)),
        wrong("tokens", 1),
        wrong("padding", 1),
        wrong("tokens", 1, "padding"),
        wrong("logical_tokens", 1),
        wrong("logical_blocks", 1),
        wrong("physical_blocks", -1),
    ),
}


@pytest.mark.parametrize("message", CORRUPTIONS)
def test_the_invariants_catch(message):
    for corrupt in CORRUPTIONS[message]:
        manager = example()
        manager.check_invariants()
        corrupt(manager)
        with pytest.raises(AssertionError, match=pattern(message)):
            manager.check_invariants()


def test_every_assert_of_the_invariants_is_seen_to_fail():
    messages = assert_messages(PagedKVCacheManager.check_invariants)
    assert sorted(messages) == sorted(CORRUPTIONS)
    manager = example()
    assert observable(manager) == observable(clone(manager))
