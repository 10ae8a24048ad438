"""Requests, their arrivals and the traces that are drawn of them (section 6.1)."""

import math
import random
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from test_data_sets import SHAREGPT_FILE, needs_data, of_requests

from vllm_sim.workload.data_sets import find_lengths, read_lengths
from vllm_sim.workload.length_tables import ALPACA, SHAREGPT, WMT16, WMT16_PROMPTS
from vllm_sim.workload.requests import Request, join, make_trace, poisson_arrivals


def test_arrivals_are_poisson_in_slots_of_10_ms():
    arrivals = poisson_arrivals(rate=20.0, duration_s=2000.0, seed=5)
    slots = np.rint(arrivals * 100).astype(int)
    assert (arrivals == slots * 0.01).all() and (np.diff(arrivals) >= 0).all()
    assert arrivals.min() >= 0.0 and arrivals.max() < 2000.0
    assert len(arrivals) == pytest.approx(40_000, abs=5 * math.sqrt(40_000))
    per_slot = np.bincount(slots, minlength=200_000)
    assert per_slot.var() == pytest.approx(per_slot.mean(), rel=0.02)  # Poisson: both the rate
    per_second = per_slot.reshape(-1, 100).sum(axis=1)
    assert per_second.var() == pytest.approx(20.0, rel=0.15)
    assert abs(np.corrcoef(per_slot[1:], per_slot[:-1])[0, 1]) < 0.01


def test_workloads_are_joined_in_order_of_arrival_with_ids_of_their_own():
    first, second = ([Request(n, at, n + 1, 2) for n, at in enumerate(times)] for times in TWO)
    both = join(first, second, [])
    wanted = [(0, 0.0, 1), (1, 0.5, 1), (2, 1.0, 2), (3, 1.0, 2), (4, 7.0, 3)]
    assert [(r.request_id, r.arrival_s, r.prompt_len) for r in both] == wanted
    assert join() == [] and first[1].request_id == 1


TWO = ((0.0, 1.0, 7.0), (0.5, 1.0))


def test_arrivals_of_a_seed_never_change():
    draws = np.random.RandomState(0).poisson(7.0 * 0.01, size=5000).tolist()
    one_by_one = [slot * 0.01 for slot, draw in enumerate(draws) for _ in range(draw)]
    assert poisson_arrivals(7.0, 50.0, 0).tolist() == one_by_one
    assert poisson_arrivals(2.0, 3600.0, 0).size == 7280  # the count of the authors' trace
    first, again = (poisson_arrivals(3.0, 100.0, 1).tobytes() for _ in range(2))
    assert first == again
    assert first != poisson_arrivals(3.0, 100.0, 2).tobytes()
    assert poisson_arrivals(0.0, 100.0, 0).size == poisson_arrivals(5.0, 0.0, 0).size == 0


@pytest.mark.parametrize(
    "bad",
    [
        *(("rate", x) for x in (-1.0, math.nan, math.inf, 1e12, "2")),
        *(("duration_s", x) for x in (-1.0, math.nan, 1e9)),
        *(("seed", x) for x in (-1, 2**32, 0.5)),
    ],
)
def test_arrivals_refuse_bad_arguments(bad):
    good = {"rate": 1.0, "duration_s": 10.0, "seed": 0}
    with pytest.raises(ValueError, match=bad[0]):
        poisson_arrivals(**(good | dict([bad])))


def test_trace_of_exact_pairs_takes_the_first_ones_and_shuffles_them():
    inputs, outputs = np.arange(1, 5001), np.arange(5001, 10_001)
    requests = make_trace((inputs, outputs), 2.0, 600.0, seed=3)
    arrivals = poisson_arrivals(2.0, 600.0, seed=3)
    assert [request.arrival_s for request in requests] == arrivals.tolist()
    assert [request.request_id for request in requests] == list(range(len(arrivals)))
    wanted = list(range(1, len(arrivals) + 1))
    prompts = [request.prompt_len for request in requests]
    assert sorted(prompts) == wanted
    random.seed(3)
    random.shuffle(wanted)
    assert prompts == wanted
    assert all(request.output_len == request.prompt_len + 5000 for request in requests)


def test_trace_starts_over_when_pairs_run_out_and_drops_long_ones():
    lengths = (np.array([1, 2, 50]), np.array([7, 8, 50]))
    requests = make_trace(lengths, 5.0, 100.0, seed=0, total_below=100)
    pairs = [(request.prompt_len, request.output_len) for request in requests]
    assert set(pairs) == {(1, 7), (2, 8)}
    assert abs(pairs.count((1, 7)) - pairs.count((2, 8))) <= 1
    kept = make_trace(lengths, 5.0, 100.0, seed=0, total_below=101)
    assert any(request.prompt_len == 50 for request in kept)


@needs_data
def test_trace_of_the_artifact():
    """First N pairs below 2048: a 20-minute trace at 2 requests/s has means of its own."""
    lengths = read_lengths(SHAREGPT_FILE)
    requests = make_trace(lengths, 2.0, 3600.0, seed=0, total_below=2048)
    assert len(requests) == 7280
    columns = find_lengths([str(SHAREGPT_FILE)], None).columns("ShareGPT", 2.0, 3600.0, 0)
    assert columns == of_requests(requests), "as figures draw it"
    keep = lengths[0] + lengths[1] < 2048
    assert keep.sum() == 79_725
    assert lengths[0][keep][:2400].mean() == pytest.approx(152.1, abs=0.05)
    assert sum(r.prompt_len for r in requests) == lengths[0][keep][:7280].sum()


def test_trace_from_a_table():
    requests = make_trace(SHAREGPT, 2.0, 600.0, seed=4)
    assert requests == make_trace(SHAREGPT, 2.0, 600.0, seed=4)
    assert requests != make_trace(SHAREGPT, 2.0, 600.0, seed=5)
    inputs, outputs = SHAREGPT.sample(len(requests), np.random.default_rng(4))
    assert [request.prompt_len for request in requests] == inputs.tolist()
    assert [request.output_len for request in requests] == outputs.tolist()
    assert all(type(request.prompt_len) is int for request in requests)


def test_trace_options_reach_the_requests():
    prefix_len, added = WMT16_PROMPTS[5]
    plain = make_trace(WMT16, 5.0, 20.0, seed=0)
    five = make_trace(WMT16, 5.0, 20.0, 0, prefix_len=prefix_len, added_prompt_len=added)
    assert [r.prompt_len + added for r in plain] == [r.prompt_len for r in five]
    assert {r.prefix_len for r in five} == {prefix_len}
    assert {r.prefix_len for r in plain} == {0}
    assert {r.decoding for r in make_trace(ALPACA, 5.0, 20.0, 0, num_samples=4)} == {"parallel"}
    assert {r.beam_width for r in make_trace(ALPACA, 5.0, 20.0, 0, beam_width=6)} == {6}


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        (SHAREGPT, {"total_below": 2048}),
        (SHAREGPT, {"added_prompt_len": -1}),
        (SHAREGPT, {"num_samples": 2, "beam_width": 2}),
        (([5], [5]), {"total_below": 10}),
        *((pairs, {}) for pairs in (([], []), ([1, 2], [3]), ([0], [5]), ([1.5], [5]))),
    ],
)
def test_trace_refuses_bad_arguments(lengths, options):
    with pytest.raises(ValueError):
        make_trace(lengths, 5.0, 20.0, 0, **options)


# --- requests -----------------------------------------------------------------------------


def test_request_properties():
    single = Request(0, 0.0, 3, 4)
    assert (single.num_seqs, single.decoding, single.prefix_len) == (1, "single", 0)
    parallel = Request(1, 0.5, 3, 4, num_samples=6)
    assert (parallel.num_seqs, parallel.decoding) == (6, "parallel")
    beam = Request(2, 1, np.int64(3), 4, beam_width=4, prefix_len=80)
    assert (beam.num_seqs, beam.decoding) == (4, "beam")
    with pytest.raises(FrozenInstanceError):
        single.output_len = 5


BAD_FIELDS = {
    "request_id": (-1, 1.0, True, None),
    "arrival_s": (-0.1, math.nan, math.inf, "0"),
    "prompt_len": (0, 2.5),
    "output_len": (0, -3),
    "num_samples": (0,),
    "beam_width": (0,),
    "prefix_len": (-1, "80"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_request_checks(name):
    good = {"request_id": 0, "arrival_s": 0.0, "prompt_len": 1, "output_len": 1}
    Request(**good)
    for value in BAD_FIELDS[name]:
        with pytest.raises(ValueError, match=name):
            Request(**(good | {name: value}))


def test_request_is_not_sampled_and_beam_searched_at_once():
    with pytest.raises(ValueError, match="at most one"):
        Request(0, 0.0, 1, 1, num_samples=2, beam_width=2)
