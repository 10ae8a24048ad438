"""Regime items 4 and 9 for the serving loop: every workload of a small world, on every small pool.

A world is three requests, each one of a few kinds (a prompt of one to three tokens; one sample,
two, two of unlike lengths, a beam search; perhaps behind a shared prefix), a few arrivals, and
pools of blocks of two slots in which the three do not fit together; some not even alone, which are
refused. All are tried in all orders, under each way of preempting; nothing here is random.

Each is served three times. test_scheduler_reference.py runs it beside a scheduler that shares no
line with ours and compares the two in every iteration; it checks that every iteration generates a
token, that the first to have arrived never gives way, that all is done in the time that serving one
after another would take, and that every block is free again in the end. Then `simulate` serves it
iteration by iteration with all invariants checked, and event by event, with the same result.
Prompts in parts have a search of their own (no budget is exceeded, no token of a prompt computed
twice unless it gave way), and so has the contiguous manager, which never preempts.

    python -m pytest -m slow tests/serving/test_exhaustive_serving.py     # more kinds
"""

import time
from collections import Counter, namedtuple
from itertools import product

import pytest
from scheduler_tools import MODES, check_state, group
from test_event_driven import assert_same, both
from test_scheduler_reference import run_beside_naive

from kv_cache_manager import (
    BaselineCacheManager,
    CacheError,
    OutOfBlocksError,
    PagedKVCacheManager,
    RequestTooLargeError,
)
from sequence import SequenceGroup
from vllm_sim.serving.latency import LatencyModel
from vllm_sim.serving.scheduler import Limits, Scheduler, StalledError

SIZE = 2
PREFIX = (10**6, 3)
BEAMS = [[0, 0], [1, 1], [1, 0]]  # parents after each token: one takes over, the other, a swap
Kind = namedtuple("Kind", "prompt_len outputs parents behind", defaults=(None, False))
SMALL_KINDS = (
    Kind(1, (1, 3)),
    Kind(1, (3, 3), BEAMS),
    Kind(3, (3, 3)),
    Kind(1, (4,), None, True),
)
KINDS = (Kind(1, (5,)), *SMALL_KINDS) + tuple(
    Kind(prompt_len, outputs) for prompt_len in (1, 2) for outputs in ((1,), (3,), (6,), (2, 2))
)
# GPU blocks, CPU blocks, watermark; two blocks more hold the prefix.
POOLS = ((5, 5, 0.25), (6, 6, 0.0), (5, 2, 0.0), (6, 1, 0.2), (4, 0, 0.0))
ARRIVALS = ((0.0, 0.0, 0.0), (0.0, 0.0, 3.0), (0.0, 1.0, 4.0))
LIMITS = (Limits(max_batched_tokens=7, max_num_seqs=3), Limits(12, 6))
# What must have come to bear, or the search proved little.
RULES = (
    "refused, itself, not at once, swapped, recomputed, copied, watermark, token limit, cap "
    "on admission, too tight to return, finished stay finished, fall back to recomputation, "
    "admission waits for swapped, arrival while swapped, arrival while recomputed, one of two "
    "swapped returns, second preemption, prefix"
)


def groups_of(chosen, times):
    return [
        group(
            number, kind.prompt_len, kind.outputs, at, PREFIX if kind.behind else None, kind.parents
        )
        for number, (kind, at) in enumerate(zip(chosen, times))
    ]


def worlds(kinds):
    """Every workload, in the form of `random_workload`; groups are made anew at each call."""
    for (num_blocks, cpu, watermark), limits, mode in product(POOLS, LIMITS, MODES):
        for times, chosen in product(ARRIVALS, product(kinds, repeat=3)):
            prefix = PREFIX if any(kind.behind for kind in chosen) else None
            blocks = num_blocks + (2 if prefix else 0)

            def workload(
                _,
                given=(blocks, SIZE, cpu, watermark, prefix, limits, mode),
                chosen=chosen,
                times=times,
            ):
                return (*given, groups_of(chosen, times))

            yield workload


def note(log, seen, arrivals):
    """What the comparison does not count itself: who met whom, from the log of all iterations."""
    swapped, recomputed, times = set(), set(), Counter()
    for now, happened in enumerate(log):
        if now and now in arrivals:
            seen["arrival while swapped"] += bool(swapped)
            seen["arrival while recomputed"] += bool(recomputed)
        before = len(swapped)
        swapped = swapped - {*happened["in"]} | {*happened["out"]}
        seen["one of two swapped returns"] += before == 2 and len(happened["in"]) == 1
        recomputed = recomputed - {*happened["admitted"]} | {*happened["recomputed"]}
        times.update([*happened["out"], *happened["recomputed"]])
    seen["second preemption"] += any(n > 1 for n in times.values())


def search(kinds):
    """Serves them all; returns how often each rule came to bear, and what it went through."""
    begin, seen = time.process_time(), Counter()
    count = whole = iterations = 0
    for workload in worlds(kinds):
        log, rules = run_beside_naive(count, workload)
        *pool, limits, mode, groups = workload(count)
        seen.update(rules)
        note(log, seen, {one.arrival_s for one in groups})
        seen["prefix"] += any(one.prefix_id is not None for one in groups)
        simulated(pool, limits, mode, workload, rules["refused"])
        count, iterations = count + 1, iterations + len(log)
        whole += rules["refused"] == 0
    seen |= {"workloads": count, "with all three requests": whole, "iterations": iterations}
    seen["seconds"] = round(time.process_time() - begin, 1)
    return seen


def simulated(pool, limits, mode, workload, refused):
    """`simulate` over the same workload, iteration by iteration and event by event."""
    num_blocks, size, cpu, watermark, prefix = pool

    def make():
        manager = PagedKVCacheManager(num_blocks, size, num_cpu_blocks=cpu, watermark=watermark)
        if prefix:
            manager.allocate_prefix(*prefix)
        return manager

    results = both(lambda: workload(0)[-1], make, limits, LatencyModel(1.0), mode, (0.0, 1e9))
    assert_same(*results)
    assert len(results[0].finish_s) == 3 - refused


@pytest.mark.parametrize(
    "kinds", [SMALL_KINDS, pytest.param(KINDS, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_every_workload_of_a_world(kinds, figure):
    seen = search(kinds)
    count = len(kinds) ** 3 * len(ARRIVALS) * len(POOLS) * len(LIMITS) * len(MODES)
    assert seen["workloads"] == count
    assert {rule for rule in RULES.split(", ") if not seen[rule]} == set()
    told = "workloads", "with all three requests", "iterations", "swapped", "recomputed", "copied"
    numbers = {name: seen[name] for name in (*told, "seconds")}
    figure(f"serving, {len(kinds)} kinds of requests", **numbers)


# ---- prompts part by part -----------------------------------------------------------------------

CHUNKED = Limits(3, 3, chunked=True), Limits(4, 3, chunked=True), Limits(9, 6, chunked=True)
LONG_KINDS = Kind(5, (1, 3)), Kind(6, (3,)), Kind(1, (7,)), Kind(4, (3, 3), BEAMS)


def in_parts(pool, limits, mode, groups, seen):
    """Served in parts and checked in every iteration."""
    num_blocks, cpu, watermark = pool
    manager = PagedKVCacheManager(num_blocks, SIZE, num_cpu_blocks=cpu, watermark=watermark)
    scheduler = Scheduler(manager, limits, mode)
    queue = list(groups)
    for one in queue:
        scheduler.check(one)
    left = {one.group_id: sum(seq.output_len for seq in one.seqs) for one in queue}
    now = under_way = 0  # tokens computed of a prompt that is not yet whole
    while queue or not scheduler.idle:
        while queue and (queue[0].arrival_s <= now or scheduler.idle):
            scheduler.enqueue(queue.pop(0))
        preempted = {one.group_id: one.num_preemptions for one in scheduler.waiting}
        it = scheduler.schedule(float(now))
        check_state(scheduler)
        assert it.num_decodes + it.prompt_tokens <= limits.max_batched_tokens
        assert it.num_seqs <= limits.max_num_seqs
        assert sum(tokens for _, tokens in it.parts) == it.prompt_tokens
        dropped = any(g.num_preemptions > preempted.get(g.group_id, 99) for g in scheduler.waiting)
        assert it.num_decodes or it.parts, "an iteration without any progress"
        if dropped:
            assert under_way and not it.parts
            under_way = 0
        if it.parts:
            assert [before for before, _ in it.parts] == [under_way] + [0] * (len(it.parts) - 1)
        under_way += it.prompt_tokens
        for one in it.prefills:
            under_way -= one.own_prompt_len + sum(seq.num_generated for seq in one.unfinished())
        assert (under_way > 0) == (len(it.parts) > len(it.prefills) or (under_way and not it.parts))
        assert not under_way or scheduler.quiet_steps() == 0
        for one in scheduler.running:
            left[one.group_id] -= len(one.unfinished())
        scheduler.complete()
        seen["in parts"] += len(it.parts) > len(it.prefills)
        seen["part gave way"] += dropped
        seen["part beside decodes"] += bool(it.parts and it.num_decodes)
        seen["part and another prompt"] += len(it.parts) > max(1, len(it.prefills))
        seen["swapped"] += it.num_swaps
        now += 1
        assert now < 200, "no end in sight"
    assert under_way == 0 and not any(left.values()), "every token is generated once"
    assert manager.num_free_blocks == num_blocks


@pytest.mark.parametrize(
    "kinds",
    [(LONG_KINDS[0], LONG_KINDS[3]), pytest.param(LONG_KINDS, marks=pytest.mark.slow)],
    ids=["small", "large"],
)
def test_every_workload_in_parts(kinds, figure):
    seen = Counter()
    for pool, limits, mode in product(POOLS, CHUNKED, MODES):
        for times, chosen in product(ARRIVALS, product(kinds, repeat=3)):
            in_parts(pool, limits, mode, groups_of(chosen, times), seen)

            def workload(_, chosen=chosen, times=times):
                return (groups_of(chosen, times),)

            simulated((pool[0], SIZE, *pool[1:], None), limits, mode, workload, 0)
            seen["workloads"] += 1
    assert min(seen.values()) > 40, seen
    if kinds is LONG_KINDS:
        figure("serving, prompts in parts", **seen)


@pytest.mark.parametrize("policy", ["max", "pow2", "oracle"])
def test_every_workload_over_contiguous_reservations(policy, figure):
    """In pools that hold one, two or three of the longest reservations, and a little more."""
    kinds = [kind for kind in KINDS if not kind.behind]
    count = 0
    for num_slots, times in product((8, 9, 17, 24), ARRIVALS):
        for chosen in product(kinds, repeat=2):

            def make(num_slots=num_slots):
                return BaselineCacheManager(num_slots, 1, policy=policy, max_len=8)

            results = both(
                lambda chosen=chosen, times=times: groups_of(chosen, times),
                make,
                LIMITS[1],
                LatencyModel(1.0),
                "auto",
                (0.0, 1e9),
            )
            assert_same(*results)
            # A group of one fits into any of these pools, alone.
            assert {*results[0].finish_s} >= {
                n for n, kind in enumerate(chosen) if len(kind.outputs) == 1
            }
            assert results[0].num_swaps == results[0].num_recomputations == 0
            count += 1
    figure(f"serving, contiguous, {policy}", workloads=count)


# ---- refused is just what could not run ---------------------------------------------------------

# GPU blocks, CPU blocks (18 is more than four groups fill), watermark.
TIGHT_POOLS = ((3, 0, 0.34), (4, 0, 0.25), (4, 18, 0.0), (6, 2, 0.34), (6, 18, 0.2), (6, 0, 0.5))
TIGHT_LIMITS = (Limits(4, 1), Limits(5, 2), Limits(4, 3), Limits(7, 4), Limits(99, 6))
SINGLES = [Kind(prompt, (output,)) for prompt in (1, 4, 5) for output in (1, 5, 8)]
SETS = [Kind(p, outputs) for p in (1, 2) for outputs in ((2, 2), (7, 7), (3, 6), (4, 4, 4))]
BEAM = Kind(1, (7, 7, 7), [[0, 1, 1]] * 7)
FEW = [*SINGLES, *SETS, BEAM]
MANY = [Kind(prompt, (output,)) for prompt in range(1, 6) for output in range(1, 11)]
MANY += [Kind(p, (n,) * width) for p in range(1, 5) for n in (4, 6) for width in (2, 3)]
MANY += [*SETS, BEAM, Kind(1, (6, 6), [[0, 0], [1, 1], [1, 0], [0, 0], [0, 1], [0, 1]])]


def stuck(chosen, times, pool, limits, mode):
    """Served without a check: the number of the request that never comes to its end, if one."""
    num_blocks, cpu, watermark = pool
    manager = PagedKVCacheManager(num_blocks, SIZE, num_cpu_blocks=cpu, watermark=watermark)
    scheduler = Scheduler(manager, limits, mode)
    queue, now, alone = groups_of(chosen, times), 0.0, 0
    while queue or not scheduler.idle:
        while queue and (queue[0].arrival_s <= now or scheduler.idle):
            scheduler.enqueue(queue.pop(0))
        try:
            iteration = scheduler.schedule(now)
        except (StalledError, OutOfBlocksError):
            return (scheduler.running or scheduler.swapped or scheduler.waiting)[0].group_id, alone
        tokens = iteration.prompt_tokens + iteration.num_decodes
        alone += tokens > limits.max_batched_tokens
        scheduler.complete()
        now += 1.0
    return None, alone


@pytest.mark.parametrize(
    ("kinds", "waits"),
    [(FEW, (0.0, 2.0)), pytest.param(MANY, range(6), marks=pytest.mark.slow)],
    ids=["small", "large"],
)
def test_what_is_admitted_never_stalls_and_what_is_refused_runs_nowhere(kinds, waits, figure):
    """Refused is what stalls even alone; of the others any two come to their end, in any order."""
    count = Counter()
    for world in product(TIGHT_POOLS, TIGHT_LIMITS, MODES):
        (num_blocks, cpu, watermark), limits, mode = world
        manager = PagedKVCacheManager(num_blocks, SIZE, num_cpu_blocks=cpu, watermark=watermark)
        admitted = []
        for kind in kinds:
            try:
                Scheduler(manager, limits, mode).check(groups_of([kind], [0.0])[0])
                admitted.append(kind)
            except RequestTooLargeError:
                count["refused"] += 1
            # Nobody knows the beams to come: one may fork at its first step and never again.
            apart = [[*range(len(kind.outputs))]] * kind.outputs[0] if kind.parents else None
            alone = stuck([kind._replace(parents=apart)], [0.0], *world)[0] is None
            assert (kind in admitted) == alone, f"{kind} in {world}"
        for first, second, wait in product(admitted, admitted, waits):
            stalls, by_itself = stuck([first, second], [0.0, wait], *world)
            assert stalls is None, f"{stalls} of {first}, {second} after {wait} in {world}"
            count["pairs"] += 1
            count["with one that is recomputed by itself"] += bool(by_itself)
        count["admitted"] += len(admitted)
    assert min(count.values()) > 50, count
    figure(f"refusals, {len(kinds)} kinds of requests", **count)


# ---- what is broken is found --------------------------------------------------------------------


def the_first_gives_way(monkeypatch):
    make_room = Scheduler._make_room

    def turned_round(scheduler, need, iteration):
        scheduler.running.reverse()
        preempted = make_room(scheduler, need, iteration)
        scheduler.running.reverse()
        return preempted

    monkeypatch.setattr(Scheduler, "_make_room", turned_round)


def no_room_left_on_return(monkeypatch):
    """Swapped in where the blocks are there, and none for the next token."""

    sound = PagedKVCacheManager.can_swap_in

    def fits(manager, ids, alone=False):
        watermark, manager.watermark_blocks = manager.watermark_blocks, -len(ids)
        enough = sound(manager, ids, alone)
        manager.watermark_blocks = watermark
        return enough

    monkeypatch.setattr(PagedKVCacheManager, "can_swap_in", fits)


def watermark_forgotten(monkeypatch):
    def admits(manager, group, alone=False):
        fits = manager.blocks_for_group(group) <= manager.num_free_blocks
        return manager.admit(group) if fits else None

    monkeypatch.setattr(PagedKVCacheManager, "try_admit", admits)


def finished_siblings_revived(monkeypatch):
    monkeypatch.setattr(SequenceGroup, "unfinished", lambda group: list(group.seqs))


def quiet_for_too_long(monkeypatch):
    quiet_steps = Scheduler.quiet_steps
    monkeypatch.setattr(Scheduler, "quiet_steps", lambda s: quiet_steps(s) and quiet_steps(s) + 1)


def the_last_swapped_returns_first(monkeypatch):
    swap_in = Scheduler._swap_in

    def turned_round(scheduler, *rest):
        scheduler.swapped.reverse()
        swap_in(scheduler, *rest)
        scheduler.swapped.reverse()

    monkeypatch.setattr(Scheduler, "_swap_in", turned_round)


def a_full_cpu_pool_is_an_error(monkeypatch):
    monkeypatch.setattr(PagedKVCacheManager, "can_swap_out", lambda manager, ids: True)


@pytest.mark.parametrize(
    "breaks",
    [
        the_first_gives_way,
        no_room_left_on_return,
        watermark_forgotten,
        finished_siblings_revived,
        quiet_for_too_long,
        the_last_swapped_returns_first,
        a_full_cpu_pool_is_an_error,
    ],
)
def test_what_is_broken_is_found(breaks, monkeypatch):
    breaks(monkeypatch)
    with pytest.raises((AssertionError, CacheError)):
        search(SMALL_KINDS)
