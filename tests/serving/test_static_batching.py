"""static_batching.py against padded batches that are filled and run one token at a time."""

import math
import random

import pytest

from vllm_sim.models import DEPLOYMENTS
from vllm_sim.serving.latency import UNIT, LatencyModel, latency_model
from vllm_sim.serving.static_batching import simulate_static


def exact_model(rng):
    """Few binary digits: every sum is exact, so arrivals can coincide with the end of a batch."""
    weights = rng.choice([0.0, 1 / 16, 1 / 4])
    return LatencyModel(step_s=0.5, token_s=1 / 64, context_s=1 / 1024, weights_s=weights)


def one_token_at_a_time(trace, batch_size, limit, model):
    """([(index, finish)] in order of completion, [requests in each iteration]) of a trace of
    (arrival, prompt, output)."""
    queue = list(enumerate(trace))
    clock, finished, batches = 0.0, [], []
    while queue:
        clock = max(clock, queue[0][1][0])
        batch = []
        for index, request in queue:
            together = [*(r for _, r in batch), request]
            padded = max(p for _, p, _ in together) + max(o for _, _, o in together)
            has_come = request[0] <= clock
            if len(together) > batch_size or not has_come or (batch and padded > limit):
                break
            batch.append((index, request))
        queue = queue[len(batch) :]
        padded_input = max(prompt for _, (_, prompt, _) in batch)
        software = model.step_s
        computing = sum(model.token_s * prompt for _, (_, prompt, _) in batch)
        clock += software + max(model.weights_s, computing)
        batches.append(len(batch))
        have = 1  # output tokens of each sequence, finished or not
        while any(output > have for _, (_, _, output) in batch):
            clock += software + max(model.weights_s, model.token_s * len(batch))
            for _ in batch:
                clock += model.context_s * (padded_input + have)
            batches.append(len(batch))
            have += 1
        finished += [(index, clock) for index, _ in batch]
    return finished, batches


def random_trace(rng, count, spread):
    """In order of arrival, with many at the same moment; times are quarters of a second."""
    arrivals = sorted(rng.randint(0, spread) / 4 for _ in range(count))
    return [(at, rng.randint(1, 12), rng.randint(1, 12)) for at in arrivals]


def serve(trace, *arguments):
    arrivals, prompts, outputs = zip(*trace) if trace else ((), (), ())
    return simulate_static(arrivals, prompts, outputs, *arguments)


@pytest.mark.parametrize("seed", range(60))
def test_against_one_token_at_a_time(seed):
    rng = random.Random(seed)
    trace = random_trace(rng, rng.randint(1, 30), rng.choice([0, 20, 200, 2000]))
    batch_size, limit = rng.choice([1, 2, 3, 5, 50]), rng.choice([1, 8, 14, 18, 24, 2040])
    model = exact_model(rng)
    finished, batches = one_token_at_a_time(trace, batch_size, limit, model)
    result = serve(trace, batch_size, limit, model)
    assert list(result.finish_s.items()) == finished
    assert (result.num_iterations, result.sum_groups) == (len(batches), sum(batches))
    assert result.mean_batch == result.mean_window_batch == sum(batches) / len(batches)
    normalized = [(end - trace[index][0]) / trace[index][2] for index, end in finished]
    assert result.normalized_latency == pytest.approx(math.fsum(normalized) / len(trace), rel=1e-12)


def test_against_one_token_at_a_time_where_times_are_rounded():
    model = latency_model(DEPLOYMENTS["opt-13b"], 16, static=True)
    rng = random.Random(3)
    trace, now = [], 0.0
    for _ in range(120):
        now += rng.expovariate(2.0)
        trace.append((now, rng.randint(1, 900), rng.randint(1, 400)))
    finished, batches = one_token_at_a_time(trace, 6, 1024, model)
    result = serve(trace, 6, 1024, model)
    assert list(result.finish_s) == [index for index, _ in finished]
    assert list(result.finish_s.values()) == pytest.approx([end for _, end in finished], rel=1e-9)
    assert result.sum_groups == sum(batches)
    assert 1.0 < result.mean_batch < 6.0


def test_two_batches_by_hand():
    model = LatencyModel(step_s=1.0, token_s=0.5, context_s=0.125)
    #        arrival, prompt, output
    trace = [(10.0, 4, 2), (10.0, 6, 3), (11.0, 2, 1), (18.0, 8, 1)]
    result = serve(trace, 2, 100, model)
    # From 10: 1 + 0.5 x (4 + 6) for the prompts, then two steps of two sequences padded to 6:
    # 1 + 2 x 0.5 + 2 x 7 x 0.125, and the same of 8 tokens each.
    first = 10.0 + 6.0 + 3.75 + 4.0
    # The next takes who has come by then: prompts of 2 and 8, no step after them.
    second = first + 1.0 + 0.5 * (2 + 8)
    assert first == 23.75
    assert result.finish_s == {0: first, 1: first, 2: second, 3: second}
    assert (result.num_iterations, result.sum_groups) == (3 + 1, 2 * 3 + 2 * 1)
    normalized = [13.75 / 2, 13.75 / 3, (second - 11.0) / 1, (second - 18.0) / 1]
    assert result.normalized_latency == pytest.approx(sum(normalized) / 4, rel=1e-12)


def test_nobody_is_there():
    result = serve([], 4, 100, UNIT)
    assert (result.finish_s, result.num_iterations, result.mean_batch) == ({}, 0, 0.0)


def test_who_is_served_together_by_hand():
    def ends(batch_size, limit, *trace):
        return list(serve(trace, batch_size, limit, UNIT).finish_s.values())

    # A short request waits for the longest beside it, and the next for all of them.
    short = (0.0, 1, 1), (0.0, 1, 50), (0.0, 1, 2), (1.0, 1, 1)
    assert ends(3, 100, *short) == [50, 50, 50, 51]
    # Who comes the moment that a batch ends is in the next, who comes later is not.
    assert ends(9, 100, (0.0, 1, 4), (0.5, 1, 4), (4.0, 1, 4), (4.25, 1, 4)) == [4, 8, 8, 12]
    assert ends(4, 100, (1000.0, 3, 2), (5000.0, 3, 2)) == [1002, 5002]
    # Each of the two stays below the limit by itself; padded to each other they do not.
    assert ends(2, 20, (0.0, 10, 2), (0.0, 2, 10)) == [10, 10], "exactly the limit"
    assert ends(2, 19, (0.0, 10, 2), (0.0, 2, 10)) == [2, 12]
    # A batch ends at the first that does not fit: the third would, but does not overtake it.
    assert ends(3, 10, (0.0, 5, 5), (0.0, 9, 9), (0.0, 5, 5)) == [5, 14, 19]
    # Who is too long is served alone, also where the next exceeds nothing further.
    assert ends(4, 10, (0.0, 5, 3), (0.0, 50, 60), (0.0, 5, 3), (0.0, 5, 4)) == [3, 63, 67, 67]
    assert ends(4, 109, (0.0, 50, 60), (0.0, 1, 1)) == [60, 61]
    assert ends(2, 100, *[(0.0, 2, 3)] * 5) == [3, 3, 6, 6, 9]


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "2"])
def test_bad_limits_are_refused(bad):
    trace = [(0.0, 1, 1)]
    with pytest.raises(ValueError, match="batch size"):
        serve(trace, bad, 100, UNIT)
    with pytest.raises(ValueError, match="maximum total length"):
        serve(trace, 2, bad, UNIT)


def test_more_requests_than_python_shares_numbers():
    """Small integers are one object each; a count above 256 is equal without being the same."""
    rng = random.Random(4)
    trace = [(0.0, rng.randint(1, 12), rng.randint(1, 4)) for _ in range(900)]
    trace += [(1e6, 3, 2)] * 301
    model = exact_model(rng)
    for batch_size in (300, 2000):
        finished, batches = one_token_at_a_time(trace, batch_size, 2040, model)
        result = serve(trace, batch_size, 2040, model)
        assert list(result.finish_s.items()) == finished
        assert result.sum_groups == sum(batches)
        assert max(batches) == min(batch_size, 900)
