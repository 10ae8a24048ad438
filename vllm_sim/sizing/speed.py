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
from vllm_sim.models.memory_plan import Batch, Plan, Sizes
from vllm_sim.models.model import (
    EXPERTS,
    HEAD,
    KV,
    LATENT,
    MATRIX,
    OTHER,
    WHOLE,
    Layers,
)
from vllm_sim.models.presets import is_preset
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
MULTIPROCESSORS = {"t4": 40, "v100": 80, "l4": 58, "l40s": 142, "a10g": 80, "h20": 78}
MULTIPROCESSORS |= {"b200": 148, "gb200": 148, "b300": 148, "mi300x": 304}
MULTIPROCESSORS |= {"rtx3090": 82, "rtx5090": 170}
NVLINK = ("a100", "h100", "h200", "h20", "b200", "b300", "gb200", "mi300x")
DENSE = (MATRIX, KV, WHOLE)
WEIGHTS_ALONE = ("gptq", "awq", "auto-round", "bitsandbytes", "eetq", "hqq", "quanto")
WITHOUT_FP8 = ("t4", "v100", "a10g", "a100", "rtx3090")


@dataclass(frozen=True)
class Speed:
    """A latency model, in one line what was assumed to get it, and the limits on an iteration that
    go with it; None: the artifact's, with its watermark."""

    latency: Latency
    assumed: str
    limits: Limits | None = None


def speed_of(plan: Plan, gpu_name: str) -> Speed:
    """The speed of one server of `plan.num_gpus` such GPUs; KeyError for an unknown one.

    ValueError for a pipeline, whose seconds are not modelled.
    """
    gpu, deployment, sizes = GPUS[gpu_name], plan.deployment, plan.sizes
    model, batch = deployment.model, plan.batch or Batch.default(gpu)
    if deployment.pipeline > 1:
        raise ValueError("seconds are those of tensor parallelism: --trace takes no pipeline")
    told = f"at the speed of {plan.num_gpus} x {gpu_name}"
    plain = is_preset(model) and model.name in FITTED and sizes.kv_bytes == 2
    if plain and gpu_name in PAPERS_GPUS:
        assumed = f"{told}, its own constants (latency.py)"
        deployment = replace(deployment, gpu=gpu)
        return Speed(latency_model(deployment, plan.block_size, FITTED[model.name]), assumed)
    precision = precision_of(model, sizes, gpu_name)
    work = work_of(model, precision, plan.num_gpus, block_size=plan.block_size)
    limits = Limits(batch.tokens, batch.seqs, chunked=True)
    assumed = f"{told} under vLLM (server_latency.py)"
    return Speed(ServerLatency(work, card_of(gpu_name)), assumed, limits)


def card_of(gpu_name: str) -> Card:
    """A GPU that was measured, or else one by its datasheet; KeyError for an unknown one."""
    if gpu_name in CARDS:
        return CARDS[gpu_name]
    gpu = GPUS[gpu_name]
    link = LINKS["nvlink" if gpu_name.startswith(NVLINK) else "pcie"]
    count = MULTIPROCESSORS.get(gpu_name, 108)  # an A100's
    return Card(gpu.bytes_per_s, MATRIX_SHARE * gpu.flops_per_s, count, link)


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
    """As the checkpoint is stored, or as `--dtype` loads it; 8 bits are multiplied as such where a
    GPU has fp8, but for formats of weights alone."""
    dense, routed = (_bytes_each(model, *roles) for roles in (DENSE, (EXPERTS,)))
    weights_alone = model.quantisation.startswith(WEIGHTS_ALONE)
    fast = 1.0 if weights_alone or gpu_name.startswith(WITHOUT_FP8) else 2.0

    def speedup(each: float) -> float:
        return fast if 0.9 < each < 1.1 else 1.0

    return Precision(dense, routed, sizes.kv_bytes, speedup(dense), speedup(routed))


def _bytes_each(model: Model, *roles: str) -> float:
    """Of a parameter of these roles, in the mean; 2 if there are none."""
    params = model.params(*roles)
    return model.weight_bytes(1, roles) / params if params else 2.0


def work_of(
    model: Model, precision: Precision, gpus: int = 1, replicas: int = 1, block_size: int = 16
) -> Work:
    """What a model asks of each GPU: `gpus` of tensor parallelism, experts split over them and
    `replicas` alike."""
    kv_parts = min(gpus, max(1, model.num_kv_heads))
    dense = model.params(MATRIX) / gpus + model.params(WHOLE) + model.params(KV) / kv_parts
    read = dense * precision.dense_bytes + 2.0 * model.params(OTHER)
    head = model.vocab_size * model.hidden_size if model.tied else model.params(HEAD)
    head /= gpus
    experts = None
    if model.num_experts:
        held = model.params(EXPERTS) / (gpus * replicas)
        used = 2.0 * held * model.active_experts / model.num_experts
        experts = Matrices(held * precision.expert_bytes, used, precision.expert_speedup)
    kernels = LAYER_KERNELS + (EXPERT_KERNELS if experts else 0)
    return Work(
        Matrices(read, 2.0 * dense, precision.dense_speedup),
        Matrices(2.0 * head, 2.0 * head),
        tuple(
            CacheLayers(
                layers.slot_bytes(1, gpus) * precision.kv_bytes,
                2.0 * layers.count * layers.heads / gpus * _decode_size(layers),
                2.0 * layers.count * layers.heads / gpus * layers.head_sizes,
                layers.window,
            )
            for layers in model.layers
            if layers.elements
        ),
        max(1, model.num_kv_heads // gpus),
        kernels * model.num_layers,
        experts,
        max(1, model.num_experts),
        max(1, model.active_experts),
        state_bytes=model.state_bytes / gpus,
        messages=2 * model.num_layers if gpus * replicas > 1 else 0,
        message_bytes=2.0 * model.hidden_size,
        gpus=gpus,
        replicas=replicas,
        block_size=block_size,
    )


def _decode_size(layers: Layers) -> int:
    """What a query head multiplies with of a token: its key and value, or the latent vector as key
    and as value."""
    return 2 * layers.elements if layers.kind == LATENT else layers.head_sizes
