"""Regime items 7 and 9: the artifact's rules in worked examples; what can never run is refused."""

import random
from collections import Counter
from dataclasses import FrozenInstanceError, fields

import pytest
from manager_tools import fill, observable
from scheduler_tools import (
    MODES,
    SIZE,
    WIDE,
    check_state,
    finish,
    fresh,
    group,
    numbers,
    run_until,
    scheduler_of,
    step,
    submitted,
)

from kv_cache_manager import BaselineCacheManager, PagedKVCacheManager, RequestTooLargeError
from sequence import BeamHistory, SequenceStatus
from vllm_sim.serving.scheduler import Completion, Iteration, Limits, Scheduler, StalledError

# --- limits and iterations -----------------------------------------------------------------------


def test_the_least_limits_are_one_token_and_one_sequence():
    assert Limits(1, 1).max_batched_tokens == Limits(1, 1).max_num_seqs == 1
    for tokens, seqs in ((0, 1), (1, 0), (0, 0), (-1, 5)):
        with pytest.raises(ValueError, match="limits must be positive, got Limits"):
            Limits(tokens, seqs)


def test_limits_cannot_be_changed_and_take_no_other_names():
    limits = Limits(1, 1)
    with pytest.raises(FrozenInstanceError):
        limits.max_num_seqs = 2
    assert not hasattr(limits, "__dict__")


def test_an_iteration_does_nothing_until_told():
    iteration = Iteration(7, 1.5)
    assert (iteration.index, iteration.start_s, iteration.num_groups) == (7, 1.5, 0)
    others = [getattr(iteration, field.name) for field in fields(Iteration)[2:]]
    assert len(others) == 13 and not any(others)
    completion = Completion()
    assert not any(getattr(completion, field.name) for field in fields(Completion))
    completion.freed.append(1)
    assert Completion().freed == []  # a list of its own


def test_batched_requests_are_those_that_compute_a_prompt_or_a_token():
    iteration = Iteration(
        0, 0.0, prefills=[group(0, 1, [1])], decodes=[group(n, 1, [1]) for n in (1, 2)]
    )
    assert iteration.num_groups == 3


@pytest.mark.parametrize("one", [Iteration(0, 0.0), Completion()])
def test_a_name_that_it_has_not_cannot_be_set(one):
    """A slip of the pen in a counter's name would otherwise count nothing, and nobody would see."""
    with pytest.raises(AttributeError):
        one.num_swap = 1


# --- worked examples -----------------------------------------------------------------------------


def three_singles():
    """Three groups of one block each, which reach their last free block in the second step."""
    return [group(number, 4, [8], arrival_s=float(number)) for number in (0, 1, 2)]


def test_the_latest_arrived_gives_way_first():
    groups = three_singles()
    scheduler = scheduler_of(reversed(groups), 6)  # submitted in the wrong order
    first = scheduler.schedule()
    assert numbers(first.prefills) == [0, 1, 2]
    scheduler.complete()
    second, _ = step(scheduler)
    assert second.num_recomputations == 0 and scheduler.manager.num_free_blocks == 0
    # All have room in their last block, yet each asks for a block that could be taken.
    third, _ = step(scheduler)
    assert third.num_recomputations == 1
    assert numbers(third.decodes) == [0, 1] and numbers(scheduler.waiting) == [2]
    assert finish(scheduler) == [0, 1, 2]
    assert groups[0].num_preemptions == 0, "the first to arrive never gives way"


@pytest.mark.parametrize(
    ("arrivals", "order"),
    [({0: 5.0, 1: 4.0, 2: 3.0}, [2, 1, 0]), ({5: 0.0, 3: 0.0, 4: 0.0}, [3, 4, 5])],
)
def test_by_arrival_whatever_the_numbers_and_by_number_where_those_are_equal(arrivals, order):
    scheduler = scheduler_of([group(n, 4, [8], at) for n, at in arrivals.items()], 6)
    assert numbers(scheduler.waiting) == order
    iteration = run_until(scheduler, lambda i: i.num_recomputations)
    assert numbers(iteration.decodes) == order[:2]


def test_a_group_is_swapped_out_and_in_as_a_whole():
    first, second = group(0, 4, [10]), group(1, 6, [9, 9, 9], arrival_s=1.0)
    scheduler = scheduler_of([first, second], 13, mode="swap", cpu=13)
    out = run_until(scheduler, lambda i: i.num_swaps)
    assert numbers(scheduler.swapped) == [1]
    assert [seq.status for seq in second.seqs] == [SequenceStatus.SWAPPED] * 3
    assert scheduler.manager.running_ids == [0]
    assert scheduler.manager.num_free_cpu_blocks == 13 - len(out.swapped_out) < 13
    scheduler.complete()
    back = run_until(scheduler, lambda i: i.swapped_in)
    assert len(back.swapped_in) == len(out.swapped_out)
    assert [seq.status for seq in second.seqs] == [SequenceStatus.RUNNING] * 3
    assert 1 in numbers(back.decodes), "a group that is back grows in the same iteration"
    scheduler.complete()
    finish(scheduler)
    assert first.finished and second.finished


def test_nothing_is_admitted_while_anything_is_swapped():
    groups = [group(0, 4, [12]), group(1, 4, [8, 8], 1.0), group(2, 1, [1], 2.0)]
    scheduler = scheduler_of(groups[:2], 8, mode="swap", cpu=8)
    run_until(scheduler, lambda i: i.num_swaps)
    scheduler.complete()
    scheduler.add(groups[2])  # one block: it would fit beside group 0 at any time
    waited = 0
    while scheduler.swapped:
        iteration = scheduler.schedule()
        if scheduler.swapped:
            waited += 1
            assert scheduler.manager.can_admit(groups[2])
            assert numbers(scheduler.waiting) == [2] and not iteration.prefills
        scheduler.complete()
    assert waited >= 2 and groups[2].seqs[0].num_generated == 1
    assert finish(scheduler) == [1]


def test_nothing_returns_in_the_iteration_in_which_something_was_swapped_out():
    """Group 2 is swapped, then group 1: group 2's place would be free, yet nobody comes back."""
    groups = [group(n, 4, [12, 12], float(n)) for n in range(3)]
    scheduler = scheduler_of(groups, 13, mode="swap", cpu=13)
    swaps = 0
    while not scheduler.idle:
        iteration, _ = step(scheduler)
        assert not (iteration.swapped_out and iteration.swapped_in)
        swaps += iteration.num_swaps
    assert swaps >= 2


def test_not_even_if_there_would_be_room_for_it():
    """At the turn of group 0 a block for each of its four must be free, of which it takes none."""
    groups = [group(0, 6, [9] * 4), group(1, 5, [9], 1.0)]
    scheduler = scheduler_of(groups, 40, mode="swap", cpu=40)
    step(scheduler)
    step(scheduler)
    fill(scheduler.manager, leave=3)
    iteration, _ = step(scheduler)
    assert (iteration.num_swaps, iteration.swapped_in) == (1, ())
    assert scheduler.manager.can_swap_in([100])


@pytest.mark.parametrize("cpu", [0, 1])
def test_a_full_cpu_pool_falls_back_to_recomputation(cpu):
    groups = [group(0, 4, [8]), group(1, 5, [8, 8], 1.0)]
    scheduler = scheduler_of(groups, 8, mode="swap", cpu=cpu)
    iteration = run_until(scheduler, lambda i: i.num_recomputations)
    assert iteration.num_swaps == 0 and not iteration.swapped_out and iteration.freed
    assert numbers(scheduler.waiting) == [1] and not scheduler.swapped
    assert scheduler.manager.num_free_cpu_blocks == cpu
    scheduler.complete()
    assert finish(scheduler) == [0, 1]


@pytest.mark.parametrize(
    ("mode", "outputs", "swaps"),
    [
        ("auto", [8], 0),
        ("auto", [8, 8], 1),
        ("auto", [1, 8], 0),  # one of two is finished: what is left is a single sequence
        ("swap", [8], 1),
        ("recompute", [8, 8], 0),
    ],
)
def test_how_each_mode_preempts(mode, outputs, swaps):
    groups = [group(0, 4, [8, 8]), group(1, 5, outputs, 1.0)]
    scheduler = scheduler_of(groups, 9, mode=mode, cpu=9)
    iteration = run_until(scheduler, lambda i: i.num_swaps + i.num_recomputations)
    assert (iteration.num_swaps, iteration.num_recomputations) == (swaps, 1 - swaps)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="preemption is one of"):
        Scheduler(PagedKVCacheManager(4, 4), WIDE, "drop")


def test_a_recomputed_group_returns_with_prompt_and_output_and_finished_stay_finished():
    first, second = group(0, 4, [9]), group(1, 5, [2, 8, 8], 1.0)
    scheduler = scheduler_of([first, second], 9, mode="recompute")
    run_until(scheduler, lambda i: i.num_recomputations)
    done, *others = second.seqs
    assert done.status is SequenceStatus.FINISHED and done.num_generated == 2
    generated = others[0].num_generated
    assert 2 <= generated < 8 and others[1].num_generated == generated
    assert [seq.status for seq in others] == [SequenceStatus.WAITING] * 2
    scheduler.complete()
    again = run_until(scheduler, lambda i: 1 in numbers(i.prefills))
    assert 1 not in numbers(again.decodes), "prompt and output come back as one prompt"
    for seq in others:
        # One prefill brings back all of it; nothing was generated while it waited.
        assert scheduler.manager.num_tokens(seq.seq_id) == 5 + generated == seq.num_tokens
    assert done.seq_id not in scheduler.manager.running_ids
    scheduler.complete()
    finish(scheduler)
    assert [seq.num_generated for seq in second.seqs] == [2, 8, 8]


def test_the_latest_group_may_have_to_preempt_itself():
    """Group 0 has its slot; at the turn of group 1, the last, nothing is left for it."""
    groups = [group(0, 4, [8]), group(1, 6, [5], 1.0)]
    scheduler = scheduler_of(groups, 4)
    assert numbers(scheduler.schedule().prefills) == [0, 1]
    scheduler.complete()
    iteration = scheduler.schedule()
    assert numbers(iteration.decodes) == [0] and numbers(scheduler.waiting) == [1]
    assert iteration.num_recomputations == 1 and not iteration.prefills
    assert scheduler.manager.can_admit(groups[1]), "it would fit again, but has just given way"
    scheduler.complete()
    assert finish(scheduler) == [0, 1]


def test_a_swapped_group_needs_a_block_more_for_each_sequence_and_the_watermark():
    # A filler takes the blocks that growth would take later; group 0 stays within its first.
    groups = [group(0, 1, [20]), group(1, 4, [9, 9], 1.0)]
    scheduler = scheduler_of(groups, 20, mode="swap", cpu=20, watermark=0.1)
    manager, filler = scheduler.manager, 10**6
    step(scheduler)
    fill(manager, leave=1)
    iteration, _ = step(scheduler)
    assert iteration.num_swaps == 1 and len(iteration.swapped_out) == 1
    # It has one block, each of its sequences asks for another, and two are the watermark.
    for leave in (4, 5):
        manager.free(filler)
        fill(manager, leave)
        iteration, _ = step(scheduler)
        assert len(iteration.swapped_in) == (leave == 5)


def test_admission_leaves_the_watermark_and_growth_takes_it():
    groups = [group(n, 8, [12], float(n)) for n in range(4)]
    scheduler = scheduler_of(groups, 10, watermark=0.2)
    assert numbers(scheduler.schedule().prefills) == [0, 1, 2, 3]  # 2 of 10 blocks stay free
    scheduler = scheduler_of([group(n, 8, [8], float(n)) for n in range(4)], 9, watermark=0.23)
    assert numbers(scheduler.schedule().prefills) == [0, 1, 2]
    scheduler.complete()
    iteration = scheduler.schedule()
    assert numbers(iteration.decodes) == [0, 1, 2]
    assert scheduler.manager.num_free_blocks == 0 < scheduler.manager.watermark_blocks


def test_the_first_that_does_not_fit_stops_admission():
    """First come, first served: the small group behind a large one waits with it."""
    groups = [group(0, 8, [4]), group(1, 30, [2], 1.0), group(2, 1, [1], 2.0)]
    scheduler = scheduler_of(groups, 10, watermark=0.1)
    assert numbers(scheduler.schedule().prefills) == [0]
    assert numbers(scheduler.waiting) == [1, 2] and scheduler.manager.can_admit(groups[2])


def test_prompt_and_decode_tokens_share_one_limit():
    limits = Limits(max_batched_tokens=20, max_num_seqs=256)
    groups = [group(0, 9, [5, 5]), group(1, 11, [5], 1.0), group(2, 1, [2], 2.0)]
    scheduler = scheduler_of(groups, 60, limits=limits)
    # A prompt counts once for the whole group: 9 + 11 = 20, and the third has no room.
    assert numbers(scheduler.schedule().prefills) == [0, 1]
    scheduler.complete()
    late = [group(3, 16, [4], 3.0), group(4, 1, [2], 4.0)]
    for one in late:
        scheduler.add(one)
    # Three decode tokens, one of prompt: group 3 is exactly the 16 that are left.
    iteration = scheduler.schedule()
    assert numbers(iteration.prefills) == [2, 3] and numbers(scheduler.waiting) == [4]


def test_a_recomputed_group_counts_its_longest_sequence_once():
    limits = Limits(max_batched_tokens=16, max_num_seqs=256)
    first, second = group(0, 4, [9]), group(1, 5, [8, 8], 1.0)
    scheduler = scheduler_of([first, second], 8, mode="recompute", limits=limits)
    run_until(scheduler, lambda i: i.num_recomputations)
    scheduler.complete()
    again = run_until(scheduler, lambda i: 1 in numbers(i.prefills))
    longest = max(seq.num_tokens for seq in second.seqs)
    decoding = sum(len(one.unfinished()) for one in again.decodes)
    assert longest > 5 and longest + decoding <= 16 < 2 * longest + decoding


def test_the_sequence_cap_counts_running_groups_and_the_new_sequences():
    """As the artifact: groups that run, plus the sequences of the next, so 8 may run under 5."""
    limits = Limits(2560, 5)
    groups = [group(n, 4, [4] * 4, float(n)) for n in range(3)]
    scheduler = scheduler_of(groups, 99, limits=limits)
    assert numbers(scheduler.schedule().prefills) == [0, 1]  # 0 + 4 and 1 + 4; 2 + 4 is too many


def test_the_sequence_cap_holds_for_groups_that_return_too():
    groups = [group(0, 1, [6]), group(1, 4, [9, 9], 1.0)]
    scheduler = scheduler_of(groups, 20, mode="swap", cpu=20)
    step(scheduler)
    fill(scheduler.manager, leave=1)
    assert step(scheduler)[0].num_swaps == 1
    scheduler.manager.free(10**6)
    scheduler.limits = Limits(2560, 2)  # 1 running group and 2 sequences are now too many
    waited = 0
    while scheduler.running:
        assert scheduler.manager.can_swap_in([100, 101])
        assert not step(scheduler)[0].swapped_in
        waited += 1
    assert waited == 4 and step(scheduler)[0].swapped_in


def test_the_last_token_is_never_stored():
    groups = [group(0, 5, [1, 3, 6]), group(1, 3, [4], 1.0, prefix=(9, 6))]
    manager = PagedKVCacheManager(30, SIZE, watermark=0.0)
    manager.allocate_prefix(9, 6)
    scheduler = submitted(groups, manager)
    final = {}
    while not scheduler.idle:
        scheduler.schedule()
        final |= {i: manager.num_tokens(i) for i in manager.running_ids}
        scheduler.complete()
    assert final == {0: 5, 1: 7, 2: 10, 100: 12}  # prefix + prompt + output - 1


def test_equal_lengths_finish_in_order_of_arrival():
    for mode in MODES:
        groups = [group(n, 6, [7], float(n)) for n in range(7)]
        order = finish(scheduler_of(reversed(groups), 12, mode=mode, cpu=6))
        assert order == list(range(7)), mode
        assert sum(one.num_preemptions for one in groups) > 0, mode


@pytest.mark.parametrize("policy", ["max", "pow2", "oracle"])
def test_contiguous_reservations_never_preempt(policy):
    rng = random.Random(policy)
    manager = BaselineCacheManager(32, 2, policy=policy, max_len=16)
    groups = [
        group(n, rng.randint(1, 8), [rng.randint(1, 8)] * rng.randint(1, 4)) for n in range(40)
    ]
    scheduler = submitted(groups, manager, Limits(64, 8))
    blocked = 0
    while not scheduler.idle:
        iteration, _ = step(scheduler)
        assert (iteration.num_swaps, iteration.num_recomputations) == (0, 0)
        assert not (iteration.copies or iteration.freed or iteration.swapped_out)
        blocked += bool(scheduler.waiting)
    assert blocked and all(one.finished for one in groups)
    assert manager.usage().free == 64


# --- what can never run is refused ---------------------------------------------------------------

# What is submitted at a limit, the same one beyond it, and what refuses it: 12 blocks of 4, one of
# them the watermark, two a shared prefix of 6 tokens; at most 22 tokens and 4 sequences.
BOUNDARIES = {
    "prompt tokens": (group(1, 22, [9]), group(1, 23, [9]), "23 tokens"),
    "prompt tokens behind a prefix": (
        group(1, 22, [9], prefix=(9, 6)),
        group(1, 23, [9], prefix=(9, 6)),
        "23 tokens",
    ),
    "sequences": (group(1, 3, [2] * 4), group(1, 3, [2] * 5), "5 sequences"),
    # 20 stored tokens each are 2 x 5 blocks, 1 of them shared; one goes on with fewer.
    "blocks": (group(1, 4, [17, 19]), group(1, 4, [18, 19]), "need 11 blocks"),
    # 24 stored tokens are 2 x 6 blocks, of which 1 is the prefix's and 1 is shared: the prefix's
    # part-filled block is copied.
    "blocks behind a prefix": (
        group(1, 3, [16, 20], prefix=(9, 6)),
        group(1, 3, [17, 20], prefix=(9, 6)),
        "need 11 blocks",
    ),
}


def tight_scheduler(mode="auto"):
    manager = PagedKVCacheManager(12, SIZE, num_cpu_blocks=12, watermark=0.1)
    manager.allocate_prefix(9, 6)
    return Scheduler(manager, Limits(22, 4), mode)


@pytest.mark.parametrize("name", BOUNDARIES)
def test_at_the_limit_it_is_accepted_and_finishes_alone(name):
    scheduler = tight_scheduler()
    one = fresh(BOUNDARIES[name][0])
    scheduler.add(one)
    assert finish(scheduler, at_most=max(seq.output_len for seq in one.seqs)) == [1]
    assert one.num_preemptions == 0


@pytest.mark.parametrize("name", BOUNDARIES)
def test_beyond_the_limit_it_is_refused_and_nothing_has_changed(name):
    scheduler = tight_scheduler()
    scheduler.add(group(0, 5, [2]))
    scheduler.schedule()
    before = observable(scheduler.manager)
    lists = [numbers(scheduler.waiting), numbers(scheduler.running), scheduler.num_iterations]
    one, why = fresh(BOUNDARIES[name][1]), BOUNDARIES[name][2]
    for refuse in (scheduler.add, scheduler.check):
        with pytest.raises(RequestTooLargeError, match=f"request 1.* {why}"):
            refuse(one)
    assert observable(scheduler.manager) == before
    after = [numbers(scheduler.waiting), numbers(scheduler.running), scheduler.num_iterations]
    assert after == lists
    assert all(seq.status is SequenceStatus.WAITING for seq in one.seqs)
    scheduler.complete()
    assert finish(scheduler) == [0]


def test_a_request_at_the_limit_of_blocks_survives_any_company():
    for mode in MODES:
        scheduler = tight_scheduler(mode)
        groups = [fresh(BOUNDARIES["blocks"][0]), *(group(n, 4, [9], float(n)) for n in (2, 3, 4))]
        for number, one in enumerate(groups):
            one.group_id = number
            for i, seq in enumerate(one.seqs):
                seq.seq_id = 100 * number + i
            scheduler.add(one)
        assert sorted(finish(scheduler, at_most=12 + 19 + 3 * 9)) == [0, 1, 2, 3]


@pytest.mark.parametrize("policy", ["max", "pow2", "oracle"])
def test_contiguous_too_large(policy):
    manager = BaselineCacheManager(24, 1, policy=policy, max_len=8)
    scheduler = Scheduler(manager, WIDE)
    for accepted in ([4, 4, 4], [1]):
        scheduler.check(group(0, 4, accepted))
    for refused in ([5], [4, 4, 4, 4]):  # longer than the model's maximum; three chunks of 8
        with pytest.raises(RequestTooLargeError, match="request 7"):
            scheduler.add(group(7, 4, refused))
    assert scheduler.idle


def test_before_anything_is_scheduled():
    scheduler = scheduler_of([], 6)
    assert scheduler.idle and not scheduler.short_of_blocks
    assert scheduler.num_iterations == scheduler.context_tokens == scheduler.quiet_steps() == 0


def test_what_an_iteration_is_told():
    scheduler = scheduler_of([group(0, 4, [2])], 6)
    assert scheduler.schedule().start_s == 0.0
    scheduler.complete()
    iteration = scheduler.schedule(7.5)
    assert (iteration.index, iteration.start_s) == (1, 7.5)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_who_gives_way_is_short_of_blocks(mode):
    scheduler = scheduler_of(three_singles(), 4, mode=mode, cpu=4)
    step(scheduler)
    assert not scheduler.short_of_blocks
    run_until(scheduler, lambda i: i.num_swaps or i.num_recomputations)
    assert scheduler.short_of_blocks


def test_an_arrival_ends_the_quiet_unless_it_is_behind_one_that_waits():
    scheduler = scheduler_of([group(0, 4, [20])], 30)
    step(scheduler)
    step(scheduler)
    assert scheduler.quiet_steps() > 0
    scheduler.add(group(1, 12, [2], 1.0))
    assert scheduler.quiet_steps() == 0  # it may be admitted at once
    fill(scheduler.manager, leave=2)
    step(scheduler)
    quiet = scheduler.quiet_steps()
    assert scheduler.short_of_blocks and quiet > 0
    scheduler.add(group(2, 4, [2], 2.0))
    assert scheduler.quiet_steps() == quiet


def test_it_stays_quiet_when_a_sequence_ends_for_which_nobody_waits():
    scheduler = scheduler_of([group(0, 4, [2]), group(1, 4, [9], 1.0)], 30)
    step(scheduler)
    assert numbers(step(scheduler)[1].finished) == [0]
    assert scheduler.quiet_steps() == 7


def test_it_is_quiet_as_long_as_a_block_is_left_for_the_widest_group():
    """Two blocks are taken on the way, and the last turn asks for one that it does not take."""
    for free, quiet in ((3, 7), (2, 4)):
        scheduler = scheduler_of([group(0, 4, [8])], 30)
        step(scheduler)
        fill(scheduler.manager, leave=free)
        assert scheduler.quiet_steps() == quiet


def test_it_is_quiet_at_the_sequence_cap_but_not_at_the_token_limit():
    """Under the cap nothing changes until a sequence ends; prompt tokens count in one iteration."""
    for limits, waits in ((Limits(2560, 1), True), (Limits(30, 9), False)):
        groups = [group(0, 16, [8]), group(1, 16, [8], 1.0)]
        scheduler = scheduler_of(groups, 60, limits=limits)
        step(scheduler)
        assert numbers(scheduler.waiting) == [1]
        assert (scheduler.quiet_steps() > 0) == waits


def test_a_beam_search_of_one_beam_and_one_longer_than_the_numbers_that_python_shares():
    for outputs in ([6], [300, 300]):
        parents = [[*range(len(outputs))]] * outputs[0]
        scheduler = scheduler_of([group(0, 4, outputs, parents=parents)], 200)
        assert finish(scheduler) == [0]
        assert scheduler.num_iterations == outputs[0]


def test_groups_are_counted_only_where_blocks_are_short():
    """And where all are equally wide, only those that give way and the last that stays."""
    scheduler = scheduler_of([group(n, 4, [12], float(n)) for n in range(50)], 400)
    asked, count = [], scheduler.manager.blocks_for_append
    scheduler.manager.blocks_for_append = lambda ids: asked.append(ids) or count(ids)
    for _ in range(5):
        step(scheduler)
    fill(scheduler.manager, leave=51)
    assert len(step(scheduler)[0].decodes) == 50 and asked == []  # 50 blocks, and one is left
    for _ in range(3):
        step(scheduler)
    iteration, _ = step(scheduler)  # all of them need another block
    assert iteration.num_recomputations == len(asked) - 1 > 0


def test_only_beams_that_move_are_reordered_however_many_there_are():
    """Nor is one at the first token, which comes from the prompt that all of them have."""
    moves = [1, *range(1, 300)]
    beams = group(0, 4, [3] * 300, parents=[moves, moves, [*range(300)]])
    scheduler = scheduler_of([beams], 700, limits=Limits(2560, 400))
    assert [step(scheduler)[1].reorders for _ in range(2)] == [[], [{0: 1}]]
    assert finish(scheduler) == [0]


def test_without_sharing_every_sequence_computes_the_prompt():
    contiguous = BaselineCacheManager(64, 2, policy="oracle", max_len=16)
    for manager, tokens in ((PagedKVCacheManager(99, SIZE), 5), (contiguous, 3 * 5)):
        scheduler = Scheduler(manager, Limits(2560, 256))
        scheduler.add(group(0, 5, [2] * 3))
        iteration = scheduler.schedule()
        assert (iteration.prompt_tokens, iteration.num_seqs) == (tokens, 3)


def test_more_groups_than_python_shares_numbers():
    """Singles and a pair, so that turns are counted one by one, and the last ones give way."""
    groups = [group(0, 4, [3, 3]), *(group(n, 4, [3], float(n)) for n in range(1, 301))]
    scheduler = scheduler_of(groups, 301 + 292, limits=Limits(2560, 400))
    iteration, _ = step(scheduler)
    assert len(iteration.prefills) == 301
    iteration, _ = step(scheduler)
    assert 256 < len(iteration.decodes) < 301 and numbers(iteration.decodes)[0] == 0
    assert sorted(finish(scheduler)) == list(range(301))


def test_stalled_is_raised_rather_than_turning_for_ever():
    """It takes someone who takes blocks behind the scheduler's back."""
    scheduler = scheduler_of([group(0, 8, [4])], 6)
    scheduler.manager.allocate_prefix(9, 5 * SIZE)
    with pytest.raises(StalledError, match="nothing can be admitted"):
        scheduler.schedule()


# --- sequences that end before their length ------------------------------------------------------


class Growing(BeamHistory):
    """The parents of a search that goes on: a move may come with any step."""

    def next_move(self, step):
        return step


def told(one, seen):
    """What an iteration of a scheduler did, and what was completed with it."""
    iteration, completion = one
    names = "swapped_out", "freed", "swapped_in", "copies", "num_swaps", "num_recomputations"
    seen.update({name: len(getattr(iteration, name)) for name in names[:4]})
    groups = numbers(iteration.prefills), numbers(iteration.decodes), numbers(completion.finished)
    moves = completion.reorders, completion.moves, completion.freed
    return [getattr(iteration, name) for name in names], groups, moves


def test_who_is_told_of_an_end_decides_as_one_who_knew_it_all_along():
    """End-of-sequence tokens, and beams whose parents are known step by step (a real model)."""
    seen = Counter()
    for seed in range(150):
        rng = random.Random(seed)
        knowing, hearing, ends = [], [], {}
        for number in range(8):
            kind, prompt_len = rng.choice(("single", "samples", "beams")), rng.randint(1, 9)
            outputs = [rng.randint(1, 12) for _ in range(1 if kind == "single" else 3)]
            parents = None
            if kind == "beams":
                outputs = outputs[:1] * 3
                parents = [[rng.randrange(3) for _ in range(3)] for _ in range(outputs[0])]
            knowing.append(group(number, prompt_len, outputs, parents=parents))
            longer = [max(outputs) + rng.randint(0, 3)] * len(outputs)
            live = Growing() if kind == "beams" else None
            hearing.append(group(number, prompt_len, longer, parents=live))
            ends[number] = outputs
        mode = rng.choice(MODES)
        options = {"mode": mode, "cpu": rng.choice((0, 12, 40)), "num_blocks": 30}
        one, other = scheduler_of(knowing, **options), scheduler_of(hearing, **options)
        while not one.idle:
            expected = told(step(one), seen)
            iteration = other.schedule()
            for running in (*iteration.prefills, *iteration.decodes):
                seqs, outputs = running.unfinished(), ends[running.group_id]
                if running.beam_parents is not None:
                    known = knowing[running.group_id].beam_parents[seqs[0].num_generated]
                    running.beam_parents.append(known)
                by_id = dict(zip((seq.seq_id for seq in running.seqs), outputs))
                done = [seq for seq in seqs if seq.num_generated + 1 == by_id[seq.seq_id]]
                other.end(running, done)
                seen["ended"] += len([seq for seq in done if seq.num_generated > 0])
            check_state(other)
            assert told((iteration, other.complete()), seen) == expected, f"seed {seed}"
        assert other.idle
    assert min(seen[name] for name in ("swapped_out", "freed", "copies", "ended")) > 100
