"""A pool under a queue that never runs dry: how many requests it holds, and where its slots are.

Reproduces: what Fig. 2 measures (the mean share of every part of the slot identity), apart from
arrival rates and latencies. Bookkeeping only; run by the scenarios of main.py and by capacity.py.

    mean = steady_state(PagedKVCacheManager(983, 16), requests, Limits(2560, 2048), 1000, 2000)
    print(mean.batch, mean.percent("padding"))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from kv_cache_manager import BaselineCacheManager, MemoryUsage
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.serving.scheduler import Limits, Manager, Scheduler
from vllm_sim.serving.simulator import make_groups
from vllm_sim.workload.requests import Request


class QueueTooShortError(ValueError):
    """All requests were admitted before the last iteration, so the state was not steady."""


class UsageMean:
    """Mean share of every part of the slot identity over the iterations it is told of."""

    def __init__(self) -> None:
        self.count = 0
        self.agreed = 0  # iterations whose slots were also counted sequence by sequence
        self._slots: Counter[str] = Counter()  # by part, in slots
        self._capacity = self._groups = self._in_use = 0
        self._sharing = 0.0

    def add(self, usage: MemoryUsage, batch: int) -> None:
        """One more iteration, with so many batched requests."""
        self.count += 1
        for part in MemoryUsage.PARTS:
            self._slots[part] += getattr(usage, part)
        self._capacity += usage.capacity
        self._groups += batch
        if usage.physical_blocks:
            self._sharing += usage.logical_blocks / usage.physical_blocks
            self._in_use += 1

    @property
    def shares(self) -> dict[str, float]:
        """Every part as a share of all slots (0 to 1); empty before the first iteration."""
        return {part: slots / self._capacity for part, slots in self._slots.items()}

    def percent(self, part: str) -> float:
        """A part in percent of all slots."""
        return 100.0 * self._slots[part] / self._capacity

    @property
    def percents(self) -> dict[str, float]:
        """Every part in percent."""
        return {part: self.percent(part) for part in MemoryUsage.PARTS}

    @property
    def external_and_others(self) -> float:
        """Fig. 2's last part, in percent."""
        return sum(map(self.percent, ("rounding", "padding", "free")))

    @property
    def batch(self) -> float:
        """Mean number of batched requests."""
        return self._groups / self.count

    @property
    def saving(self) -> float:
        """Fig. 15's share of blocks saved as the artifact has it: 1 - 1 / mean(logical / physical).

        0 where no sequence ever held a block.
        """
        return 1.0 - self._in_use / self._sharing if self._sharing else 0.0


def _sequence_by_sequence(scheduler: Scheduler) -> tuple[int, int]:
    """(tokens, slots reserved for more) of the running sequences, from the requests alone."""
    tokens = left = 0
    for group in scheduler.running:
        for seq in group.seqs:  # of one request, so none ends before the others
            tokens += seq.prefix_len + seq.prompt_len + seq.num_generated
            left += seq.output_len - seq.num_generated
    return tokens, left if isinstance(scheduler.manager, BaselineCacheManager) else 0


def steady_state(
    manager: Manager,
    requests: list[Request],
    limits: Limits,
    warmup: int,
    iterations: int,
    each: Callable[[Scheduler], None] = lambda scheduler: None,
    every: int = 1,
    progress: Progress = SILENT,
) -> UsageMean:
    """A steady state of completions and admissions from a queue that never runs dry.

    Returns the mean of `iterations` iterations after `warmup` others, one in `every`; those
    between are taken at once where nothing is decided in them. `each` sees the scheduler in every
    one that counts, after scheduling and before completing. Ends in the middle of the last
    iteration, with everything in place. QueueTooShortError if it does run dry.
    """
    scheduler = Scheduler(manager, limits)
    for group in make_groups(requests):
        scheduler.add(group)
    mean = UsageMean()
    index = 0
    for counted in range(iterations):
        index = _run_to(scheduler, index, warmup + counted * every, len(requests))
        scheduler.schedule(float(index))
        usage = manager.usage()
        mean.add(usage, len(scheduler.running))
        mean.agreed += (usage.logical_tokens, usage.reserved) == _sequence_by_sequence(scheduler)
        each(scheduler)
        progress.at(counted, iterations)
        _require_waiting(scheduler, index, len(requests))
        if counted < iterations - 1:
            scheduler.complete()
            index += 1
    manager.check_invariants()
    return mean


def _run_to(scheduler: Scheduler, index: int, end: int, queued: int) -> int:
    """Iterations `index` to `end` - 1; returns `end`."""
    while index < end:
        steps = min(scheduler.quiet_steps(), end - index)
        if steps:
            scheduler.advance(steps)
        else:
            steps = 1
            scheduler.schedule(float(index))
            _require_waiting(scheduler, index, queued)
            scheduler.complete()
        index += steps
    return index


def _require_waiting(scheduler: Scheduler, index: int, queued: int) -> None:
    if not scheduler.waiting:
        raise QueueTooShortError(f"the queue of {queued} ran dry after {index} iterations")
