"""Regime item 1: what the paged manager refuses; each of its invariants is seen to fail."""

import re

import numpy as np
import pytest
from manager_tools import (
    add_to,
    assert_messages,
    blocks_of,
    clone,
    fill,
    group_of,
    manager_of,
    observable,
    pattern,
    refused,
    wrong,
)

from kv_cache_manager import (
    BaselineCacheManager,
    DuplicateSequenceError,
    PagedKVCacheManager,
    UnknownSequenceError,
)
from sequence import BeamHistory, BlockTable, Clock, Sequence, SequenceGroup, SequenceStatus

# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        *((counts, {}) for counts in ((0, 4), (-1, 4), (True, 4), (8.0, 4), (8, 0), (8, True))),
        *(((8, 4), {"num_cpu_blocks": count}) for count in (-1, True)),
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
        lambda: manager.allocate(1, count or False, prefix_id=100),  # 0 is one there
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


@pytest.mark.parametrize("bad", [float("nan"), None, True, np.True_, "7", 7.0, (7,)])
def test_an_id_is_an_integer_and_what_is_none_is_named(bad):
    """A NaN is never found again, and True is 1: both would be lost or mixed up in a dictionary."""
    manager = manager_of(16, 4)
    manager.allocate_prefix(100, 6)
    manager.allocate(1, 5)
    held = BaselineCacheManager(16, 4, max_len=16)
    held.allocate(1, 2, 5)
    for each, call in (
        (manager, lambda: manager.allocate(bad, 1)),
        (manager, lambda: manager.allocate(bad, 1, prefix_id=100)),
        (manager, lambda: manager.allocate_prefix(bad, 1)),
        (manager, lambda: manager.fork(1, bad)),
        (manager, lambda: manager.fork(bad, 2)),
        (manager, lambda: manager.can_swap_out([bad])),
        (manager, lambda: manager.swap_out([bad])),
        (manager, lambda: manager.can_swap_in([bad])),
        (manager, lambda: manager.swap_in([bad])),
        (manager, lambda: manager.blocks_for_append([bad])),
        *([(manager, lambda: manager.allocate(2, 1, bad))] if bad is not None else []),
        (held, lambda: held.allocate(bad, 2, 5)),
        (manager, lambda: Sequence(bad, 1, 1)),
        *((each, lambda each=each: each.append(bad)) for each in (manager, held)),
        *((each, lambda each=each: each.free(bad)) for each in (manager, held)),
        *((each, lambda each=each: each.num_tokens(bad)) for each in (manager, held)),
        *((each, lambda each=each: each.reorder({bad: 1})) for each in (manager, held)),
        *((each, lambda each=each: each.reorder({1: bad})) for each in (manager, held)),
    ):
        refused(each, ValueError, call, match=re.escape(f"must be an integer, got {bad!r}"))


def test_numbers_of_numpy_are_integers():
    """Python's from then on: an unsigned byte would wrap around in the next sum."""
    one, two, nine = np.uint8(1), np.int64(2), np.uint8(9)
    manager = PagedKVCacheManager(np.int64(16), np.uint8(4), num_cpu_blocks=np.int32(3))
    manager.allocate_prefix(np.int64(7), nine)
    manager.allocate(one, nine)
    manager.allocate(two, one, prefix_id=7)
    manager.fork(one, np.int64(3))
    manager.append(1, np.uint8(250 - 225))
    manager.append_all(two)
    manager.swap_out([two])
    manager.swap_in([two])
    manager.free(np.int64(3))
    manager.try_admit(SequenceGroup(0, [Sequence(np.int64(3), nine, one)]))
    manager.append(np.int64(3), two)
    assert [type(i) for i in manager.running_ids] == [int] * 3
    assert [manager.num_tokens(i) for i in (1, 2, 3, 7)] == [36, 12, 11, 9]
    held = BaselineCacheManager(np.int64(16), np.uint8(4), max_len=np.int64(32))
    held.allocate(two, one, nine, np.uint8(30))
    held.append(2, two)
    assert (held.num_tokens(2), held.usage().internal) == (3, 21)
    for each in (manager, held):
        each.check_invariants()
        assert type(each.usage().tokens) is int


@pytest.mark.parametrize(
    "lengths", [(0, 1, 0), (1, 0, 0), (-1, 1, 0), (-1, 1, 2), (1, 1, -1), (1, 1, 0, -1)]
)
def test_sequences_that_cannot_be(lengths):
    """Prompt, output, prefix and tokens generated."""
    with pytest.raises(
        ValueError, match=r"(length|tokens) must be an integer of at least [01], got"
    ):
        Sequence(0, *lengths)


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
    "holders of block {} disagree about it": (holders_differ_in_place,),
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
