"""The paged manager: who is admitted, how many blocks a call takes, growth and copy-on-write."""

import itertools
import random

import pytest
from manager_tools import (
    blocks_of,
    clone,
    fill,
    group_of,
    manager_of,
    observable,
    prefix_ids,
    random_manager,
    refused,
    shape,
)

from kv_cache_manager import (
    DuplicateSequenceError,
    MemoryUsage,
    OutOfBlocksError,
    PagedKVCacheManager,
    RequestTooLargeError,
    UnknownSequenceError,
)
from sequence import SequenceStatus


def of_40(tokens, free, padding=0, running=(0, 0), blocks=0):
    """The usage of a pool of 40 slots; `running`: the tokens and blocks that sequences think of."""
    logical = {"logical_tokens": running[0], "logical_blocks": running[1]}
    return MemoryUsage(40, tokens, free, padding=padding, physical_blocks=blocks, **logical)


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
def test_require_fits_accepts_just_what_can_be_served_alone(seed):
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
            with pytest.raises(OutOfBlocksError):
                manager.admit(arrived)
                for _ in range(output_len - 1):
                    manager.append_all()
    assert manager.can_admit(arrived, alone=True)
    manager.admit(arrived)
    for step in range(output_len - 1):
        ids = manager.running_ids
        manager.swap_out(ids)
        assert manager.can_swap_in(ids, alone=True)
        manager.swap_in(ids)
        manager.append_all()
        for seq in arrived.seqs:
            seq.num_generated = step + 1
        other = clone(manager)
        for seq in arrived.seqs:
            other.free(seq.seq_id)
        assert other.can_admit(arrived, alone=True)
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


# ---- truncation --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 12))
def test_truncation_gives_back_the_blocks_behind_and_grows_again_as_before(length):
    manager = PagedKVCacheManager(8, 4)
    manager.allocate(0, 11)
    keep = -(-length // 4)
    assert manager.truncate(0, length) == [0, 1, 2][keep:]
    manager.check_invariants()
    assert (manager.num_tokens(0), manager.num_free_blocks) == (length, 8 - keep)
    assert manager.append(0, 12 - length) == ()
    manager.check_invariants()
    assert manager.block_table(0).entries() == [(0, 4), (1, 4), (2, 4)]


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("grow", [lambda m: m.append(1), lambda m: m.append_all()])
def test_a_truncated_fork_keeps_what_its_parent_holds_and_copies_it_before_it_writes(length, grow):
    manager = PagedKVCacheManager(8, 4)
    manager.allocate(0, 8)
    manager.fork(0, 1)
    assert manager.truncate(1, length) == []
    manager.check_invariants()
    kept, inside = -(-length // 4), length % 4 > 0
    usage = manager.usage()
    assert (usage.tokens, usage.padding, usage.logical_tokens) == (8, 0, 8 + length)
    assert manager.blocks_for_append([1]) == 1
    shared = manager.block_table(1).blocks[-1]
    copies = grow(manager)
    manager.check_invariants()
    mine = manager.block_table(1).blocks
    assert copies == (((shared, mine[-1]),) if inside else ())
    assert len(mine) == (kept if inside else kept + 1)
    assert manager.block_table(0).blocks[:2] == [0, 1]
    assert mine[-1] not in manager.block_table(0).blocks


def test_who_is_left_alone_with_a_block_that_it_fills_in_part_writes_in_place():
    manager = PagedKVCacheManager(4, 4)
    manager.allocate(0, 4)
    manager.fork(0, 1)
    manager.fork(0, 2)
    manager.truncate(1, 3)
    manager.truncate(2, 2)
    assert manager.usage().padding == 0
    assert manager.free(0) == []
    manager.check_invariants()
    assert (manager.usage().tokens, manager.usage().padding) == (3, 1)
    assert manager.free(1) == []
    assert (manager.usage().tokens, manager.usage().padding) == (2, 2)
    assert manager.append(2) == ()
    manager.check_invariants()


def test_beams_of_different_lengths_in_one_block_are_reordered_and_swapped():
    manager = PagedKVCacheManager(8, 4, num_cpu_blocks=4, watermark=0.0)
    manager.allocate(0, 4)
    manager.fork(0, 1)
    manager.truncate(1, 3)
    assert len(manager.swap_out([0, 1])) == 1
    manager.allocate(9, 24)
    assert manager.num_free_blocks == 2
    assert not manager.can_swap_in([0, 1], alone=True), "both write: one copies, one goes on"
    manager.truncate(9, 20)
    assert manager.can_swap_in([0, 1], alone=True)
    manager.swap_in([0, 1])
    manager.check_invariants()
    assert manager.blocks_for_append([0, 1]) == 2
    assert manager.reorder({0: 1}) == []
    manager.check_invariants()
    assert (manager.num_tokens(0), manager.blocks_for_append([0, 1])) == (3, 1)


def test_a_sequence_truncated_into_its_prefix_leaves_the_prefix_whole():
    manager = PagedKVCacheManager(8, 4, num_cpu_blocks=4)
    manager.allocate_prefix(100, 8)
    manager.allocate(0, 3, prefix_id=100)
    assert len(manager.truncate(0, 6)) == 1
    manager.check_invariants()
    assert manager.block_table(0).num_prefix_blocks == 1
    assert (manager.usage().tokens, manager.usage().padding) == (8, 0)
    ((source, copy),) = manager.append(0)
    manager.check_invariants()
    assert source == manager.block_table(100).blocks[1] != copy


@pytest.mark.parametrize("length", [0, -1, 8, True, 1.0, None])
def test_a_truncation_that_makes_no_sense_changes_nothing(length):
    manager = PagedKVCacheManager(8, 4, num_cpu_blocks=4)
    manager.allocate(0, 7)
    refused(manager, ValueError, lambda: manager.truncate(0, length))
    manager.swap_out([0])
    refused(manager, UnknownSequenceError, lambda: manager.truncate(0, 1))


def test_a_fork_truncated_to_a_blocks_end_has_nothing_left_to_copy():
    manager = PagedKVCacheManager(8, 4)
    manager.allocate(0, 6)
    manager.fork(0, 1)
    assert manager.truncate(1, 4) == []
    manager.check_invariants()
    assert manager.append_all() == ()
    assert blocks_of(manager, 0, 1) == [[0, 1], [0, 2]]
