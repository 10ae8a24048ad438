"""curves.py with outcomes made by hand: which rates are asked for, and what is read from them."""

import math
import random

import pytest

from vllm_sim.evaluation.curves import FAR_BELOW, MAX_RATES, STEP, WIDE, Curve
from vllm_sim.evaluation.experiments import Outcome, Run
from vllm_sim.paper import VLLM

RUN = Run(VLLM, "opt-13b", "ShareGPT", 7.0, 60.0, seed=3)
OVERLOADED = 5.0  # s/token


def queue(capacity):
    """rate -> s/token, a queue: 0.5 s/token are reached at 0.94 of the capacity."""
    return lambda rate: 0.03 / (1 - rate / capacity) if rate < capacity else OVERLOADED


def simulated(run, latency):
    return Outcome(latency(run.rate), num_requests=1, num_iterations=1, mean_batch=1.0)


def drive(curve, latency):
    """(asked, done): rates as they are asked for, one list a round, until nothing is needed."""
    asked, done = [], {}
    while runs := curve.needed(done):
        assert len(asked) < 2 * MAX_RATES, "it never ends"
        assert not done.keys() & set(runs), "a rate is asked for twice"
        assert len(set(runs)) == len(runs)
        asked.append([run.rate for run in runs])
        done |= {run: simulated(run, latency) for run in runs}
    return asked, done


def curve_of(*points, **options):
    return Curve(RUN, points, **options)


def straight(low, high, latency):
    """Where a line from point `low` to point `high` reaches a latency."""
    share = (latency - low[1]) / (high[1] - low[1])
    return low[0] + share * (high[0] - low[0])


# --- what is asked for, and in which order -------------------------------------------------------


def test_runs_differ_from_the_curves_in_nothing_but_their_rate():
    curve = curve_of((1.0, 0.05), (2.0, 1.1))
    (run,) = curve.needed({})
    assert run == Run(VLLM, "opt-13b", "ShareGPT", 1.0, 60.0, seed=3)
    assert curve.at(2.5) == Run(VLLM, "opt-13b", "ShareGPT", 2.5, 60.0, seed=3)


def test_rates_are_the_papers_and_the_next_one_each_once_and_in_order():
    curve = curve_of((2, 0.06), (1, 0.05), (2, 0.07), (3, 0.3), next_rate=3.5)
    assert curve.rates == [1.0, 2.0, 3.0, 3.5]
    assert curve_of((1, 0.05), (3, 0.3), next_rate=3.0).rates == [1.0, 3.0]
    assert curve_of((1, 0.05), (3, 0.3)).rates == [1.0, 3.0]


def test_low_rates_go_ahead_and_high_ones_wait_for_need():
    """Of 1 to 10 those up to 7.5 are simulated at once, then one by one."""
    curve = curve_of(*((rate, 0.03 + rate / 100) for rate in range(1, 10)), (10, 0.9))
    assert FAR_BELOW == 0.75
    asked, done = drive(curve, queue(9.7))
    assert asked == [[1, 2, 3, 4, 5, 6, 7], [8], [9], [10]]
    assert [rate for rate, _ in curve.line(done)] == list(range(1, 11))


def test_nothing_is_asked_for_beyond_the_rate_that_has_reached_all():
    curve = curve_of((1, 0.04), (1.9, 0.05), (2, 0.06), (2.1, 0.3), (2.2, 1.0))
    asked, done = drive(curve, queue(2.05))  # 0.41 s/token at 1.9, 1.23 at 2
    assert asked == [[1], [1.9], [2]]
    assert curve.needed(done) == []
    assert [rate for rate, _ in curve.line(done)] == [1, 1.9, 2]


def test_it_goes_on_until_the_papers_highest_latency_is_reached():
    """0.5 s/token are not all that is read: every point drawn above it is, too."""
    curve = curve_of((1, 0.04), (1.9, 0.4), (2, 0.8), (2.05, 1.2), (2.1, 1.6))
    slow = {1: 0.1, 1.9: 0.3, 2: 0.6, 2.05: 0.9, 2.1: 1.7}
    asked, _ = drive(curve, slow.__getitem__)
    assert asked == [[1], [1.9], [2], [2.05], [2.1]]
    lower = curve_of((1, 0.04), (1.9, 0.4), (2, 0.8), (2.05, 0.9), (2.1, 0.7))
    assert drive(lower, slow.__getitem__)[0] == [[1], [1.9], [2], [2.05]]


@pytest.mark.parametrize("capacity", [2.3, 3.0, 4.7])
def test_further_rates_follow_in_equal_steps_where_the_papers_do_not_suffice(capacity):
    curve = curve_of((1, 0.04), (2, 0.3), next_rate=2.2)
    asked, done = drive(curve, queue(capacity))
    further, rate = [], 2.2
    while rate < 0.94 * capacity:
        rate = round(rate * STEP, 4)
        further.append([rate])
    halved = [[r] for (r,) in asked if r > 2.2 and [r] not in further]
    assert asked == [[1], [2], [2.2], *further, *halved]
    assert 1.0 < STEP <= 1.1 and len(halved) <= 1, "hardly wider than a gap that is halved"
    assert len(curve.line(done)) == len(done)


def test_the_first_step_beyond_the_paper_is_not_its_gap():
    """The paper's line ends below 0.5 s/token: there is no segment of its own to accept."""
    curve = curve_of((1, 0.04), (2, 0.3))
    beyond = round(2 * STEP, 4)
    asked, done = drive(curve, {1: 0.1, 2: 0.4, beyond: 4.9, (2 + beyond) / 2: 0.6}.__getitem__)
    halved = [[(2 + beyond) / 2]] if beyond - 2 > WIDE * beyond else []
    assert asked == [[1], [2], [beyond], *halved]
    assert 2 < curve.rate_at(done) < 2 * (1 + WIDE)


def test_few_outcomes_are_enough_to_ask_for_those_that_are_missing():
    curve = curve_of((1, 0.04), (2, 0.05), (3, 0.06), (10, 1.0))
    outcome = Outcome(0.1, 1, 1, 1.0)
    assert [run.rate for run in curve.needed({curve.at(2.0): outcome})] == [1, 3]
    assert curve.line({curve.at(2.0): outcome}) == [], "up to the first that is missing"
    other = Run(VLLM, "opt-66b", "ShareGPT", 1.0, 60.0, seed=3)
    assert [run.rate for run in curve.needed({other: outcome})] == [1, 2, 3]


def test_a_latency_that_never_comes_is_asked_for_only_so_many_times():
    curve = curve_of((1, 0.04), (2, 0.8))
    asked, done = drive(curve, lambda rate: 0.05)
    rates = [rate for some in asked for rate in some]
    assert len(rates) == MAX_RATES and rates == sorted(set(rates))
    assert math.isnan(curve.rate_at(done))
    assert math.isnan(curve.rate_at(done, 0.04)), "above it from the first rate on"


# --- gaps ----------------------------------------------------------------------------------------


def test_the_papers_own_wide_gap_and_that_before_the_next_rate_are_read_along_a_straight_line():
    curve = curve_of((1, 0.04), (2, 1.1))
    latency = queue(1.8)
    asked, done = drive(curve, latency)
    assert asked == [[1], [2]]
    wanted = straight((1, 0.03 / (1 - 1 / 1.8)), (2, OVERLOADED), 0.5)
    assert curve.rate_at(done) == pytest.approx(wanted, rel=1e-12)
    curve = curve_of((1, 0.04), (2, 0.3), next_rate=3.0)
    asked, done = drive(curve, queue(2.5))
    assert asked == [[1, 2], [3]]
    assert 2 < curve.rate_at(done) < 3


def test_another_wide_gap_is_halved_until_it_is_narrow():
    """The paper crosses between 2 and 3, ours between 1 and 2."""
    curve = curve_of((1, 0.04), (2, 0.05), (3, 1.1))
    latency = queue(1.8)
    asked, done = drive(curve, latency)
    # 1.5: 0.18, 1.75: 1.08, 1.625: 0.31 s/token, and 1.625 to 1.75 is 7 % of 1.75.
    assert asked == [[1, 2], [1.5], [1.75], [1.625]]
    assert WIDE == 0.08
    wanted = straight((1.625, latency(1.625)), (1.75, latency(1.75)), 0.5)
    assert curve.rate_at(done) == pytest.approx(wanted, rel=1e-12)
    assert [rate for rate, _ in curve.line(done)] == [1, 1.5, 1.625, 1.75, 2]


def test_a_gap_of_the_papers_in_part_is_not_the_papers():
    """Ours crosses between 2 and 3 as the paper's, but the paper has a point between."""
    latencies = {1: 0.05, 2: 0.06, 2.5: 0.3, 3: 1.1}
    coarse, fine = curve_of((1, 0.04), (2, 0.05), (3, 1.0)), curve_of(*latencies.items())
    assert drive(coarse, latencies.__getitem__)[0] == [[1, 2], [3]]
    late = {**latencies, 2.5: 0.7, 2.25: 0.4, 2.375: 0.49, 3: 1.2}
    asked, done = drive(fine, late.__getitem__)
    assert asked == [[1, 2], [2.5], [3], [2.25], [2.375]]
    assert fine.rate_at(done) == pytest.approx(straight((2.375, 0.49), (2.5, 0.7), 0.5))
    # A narrow one is left alone.
    curve = curve_of((1, 0.04), (1.08, 0.05), (1.15, 0.06), (2, 0.7))
    assert drive(curve, queue(1.1))[0] == [[1, 1.08, 1.15]]


def test_the_gap_is_where_the_latency_is_read():
    curve = curve_of((1, 0.04), (2, 0.05), (3, 1.1), read_at=0.1)
    latency = queue(1.8)
    asked, done = drive(curve, latency)
    assert asked == [[1, 2], [1.5], [1.25], [1.375], [1.3125]]
    # 0.1 s/token at 0.7 of the capacity.
    assert curve.rate_at(done) == pytest.approx(0.7 * 1.8, rel=0.01)


# --- the rate that is read -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_the_rate_read_is_close_to_where_the_latency_is_reached(seed):
    """Whatever the paper's points are, as long as ours does not cross in their widest gap."""
    rng = random.Random(seed)
    rates = sorted(round(rng.uniform(0.5, 10.0), 2) for _ in range(rng.randint(2, 9)))
    latencies = sorted(rng.uniform(0.02, 0.45) for _ in rates)
    next_rate = rng.choice([None, round(rates[-1] * 1.05, 4)])
    # The paper's own line crosses behind its last point, if at all.
    curve = Curve(RUN, tuple(zip(rates, latencies)), next_rate)
    capacity = rng.uniform(rates[0] * 1.5, 25.0)
    asked, done = drive(curve, queue(capacity))
    crossing = 0.94 * capacity
    found = curve.rate_at(done)
    assert abs(found - crossing) <= max(WIDE, STEP - 1.0) * capacity * 1.1
    highest = max(rate for some in asked for rate in some)
    assert highest >= crossing
    # No further than needed: one step beyond the crossing, unless the paper's rates are wider.
    assert highest <= max(crossing * STEP + 1e-3, *curve.rates)
    line = curve.line(done)
    assert line == sorted(line) and len(dict(line)) == len(line)
    assert all(seconds == queue(capacity)(rate) for rate, seconds in line)


@pytest.mark.parametrize("seed", range(20))
def test_outcomes_may_come_one_at_a_time_and_in_any_order(seed):
    """Then some are asked for that turn out not to be needed; what is read is the same."""
    rng = random.Random(seed)
    rates = sorted(rng.sample(range(1, 20), rng.randint(2, 8)))
    points = tuple((rate, 0.04 + 0.02 * i) for i, rate in enumerate(rates[:-1]))
    curve = Curve(RUN, (*points, (rates[-1], 1.2)), None, 0.5, rng.choice([0.0, 1.6]))
    latency = queue(rng.uniform(1.5, 25.0))
    _, at_once = drive(curve, latency)
    one_by_one = {}
    while runs := curve.needed(one_by_one):
        assert len(one_by_one) < 3 * MAX_RATES
        run = rng.choice(runs)
        assert run not in one_by_one
        one_by_one[run] = simulated(run, latency)
    assert one_by_one.keys() <= at_once.keys()
    assert curve.rate_at(one_by_one) == curve.rate_at(at_once)
    assert curve.line(one_by_one) == curve.line(at_once)


def test_other_latencies_are_read_from_the_same_line():
    curve = curve_of((1, 0.04), (2, 0.05), (3, 1.1))
    latencies = {1: 0.1, 2: 0.3, 3: 1.3}
    _, done = drive(curve, latencies.__getitem__)
    assert curve.rate_at(done, 0.2) == pytest.approx(1.5)
    assert curve.rate_at(done, 0.3) == pytest.approx(2.0), "a measured point itself"
    assert curve.rate_at(done, 0.4) == pytest.approx(2.1)
    assert curve.rate_at(done) == curve.rate_at(done, 0.5) == pytest.approx(2.2)
    assert curve.rate_at(done, 1.3) == pytest.approx(3.0)
    # Where a line falls and rises again the first crossing counts.
    curve = curve_of((1, 0.1), (2, 0.1), (3, 0.1), (4, 1.0))
    _, done = drive(curve, {1: 0.1, 2: 0.3, 3: 0.1, 4: 1.1}.__getitem__)
    assert curve.rate_at(done, 0.2) == pytest.approx(1.5)


def test_what_is_not_on_the_line_or_not_simulated_has_no_rate():
    curve = curve_of((1, 0.04), (2, 1.1))
    _, done = drive(curve, {1: 0.1, 2: OVERLOADED}.__getitem__)
    for latency in (0.0, 0.05, 0.1, OVERLOADED + 1e-9, 100.0, math.nan):
        assert math.isnan(curve.rate_at(done, latency))
    for done in ({}, {curve.at(1.0): Outcome(0.1, 1, 1, 1.0)}):
        assert math.isnan(curve.rate_at(done))
    asked, done = drive(curve, lambda rate: OVERLOADED)
    assert asked == [[1]]
    assert math.isnan(curve.rate_at(done))
    assert math.isnan(curve.rate_at(done, 0.04)), "above it from the first rate on"


# --- the knee ------------------------------------------------------------------------------------


def test_every_drawn_point_below_the_knee_is_simulated():
    """Ours is overloaded from 2 on; the paper's line is flat up to 3.2."""
    points = (1, 0.05), (2, 0.06), (3, 0.07), (3.2, 0.079), (3.4, 0.081), (3.6, 1.2)
    latency = queue(1.9)
    asked, without = drive(curve_of(*points), latency)
    assert asked == [[1, 2], [1.5], [1.75], [1.875]]
    curve = curve_of(*points, knee=1.6)  # 1.6 x 0.05 = 0.08
    asked, done = drive(curve, latency)
    assert asked[:3] == [[1, 2], [3], [3.2]] and curve.at(3.4) not in done
    drawn = dict(curve.line(done))
    assert drawn.keys() >= {1.0, 2.0, 3.0, 3.2}
    assert drawn[3.2] == OVERLOADED
    assert curve.rate_at(done) == curve_of(*points).rate_at(without), "read as without them"


def test_a_knee_beyond_all_points_asks_for_all_of_them():
    points = (1, 0.05), (2, 0.06), (3, 0.07), (3.5, 1.2)
    _, done = drive(curve_of(*points, knee=100.0), queue(1.9))
    assert {run.rate for run in done} >= {1.0, 2.0, 3.0, 3.5}
    # The next rate is not drawn.
    curve = curve_of(*points, knee=100.0, next_rate=3.8)
    assert curve.at(3.8) not in drive(curve, queue(1.9))[1]


@pytest.mark.parametrize("seed", range(20))
def test_points_below_the_knee_are_there_for_any_curve(seed):
    rng = random.Random(seed)
    rates = sorted(rng.sample(range(1, 40), rng.randint(2, 8)))
    points = [(rate / 2, rng.uniform(0.02, 0.2)) for rate in rates]
    points.append((rates[-1] / 2 + 0.5, rng.uniform(0.6, 1.5)))
    curve = Curve(RUN, tuple(points), None, 0.5, knee=rng.uniform(1.0, 5.0))
    capacity = rng.uniform(rates[0] / 2 + 0.1, 30.0)
    _, done = drive(curve, queue(capacity))
    below = {float(rate) for rate, latency in points if latency < curve.knee * points[0][1]}
    assert below <= dict(curve.line(done)).keys()
