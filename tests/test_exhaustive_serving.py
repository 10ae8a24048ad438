"""Regime items 4 and 9 for the serving loop: every workload of a small world, on every small pool.

A world is three groups, each one of a few kinds (a prompt of one to three tokens; one sample, two,
two of unlike lengths, a beam search), a few arrivals, and pools of blocks of two slots in which the
groups do not fit together. All of them are tried in all orders, under each way of preempting;
nothing here is random. test_scheduler.py runs each beside a scheduler that shares no line with ours
and compares the two in every iteration. It checks that every iteration generates a token, that the
first to have arrived never gives way, that all is done in the time that serving one after another
would take, and that every block is free again in the end.

    python tools/hunt.py exhaustive-serving             # more kinds; prints figures
"""

import time
from collections import Counter
from itertools import product

import pytest
from test_scheduler import MODES, group, run_beside_naive

from iteration import Limits
from kv_cache_manager import CacheError, PagedKVCacheManager
from scheduler import Scheduler
from sequence import SequenceGroup

SIZE = 2
BEAMS = [[0, 0], [1, 1], [1, 0]]  # parents after each token: one takes over, the other, a swap
SMALL_KINDS = [
    (prompt_len, outputs, parents)
    for prompt_len in (1, 3)
    for outputs, parents in (((3,), None), ((1, 3), None), ((3, 3), BEAMS))
]
KINDS = SMALL_KINDS + [
    (prompt_len, outputs, None)
    for prompt_len in (1, 2, 3)
    for outputs in ((1,), (2,), (5,), (2, 2))
]
# GPU blocks, CPU blocks, watermark.
POOLS = ((4, 0, 0.0), (5, 2, 0.0), (5, 5, 0.25), (6, 1, 0.2), (7, 4, 0.0))
ARRIVALS = ((0.0, 0.0, 0.0), (0.0, 1.0, 1.0), (0.0, 1.0, 2.0))
LIMITS = (Limits(max_batched_tokens=6, max_num_seqs=3), Limits(8, 4))
# What must have come to bear, or the search proved little.
RULES = {
    "refused", "itself", "not at once", "swapped", "recomputed", "copied", "watermark",
    "token limit", "cap on admission", "too tight to return", "finished stay finished",
    "fall back to recomputation", "admission waits for swapped",
}  # fmt: skip


def workloads(kinds):
    """Every workload of the world, in the form of `random_workload`."""
    for (num_blocks, cpu, watermark), limits, mode in product(POOLS, LIMITS, MODES):
        for times, chosen in product(ARRIVALS, product(kinds, repeat=3)):
            groups = [
                group(number, prompt_len, outputs, arrival_s, None, parents)
                for number, (arrival_s, (prompt_len, outputs, parents)) in enumerate(
                    zip(times, chosen)
                )
            ]
            yield num_blocks, SIZE, cpu, watermark, None, limits, mode, groups


def search(kinds, record=lambda *_: None):
    """Runs them all; returns (how many, how often each rule came to bear)."""
    begin, seen = time.process_time(), Counter()
    count = iterations = 0
    for workload in workloads(kinds):
        log, rules = run_beside_naive(count, lambda _, workload=workload: workload)
        count, iterations = count + 1, iterations + len(log)
        seen.update(rules)
    found = {
        "workloads": count, "iterations": iterations, "swaps": seen["swapped"],
        "recomputations": seen["recomputed"], "block copies": seen["copied"],
        "cpu_s": round(time.process_time() - begin, 1),
    }  # fmt: skip
    print(found)
    for name, value in found.items():
        record(name, value)
    return count, seen


def search_all(kinds, record):
    count, seen = search(kinds, record)
    assert count == len(kinds) ** 3 * len(ARRIVALS) * len(POOLS) * len(LIMITS) * len(MODES)
    assert {rule for rule in RULES if not seen[rule]} == set()


def test_every_workload_of_a_small_world(record_property):
    search_all(SMALL_KINDS, record_property)


@pytest.mark.slow
def test_every_workload_of_a_large_world(record_property):
    search_all(KINDS, record_property)


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

    def fits(manager, ids):
        tables = [manager._swapped[i] for i in ids]
        return len(manager._movable(tables)) <= manager.num_free_blocks

    monkeypatch.setattr(PagedKVCacheManager, "can_swap_in", fits)


def watermark_forgotten(monkeypatch):
    def admits(manager, group):
        fits = manager.blocks_for_group(group) <= manager.num_free_blocks
        return manager.admit(group) if fits else None

    monkeypatch.setattr(PagedKVCacheManager, "try_admit", admits)


def finished_siblings_revived(monkeypatch):
    monkeypatch.setattr(SequenceGroup, "unfinished", lambda group: list(group.seqs))


def a_full_cpu_pool_is_an_error(monkeypatch):
    monkeypatch.setattr(PagedKVCacheManager, "can_swap_out", lambda manager, ids: True)


@pytest.mark.parametrize(
    "breaks",
    [
        the_first_gives_way, no_room_left_on_return, watermark_forgotten,
        finished_siblings_revived, a_full_cpu_pool_is_an_error,
    ],
)  # fmt: skip
def test_what_is_broken_is_found(breaks, monkeypatch):
    breaks(monkeypatch)
    with pytest.raises((AssertionError, CacheError)):
        search(SMALL_KINDS)
