"""One experiment of the paper: a system serves a trace, and what is measured of it.

Reproduces: section 6.1's set-up. A `Run` says everything that decides an outcome; `execute` builds
its trace, its manager and its latency model and simulates it (vllm_sim/serving/).

    run = Run(VLLM, "opt-13b", "ShareGPT", rate=2.0, seconds=3600.0)
    execute(run, find_lengths([], None)).normalized_latency

reproduce.py runs hundreds of these, over several processes.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from sequence import BeamHistory, Sequence, SequenceGroup
from vllm_sim import paper
from vllm_sim.models import DEPLOYMENTS, kv_blocks
from vllm_sim.paper import FASTER_TRANSFORMER, VLLM
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.serving.beam_search import beam_histories
from vllm_sim.serving.latency import LatencyModel, Software, latency_model
from vllm_sim.serving.scheduler import Iteration, Manager
from vllm_sim.serving.simulator import Observer, ServingResult, simulate
from vllm_sim.serving.static_batching import simulate_static
from vllm_sim.serving.steady_state import UsageMean
from vllm_sim.serving.systems import POLICY, limits_of, new_manager
from vllm_sim.workload.data_sets import Lengths
from vllm_sim.workload.length_tables import WMT16_PROMPTS

SHARED_PREFIX = {"WMT16 1-shot": WMT16_PROMPTS[1][0], "WMT16 5-shot": WMT16_PROMPTS[5][0]}
PREFIX_ID = -2  # no request has it
# Beam searches are drawn once and shared by requests: (steps, how many).
BEAM_POOL = ((64, 256), (128, 128), (256, 64), (512, 32), (1024, 32), (2048, 32))


@dataclass(frozen=True, order=True)
class Run:
    """One system, one trace. Rate in requests/s, times in seconds, lengths in tokens."""

    system: str
    model: str
    dataset: str
    rate: float
    seconds: float
    seed: int = 0
    decoding: str = "single"  # or "parallel", "beam"
    width: int = 1  # samples or beams of a request
    theta: float = 0.25  # of the beam search model (beam_search.py)
    block_size: int = paper.BLOCK_SIZE
    preemption: str = "auto"
    max_num_seqs: int = 0  # 0: as the artifact has it for the system
    watermark: float = paper.WATERMARK
    window_s: tuple[float, float] = (0.0, math.inf)
    memory: bool = False  # measure memory in the window, and stop at its end

    def __post_init__(self) -> None:
        if self.system not in paper.SYSTEMS or self.model not in DEPLOYMENTS:
            raise ValueError(f"unknown system or model: {self.system!r}, {self.model!r}")
        if not 0.0 < self.rate < math.inf or not 0.0 < self.seconds < math.inf:
            raise ValueError(f"rate and duration must be positive, got {self.rate}, {self.seconds}")
        if self.decoding not in ("single", "parallel", "beam") or self.width < 1:
            raise ValueError(f"unknown decoding {self.decoding!r} of width {self.width}")


@dataclass(frozen=True)
class Outcome:
    """What was measured. Shares are of all slots (0 to 1), means are over iterations."""

    normalized_latency: float  # s/token, mean over requests
    num_requests: int
    num_iterations: int
    mean_batch: float  # requests, in the window
    num_swaps: int = 0
    num_recomputations: int = 0
    shares: dict[str, float] = field(default_factory=dict)  # by part of MemoryUsage
    saving: float = 0.0  # Fig. 15's, as the artifact averages it
    least_free: float = 1.0  # share of blocks that were free after an admission, at the least


Done = Mapping[Run, Outcome]  # what is known so far


class MemoryMeter(Observer):
    """Where the slots are over the iterations, what sharing saves, and the least memory free."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.mean = UsageMean()
        self.least_free = 1.0

    def on_iteration(self, iteration: Iteration) -> None:
        usage = self.manager.usage()
        self.mean.add(usage, iteration.num_groups)
        if iteration.prefills:
            self.least_free = min(self.least_free, usage.share("free"))


def execute(
    run: Run,
    lengths: Lengths,
    *,
    latency: LatencyModel | None = None,
    check: bool = False,
    progress: Progress = SILENT,
) -> Outcome:
    """Simulate one run; `latency` is `latency_of(run)` unless given; `check` recomputes all
    invariants in every iteration.

    Raises ValueError, RequestTooLargeError, and WorkloadError for bad length files.
    """
    columns = lengths.columns(run.dataset, run.rate, run.seconds, run.seed)
    latency = latency or latency_of(run)
    if run.system == FASTER_TRANSFORMER:
        batch_size = paper.FT_BATCH_SIZE[run.dataset][run.model]
        return _outcome(simulate_static(*columns, batch_size, paper.FT_MAX_TOTAL_LEN, latency))
    limits = limits_of(run.system)
    if run.max_num_seqs:
        limits = replace(limits, max_num_seqs=run.max_num_seqs)
    manager = manager_for(run)
    meter = MemoryMeter(manager)
    collecting = gc.isenabled()
    gc.disable()  # a trace is many small objects and no cycles
    try:
        result = simulate(
            groups_for(run, columns),
            manager,
            limits,
            latency,
            preemption=run.preemption,
            observers=[meter] if run.memory else [],
            window_s=run.window_s,
            until_s=run.window_s[1] if run.memory else math.inf,
            check=check,
            progress=progress,
        )
    finally:
        if collecting:
            gc.enable()
    return _outcome(result, meter.mean.shares, meter.mean.saving, meter.least_free)


def _outcome(result: ServingResult, *memory) -> Outcome:
    return Outcome(
        result.normalized_latency,
        len(result.finish_s),
        result.num_iterations,
        result.mean_window_batch,
        result.num_swaps,
        result.num_recomputations,
        *memory,
    )


def manager_for(run: Run) -> Manager:
    """The memory of the run's system, as Table 1 and the artifact have it."""
    deployment = DEPLOYMENTS[run.model]
    blocks = kv_blocks(deployment, run.block_size)
    slot_bytes = deployment.model.kv_bytes_per_token // deployment.num_gpus
    cpu = min(blocks, paper.SWAP_BYTES_PER_GPU // (run.block_size * slot_bytes))
    options = {"num_cpu_blocks": cpu, "watermark": run.watermark}
    manager = new_manager(POLICY[run.system], blocks, run.block_size, **options)
    if run.system == VLLM and run.dataset in SHARED_PREFIX:
        manager.allocate_prefix(PREFIX_ID, SHARED_PREFIX[run.dataset])
    return manager


def groups_for(run: Run, columns: tuple[list[float], list[int], list[int]]) -> list[SequenceGroup]:
    """The trace's sequence groups. Only vLLM holds a shared prefix; the others store it."""
    prefix_len = SHARED_PREFIX.get(run.dataset, 0)
    prefix_id = PREFIX_ID if prefix_len and run.system == VLLM else None
    groups = []
    for index, (arrival_s, prompt_len, output_len) in enumerate(zip(*columns)):
        ids = range(index * run.width, (index + 1) * run.width)
        seqs = [Sequence(seq_id, prompt_len, output_len, prefix_len) for seq_id in ids]
        history = None
        if run.decoding == "beam":
            history = _history(run, output_len, index)
        groups.append(SequenceGroup(index, seqs, arrival_s, prefix_id, history))
    return groups


def _history(run: Run, output_len: int, index: int) -> BeamHistory:
    """The beam search of one request: the same for every system, manager and policy."""
    for steps, count in BEAM_POOL:
        if output_len <= steps:
            return _beam_pool(run.width, run.theta, run.seed, steps, count)[index % count]
    raise ValueError(f"no beam search of {output_len} steps is drawn")


@cache
def _beam_pool(width: int, theta: float, seed: int, steps: int, count: int) -> list[BeamHistory]:
    drawn = beam_histories(width, [steps] * count, seed * len(BEAM_POOL) + steps, theta)
    return [BeamHistory(history) for history in drawn]


def latency_of(run: Run, software: Software | None = None) -> LatencyModel:
    """The latency model of a run; `software` are its constants, as fitted unless given."""
    static = run.system == FASTER_TRANSFORMER
    kind = {"static": static, "beams": run.decoding == "beam"}
    return latency_model(DEPLOYMENTS[run.model], run.block_size, software, **kind)
