"""Seconds of an iteration, for the paper's deployments and for any other."""

import pytest

from vllm_sim.models import DEPLOYMENTS
from vllm_sim.serving.latency import FITTED, latency_model
from vllm_sim.sizing import speed
from vllm_sim.sizing.speed import attention_share, speed_of


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_the_papers_deployments_have_the_papers_speed(name, case_of, monkeypatch):
    at = DEPLOYMENTS[name]
    plan = case_of("--model", name, "--gpu", at.gpu.name, "--gpus", at.num_gpus).plan
    own = speed_of(plan, at.gpu.name).latency
    assert own == latency_model(at, 16)
    monkeypatch.setattr(speed, "PAPERS_GPUS", ())  # as if it were any other GPU
    derived = speed_of(plan, at.gpu.name).latency
    for part in ("step_s", "token_s", "context_s", "seq_s", "request_s", "weights_s"):
        assert getattr(derived, part) == pytest.approx(getattr(own, part), rel=0.015), part


def test_a_speed_by_hand(config, case_of):
    case = case_of("--model", config("Llama-3-8B"), "--gpu", "h100", "--kv-dtype", "fp8")
    found = speed_of(case.plan, "h100")
    assert "the constants of opt-13b" in found.assumed
    params = case.model.num_params - 128_256 * 4096  # without the input embeddings
    bandwidth, flops = 0.8 * 3350e9, 0.6 * 989.5e12
    assert found.latency.step_s == FITTED["opt-13b"].step_s
    assert found.latency.weights_s == pytest.approx(2 * params / bandwidth)
    assert found.latency.token_s == pytest.approx(2 * params / flops)
    assert found.latency.context_s == pytest.approx(2 * 32 * 8 * 128 / bandwidth)
    with pytest.raises(KeyError):
        speed_of(case.plan, "a100")


def test_only_active_experts_compute_but_all_are_read(config, case_of):
    case = case_of("--model", config("Mixtral-8x7B"), "--gpu", "h200")
    model, found = case.model, speed_of(case.plan, "h200").latency
    flops, bandwidth = 0.6 * 989.5e12, 0.8 * 4800e9
    assert found.token_s == pytest.approx(2 * model.active_params / flops, rel=0.02)
    assert found.weights_s == pytest.approx(2 * model.num_params / bandwidth, rel=0.01)


def test_what_attention_itself_would_add_to_prompts(config, case_of):
    """Causal: 2 FLOPs for each of K and V, an element of a query head and half of n**2 pairs."""
    case = case_of("--model", config("Llama-3-8B"), "--gpu", "h100")
    others = case.model.num_params - 128_256 * 4096  # without the input embeddings
    for prompts, pairs in (((126_000,), 126_000**2 / 2), ((30, 50), (30**2 + 50**2) / 2)):
        expected = 4 * 32 * 32 * 128 * pairs / (2 * others * sum(prompts))
        assert attention_share(case.model, prompts) == pytest.approx(expected)
    assert attention_share(case.model, [126_000]) == pytest.approx(2.2, abs=0.01)
    windowed = case_of("--model", config("Mistral-7B-v0.1"), "--gpu", "h100").model
    pairs = 10_000 * 4096 - 4096**2 / 2
    per_pair = 4 * 32 * 32 * 128 / (2 * (windowed.num_params - 32_000 * 4096) * 10_000)
    assert attention_share(windowed, [10_000]) == pytest.approx(pairs * per_pair)
