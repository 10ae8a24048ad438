"""How many requests of a workload a pool of blocks holds, by simulation, under each policy.

Reproduces: the measurement behind Fig. 2 and Fig. 13 (a queue that never runs dry, no limit but
memory) for any pool and workload. Bookkeeping only; capacity.py prints what comes out.

    workload = parse_workload("sharegpt")
    hold(workload, "paged", num_blocks=983, block_size=16, max_len=2048, seed=0).requests
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_cache_manager import MemoryUsage
from vllm_sim import paper
from vllm_sim.models.memory_plan import Plan, request_bytes
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import counted
from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.steady_state import QueueTooShortError, steady_state
from vllm_sim.serving.systems import new_manager
from vllm_sim.workload.length_tables import ALPACA, SHAREGPT, LengthTable
from vllm_sim.workload.requests import Request

NO_LIMIT = 10**9  # on an iteration's tokens and sequences: memory alone decides
# A larger pool is simulated by a part of it: that many requests of the workload say enough.
ENOUGH_REQUESTS = 1000
# Completions that a mean is about: from seed to seed it then differs by 2 %, under pow2 and oracle
# in large pools by 5 %, where a long request at the head of the queue holds up all others.
COMPLETIONS = 8000
LOOKS = 500  # iterations at which slots are counted
MAX_MEAN = 10**6
MAX_LENGTH = 10**9  # cuts nothing
LOOKS_AT_ONE = 8  # moments of a request
SAMPLE = 20_000  # requests that a workload's means are about


class WorkloadNameError(ValueError):
    """No such workload; the message is one line."""


@dataclass(frozen=True)
class Workload:
    """Lengths to sample from: a table, or two means, geometric around them or fixed."""

    name: str
    table: LengthTable | None = None
    mean_prompt: float = 0.0
    mean_output: float = 0.0
    fixed: bool = False

    @property
    def told(self) -> str:
        """What a request has: 'sharegpt lengths', '30 + 20 tokens (geometric lengths)'."""
        if self.table is not None:
            return f"{self.name} lengths"
        kind = "fixed" if self.fixed else "geometric"
        return f"{self.mean_prompt:,.0f} + {self.mean_output:,.0f} tokens ({kind} lengths)"

    def sample(self, count: int, max_len: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(prompts, outputs), int64 (count,) each, cut to `max_len` in all (at least 2)."""
        rng = np.random.default_rng([seed, 6])
        if self.table is not None:
            prompts, outputs = self.table.sample(count, rng)
        else:
            prompts, outputs = (
                np.full(count, int(mean)) if self.fixed else rng.geometric(1.0 / mean, count)
                for mean in (self.mean_prompt, self.mean_output)
            )
        prompts = np.minimum(prompts, max_len - 1)
        return prompts, np.minimum(outputs, max_len - prompts)


def parse_workload(text: str, fixed: bool = False) -> Workload:
    """'sharegpt', 'alpaca', or 'PROMPT,OUTPUT' in tokens: two means, or with `fixed` what every
    request has. WorkloadNameError."""
    tables = {"sharegpt": SHAREGPT, "alpaca": ALPACA}
    if (name := text.lower()) in tables:
        return Workload(name, tables[name])
    means = text.split(",")
    if len(means) == 2 and all(part.isascii() and part.isdigit() for part in means):
        prompt, output = (int(part[:10]) for part in means)
        if 1 <= prompt <= MAX_MEAN and 1 <= output <= MAX_MEAN:
            name = "fixed lengths of" if fixed else "geometric lengths of mean"
            name = f"{name} {prompt:,} + {output:,} tokens"
            return Workload(name, None, float(prompt), float(output), fixed)
    raise WorkloadNameError(
        f"workload {text[:40]!a} is not sharegpt, alpaca or two means from 1 to {MAX_MEAN:,} "
        "such as 512,256 (prompt, output)"
    )


@dataclass(frozen=True)
class Means:
    """Of a workload, in tokens."""

    prompt: float
    output: float
    held: float  # by a running request, over its iterations: long outputs count for longer
    share_cut: float  # of the requests, that would be longer than `max_len` (0 to 1)

    @property
    def final(self) -> float:
        return self.prompt + self.output


def means(workload: Workload, max_len: int, seed: int) -> Means:
    """Means of SAMPLE requests."""
    prompts, outputs = workload.sample(SAMPLE, max_len, seed)
    uncut = np.add(*workload.sample(SAMPLE, MAX_LENGTH, seed))
    held = (outputs * (prompts + (outputs - 1) / 2)).sum() / outputs.sum()
    cut = float((uncut > max_len).mean())
    return Means(float(prompts.mean()), float(outputs.mean()), float(held), cut)


def kept_less(plan: Plan, workload: Workload, max_len: int, seed: int) -> float:
    """Requests that run where windows drop what is behind them and sequences have states, over as
    many as whole layers would let run: memory that running requests hold, in the mean over time.
    """
    prompts, outputs = workload.sample(SAMPLE // 10, max_len, seed)
    whole = kept = 0.0
    for share in (np.arange(LOOKS_AT_ONE) + 0.5) / LOOKS_AT_ONE:  # of its output
        lengths = (prompts + share * outputs).astype(np.int64)
        for length, weight in zip(lengths.tolist(), outputs.tolist()):
            blocks = -(-length // plan.block_size)
            whole += weight * blocks * plan.block_size * plan.slot_bytes
            kept += weight * request_bytes(plan, length)
    return whole / kept


@dataclass(frozen=True)
class Holding:
    """What a steady state holds under a policy: requests, and slots by part of the identity."""

    policy: str
    requests: float
    slots: dict[str, float]  # mean by part of MemoryUsage, summing to the capacity
    simulated_blocks: int


def hold(
    workload: Workload,
    policy: str,
    num_blocks: int,
    block_size: int,
    max_len: int,
    seed: int,
    progress: Progress = SILENT,
) -> Holding:
    """The mean of a steady state, and in proportion for a pool of which a part was simulated.

    Requests longer than the pool's largest chunk are cut to it, whatever the policy, so that all
    policies serve the same. ValueError if the pool holds no request of 2 tokens.
    """
    longest = longest_request(num_blocks, block_size, max_len)
    prompts, outputs = workload.sample(SAMPLE, longest, seed)
    chunk = 1 << (-(-int((prompts + outputs).max()) // block_size) - 1).bit_length()
    whole = reserved(max_len, block_size) // block_size
    if policy == "max" and whole > num_blocks:  # no request can reserve that much
        empty = dict.fromkeys(MemoryUsage.PARTS, 0.0) | {"free": float(num_blocks * block_size)}
        return Holding(policy, 0.0, empty, num_blocks)
    mean_blocks = float((prompts + outputs).mean()) / block_size + 0.5
    pool = max(8 * chunk, int(ENOUGH_REQUESTS * mean_blocks))
    if policy == "max":
        pool, mean_blocks = 64 * whole, whole
    pool = min(num_blocks, pool)
    mean_output = float(outputs.mean())
    batch = max(1.0, pool / mean_blocks)
    warmup = int(3 * mean_output) + 1
    span = int(mean_output * max(3.0, COMPLETIONS / batch)) + 1
    every = max(1, span // LOOKS)
    count = int(2 * batch * (1 + (warmup + span) / mean_output)) + 64
    limit = max_len if policy == "max" else longest
    while True:
        try:
            mean = steady_state(
                new_manager(policy, pool, block_size, max_len=limit),
                _requests(workload, count, longest, seed),
                Limits(NO_LIMIT, NO_LIMIT),
                warmup,
                -(-span // every),
                every=every,
                progress=progress,
            )
            break
        except QueueTooShortError:
            count *= 2
    # Of the policy max a pool is as many whole reservations as fit, and what is left over is free.
    unit = whole if policy == "max" else 1
    scale = num_blocks // unit * unit / (pool // unit * unit)
    slots = {
        part: mean.percent(part) / 100 * pool * block_size * scale
        for part in MemoryUsage.PARTS
        if part != "free"
    }
    slots["free"] = num_blocks * block_size - sum(slots.values())
    return Holding(policy, mean.batch * scale, slots, pool)


def reserved(max_len: int, block_size: int) -> int:
    """Slots of a reservation for the longest request: whole blocks, a power of two of them."""
    return block_size << (-(-max_len // block_size) - 1).bit_length()


def longest_request(num_blocks: int, block_size: int, max_len: int) -> int:
    """Tokens that one request may have in all so that every policy but max could run it alone."""
    chunk = 1 << (num_blocks.bit_length() - 1)
    paged = num_blocks - int(paper.WATERMARK * num_blocks) - 1
    longest = min(max_len, block_size * min(chunk, paged))
    if longest < 2:
        pool = f"{counted(num_blocks, 'block')} of {counted(block_size, 'slot')}"
        verb = "is" if num_blocks == 1 else "are"
        raise ValueError(f"{pool} {verb} too few for any request")
    return longest


def _requests(workload: Workload, count: int, longest: int, seed: int) -> list[Request]:
    prompts, outputs = workload.sample(count, longest, seed)
    pairs = zip(prompts.tolist(), outputs.tolist())
    return [Request(i, 0.0, prompt, output) for i, (prompt, output) in enumerate(pairs)]
