"""Regime item 9: serving a workload to its end, its groups, clock, totals and observers."""

import random

import numpy as np
import pytest

from kv_cache_manager import BaselineCacheManager, PagedKVCacheManager, RequestTooLargeError
from sequence import Sequence, SequenceGroup, SequenceStatus
from vllm_sim.reporting.progress import Progress
from vllm_sim.serving.beam_search import beam_parents
from vllm_sim.serving.latency import LatencyModel
from vllm_sim.serving.scheduler import Iteration, Limits
from vllm_sim.serving.simulator import Observer, ServingResult, make_groups, simulate
from vllm_sim.workload.requests import Request, join

LIMITS = Limits(200, 16)
MODES = ("auto", "swap", "recompute")
PREFIX_ID, PREFIX_LEN = 10**6, 6


def mixed_requests(seed, count=24, interval_s=1.0):
    """Every kind of request, in random order, arriving at random times."""
    rng = random.Random(seed)
    now, requests = 0.0, []
    for number in range(count):
        now += rng.expovariate(1.0) * interval_s
        kind = rng.choice([{}, {"num_samples": 3}, {"beam_width": 3}, {"prefix_len": PREFIX_LEN}])
        requests.append(Request(number, now, rng.randint(1, 12), rng.randint(1, 12), **kind))
    return requests


def paged(num_blocks=30, cpu=None, size=4):
    cpu = num_blocks if cpu is None else cpu
    manager = PagedKVCacheManager(num_blocks, size, num_cpu_blocks=cpu)
    manager.allocate_prefix(PREFIX_ID, PREFIX_LEN)
    return manager


def groups_of(requests, seed=0):
    return make_groups(requests, prefix_ids={PREFIX_LEN: PREFIX_ID}, seed=seed)


# --- make_groups ---------------------------------------------------------------------------------


def test_groups_carry_what_the_requests_say():
    requests = [
        Request(7, 0.5, 3, 4),
        Request(8, 0.25, 5, 6, num_samples=3),
        Request(9, 1.5, 2, 5, beam_width=2, prefix_len=11),
        Request(10, 2.0, 2, 2, prefix_len=12),
    ]
    groups = make_groups(requests, first_seq_id=40, prefix_ids={11: 5})
    assert [one.group_id for one in groups] == [7, 8, 9, 10]
    assert [one.arrival_s for one in groups] == [0.5, 0.25, 1.5, 2.0]
    ids = [[seq.seq_id for seq in one.seqs] for one in groups]
    assert ids == [[40], [41, 42, 43], [44, 45], [46]]
    assert [one.prefix_id for one in groups] == [None, None, 5, None]
    for request, one in zip(requests, groups):
        for seq in one.seqs:
            assert (seq.prompt_len, seq.output_len) == (request.prompt_len, request.output_len)
            assert seq.prefix_len == request.prefix_len
            assert seq.status is SequenceStatus.WAITING and seq.num_generated == 0
    assert [one.beam_parents is not None for one in groups] == [False, False, True, False]


@pytest.mark.parametrize("contiguous", [True, False])
def test_without_shared_prefixes_every_sequence_stores_its_own(contiguous):
    (one,) = make_groups([Request(0, 0.0, 3, 4, prefix_len=11)])
    assert one.prefix_id is None and one.seqs[0].context_len == 14
    oracle = BaselineCacheManager(32, 1, policy="oracle", max_len=32)
    manager = oracle if contiguous else paged()
    simulate([one], manager, LIMITS, observers=[watcher := Watcher(manager)])
    assert watcher.stored == {0: 11 + 3 + 4 - 1}


def test_a_beam_search_is_drawn_from_its_request_alone():
    """Not from its place in the workload, nor from anything that a manager or policy decides."""
    beam = Request(5, 0.0, 4, 30, beam_width=4)
    other = Request(6, 0.0, 4, 30, beam_width=4)
    (alone,) = make_groups([beam], seed=3)
    among = make_groups([Request(1, 0.0, 2, 2), other, beam], first_seq_id=9, seed=3)
    assert among[2].beam_parents == alone.beam_parents
    assert among[1].beam_parents != alone.beam_parents, "two requests, two searches"
    assert make_groups([beam], seed=4)[0].beam_parents != alone.beam_parents
    assert make_groups([beam], seed=3, theta=2.0)[0].beam_parents != alone.beam_parents
    assert make_groups([beam])[0].beam_parents == make_groups([beam], seed=0)[0].beam_parents
    drawn = beam_parents(4, 30, np.random.default_rng([3, 5]))
    assert alone.beam_parents == drawn.tolist()
    assert type(alone.beam_parents[0][0]) is int, "no numpy integers in the tables of a manager"


def test_options_are_given_by_name():
    """Two of them could be confused, and new ones come in between."""
    with pytest.raises(TypeError, match="positional"):
        make_groups([], 40)
    with pytest.raises(TypeError, match="positional"):
        simulate([], paged(), LIMITS, LatencyModel(1.0), "swap")


def test_more_requests_than_python_shares_numbers():
    """Small integers are one object each; counts above 256 are equal without being the same."""
    requests = [Request(number, 0.0, 1, 1) for number in range(300)]
    assert len(simulate(requests, paged(400)).finish_s) == 300


def test_progress_is_told_every_so_often():
    told = []

    class Told(Progress):
        def at(self, done, total, words=""):
            told.append((done, total))

    requests = [Request(number, 10.0 * number, 1, 10) for number in range(40)]
    result = simulate(requests, paged(), plain=True, progress=Told())
    assert result.num_iterations == 400
    assert len(told) == 6  # of 400 iterations, every 64th
    assert told == sorted(told) and {total for _, total in told} == {40}
    assert 0 < told[0][0] < 10 and told[-1][0] > 30


# --- the clock and the totals --------------------------------------------------------------------


class Watcher(Observer):
    """Notes the calls, and for each sequence the most tokens that were ever stored of it."""

    def __init__(self, manager):
        self.manager = manager
        self.calls, self.stored, self.iterations = [], {}, []

    def on_iteration(self, iteration):
        self.calls.append("iteration")
        self.iterations.append(iteration)
        self.stored |= {i: self.manager.num_tokens(i) for i in self.manager.running_ids}

    def on_completion(self, completion):
        self.calls.append("completion")


def test_an_empty_workload_takes_no_time():
    result = simulate([], paged(), LIMITS, observers=[watcher := Watcher(paged())])
    assert result == ServingResult()
    assert result.mean_batch == 0.0 and watcher.calls == []


def test_finish_times_add_up_what_each_iteration_takes():
    # Prefill and decode tokens as seconds: group 0 runs alone, then both, then group 1 alone.
    class PerToken(LatencyModel):
        def iteration(self, iteration):
            prompts = sum(one.seqs[0].prompt_len for one in iteration.prefills)
            return prompts + 0.5 * sum(len(one.unfinished()) for one in iteration.decodes)

    requests = [Request(0, 0.0, 4, 3), Request(1, 1.0, 7, 3, num_samples=2)]
    result = simulate(make_groups(requests), paged(), LIMITS, PerToken(1.0), plain=True)
    # 4, then 7 + 0.5 with group 1's prompt, then 0.5 + 2 x 0.5, then 2 x 0.5.
    assert result.finish_s == {0: 4 + 7.5 + 1.5, 1: 4 + 7.5 + 1.5 + 1.0}
    assert result.num_iterations == 4 and result.sum_groups == 1 + 2 + 2 + 1
    assert result.mean_batch == 6 / 4
    assert result.num_copies == 1  # two samples of a prompt of 7 in blocks of 4


@pytest.mark.parametrize("window_s", [(0.0, 10.0), (1.0, 2.0)])
def test_the_means_of_a_run_of_one_iteration_or_none_in_the_window(window_s):
    result = simulate(make_groups([Request(0, 0.0, 3, 1)]), paged(), LIMITS, window_s=window_s)
    inside = window_s[0] == 0.0
    assert (result.num_iterations, result.window_iterations) == (1, inside)
    assert (result.mean_batch, result.mean_window_batch) == (1.0, float(inside))
    assert result.normalized_latency == 1.0
    assert ServingResult().normalized_latency == ServingResult().mean_window_batch == 0.0


def test_means_are_no_whole_numbers():
    requests = [Request(0, 0.0, 2, 2), Request(1, 1.0, 2, 4)]
    result = simulate(make_groups(requests), paged(), LIMITS, window_s=(1.0, 4.0))
    assert result.finish_s == {0: 2.0, 1: 5.0}
    assert result.mean_batch == 6 / 5 and result.mean_window_batch == 4 / 3
    result = simulate(make_groups(requests), paged(), LIMITS, LatencyModel(0.375))
    assert result.finish_s == {0: 0.75, 1: 1.0 + 4 * 0.375}
    assert result.normalized_latency == (0.75 / 2 + 1.5 / 4) / 2


@pytest.mark.parametrize("outputs", [[3, 8, 5], [8, 3], [3, 8], [5]])
def test_normalized_latency_is_per_token_of_the_longest_output(outputs):
    seqs = [Sequence(i, 2, output) for i, output in enumerate(outputs)]
    result = simulate([SequenceGroup(0, seqs, 0.5)], paged(), LIMITS, LatencyModel(0.25))
    assert result.finish_s == {0: 0.5 + 0.25 * max(outputs)}
    assert result.normalized_latency == result.sum_normalized_s == 0.25


@pytest.mark.parametrize("plain", [True, False])
def test_beams_that_change_parents_copy_whole_reservations_where_nothing_is_shared(plain):
    """As in the artifact's Orca, which that takes time after the step; paged beams share."""

    def finish(manager, copy_s=0.125):
        seqs = [Sequence(i, 3, 5) for i in range(2)]
        # One beam continues the other after the second and the third step, else each itself.
        group = SequenceGroup(0, seqs, beam_parents=[[0, 1], [0, 0], [1, 1], [0, 1], [0, 1]])
        latency = LatencyModel(1.0, copy_s=copy_s, block_size=2)
        result = simulate([group], manager, LIMITS, latency, plain=plain)
        return result.finish_s[0], result.num_copies

    def contiguous():
        return BaselineCacheManager(16, 2, policy="oracle", max_len=16)

    assert finish(contiguous()) == (5 + 2 * 0.125 * 2 * 4, 0), "8 tokens: 4 blocks of 2, twice"
    # A copy behind the prompt of 3 and one after the third step; after the second, blocks are full.
    assert finish(PagedKVCacheManager(16, 2)) == (5 + 2 * 0.125 * 2, 2)
    assert finish(contiguous(), 0.0) == (5.0, 0)
    assert finish(PagedKVCacheManager(16, 2), 0.0) == (5.0, 2)


def test_each_iteration_takes_a_second_unless_told():
    result = simulate(make_groups([Request(0, 2.5, 3, 4)]), paged(), LIMITS)
    assert result.finish_s == {0: 2.5 + 4} and result.num_iterations == 4


def test_the_clock_jumps_over_times_in_which_nobody_is_there():
    requests = [Request(0, 100.0, 2, 2), Request(1, 100.5, 2, 2), Request(2, 500.25, 2, 1)]
    manager = paged()
    watcher = Watcher(manager)
    groups = make_groups(reversed(requests))  # not in order of arrival
    result = simulate(groups, manager, LIMITS, observers=[watcher])
    assert [iteration.start_s for iteration in watcher.iterations] == [100, 101, 102, 500.25]
    assert result.finish_s == {0: 102.0, 1: 103.0, 2: 501.25}
    assert [iteration.index for iteration in watcher.iterations] == [0, 1, 2, 3]


def test_the_clock_never_goes_back():
    """Group 1 arrives while group 0's last token is being made, and waits until that is done."""
    manager = paged()
    requests = [Request(0, 0.0, 2, 2), Request(1, 1.5, 2, 1)]
    watcher = Watcher(manager)
    result = simulate(make_groups(requests), manager, LIMITS, observers=[watcher])
    assert [iteration.start_s for iteration in watcher.iterations] == [0, 1, 2]
    assert result.finish_s == {0: 2.0, 1: 3.0}


def test_nobody_is_served_before_arrival():
    for seed in range(5):
        requests = mixed_requests(seed)
        arrivals = {request.request_id: request.arrival_s for request in requests}

        class Early(Observer):
            def on_iteration(self, iteration, arrivals=arrivals):
                for one in (*iteration.prefills, *iteration.decodes):
                    assert arrivals[one.group_id] <= iteration.start_s

        result = simulate(groups_of(requests), paged(), LIMITS, observers=[Early()])
        for request in requests:
            least = request.arrival_s + request.output_len  # a second for each token
            assert result.finish_s[request.request_id] >= least


@pytest.mark.parametrize(("ahead", "second"), [(False, 4.0), (True, 5.0)])
def test_decided_ahead_what_arrives_meanwhile_waits_for_one_more(ahead, second):
    # Iterations take a second: one arrives as the second of them runs, one while nothing does.
    requests = [Request(0, 0.0, 3, 9), Request(1, 1.5, 3, 2), Request(2, 20.5, 3, 2)]
    result = simulate(requests, PagedKVCacheManager(50, 4), ahead=ahead)
    assert result.finish_s == {0: 9.0, 1: second, 2: 22.5}


def test_decided_ahead_nothing_changes_for_those_who_are_there_from_the_start():
    requests = [Request(nth, 0.0, 5 + nth % 7, 3 + nth % 11) for nth in range(40)]
    found = [simulate(requests, PagedKVCacheManager(30, 4), ahead=ahead) for ahead in (False, True)]
    assert found[0] == found[1] and found[0].num_recomputations > 0


def test_what_goes_out_and_what_comes_in_are_counted_apart():
    """Over a whole run they are the same, so a run cannot tell."""
    result = ServingResult()
    result.count(Iteration(0, 0.0, swapped_out=((1, 0), (2, 1)), swapped_in=((0, 5),)))
    assert (result.blocks_swapped_out, result.blocks_swapped_in) == (2, 1)
    with pytest.raises(AttributeError):  # not a count that nobody reads
        result.num_swap = 1


def test_totals_are_the_sums_of_the_iterations():
    manager = paged(18, cpu=6)
    watcher = Watcher(manager)
    requests = mixed_requests(1, interval_s=0.1)
    result = simulate(groups_of(requests), manager, LIMITS, preemption="swap", observers=[watcher])
    assert result.num_iterations == len(watcher.iterations)
    told = {
        "num_swaps": lambda i: i.num_swaps,
        "num_recomputations": lambda i: i.num_recomputations,
        "num_copies": lambda i: len(i.copies),
        "blocks_swapped_out": lambda i: len(i.swapped_out),
        "blocks_swapped_in": lambda i: len(i.swapped_in),
        "sum_groups": lambda i: len(i.prefills) + len(i.decodes),
    }
    for name, count in told.items():
        assert getattr(result, name) == sum(map(count, watcher.iterations)) > 0, name
    assert result.blocks_swapped_in == result.blocks_swapped_out
    assert result.mean_batch == result.sum_groups / result.num_iterations


# --- observers -----------------------------------------------------------------------------------


def test_observers_are_told_in_turn_before_and_after_each_iteration():
    order = []

    class Named(Observer):
        def __init__(self, name):
            self.name = name

        def on_iteration(self, iteration):
            order.append((self.name, "iteration", iteration.index))
            # Scheduled, with its tables in place, but not a token further.
            assert all(manager.num_tokens(i) == 3 + iteration.index for i in manager.running_ids)

        def on_completion(self, completion):
            order.append((self.name, "completion", len(completion.finished)))

    class Clocked(LatencyModel):
        def iteration(self, iteration):
            order.append(("clock", "iteration", iteration.index))
            return 1.0

    manager = paged()
    groups = make_groups([Request(0, 0.0, 3, 2)])
    observers = [Named("a"), Observer(), Named("b")]
    simulate(groups, manager, LIMITS, Clocked(1.0), observers=observers)
    one = [("a", "iteration"), ("b", "iteration"), ("clock", "iteration")]
    one += [("a", "completion"), ("b", "completion")]
    assert [entry[:2] for entry in order] == one * 2
    assert [entry[2] for entry in order] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


# --- what can never run --------------------------------------------------------------------------


def test_ids_given_twice_are_refused_before_anything_runs():
    """Two would be served, and one counted."""
    one, other = Request(3, 0.0, 3, 3), Request(3, 1.0, 2, 2)
    manager = paged(18)
    (first,), (second,) = make_groups([one]), make_groups([other], first_seq_id=9)
    (third,) = make_groups([Request(4, 0.0, 3, 3)])
    for bad, what in (
        ([one, other], "requests have the id 3"),
        ([first, second], "requests have the id 3"),
        ([first, third], "sequences have the id 0"),
    ):
        with pytest.raises(ValueError, match=what):
            simulate(bad, manager)
    with pytest.raises(ValueError, match="the id 3"):
        make_groups([one, Request(2, 0.0, 1, 1), other])
    assert manager.running_ids == []
    result = simulate(join([one], [other]), manager)
    assert result.finish_s == {0: 3.0, 1: 3.0}


def test_requests_with_nothing_but_a_shared_prefix_are_served():
    requests = [Request(n, 0.0, 0, 3 + n, num_samples=1 + n, prefix_len=PREFIX_LEN) for n in (0, 1)]
    for mode in ("swap", "recompute"):
        manager = paged(6)
        result = simulate(groups_of(requests), manager, LIMITS, preemption=mode, check=True)
        assert result.finish_s.keys() == {0, 1}


def test_too_large_a_request_is_refused_before_anything_runs():
    manager = paged(8)
    watcher = Watcher(manager)
    requests = [Request(0, 0.0, 3, 3), Request(1, 50.0, 30, 3)]
    with pytest.raises(RequestTooLargeError, match="request 1"):
        simulate(make_groups(requests), manager, LIMITS, observers=[watcher])
    assert watcher.calls == [] and manager.running_ids == []


# --- the same outcome whatever the memory --------------------------------------------------------


def outcome(requests, manager, mode="auto"):
    watcher = Watcher(manager)
    groups = groups_of(requests)
    result = simulate(groups, manager, LIMITS, preemption=mode, observers=[watcher])
    manager.check_invariants()
    assert manager.running_ids == []
    for one in groups:
        assert all(seq.num_generated == seq.output_len for seq in one.seqs)
        assert {seq.status for seq in one.seqs} == {SequenceStatus.FINISHED}
    return result, (set(result.finish_s), watcher.stored)


@pytest.mark.parametrize("mode", MODES)
def test_a_tiny_pool_serves_the_same_as_a_large_one(mode):
    preempted = 0
    for seed in range(12):
        requests = mixed_requests(seed, interval_s=0.2)
        large, expected = outcome(requests, paged(1000))
        assert large.num_swaps + large.num_recomputations == 0
        finals = [
            r.prefix_len + r.prompt_len + r.output_len - 1
            for r in requests
            for _ in range(r.num_seqs)
        ]
        assert expected == (set(range(len(requests))), dict(enumerate(finals)))
        for cpu in (0, 3, 20):
            tiny, found = outcome(requests, paged(20, cpu), mode)
            assert found == expected, (seed, cpu)
            assert tiny.num_iterations >= large.num_iterations
            preempted += tiny.num_swaps + tiny.num_recomputations
            if mode == "recompute" or cpu == 0:
                assert tiny.num_swaps == 0
    assert preempted > 100


def test_the_same_run_twice_is_the_same_run():
    for mode in MODES:
        requests = mixed_requests(7, interval_s=0.1)
        first, again = (outcome(requests, paged(18, 6), mode)[0] for _ in range(2))
        assert first == again


def test_requests_are_served_as_the_groups_made_of_them():
    requests = mixed_requests(5, interval_s=0.1)
    whole = simulate(make_groups(requests), paged(60, 0), Limits(2560, 2048))
    assert simulate(requests, paged(60, 0)) == simulate(iter(requests), paged(60, 0)) == whole
    assert set(whole.finish_s) == {request.request_id for request in requests}
    assert simulate([], paged(60, 0)) == ServingResult()


def test_requests_and_groups_together_are_refused():
    """Their sequences would have the same ids."""
    requests = [Request(0, 0.0, 3, 2), Request(1, 0.0, 3, 2)]
    with pytest.raises(TypeError, match="groups of all"):
        simulate([requests[0], *make_groups(requests[1:])], paged(18, 0))
