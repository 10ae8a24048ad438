"""Regime item 5: with every number of free blocks, all of an operation happens, or nothing does.

The managers compare what an operation needs with what is free before they touch anything. So an
allocation that fails half-way would show as a number of free blocks below the need at which the
operation starts, or one at the need at which it still fails. Each operation is run with 0, 1, ...
free blocks: below the need it raises the named error and leaves all unchanged, at the need and
above it succeeds and takes exactly the need.
"""

import random

import pytest
from manager_tools import (
    fill,
    group_of,
    observable,
    prefix_ids,
    random_manager,
    refused,
    swapped_ids,
)

from kv_cache_manager import (
    BaselineCacheManager,
    OutOfBlocksError,
    OutOfSwapSpaceError,
    PagedKVCacheManager,
)
from sequence import Sequence, SequenceGroup, SequenceStatus
from vllm_sim.conformance.adapters.paged_manager import copied

SIZE = 4
NEW = (500, 501, 502)  # ids that nobody has


def two_of(length):
    """Two samples that share all their blocks."""
    manager = PagedKVCacheManager(32, SIZE, num_cpu_blocks=32)
    manager.allocate(0, length)
    manager.fork(0, 1)
    return manager


def behind_prefix(prefix_len, cpu_blocks=32):
    manager = PagedKVCacheManager(32, SIZE, num_cpu_blocks=cpu_blocks)
    manager.allocate_prefix(100, prefix_len)
    manager.allocate(0, 3, prefix_id=100)
    return manager


def two_alone_and_two_shared():
    """Sequences 0 and 1 with 2 and 0 slots left, 2 and 3 sharing a block with 1 left."""
    manager = PagedKVCacheManager(32, SIZE, num_cpu_blocks=32)
    manager.allocate(0, 5)
    manager.allocate(1, 7)
    manager.append_all()
    manager.allocate(2, 7)
    manager.fork(2, 3)
    return manager


def truncated_sample(length, keep):
    """Two samples of which the first was truncated: it fills less of a block than the other."""
    manager = two_of(length)
    manager.truncate(0, keep)
    return manager


def swapped_out():
    manager = two_of(7)
    manager.append_all()
    manager.append_all()  # 1 shared block, 2 of their own each
    manager.swap_out([0, 1])
    return manager


# name: (a state, an operation on it, the blocks that it takes: counted by hand)
OPERATIONS = {
    "allocate 1": (lambda: two_of(7), lambda m: m.allocate(9, 1), 1),
    "allocate 13": (lambda: two_of(7), lambda m: m.allocate(9, 13), 4),
    "prefix": (lambda: two_of(7), lambda m: m.allocate_prefix(9, 9), 3),
    "behind whole blocks": (lambda: behind_prefix(8), lambda m: m.allocate(9, 5, 100), 2),
    "behind a part, in the copy": (lambda: behind_prefix(6), lambda m: m.allocate(9, 2, 100), 1),
    "behind a part, beyond it": (lambda: behind_prefix(6), lambda m: m.allocate(9, 8, 100), 3),
    "nothing behind a part": (lambda: behind_prefix(6), lambda m: m.allocate(9, 0, 100), 1),
    "nothing behind whole blocks": (lambda: behind_prefix(8), lambda m: m.allocate(9, 0, 100), 0),
    "fork": (lambda: two_of(7), lambda m: m.fork(0, 9), 0),
    "append in place": (lambda: behind_prefix(6), lambda m: m.append(0, 3), 0),
    "append a block": (lambda: behind_prefix(5), lambda m: m.append(0), 1),
    "append a copy": (lambda: two_of(7), lambda m: m.append(0), 1),
    "append beside a shared full block": (lambda: two_of(8), lambda m: m.append(0), 1),
    "append a copy and two blocks": (lambda: two_of(7), lambda m: m.append(0, 6), 3),
    "append of one that is due": (two_alone_and_two_shared, lambda m: m.append(1), 1),
    "append 7 of one with room": (two_alone_and_two_shared, lambda m: m.append(0, 7), 2),
    "truncate a sample": (lambda: two_of(8), lambda m: m.truncate(0, 5), 0),
    "append of a truncated one": (lambda: truncated_sample(8, 7), lambda m: m.append(0), 1),
    "append of the one that was not": (lambda: truncated_sample(8, 7), lambda m: m.append(1), 1),
    "step of both": (lambda: truncated_sample(8, 7), lambda m: m.append_all(), 2),
    "append to a truncated one, a copy and two": (
        lambda: truncated_sample(8, 6),
        lambda m: m.append(0, 9),
        3,
    ),
    "step: a block and a copy": (two_alone_and_two_shared, lambda m: m.append_all(), 2),
    "step of 2": (two_alone_and_two_shared, lambda m: m.append_all(2), 4),
    "step of 3": (two_alone_and_two_shared, lambda m: m.append_all(3), 5),
    "step of 9": (two_alone_and_two_shared, lambda m: m.append_all(9), 2 + 3 + 2 + 2 + 1),
    "step of one copy": (lambda: two_of(6), lambda m: m.append_all(2), 1),
    "step of samples at a full block": (lambda: two_of(8), lambda m: m.append_all(), 2),
    "admit": (lambda: two_of(7), lambda m: m.admit(group_of(NEW, 9)), 3),
    "admit recomputed": (lambda: two_of(7), lambda m: m.admit(group_of(NEW[:2], 9, [2, 4])), 5),
    "admit unlike": (lambda: two_of(7), lambda m: m.admit(group_of(NEW, 9, [0, 4, 0])), 2 + 1 + 2),
    "admit behind a prefix": (
        lambda: behind_prefix(6),
        lambda m: m.admit(group_of(NEW, 1, [1, 2, 2], 6, 100)),
        1 + 2 + 2,
    ),
    "reorder": (two_alone_and_two_shared, lambda m: m.reorder({0: 1, 2: 1}), 0),
    "swap in": (swapped_out, lambda m: m.swap_in([0, 1]), 5),
    "swap out": (lambda: two_of(7), lambda m: m.swap_out([0, 1]), 0),
    "free": (lambda: two_of(7), lambda m: m.free(0), 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_paged_operations_take_exactly_their_need_or_nothing(name):
    build, operation, need = OPERATIONS[name]
    for free in range(need + 3):
        manager = build()
        fill(manager, free)
        if free < need:
            refused(manager, OutOfBlocksError, lambda m=manager: operation(m))
            continue
        operation(manager)
        manager.check_invariants()
        gained = {"reorder": 2, "swap out": 2}.get(name, 0)  # these give blocks back
        assert manager.num_free_blocks == free - need + gained


@pytest.mark.parametrize("cpu_blocks", range(8))
def test_swapping_out_takes_exactly_its_need_or_nothing(cpu_blocks):
    manager = behind_prefix(6, cpu_blocks)
    manager.fork(0, 1)
    manager.append_all(2)  # 11 tokens each: a block of the prefix, one shared, one of their own
    own = {block for i in (0, 1) for block in manager.block_table(i).blocks[1:]}
    assert manager.can_swap_out([0, 1]) == (cpu_blocks >= len(own))
    if cpu_blocks < len(own):
        refused(manager, OutOfSwapSpaceError, lambda: manager.swap_out([0, 1]))
    else:
        manager.swap_out([0, 1])
        manager.check_invariants()
        assert manager.num_free_cpu_blocks == cpu_blocks - len(own)


def some_operations(manager, rng):
    """Operations that a random state allows, whatever they need."""
    operations = [lambda m: m.append_all()]
    operations += [lambda m, n=n: m.append_all(n) for n in (2, 2 * manager.block_size + 1)]
    for seq_id in manager.running_ids:
        for count in (1, rng.randint(2, 9)):
            operations.append(lambda m, i=seq_id, n=count: m.append(i, n))
    for prefix_id in [None, *prefix_ids(manager)]:
        for count in (1, rng.randint(2, 9)):
            operations.append(lambda m, n=count, p=prefix_id: m.allocate(500, n, p))
        prefix_len = 0 if prefix_id is None else manager.num_tokens(prefix_id)
        generated = [rng.choice((0, rng.randint(1, 5))) for _ in range(3)]
        group = group_of(NEW, rng.randint(1, 6), generated, prefix_len, prefix_id)
        group.seqs[2].status = rng.choice((SequenceStatus.WAITING, SequenceStatus.FINISHED))
        operations.append(lambda m, g=group: m.admit(g))
    if ids := swapped_ids(manager):
        operations.append(lambda m: m.swap_in(ids))
    return operations


def with_free(manager, free):
    trial = copied(manager)
    fill(trial, free)
    return trial


@pytest.mark.parametrize("seed", range(50))
def test_random_states_with_every_number_of_free_blocks(seed):
    """There is one threshold: refused below it, and from it on the same number is taken."""
    manager, rng = random_manager(seed, num_blocks=40), random.Random(seed)
    for seq_id in rng.sample(manager.running_ids, len(manager.running_ids) // 2):
        manager.truncate(seq_id, rng.randint(1, manager.num_tokens(seq_id)))
    for operation in some_operations(manager, random.Random(seed)):
        need = None
        for free in range(manager.num_free_blocks + 1):
            trial = with_free(manager, free)
            if need is not None:
                operation(trial)
                assert trial.num_free_blocks == free - need
                break
            before = observable(trial)
            try:
                operation(trial)
            except OutOfBlocksError as error:
                assert type(error) is OutOfBlocksError and observable(trial) == before
                trial.check_invariants()
            else:
                need = free
                trial.check_invariants()
                assert trial.num_free_blocks == 0, "refused although the blocks were there"


# ---- the baseline -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["max", "pow2", "oracle"])
@pytest.mark.parametrize("taken", range(9))
def test_baseline_operations_with_every_number_of_free_chunks(policy, taken):
    """Eight chunks that a sequence needs one of; one sequence or a group of three asks."""

    def manager():
        result = BaselineCacheManager(32, SIZE, policy=policy, max_len=16)
        for seq_id in range(taken):
            result.allocate(seq_id, 9, 14)
        return result

    seqs = [Sequence(500 + i, 5, 9, 0, i) for i in range(3)]
    requests = {
        1: lambda m: m.allocate(500, 9, 14),
        2: lambda m: m.admit(SequenceGroup(0, seqs[:2])),
        3: lambda m: m.admit(SequenceGroup(0, seqs)),
    }
    for need, request in requests.items():
        asked = manager()
        if taken + need > 8:
            refused(asked, OutOfBlocksError, lambda r=request, m=asked: r(m))
        else:
            request(asked)
            asked.check_invariants()
            assert len(asked.running_ids) == taken + need
            assert asked.num_free_blocks == 32 - 4 * (taken + need)


def test_a_group_of_unlike_sizes_takes_all_its_chunks_or_none():
    """Small chunks first may not break up what a larger one of the same group needs."""
    for num_blocks in range(1, 20):
        manager = BaselineCacheManager(num_blocks, 1, policy="oracle", max_len=8)
        seqs = [Sequence(i, 1, output) for i, output in enumerate((1, 7, 2, 5))]
        group = SequenceGroup(0, seqs)
        if manager.can_admit(group):
            manager.admit(group)
            manager.check_invariants()
            assert len(manager.running_ids) == 4
        else:
            refused(manager, OutOfBlocksError, lambda m=manager, g=group: m.admit(g))
