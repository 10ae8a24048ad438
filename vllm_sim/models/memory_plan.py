"""Where the bytes of each GPU go, and what is left for K and V: blocks and slots.

Reproduces: Table 1's memory row. Two plans: `paper_plan` is the authors' (paper.py, README
difference D1) and gives Table 1's slots; `serving_plan` is how serving systems plan today, with
what they leave for activations stated as an assumption.

    plan = serving_plan(load_model("opt-13b"), GPUS["h100"].memory_bytes, 1, Sizes())
    plan.num_blocks, plan.num_slots
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sim import paper
from vllm_sim.models.decoder import Decoder
from vllm_sim.models.load import Model
from vllm_sim.paper import GIB

UTILIZATION = 0.9  # of a GPU's memory, vLLM's default
# Assumptions of the serving plan: tokens of one iteration, sequences whose logits it holds in
# fp32, and what CUDA's context, its graphs and communication take.
BATCHED_TOKENS = 8192
LOGIT_ROWS = 256
WORKSPACE_BYTES = GIB


class PlanError(ValueError):
    """The model does not fit, or cannot be split so; the message is one line."""


@dataclass(frozen=True)
class Sizes:
    """Bits of a weight in a matrix, bytes of an element of the cache, slots of a block."""

    matrix_bits: int = 16
    kv_bytes: int = 2
    block_size: int = paper.BLOCK_SIZE


@dataclass(frozen=True)
class Plan:
    """The bytes of one of `num_gpus` equal GPUs; the parts sum to its memory."""

    name: str
    num_gpus: int
    held_back: int
    weights: int
    activations: int
    workspace: int
    kv_cache: int
    slot_bytes: int  # of one token, all layers, on one GPU
    kv_heads: int  # on one GPU
    block_size: int

    @property
    def memory(self) -> int:
        return self.held_back + self.weights + self.activations + self.workspace + self.kv_cache

    @property
    def num_blocks(self) -> int:
        return self.kv_cache // (self.block_size * self.slot_bytes)

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size


def heads_per_gpu(decoder: Decoder, num_gpus: int) -> int:
    """K/V heads that one GPU holds: a share of them, or a copy of one if there are too few.

    A latent cache (MLA) has no heads and is whole on every GPU. PlanError if heads do not divide.
    """
    heads, kv_heads = decoder.num_heads, decoder.num_kv_heads
    if heads % num_gpus:
        raise PlanError(f"{decoder.name}: {heads} query heads cannot be split over {num_gpus} GPUs")
    if decoder.latent:
        return kv_heads // num_gpus
    if kv_heads % num_gpus and num_gpus % kv_heads:
        raise PlanError(
            f"{decoder.name}: {kv_heads} K/V heads can neither be split over {num_gpus} GPUs nor "
            "copied to them evenly"
        )
    return max(1, kv_heads // num_gpus)


def slot_bytes(decoder: Decoder, num_gpus: int, kv_bytes: int) -> int:
    """Bytes of one token's K and V, in all layers, on one GPU."""
    heads = heads_per_gpu(decoder, num_gpus)
    if decoder.latent:
        return decoder.slot_elements * kv_bytes
    return decoder.slot_elements // decoder.num_kv_heads * heads * kv_bytes


def serving_plan(
    model: Model,
    memory_bytes: int,
    num_gpus: int,
    sizes: Sizes,
    utilization: float = UTILIZATION,
    allowance_bytes: int | None = None,
) -> Plan:
    """A share of the memory, less weights, activations and workspace, is for K and V.

    Activations are an estimate: of BATCHED_TOKENS, the widest intermediate result and the
    residual, input and output of each, in 16 bits, and LOGIT_ROWS rows of logits.
    `allowance_bytes` replaces it and the workspace. PlanError if no block is left.
    """
    decoder = model.decoder
    per_slot = slot_bytes(decoder, num_gpus, sizes.kv_bytes)
    weights = model.weight_bytes(sizes.matrix_bits, num_gpus)
    tokens = 2 * BATCHED_TOKENS * (decoder.widest // num_gpus + decoder.hidden_size) * 2
    activations, workspace = tokens + LOGIT_ROWS * decoder.vocab_size * 4, WORKSPACE_BYTES
    if allowance_bytes is not None:
        activations, workspace = allowance_bytes, 0
    usable = int(utilization * memory_bytes)
    kv_cache = usable - weights - activations - workspace
    if kv_cache < sizes.block_size * per_slot:
        where = "a GPU" if num_gpus == 1 else f"each of {num_gpus} GPUs"
        raise PlanError(
            f"{model.name} does not fit: {utilization:g} of the {memory_bytes / GIB:.2f} GiB of "
            f"{where} are {usable / GIB:.2f} GiB, of which weights take {weights / GIB:.2f} and "
            f"activations and workspace {(activations + workspace) / GIB:.2f} GiB"
        )
    return Plan(
        "serving",
        num_gpus,
        memory_bytes - usable,
        weights,
        activations,
        workspace,
        kv_cache,
        per_slot,
        heads_per_gpu(decoder, num_gpus),
        sizes.block_size,
    )


def paper_plan(model: Model, gpu_name: str, memory_bytes: int, num_gpus: int, sizes: Sizes) -> Plan:
    """The artifact's plan, which Table 1 follows: paper.MODELS in fp16 only.

    PlanError for other models and types, or if nothing is left.
    """
    if model.preset is None or sizes.matrix_bits != 16 or sizes.kv_bytes != 2:
        raise PlanError(f"--plan paper is for {', '.join(paper.MODELS)} in 16 bits alone")
    try:
        gpu = paper.GPU(gpu_name, memory_bytes)
        deployment = paper.Deployment(model.preset, gpu, num_gpus)
        memory = paper.memory_per_gpu(deployment)
    except ValueError as error:
        raise PlanError(str(error)) from None
    per_slot = model.preset.kv_bytes_per_token // num_gpus
    if memory.kv_cache < sizes.block_size * per_slot:
        raise PlanError(f"{model.name}: not one block of {sizes.block_size} slots is left")
    return Plan(
        "paper",
        num_gpus,
        memory.held_back,
        memory.parameters,
        memory.activations,
        memory.workspace,
        memory.kv_cache,
        per_slot,
        model.preset.num_kv_heads // num_gpus,
        sizes.block_size,
    )


def requests_of_length(plan: Plan, decoder: Decoder, num_tokens: int) -> float:
    """How many sequences of that length fit at once, windows dropping what is behind them.

    Each keeps whole blocks of every layer; no bound but memory, as a fraction.
    """
    size = plan.block_size
    one_layer = plan.slot_bytes // decoder.num_layers
    held = 0
    for layers in decoder.cache_layers:
        kept = min(num_tokens, layers.window or num_tokens)
        held += layers.count * one_layer * -(-kept // size) * size
    if decoder.windows:
        return plan.kv_cache / held
    return plan.num_blocks / -(-num_tokens // size)
