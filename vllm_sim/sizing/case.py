"""What capacity.py is asked: a case, and with --trace the requests that it serves.

Reproduces nothing by itself. A `Case` is a model on GPUs under a workload; a `TraceCase` adds a
request trace and the speed of the server. answers.py and trace_answers.py ask them one question
after the other; each answer is a `Section`.

    case = make_case(args)
    asked = make_trace_case(args, case)
"""

from __future__ import annotations

import argparse
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from vllm_sim import paper
from vllm_sim.models import DEPLOYMENTS, GPU, GPUS, Deployment, Model, PlanError, load_model
from vllm_sim.models.memory_plan import (
    ENGINE,
    ENGINES,
    UTILIZATION,
    Batch,
    DoesNotFitError,
    Plan,
    Sizes,
    engine_of,
    paper_plan,
    serving_plan,
)
from vllm_sim.models.model import ENCODER, EXPERTS
from vllm_sim.models.presets import GIVEN, MODELS, PRESETS, given_model, is_preset
from vllm_sim.paper import GIB
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.tables import Table
from vllm_sim.serving.scheduler import Limits
from vllm_sim.sizing.concurrency import NO_LIMIT, Workload, parse_workload
from vllm_sim.sizing.options import KV_BYTES, MAX_GPUS, MAX_LEN, PREEMPTION_RATE
from vllm_sim.sizing.server_log import ServerLog
from vllm_sim.sizing.speed import Speed, speed_of
from vllm_sim.sizing.trace_serving import Columns, Server
from vllm_sim.workload.traces import Trace, read_trace


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
            f"{self.told}, {self.weight_type} weights, {self.kv_type} K/V, {self.gpus} of "
            f"{self.plan.memory / GIB:.2f} GiB, {self.planned}, block size {self.plan.block_size}, "
            f"up to {self.max_len:,} tokens"
        )

    @property
    def gpus(self) -> str:
        """'4 x h100', or with stages '2 x 4 x h100'."""
        stages = self.plan.deployment.pipeline
        split = f"{stages} stages of " * (stages > 1)
        return f"{split}{self.plan.deployment.num_gpus} x {self.gpu.name}"

    @property
    def planned(self) -> str:
        """Whose memory plan it is, and what an iteration may hold."""
        engine, batch = self.plan.engine, self.plan.batch
        if engine is None or batch is None:
            return "the paper's memory plan"
        return (
            f"memory as {engine.told} plan {self.plan.utilization:g} of it with max_num_seqs "
            f"{batch.seqs:,} and max_num_batched_tokens {batch.tokens:,}"
        )

    @property
    def workload_line(self) -> str:
        return f"{self.line}, {self.workload.name}, seed {self.seed}"

    @property
    def windowed(self) -> bool:
        """Whether a window is shorter than the longest request."""
        return any(window < self.max_len for window in self.model.windows)

    def to_json(self) -> dict[str, object]:
        """What was asked, and what it came to: the setting of --json."""
        m, plan = self.model, self.plan
        told = {"model": m.name, "family": m.family, "layers": m.num_layers}
        told |= {"parameters": m.num_params, "active_parameters": m.active_params}
        told |= {"expert_parameters": m.params(EXPERTS), "encoder_parameters": m.params(ENCODER)}
        told |= {"hidden_size": m.hidden_size, "head_size": m.head_size}
        told |= {"heads": m.num_heads, "kv_heads": m.num_kv_heads, "notes": list(m.notes)}
        told |= {"gpu": self.gpu.name if self.gpu.name in GPUS else None, "gpus": plan.num_gpus}
        told |= {"dtype": self.weight_type, "kv_dtype": self.kv_type, "plan": plan.name}
        told |= {"memory_bytes": plan.memory, "weight_bytes_per_gpu": plan.weights}
        told |= {"kv_cache_bytes_per_gpu": plan.kv_cache, "num_blocks": plan.num_blocks}
        told |= {"block_size": plan.block_size, "num_slots": plan.num_slots}
        told |= {"kv_bytes_per_token": m.slot_elements * plan.sizes.kv_bytes}
        told |= {"other_bytes_per_token": m.extra_elements * plan.sizes.kv_bytes}
        told |= {"state_bytes_per_sequence": m.state_bytes}
        told |= {"pipeline_parallel": plan.deployment.pipeline, "layer_kinds": self._kinds()}
        told |= {"engine": plan.engine.name if plan.engine else None}
        told |= {"max_num_seqs": plan.batch.seqs if plan.batch else None}
        told |= {"max_num_batched_tokens": plan.batch.tokens if plan.batch else None}
        told |= {"max_model_len": self.max_len, "prefix_len": self.prefix_len}
        return told | {"workload": self.workload.name, "seed": self.seed}

    def _kinds(self) -> list[dict[str, object]]:
        return [asdict(layers) for layers in self.model.layers]


def make_case(args: argparse.Namespace, log: ServerLog | None = None) -> Case:
    """The case that the options describe, and a log where they do not.

    UsageError or ValueError if it cannot be had.
    """
    workload = parse_workload(args.workload or "sharegpt", args.lengths == "fixed")
    model = _model(args, log)
    told = f"{args.model}" if args.model and is_preset(model) else model.name  # as it was written
    own = model.dtype or "fp16"
    weight_type = args.dtype or own
    stored = (log and log.quantization) or ""
    if stored not in ("", "fp8") and not model.quantisation:
        raise UsageError(
            f"{args.log}: served as {stored[:40]!a}, which the model given is not: give the "
            "quantised checkpoint's config.json, or --weight-bits"
        )
    online = log is not None and (log.quantization or "") == "fp8" and not model.quantisation
    if args.dtype == "fp8" or online:
        weight_type = "fp8"
        if model.quantisation:
            raise UsageError(
                f"--dtype fp8: {model.name} is quantised already, as {model.quantisation}"
            )
        model = model.with_matrix_bits(8)
    logged_kv = "fp8" if log and (log.kv_cache_dtype or "").startswith("fp8") else ""
    kv_type = args.kv_dtype or logged_kv or model.kv_dtype
    kv_type = kv_type or (own if weight_type == "fp8" else weight_type)
    given = model.family == GIVEN
    size = args.block_size or (log and log.block_size) or paper.BLOCK_SIZE
    sizes = Sizes(1 if given else KV_BYTES[kv_type], size)
    gpu, split = _gpu(args, log), _split(args, log)
    try:
        plan = _plan(args, Deployment(model, gpu, *split), sizes, log)
    except DoesNotFitError as error:
        named = str(error).replace(model.name, told, 1)
        told_more = "".join(f"; {note}" for note in model.notes)
        would = _would_do(args, model, gpu, sizes, log)
        raise PlanError(f"{named}; {would}{told_more}") from None
    longest = _longest(args, model, log)
    if model.quantisation:
        weight_type = model.quantisation
    types = ("given", "given") if given else (weight_type, kv_type)
    return Case(told, plan, *types, longest, workload, args.prefix_len, args.seed)


def _model(args: argparse.Namespace, log: ServerLog | None) -> Model:
    """What --model names, or the log; or a model of which only the sizes are given."""
    if args.kv_bytes_per_token:
        name = args.model or (log and log.model) or "given sizes"
        return given_model(name, args.kv_bytes_per_token, args.weights_gib, args.layers or 1)
    if args.model or log is None or not log.model:
        return load_model(args.model or "opt-13b", args.weight_bits)
    base = log.model.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    found = [name for name in PRESETS if base in (name, f"{name}-instruct", f"{name}-it")]
    if not found and not os.path.exists(log.model):
        raise UsageError(
            f"{args.log}: its model {log.model[:80]!a} is no preset: give --model its config.json"
        )
    return load_model(found[0] if found else log.model, args.weight_bits)


def _gpu(args: argparse.Namespace, log: ServerLog | None) -> GPU:
    """The GPU that was asked for, with the memory that the log states if there is one."""
    named = args.gpu or (log and named_gpu(log.gpu or "")) or "a100-40gb"
    gpu = replace(GPUS[named], name=named)  # as it was written
    if args.gpu_memory:
        gpu = GPU("GPU", int(args.gpu_memory * GIB))
    elif log is not None and log.total_gib and not args.gpu:
        memory = int(log.total_gib * GIB)
        known = named_gpu(log.gpu or "")
        gpu = replace(GPUS[known], memory_bytes=memory) if known else GPU("GPU", memory)
    elif log is not None and not args.gpu and not named_gpu(log.gpu or ""):
        raise UsageError(f"{args.log} does not say which GPU: give --gpu or --gpu-memory")
    return gpu


def named_gpu(text: str) -> str | None:
    """The preset that a device's name is about: 'NVIDIA H100 80GB HBM3'."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    plain = "".join(words)
    found = [
        name
        for name in GPUS
        if all(part in words for part in name.split("-"))
        or (name.startswith("rtx") and name in plain)
    ]
    return max(found, key=len, default=None)


def _split(args: argparse.Namespace, log: ServerLog | None) -> tuple[int, int]:
    """Tensor-parallel GPUs and stages of a pipeline."""
    tensor = args.gpus or (log and log.tensor_parallel) or 1
    return tensor, args.pipeline_parallel or (log and log.pipeline_parallel) or 1


def _plan(
    args: argparse.Namespace, deployment: Deployment, sizes: Sizes, log: ServerLog | None
) -> Plan:
    """The paper's plan for its deployments or if asked for, otherwise a serving system's."""
    tuned = (args.gpu_memory_utilization, args.allowance, args.engine, log)
    tuned += (args.max_num_seqs, args.max_num_batched_tokens)
    tuned = any(one is not None for one in tuned) or deployment.pipeline > 1
    plain = deployment.model in MODELS.values() and sizes.kv_bytes == 2
    chosen = args.plan or ("paper" if plain and not tuned and is_papers(deployment) else "serving")
    if chosen == "paper":
        if tuned:
            raise UsageError("--plan paper has its own utilization, allowance and limits")
        if not plain:
            raise PlanError(f"--plan paper is for {', '.join(MODELS)} in 16 bits alone")
        return paper_plan(deployment, sizes.block_size)
    allowance = None if args.allowance is None else int(args.allowance * GIB)
    utilization = args.gpu_memory_utilization or (log and log.gpu_memory_utilization)
    default = Batch.default(deployment.gpu)
    tokens = args.max_num_batched_tokens or (log and log.max_num_batched_tokens) or default.tokens
    seqs = args.max_num_seqs or (log and log.max_num_seqs) or min(default.seqs, tokens)
    if seqs > tokens:
        raise UsageError(f"{seqs:,} sequences of an iteration are more than its {tokens:,} tokens")
    batch = Batch(tokens, seqs)
    engine = ENGINES[args.engine] if args.engine else ENGINE
    if log is not None and log.version and not args.engine:
        engine = engine_of(log.version)
    if log is not None and log.enforce_eager:
        engine = replace(engine, graphs=False)
    return serving_plan(deployment, sizes, utilization or UTILIZATION, allowance, engine, batch)


def _would_do(
    args: argparse.Namespace, model: Model, gpu: GPU, sizes: Sizes, log: ServerLog | None
) -> str:
    """How many of a GPU that does not suffice would."""
    tensor, stages = _split(args, log)
    for gpus in range(tensor + 1, MAX_GPUS + 1):
        with suppress(PlanError):
            _plan(args, Deployment(model, gpu, gpus, stages), sizes, log)
            return f"{gpus} such GPUs would do"
    return f"no number of such GPUs up to {MAX_GPUS:,} would do"


def is_papers(deployment: Deployment) -> bool:
    """Whether this is one of the paper's deployments."""
    return is_preset(deployment.model) and deployment == DEPLOYMENTS.get(deployment.model.name)


def _longest(args: argparse.Namespace, model: Model, log: ServerLog | None) -> int:
    """The longest request: as asked for, or the model's own maximum."""
    own = model.max_len
    wanted = args.max_model_len or (log and log.max_model_len)
    if own is None and wanted is None:
        raise UsageError(f"{model.name} says no longest request: give --max-model-len")
    asked = wanted or own
    if args.max_model_len and own is not None and asked > own:
        raise UsageError(f"--max-model-len {asked}: {model.name} goes up to {own:,} tokens")
    if not 2 <= asked <= MAX_LEN:
        raise UsageError(
            f"a longest request of {asked:,} tokens is not 2 to {MAX_LEN:,}: give --max-model-len"
        )
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
        """What serves: with the limits that go with its speed, and then no watermark; else with
        those that the memory plan leaves room for."""
        plan, told = self.case.plan, (self.case.max_len, self.speed.latency)
        if self.speed.limits is not None:
            return Server(plan.block_size, *told, self.speed.limits, watermark=0.0)
        batched = plan.batch.tokens if plan.batch else paper.MAX_BATCHED_TOKENS
        limits = Limits(max(batched, self.case.max_len), NO_LIMIT)
        return Server(plan.block_size, *told, limits)

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
        windows += "; without states" if self.case.plan.state_bytes else ""
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
    if not case.plan.slot_bytes:
        raise UsageError(
            f"{case.model.name} keeps states alone, whatever the length: ask without --trace"
        )
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
