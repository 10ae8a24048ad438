"""Serving for real: the simulator's decisions, and the text of every request alone."""

import copy
import weakref

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("transformers")

from small_models import VOCAB, on_its_own, small
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kv_cache_manager import RequestTooLargeError
from paged_attention import TRITON
from vllm_sim.engine import fused
from vllm_sim.engine import server as server_module
from vllm_sim.engine.fused import _LayerNorm, _RootMeanSquareNorm, fuse
from vllm_sim.engine.server import Server
from vllm_sim.engine.support import UnsupportedModelError
from vllm_sim.engine.worker import MOST_ROWS, PROMPT_SIZES, Order, Prompt, Worker, _batched, _draw
from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.simulator import Observer, make_groups, simulate
from vllm_sim.serving.systems import POLICIES, new_manager
from vllm_sim.workload.requests import Request

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where triton's kernels run
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NEEDS_CUDA])]
LIMITS, SIZE, BLOCKS = Limits(128, 32), 4, {"paged": 64}


def mixed(count, seed=0):
    """Requests of one and of three samples, all there at once."""
    rng = np.random.default_rng(seed)
    draw = [(int(rng.integers(3, 40)), int(rng.integers(2, 30))) for _ in range(count)]
    return [
        Request(nth, 0.0, *lengths, num_samples=1 if nth % 3 else 3)
        for nth, lengths in enumerate(draw)
    ]


def new_pool(policy):
    room = {"num_cpu_blocks": 16} if policy == "paged" else {}
    return new_manager(policy, BLOCKS.get(policy, 160), SIZE, max_len=128, **room)


def new_server(model, policy, kernel="gather", observers=(), preemption="auto", **options):
    manager = new_pool(policy)
    cpu_blocks = getattr(manager, "num_cpu_blocks", 0)
    sizes = {"max_len": 128, "num_cpu_blocks": cpu_blocks, "most_rows": 64}
    worker = Worker(model, manager.num_blocks, SIZE, kernel=kernel, **sizes, **options)
    return Server(worker, manager, LIMITS, observers=observers, preemption=preemption)


def alone(model, request):
    """What transformers gives for its prompt, on its own."""
    prompt = np.random.default_rng([0, request.request_id]).integers(0, VOCAB, request.prompt_len)
    ids, count = torch.tensor(prompt[None], device=model.device), request.output_len
    lengths = {"max_new_tokens": count, "min_new_tokens": count, "eos_token_id": None}
    with torch.no_grad():
        found = on_its_own(model).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths
        )
    return found[0, request.prompt_len :].tolist()


@pytest.fixture(scope="module")
def texts():
    return {one.request_id: alone(small("opt"), one) for one in mixed(18)}


class Invariants(Observer):
    def __init__(self, manager):
        self.manager = manager

    def on_iteration(self, iteration):
        self.manager.check_invariants()


@pytest.mark.parametrize(("policy", "ahead"), [*((policy, 1) for policy in POLICIES), ("paged", 4)])
def test_every_request_has_its_text_and_the_iterations_are_the_simulators(
    policy, ahead, texts, monkeypatch
):
    """Also if the device is given so many iterations that who gives way comes back meanwhile."""
    monkeypatch.setattr(server_module, "AHEAD", ahead)
    requests = mixed(18)
    server = new_server(small("opt"), policy)
    server.observers = [Invariants(server.manager)]
    served = server.serve(make_groups(requests), keep=True)
    for one in requests:
        assert server.outputs[one.request_id] == [texts[one.request_id]] * one.num_seqs
    manager = new_pool(policy)
    expected, found = simulate(requests, manager, LIMITS), served.result
    for name in "num_iterations", "sum_groups", "num_swaps", "num_recomputations", "num_copies":
        assert getattr(found, name) == getattr(expected, name), name
    if policy == "paged":
        assert min(found.num_swaps, found.num_recomputations, found.num_copies) > 0
    assert served.num_tokens == sum(one.output_len * one.num_seqs for one in requests)
    assert server.manager.num_free_blocks == server.manager.num_blocks
    assert sorted(server._free_rows) == list(range(64)) and not server.tokens
    assert 0.0 < served.busy_share() <= 1.1


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_samples_that_end_at_different_lengths_have_their_texts(preemption, texts):
    """Some with their prompt; what is computed again, or brought back, are those that are left."""
    requests = mixed(18)
    groups = make_groups(requests)
    for group in groups:
        for seq, end in zip(group.seqs[1:], (1, 5)):
            seq.output_len = min(end, seq.output_len)
    server = new_server(small("opt"), "paged", preemption=preemption)
    result = server.serve(groups, keep=True).result
    assert (result.num_swaps if preemption == "swap" else result.num_recomputations) > 0
    for group in groups:
        expected = [texts[group.group_id][: seq.output_len] for seq in group.seqs]
        assert server.outputs[group.group_id] == expected
    assert sorted(server._free_rows) == list(range(64)) and not server.tokens


@pytest.mark.parametrize("device", DEVICES)
def test_tritons_kernel_gives_the_same(device, texts):
    pytest.importorskip("triton", exc_type=ImportError)
    requests = mixed(18)[: 4 if device == "cpu" else 18]
    requests = [Request(*(r.request_id, 0.0, r.prompt_len, min(r.output_len, 4))) for r in requests]
    if device == "cpu":
        server = new_server(small("opt"), "paged", "triton")
    else:
        server = new_server(copy.deepcopy(small("opt")).to(device), "paged", "triton")
        assert server.worker.graphs and server.worker.prepare(16, 128) > 8
    server.serve(make_groups(requests), keep=True)
    for one in requests:
        assert server.outputs[one.request_id] == [texts[one.request_id][: one.output_len]]


@pytest.mark.parametrize("device", DEVICES)
def test_draws_are_a_workers_own_and_differ_between_samples(device):
    """On a GPU they come from graphs, which draw anew at each replay."""
    model = small("opt") if device == "cpu" else copy.deepcopy(small("opt")).to(device)
    requests, found = [Request(0, 0.0, 9, 12, num_samples=4)], []
    for seed, drawn_elsewhere in ((3, 0), (3, 5), (4, 0)):
        torch.manual_seed(7)
        server = new_server(model, "paged", "auto", temperature=5.0, seed=seed)
        torch.rand(drawn_elsewhere, device=device)  # of one rank alone, perhaps
        server.serve(make_groups(requests), keep=True)
        found.append(server.outputs[0])
    assert found[0] == found[1] != found[2]
    assert len({*map(tuple, found[0])}) == 4


@pytest.mark.parametrize("device", DEVICES)
def test_draws_follow_the_weights_of_the_tokens(device):
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf], device=device).expand(20_000, 4)
    generator = torch.Generator(device).manual_seed(1)
    shares = _draw(logits, 2.0, generator).bincount(minlength=4) / 20_000
    expected = (logits[0] / 2.0).softmax(dim=-1)
    assert (shares - expected).abs().max() < 0.02 and shares[3] == 0
    assert _draw(logits[:1], 0.0, generator).tolist() == [2]


def test_a_run_is_cut_and_counts_in_its_window_alone():
    requests = [Request(nth, 0.0, 5, 100) for nth in range(400)]
    server = new_server(small("opt"), "paged")
    served = server.serve(make_groups(requests), window_s=(0.2, 0.6), until_s=0.6)
    result = served.result
    assert 0.6 <= served.end_s < 5.0 and len(result.finish_s) < 400
    assert 0 < result.window_iterations < result.num_iterations
    assert len(served.took) == result.window_iterations
    assert 0 < served.num_tokens <= 32 * 3 * result.window_iterations


def test_arrivals_are_waited_for():
    requests = [Request(0, 0.1, 5, 2), Request(1, 0.4, 5, 2)]
    finished = new_server(small("opt"), "oracle").serve(make_groups(requests)).result.finish_s
    assert 0.1 < finished[0] < 0.4 < finished[1]


def test_prompts_that_fit_go_together():
    def sizes(*prompts):
        batches = _batched([Prompt([1] * tokens, 0, [], [0] * rows) for tokens, rows in prompts])
        return [len(batch) for batch in batches]

    most = PROMPT_SIZES[-1]
    assert sizes() == []
    assert sizes((most - 9, 1), (9, 1), (1, 1)) == [2, 1]
    assert sizes(*[(2, 6)] * 7) == [MOST_ROWS[0] // 6, 2]
    assert sizes((600, 1), *[(20, 6)] * 30)[0] == 1 + (MOST_ROWS[1] - 1) // 6


def test_projections_in_one_product_are_those_of_before():
    ids = torch.arange(3, 20)[None]
    for family, count in {"opt": 3, "llama": 6, "gpt2": 0}.items():
        model = copy.deepcopy(on_its_own(small(family)))
        before = model(ids).logits
        names = len(list(model.parameters()))
        assert fuse(model) == count
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
        assert (len(list(model.parameters())) < names) == (count > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [5, 64, 5120, 9000])
def test_a_norm_in_one_launch_is_torchs(size, dtype):
    from vllm_sim.engine.norm import normalize

    torch.manual_seed(size)
    wide, weight, bias = (torch.randn(*n, size) for n in ((2, 2, 3), (), ()))
    wide, weight, bias = (one.to(DEVICE, dtype) for one in (30 + 5 * wide, weight, bias))
    llamas = LlamaRMSNorm(size, 1e-6).to(DEVICE, dtype)
    llamas.weight.data.copy_(weight)
    own = torch.finfo(dtype).eps
    for x in (wide, wide[:, 1], wide[:0]):  # rows that are not contiguous, none
        one = x.double(), (size,), weight.double(), bias.double(), 1e-5
        got = normalize(x, weight, bias, 1e-5)
        assert got.dtype == dtype
        close = {"rtol": 2 * own, "atol": 40 * own}  # a mean of 30 is taken off
        torch.testing.assert_close(got.double(), functional.layer_norm(*one), **close)
        got = normalize(x, weight, None, 1e-6)
        torch.testing.assert_close(got, llamas(x), rtol=3 * own, atol=0)
        if dtype == torch.float16 and x.numel():  # rounded twice, as there; once, a quarter differs
            assert (got != llamas(x)).double().mean() < 0.02


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_norms_in_one_launch_are_a_models_own(family, monkeypatch):
    ids = torch.arange(3, 12, device=DEVICE)[None]
    model = copy.deepcopy(on_its_own(small(family))).to(DEVICE)
    others = copy.deepcopy(model)

    def norms(model):
        own = _LayerNorm, _RootMeanSquareNorm
        found = [norm for path, norm in model.named_modules() if path.endswith("norm")]
        return found, sum(type(norm) in own for norm in found)

    if DEVICE == "cpu":
        fuse(untouched := copy.deepcopy(model))
        assert norms(untouched)[1] == 0
    before = model(ids).logits
    monkeypatch.setattr(fused, "choose_kernel", lambda *args: (TRITON, ""))
    fuse(model)
    found, count = norms(model)
    assert count == len(found) > 3
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    first, second, *_ = norms(others)[0]
    first.to(torch.float64)
    second.bias = None  # Llama's have none anyway
    fuse(others)
    assert norms(others)[1] == len(found) - (2 if family == "opt" else 1)


def test_layers_that_are_fused_are_freed_one_after_the_other(monkeypatch):
    model = copy.deepcopy(on_its_own(small("opt")))
    parts = [weakref.ref(one) for path, one in model.named_modules() if path.endswith("q_proj")]
    alive = []

    class Counting(fused._First):
        def __init__(self, parts_of_one):
            alive.append(sum(part() is not None for part in parts))
            super().__init__(parts_of_one)

    monkeypatch.setattr(fused, "_First", Counting)
    assert fuse(model) == 3 and alive == [3, 2, 1]


def test_padding_is_written_to_the_block_beyond_the_managers():
    worker = Worker(small("opt"), 8, SIZE, max_len=32, most_rows=4)
    worker.run(Order(prompts=[Prompt([5, 6, 7], 0, [0], [0])])).tokens()
    pool = worker.cache.pool
    assert pool.num_blocks == 9
    pool.pool[:, :, :8].fill_(torch.nan)
    flight = worker.run(Order(prompts=[Prompt([5, 6, 7], 0, [3], [1])]))
    (token,) = flight.tokens().values()
    assert 0 <= token < VOCAB and not pool.pool[:, :, 3, :3].isnan().any()
    assert pool.pool[:, :, 3, 3:].isnan().all()  # of its block no slot but its own
    assert pool.pool[:, :, :3].isnan().all() and pool.pool[:, :, 4:8].isnan().all()


def test_many_samples_of_a_short_prompt_draw_in_one_forward():
    worker = Worker(small("opt"), 8, SIZE, max_len=32, most_rows=100)
    found = worker.run(Order(prompts=[Prompt([5, 6, 7], 0, [0], [*range(MOST_ROWS[0] + 8)])]))
    assert len(tokens := found.tokens()) == MOST_ROWS[0] + 8 and len({*tokens.values()}) == 1


def test_rows_of_groups_that_have_ended_are_given_again():
    """Also while their last tokens are on their way: all rows are in use, every time."""
    sizes = {"max_len": 128, "num_cpu_blocks": 16}
    requests = [Request(nth, 0.0, 9, 2) for nth in range(12)]
    worker = Worker(small("opt"), BLOCKS["paged"], SIZE, most_rows=2, **sizes)
    server = Server(worker, new_pool("paged"), Limits(128, 2))
    assert len(server.serve(make_groups(requests), keep=True).result.finish_s) == 12
    assert all(len(text) == 2 for (text,) in server.outputs.values())
    server = Server(worker, new_pool("paged"), Limits(128, 3))
    with pytest.raises(ValueError, match="more than 2 sequences: raise most_rows"):
        server.serve(make_groups(requests))


def test_what_is_not_for_a_worker_is_refused_before_it_runs():
    server = new_server(small("opt"), "paged")
    for request, error, told in (
        (Request(0, 0.0, 100, 29), RequestTooLargeError, "129 tokens or 1 sequences exceed"),
        (Request(0, 0.0, 3, 3, beam_width=2), ValueError, "no beams and no prefix"),
    ):
        with pytest.raises(error, match=told):
            server.serve(make_groups([request]))
    assert server.scheduler.idle
    worker = server.worker
    with pytest.raises(ValueError, match="no chunked limits"):
        Server(worker, server.manager, Limits(64, 32, chunked=True))
    with pytest.raises(ValueError, match=f"max_len is 1 to {PROMPT_SIZES[-1]} tokens"):
        Worker(worker.model, 8, SIZE, max_len=PROMPT_SIZES[-1] + 1)


def test_a_model_that_computes_all_logits_is_refused(monkeypatch):
    model = small("opt")
    monkeypatch.setattr(model, "forward", lambda input_ids: None, raising=False)
    with pytest.raises(UnsupportedModelError, match="opt computes all logits"):
        Worker(model, 8, SIZE, max_len=32)
