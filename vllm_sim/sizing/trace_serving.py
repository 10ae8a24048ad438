"""A request trace served by one server, and who is held up by its memory.

Reproduces: section 6.1's way of serving a trace: the simulator over the managers of the paper and
of its baselines. A request is *held up by memory* if it is

    preempted      its blocks were taken while it ran (each time counts; contiguous policies never)
    kept waiting   it had arrived and never run while blocks were missing for it, or for one
                   before it in the queue

Whatever else delays a request, tokens of an iteration or an iteration under way, does so with
unbounded memory as well and is not counted: where nobody is held up, all run exactly as then.

    served = serve(columns, server, "paged", num_blocks=983)
    served.preemptions, served.kept_waiting, served.peak, served.mean

Bookkeeping only. trace_needs.py searches with it.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kv_cache_manager import OutOfBlocksError, RequestTooLargeError
from sequence import Sequence, SequenceGroup
from vllm_sim import paper
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.serving.latency import UNIT
from vllm_sim.serving.scheduler import Iteration, Limits, Manager, Scheduler
from vllm_sim.serving.simulator import Latency, simulate
from vllm_sim.serving.systems import new_manager

Columns = tuple[list[float], list[int], list[int]]  # arrivals in order (s), prompts, outputs
# Blocks of the first guess at an unbounded memory, which doubles, and of the last.
FIRST_POOL, LARGEST_POOL = 1 << 14, 1 << 25


class TraceTooLargeError(ValueError):
    """The trace needs more memory at a time than can be simulated; the message is one line."""


class HeldUpError(Exception):
    """More requests were held up than are allowed."""


@dataclass(frozen=True)
class Server:
    """What serves, memory aside: lengths in tokens, the model's maximum is what `max` reserves.

    The `watermark` is the artifact's; today's servers have none.
    """

    block_size: int
    max_len: int
    latency: Latency
    limits: Limits
    watermark: float = paper.WATERMARK

    def manager(self, policy: str, num_blocks: int) -> Manager:
        """An empty pool under a policy; where all chunks are alike, one of such blocks."""
        count, size = num_blocks, self.block_size
        if policy == "max" and count >= (chunk := int(_power_of_two(-(-self.max_len // size)))):
            count, size = count // chunk, size * chunk  # to list a chunk's blocks takes long
        return new_manager(policy, count, size, max_len=self.max_len, watermark=self.watermark)

    def chunks(self, policy: str, prompts: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Blocks of the chunk that each request reserves; under paged, what it ends with."""
        slots = prompts + outputs
        if policy != "paged":
            ask = new_manager(policy, 1, self.block_size, max_len=self.max_len).slots_to_ask
            slots = np.array([*map(ask, prompts.tolist(), slots.tolist())])
        blocks = -(-slots // self.block_size)
        return blocks if policy == "paged" else _power_of_two(blocks)


def _power_of_two(counts: np.ndarray) -> np.ndarray:
    """Of each count from 1, the next power of two."""
    return 1 << np.ceil(np.log2(counts)).astype(np.int64)


class Watch:
    """Told of each decision of a run: who was held up by memory, and when each request started.

    Raises HeldUpError as soon as more than `allowed` were held up.
    """

    def __init__(
        self, arrivals: list[float], allowed: float = math.inf, latency: Latency = UNIT
    ) -> None:
        self._arrivals = [*arrivals, math.inf]
        self._latency = latency
        self._allowed = allowed
        self._arrived = 0
        self._counted = 0  # of the requests in order of arrival, so many are kept_waiting or not
        self._short = False
        self.starts: dict[int, float] = {}  # request -> the first iteration it was in
        self.admits: dict[int, float] = {}  # request -> the one that ended its prompt
        self.firsts: dict[int, float] = {}  # request -> its first token
        self.demand: list[int] = []  # blocks taken after each iteration that admitted somebody
        self.preemptions = 0
        self.kept_waiting = 0

    def __call__(self, scheduler: Scheduler, iteration: Iteration) -> None:
        now = iteration.start_s
        while self._arrivals[self._arrived] <= now:
            self._arrived += 1
        if self._short:  # they came while another waited for blocks
            self._count(self._counted)
        if scheduler.partial is not None:
            self.starts.setdefault(scheduler.partial.group_id, now)
        if iteration.prefills:
            end = now + self._latency.iteration(iteration)
            for group in iteration.prefills:
                self.starts.setdefault(group.group_id, now)
                self.admits.setdefault(group.group_id, now)
                self.firsts.setdefault(group.group_id, end)
            self.demand.append(scheduler.manager.num_blocks - scheduler.manager.num_free_blocks)
        self.preemptions += iteration.num_swaps + iteration.num_recomputations
        self._short = scheduler.short_of_blocks
        if self._short:  # first come first served: those never admitted are the last to arrive
            self._count(max(self._counted, len(self.starts)))
        if self.preemptions + self.kept_waiting > self._allowed:
            raise HeldUpError

    def _count(self, first: int) -> None:
        """All that have arrived from number `first` on are kept waiting."""
        self.kept_waiting += self._arrived - first
        self._counted = self._arrived


@dataclass(frozen=True, eq=False)
class Served:
    """A run to its end: who was held up, and the times of each request (s)."""

    preemptions: int
    kept_waiting: int
    starts: np.ndarray
    admits: np.ndarray  # when it got its blocks: later, where its prompt came in parts
    firsts: np.ndarray  # of the first token
    finishes: np.ndarray
    demand: np.ndarray  # blocks taken after each iteration that admitted somebody

    @property
    def held_up(self) -> int:
        return self.preemptions + self.kept_waiting

    @cached_property
    def order(self) -> np.ndarray:
        """Ends (below the number of requests) and starts (from it on) in order of time."""
        times = np.concatenate([self.finishes, self.starts])  # who ends makes room for who starts
        return np.argsort(times, kind="stable")

    @cached_property
    def turns(self) -> list[tuple[str, int]]:
        """What happens to which request in order of time. Who ends makes room for who is admitted;
        who only starts, as the first part of its prompt does, comes last."""
        parted = np.flatnonzero(self.starts < self.admits)
        times = np.concatenate([self.finishes, self.admits, self.starts[parted]])
        count = range(len(self.starts))
        told = [("end", i) for i in count] + [("admit", i) for i in count]
        told += [("start", i) for i in parted.tolist()]
        return [told[place] for place in np.argsort(times, kind="stable").tolist()]

    def together(self, weights: np.ndarray) -> np.ndarray:
        """At each start, the sum of the weights of all that run then."""
        changes = np.concatenate([-weights, weights])
        return np.cumsum(changes[self.order])[self.order >= len(weights)]

    @property
    def peak(self) -> int:
        """The most requests that ran at a time."""
        return int(self.together(np.ones(len(self.starts), dtype=np.int64)).max())

    @property
    def mean(self) -> float:
        """Mean number of requests running, over the time from the first start to the last end."""
        total = float((self.finishes - self.starts).sum())
        return total / float(self.finishes.max() - self.starts.min())


def times_of(
    served: Served, arrivals: np.ndarray, outputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each request to its first token, and, of those that have more, for each other."""
    many = outputs > 1
    later = (served.finishes - served.firsts)[many] / (outputs[many] - 1)
    return served.firsts - arrivals, later


def holds_up_none(
    free: Served, columns: Columns, server: Server, policy: str, num_blocks: int
) -> bool | None:
    """Whether a pool serves a trace just as unbounded memory did, or None if it must be served.

    Where nobody is held up, all start and end as in that run: a contiguous pool serves if it has a
    chunk for each at its start, and paging does not if its watermark is in the way of a start.
    """
    if policy == "paged":
        watermark = int(server.watermark * num_blocks)
        return False if num_blocks - watermark < free.demand.max() else None
    _, prompts, outputs = columns
    manager = server.manager(policy, num_blocks)
    try:
        for what, i in free.turns:
            if what == "end":
                manager.free(i)
            elif what == "admit":
                manager.allocate(i, prompts[i], prompts[i] + outputs[i])
            elif not manager.can_allocate(prompts[i], prompts[i] + outputs[i]):
                return False
    except OutOfBlocksError:
        return False
    return True


def serve(
    columns: Columns,
    server: Server,
    policy: str,
    num_blocks: int,
    allowed: float = math.inf,
    progress: Progress = SILENT,
) -> Served | None:
    """Serve a trace with a pool of so many blocks.

    None if more than `allowed` requests are held up, or one would not fit the pool alone.
    """
    groups = [
        SequenceGroup(i, [Sequence(i, prompt, output)], arrival)
        for i, (arrival, prompt, output) in enumerate(zip(*columns))
    ]
    watch = Watch(columns[0], allowed, server.latency)
    collecting = gc.isenabled()
    gc.disable()  # many small objects and no cycles
    try:
        manager = server.manager(policy, num_blocks)
        told = {"on_decision": watch, "progress": progress}
        result = simulate(groups, manager, server.limits, server.latency, **told)
    except (HeldUpError, RequestTooLargeError):
        return None
    finally:
        if collecting:
            gc.enable()
    times = (
        np.array([found[i] for i in range(len(groups))])
        for found in (watch.starts, watch.admits, watch.firsts, result.finish_s)
    )
    return Served(watch.preemptions, watch.kept_waiting, *times, np.array(watch.demand))


def unbounded(columns: Columns, server: Server, progress: Progress = SILENT) -> Served:
    """The trace served with more paged memory than it ever uses: the same under any policy.

    Raises TraceTooLargeError.
    """
    num_blocks = FIRST_POOL
    while (found := serve(columns, server, "paged", num_blocks, 0, progress)) is None:
        num_blocks *= 2
        if num_blocks > LARGEST_POOL:
            raise TraceTooLargeError(
                f"the trace needs more than {LARGEST_POOL:,} blocks of {server.block_size} slots "
                "at a time: take part of it with --trace-rows, or lower --rate"
            )
    return found


def allowed(rate: float, count: int) -> int:
    """How many of `count` requests may be held up at a rate."""
    return math.floor(rate * count + 1e-9)
