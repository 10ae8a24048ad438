"""Scenario 4, mixed workload: every decoding method in one run, under memory pressure.

Reproduces: section 4.4's mixed decoding (single requests, parallel sampling, beam search and a
shared prefix in the same batches), section 4.5's preemption, once by swapping and once by
recomputation, and section 6.1's baselines on the same requests in the same memory. Every finished
sequence's K and V are read back through its table. The requests are drawn, or those of a real
trace: its lengths, its order, its bursts. A trace says nothing of samples, beams or prefixes, so
these are dealt to its requests at random, in the same proportions.

    python main.py --scenario 4
    python main.py --scenario 4 --trace AzureLLMInferenceTrace_conv.csv.gz
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from kv_cache_manager import MemoryUsage
from paged_attention import PagedKVCache
from sequence import SequenceGroup
from vllm_sim import paper
from vllm_sim.playback.recorder import Recorder, Recording
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import Table, counted
from vllm_sim.scenarios.report import Check, ScenarioReport, Series
from vllm_sim.scenarios.setting import CPU_SHARE, Setting
from vllm_sim.scenarios.stamped_cache import StampedCache
from vllm_sim.serving.scheduler import Iteration, Manager, Scheduler
from vllm_sim.serving.simulator import Observer, ServingResult, make_groups, simulate
from vllm_sim.serving.steady_state import UsageMean
from vllm_sim.serving.systems import PAGED, POLICY, limits_of
from vllm_sim.workload.length_tables import ALPACA, SHAREGPT, WMT16
from vllm_sim.workload.requests import Request
from vllm_sim.workload.traces import Trace

# Requests in a pool of the default size; other pools get them in proportion.
SINGLES, PARALLEL, BEAMS, PREFIXED = 40, 10, 6, 8
NUM_SAMPLES = BEAM_WIDTH = 4
# Fig. 16b's 5-shot prefix, not cut to whole blocks: its last one is part-filled.
PREFIX_LEN = paper.FIG16["5-shot"]["prefix"]
MAX_OUTPUT = 320  # tokens: a few longer requests would run on alone and show nothing new
ITERATIONS_BETWEEN = 0.5  # arrivals, on average, in a pool of the default size
WINDOWS = 6  # rows of the table over time
CHECK_EVERY = 50  # iterations between two recomputations of all invariants
PREFIX_ID = 0
LOADS = (0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.6, 2.0, 3.0)  # times the numbers of requests above
ENOUGH = 21.0  # times: no higher load is tried where this one fills memory
MORE_LOADS = (5.0, 8.0, 13.0, 21.0, 34.0, 55.0, 89.0)  # for a trace, whose requests may be short


@dataclass(frozen=True, slots=True)
class Run:
    """One way to serve the requests."""

    name: str
    system: str
    preemption: str = "auto"
    on_tensors: bool = True

    @property
    def paged(self) -> bool:
        """Whether memory is handed out in blocks."""
        return POLICY[self.system] == PAGED


PAGED_SWAP = Run("paged, swap", paper.VLLM, "swap")
# Every run has the same bookkeeping checks. Of the three baselines the strongest also writes and
# verifies tensors; the other two differ from it only in how many slots they leave unused.
RUNS = (
    Run(paper.ORCA_MAX, paper.ORCA_MAX, on_tensors=False),
    Run(paper.ORCA_POW2, paper.ORCA_POW2, on_tensors=False),
    Run(paper.ORCA_ORACLE, paper.ORCA_ORACLE),
    PAGED_SWAP,
    Run("paged, recompute", paper.VLLM, "recompute"),
)


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


@dataclass(frozen=True, slots=True)
class Kept:
    """What a run's tensors held in the end (see StampedCache)."""

    verified: int  # sequences with all of their own K and V
    tokens: int  # of these
    num_wrong: int  # other sequences
    bytes_moved: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run did: totals, every iteration, and its tensors if it had any."""

    run: Run
    result: ServingResult
    usages: list[MemoryUsage]
    batches: list[int]
    kept: Kept | None
    recording: Recording | None  # of a paged run

    def mean(self, first: int, end: int) -> UsageMean:
        """Means over a range of iterations."""
        mean = UsageMean()
        for usage, batch in zip(self.usages[first:end], self.batches[first:end]):
            mean.add(usage, batch)
        return mean


@dataclass(frozen=True, slots=True)
class Found:
    """What scenario 4 measured."""

    setting: Setting
    requests: list[Request]
    outcomes: list[Outcome]  # in the order of RUNS


def run(setting: Setting, progress: Progress = SILENT) -> Found:
    """All of scenario 4."""
    longest = longest_of(setting)
    requests = under_pressure(setting, longest, progress.part(0, 2, "looking for a load"))
    cache = setting.new_cache(num_cpu_blocks=num_cpu_blocks(setting))
    outcomes = []
    for number, way in enumerate(RUNS):
        part = progress.part(len(RUNS) + number, 2 * len(RUNS), way.name)
        tensors = cache if way.on_tensors else None
        outcomes.append(serve(setting, way, requests, longest, tensors, part))
    return Found(setting, requests, outcomes)


# ---- the requests -----------------------------------------------------------------------------


def longest_of(setting: Setting) -> int:
    """Longest sequence such that a group of four fits even without sharing, in any policy."""
    chunk = 1 << ((setting.num_blocks // NUM_SAMPLES).bit_length() - 1)
    spare = -(-PREFIX_LEN // setting.block_size) + int(paper.WATERMARK * setting.num_blocks)
    paged = (setting.num_blocks - spare - 2 * NUM_SAMPLES) // NUM_SAMPLES
    return min(setting.max_len, setting.block_size * max(1, min(chunk, paged)))


def mix(setting: Setting, longest: int, load: float) -> list[Request]:
    """The mix in random order, arriving one after the other at random times (in iterations)."""
    rng = np.random.default_rng([setting.seed, 4])
    scale = load * setting.num_slots / paper.TABLE1_DERIVED["opt-13b"]["slots"]
    gap = ITERATIONS_BETWEEN / scale
    kinds = [
        (SINGLES, SHAREGPT, {}),
        (PARALLEL, SHAREGPT, {"num_samples": NUM_SAMPLES}),
        (BEAMS, ALPACA, {"beam_width": BEAM_WIDTH}),
        (PREFIXED, WMT16, {"prefix_len": min(PREFIX_LEN, longest // 4)}),
    ]
    kinds = [(max(2, round(count * scale)), *rest) for count, *rest in kinds]
    if setting.trace is not None:
        options = [options for count, _, options in kinds for _ in range(count)]
        return requests_of(setting.trace, options, longest, gap, rng)
    drawn = []
    for count, table, options in kinds:
        for prompt, output in zip(*(lengths.tolist() for lengths in table.sample(count, rng))):
            drawn.append((*_cut(prompt, output, options, longest, 2), options))
    order = rng.permutation(len(drawn))
    arrivals = np.cumsum(rng.exponential(gap, len(drawn))).tolist()
    return [
        Request(i, arrivals[i], prompt, output, **options)
        for i, (prompt, output, options) in enumerate(drawn[j] for j in order)
    ]


def _cut(
    prompt: int, output: int, options: Mapping[str, int], longest: int, kept: int
) -> tuple[int, int]:
    """Lengths of at most `longest` tokens in all, prefix included; the output is 2 at least.

    A long prompt is cut so far that `kept` tokens of output have room.
    """
    room = longest - options.get("prefix_len", 0)
    output = min(max(output, 2), MAX_OUTPUT, max(room - prompt, kept))
    return min(prompt, room - output), output


def requests_of(
    trace: Trace, options: Sequence[Mapping[str, int]], longest: int, gap: float, rng: Generator
) -> list[Request]:
    """One request for each of `options` (Request's), which are dealt to the requests at random.

    Lengths are the first of the trace in its order, from the top again if they run out, cut to
    `longest` tokens in all and MAX_OUTPUT of output, which is 2 at least. A long prompt leaves a
    quarter of `longest` to its output: what hardly generates never outgrows its memory. Arrivals,
    in iterations, are the trace's own, drawn together or apart to `gap` between two on average;
    random where the trace has none.
    """
    rows = np.arange(len(options)) % len(trace)
    dealt = [options[i] for i in rng.permutation(len(options))]
    lengths = zip(trace.prompts[rows].tolist(), trace.outputs[rows].tolist())
    arrivals = _arrivals(trace, len(options), gap, rng)
    return [
        Request(i, arrivals[i], *_cut(*both, which, longest, longest // 4), **which)
        for i, (both, which) in enumerate(zip(lengths, dealt))
    ]


def _arrivals(trace: Trace, count: int, gap: float, rng: Generator) -> list[float]:
    own = trace.arrivals[:count] if trace.arrivals is not None else np.zeros(1)
    if own[-1] == own[0]:
        return np.cumsum(rng.exponential(gap, count)).tolist()
    gaps = np.diff(own)
    gaps = gaps / gaps.mean() * gap
    return np.cumsum(np.concatenate([[0.0], np.resize(gaps, count - 1)])).tolist()


def under_pressure(setting: Setting, longest: int, progress: Progress = SILENT) -> list[Request]:
    """The smallest of a few loads at which paging has to preempt, found on bookkeeping alone."""
    trace, full = setting.trace, False
    loads = LOADS if trace is None else LOADS + MORE_LOADS

    def look(scheduler: Scheduler, _: Iteration) -> None:
        nonlocal full
        waiting = scheduler.waiting
        full = full or (len(waiting) > 0 and not scheduler.manager.can_admit(waiting[0]))

    for number, load in enumerate(loads):
        requests = mix(setting, longest, load)
        part = progress.part(number, len(loads))
        how = {"preemption": PAGED_SWAP.preemption, "progress": part, "on_decision": look}
        manager, groups = prepared(setting, PAGED_SWAP, requests, longest)
        if simulate(groups, manager, limits_of(PAGED_SWAP.system), **how).num_swaps:
            return requests
        if full and load >= ENOUGH:
            break  # more of them would only wait longer
    if trace is not None:
        raise UsageError(_no_pressure(trace, requests, setting.num_blocks, full))
    return requests


def _no_pressure(trace: Trace, requests: Sequence[Request], num_blocks: int, full: bool) -> str:
    """Why no request had to give way, where some had to wait for memory or none had."""
    prompt, output = np.mean([(r.prompt_len, r.output_len) for r in requests], axis=0)
    never = f"never need all of {num_blocks:,} blocks: lower --num-blocks, or"
    why = f"fill {num_blocks:,} blocks, but end before they outgrow them:" if full else never
    return (
        "scenario 4 is about memory pressure, and no load preempts a request of "
        f"{trace.name}: the first {len(requests):,}, of {prompt:,.0f} + {output:,.0f} tokens on "
        f"average ({cut_of(trace, requests)}), {why} take a trace with longer outputs"
    )


def cut_of(trace: Trace, requests: Sequence[Request]) -> str:
    """How many requests that `requests_of` made are shorter than their rows, from what to what."""
    rows = np.arange(len(requests)) % len(trace)
    sizes = (trace.prompts + trace.outputs)[rows]
    ours = np.array([r.prompt_len + r.output_len for r in requests])
    cut = ours < sizes
    if not cut.any():
        return "none cut"
    return (
        f"{cut.sum():,} cut to fit the pool, or to {MAX_OUTPUT} tokens of output, from up to "
        f"{sizes[cut].max():,} tokens in all to at most {ours[cut].max():,}"
    )


# ---- the runs ---------------------------------------------------------------------------------


def num_cpu_blocks(setting: Setting) -> int:
    """Swap space in blocks."""
    return setting.num_blocks // CPU_SHARE


def prepared(
    setting: Setting, way: Run, requests: list[Request], longest: int
) -> tuple[Manager, list[SequenceGroup]]:
    """An empty pool, but for the shared prefix if there are blocks, and the requests' groups."""
    prefix_len = max(request.prefix_len for request in requests)
    swap_space = num_cpu_blocks(setting)
    manager = setting.new_manager(POLICY[way.system], max_len=longest, num_cpu_blocks=swap_space)
    if way.paged:
        manager.allocate_prefix(PREFIX_ID, prefix_len)
    prefix_ids = {prefix_len: PREFIX_ID} if way.paged else {}
    first = PREFIX_ID + 1
    groups = make_groups(requests, first_seq_id=first, prefix_ids=prefix_ids, seed=setting.seed)
    return manager, groups


def serve(
    setting: Setting,
    way: Run,
    requests: list[Request],
    longest: int,
    cache: PagedKVCache | None,
    progress: Progress = SILENT,
) -> Outcome:
    """Serve all requests to their end, on tensors if there is a cache."""
    manager, groups = prepared(setting, way, requests, longest)
    log = UsageLog(manager)
    observers: list[Observer] = [log]
    recorder = tensors = None
    if way.paged:
        about = f"{len(requests)} requests, {setting.line}"
        recorder = Recorder(f"Scenario 4: {way.name}", about, manager, groups, (PREFIX_ID,))
        observers.append(recorder)
    if cache is not None:
        tensors = StampedCache(setting, manager, cache)
        prefix_len = max(request.prefix_len for request in requests)
        tensors.store_prefix(prefix_len, PREFIX_ID if way.paged else None)
        observers.append(tensors)
    limits, how = limits_of(way.system), {"preemption": way.preemption, "progress": progress}
    result = simulate(groups, manager, limits, observers=observers, **how)
    manager.check_invariants()
    if cache is not None and way.paged:
        cache.poison_blocks(manager.free(PREFIX_ID))  # as everything else is by now
    recording, kept = recorder and recorder.recording(), None
    if tensors is not None:
        counts = tensors.verified, tensors.tokens_verified, len(tensors.wrong)
        kept = Kept(*counts, tensors.bytes_moved)
    return Outcome(way, result, log.usages, log.batches, kept, recording)


# ---- what is shown ----------------------------------------------------------------------------


def report(found: Found) -> ScenarioReport:
    """All that is shown; with slots over time and every block of the paged runs."""
    outcomes, count = found.outcomes, sum(r.num_seqs for r in found.requests)
    best = max((o.result for o in outcomes if not o.run.paged), key=lambda r: r.mean_batch)
    swap, recompute = (o.result for o in outcomes if o.run.paged)
    times = min(swap.mean_batch, recompute.mean_batch) / best.mean_batch
    told = paper.FIG13_VLLM_OVER["ShareGPT"][paper.ORCA_ORACLE]
    verified = min(o.kept.verified for o in outcomes if o.kept)
    shown: list[Table | str] = [*tables(found)]
    if any(row[-1] < 0 for row in shown[-1].rows):
        shown.append(
            f"A saving below 0: the shared prefix of {max(r.prefix_len for r in found.requests)} "
            "tokens stays in memory while hardly a running request uses it, so that more blocks "
            "are held than without sharing."
        )
    recordings = {o.run: o.recording for o in outcomes if o.recording}
    marks = {way.name: one.preemptions() for way, one in recordings.items()}
    return ScenarioReport(
        4,
        "mixed workload",
        "Do all decoding methods share one pool under pressure, and is no token ever lost?",
        shown,
        [*checks(found)],
        f"paging batches {swap.mean_batch:.1f} (swap) or {recompute.mean_batch:.1f} (recompute) "
        f"requests at a time and is done after {recompute.num_iterations:,} iterations, the best "
        f"contiguous policy {best.mean_batch:.1f} and after {best.num_iterations:,}: {times:.2f}x "
        f"(the paper's Fig. 13, on ShareGPT and without sharing: {told}x); {verified} of {count} "
        "sequences kept their K and V to the end in each run.",
        series=[Series(o.run.name, o.usages, marks.get(o.run.name, ())) for o in outcomes],
        recordings=[*recordings.values()],
        map=(recordings[PAGED_SWAP], recordings[PAGED_SWAP].fullest),
    )


def told_of(trace: Trace, requests: Sequence[Request]) -> str:
    """What a table must say of requests that `requests_of` made."""
    count = len(requests)
    again = f", the {len(trace):,} there are from the top again" if count > len(trace) else ""
    refused = sum(found.rows for found in trace.refused.values())
    left_out = f", {refused:,} of {trace.rows_read:,} rows refused" if refused else ""
    return (
        f"lengths, order and bursts of the first {count:,} requests of {trace.name}{again}"
        f"{left_out}; {cut_of(trace, requests)}; decoding methods dealt at random; "
        f"{trace.times}"
    )


def tables(found: Found) -> Iterator[Table]:
    """What each run did, and where the slots were over time."""
    setting, requests = found.setting, found.requests
    kinds = Counter("prefix" if r.prefix_len else r.decoding for r in requests)
    line = f"{setting.line}; {kinds['single']} single, {kinds['parallel']} with {NUM_SAMPLES} "
    line += f"samples, {kinds['beam']} with {BEAM_WIDTH} beams, {kinds['prefix']} behind a shared "
    line += f"prefix of {max(r.prefix_len for r in requests)} tokens"
    if setting.trace is not None:
        line += "; " + told_of(setting.trace, requests)
    parts = MemoryUsage.PARTS
    totals, windows = [], []
    for o in found.outcomes:
        r, name = o.result, o.run.name
        preempted = r.num_swaps, r.num_recomputations
        blocks = r.num_copies, r.blocks_swapped_out, r.blocks_swapped_in
        kept = (o.kept.bytes_moved / 1e6, o.kept.verified) if o.kept else (None, None)
        totals.append((name, r.num_iterations, r.mean_batch, *preempted, *blocks, *kept))
        count = len(o.usages)
        for first, end in pairwise(count * i // WINDOWS for i in range(WINDOWS + 1)):
            if first < end:
                mean = o.mean(first, end)
                shares = map(mean.percent, parts)
                window = f"{first}-{end - 1}"
                windows.append((name, window, mean.batch, *shares, 100.0 * mean.saving))
    headers = ("run", "iterations", "mean batch", "swapped", "recomputed", "block copies")
    headers += ("blocks out", "blocks in", "MB copied", "verified")
    title = "All requests served to their end"
    yield Table(title, headers, totals, line, name="all_requests")
    title = "Slots over time, in percent, and blocks saved by sharing"
    headers, name = ("run", "iterations", "batch", *parts, "saving"), "slots_over_time"
    yield Table(title, headers, windows, setting.line, name=name, index=2)


def checks(found: Found) -> Iterator[Check]:
    """Own K and V to the end, preemption of both kinds, and nobody left behind."""
    requests, outcomes = found.requests, found.outcomes
    expected = sum(request.num_seqs for request in requests)
    for o in (o for o in outcomes if o.kept):
        right = o.kept.verified == expected and not o.kept.num_wrong
        told = f"{o.kept.verified} of {expected} sequences, {o.kept.tokens:,} tokens"
        yield Check(f"{o.run.name}: every finished sequence holds its own K and V", right, told)
    swap, recompute = (o.result for o in outcomes if o.run.paged)
    right = swap.num_swaps > 0 and swap.blocks_swapped_in == swap.blocks_swapped_out > 0
    told = f"{counted(swap.num_swaps, 'group')}, {counted(swap.blocks_swapped_out, 'block')} out "
    told += f"and back in; {swap.num_recomputations} recomputed as the CPU pool was full"
    yield Check("memory pressure forced preemption by swapping", right, told)
    right = recompute.num_recomputations > 0 and recompute.num_swaps == 0
    told = counted(recompute.num_recomputations, "group")
    yield Check("memory pressure forced preemption by recomputation", right, told)
    right = all(len(o.result.finish_s) == len(requests) for o in outcomes)
    told = f"{len(requests)} groups in {len(outcomes)} runs"
    yield Check("all groups finished in every run", right, told)
