"""Scenario 4, mixed workload: every decoding method in one run, under memory pressure.

Reproduces: section 4.4's mixed decoding (single requests, parallel sampling, beam search and a
shared prefix in the same batches), section 4.5's preemption, once by swapping and once by
recomputation, and section 6.1's baselines on the same requests in the same memory. Every finished
sequence's K and V are read back through its table.

    python main.py --scenario 4
    python main.py --scenario 4 --trace AzureLLMInferenceTrace_conv.csv.gz

[scenario_trace] Scenario 4's requests from a real trace: its lengths, its order, its bursts.

Reproduces: section 4.4's mixed decoding on requests that servers recorded; a trace says nothing of
samples, beams or prefixes, so these are assigned in the scenario's own proportions, at random.

    requests = requests_of(read_trace("azure.csv.gz"), options, 2048, 320, 0.5, rng)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kv_cache_manager import MemoryUsage
from paged_attention import PagedKVCache
from vllm_sim import paper
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import counted
from vllm_sim.scenarios.record import RunRecord
from vllm_sim.scenarios.recorder import Recorder
from vllm_sim.scenarios.report import ScenarioReport, Table
from vllm_sim.scenarios.setting import CPU_SHARE, Setting, UsageMean
from vllm_sim.scenarios.stamped_cache import StampedCache
from vllm_sim.serving.scheduler import Iteration, Manager
from vllm_sim.serving.simulator import Observer, ServingResult, make_groups, simulate
from vllm_sim.serving.systems import PAGED, limits_of
from vllm_sim.workload.length_tables import ALPACA, SHAREGPT, WMT16, LengthTable
from vllm_sim.workload.requests import Request
from vllm_sim.workload.traces import Trace


def requests_of(
    trace: Trace,
    options: Sequence[Mapping[str, int]],
    longest: int,
    max_output: int,
    gap: float,
    rng: np.random.Generator,
) -> list[Request]:
    """One request for each of `options` (Request's), which are dealt to the requests at random.

    Lengths are the first of the trace in its order, from the top again if they run out, cut to
    `longest` tokens in all and `max_output` of output, which is 2 at least. Arrivals, in
    iterations, are the trace's own, drawn together or apart to `gap` between two on average;
    random where the trace has none.
    """
    count = len(options)
    rows = np.arange(count) % len(trace)
    dealt = [options[i] for i in rng.permutation(count)]
    requests = []
    for i, (arrival, which) in enumerate(zip(_arrivals(trace, count, gap, rng), dealt)):
        prompt, output = int(trace.prompts[rows[i]]), int(trace.outputs[rows[i]])
        room = longest - which.get("prefix_len", 0)
        prompt = min(prompt, room - 2)
        output = min(max(output, 2), room - prompt, max_output)
        requests.append(Request(i, arrival, prompt, output, **which))
    return requests


def _arrivals(trace: Trace, count: int, gap: float, rng: np.random.Generator) -> list[float]:
    own = trace.arrivals[:count] if trace.arrivals is not None else np.zeros(1)
    if own[-1] == own[0]:
        return np.cumsum(rng.exponential(gap, count)).tolist()
    gaps = np.diff(own)
    gaps = gaps / gaps.mean() * gap
    return np.cumsum(np.concatenate([[0.0], np.resize(gaps, count - 1)])).tolist()


def told_of(trace: Trace, requests: Sequence[Request], max_output: int) -> str:
    """What a table must say of requests that `requests_of` made."""
    count = len(requests)
    rows = [i % len(trace) for i in range(count)]
    cut = sum(
        (request.prompt_len, request.output_len) != (trace.prompts[row], trace.outputs[row])
        for request, row in zip(requests, rows)
    )
    again = f", the {len(trace):,} there are from the top again" if count > len(trace) else ""
    refused = sum(found.rows for found in trace.refused.values())
    left_out = f", {refused:,} of {trace.rows_read:,} rows refused" if refused else ""
    return (
        f"lengths, order and bursts of the first {count:,} requests of {trace.name}{again}"
        f"{left_out}; {cut:,} cut to fit the pool, or to {max_output} tokens of output; decoding "
        "methods dealt at random"
    )


# Requests in a pool of the default size; other pools get them in proportion.
SINGLES, PARALLEL, BEAMS, PREFIXED = 40, 10, 6, 8
NUM_SAMPLES = BEAM_WIDTH = 4
PREFIX_LEN = paper.FIG16["5-shot"][
    "prefix"
]  # Fig. 16b's 5-shot prefix, not cut to whole blocks: its last one is part-filled
MAX_OUTPUT = 320  # tokens: a few longer requests would run on alone and show nothing new
ITERATIONS_BETWEEN = 0.5  # arrivals, on average, in a pool of the default size
WINDOWS = 6  # rows of the table over time
CHECK_EVERY = 50  # iterations between two recomputations of all invariants
PREFIX_ID = 0
LOADS = (0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.6, 2.0, 3.0)  # times the numbers of requests above
MORE_LOADS = (5.0, 8.0, 13.0, 21.0)  # for a trace, whose requests may be short


@dataclass(frozen=True, slots=True)
class Run:
    """One way to serve the requests."""

    name: str
    system: str
    policy: str | None = None  # of the baseline; None: paged
    preemption: str = "auto"
    on_tensors: bool = True


PAGED_SWAP = Run("paged, swap", paper.VLLM, None, "swap")
# Every run has the same bookkeeping checks. Of the three baselines the strongest also writes and
# verifies tensors; the other two differ from it only in how many slots they leave unused.
RUNS = (
    Run("Orca (Max)", paper.ORCA_MAX, "max", on_tensors=False),
    Run("Orca (Pow2)", paper.ORCA_POW2, "pow2", on_tensors=False),
    Run("Orca (Oracle)", paper.ORCA_ORACLE, "oracle"),
    PAGED_SWAP,
    Run("paged, recompute", paper.VLLM, None, "recompute"),
)


@dataclass(slots=True)
class Outcome:
    run: Run
    result: ServingResult
    log: UsageLog
    tensors: StampedCache | None


def num_cpu_blocks(setting: Setting) -> int:
    """Swap space in blocks."""
    return setting.num_blocks // CPU_SHARE


class UsageLog(Observer):
    """The slot table of every iteration; recomputes all invariants now and then."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.usages: list[MemoryUsage] = []
        self.batches: list[int] = []

    def on_iteration(self, iteration: Iteration) -> None:
        self.usages.append(self.manager.usage())
        self.batches.append(iteration.num_groups)
        if iteration.index % CHECK_EVERY == 0:
            self.manager.check_invariants()

    def mean(self, first: int, end: int) -> UsageMean:
        """Means over a range of iterations."""
        mean = UsageMean()
        for usage, batch in zip(self.usages[first:end], self.batches[first:end]):
            mean.add(usage, batch)
        return mean


def run(
    setting: Setting, progress: Progress = SILENT, record: RunRecord | None = None
) -> ScenarioReport:
    """All of scenario 4; leaves its slots over time and every block of its paged runs."""
    report = ScenarioReport(
        4,
        "mixed workload",
        "Do all decoding methods share one pool under pressure, and is no token ever lost?",
    )
    longest = _longest(setting)
    requests = _under_pressure(setting, longest, progress.part(0, 2, "looking for a load"))
    cache = setting.new_cache(num_cpu_blocks=num_cpu_blocks(setting))
    outcomes = [
        _serve(
            setting,
            run,
            requests,
            longest,
            cache if run.on_tensors else None,
            progress.part(len(RUNS) + number, 2 * len(RUNS), run.name),
            record,
        )
        for number, run in enumerate(RUNS)
    ]
    _tables(setting, report, requests, outcomes)
    _checks(report, requests, outcomes)
    best = max((o.result for o in outcomes if o.run.policy), key=lambda r: r.mean_batch)
    swap, recompute = (o.result for o in outcomes[-2:])
    times = min(swap.mean_batch, recompute.mean_batch) / best.mean_batch
    told = paper.FIG13_VLLM_OVER["ShareGPT"][paper.ORCA_ORACLE]
    verified = [o.tensors.verified for o in outcomes if o.tensors]
    report.answer = (
        f"paging batches {swap.mean_batch:.1f} (swap) or {recompute.mean_batch:.1f} (recompute) "
        f"requests at a time and is done after {recompute.num_iterations:,} iterations, the best "
        f"contiguous policy {best.mean_batch:.1f} and after {best.num_iterations:,}: {times:.2f}x "
        f"(the paper's Fig. 13, on ShareGPT and without sharing: {told}x); {min(verified)} of "
        f"{sum(r.num_seqs for r in requests)} sequences kept their K and V to the end in each run."
    )
    return report


def _longest(setting: Setting) -> int:
    """Longest sequence such that a group of four fits even without sharing, in any policy."""
    chunk = 1 << ((setting.num_blocks // NUM_SAMPLES).bit_length() - 1)
    spare = -(-PREFIX_LEN // setting.block_size) + int(paper.WATERMARK * setting.num_blocks)
    paged = (setting.num_blocks - spare - 2 * NUM_SAMPLES) // NUM_SAMPLES
    return min(setting.max_len, setting.block_size * max(1, min(chunk, paged)))


def _requests(setting: Setting, longest: int, load: float) -> list[Request]:
    """The mix in random order, arriving one after the other at random times (in iterations)."""
    rng = np.random.default_rng([setting.seed, 4])
    scale = load * setting.num_slots / paper.TABLE1_DERIVED["opt-13b"]["slots"]
    prefix_len = min(PREFIX_LEN, longest // 4)
    kinds: list[tuple[int, LengthTable, dict[str, int]]] = [
        (SINGLES, SHAREGPT, {}),
        (PARALLEL, SHAREGPT, {"num_samples": NUM_SAMPLES}),
        (BEAMS, ALPACA, {"beam_width": BEAM_WIDTH}),
        (PREFIXED, WMT16, {"prefix_len": prefix_len}),
    ]
    if setting.trace is not None:
        options = [kind[2] for kind in kinds for _ in range(max(2, round(kind[0] * scale)))]
        gap = ITERATIONS_BETWEEN / scale
        return requests_of(setting.trace, options, longest, MAX_OUTPUT, gap, rng)
    drawn = []
    for count, table, options in kinds:
        room = longest - options.get("prefix_len", 0)
        for prompt, output in zip(*table.sample(max(2, round(count * scale)), rng)):
            prompt = min(int(prompt), room - 2)
            output = min(max(int(output), 2), room - prompt, MAX_OUTPUT)
            drawn.append((prompt, output, options))
    order = rng.permutation(len(drawn))
    arrivals = np.cumsum(rng.exponential(ITERATIONS_BETWEEN / scale, len(drawn)))
    return [
        Request(i, float(arrivals[i]), prompt, output, **options)
        for i, (prompt, output, options) in enumerate(drawn[j] for j in order)
    ]


def _under_pressure(setting: Setting, longest: int, progress: Progress = SILENT) -> list[Request]:
    """The smallest of a few loads at which paging has to preempt, found on bookkeeping alone."""
    loads = LOADS if setting.trace is None else LOADS + MORE_LOADS
    for number, load in enumerate(loads):
        requests = _requests(setting, longest, load)
        part = progress.part(number, len(loads))
        trial = _serve(setting, PAGED_SWAP, requests, longest, None, part)
        if trial.result.num_swaps:
            return requests
    if setting.trace is not None:
        raise UsageError(
            f"the requests of {setting.trace.name} are too short to fill {setting.num_blocks:,} "
            "blocks, and scenario 4 is about memory pressure: lower --num-blocks"
        )
    return requests


def _new_manager(setting: Setting, run: Run, longest: int, prefix_len: int) -> Manager:
    if run.policy is not None:
        return setting.new_manager(run.policy, max_len=longest)
    manager = setting.new_manager(PAGED, num_cpu_blocks=num_cpu_blocks(setting))
    manager.allocate_prefix(PREFIX_ID, prefix_len)
    return manager


def _serve(
    setting: Setting,
    run: Run,
    requests: list[Request],
    longest: int,
    cache: PagedKVCache | None,
    progress: Progress = SILENT,
    record: RunRecord | None = None,
) -> Outcome:
    """Serve all requests to their end, on tensors if there is a cache."""
    prefix_len = max(request.prefix_len for request in requests)
    manager = _new_manager(setting, run, longest, prefix_len)
    paged = run.policy is None
    log = UsageLog(manager)
    observers: list[Observer] = [log]
    tensors = None
    if cache is not None:
        tensors = StampedCache(setting, manager, cache)
        tensors.store_prefix(prefix_len, PREFIX_ID if paged else None)
        observers.append(tensors)
    groups = make_groups(
        requests,
        first_seq_id=PREFIX_ID + 1,
        prefix_ids={prefix_len: PREFIX_ID} if paged else {},
        seed=setting.seed,
    )
    recorder = None
    if record is not None and paged:
        about = f"{len(requests)} requests, {setting.line}"
        recorder = Recorder(f"Scenario 4: {run.name}", about, manager, groups, (PREFIX_ID,))
        observers.append(recorder)
    limits = limits_of(run.system)
    result = simulate(
        groups, manager, limits, preemption=run.preemption, observers=observers, progress=progress
    )
    manager.check_invariants()
    if record is not None:
        _leave(record, run, log, recorder)
    if cache is not None and paged:
        cache.poison_blocks(manager.free(PREFIX_ID))  # as everything else is by now
    return Outcome(run, result, log, tensors)


def _leave(record: RunRecord, run: Run, log: UsageLog, recorder: Recorder | None) -> None:
    """What pictures and a timeline show of a run."""
    series = record.new_series(4, run.name)
    series.usages = log.usages
    if recorder is not None:
        series.preemptions = recorder.preemptions()
        record.runs.append(recorder)
        if run is PAGED_SWAP:
            record.maps[4] = recorder, recorder.fullest


def _tables(
    setting: Setting, report: ScenarioReport, requests: list[Request], outcomes: list[Outcome]
) -> None:
    kinds = {"single": 0, "parallel": 0, "beam": 0, "prefix": 0}
    for request in requests:
        kinds["prefix" if request.prefix_len else request.decoding] += 1
    prefix_len = max(request.prefix_len for request in requests)
    line = (
        f"{setting.line}; {kinds['single']} single, {kinds['parallel']} with {NUM_SAMPLES} "
        f"samples, {kinds['beam']} with {BEAM_WIDTH} beams, {kinds['prefix']} behind a shared "
        f"prefix of {prefix_len} tokens"
    )
    if setting.trace is not None:
        line += "; " + told_of(setting.trace, requests, MAX_OUTPUT)
    rows = []
    for o in outcomes:
        r = o.result
        rows.append(
            (o.run.name, r.num_iterations, r.mean_batch, r.num_swaps, r.num_recomputations)
            + (r.num_copies, r.blocks_swapped_out, r.blocks_swapped_in)
            + ((o.tensors.bytes_moved / 1e6, o.tensors.verified) if o.tensors else (None, None))
        )
    headers = (
        "run",
        "iterations",
        "mean batch",
        "swapped",
        "recomputed",
        "block copies",
        "blocks out",
        "blocks in",
        "MB copied",
        "verified",
    )
    title = "All requests served to their end"
    report.parts.append(Table(title, headers, rows, line, name="all_requests"))

    parts = MemoryUsage.PARTS
    rows = []
    for o in outcomes:
        count = len(o.log.usages)
        edges = [count * i // WINDOWS for i in range(WINDOWS + 1)]
        for first, end in pairwise(edges):
            if first < end:
                mean = o.log.mean(first, end)
                shares = tuple(mean.percent(part) for part in parts)
                rows.append(
                    (o.run.name, f"{first}-{end - 1}", mean.batch, *shares, 100.0 * mean.saving)
                )
    report.parts.append(
        Table(
            "Slots over time, in percent, and blocks saved by sharing",
            ("run", "iterations", "batch", *parts, "saving"),
            rows,
            setting.line,
            name="slots_over_time",
            index=2,
        )
    )


def _checks(report: ScenarioReport, requests: list[Request], outcomes: list[Outcome]) -> None:
    expected = sum(request.num_seqs for request in requests)
    for o in (o for o in outcomes if o.tensors):
        report.check(
            f"{o.run.name}: every finished sequence holds its own K and V",
            o.tensors.verified == expected and not o.tensors.wrong,
            f"{o.tensors.verified} of {expected} sequences, {o.tensors.tokens_verified:,} tokens",
        )
    swap, recompute = outcomes[-2].result, outcomes[-1].result
    report.check(
        "memory pressure forced preemption by swapping",
        swap.num_swaps > 0 and swap.blocks_swapped_in == swap.blocks_swapped_out > 0,
        f"{counted(swap.num_swaps, 'group')}, {counted(swap.blocks_swapped_out, 'block')} out and "
        f"back in; {swap.num_recomputations} recomputed as the CPU pool was full",
    )
    report.check(
        "memory pressure forced preemption by recomputation",
        recompute.num_recomputations > 0 and recompute.num_swaps == 0,
        counted(recompute.num_recomputations, "group"),
    )
    report.check(
        "all groups finished in every run",
        all(len(o.result.finish_s) == len(requests) for o in outcomes),
        f"{len(requests)} groups in {len(outcomes)} runs",
    )
