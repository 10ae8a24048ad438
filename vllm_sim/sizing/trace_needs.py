"""What a request trace needs: blocks of K/V memory, and servers.

Reproduces: the question of section 6.2 turned round, with section 6.1's policies: not how many
requests a second a memory sustains, but which memory serves these requests. A memory *serves* a
trace at the rate r if at most r x requests are held up by it (trace_serving.py); at r = 0 every
request runs exactly when it would with unbounded memory. serving/simulator.py is the judge.

    free = unbounded(columns, server)
    smallest_pool(columns, server, "paged", 0.01, free).num_blocks
    servers_needed(columns, server, "paged", 0.01, num_blocks=983)

Bookkeeping only; capacity.py --trace prints what comes out (trace_answers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count as count_from

import numpy as np

from kv_cache_manager import RequestTooLargeError
from sequence import Sequence, SequenceGroup
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.sizing.trace_serving import (
    Columns,
    Served,
    Server,
    allowed,
    holds_up_none,
    serve,
    times_of,
)

MOST_SERVERS = 4096
EXACT = 1000  # numbers below twice this are found to the last, larger ones to one part in so many


def smallest(
    serves: Callable[[int], bool], guess: int, most: int, least: int = 1, creep: bool = False
) -> int | None:
    """The smallest number from `least` to `most` that serves, or None, if more never serves worse.

    It serves, and one less does not; from 2 x EXACT on, a number that is smaller by one in EXACT
    does not. Looks around the guess first, above it in steps twice as wide each time; or, to
    `creep`, one by one or by 3 %, as is best where what does not serve is found out early.
    """
    guess = min(max(guess, least), most)
    width = max(1, guess // 128)
    if serves(guess):
        high, low = guess, guess - width
        while low >= least and serves(low):
            width *= 2
            high, low = low, low - width
        low = max(low, least - 1)
    else:
        low = guess
        while True:
            if low == most:
                return None
            high = min(low + width, most)
            if serves(high):
                break
            low, width = high, max(1, high // 32) if creep else 2 * width
    while high - low > max(1, low // EXACT):
        middle = (low + high) // 2
        if serves(middle):
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True, eq=False)
class Pool:
    """A memory of one server, and the run with it."""

    num_blocks: int
    served: Served


@dataclass(frozen=True, eq=False)
class Need:
    """What a policy needs to serve a trace at a rate. None: no number of servers does."""

    policy: str
    rate: float
    pool: Pool  # of one server that serves all
    servers: int | None


def smallest_pool(
    columns: Columns,
    server: Server,
    policy: str,
    rate: float,
    free: Served,
    known: Pool | None = None,
    progress: Progress = SILENT,
) -> Pool:
    """The smallest memory with which one server serves the trace.

    `free` is the run with unbounded memory, `known` a memory that serves, at this rate or a lower.
    Where nobody may be held up, that run tells of most memories whether they serve.
    """
    few = allowed(rate, len(columns[0]))
    chunks = server.chunks(policy, np.array(columns[1]), np.array(columns[2]))
    unit = 1 if policy == "paged" else int(chunks.min())  # what is left of a pool serves nobody
    runs = {known.num_blocks // unit: known.served} if known else {}

    def serves(num_blocks: int) -> bool:
        if (key := num_blocks // unit) not in runs:
            sure = None
            if few == 0:
                sure = holds_up_none(free, columns, server, policy, num_blocks)
                if sure is None and any(runs[n] for n in runs if n < key):
                    sure = True  # what a smaller one does for paging
            if sure is None:
                runs[key] = serve(columns, server, policy, num_blocks, few, progress)
            else:
                runs[key] = free if sure else None
        return runs[key] is not None

    demand = free.demand if policy == "paged" else free.together(chunks)
    # Room for all requests at once, and to spare.
    most = known.num_blocks if known else 4 * (int(chunks.sum()) + int(chunks.max()) + 2)
    if few == 0:  # then all that run together with unbounded memory do, and must find room
        guess = least = int(demand.max())
        if policy == "paged":
            guess = int(least * (1.0 + server.watermark))
            serves(next(n for n in count_from(least) if n - int(server.watermark * n) >= least))
    else:
        least = int(chunks.max())
        guess = int(np.quantile(demand, 1.0 - few / len(columns[0])))
    found = smallest(serves, guess, most, least)
    assert found is not None, "room for all requests at once does not serve them"
    return Pool(found, runs[found // unit])


def servers_needed(
    columns: Columns,
    server: Server,
    policy: str,
    rate: float,
    num_blocks: int,
    guess: int = 1,
    known: int | None = None,
    runs: dict[tuple[int, int], Served] | None = None,
    progress: Progress = SILENT,
) -> int | None:
    """How many servers of `num_blocks` blocks each serve the trace, dealt to them in turn.

    `runs`, of which any policy can make use, has the runs that held up none, by the number of
    servers and which of them it is.
    `known` is a number that serves, at this rate or a lower. None if a request does not fit such
    a server alone, or more than MOST_SERVERS were needed.
    """
    count = len(columns[0])
    runs = {} if runs is None else runs

    def serves(servers: int) -> bool:
        if servers == known:
            return True
        left = allowed(rate, count)
        for first in range(servers):
            part, place = tuple(column[first::servers] for column in columns), (servers, first)
            sure = None
            if place in runs and policy != "paged":  # which may hold up more than one needs to see
                sure = holds_up_none(runs[place], part, server, policy, num_blocks)
            if sure is False and left == 0:
                return False
            if not sure:
                found = serve(part, server, policy, num_blocks, left, progress)
                if found is None:
                    return False
                left -= found.held_up
                if found.held_up == 0:
                    runs[place] = found
        return True

    manager = server.manager(policy, num_blocks)
    try:
        for prompt, output in set(zip(*columns[1:])):
            manager.require_fits(SequenceGroup(0, [Sequence(0, prompt, output)], 0.0))
    except RequestTooLargeError:
        return None
    return smallest(serves, known or guess, known or min(count, MOST_SERVERS), creep=True)


@dataclass(frozen=True)
class Targets:
    """Seconds that 99 of 100 requests may take to their first token, and for each further one."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def given(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def met(self, ttft_s: np.ndarray, tpot_s: np.ndarray) -> bool:
        """By the 99th percentiles; requests of one token have no time per token."""
        ok = self.ttft_s is None or float(np.percentile(ttft_s, 99)) <= self.ttft_s
        if ok and self.tpot_s is not None and len(tpot_s):
            ok = float(np.percentile(tpot_s, 99)) <= self.tpot_s
        return ok

    def __str__(self) -> str:
        told = [(self.ttft_s, "to the first token"), (self.tpot_s, "for each further one")]
        return " and ".join(f"{one:g} s {what}" for one, what in told if one is not None)


def servers_for(
    columns: Columns,
    server: Server,
    num_blocks: int,
    targets: Targets,
    progress: Progress = SILENT,
) -> int | None:
    """How many servers of `num_blocks` blocks under paging meet the targets, dealt to in turn.

    By the requests of all of them together. None if MOST_SERVERS do not, or one for each request.
    """

    def meets(servers: int) -> bool:
        ttft, tpot = [], []
        for first in range(servers):
            part = tuple(column[first::servers] for column in columns)
            found = serve(part, server, "paged", num_blocks, progress=progress)
            if found is None:
                return False
            times = times_of(found, np.array(part[0]), np.array(part[2]))
            ttft.append(times[0])
            tpot.append(times[1])
        return targets.met(np.concatenate(ttft), np.concatenate(tpot))

    most = min(len(columns[0]), MOST_SERVERS)
    return smallest(meets, 1, most)
