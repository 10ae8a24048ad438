"""What capacity.py is asked: a case, and with --trace the requests that it serves.

Reproduces nothing by itself. A `Case` is a model on GPUs under a workload; a `TraceCase` adds a
request trace and the speed of the server. answers.py and trace_answers.py ask them one question
after the other; each answer is a `Section`.

    case = make_case(args)
    asked = make_trace_case(args, case)
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import dataclass, replace

from vllm_sim import paper
from vllm_sim.models import DEPLOYMENTS, GPU, GPUS, Deployment, Model, PlanError, load_model
from vllm_sim.models.memory_plan import (
    BATCHED_TOKENS,
    UTILIZATION,
    DoesNotFitError,
    Plan,
    Sizes,
    paper_plan,
    serving_plan,
)
from vllm_sim.models.presets import MODELS, is_preset
from vllm_sim.paper import GIB
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.tables import Table
from vllm_sim.serving.scheduler import Limits
from vllm_sim.sizing.concurrency import NO_LIMIT, Workload, parse_workload
from vllm_sim.sizing.options import KV_BYTES, MATRIX_BITS, MAX_GPUS, MAX_LEN, PREEMPTION_RATE
from vllm_sim.sizing.speed import Speed, speed_of
from vllm_sim.sizing.trace_serving import Columns, Server
from vllm_sim.workload.traces import Trace, read_trace

PLANS = {"paper": "the paper's memory plan", "serving": "a serving system's memory plan"}


@dataclass(frozen=True)
class Section(Table):
    """A table that answers the question in its title, and the answer in one sentence."""

    answer: str = ""

    def to_json(self) -> dict:
        """The table, and the answer beside it."""
        return {**Table.to_json(self), "answer": self.answer}


@dataclass(frozen=True)
class Survey:
    """The answer in one sentence, and the tables behind it."""

    answer: str
    sections: list[Section]


@dataclass(frozen=True)
class Case:
    """One model on one kind of GPU under one workload. Lengths in tokens."""

    told: str  # the model's name
    plan: Plan
    weight_type: str
    kv_type: str
    max_len: int
    workload: Workload
    prefix_len: int
    seed: int

    @property
    def model(self) -> Model:
        return self.plan.deployment.model

    @property
    def gpu(self) -> GPU:
        return self.plan.deployment.gpu

    @property
    def line(self) -> str:
        """The line above each table."""
        return (
            f"{self.told}, {self.weight_type} weights, {self.kv_type} K/V, "
            f"{self.plan.num_gpus} x {self.gpu.name} of {self.plan.memory / GIB:.2f} GiB, "
            f"{PLANS[self.plan.name]}, block size {self.plan.block_size}, "
            f"up to {self.max_len:,} tokens"
        )

    @property
    def workload_line(self) -> str:
        return f"{self.line}, {self.workload.name}, seed {self.seed}"

    @property
    def windowed(self) -> bool:
        """Whether a window is shorter than the longest request."""
        windows = (layers.window for layers in self.model.cache_layers)
        return any(window and window < self.max_len for window in windows)

    def to_json(self) -> dict[str, object]:
        """What was asked, and what it came to: the setting of --json."""
        m, plan, weights = self.model, self.plan, self.model.weights()
        told = {"model": m.name, "family": m.family, "layers": m.num_layers}
        told |= {"parameters": weights.total, "active_parameters": weights.active}
        told |= {"hidden_size": m.hidden_size, "head_size": m.head_size}
        told |= {"heads": m.num_heads, "kv_heads": m.num_kv_heads, "notes": list(m.notes)}
        told |= {"gpu": self.gpu.name if self.gpu.name in GPUS else None, "gpus": plan.num_gpus}
        told |= {"dtype": self.weight_type, "kv_dtype": self.kv_type, "plan": plan.name}
        told |= {"memory_bytes": plan.memory, "weight_bytes_per_gpu": plan.weights}
        told |= {"kv_cache_bytes_per_gpu": plan.kv_cache, "num_blocks": plan.num_blocks}
        told |= {"block_size": plan.block_size, "num_slots": plan.num_slots}
        told |= {"kv_bytes_per_token": m.slot_elements * plan.sizes.kv_bytes}
        told |= {"max_model_len": self.max_len, "prefix_len": self.prefix_len}
        return told | {"workload": self.workload.name, "seed": self.seed}


def make_case(args: argparse.Namespace) -> Case:
    """The case that the options describe. UsageError or ValueError if it cannot be had."""
    workload = parse_workload(args.workload or "sharegpt", args.lengths == "fixed")
    model = load_model(args.model)
    told = f"{args.model}" if is_preset(model) else model.name  # as the user wrote it
    own = model.dtype or "fp16"
    weight_type = args.dtype or own
    kv_type = args.kv_dtype or (own if weight_type == "fp8" else weight_type)
    if model.quantisation and args.dtype == "fp8":
        raise UsageError(
            f"--dtype fp8: {model.name} is quantised already, as {model.quantisation.method}"
        )
    sizes = Sizes(MATRIX_BITS[weight_type], KV_BYTES[kv_type], args.block_size)
    named = args.gpu or "a100-40gb"
    gpu = replace(GPUS[named], name=named)
    if args.gpu_memory:
        gpu = GPU("GPU", int(args.gpu_memory * GIB))
    try:
        plan = _plan(args, Deployment(model, gpu, args.gpus), sizes)
    except DoesNotFitError as error:
        named = str(error).replace(model.name, told, 1)
        raise PlanError(f"{named}; {_would_do(args, model, gpu, sizes)}") from None
    longest = _longest(args, model)
    if model.quantisation:
        weight_type = model.quantisation.method
    return Case(told, plan, weight_type, kv_type, longest, workload, args.prefix_len, args.seed)


def _plan(args: argparse.Namespace, deployment: Deployment, sizes: Sizes) -> Plan:
    """The paper's plan for its deployments or if asked for, otherwise a serving system's."""
    tuned = args.gpu_memory_utilization is not None or args.allowance is not None
    plain = is_preset(deployment.model) and (sizes.matrix_bits, sizes.kv_bytes) == (16, 2)
    chosen = args.plan or ("paper" if plain and not tuned and is_papers(deployment) else "serving")
    if chosen == "paper":
        if tuned:
            raise UsageError("--plan paper has its own utilization and allowance")
        if not plain:
            raise PlanError(f"--plan paper is for {', '.join(MODELS)} in 16 bits alone")
        return paper_plan(deployment, sizes.block_size)
    allowance = None if args.allowance is None else int(args.allowance * GIB)
    return serving_plan(deployment, sizes, args.gpu_memory_utilization or UTILIZATION, allowance)


def _would_do(args: argparse.Namespace, model: Model, gpu: GPU, sizes: Sizes) -> str:
    """How many of a GPU that does not suffice would."""
    for gpus in range(args.gpus + 1, MAX_GPUS + 1):
        with suppress(PlanError):
            _plan(args, Deployment(model, gpu, gpus), sizes)
            return f"{gpus} such GPUs would do"
    return f"no number of such GPUs up to {MAX_GPUS:,} would do"


def is_papers(deployment: Deployment) -> bool:
    """Whether this is one of the paper's deployments."""
    return is_preset(deployment.model) and deployment == DEPLOYMENTS.get(deployment.model.name)


def _longest(args: argparse.Namespace, model: Model) -> int:
    """The longest request: as asked for, or the model's own maximum."""
    own = model.max_len
    if own is None and args.max_model_len is None:
        raise UsageError(f"{model.name} says no longest request: give --max-model-len")
    asked = args.max_model_len or own
    if own is not None and asked > own:
        raise UsageError(f"--max-model-len {asked}: {model.name} goes up to {own:,} tokens")
    if not 2 <= asked <= MAX_LEN:
        raise UsageError(f"a longest request of {asked:,} tokens is not 2 to {MAX_LEN:,}")
    return asked


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
        """The setting of the case, and the trace."""
        trace = self.trace
        told = {
            "file": trace.name,
            "format": trace.form,
            "rows_read": trace.rows_read,
            "rows_refused": {reason: found.rows for reason, found in trace.refused.items()},
            "rows_sorted": trace.rows_sorted,
            "times": trace.times,
            "span_s": trace.span_s,
            "requests": len(trace),
            "arrival_rate": None if self.arrival_rate == float("inf") else self.arrival_rate,
            "all_at_once": self.arrival_rate == float("inf"),
            "preemption_rate": self.rate,
            "speed": self.speed.assumed,
        }
        return self.case.to_json() | {"workload": trace.name, "trace": told}


def make_trace_case(args: argparse.Namespace, case: Case) -> TraceCase:
    """The trace that the options name, for this case. UsageError, WorkloadError."""
    unit = args.time_unit if args.rate is None else "ns"  # any: only their order counts then
    trace = read_trace(args.trace, args.trace_rows, unit)
    if args.rate is None and trace.arrivals is None:
        raise UsageError(
            f"{args.trace}: no column of times: give --rate, requests a second, or --rate inf"
        )
    trace = trace.up_to(case.max_len)
    if args.rate is not None:
        trace = trace.arriving(args.rate, args.seed)
    rate = PREEMPTION_RATE if args.preemption_rate is None else args.preemption_rate
    speed = speed_of(case.plan, args.speed_of or case.gpu.name)
    return TraceCase(case, trace, speed, rate, args.rate)
