"""One case of capacity.py: a model on GPUs under a workload, and the form of an answer about it.

Reproduces nothing by itself: capacity.py makes a Case of its arguments, capacity_tables.py asks it
one question after the other, and each answer is a Section.

[server_speed] Seconds of an iteration for any model and GPU that capacity.py sizes: what --trace serves at.

Reproduces: latency.py's model of bytes and FLOPs (section 6's experiments) beyond the paper's
deployments, with the same shares of bandwidth and FLOPS. What was fitted for the paper's models is
used for them; other models run with OPT-13B's constants, and every answer says so.

    speed = speed_of(case, ACCELERATORS["h100"])
    speed.latency.decode_steps(100, num_seqs=32, context_tokens=16_000), speed.assumed

[trace_case] One trace on one case of capacity.py: the requests, the server and its speed.

Reproduces nothing by itself: trace_options.py makes a TraceCase of the arguments, trace_tables.py
answers for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sim import paper
from vllm_sim.models.decoder import Decoder
from vllm_sim.models.gpus import DataGPU
from vllm_sim.models.load import Model
from vllm_sim.models.memory_plan import BATCHED_TOKENS, Plan, Sizes
from vllm_sim.paper import GIB
from vllm_sim.scenarios.report import Table
from vllm_sim.serving import latency
from vllm_sim.serving.latency import (
    BANDWIDTH_USED,
    FITTED,
    FITTED_LIKE,
    FLOPS_USED,
    Accelerator,
    LatencyModel,
)
from vllm_sim.serving.scheduler import Limits
from vllm_sim.sizing.concurrency import NO_LIMIT, Workload
from vllm_sim.sizing.trace_serving import Columns, Server
from vllm_sim.workload.traces import Trace

PLANS = {"paper": "the paper's memory plan", "serving": "a serving system's memory plan"}


@dataclass(frozen=True)
class Case:
    """One model on one kind of GPU under one workload. Lengths in tokens."""

    model: Model
    gpu: DataGPU | None  # None: a memory size was given
    plan: Plan
    sizes: Sizes
    weight_type: str
    kv_type: str
    max_len: int
    workload: Workload
    prefix_len: int
    seed: int

    @property
    def line(self) -> str:
        """The line above each table."""
        memory = f"{self.plan.memory / GIB:.2f} GiB"
        gpu = f"{self.gpu.name} of {memory}" if self.gpu else f"GPU of {memory}"
        return (
            f"{self.model.name}, {self.weight_type} weights, {self.kv_type} K/V, "
            f"{self.plan.num_gpus} x {gpu}, {PLANS[self.plan.name]}, "
            f"block size {self.plan.block_size}, up to {self.max_len:,} tokens"
        )

    @property
    def windowed(self) -> bool:
        """Whether a window is shorter than the longest request."""
        windows = (layers.window for layers in self.model.decoder.cache_layers)
        return any(window and window < self.max_len for window in windows)

    @property
    def workload_line(self) -> str:
        return f"{self.line}, {self.workload.name}, seed {self.seed}"


@dataclass(frozen=True)
class Section:
    """A question, the table that answers it (its title is the question), and the answer."""

    table: Table
    answer: str

    @property
    def question(self) -> str:
        return self.table.title

    def to_json(self) -> dict:
        """The table, and the answer beside it."""
        return {**self.table.to_json(), "answer": self.answer}


def is_papers(model: Model, gpu: DataGPU | None, num_gpus: int) -> bool:
    """Whether these are one of the paper's deployments."""
    deployment = paper.DEPLOYMENTS.get(model.preset.name) if model.preset and gpu else None
    return deployment is not None and (gpu.name, num_gpus) == (
        deployment.gpu.name,
        deployment.num_gpus,
    )


def describe(decoder: Decoder) -> dict[str, object]:
    """A decoder's sizes for --json."""
    weights = decoder.weights()
    return {
        "family": decoder.family,
        "parameters": weights.total,
        "active_parameters": weights.active,
        "layers": decoder.num_layers,
        "hidden_size": decoder.hidden_size,
        "heads": decoder.num_heads,
        "kv_heads": decoder.num_kv_heads,
        "head_size": decoder.head_size,
    }


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


@dataclass(frozen=True, eq=False)
class TraceCase:
    """A case, the requests that it serves and how fast, and the share that may be held up."""

    case: Case
    trace: Trace
    speed: Speed
    rate: float
    arrival_rate: float | None  # None: the file's own times

    @property
    def server(self) -> Server:
        """The limit on an iteration's tokens is the one the memory plan leaves room for."""
        plan = self.case.plan
        batched = paper.MAX_BATCHED_TOKENS if plan.name == "paper" else BATCHED_TOKENS
        limits = Limits(max(batched, self.case.max_len), NO_LIMIT)
        return Server(plan.block_size, self.case.max_len, self.speed.latency, limits)

    @property
    def columns(self) -> Columns:
        trace = self.trace
        return trace.arrivals.tolist(), trace.prompts.tolist(), trace.outputs.tolist()

    @property
    def line(self) -> str:
        """The line above a table: the trace, the server and its speed."""
        arrivals = ""
        if self.arrival_rate is not None:
            arrivals = f", arriving at {self.arrival_rate:g}/s, seed {self.case.seed}"
        windows = "; every layer whole, without windows" if self.case.windowed else ""
        return f"{self.trace.name}{arrivals}; {self.case.line}; {self.speed.assumed}{windows}"

    def to_json(self) -> dict[str, object]:
        """For the setting."""
        trace = self.trace
        return {
            "file": trace.name,
            "format": trace.form,
            "rows_read": trace.rows_read,
            "rows_refused": {reason: found.rows for reason, found in trace.refused.items()},
            "rows_sorted": trace.rows_sorted,
            "requests": len(trace),
            "arrival_rate": None if self.arrival_rate == float("inf") else self.arrival_rate,
            "all_at_once": self.arrival_rate == float("inf"),
            "preemption_rate": self.rate,
            "speed": self.speed.assumed,
        }
