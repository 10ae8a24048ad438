"""Seconds of an iteration for any model and GPU that capacity.py sizes: what --trace serves at.

Reproduces: serving/latency.py's model of bytes and FLOPs (section 6's experiments) beyond the
paper's deployments, with the same shares of bandwidth and FLOPS. What was fitted for the paper's
models is used for them; other models run with OPT-13B's constants, and every answer says so.

    speed = speed_of(plan, "h100")
    speed.latency.decode_steps(100, num_seqs=32, context_tokens=16_000), speed.assumed
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm_sim import paper
from vllm_sim.models import GPUS, Model
from vllm_sim.models.memory_plan import Plan
from vllm_sim.models.presets import is_preset
from vllm_sim.serving.latency import (
    BANDWIDTH_USED,
    FITTED,
    FLOPS_USED,
    LatencyModel,
    latency_model,
)
from vllm_sim.serving.server_latency import CacheLayers, Matrices, Work

# Kernels of a layer: two norms, four matrices, rotation, cache, attention, activation. Experts add
# the router, the choice, sorting by expert (2), the sum and the scales to what a dense layer has.
LAYER_KERNELS, EXPERT_KERNELS = 10, 6
UNFITTED = "opt-13b"  # whose constants other models take
PAPERS_GPUS = {gpu for gpu, _ in paper.RUNS_ON.values()}


@dataclass(frozen=True)
class Speed:
    """A latency model, and in one line what was assumed to get it."""

    latency: LatencyModel
    assumed: str


def speed_of(plan: Plan, gpu_name: str) -> Speed:
    """The speed of one server of `plan.num_gpus` such GPUs; KeyError for an unknown one.

    For the paper's models on the paper's GPUs in 16 bits it is `latency.latency_model`. For others
    every iteration reads all weights, experts included, but the table of input embeddings; a token
    computes with those that are active for it, at the speed of 16 bits; nothing is counted for
    communication beyond the constants.
    """
    gpu, model, sizes = GPUS[gpu_name], plan.deployment.model, plan.sizes
    own = is_preset(model) and model.name in FITTED
    like = model.name if own else UNFITTED
    constants = "its own constants" if own else f"the constants of {like}"
    assumed = f"at the speed of {plan.num_gpus} x {gpu_name}, {constants} (latency.py)"
    plain = (sizes.matrix_bits, sizes.kv_bytes) == (16, 2)
    if is_preset(model) and plain and gpu_name in PAPERS_GPUS:
        deployment = replace(plan.deployment, gpu=gpu)
        return Speed(latency_model(deployment, plan.block_size, FITTED[like]), assumed)
    weights, table = model.weights(), _input_table(model)
    bandwidth = BANDWIDTH_USED * gpu.bytes_per_s
    per_gpu = (weights.active - table) / plan.num_gpus
    latency = LatencyModel(
        step_s=FITTED[like].step_s,
        token_s=2 * per_gpu / (FLOPS_USED * gpu.flops_per_s),
        context_s=plan.slot_bytes / bandwidth,
        seq_s=FITTED[like].seq_s,
        request_s=FITTED[like].request_s,
        copy_s=2 * plan.slot_bytes / bandwidth,
        block_size=plan.block_size,
        weights_s=plan.weights * (1.0 - table / weights.total) / bandwidth,
    )
    return Speed(latency, assumed)


def _input_table(model: Model) -> int:
    """Parameters of which a token reads one row: none if they are the output head as well."""
    return 0 if model.tied else model.vocab_size * (model.embedding_size or model.hidden_size)


def attention_share(model: Model, prompts: Iterable[int]) -> float:
    """FLOPs of attention over these prompts, over all others of theirs: the former are left out of
    the seconds. A token attends to those before it, as far as its layer's window."""
    kinds, pairs, tokens = model.cache_layers, 0.0, 0.0
    for prompt in prompts:
        tokens += prompt
        for layers in kinds:
            window = min(prompt, layers.window or prompt)
            pairs += layers.count * (prompt * window - window * window / 2)
    value_size = model.latent.value_size if model.latent else model.head_size
    others = (model.weights().active - _input_table(model)) * tokens
    return model.num_heads * (model.head_size + value_size) * pairs / others


@dataclass(frozen=True)
class Precision:
    """Bytes of a parameter in matrices and in experts, of an element of the cache, and how many
    times faster than in 16 bits the two are multiplied. 4-bit weights compute in 16 bits."""

    dense_bytes: float = 2.0
    expert_bytes: float = 2.0
    kv_bytes: float = 2.0
    dense_speedup: float = 1.0
    expert_speedup: float = 1.0


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
