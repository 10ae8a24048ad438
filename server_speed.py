"""Seconds of an iteration for any model and GPU that capacity.py sizes: what --trace serves at.

Reproduces: latency.py's model of bytes and FLOPs (section 6's experiments) beyond the paper's
deployments, with the same shares of bandwidth and FLOPS. What was fitted for the paper's models is
used for them; other models run with OPT-13B's constants, and every answer says so.

    speed = speed_of(case, ACCELERATORS["h100"])
    speed.latency.decode_steps(100, num_seqs=32, context_tokens=16_000), speed.assumed
"""

from __future__ import annotations

from dataclasses import dataclass

import latency
import paper
from capacity_case import Case
from latency import BANDWIDTH_USED, FITTED, FITTED_LIKE, FLOPS_USED, Accelerator, LatencyModel

# Bytes/s of memory and FLOP/s in 16 bits with tensor cores, dense, of the sheets named in gpus.py
# (half of what they print where they print it with sparsity); the paper's two are latency.py's.
ACCELERATORS = latency.ACCELERATORS | {
    "t4": Accelerator(320e9, 65e12),
    "l4": Accelerator(300e9, 121e12),
    "a10g": Accelerator(600e9, 70e12),
    "h100": Accelerator(3350e9, 989.5e12),
    "h200": Accelerator(4800e9, 989.5e12),
    "b200": Accelerator(8000e9, 2250e12),
    "mi300x": Accelerator(5300e9, 1307.4e12),
    "rtx4090": Accelerator(1008e9, 165.2e12),
}
UNFITTED = "opt-13b"  # whose constants other models take


@dataclass(frozen=True)
class Speed:
    """A latency model, and in one line what was assumed to get it."""

    latency: LatencyModel
    assumed: str


def speed_of(case: Case, accelerator: str) -> Speed:
    """The speed of one server of `case.plan.num_gpus` such GPUs; KeyError for an unknown one.

    For the paper's models on the paper's GPUs in 16 bits it is `latency.latency_model`. For others
    every iteration reads all weights, experts included, but the table of input embeddings; a token
    computes with those that are active for it, at the speed of 16 bits; nothing is counted for
    communication beyond the constants.
    """
    gpu, plan = ACCELERATORS[accelerator], case.plan
    preset = case.model.preset
    like = FITTED_LIKE.get(preset.name, preset.name) if preset else ""
    like = like if like in FITTED else UNFITTED
    own = f"the constants of {like}" if not preset or like != preset.name else "its own constants"
    where = f"at the speed of {plan.num_gpus} x {accelerator}, {own} (latency.py)"
    plain = case.sizes.matrix_bits == 16 and case.sizes.kv_bytes == 2
    if preset and plain and accelerator in paper.GPUS:
        deployment = paper.Deployment(preset, paper.GPUS[accelerator], plan.num_gpus)
        model = latency.latency_model(deployment, plan.block_size, FITTED[like])
        return Speed(model, where)
    weights = case.model.decoder.weights()
    looked_up = _input_embedding(case)
    read = plan.weights * (1.0 - looked_up / weights.total)
    bandwidth = BANDWIDTH_USED * gpu.bytes_per_s
    per_gpu = (weights.active - looked_up) / plan.num_gpus
    model = LatencyModel(
        step_s=FITTED[like].step_s + read / bandwidth,
        token_s=2 * per_gpu / (FLOPS_USED * gpu.flops_per_s),
        context_s=plan.slot_bytes / bandwidth,
        prompt_s=FITTED[like].prompt_s,
        copy_s=2 * plan.slot_bytes / bandwidth,
        block_size=plan.block_size,
    )
    return Speed(model, where)


def _input_embedding(case: Case) -> int:
    """Parameters of which a token reads one row: none where the output head is the same table."""
    decoder = case.model.decoder
    if decoder.tied:
        return 0
    return decoder.vocab_size * (decoder.embedding_size or decoder.hidden_size)
