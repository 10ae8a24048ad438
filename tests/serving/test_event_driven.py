"""Regime items 6 and 9: event by event as iteration by iteration, the same times and counts.

The plain mode asks the scheduler about every iteration and adds up every one's time; the
event-driven mode must come to the same end, whatever the workload, the manager and the mode of
preemption.
"""

import math
import random
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_cache_manager import BaselineCacheManager, PagedKVCacheManager, RequestTooLargeError
from sequence import BeamHistory, Sequence, SequenceGroup
from vllm_sim.serving.beam_search import beam_histories
from vllm_sim.serving.latency import LatencyModel
from vllm_sim.serving.scheduler import Limits, Scheduler
from vllm_sim.serving.server_latency import (
    CacheLayers,
    Card,
    Link,
    Matrices,
    ServerLatency,
    Shares,
    Work,
)
from vllm_sim.serving.simulator import Observer, ServingResult, simulate

PREFIX_ID, PREFIX_LEN = 10**6, 6
WHOLE = Limits(40, 9)  # prompts in one piece
COUNTS = {f.name for f in fields(ServingResult)} - {"finish_s", "sum_normalized_s"}


def workload(rng, count, kinds, mean_gap_s, longest):
    """Groups of every kind, arriving at random; some at the very same time."""
    groups, seq_id, now = [], 0, 0.0
    for number in range(count):
        now += rng.choice([0.0, rng.expovariate(1.0) * mean_gap_s])
        kind = rng.choice(kinds)
        width = {"single": 1, "prefix": 1, "parallel": rng.randint(2, 6), "uneven": 3, "beam": 3}
        output = rng.randint(1, longest)
        outputs = [output] * width[kind]
        if kind == "uneven":  # sequences of a group that end at different times
            outputs = [rng.randint(1, longest) for _ in outputs]
        shared = kind == "prefix"
        prompt = rng.randint(1, longest)
        seqs = []
        for output_len in outputs:
            seqs.append(Sequence(seq_id, prompt, output_len, PREFIX_LEN if shared else 0))
            seq_id += 1
        history = None
        if kind == "beam":
            (drawn,) = beam_histories(3, [output], rng.randint(0, 99), theta=0.5)
            history = BeamHistory(drawn)
        prefix_id = PREFIX_ID if shared else None
        groups.append(SequenceGroup(number, seqs, round(now, 2), prefix_id, history))
    return groups


def paged(num_blocks, size, cpu, watermark):
    def make():
        manager = PagedKVCacheManager(num_blocks, size, num_cpu_blocks=cpu, watermark=watermark)
        manager.allocate_prefix(PREFIX_ID, PREFIX_LEN)
        return manager

    return make


def both(make_groups, make_manager, limits, latency, mode, window):
    """(plain, event-driven) results of the same workload, less what could never run."""
    fits = Scheduler(make_manager(), limits)
    refused = set()
    for group in make_groups():
        try:
            fits.check(group)
        except RequestTooLargeError:
            refused.add(group.group_id)
    results = []
    for plain in (True, False):
        manager = make_manager()
        results.append(
            simulate(
                [group for group in make_groups() if group.group_id not in refused],
                manager,
                limits,
                latency,
                preemption=mode,
                window_s=window,
                plain=plain,
                check=plain,
            )
        )
        assert manager.running_ids == []
        manager.check_invariants()
    return results


def serve(groups, **options):
    """In a pool that holds all of them."""
    return simulate(groups, PagedKVCacheManager(60, 4), Limits(60, 4), **options)


def assert_same(plain, jumped):
    assert plain.finish_s.keys() == jumped.finish_s.keys()
    for group_id, finish_s in plain.finish_s.items():
        assert abs(finish_s - jumped.finish_s[group_id]) < 1e-9
    assert {name: getattr(plain, name) for name in COUNTS} == {
        name: getattr(jumped, name) for name in COUNTS
    }
    assert math.isclose(plain.sum_normalized_s, jumped.sum_normalized_s, rel_tol=1e-9)


LATENCIES = [
    # No sum of steps is a multiple of 0.01 s, as arrivals are: rounding decides nothing.
    LatencyModel(step_s=0.030123417),
    LatencyModel(
        0.027071313, 1.70317e-4, 7.01171e-5, 6.03719e-3, 1.00931e-5, 2.01713e-3, 3.02391e-3, 4
    ),
    LatencyModel(0.011073171, 0.0, 0.0013031713, 0.0503911, 1.007137e-3, 0.1003171, 0.2007391, 4),
    # Here bytes decide for few sequences and FLOPs for many, and one window ends within a run.
    ServerLatency(
        Work(
            Matrices(0.02031371, 0.0040317),
            Matrices(0.00213717, 1e-4),
            (CacheLayers(2.0317e-4, 1e-5, 1e-5), CacheLayers(3.0171e-4, 1e-5, 2e-5, 9)),
            kv_heads=2,
            kernels=3,
            experts=Matrices(0.0113717, 0.0013171),
            num_experts=8,
            active_experts=2,
            messages=2,
            message_bytes=1e-5,
            gpus=2,
            block_size=4,
        ),
        Card(1.0, 1.0, 4, Link(1.0, 0.5, 1.00317e-4), Shares(0.9, 0.8, 0.7, 1e-4, 0.5, 0.5)),
    ),
]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(30, 70),
    size=st.sampled_from([1, 3, 4, 16]),
    cpu=st.sampled_from([0, 5, 26]),
    watermark=st.sampled_from([0.0, 0.05]),
    mode=st.sampled_from(["auto", "swap", "recompute"]),
    latency=st.sampled_from(LATENCIES),
    gap_s=st.sampled_from([0.02, 0.2, 1.5]),
    limits=st.sampled_from([WHOLE, Limits(9, 9, chunked=True), Limits(14, 6, chunked=True)]),
)
def test_paged_runs_agree(seed, num_blocks, size, cpu, watermark, mode, latency, gap_s, limits):
    kinds = ["single", "parallel", "uneven", "beam", "prefix"]
    longest = 4 if size == 1 else 12

    def groups():
        return workload(random.Random(seed), 14, kinds, gap_s, longest)

    make = paged(num_blocks, size, cpu, watermark)
    assert_same(*both(groups, make, limits, latency, mode, (0.301, 2.003)))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(48, 120),
    size=st.sampled_from([1, 4]),
    policy=st.sampled_from(["max", "pow2", "oracle"]),
    latency=st.sampled_from(LATENCIES),
    gap_s=st.sampled_from([0.02, 0.2, 1.5]),
    limits=st.sampled_from([WHOLE, Limits(9, 9, chunked=True)]),
)
def test_contiguous_runs_agree(seed, num_blocks, size, policy, latency, gap_s, limits):
    kinds = ["single", "parallel", "uneven", "beam"]

    def groups():
        return workload(random.Random(seed), 14, kinds, gap_s, 6)

    def make():
        return BaselineCacheManager(num_blocks * (4 // size), size, policy=policy, max_len=12)

    assert_same(*both(groups, make, limits, latency, "auto", (0.301, 2.003)))


class Counted(LatencyModel):
    """Notes the iterations that are looked at one by one."""

    def __init__(self, *terms):
        super().__init__(*(terms or (1.0,)))
        object.__setattr__(self, "seen", [])

    def iteration(self, it):
        self.seen.append(it.start_s)
        return LatencyModel.iteration(self, it)


def test_a_long_run_under_pressure_agrees_and_jumps():
    """Preemption, swapping, waiting for the token limit: all of it, a few thousand times."""
    rng = random.Random(5)
    shapes = [(rng.randint(1, 200), rng.randint(1, 300)) for _ in range(400)]

    def groups():
        return [
            SequenceGroup(i, [Sequence(i, prompt, output)], i * 0.35)
            for i, (prompt, output) in enumerate(shapes)
        ]

    for mode in ("recompute", "swap"):
        results = []
        for plain in (True, False):
            latency = Counted(0.0274, 1.65e-4, 6.6e-7, 6.25e-3, 1e-6, 1.2e-3, 1.3e-3, 16)
            manager = PagedKVCacheManager(180, 16, num_cpu_blocks=180)
            result = simulate(
                groups(), manager, Limits(512, 64), latency, preemption=mode, plain=plain
            )
            results.append((result, len(latency.seen)))
        (plain, all_iterations), (jumped, asked) = results
        assert_same(plain, jumped)
        assert all_iterations == plain.num_iterations > 3000
        assert plain.num_recomputations + plain.num_swaps > 50
        assert asked < all_iterations / 2, "most iterations are taken in jumps"


def test_check_looks_at_every_iteration():
    class Watched(PagedKVCacheManager):
        checks = 0

        def check_invariants(self):
            Watched.checks += 1
            super().check_invariants()

    groups = [SequenceGroup(0, [Sequence(0, 5, 30)])]
    result = simulate(groups, Watched(30, 4), Limits(60, 4), check=True)
    assert Watched.checks == result.num_iterations == 30


def test_observers_see_the_window_and_nothing_else():
    class Watcher(Observer):
        starts, ends = [], 0

        def on_iteration(self, iteration):
            self.starts.append(iteration.start_s)

        def on_completion(self, completion):
            Watcher.ends += 1

    groups = [SequenceGroup(i, [Sequence(i, 5, 30)], float(i)) for i in range(3)]
    watcher = Watcher()
    result = serve(groups, observers=[watcher], window_s=(10.0, 20.0))
    assert watcher.starts == [float(t) for t in range(10, 20)] and Watcher.ends == 10
    assert result.window_iterations == 10 and result.window_groups == 30
    assert result.mean_window_batch == 3.0 and result.num_iterations == 32


@pytest.mark.parametrize(
    "options", [{}, {"window_s": (10.0, 20.0)}, {"window_s": (9.5, 20.5), "until_s": 25.0}]
)
def test_time_is_skipped_unless_told_otherwise_and_no_edge_costs_a_look(options):
    """The edges of a window only end a jump: the next one starts there."""
    latency = Counted()
    result = serve([SequenceGroup(0, [Sequence(0, 5, 30)])], latency=latency, **options)
    assert latency.seen == [0.0], "the prompt, after which nothing is decided"
    assert result.num_iterations == min(30, options.get("until_s", 30))
    if "window_s" in options:
        assert result.window_iterations == 10 + (options["window_s"][0] == 9.5)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("start_s", [0.0, 10.0, 20.0])
def test_the_window_is_half_open_also_where_an_idle_gap_ends(plain, start_s):
    """An iteration that starts when the window opens is in it, one when it closes is not."""
    groups = [SequenceGroup(0, [Sequence(0, 5, 2)], start_s)]
    result = serve(groups, window_s=(10.0, 20.0), plain=plain)
    assert result.window_iterations == (2 if start_s == 10.0 else 0)


@pytest.mark.parametrize("plain", [True, False])
def test_a_run_can_be_cut_and_idle_gaps_are_skipped(plain):
    for until_s, ends, iterations in ((1015.0, 1, 45), (9e9, 3, 90)):
        groups = [SequenceGroup(i, [Sequence(i, 5, 30)], 1000.0 * i) for i in range(3)]
        result = serve(groups, until_s=until_s, plain=plain)
        assert result.finish_s == {i: 1000.0 * i + 30.0 for i in range(ends)}
        assert (result.num_iterations, result.normalized_latency) == (iterations, 1.0)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    ("until_s", "iterations"),
    [(0.0, 0), (0.5, 1), (29.0, 29), (29.5, 30), (99.0, 30), (100.0, 30), (100.5, 31), (102.0, 32)],
)
def test_a_run_is_cut_at_the_first_iteration_that_would_start_then(plain, until_s, iterations):
    """Also where that is in an idle gap, or at its very end."""
    groups = [SequenceGroup(0, [Sequence(0, 5, 30)]), SequenceGroup(1, [Sequence(1, 5, 5)], 100.0)]
    result = serve(groups, until_s=until_s, plain=plain)
    assert result.num_iterations == iterations
