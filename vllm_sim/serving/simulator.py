"""Serving a workload to its end over either manager, iteration by iteration or event by event.

Reproduces: section 6.1's way of running a trace: requests arrive over time, are batched at
iteration level and generate their known output lengths (scheduler.py holds the rules).

    requests = make_trace(SHAREGPT, rate=2.0, duration_s=60.0, seed=0)
    result = simulate(requests, PagedKVCacheManager(983, 16))
    print(result.mean_batch, result.num_swaps, result.finish_s[0])

Bookkeeping only. An `Observer` is told what each iteration must do to the tensors (main.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from sequence import Sequence, SequenceGroup
from vllm_sim.paper import VLLM
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.serving.beam_search import beam_parents
from vllm_sim.serving.latency import UNIT, LatencyModel
from vllm_sim.serving.scheduler import ORDER, Completion, Iteration, Limits, Manager, Scheduler
from vllm_sim.serving.server_latency import ServerLatency
from vllm_sim.serving.systems import limits_of
from vllm_sim.workload.requests import Request, check_distinct

# The artifact's limits on an iteration for vLLM (section 6.1).
ARTIFACT_LIMITS = limits_of(VLLM)
Latency = LatencyModel | ServerLatency
EVENTS = 64  # between two looks at the clock for the progress: a power of two


class Observer:
    """Told of every iteration; the default does nothing."""

    def on_iteration(self, iteration: Iteration) -> None:
        """After scheduling, before anything completes: all tables are in place."""

    def on_completion(self, completion: Completion) -> None:
        """After the iteration's tokens were generated."""


def make_groups(
    requests: Iterable[Request],
    *,
    first_seq_id: int = 0,
    prefix_ids: dict[int, int] | None = None,
    theta: float = 0.25,
    seed: int = 0,
) -> list[SequenceGroup]:
    """Sequence groups for requests, with consecutive sequence ids.

    `prefix_ids` maps a prefix length to the id of the shared prefix the manager holds; without
    it each sequence stores the prefix itself. A beam search is drawn with its request's own seed,
    so every manager and policy sees the same one. ValueError for two requests of one id.
    """
    requests = list(requests)
    check_distinct(request.request_id for request in requests)
    groups = []
    seq_id = first_seq_id
    for request in requests:
        shape = request.prompt_len, request.output_len, request.prefix_len
        ids = range(seq_id, seq_id + request.num_seqs)
        seqs = [Sequence(one, *shape) for one in ids]
        seq_id = ids.stop
        parents = None
        if request.decoding == "beam":
            rng = np.random.default_rng([seed, request.request_id])
            drawn = beam_parents(request.beam_width, request.output_len, rng, theta)
            parents = drawn.tolist()
        prefix = (prefix_ids or {}).get(request.prefix_len)
        groups.append(SequenceGroup(request.request_id, seqs, request.arrival_s, prefix, parents))
    return groups


@dataclass(slots=True)
class ServingResult:
    """Totals of one run. Times in the latency model's seconds.

    `num_iterations` counts iterations, `num_swaps` and `num_recomputations` preempted groups,
    `num_copies` blocks copied on write, `blocks_swapped_out` and `_in` blocks; `finish_s` is when
    each group was done, by its id (a request's own); the sums are behind the means below.
    """

    num_iterations: int = 0
    finish_s: dict[int, float] = field(default_factory=dict)  # group id -> end of its last step
    num_swaps: int = 0
    num_recomputations: int = 0
    num_copies: int = 0
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    sum_groups: int = 0
    sum_normalized_s: float = 0.0
    window_iterations: int = 0  # those that start in the window asked for
    window_groups: int = 0

    @property
    def mean_batch(self) -> float:
        """Mean number of batched requests over iterations (Fig. 13)."""
        return self.sum_groups / max(1, self.num_iterations)

    @property
    def mean_window_batch(self) -> float:
        """The same over the iterations in the window."""
        return self.window_groups / max(1, self.window_iterations)

    @property
    def normalized_latency(self) -> float:
        """Mean over requests of end-to-end latency / output length, s/token (section 6.1)."""
        return self.sum_normalized_s / max(1, len(self.finish_s))

    def count(self, iteration: Iteration) -> None:
        """What one iteration preempts, copies and swaps."""
        self.num_swaps += iteration.num_swaps
        self.num_recomputations += iteration.num_recomputations
        self.num_copies += len(iteration.copies)
        self.blocks_swapped_out += len(iteration.swapped_out)
        self.blocks_swapped_in += len(iteration.swapped_in)

    def count_batch(self, num_iterations: int, num_groups: int, in_window: bool) -> None:
        """So many iterations, each with so many groups."""
        self.num_iterations += num_iterations
        self.sum_groups += num_iterations * num_groups
        if in_window:
            self.window_iterations += num_iterations
            self.window_groups += num_iterations * num_groups

    def finish(self, group: SequenceGroup, now_s: float) -> None:
        """A group is done, at this second."""
        self.finish_s[group.group_id] = now_s
        output_len = max(seq.output_len for seq in group.seqs)
        self.sum_normalized_s += (now_s - group.arrival_s) / output_len


def simulate(
    requests: Iterable[Request | SequenceGroup],
    manager: Manager,
    limits: Limits = ARTIFACT_LIMITS,
    latency: Latency = UNIT,
    *,
    preemption: str = "auto",
    observers: Seq[Observer] = (),
    on_decision: Callable[[Scheduler, Iteration], None] | None = None,
    window_s: tuple[float, float] = (0.0, math.inf),
    until_s: float = math.inf,
    ahead: bool = False,
    plain: bool = False,
    check: bool = False,
    progress: Progress = SILENT,
) -> ServingResult:
    """Serve all requests to their end (sections 4.5 and 6.1).

    `requests` are those of `make_trace`, or groups of `make_groups`, which shared prefixes and
    other beam searches need; `limits` bound the tokens and sequences of an iteration, `latency`
    says how many seconds it takes (1 unless given); `preemption` is auto, swap or recompute. Of the
    limits, `max_num_seqs` counts what runs in groups, as the artifact does (see Limits).

    Event-driven: between two decisions (a completion, an arrival, a shortage of blocks, a
    preemption) all iterations are taken at once, in closed form. `plain` takes them one by one,
    as does `check`, which recomputes the manager's invariants and the slot identity in every one.
    Observers are told of every iteration that starts in `window_s`, and the window's means in the
    result are about those. `on_decision` is told of the iterations that were decided, not of those
    taken at once; what it raises ends the run. The run is cut at the first iteration that would
    start at `until_s`. A request that arrives within rounding of an iteration's start may fall on
    either side of it, and on the other one in `plain`, which adds up in another order. With `ahead`
    an iteration is decided while the one before it is computed, as vllm_sim/engine/server.py does:
    what arrives meanwhile waits for one more.

    Raises RequestTooLargeError and, for ids given twice, ValueError before anything runs.
    """
    scheduler = Scheduler(manager, limits, preemption)
    queue = sorted(_groups(requests), key=ORDER)
    check_distinct(group.group_id for group in queue)
    check_distinct((seq.seq_id for group in queue for seq in group.seqs), "sequences")
    for group in queue:
        scheduler.check(group)
    arrivals = [group.arrival_s for group in queue] + [math.inf]
    result = ServingResult()
    now, arrived, events = arrivals[0], 0, 0
    decided = now  # with `ahead`: as the one before began
    while now < until_s:
        events += 1
        if not events % EVENTS:
            progress.at(len(result.finish_s), len(queue))
        in_window = window_s[0] <= now < window_s[1]
        watching = observers if in_window else ()
        steps = 0 if plain or check or watching or ahead else scheduler.quiet_steps()
        if steps:
            # The first iteration that starts at or after one of these is the next to look at.
            until = arrivals[arrived] if scheduler.admits_arrivals else math.inf
            for edge in (*window_s, until_s):
                if now < edge < until:
                    until = edge
            if until < math.inf:
                load = scheduler.num_running_seqs, scheduler.context_tokens
                steps = latency.steps_until(until - now, steps, *load)
        if steps:
            result.count_batch(steps, len(scheduler.running), in_window)
            now += latency.decode_steps(steps, scheduler.num_running_seqs, scheduler.context_tokens)
            completion = scheduler.advance(steps)
        else:
            known = decided if ahead and not scheduler.idle else now
            while arrivals[arrived] <= known:
                scheduler.enqueue(queue[arrived])
                arrived += 1
            decided = now
            iteration = scheduler.schedule(now)
            if on_decision is not None:
                on_decision(scheduler, iteration)
            if check:
                manager.check_invariants()
            for observer in watching:
                observer.on_iteration(iteration)
            result.count(iteration)
            result.count_batch(1, iteration.num_groups, in_window)
            now += latency.iteration(iteration)
            completion = scheduler.complete()
            for observer in watching:
                observer.on_completion(completion)
        for group in completion.finished:
            result.finish(group, now)
        if completion.moves:
            now += latency.completion(completion, manager)
        if scheduler.idle:
            now = max(now, arrivals[arrived])  # infinity after the last
    return result


def _groups(requests: Iterable[Request | SequenceGroup]) -> list[SequenceGroup]:
    """Requests as groups with sequence ids from 0 on; groups as they are."""
    work = list(requests)
    plain = [one for one in work if isinstance(one, Request)]
    if plain and len(plain) < len(work):
        raise TypeError("requests and groups together: make groups of all, for distinct ids")
    return make_groups(plain) if plain else work
