"""Where the bytes of each GPU go, and what is left for K and V: blocks and slots.

Reproduces: Table 1's memory row. Two plans of the same deployment: `paper_plan` is the authors'
(D1 of docs/differences.md) and gives Table 1's slots; `serving_plan` is how serving systems plan
today, with what they leave for activations stated as an assumption.

    kv_blocks(DEPLOYMENTS["opt-13b"])       # 983, by the paper's plan
    plan = serving_plan(Deployment(load_model("opt-13b"), GPUS["h100"], 1))
    plan.num_blocks, plan.num_slots
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sim import paper
from vllm_sim.models.gpus import GPU
from vllm_sim.models.model import Model
from vllm_sim.paper import GIB

UTILIZATION = 0.9  # of a GPU's memory, vLLM's default
# Assumptions of the serving plan: tokens of one iteration, sequences whose logits it holds in
# fp32, and what CUDA's context, its graphs and communication take.
BATCHED_TOKENS = 8192
LOGIT_ROWS = 256
WORKSPACE_BYTES = GIB


class PlanError(ValueError):
    """The model does not fit, or cannot be split so; the message is one line."""


class DoesNotFitError(PlanError):
    """Not one block is left: more GPUs, or larger ones, may do."""


@dataclass(frozen=True)
class Deployment:
    """A model split over `num_gpus` equal GPUs by tensor parallelism. PlanError if it cannot be."""

    model: Model
    gpu: GPU
    num_gpus: int = 1

    def __post_init__(self) -> None:
        name, heads, gpus = self.model.name, self.model.num_heads, self.num_gpus
        if type(gpus) is not int or gpus < 1:
            raise PlanError(f"{name}: num_gpus must be a whole number from 1, not {gpus!r}")
        if heads % gpus:
            raise PlanError(f"{name}: {heads} query heads cannot be split over {gpus} GPUs")
        kv_heads = self.model.num_kv_heads
        if kv_heads % gpus and gpus % kv_heads and not self.model.latent:
            raise PlanError(
                f"{name}: {kv_heads} K/V heads can neither be split over {gpus} GPUs nor "
                "copied to them evenly"
            )

    @property
    def kv_heads(self) -> int:
        """K/V heads that one GPU holds: a share of them, or a copy of one if there are too few."""
        return max(1, self.model.num_kv_heads // self.num_gpus)

    def slot_bytes(self, kv_bytes: int = 2) -> int:
        """Bytes of one token's K and V, in all layers, on one GPU: a latent vector (MLA) whole."""
        model = self.model
        if model.latent:
            return model.slot_elements * kv_bytes
        return model.slot_elements // model.num_kv_heads * self.kv_heads * kv_bytes


@dataclass(frozen=True)
class Sizes:
    """Bits of a weight in a matrix, bytes of an element of the cache, slots of a block."""

    matrix_bits: int = 16
    kv_bytes: int = 2
    block_size: int = paper.BLOCK_SIZE

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, not {value!r}")


@dataclass(frozen=True)
class Plan:
    """The bytes of one of a deployment's GPUs; the parts sum to its memory.

    DoesNotFitError if no block is left.
    """

    name: str
    deployment: Deployment
    sizes: Sizes
    utilization: float  # of the memory, that is used
    weights: int
    activations: int
    workspace: int

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization must be in (0, 1], got {self.utilization!r}")
        block = self.block_size * self.slot_bytes
        if self.kv_cache < block:
            gpus = self.deployment.num_gpus
            where = "a GPU" if gpus == 1 else f"each of {gpus} GPUs"
            raise DoesNotFitError(
                f"{self.deployment.model.name} does not fit: {self.utilization:g} of the "
                f"{self.memory / GIB:.2f} GiB of {where} are {self.usable / GIB:.2f} GiB, of which "
                f"weights take {self.weights / GIB:.2f}, activations and workspace "
                f"{(self.activations + self.workspace) / GIB:.2f} and one block of "
                f"{self.block_size} slots {block / GIB:.2f} GiB"
            )

    @property
    def memory(self) -> int:
        return self.deployment.gpu.memory_bytes

    @property
    def usable(self) -> int:
        return int(self.utilization * self.memory)

    @property
    def held_back(self) -> int:
        return self.memory - self.usable

    @property
    def kv_cache(self) -> int:
        return self.usable - self.weights - self.activations - self.workspace

    @property
    def num_gpus(self) -> int:
        return self.deployment.num_gpus

    @property
    def block_size(self) -> int:
        return self.sizes.block_size

    @property
    def slot_bytes(self) -> int:
        """Of one token, all layers, on one GPU."""
        return self.deployment.slot_bytes(self.sizes.kv_bytes)

    @property
    def num_blocks(self) -> int:
        return self.kv_cache // (self.block_size * self.slot_bytes)

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size


def serving_plan(
    deployment: Deployment,
    sizes: Sizes = Sizes(),
    utilization: float = UTILIZATION,
    allowance_bytes: int | None = None,
) -> Plan:
    """A share of the memory, less weights, activations and workspace, is for K and V.

    Activations are an estimate: of BATCHED_TOKENS, the widest intermediate result and the
    residual, input and output of each, in 16 bits, and LOGIT_ROWS rows of logits.
    `allowance_bytes` replaces it and the workspace.
    """
    model, gpus = deployment.model, deployment.num_gpus
    tokens = 2 * BATCHED_TOKENS * (model.widest // gpus + model.hidden_size) * 2
    activations, workspace = tokens + LOGIT_ROWS * model.vocab_size * 4, WORKSPACE_BYTES
    if allowance_bytes is not None:
        activations, workspace = allowance_bytes, 0
    weights = model.weight_bytes(sizes.matrix_bits, gpus)
    return Plan("serving", deployment, sizes, utilization, weights, activations, workspace)


def paper_plan(
    deployment: Deployment,
    block_size: int = paper.BLOCK_SIZE,
    max_batched_tokens: int = paper.MAX_BATCHED_TOKENS,
    utilization: float = paper.GPU_MEMORY_UTILIZATION,
) -> Plan:
    """The artifact's memory plan (its class `OPTMemoryAnalyzer`), in our own code, in 16 bits. For
    LLaMA it follows a later version of the same file, so its block count (965) is less certain.

    Activations are estimated, not measured: the widest intermediate result plus the residual,
    each twice (input and output), or the logits of all batched tokens twice, whichever is more.
    Logits count whole on every GPU; the other results are split, the residual is not. Only with
    the logits does it give Table 1: without them 13B would have 16.0K slots, 66B 10.2K.
    """
    model, gpus = deployment.model, deployment.num_gpus
    parameters = model.weights().split // gpus + model.weights().whole
    if model.family == "llama":  # that version keeps a rotary table per layer, of 8192 positions
        parameters += model.num_layers * 8192 * model.head_size // gpus
    widest = max(model.widest // gpus + model.hidden_size, model.vocab_size)
    activations = 2 * 2 * max_batched_tokens * widest
    sizes, workspace = Sizes(block_size=block_size), paper.WORKSPACE_BYTES
    return Plan("paper", deployment, sizes, utilization, 2 * parameters, activations, workspace)


def kv_blocks(deployment: Deployment, block_size: int = paper.BLOCK_SIZE) -> int:
    """K/V blocks by the paper's plan; each GPU holds its heads' part of every block."""
    return paper_plan(deployment, block_size).num_blocks


def requests_of_length(plan: Plan, num_tokens: int) -> float:
    """How many sequences of that length fit at once, windows dropping what is behind them.

    Each keeps whole blocks of every layer; no bound but memory, as a fraction.
    """
    model, size = plan.deployment.model, plan.block_size
    one_layer = plan.slot_bytes // model.num_layers
    held = 0
    for layers in model.cache_layers:
        kept = min(num_tokens, layers.window or num_tokens)
        held += layers.count * one_layer * -(-kept // size) * size
    if model.windows:
        return plan.kv_cache / held
    return plan.num_blocks / -(-num_tokens // size)
