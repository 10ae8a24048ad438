"""Where the bytes of each GPU go, and what is left for K and V: blocks and slots.

Reproduces: Table 1's memory row. Two plans of the same deployment: `paper_plan` is the authors'
(D1 of docs/differences.md) and gives Table 1's slots; `serving_plan` is how vLLM plans today, from
terms that its logs show and that differ between versions (`ENGINES`).

    kv_blocks(DEPLOYMENTS["opt-13b"])       # 983, by the paper's plan
    plan = serving_plan(Deployment(load_model("opt-13b"), GPUS["h100"], 1))
    plan.num_blocks, plan.num_slots
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vllm_sim import paper
from vllm_sim.models.gpus import GPU
from vllm_sim.models.model import (
    EMBEDDING,
    ENCODER,
    HEAD,
    IN_LAYERS,
    OTHER,
    STATE,
    WINDOW,
    Model,
)
from vllm_sim.paper import GIB

UTILIZATION = 0.9  # of a GPU's memory, vLLM's default
LARGE_GPU = 70 * GIB  # from which vLLM's defaults are wider, but for the A100


class PlanError(ValueError):
    """The model does not fit, or cannot be split so; the message is one line."""


class DoesNotFitError(PlanError):
    """Not one block is left: more GPUs, or larger ones, may do."""


@dataclass(frozen=True)
class Deployment:
    """A model split over equal GPUs: each stage of a pipeline over `num_gpus` of them by tensor
    parallelism. PlanError if it cannot be."""

    model: Model
    gpu: GPU
    num_gpus: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        model, gpus = self.model, self.num_gpus
        for what, count in (("num_gpus", gpus), ("pipeline", self.pipeline)):
            if type(count) is not int or count < 1:
                raise PlanError(
                    f"{model.name}: {what} must be a whole number from 1, not {count!r}"
                )
        if self.pipeline > model.num_layers:
            raise PlanError(
                f"{model.name}: {model.num_layers} layers cannot be {self.pipeline} stages"
            )
        for layers in model.layers:
            kv_heads = layers.kv_heads
            if layers.heads % gpus:
                raise PlanError(
                    f"{model.name}: {layers.heads} query heads cannot be split over {gpus} GPUs"
                )
            if layers.heads and kv_heads > 1 and kv_heads % gpus and gpus % kv_heads:
                raise PlanError(
                    f"{model.name}: {kv_heads} K/V heads can neither be split over {gpus} GPUs nor "
                    "copied to them evenly"
                )

    @property
    def kv_heads(self) -> int:
        """K/V heads that one GPU holds: a share of them, or a copy of one if there are too few."""
        return max(1, self.model.num_kv_heads // self.num_gpus)

    @property
    def stages(self) -> tuple[int, ...]:
        """Layers of each stage: what does not divide goes to the later ones, but not to the last
        (vllm/distributed/utils.py, get_pp_indices)."""
        each, left = divmod(self.model.num_layers, self.pipeline)
        counts = [each] * self.pipeline
        for place in range(2, left + 2):
            counts[-place] += 1
        return tuple(counts)

    def slot_bytes(self, kv_bytes: int = 2) -> int:
        """Bytes of one token's K and V, in all layers, on one GPU: a latent vector (MLA) whole."""
        return self.model.slot_bytes(kv_bytes, self.num_gpus)

    @property
    def state_bytes(self) -> int:
        """Of one sequence in all layers, on one GPU: states of linear layers, split by heads."""
        return -(-self.model.state_bytes // self.num_gpus)

    def stage_weights(self, stage: int) -> int:
        """Bytes on one GPU of a stage: its share of the layers, and what only an end has."""
        model, gpus, last = self.model, self.num_gpus, self.pipeline - 1
        if not last:
            return model.weight_bytes(gpus)
        roles = {EMBEDDING, ENCODER} if stage == 0 else set()
        if stage == last:
            roles |= {EMBEDDING} if model.tied else {HEAD}
        share = self.stages[stage] / model.num_layers
        layers = share * model.weight_bytes(gpus, (*IN_LAYERS, OTHER))
        return int(layers) + model.weight_bytes(gpus, roles)


@dataclass(frozen=True)
class Sizes:
    """Bytes of an element of the cache, slots of a block."""

    kv_bytes: int = 2
    block_size: int = paper.BLOCK_SIZE

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, not {value!r}")


@dataclass(frozen=True)
class Batch:
    """What one iteration may hold."""

    tokens: int
    seqs: int

    @classmethod
    def default(cls, gpu: GPU) -> Batch:
        """vLLM's for a server (vllm/engine/arg_utils.py, 0.9 to 0.21): wide on GPUs of 70 GiB and
        more that are no A100."""
        if gpu.memory_bytes >= LARGE_GPU and not gpu.name.startswith("a100"):
            return cls(8192, 1024)
        return cls(2048, 256)


@dataclass(frozen=True)
class Engine:
    """What a version of vLLM takes beside weights, K and V, as its startup logs show it.

    `logit_bytes` of each element of the logits of `max_num_seqs` sequences, at which a sampler is
    tried out: the logits in 16 and in 32 bits, and what sorting or sampling keeps beside them.
    `outside` torch on one GPU alone; on each of several, `outside_many` and so much for each.
    """

    name: str
    versions: str
    first: tuple[int, int]  # of its versions
    logit_bytes: float
    outside: float  # GiB
    outside_many: tuple[float, float]
    graphs: bool  # whether CUDA graphs are taken out before K and V are given the rest

    @property
    def told(self) -> str:
        return f"vLLM {self.versions}"

    def outside_bytes(self, num_gpus: int) -> int:
        """CUDA's context, libraries and, between several GPUs, what communication keeps."""
        fixed, each = self.outside_many
        return int((self.outside if num_gpus == 1 else fixed + each * num_gpus) * GIB)


# From the logs of docs/capacity.md: 0.11 and 0.16 (llm-d-planner), 0.18 and 0.19, one of 0.21.
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm-0.16", "0.11 to 0.16", (0, 0), 37.5, 0.13, (0.55, 0.0), graphs=False),
        Engine("vllm-0.19", "0.17 to 0.20", (0, 17), 14.0, 0.25, (2.0, 0.04), graphs=False),
        Engine("vllm-0.21", "0.21 and later", (0, 21), 14.0, 0.25, (2.0, 0.04), graphs=True),
    )
}


def engine_of(version: str) -> Engine:
    """The terms of a version such as 0.19.0; the newest where it is no number."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    place = (int(found[1]), int(found[2])) if found else (math.inf, 0)
    return [engine for engine in ENGINES.values() if engine.first <= place][-1]


ENGINE = ENGINES["vllm-0.19"]  # of which there are most logs
# Bytes of an iteration's token, in elements of 2 bytes: of the hidden size beside the logits, and
# beside a layer's widest result; of that result (gate, up and their product: 3 of 2).
BESIDE_LOGITS, BESIDE_WIDEST, OF_WIDEST = 1.5, 4.0, 1.5
FIXED_GIB = 0.07
ENCODER_GIB = 0.2  # more where a model has an encoder
GRAPHS_GIB, GRAPHS_GIB_A_LAYER = 0.15, 0.018  # CUDA graphs of vLLM's usual batch sizes


@dataclass(frozen=True)
class Plan:
    """The bytes of one of a deployment's GPUs, of the stage that has room for the fewest blocks;
    the parts sum to its memory.

    DoesNotFitError if no block is left.
    """

    name: str
    deployment: Deployment
    sizes: Sizes
    utilization: float  # of the memory, that is used
    weights: int
    activations: int
    outside: int  # of torch
    graphs: int = 0
    stage: int = 0
    batch: Batch | None = None
    engine: Engine | None = None

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization must be in (0, 1], got {self.utilization!r}")
        if self.kv_cache < self.block_bytes:
            gpus = self.num_gpus
            where = "a GPU" if gpus == 1 else f"each of {gpus} GPUs"
            beside = self.activations + self.outside + self.graphs
            raise DoesNotFitError(
                f"{self.deployment.model.name} does not fit: {self.utilization:g} of the "
                f"{self.memory / GIB:.2f} GiB of {where} are {self.usable / GIB:.2f} GiB, of which "
                f"weights take {self.weights / GIB:.2f}, activations and workspace "
                f"{beside / GIB:.2f} and one block of "
                f"{self.block_size} slots {self.block_bytes / GIB:.2f} GiB"
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
        return self.usable - self.weights - self.activations - self.outside - self.graphs

    @property
    def num_gpus(self) -> int:
        """All of one server."""
        return self.deployment.num_gpus * self.deployment.pipeline

    @property
    def block_size(self) -> int:
        return self.sizes.block_size

    @property
    def share(self) -> float:
        """Of the layers, that the stage has."""
        return self.deployment.stages[self.stage] / self.deployment.model.num_layers

    @property
    def slot_bytes(self) -> int:
        """Of one token, all layers of the stage, on one GPU; 0 if nothing grows with the length."""
        return round(self.share * self.deployment.slot_bytes(self.sizes.kv_bytes))

    @property
    def state_bytes(self) -> int:
        """Of one sequence, whatever its length, on one GPU."""
        return round(self.share * self.deployment.state_bytes)

    @property
    def block_bytes(self) -> int:
        """Of one block on one GPU; of one sequence's state, if there is nothing else."""
        return self.block_size * self.slot_bytes or max(1, self.state_bytes)

    @property
    def num_blocks(self) -> int:
        return self.kv_cache // self.block_bytes

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size if self.slot_bytes else 0


def activation_bytes(model: Model, num_gpus: int, batch: Batch, engine: Engine, last: bool) -> int:
    """The most that an iteration holds beside weights and cache: while a layer computes, or, on the
    `last` stage, while the sampler has the logits of all sequences, which each GPU has whole."""
    token = 2 * batch.tokens
    layer = token * (OF_WIDEST * model.widest / num_gpus + BESIDE_WIDEST * model.hidden_size)
    logits = batch.seqs * model.vocab_size * engine.logit_bytes + FIXED_GIB * GIB
    logits += token * BESIDE_LOGITS * model.hidden_size
    encoder = ENCODER_GIB * GIB if model.params(ENCODER) else 0.0
    return int(max(layer, logits if last else 0.0) + encoder)


def serving_plan(
    deployment: Deployment,
    sizes: Sizes = Sizes(),
    utilization: float = UTILIZATION,
    allowance_bytes: int | None = None,
    engine: Engine = ENGINE,
    batch: Batch | None = None,
) -> Plan:
    """A share of the memory, less what weights and a version of vLLM take, is for K and V.

    Of a pipeline it is the plan of the stage that holds the fewest blocks, which decides.
    `allowance_bytes` replaces all terms but the weights.
    """
    model, gpus = deployment.model, deployment.num_gpus
    batch = batch or Batch.default(deployment.gpu)
    outside = engine.outside_bytes(gpus)
    plans, problem = [], None
    for stage in range(deployment.pipeline):
        last = stage == deployment.pipeline - 1
        parts = [activation_bytes(model, gpus, batch, engine, last), outside, 0]
        if engine.graphs:
            layers = deployment.stages[stage]
            parts[2] = int((GRAPHS_GIB + GRAPHS_GIB_A_LAYER * layers) * GIB)
        if allowance_bytes is not None:
            parts = [allowance_bytes, 0, 0]
        weights = deployment.stage_weights(stage) + model.rotary_bytes
        try:
            told = deployment, sizes, utilization, weights, *parts, stage, batch, engine
            plans.append(Plan("serving", *told))
        except DoesNotFitError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return min(plans, key=lambda plan: plan.num_blocks)


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
    parameters = model.split_params // gpus + model.whole_params
    if model.family == "llama":  # that version keeps a rotary table per layer, of 8192 positions
        parameters += model.num_layers * 8192 * model.head_size // gpus
    widest = max(model.widest // gpus + model.hidden_size, model.vocab_size)
    activations = 2 * 2 * max_batched_tokens * widest
    sizes, workspace = Sizes(block_size=block_size), paper.WORKSPACE_BYTES
    return Plan("paper", deployment, sizes, utilization, 2 * parameters, activations, workspace)


def kv_blocks(deployment: Deployment, block_size: int = paper.BLOCK_SIZE) -> int:
    """K/V blocks by the paper's plan; each GPU holds its heads' part of every block."""
    return paper_plan(deployment, block_size).num_blocks


def request_bytes(plan: Plan, num_tokens: int) -> float:
    """Of a sequence of that length on one GPU: whole blocks of every layer, windows dropping what
    is behind them, and its states."""
    deployment, size = plan.deployment, plan.block_size
    held, whole = 0.0, -(-num_tokens // size) * size
    for layers in deployment.model.layers:
        kept = -(-layers.kept(num_tokens) // size) * size
        of_extra = layers.count * layers.extra * plan.sizes.kv_bytes
        slot = layers.slot_bytes(plan.sizes.kv_bytes, deployment.num_gpus) - of_extra
        held += kept * slot + whole * of_extra
    return plan.share * held + plan.state_bytes


def requests_of_length(plan: Plan, num_tokens: int) -> float:
    """How many sequences of that length fit at once; no bound but memory, as a fraction."""
    if plan.deployment.model.windows or plan.state_bytes:
        return plan.kv_cache / request_bytes(plan, num_tokens)
    return plan.num_blocks / -(-num_tokens // plan.block_size)


def logged_concurrency(plan: Plan, max_len: int) -> float | None:
    """What vLLM logs as 'maximum concurrency' at that length, where layers have windows.

    It pads kinds of layers to groups of one size that share a pool, and gives a window room for an
    iteration's prompt tokens and a block more (vllm/v1/core/kv_cache_utils.py). None for models
    with states, whose blocks it pads otherwise.
    """
    model, size = plan.deployment.model, plan.block_size
    kinds = [layers for layers in model.layers if layers.elements]
    if plan.state_bytes or any(layers.kind == STATE for layers in model.layers) or not kinds:
        return None
    each = {
        layers: layers.slot_bytes(plan.sizes.kv_bytes, plan.deployment.num_gpus) / layers.count
        for layers in kinds
    }
    page = max(each.values())  # smaller layers have longer blocks, so that all pages are alike
    counts: dict[tuple[int | None, float], int] = {}
    for layers in kinds:
        window = layers.window if layers.kind == WINDOW else None
        kind = window, size * page / each[layers]
        counts[kind] = counts.get(kind, 0) + layers.count
    least, most = min(counts.values()), max(counts.values())
    group = most if most < least * 1.25 else least
    batched = plan.batch.tokens if plan.batch else max_len
    needed = 0
    for (window, slots), count in counts.items():
        tokens = max_len if window is None else min(window - 1 + batched, max_len)
        blocks = math.ceil(tokens / slots) + (window is not None)
        needed += -(-count // group) * blocks
    return int(plan.kv_cache / (plan.share * page * size * group)) / needed
