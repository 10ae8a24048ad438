"""Regime items 4 and 9 for the serving loop: every workload of a small world, on every small pool.

A world is three requests, each one of a few kinds (a prompt of one to three tokens; one sample,
two, two of unlike lengths, a beam search; perhaps behind a shared prefix), a few arrivals, and
pools of blocks of two slots in which the three do not fit together; some not even alone, which are
refused. All are tried in all orders, under each way of preempting; nothing here is random.

Each is served three times. test_scheduler_reference.py runs it beside a scheduler that shares no
line with ours and compares the two in every iteration; it checks that every iteration generates a
token, that the first to have arrived never gives way, that all is done in the time that serving one
after another would take, and that every block is free again in the end. Then `simulate` serves it
iteration by iteration with all invariants checked, and event by event, with the same result. The
contiguous manager, which never preempts, has a search of its own.

    python -m pytest -m slow tests/serving/test_exhaustive_serving.py     # more kinds
"""

import time
from collections import Counter, namedtuple
from itertools import product

import pytest
from scheduler_tools import MODES, group
from test_event_driven import assert_same, both
from test_scheduler_reference import run_beside_naive

from kv_cache_manager import (
    BaselineCacheManager,
    CacheError,
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


# ---- refused is just what could stall -----------------------------------------------------------

ROOMY = 18  # CPU blocks that four groups do not fill
TIGHT_POOLS = ((3, 0, 0.34), (4, 0, 0.25), (4, ROOMY, 0.0), (6, ROOMY, 0.2), (6, 0, 0.5))
TIGHT_LIMITS = (Limits(4, 1), Limits(5, 2), Limits(4, 3), Limits(7, 4), Limits(99, 6))
SINGLES = [Kind(prompt, (output,)) for prompt in (1, 2, 4, 5) for output in (1, 4, 5, 8)]
PAIRS = [Kind(p, outputs) for p in (1, 2) for outputs in ((2, 2), (5, 5), (7, 7), (3, 6), (5, 6))]
MANY = [Kind(prompt, (output,)) for prompt in range(1, 6) for output in range(1, 11)] + [
    Kind(prompt, outputs) for prompt in range(1, 5) for outputs in ((4, 4), (6, 6), (4, 4, 4))
]


def stuck(chosen, times, pool, limits, mode):
    """Served without a check: the number of the request that never comes to its end, if one."""
    num_blocks, cpu, watermark = pool
    manager = PagedKVCacheManager(num_blocks, SIZE, num_cpu_blocks=cpu, watermark=watermark)
    scheduler = Scheduler(manager, limits, mode)
    queue, now = groups_of(chosen, times), 0.0
    while queue or not scheduler.idle:
        while queue and (queue[0].arrival_s <= now or scheduler.idle):
            scheduler.enqueue(queue.pop(0))
        try:
            scheduler.schedule(now)
        except StalledError:
            return (scheduler.swapped or scheduler.waiting)[0].group_id
        scheduler.complete()
        now += 1.0
    return None


@pytest.mark.parametrize(
    ("kinds", "waits"),
    [(SINGLES + PAIRS, (0.0, 2.0)), pytest.param(MANY, range(6), marks=pytest.mark.slow)],
    ids=["small", "large"],
)
def test_what_is_admitted_never_stalls_and_what_is_refused_could(kinds, waits, figure):
    """Behind any other that runs alone; a refused one stalls alone, or behind one of these."""
    count = Counter()
    for world in product(TIGHT_POOLS, TIGHT_LIMITS, MODES):
        (num_blocks, cpu, watermark), limits, mode = world
        manager = PagedKVCacheManager(num_blocks, SIZE, num_cpu_blocks=cpu, watermark=watermark)
        alone = {kind for kind in kinds if stuck([kind], [0.0], *world) is None}
        for kind in kinds:
            try:
                Scheduler(manager, limits, mode).check(groups_of([kind], [0.0])[0])
                admitted = True
            except RequestTooLargeError:
                admitted = False
            stalls = kind not in alone or any(
                stuck([other, kind], [0.0, wait], *world) == 1
                for other in sorted(alone, key=lambda one: -one.outputs[0])
                for wait in waits
            )
            if len({*kind.outputs}) > 1 and mode != "recompute" and not admitted:
                continue
            assert admitted != stalls, f"{kind} in {world}"
            long = kind.prompt_len + max(kind.outputs) - 1 > limits.max_batched_tokens
            count["admitted" if admitted else "refused"] += 1
            count["refused, yet runs alone"] += stalls and kind in alone
            count["never computed anew when it is too long"] += admitted and long
    assert min(count.values()) > 50, count
    figure(f"refusals, {len(kinds)} kinds of requests", **count)


BEAM_SEARCH = group(1, 5, [7] * 3, 0.0, None, [[0, 1, 1]] * 7)
SINGLE = ((0, 2, 8, 0.0), (1, 2, 7, 2.0), (2, 1, 7, 3.0), (4, 2, 10, 4.0))
LATE = [group(number, prompt, [output], at) for number, prompt, output, at in SINGLE]
# Pool of GPU blocks, their size and CPU blocks, limits, others, and who stalls among them.
SHARED = (8, 4, 0), Limits(9, 6), [group(0, 1, [6])], BEAM_SEARCH
BEHIND = (2, 4, 0), Limits(2, 2), [group(0, 0, [3], 0.0, (99, 4))], group(1, 2, [3])
SWAPPED = (14, 1, 1), Limits(8, 5), LATE, group(3, 1, [10], 4)
STALLS = {
    "beams share, and so grow further than samples": SHARED,
    "nothing may be held behind a prefix": BEHIND,
    "its prompt may be swapped, what it generates not": SWAPPED,
}


@pytest.mark.parametrize("name", STALLS)
def test_what_stalls_in_rare_company_is_refused(name):
    (num_blocks, size, cpu), limits, others, one = STALLS[name]
    manager = PagedKVCacheManager(num_blocks, size, num_cpu_blocks=cpu, watermark=0.0)
    if others[0].prefix_id is not None:
        manager.allocate_prefix(others[0].prefix_id, others[0].seqs[0].prefix_len)
    scheduler = Scheduler(manager, limits, "swap")
    with pytest.raises(RequestTooLargeError, match=f"exceed {limits.max_batched_tokens} tokens"):
        scheduler.check(one)
    queue = sorted([*others, one], key=lambda each: each.order)
    with pytest.raises(StalledError):
        for now in range(100):
            while queue and queue[0].arrival_s <= now:
                scheduler.enqueue(queue.pop(0))
            scheduler.schedule(float(now))
            scheduler.complete()


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
