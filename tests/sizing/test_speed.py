"""Seconds of an iteration, for the paper's deployments and for any other."""

import pytest

from vllm_sim.models import DEPLOYMENTS, load_model
from vllm_sim.models.model import EXPERTS
from vllm_sim.serving.latency import latency_model
from vllm_sim.serving.scheduler import Iteration, Limits
from vllm_sim.serving.server_latency import CARDS, FITTED, LINKS
from vllm_sim.sizing.speed import Precision, card_of, speed_of, work_of

LLAMA = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # its layers' matrices


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_the_papers_deployments_have_the_papers_speed(name, case_of):
    at = DEPLOYMENTS[name]
    plan = case_of("--model", name, "--gpu", at.gpu.name, "--gpus", at.num_gpus).plan
    found = speed_of(plan, at.gpu.name)
    assert found.latency == latency_model(at, 16) and found.limits is None
    today = speed_of(plan, "h100")  # no GPU of the paper's
    assert today.limits.chunked and "server_latency.py" in today.assumed


def test_a_speed_by_hand(config, case_of):
    """One decode reads all matrices but the input embeddings once, and its context."""
    case = case_of("--model", config("Llama-3-8B"), "--gpu", "h100", "--kv-dtype", "fp8")
    found = speed_of(case.plan, "h100")
    assert found.limits == Limits(8192, 1024, chunked=True)
    shares, bandwidth = CARDS["h100"].shares, 3350e9
    read = 2 * (LLAMA + 65 * 4096 + 128_256 * 4096) + 1000 * 2 * 32 * 8 * 128
    one = Iteration(0, 0.0, num_decodes=1, num_seqs=1, context_tokens=1000)
    expected = read / (shares.bandwidth * bandwidth) + 320 * shares.kernel_s
    assert found.latency.iteration(one) == pytest.approx(expected, rel=1e-6)
    parts = Iteration(0, 0.0, num_seqs=1, prompt_tokens=4000, parts=[(0, 4000)])
    flops = (
        2 * 4000 * LLAMA / shares.flops + 4 * 32 * 4096 * 4000 * 4001 / 2 / shares.attention_flops
    )
    head = 2 * 128_256 * 4096 / (shares.bandwidth * bandwidth)
    expected = flops / CARDS["h100"].flops_per_s + head + 320 * shares.kernel_s
    assert found.latency.iteration(parts) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(KeyError):
        speed_of(case.plan, "a100")


def test_a_gpu_that_was_not_measured_has_its_datasheets_numbers(config, case_of):
    plan = case_of("--model", config("Llama-3-8B"), "--gpu", "a100-80gb").plan
    assert speed_of(plan, "a100-80gb").limits == Limits(2048, 256, chunked=True)
    card = card_of("a100-80gb")
    assert (card.bytes_per_s, card.link, card.shares) == (2039e9, LINKS["nvlink"], FITTED)
    assert card.flops_per_s == pytest.approx(0.8 * 312e12)


def test_only_active_experts_compute_and_few_tokens_read_few(config, case_of):
    case = case_of("--model", config("Mixtral-8x7B"), "--gpu", "h200", "--gpus", 2)
    work, latency = work_of(case.model, Precision(), 2), speed_of(case.plan, "h200").latency
    assert latency.work == work
    routed = case.model.params(EXPERTS)
    assert work.experts.read_bytes == routed  # in 16 bits, on each of two
    assert work.experts.token_flops == pytest.approx(routed / 4)
    assert work.messages == 64 and work.kv_heads == 4
    few, many = (latency.decode_steps(1, n, n) for n in (1, 100))
    used = CARDS["h200"].shares.bandwidth * 4800e9
    assert many - few > 0.74 * work.experts.read_bytes / used  # all of them, not a quarter


def test_what_is_stored_in_fewer_bits_is_read_faster_and_fp8_computes_faster(config, case_of):
    path = config("Llama-3-8B")
    wide, narrow = (
        speed_of(case_of("--model", path, "--gpu", gpu, "--dtype", "fp8").plan, gpu).latency.work
        for gpu in ("a100-80gb", "h100")
    )
    assert wide.dense.read_bytes == narrow.dense.read_bytes < 1.01 * LLAMA
    assert (wide.dense.speedup, narrow.dense.speedup) == (1.0, 2.0)
    assert wide.head == narrow.head and wide.head.speedup == 1.0


def test_latent_attention_and_windows(config, case_of):
    deep = work_of(load_model(config("DeepSeek-V3")), Precision(), 8)
    (layers,) = deep.cache
    assert deep.kv_heads == 1 and layers.slot_bytes == 61 * 576 * 2  # whole on every GPU
    assert layers.decode_flops == 2 * 61 * 16 * 2 * (512 + 64)
    assert layers.prompt_flops == 2 * 61 * 16 * (128 + 64 + 128)
    gemma = work_of(case_of("--model", config("Gemma-3-1B"), "--gpu", "t4").model, Precision())
    assert {one.window for one in gemma.cache} == {None, 512}
