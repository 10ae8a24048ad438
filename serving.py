"""Serving a workload to its end over either manager, iteration by iteration.

Reproduces: section 6.1's way of running a trace: requests arrive over time, are batched at
iteration level and generate their known output lengths (scheduler.py holds the rules).

    groups = make_groups(make_trace(SHAREGPT, rate=2.0, duration_s=60.0, seed=0))
    result = simulate(groups, PagedKVCacheManager(983, 16), Limits(2560, 2048))

Bookkeeping only. An `Observer` is told what each iteration must do to the tensors (main.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from scheduler import Completion, Iteration, Limits, Manager, Scheduler, priority
from sequence import Sequence, SequenceGroup
from workload import Request, beam_parents


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
    so every manager and policy sees the same one.
    """
    groups = []
    seq_id = first_seq_id
    for request in requests:
        seqs = []
        for _ in range(request.num_seqs):
            seqs.append(
                Sequence(seq_id, request.prompt_len, request.output_len, request.prefix_len)
            )
            seq_id += 1
        parents = None
        if request.decoding == "beam":
            rng = np.random.default_rng([seed, request.request_id])
            drawn = beam_parents(request.beam_width, request.output_len, rng, theta)
            parents = drawn.tolist()
        prefix_id = (prefix_ids or {}).get(request.prefix_len)
        groups.append(
            SequenceGroup(request.request_id, seqs, request.arrival_s, prefix_id, parents)
        )
    return groups


@dataclass(slots=True)
class ServingResult:
    """Totals of one run. Times in the latency model's seconds."""

    num_iterations: int = 0
    finish_s: dict[int, float] = field(default_factory=dict)  # group id -> end of its last step
    num_swaps: int = 0
    num_recomputations: int = 0
    num_copies: int = 0
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    sum_groups: int = 0

    @property
    def mean_batch(self) -> float:
        """Mean number of batched requests over iterations (Fig. 13)."""
        return self.sum_groups / max(1, self.num_iterations)

    def count(self, iteration: Iteration) -> None:
        self.num_iterations += 1
        self.sum_groups += iteration.num_groups
        self.num_swaps += iteration.num_swaps
        self.num_recomputations += iteration.num_recomputations
        self.num_copies += len(iteration.copies)
        self.blocks_swapped_out += len(iteration.swapped_out)
        self.blocks_swapped_in += len(iteration.swapped_in)


def simulate(
    groups: Seq[SequenceGroup],
    manager: Manager,
    limits: Limits,
    *,
    preemption: str = "auto",
    seconds_of: Callable[[Iteration], float] = lambda iteration: 1.0,
    observers: Seq[Observer] = (),
) -> ServingResult:
    """Serve all groups to their end. `seconds_of` gives an iteration's time (default: one each).

    Raises RequestTooLargeError before anything runs, StalledError.
    """
    scheduler = Scheduler(manager, limits, preemption)
    queue = sorted(groups, key=priority)
    result = ServingResult()
    now, arrived = 0.0, 0
    for group in queue:
        scheduler.check(group)
    while arrived < len(queue) or not scheduler.idle:
        if scheduler.idle:
            now = max(now, queue[arrived].arrival_s)
        while arrived < len(queue) and queue[arrived].arrival_s <= now:
            scheduler.add(queue[arrived])
            arrived += 1
        iteration = scheduler.schedule(now)
        for observer in observers:
            observer.on_iteration(iteration)
        now += seconds_of(iteration)
        completion = scheduler.complete()
        for observer in observers:
            observer.on_completion(completion)
        result.count(iteration)
        for group in completion.finished:
            result.finish_s[group.group_id] = now
    return result
