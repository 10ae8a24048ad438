"""latency.py against iterations added up one by one, and against the data sheets, by hand."""

import math
import random
from dataclasses import FrozenInstanceError, asdict, astuple, replace
from fractions import Fraction

import pytest

from kv_cache_manager import BaselineCacheManager, PagedKVCacheManager
from vllm_sim.models import DEPLOYMENTS, GPU, GPUS, MODELS, Deployment
from vllm_sim.serving.latency import (
    FITTED,
    SWAP_IN,
    SWAP_OUT,
    UNIT,
    ApartLatency,
    LatencyModel,
    Software,
    latency_model,
)
from vllm_sim.serving.scheduler import Completion, Iteration

SOFTWARE = Software(3e-3, 0.2e-3, 7e-3, 0.5e-3, beam_s=0.3e-3, copy_call_s=2e-6)


def start_times(model, num_seqs, context_tokens, count):
    """When each of `count` decode iterations starts: one by one, in exact arithmetic."""
    step, token, read = map(Fraction, (model.step_s, model.token_s, model.context_s))
    step += max(Fraction(model.weights_s), token * num_seqs) + Fraction(model.seq_s) * num_seqs
    now, contexts = Fraction(0), [Fraction(context_tokens, num_seqs)] * num_seqs
    starts = []
    for _ in range(count):
        starts.append(now)
        now += step + sum(read * context for context in contexts)
        contexts = [context + 1 for context in contexts]
    return starts


# --- decode_steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_many_steps_take_what_the_iterations_take_one_by_one(seed):
    rng = random.Random(seed)
    names = "token_s", "context_s", "seq_s", "weights_s"
    used = {name: rng.choice([0.0, 10 ** rng.uniform(-9, 0)]) for name in names}
    unused = dict.fromkeys(("request_s", "copy_s", "swap_out_s", "swap_in_s", "move_s"), 1e6)
    model = LatencyModel(10 ** rng.uniform(-6, 1), **used, **unused, block_size=16)
    num_seqs = rng.randint(1, 300)
    context = rng.randint(num_seqs, 1000 * num_seqs)
    for num_steps in (1, 2, 3, rng.randint(4, 50), rng.randint(50, 2000)):
        # Every sequence holds a token more in each iteration.
        seconds = [
            model.iteration(
                Iteration(
                    i,
                    0.0,
                    num_decodes=num_seqs,
                    num_seqs=num_seqs,
                    context_tokens=context + i * num_seqs,
                )
            )
            for i in range(num_steps)
        ]
        total = model.decode_steps(num_steps, num_seqs, context)
        assert total == pytest.approx(math.fsum(seconds), rel=1e-12)
    assert model.decode_steps(0, num_seqs, context) == 0.0


# --- steps_until ---------------------------------------------------------------------------------


def dyadic_model(rng):
    """Times are few binary digits, so that every sum of them is exact."""
    step = rng.randint(1, 64) / 64
    token, context = rng.choice([0, 1, 5]) / 256, rng.choice([0, 0, 1, 3, 7]) / 1024
    seq, weights = rng.choice([0, 3]) / 128, rng.choice([0, 9]) / 256
    return LatencyModel(step, token, context, seq, weights_s=weights)


@pytest.mark.parametrize("seed", range(60))
def test_as_many_steps_as_start_before_the_wait_is_over(seed):
    rng = random.Random(seed)
    model = dyadic_model(rng)
    num_seqs = rng.randint(1, 6)
    context = rng.randint(num_seqs, 60)
    starts = [float(s) for s in start_times(model, num_seqs, context, 40)]
    exact = rng.choice(starts[1:])
    waits = [-1.0, -1e-300, 0.0, 5e-324, exact]
    waits += [math.nextafter(exact, 0.0), math.nextafter(exact, 99.0), rng.uniform(0, starts[-1])]
    waits += [1e9, 1e300]
    for wait in waits:
        for at_most in (0, 1, 2, rng.randint(3, 38), 39):
            naive = 0
            while naive < at_most and starts[naive] < wait:
                naive += 1
            assert model.steps_until(wait, at_most, num_seqs, context) == naive, (wait, at_most)


@pytest.mark.parametrize("seed", range(30))
def test_a_step_that_would_start_when_the_wait_is_over_does_not(seed):
    """To the last bit of the times that decode_steps gives, or the clock would miss an arrival."""
    rng = random.Random(seed)
    model = LatencyModel(rng.uniform(1e-3, 0.1), rng.uniform(0, 1e-3), rng.uniform(0, 1e-4))
    num_seqs = rng.randint(1, 60)
    context = num_seqs * rng.randint(1, 400)
    drawn = [rng.randint(30, most) for most in (3000, 10**5) for _ in range(20)]
    for count in (*range(1, 30), *drawn):
        start = model.decode_steps(count, num_seqs, context)
        assert model.steps_until(start, 10**6, num_seqs, context) == count
        earlier, later = math.nextafter(start, 0.0), math.nextafter(start, math.inf)
        assert model.steps_until(earlier, 10**6, num_seqs, context) == count
        assert model.steps_until(later, 10**6, num_seqs, context) == count + 1


@pytest.mark.parametrize("seed", range(20))
def test_the_steps_of_a_wait_are_computed_and_not_searched(monkeypatch, seed):
    """Two looks tell that it is this many and no step less: a search would take thousands."""
    rng, looks, real = random.Random(seed), [], LatencyModel.decode_steps

    def counted(*args):
        looks.append(args)
        return real(*args)

    monkeypatch.setattr(LatencyModel, "decode_steps", counted)
    for _ in range(20):
        model = LatencyModel(rng.uniform(1e-3, 0.1), rng.uniform(0, 1e-3), rng.uniform(1e-6, 1e-4))
        num_seqs, wait_s = rng.randint(1, 60), rng.uniform(20.0, 1000.0)
        steps = model.steps_until(wait_s, 10**6, num_seqs, num_seqs * rng.randint(1, 400))
        assert steps > 1 and len(looks) == 2
        looks.clear()


# --- iteration and completion --------------------------------------------------------------------

# Each term has a decimal digit of its own.
DIGITS = LatencyModel(1.0, 10.0, 100.0, 1e7, 1e3, 1e4, 1e5, 1e6, 1e8, block_size=2)
PAIR = (0, 1)


def busy_iteration(**changes):
    parts = {"prefills": [object()] * 5, "num_decodes": 1, "prompt_tokens": 2, "context_tokens": 4}
    parts |= {"num_seqs": 9}
    parts |= {"copies": (PAIR,) * 3, "swapped_out": (PAIR,) * 7, "swapped_in": (PAIR,) * 8}
    return Iteration(0, 0.0, **(parts | changes))


def test_an_iteration_takes_what_it_does():
    # 1 step, 1 + 2 tokens, 4 of context, 5 requests, 3 blocks of 2 slots, 7 out, 8 in, 9 sequences.
    assert DIGITS.iteration(busy_iteration()) == 98_765_431
    assert DIGITS.iteration(Iteration(0, 0.0)) == 1


def test_each_term_counts_by_itself():
    terms = {"prompt_tokens": 20, "context_tokens": 400, "prefills": 5_000, "num_seqs": 90_000_000}
    terms |= {"copies": 60_000, "swapped_out": 700_000, "swapped_in": 8_000_000}
    for name, seconds in terms.items():
        left_out = {name: () if isinstance(getattr(busy_iteration(), name), (list, tuple)) else 0}
        assert DIGITS.iteration(busy_iteration(**left_out)) == 98_765_431 - seconds, name


def test_a_request_costs_beside_others_that_decode_only():
    assert DIGITS.iteration(busy_iteration(num_decodes=0)) == 98_765_431 - 10 - 5_000


@pytest.mark.parametrize(("weights_s", "takes"), [(29.0, 30.0), (30.0, 30.0), (31.5, 31.5)])
def test_computing_hides_behind_reading_the_weights(weights_s, takes):
    model = replace(DIGITS, weights_s=weights_s)
    assert model.iteration(busy_iteration()) == 98_765_401 + takes


def test_what_is_not_work_takes_no_time():
    same = {"freed": [1, 2, 3], "num_swaps": 4, "num_recomputations": 5, "decodes": [object()] * 6}
    assert DIGITS.iteration(busy_iteration(**same)) == 98_765_431


def test_a_beam_that_moves_copies_its_whole_reservation_unless_it_is_paged():
    manager = BaselineCacheManager(16, 4, policy="oracle", max_len=32)
    for seq_id, final_len in enumerate((3, 4, 7, 8, 9, 16)):
        manager.allocate(seq_id, 2, final_len)  # 1, 1, 2, 2, and 4 blocks of the buddy's twice
    model, paged = (
        LatencyModel(step_s=1.0, copy_s=0.5, move_s=0.25, block_size=4),
        PagedKVCacheManager(8, 4),
    )
    for reorders, blocks in (
        ([], 0),
        ([{0: 1}], 1),
        ([{2: 3}], 2),
        ([{5: 4}], 4),
        ([{4: 5, 3: 5}], 4 + 2),
        ([{0: 1}, {2: 3}, {5: 4}], 1 + 2 + 4),
    ):
        completion = Completion(reorders=reorders)
        assert model.completion(completion, manager) == blocks * (4 * 0.5 + 0.25)
        assert model.completion(completion, paged) == 0.0


@pytest.mark.parametrize("step_s", [0.0, -1.0, math.nan])
def test_an_iteration_takes_time(step_s):
    with pytest.raises(ValueError, match="an iteration takes time"):
        LatencyModel(step_s=step_s)


@pytest.mark.parametrize("field", LatencyModel.__slots__)
def test_nothing_gives_time_back(field):
    model = LatencyModel(*range(1, 10), block_size=8)
    with pytest.raises(ValueError, match="nothing gives time back"):
        replace(model, **{field: -1})


# --- the model of a deployment -------------------------------------------------------------------


def test_opt_13b_by_hand():
    """25.7 GB of weights and 800 KB a token, over 80 % of 1,555 GB/s and 60 % of 312 TFLOPS."""
    model = latency_model(DEPLOYMENTS["opt-13b"], 16, SOFTWARE)
    config = MODELS["opt-13b"]
    weights = 2 * config.num_params
    assert weights == pytest.approx(25.7e9, rel=0.002)
    assert model.weights_s == pytest.approx(weights / 1244e9, rel=1e-12)
    assert model.weights_s == pytest.approx(20.66e-3, rel=1e-3)
    assert model.token_s == pytest.approx(2 * config.num_params / 187.2e12, rel=1e-12)
    slot = 2 * 40 * 5120 * 2  # K and V, layers, width, bytes
    assert model.context_s == pytest.approx(slot / 1244e9, rel=1e-12)
    assert model.copy_s == pytest.approx(2 * slot / 1244e9, rel=1e-12)  # read and written
    assert model.move_s == pytest.approx(2 * 40 * 2e-6)
    its_own = (model.step_s, model.seq_s, model.request_s, model.block_size)
    assert its_own == (3e-3, 0.2e-3, 7e-3, 16)
    beams = latency_model(DEPLOYMENTS["opt-13b"], 16, SOFTWARE, beams=True)
    assert beams == replace(model, seq_s=0.2e-3 + 0.3e-3)


@pytest.mark.parametrize(
    ("name", "gpus", "bytes_per_s"), [("opt-66b", 4, 1555e9), ("opt-175b", 8, 2039e9)]
)
def test_each_gpu_reads_and_computes_its_part(name, gpus, bytes_per_s):
    deployment = DEPLOYMENTS[name]
    config = deployment.model
    assert deployment.num_gpus == gpus
    model = latency_model(deployment, 16, SOFTWARE)
    # Norms, biases and positions are on every GPU: well below a thousandth of a part.
    part = config.split_params / gpus + config.whole_params
    assert config.num_params / gpus < part < config.num_params / gpus * 1.003
    assert model.weights_s == pytest.approx(2 * part / (0.8 * bytes_per_s), rel=1e-9)
    assert model.token_s == pytest.approx(2 * part / 187.2e12, rel=1e-9)
    slot = 2 * config.num_layers * config.hidden_size * 2 / gpus
    assert model.context_s == pytest.approx(slot / (0.8 * bytes_per_s), rel=1e-12)
    assert model.copy_s == pytest.approx(2 * model.context_s, rel=1e-12)
    # Nearly as fast again as on half as many GPUs, the software aside.
    half = latency_model(Deployment(config, deployment.gpu, gpus // 2), 16, SOFTWARE)
    assert half.weights_s == pytest.approx(2 * model.weights_s, rel=0.003)
    assert half.context_s == pytest.approx(2 * model.context_s, rel=1e-12)
    assert (half.step_s, half.request_s) == (model.step_s, model.request_s)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_fitted_constants_are_the_default(name):
    fitted = FITTED[name]
    assert all(0.0 <= seconds < 0.1 for seconds in astuple(fitted)), "milliseconds"
    model = latency_model(DEPLOYMENTS[name], 16)
    assert model == latency_model(DEPLOYMENTS[name], 16, fitted)
    its_own = (model.step_s, model.seq_s, model.request_s)
    assert its_own == (fitted.step_s, fitted.seq_s, fitted.request_s)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_faster_transformer_has_a_step_of_its_own_and_requests_for_nothing(name):
    usual = latency_model(DEPLOYMENTS[name], 16, SOFTWARE)
    static = latency_model(DEPLOYMENTS[name], 16, SOFTWARE, static=True)
    assert (static.step_s, static.seq_s, static.request_s) == (0.5e-3, 0.0, 0.0)
    its_own = {name: getattr(usual, name) for name in ("step_s", "seq_s", "request_s", "move_s")}
    assert replace(static, **its_own) == usual, "all else is the same machine"


def test_what_is_not_known_is_refused():
    unknown = Deployment(MODELS["opt-6.7b"], GPUS["a100-40gb"], 1)
    for static in (False, True):
        with pytest.raises(KeyError, match=r"opt-6\.7b"):
            latency_model(unknown, 16, static=static)
    assert latency_model(unknown, 16, SOFTWARE).request_s == 7e-3, "its constants were given"
    for known in ({}, {"bytes_per_s": 2e12}, {"flops_per_s": 3e14}):
        elsewhere = Deployment(MODELS["opt-13b"], GPU("h100-80gb", 80 * 10**9, **known), 1)
        with pytest.raises(KeyError, match="h100"):
            latency_model(elsewhere, 16)


def test_a_model_takes_nothing_for_what_it_does_not_name():
    assert UNIT.iteration(busy_iteration()) == 1.0
    assert LatencyModel(1.0, *[0.0] * 8, block_size=1, weights_s=0.0) == UNIT
    for record, field in ((UNIT, "step_s"), (SOFTWARE, "request_s"), (SWAP_IN, "call_s")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field, 2.0)
    with pytest.raises(TypeError):
        latency_model(DEPLOYMENTS["opt-13b"], 16, None, True)


def test_swapping_a_block_takes_a_call_and_its_slots():
    one = latency_model(DEPLOYMENTS["opt-13b"], 1)
    for size in (1, 2, 4, 16, 256):
        of_size = {"block_size": size}
        for way, swap in (("swap_out_s", SWAP_OUT), ("swap_in_s", SWAP_IN)):
            assert swap.call_s > swap.slot_s > 0.0, "larger blocks pay: they take fewer calls"
            of_size[way] = pytest.approx(swap.call_s + size * swap.slot_s, rel=1e-9)
        expected = asdict(one) | of_size  # nothing else depends on the block size
        assert asdict(latency_model(DEPLOYMENTS["opt-13b"], size)) == expected


def test_prompts_and_decodes_apart_read_the_weights_twice():
    model = ApartLatency(
        1.0, 0.5, 0.01, 0.1, weights_s=4.0, prompt_s=2.0, copy_s=0.25, block_size=2
    )
    decodes = model.decode_steps(1, 3, 100)
    assert decodes == pytest.approx(1.0 + 4.0 + 0.3 + 1.0)
    both = Iteration(0, 0.0, num_decodes=3, context_tokens=100, prompt_tokens=20)
    assert model.iteration(both) == pytest.approx(decodes + 2.0 + 10.0)
    prompts = Iteration(0, 0.0, prompt_tokens=3, copies=[(1, 2)])
    assert model.iteration(prompts) == pytest.approx(2.0 + 4.0 + 0.5)
    moved = replace(model, swap_out_s=0.5, swap_in_s=0.25)
    swaps = Iteration(0, 0.0, swapped_out=[(0, 1)], swapped_in=[(2, 3), (4, 5)])
    assert moved.iteration(swaps) == pytest.approx(1.0)
    assert model.iteration(Iteration(0, 0.0)) == model.step_s  # time goes on
