"""Seconds of an iteration on today's servers: the parts by hand, and the closed forms as sums."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sim.serving.scheduler import Completion, Iteration
from vllm_sim.serving.server_latency import (
    CARDS,
    FITTED,
    CacheLayers,
    Card,
    Link,
    Matrices,
    ServerLatency,
    Shares,
    Work,
)

SHARES = Shares(0.5, 0.25, 0.125, 1e-3, 0.0, 0.0)
CARD = Card(100.0, 1000.0, 4, Link(50.0, 10.0, 0.01, small_bytes=40), SHARES)
WORK = Work(Matrices(10.0, 5.0), Matrices(2.0, 1.0), (CacheLayers(0.5, 1.0, 2.0),), 2, kernels=20)
MODEL = ServerLatency(WORK, CARD)
STEP = 20e-3


def decodes(num_seqs, context):
    return Iteration(0, 0.0, num_decodes=num_seqs, num_seqs=num_seqs, context_tokens=context)


def prompts(*parts, seqs=1):
    return Iteration(0, 0.0, num_seqs=seqs, prompt_tokens=sum(n for _, n in parts), parts=[*parts])


def test_a_decode_reads_all_matrices_and_its_context():
    read = 10 / 50 + 2 / 50 + 40 * max(0.5 / 50, 1 / 125)
    assert MODEL.iteration(decodes(4, 40)) == pytest.approx(STEP + read)
    assert MODEL.completion(Completion(), None) == 0.0


def test_a_prompt_multiplies_and_each_token_attends_to_those_before_it():
    pairs = 100 * 101 / 2
    expected = STEP + 100 * 5 / 250 + 2 / 50 + 2 * pairs / 125
    assert MODEL.iteration(prompts((0, 100))) == pytest.approx(expected)
    # In parts it is the same attention, and one that ends no prompt reads the head all the same.
    halves = [MODEL.iteration(prompts(part, seqs=0)) for part in ((0, 60), (60, 40))]
    assert sum(halves) == pytest.approx(expected + STEP + 2 / 50)


def test_a_window_bounds_what_is_read_and_attended_to():
    windowed = replace(WORK, cache=(CacheLayers(0.5, 1.0, 2.0, window=10),))
    model = ServerLatency(windowed, CARD)
    assert model.iteration(decodes(2, 90)) == MODEL.iteration(decodes(2, 20))
    more = model.iteration(prompts((0, 30))) - model.iteration(prompts((0, 29)))
    assert more == pytest.approx(5 / 250 + 2 * 10 / 125)
    after = model.iteration(prompts((50, 7)))
    assert after == pytest.approx(STEP + 10 / 50 + 2 / 50 + 2 * 70 / 125)


def test_experts_are_read_as_far_as_tokens_touch_them():
    work = replace(WORK, experts=Matrices(30.0, 1.0), num_experts=4, active_experts=1)
    model = ServerLatency(work, CARD)
    for seqs in (1, 2, 50):
        touched = 1 - 0.75**seqs
        more = model.iteration(decodes(seqs, 0)) - MODEL.iteration(decodes(seqs, 0))
        assert more == pytest.approx(touched * 30 / 50)


def test_messages_between_gpus_and_small_ones_are_slow():
    work = replace(WORK, messages=3, message_bytes=10.0, gpus=2)
    model = ServerLatency(work, CARD)
    small = model.iteration(decodes(1, 0)) - MODEL.iteration(decodes(1, 0))
    assert small == pytest.approx(3 * (0.01 + 10 / 10))
    large = model.iteration(decodes(8, 0)) - MODEL.iteration(decodes(8, 0))
    assert large == pytest.approx(3 * (0.01 + 80 / 50))


def test_fp8_multiplies_faster_and_reads_no_faster_by_itself():
    quick = ServerLatency(replace(WORK, dense=Matrices(10.0, 5.0, speedup=2.0)), CARD)
    assert quick.iteration(decodes(1, 0)) == MODEL.iteration(decodes(1, 0))
    saved = MODEL.iteration(prompts((0, 100))) - quick.iteration(prompts((0, 100)))
    assert saved == pytest.approx(100 * 5 / 500)


def test_few_sequences_leave_multiprocessors_idle():
    tailed = ServerLatency(WORK, replace(CARD, shares=replace(SHARES, tail=1.0, most_tail=0.8)))
    for seqs, tail in ((1, 0.8), (4, 0.5), (8, 0.25)):
        more = tailed.iteration(decodes(seqs, 80)) - MODEL.iteration(decodes(seqs, 80))
        assert more == pytest.approx(tail * 80 * 0.5 / 50)


def test_replicas_share_experts_and_a_prompt_is_on_one_of_them():
    work = replace(WORK, experts=Matrices(30.0, 1.0), num_experts=4, replicas=2)
    model = ServerLatency(work, CARD)
    alone = ServerLatency(replace(work, replicas=1), CARD)
    # Two replicas with half of the sequences each, but for the experts, which all tokens touch.
    both = model.iteration(decodes(8, 40)) - alone.iteration(decodes(4, 20))
    assert both == pytest.approx((0.75**4 - 0.75**8) * 30 / 50)
    # A prompt is on one of them; another beside it takes no longer but for its experts.
    one, two = model.iteration(prompts((0, 100))), model.iteration(prompts((0, 100), (0, 100)))
    assert one == pytest.approx(alone.iteration(prompts((0, 100))))
    assert two == pytest.approx(one + 200 / 250 - 30 / 50)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.integers(0, 60),
    seqs=st.integers(1, 12),
    context=st.integers(1, 400),
    window=st.sampled_from([None, 1, 17, 40]),
    wait=st.floats(-1.0, 60.0),
)
def test_many_steps_are_the_sum_of_single_ones(steps, seqs, context, window, wait):
    layers = CacheLayers(0.5, 1.0, 2.0), CacheLayers(0.7, 9.0, 2.0, window)
    card = replace(CARD, shares=replace(SHARES, tail=1.0, most_tail=0.8))
    model = ServerLatency(replace(WORK, cache=layers), card)
    single = [model.decode_steps(1, seqs, context + i * seqs) for i in range(steps)]
    assert model.decode_steps(steps, seqs, context) == pytest.approx(math.fsum(single))
    one = model.iteration(decodes(seqs, context))
    assert one == pytest.approx(model.decode_steps(1, seqs, context))
    started = model.steps_until(wait, steps, seqs, context)
    assert 0 <= started <= steps
    assert started == 0 or model.decode_steps(started - 1, seqs, context) < wait
    assert started == steps or model.decode_steps(started, seqs, context) >= wait


def test_what_makes_no_sense_is_refused():
    for change in ({"active_experts": 0}, {"active_experts": 2}, {"gpus": 0}, {"kv_heads": 0}):
        with pytest.raises(ValueError):
            replace(WORK, **change)
    for change in ({"bandwidth": 0.0}, {"flops": -1.0}, {"kernel_s": -1e-9}, {"tail": -1.0}):
        with pytest.raises(ValueError):
            replace(FITTED, **change)
    assert CARDS["rtx4090"].shares == CARDS["rtxpro6000"].shares == FITTED
