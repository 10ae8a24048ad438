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
from vllm_sim.models.model import EMBEDDING
from vllm_sim.models.presets import is_preset
from vllm_sim.serving.latency import (
    BANDWIDTH_USED,
    FITTED,
    FLOPS_USED,
    LatencyModel,
    latency_model,
)

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
    plain = sizes.kv_bytes == 2
    if is_preset(model) and plain and gpu_name in PAPERS_GPUS:
        deployment = replace(plan.deployment, gpu=gpu)
        return Speed(latency_model(deployment, plan.block_size, FITTED[like]), assumed)
    table = _input_table(model)
    bandwidth = BANDWIDTH_USED * gpu.bytes_per_s
    per_gpu = (model.active_params - table) / plan.num_gpus
    latency = LatencyModel(
        step_s=FITTED[like].step_s,
        token_s=2 * per_gpu / (FLOPS_USED * gpu.flops_per_s),
        context_s=plan.slot_bytes / bandwidth,
        seq_s=FITTED[like].seq_s,
        request_s=FITTED[like].request_s,
        copy_s=2 * plan.slot_bytes / bandwidth,
        block_size=plan.block_size,
        weights_s=plan.weights * (1.0 - table / model.num_params) / bandwidth,
    )
    return Speed(latency, assumed)


def _input_table(model: Model) -> int:
    """Parameters of which a token reads one row: none if they are the output head as well."""
    return 0 if model.tied else model.params(EMBEDDING)


def attention_share(model: Model, prompts: Iterable[int]) -> float:
    """FLOPs of attention over these prompts, over all others of theirs: the former are left out of
    the seconds. A token attends to those before it, as far as its layer's window."""
    pairs, tokens = 0.0, 0.0
    for prompt in prompts:
        tokens += prompt
        for layers in model.layers:
            window = layers.kept(prompt)
            both = layers.count * layers.heads * layers.head_sizes
            pairs += both * (prompt * window - window * window / 2)
    return pairs / ((model.active_params - _input_table(model)) * tokens)
