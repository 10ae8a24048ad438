"""Seconds of an iteration for any model and GPU that capacity.py sizes: what --trace serves at.

Reproduces: serving/latency.py's model (section 6's experiments) for the paper's own deployments,
with its limits on an iteration. All others are served as today's vLLM (v1) serves: at the seconds
of serving/server_latency.py, prompts in parts, no watermark, vLLM's default limits.

    speed = speed_of(plan, "h100")
    speed.latency.decode_steps(100, num_seqs=32, context_tokens=16_000), speed.assumed
    work_of(model, Precision(), gpus=2)      # what a model asks of each of two GPUs
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_sim import paper
from vllm_sim.models import GPUS, Model
from vllm_sim.models.gpus import GPU
from vllm_sim.models.memory_plan import Plan, Sizes
from vllm_sim.models.presets import is_preset
from vllm_sim.paper import GIB
from vllm_sim.serving.latency import FITTED, latency_model
from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.server_latency import (
    CARDS,
    LINKS,
    CacheLayers,
    Card,
    Matrices,
    ServerLatency,
    Work,
)
from vllm_sim.serving.simulator import Latency

# Kernels of a layer: two norms, four matrices, rotation, cache, attention, activation. Experts add
# the router, the choice, sorting by expert (2), the sum and the scales to what a dense layer has.
LAYER_KERNELS, EXPERT_KERNELS = 10, 6
PAPERS_GPUS = {gpu for gpu, _ in paper.RUNS_ON.values()}
# Of GPUs on which nothing was measured: the share of the datasheet's FLOPS that matrices are given,
# between the H100's 0.68 and the RTX 4090's 1.00.
MATRIX_SHARE = 0.8
MULTIPROCESSORS = {"t4": 40, "l4": 58, "a10g": 80, "b200": 148, "mi300x": 304}
NVLINK = ("a100", "h100", "h200", "h20", "b200", "b300", "gb200", "mi300x")
WITHOUT_FP8 = ("t4", "v100", "a10g", "a100", "rtx3090")


@dataclass(frozen=True)
class Speed:
    """A latency model, in one line what was assumed to get it, and the limits on an iteration that
    go with it; None: the artifact's, with its watermark."""

    latency: Latency
    assumed: str
    limits: Limits | None = None


def speed_of(plan: Plan, gpu_name: str) -> Speed:
    """The speed of one server of `plan.num_gpus` such GPUs; KeyError for an unknown one."""
    gpu, model, sizes = GPUS[gpu_name], plan.deployment.model, plan.sizes
    plain = (sizes.matrix_bits, sizes.kv_bytes) == (16, 2)
    if is_preset(model) and model.name in FITTED and plain and gpu_name in PAPERS_GPUS:
        assumed = f"at the speed of {plan.num_gpus} x {gpu_name}, its own constants (latency.py)"
        deployment = replace(plan.deployment, gpu=gpu)
        return Speed(latency_model(deployment, plan.block_size, FITTED[model.name]), assumed)
    precision = precision_of(model, sizes, gpu_name)
    work = work_of(model, precision, plan.num_gpus, block_size=plan.block_size)
    limits = default_limits(gpu_name, gpu)
    assumed = (
        f"at the speed of {plan.num_gpus} x {gpu_name} under vLLM (server_latency.py), "
        f"{limits.max_batched_tokens:,} tokens and {limits.max_num_seqs:,} requests an iteration"
    )
    return Speed(ServerLatency(work, card_of(gpu_name)), assumed, limits)


def card_of(gpu_name: str) -> Card:
    """A GPU that was measured, or else one by its datasheet; KeyError for an unknown one."""
    if gpu_name in CARDS:
        return CARDS[gpu_name]
    gpu = GPUS[gpu_name]
    link = LINKS["nvlink" if gpu_name.startswith(NVLINK) else "pcie"]
    count = MULTIPROCESSORS.get(gpu_name, 108)  # an A100's
    return Card(gpu.bytes_per_s, MATRIX_SHARE * gpu.flops_per_s, count, link)


def default_limits(gpu_name: str, gpu: GPU) -> Limits:
    """What `vllm serve` (0.19) allows an iteration: more on GPUs from 70 GiB on, but for A100s."""
    large = gpu.memory_bytes >= 70 * GIB and not gpu_name.startswith("a100")
    return Limits(8192, 1024, chunked=True) if large else Limits(2048, 256, chunked=True)


@dataclass(frozen=True)
class Precision:
    """Bytes of a parameter in matrices and in experts, of an element of the cache, and how many
    times faster than in 16 bits the two are multiplied. 4-bit weights compute in 16 bits."""

    dense_bytes: float = 2.0
    expert_bytes: float = 2.0
    kv_bytes: float = 2.0
    dense_speedup: float = 1.0
    expert_speedup: float = 1.0


def precision_of(model: Model, sizes: Sizes, gpu_name: str) -> Precision:
    """As the checkpoint is stored, or as `--dtype` loads it; fp8 alone is multiplied as such."""
    dense = routed = sizes.matrix_bits / 8
    fp8 = sizes.matrix_bits == 8
    if model.quantisation:
        routed = model.quantisation.bytes_per_param
        dense = 2.0 if model.quantisation.experts_only else routed
        fp8 = model.quantisation.method == "fp8"
    speedup = 2.0 if fp8 and not gpu_name.startswith(WITHOUT_FP8) else 1.0
    return Precision(dense, routed, sizes.kv_bytes, speedup if dense < 2 else 1.0, speedup)


def work_of(
    model: Model, precision: Precision, gpus: int = 1, replicas: int = 1, block_size: int = 16
) -> Work:
    """What a model asks of each GPU: `gpus` of tensor parallelism, experts split over them and
    `replicas` alike."""
    weights, moe, latent = model.weights(), model.experts, model.latent
    kv_parts = min(gpus, model.num_kv_heads)
    dense = (weights.attention + weights.feed_forward) / gpus + weights.latent
    dense += weights.kv_projection / kv_parts
    read = dense * precision.dense_bytes + 2.0 * weights.other
    head = model.vocab_size * (model.embedding_size or model.hidden_size) / gpus
    experts = None
    if moe:
        held = weights.experts / (gpus * replicas)
        used = 2.0 * held * moe.num_active / moe.num_experts
        experts = Matrices(held * precision.expert_bytes, used, precision.expert_speedup)
    heads = model.num_heads / gpus
    kv_heads = max(1, model.num_kv_heads // gpus)
    prompt_size = decode_size = 2 * model.head_size
    slot = 2 * kv_heads * model.head_size
    if latent:  # decodes multiply with the latent vector itself
        prompt_size = latent.nope_size + latent.rope_size + latent.value_size
        decode_size, kv_heads = 2 * latent.kv_rank + latent.rope_size, 1
        slot = model.layer_elements
    return Work(
        Matrices(read, 2.0 * dense, precision.dense_speedup),
        Matrices(2.0 * head, 2.0 * head),
        tuple(
            CacheLayers(
                layers.count * slot * precision.kv_bytes,
                2.0 * layers.count * heads * decode_size,
                2.0 * layers.count * heads * prompt_size,
                layers.window,
            )
            for layers in model.cache_layers
        ),
        kv_heads,
        LAYER_KERNELS * model.num_layers + (EXPERT_KERNELS * moe.num_layers if moe else 0),
        experts,
        moe.num_experts if moe else 1,
        moe.num_active if moe else 1,
        messages=2 * model.num_layers if gpus * replicas > 1 else 0,
        message_bytes=2.0 * model.hidden_size,
        gpus=gpus,
        replicas=replicas,
        block_size=block_size,
    )
