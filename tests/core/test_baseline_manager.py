"""Regime items 1 and 7: section 3.1's reservations, section 6.1's policies, their invariants."""

import random

import pytest
from manager_tools import add_to, assert_messages, observable, pattern, refused

from kv_cache_manager import (
    POLICIES,
    BaselineCacheManager,
    DuplicateSequenceError,
    OutOfBlocksError,
    RequestTooLargeError,
    ReservationError,
    UnknownSequenceError,
)
from sequence import Sequence, SequenceGroup, SequenceStatus
from vllm_sim import paper
from vllm_sim.paper import figures as paper_figures

BLOCKS, SIZE = 983, 16  # OPT-13B on one A100-40GB


def paper_manager(policy):
    return BaselineCacheManager(BLOCKS, SIZE, policy=policy)


def parts(manager):
    """The parts of the slot identity that there are: those that are named, and no others."""
    usage = manager.usage()
    return {part: slots for part in usage.PARTS if (slots := getattr(usage, part))}


# ---- how much each policy asks for ------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "output", "max_slots", "pow2_slots", "oracle_slots"),
    [
        (7, 25, 2048, 7 + 32, 7 + 25),  # the paper's own: 25 is rounded up to 32
        (7, 32, 2048, 7 + 32, 7 + 32),
        (7, 33, 2048, 7 + 64, 7 + 33),
        (1, 1, 2048, 2, 2),
        (1000, 600, 2048, 1000 + 1024, 1600),
        (1500, 500, 2048, 1500 + 512, 2000),
        (1500, 548, 2048, 2048, 2048),  # 1500 + 1024 is beyond the model's maximum
        (2000, 40, 2048, 2048, 2040),
        (2047, 1, 2048, 2048, 2048),
        (50, 0, 2048, 51, 50),  # nothing left to generate: Pow2 asks for one slot at least
    ],
)
def test_slots_each_policy_asks_for(prompt, output, max_slots, pow2_slots, oracle_slots):
    asked = [paper_manager(p).slots_to_ask(prompt, prompt + output) for p in POLICIES]
    assert POLICIES == ("max", "pow2", "oracle")
    assert asked == [max_slots, pow2_slots, oracle_slots]


def test_pow2_reserves_at_most_twice_the_output_and_oracle_exactly_it():
    pow2, oracle = paper_manager("pow2"), paper_manager("oracle")
    for output in range(1, 1025):
        reserved = pow2.slots_to_ask(100, 100 + output) - 100
        assert output <= reserved < 2 * output
        assert reserved & (reserved - 1) == 0
        assert oracle.slots_to_ask(100, 100 + output) == 100 + output


def test_a_requests_own_maximum_bounds_every_policy():
    for policy, slots in (("max", 512), ("pow2", 512), ("oracle", 500)):
        assert paper_manager(policy).slots_to_ask(200, 500, max_len=512) == slots


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        *((far, ReservationError) for far in ((10, 2049), (10, 513, 512), (10, 20, 2049))),
        *((none, ValueError) for none in ((0, 20), (-1, 20), (True, 20), (1.0, 20), (5.0, 20.0))),
        *((none, ValueError) for none in ((True, True), (10, 9), (1, True))),
        *((none, ValueError) for none in ((10, 20, 0), (10, 20, True))),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_lengths_that_no_reservation_can_have(policy, arguments, error):
    manager = paper_manager(policy)
    manager.allocate(0, 5, 10)
    refused(manager, error, lambda: manager.slots_to_ask(*arguments))
    refused(manager, error, lambda: manager.can_allocate(*arguments))
    refused(manager, error, lambda: manager.allocate(1, *arguments))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        *((counts, {}) for counts in ((0, 16), (-3, 16), (True, 16), (8, 0), (8, 16.0))),
        ((8, 16), {"max_len": 0}),
        ((8, 16), {"policy": "best"}),
    ],
)
def test_a_manager_that_cannot_be(arguments, options):
    with pytest.raises(ValueError):
        BaselineCacheManager(*arguments, **options)
    with pytest.raises(TypeError):
        BaselineCacheManager(8, 16, "max")  # options are given by name


# ---- the paper's numbers ----------------------------------------------------------------------


def test_fig_3():
    manager = BaselineCacheManager(BLOCKS, SIZE, policy="max")
    for seq_id, name in enumerate(("A", "B")):
        drawn = paper_figures.FIG3[name]
        written = drawn["prompt"] + drawn["current"]
        before = manager.usage()
        manager.allocate(
            seq_id, written, final_len=written + drawn["reserved"], max_len=drawn["max_len"]
        )
        after = manager.usage()
        assert after.tokens - before.tokens == written
        assert after.reserved - before.reserved == drawn["reserved"]
        assert after.internal - before.internal == drawn["never_used"]
        assert before.free - after.free == drawn["max_len"]
        assert after.rounding == after.padding == 0
    assert parts(manager) == {
        "tokens": 12,
        "reserved": 3,
        "internal": 2038 + 507,
        "free": 15_728 - 2048 - 512,
    }
    manager.check_invariants()


def test_orca_max_batches_seven_requests():
    manager = paper_manager("max")
    assert manager.usage().capacity == paper.TABLE1_DERIVED["opt-13b"]["slots"]
    while manager.can_allocate(50, 60):
        manager.allocate(len(manager.running_ids), 50, 60)
    for trace in paper_figures.FIG13.values():
        assert len(manager.running_ids) == trace[paper.ORCA_MAX] == 7
    usage = manager.usage()
    assert usage.free == 87 * SIZE  # 64 + 16 + 4 + 2 + 1 blocks, and none of use to Max
    assert manager.num_free_blocks == 87
    refusal = "asks for 128 contiguous blocks; of 87 free"
    refused(manager, OutOfBlocksError, lambda: manager.allocate(7, 50, 60), refusal)
    assert not manager.refused_by_fragmentation(50, 60)  # 1,392 slots are not 2,048 at all


def test_the_buddy_rounds_blocks_up_to_a_power_of_two():
    manager = paper_manager("oracle")
    manager.allocate(0, 100, 130)  # 9 blocks, so a chunk of 16
    found = {"tokens": 100, "reserved": 30, "free": 15_728 - 256}
    assert parts(manager) == found | {"rounding": 256 - 130}
    usage = manager.usage()
    assert (usage.logical_tokens, usage.logical_blocks, usage.physical_blocks) == (100, 16, 16)
    assert usage.saved == 0.0
    pow2 = paper_manager("pow2")
    pow2.allocate(0, 100, 130)  # 100 + 32 slots
    assert parts(pow2) == found | {"internal": 2, "rounding": 256 - 132}


# ---- growth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(12))
def test_growth_against_a_plain_model(policy, seed):
    """Appends to one and to all, frees and arrivals, against {id: [length, final length]}."""
    rng = random.Random(seed)
    manager = BaselineCacheManager(32, 4, policy=policy, max_len=32)
    model = {}
    stopped = 0
    for seq_id in range(120):
        action = rng.choice(["allocate", "append", "append_all", "append_all", "free"])
        n = rng.randint(1, 3)
        if action == "allocate":
            length = rng.randint(1, 20)
            final = length + rng.randint(0, 12)
            if manager.can_allocate(length, final):
                manager.allocate(seq_id, length, final)
                model[seq_id] = [length, final]
        elif action == "append" and model:
            chosen = rng.choice(list(model))
            length, final = model[chosen]
            assert manager.can_append([chosen]) == (length < final)
            if length + n <= final:
                assert manager.append(chosen, n) == ()
                model[chosen][0] += n
            else:
                refused(manager, ReservationError, lambda c=chosen, n=n: manager.append(c, n))
        elif action == "append_all":
            if all(length + n <= final for length, final in model.values()):
                assert manager.append_all(n) == ()
                for entry in model.values():
                    entry[0] += n
            else:
                stopped += 1
                refused(manager, ReservationError, lambda n=n: manager.append_all(n))
        elif model:
            chosen = rng.choice(list(model))
            held = manager.reservation(chosen)
            blocks = list(range(held.start_block, held.start_block + held.num_blocks))
            assert manager.free(chosen) == blocks
            del model[chosen]
        manager.check_invariants()
        assert {i: manager.num_tokens(i) for i in manager.running_ids} == {
            i: length for i, (length, _) in model.items()
        }
        assert manager.can_append(list(model)) == all(a < b for a, b in model.values())
        usage = manager.usage()
        assert usage.tokens == usage.logical_tokens == sum(a for a, _ in model.values())
        assert usage.reserved == sum(b - a for a, b in model.values())
        asked = sum(manager.reservation(i).asked for i in model)
        assert usage.internal == asked - sum(b for _, b in model.values())
        assert (usage.internal == 0) or policy != "oracle"
    assert stopped > 0


@pytest.mark.parametrize("count", [0, -1, True, False, 1.0, None, "1"])
def test_counts_that_are_none(count):
    manager = BaselineCacheManager(32, 4, policy="max", max_len=32)
    manager.allocate(0, 3, 9)
    refused(manager, ValueError, lambda: manager.append(0, count))
    refused(manager, ValueError, lambda: manager.append_all(count))


def test_unknown_and_duplicate_ids():
    manager = BaselineCacheManager(32, 4, policy="max", max_len=32)
    manager.allocate(0, 3, 9)
    calls = [manager.reservation, manager.num_tokens, manager.start_slot, manager.append]
    calls += [manager.free, lambda i: manager.can_append([0, i])]
    calls += [lambda i: manager.reorder({0: i}), lambda i: manager.reorder({i: 0})]
    for call in calls:
        refused(manager, UnknownSequenceError, lambda call=call: call(5))
    refused(manager, DuplicateSequenceError, lambda: manager.allocate(0, 3, 9))


# ---- beam search ------------------------------------------------------------------------------


def test_reorder_copies_whole_reservations():
    """Section 4.4: without sharing, a beam that moves costs a copy of all its parent's K/V."""
    manager = BaselineCacheManager(32, 4, policy="oracle", max_len=32)
    for seq_id in range(4):
        manager.allocate(seq_id, 10, 16)
    slot = [manager.start_slot(seq_id) for seq_id in range(4)]
    assert slot == [4 * manager.reservation(seq_id).start_block for seq_id in range(4)]
    before = observable(manager)
    assert manager.reorder({0: 1, 1: 1, 2: 2, 3: 0}) == [
        (slot[1], slot[0], 10),
        (slot[0], slot[3], 10),
    ]
    assert manager.reorder({0: 1, 1: 0}) == [(slot[1], slot[0], 10), (slot[0], slot[1], 10)]
    assert manager.reorder({}) == []
    manager.append_all(2)
    assert manager.reorder({3: 2}) == [(slot[2], slot[3], 12)]
    manager.append(2)
    refused(manager, ReservationError, lambda: manager.reorder({0: 1, 3: 2}))
    assert observable(manager)["taken chunks"] == before["taken chunks"]


def test_beams_longer_than_the_numbers_that_python_shares():
    """Small integers are one object each; lengths above 256 are equal without being the same."""
    manager = BaselineCacheManager(64, 16, policy="oracle", max_len=512)
    for seq_id in range(2):
        manager.allocate(seq_id, 300, 400)
    slot = [manager.start_slot(seq_id) for seq_id in range(2)]
    assert manager.reorder({0: 1}) == [(slot[1], slot[0], 300)]
    big = 1000
    manager.free(0)
    manager.allocate(big, 300, 400)
    assert manager.reorder({big: int("1000")}) == []  # it continues itself


def test_what_a_reservation_tells_before_any_step():
    manager = BaselineCacheManager(32, 4, policy="oracle", max_len=32)
    manager.allocate(0, 3, 9)
    held = manager.reservation(0)
    assert (held.num_blocks, held.asked, held.final_len, held.start_len) == (4, 9, 9, 3)
    with pytest.raises(AttributeError):
        held.final = 10  # a slip of the pen
    manager.free(0)
    manager.allocate(1, 3, 9)
    assert manager.reservation(1) != held  # the same slots, but another sequence's


# ---- groups -----------------------------------------------------------------------------------


def group(first_id, count, prompt=5, output=4, generated=0, prefix=0):
    seqs = [Sequence(first_id + i, prompt, output, prefix, generated) for i in range(count)]
    return SequenceGroup(first_id, seqs)


def test_a_group_shares_nothing():
    manager = BaselineCacheManager(16, 4, policy="oracle", max_len=32)
    assert manager.admit(group(0, 3)) == ()
    assert manager.running_ids == [0, 1, 2]
    assert [manager.num_tokens(i) for i in range(3)] == [5, 5, 5]
    usage = manager.usage()
    assert (usage.tokens, usage.logical_tokens, usage.physical_blocks) == (15, 15, 12)
    # A shared prefix is stored again for every sequence.
    manager = BaselineCacheManager(16, 4, policy="oracle", max_len=32)
    manager.admit(group(0, 2, prefix=7))
    assert [manager.num_tokens(i) for i in range(2)] == [12, 12]
    assert manager.reservation(0).final_len == 16


def test_a_group_comes_back_with_what_it_had_generated():
    manager = BaselineCacheManager(64, 4, policy="pow2", max_len=64)
    seqs = [Sequence(i, 5, 20, 0, generated) for i, generated in enumerate((3, 7, 0, 4))]
    seqs[3].status = SequenceStatus.FINISHED
    manager.admit(SequenceGroup(0, seqs))
    assert manager.running_ids == [0, 1, 2]  # the finished one is not revived
    assert [manager.num_tokens(i) for i in range(3)] == [8, 12, 5]
    assert [manager.reservation(i).asked for i in range(3)] == [8 + 32, 12 + 16, 5 + 32]
    manager.check_invariants()


def test_a_group_with_an_id_in_use_or_too_long_changes_nothing():
    manager = BaselineCacheManager(64, 4, policy="oracle", max_len=32)
    manager.admit(group(0, 2))
    for ids in ([0], [1, 7], [7, 1]):  # also where others of the group come first
        arrived, said = SequenceGroup(0, [Sequence(i, 5, 4) for i in ids]), "[01] exists already"
        for admit in (manager.admit, manager.try_admit):
            refused(manager, DuplicateSequenceError, lambda a=admit, g=arrived: a(g), said)
    refused(manager, ReservationError, lambda: manager.admit(group(5, 2, output=28)))
    refused(manager, ReservationError, lambda: manager.can_admit(group(5, 2, output=28)))
    mixed = SequenceGroup(5, [Sequence(5, 5, 4), Sequence(6, 5, 28)])
    refused(manager, ReservationError, lambda: manager.admit(mixed))


def test_what_an_empty_pool_could_not_serve_is_refused_at_submission():
    manager = BaselineCacheManager(11, 4, policy="oracle", max_len=32)
    manager.allocate(9, 9, 32)
    refused(manager, OutOfBlocksError, lambda: manager.admit(group(0, 1, output=28 - 1)))
    manager.require_fits(group(0, 1, output=27))  # not now, but when the pool is empty
    manager.require_fits(group(0, 2))  # chunks of 4 blocks: the pool has two, and 2 + 1 left
    with pytest.raises(RequestTooLargeError, match="needs 3 chunks for 9 slots"):
        manager.require_fits(group(0, 3))
    with pytest.raises(RequestTooLargeError, match="the model's maximum is 32"):
        manager.require_fits(group(0, 1, output=28))


@pytest.mark.parametrize("seed", range(20))
def test_can_admit_is_what_admit_does(seed):
    rng = random.Random(seed)
    manager = BaselineCacheManager(rng.randint(8, 40), 2, policy="oracle", max_len=16)
    outcomes = set()
    for round_ in range(60):
        if manager.running_ids and rng.random() < 0.4:
            manager.free(rng.choice(manager.running_ids))
        arrived = group(100 * (round_ + 1), rng.randint(1, 3), rng.randint(1, 8), rng.randint(1, 8))
        outcome = manager.can_admit(arrived)
        outcomes.add(outcome)
        if outcome:
            manager.admit(arrived)
            manager.check_invariants()
        else:
            refused(manager, OutOfBlocksError, lambda g=arrived: manager.admit(g))
    assert outcomes == {True, False}


# ---- the invariants are seen to fail ----------------------------------------------------------


def corrupt_same_chunk(m):
    m._held[1].start_block = m._held[0].start_block


def corrupt_lost_chunk(m):
    m._buddy.chunk_order[16] = m._buddy.chunk_order.pop(m._held[0].start_block)
    # The buddy's own books stay right: the chunk at 16 was free, that of sequence 0 is now.
    del m._buddy.free_chunks[3][16]
    m._buddy.free_chunks[3][m._held[0].start_block] = None


def of_first(name, value):
    """A field of the first reservation that is wrong; `value` is given the manager."""
    return lambda m: setattr(m._held[0], name, value(m))


BASELINE_CORRUPTIONS = {
    "two sequences hold the same chunk": (corrupt_same_chunk,),
    "chunk lost": (corrupt_lost_chunk,),
    "length, final length, slots asked for": (
        of_first("start_len", lambda m: m._held[0].final_len - m._now + 1),
        of_first("start_len", lambda m: -m._now),
        of_first("start_len", lambda m: -m._now - 1),
        of_first("final_len", lambda m: m._held[0].asked + 1),
    ),
    "chunk smaller than asked for": (of_first("asked", lambda m: 33),),
    "chunk not the next power of two": (of_first("asked", lambda m: 16),),
    "sum of tokens": (add_to("_tokens"), add_to("_tokens", -1), add_to("_now"), add_to("_now", -1)),
    "sum of final lengths": (add_to("_final"), add_to("_final", -1)),
    "sum of slots asked for": (add_to("_asked"), add_to("_asked", -1)),
    # The first is full at 5, the second at 6.
    "the step at which the first reservation is full": (lambda m: setattr(m, "_full_at", 6),),
    "free and reserved blocks part the pool": (add_to("num_blocks"), add_to("num_blocks", -1)),
}


@pytest.mark.parametrize("message", BASELINE_CORRUPTIONS)
def test_the_invariants_catch(message):
    for corrupt in BASELINE_CORRUPTIONS[message]:
        manager = BaselineCacheManager(64, 4, policy="max", max_len=32)
        for seq_id in range(2):
            manager.allocate(seq_id, 5, 10 + seq_id)
        manager.append_all(2)
        assert sorted(manager._buddy.free_chunks[3]) == list(range(0, 48, 8))
        manager.check_invariants()
        corrupt(manager)
        with pytest.raises(AssertionError, match=pattern(message)):
            manager.check_invariants()


def test_the_invariants_check_the_buddy_too():
    manager = BaselineCacheManager(64, 4, policy="max", max_len=32)
    manager._buddy.num_free -= 1
    with pytest.raises(AssertionError, match="num_free is wrong"):
        manager.check_invariants()


def test_every_assert_of_the_invariants_is_seen_to_fail():
    messages = assert_messages(BaselineCacheManager.check_invariants)
    assert sorted(messages) == sorted(BASELINE_CORRUPTIONS)


def test_the_invariants_hold_of_long_reservations_and_of_many():
    """Small integers are one object each; counts above 256 are equal without being the same."""
    manager = BaselineCacheManager(1024, 1, policy="oracle", max_len=1024)
    manager.allocate(0, 10, 900)
    manager.check_invariants()
    manager.append_all(500)
    manager.append(0, 50)
    manager.check_invariants()
    assert manager.can_append([0])
    manager.append_all(340)
    assert not manager.can_append([0])
    refused(manager, ReservationError, manager.append_all)
    manager = BaselineCacheManager(512, 1, policy="oracle", max_len=8)
    for seq_id in range(300):
        manager.allocate(seq_id, 1, 1)
    manager.check_invariants()


def test_a_truncated_sequence_has_its_slots_to_fill_once_more():
    manager = BaselineCacheManager(8, 4, policy="oracle")
    manager.allocate(0, 3, 5)
    manager.append_all(2)
    assert manager.truncate(0, 2) == []
    manager.check_invariants()
    assert manager.append_all(3) == ()
    assert manager.num_tokens(0) == 5
