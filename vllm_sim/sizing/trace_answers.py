"""What capacity.py --trace shows: the trace, what it needs, and how much of its prompts recurs.

Reproduces: section 6.1's serving of a trace and the question behind Fig. 12, turned round: not how
many requests a second a memory sustains, but how much memory these requests take, under the
paper's policies. trace_needs.py searches and defines what serving a trace means.

    found = survey(trace_case, step=print)
    found.answer, found.sections
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vllm_sim.paper import GIB
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import counted
from vllm_sim.scenarios.report import Cell, Table
from vllm_sim.serving.systems import POLICIES
from vllm_sim.sizing.answers import blocks_and_slots, bytes_by_length, bytes_per_token, memory
from vllm_sim.sizing.case import Section, TraceCase
from vllm_sim.sizing.trace_needs import Need, servers_needed, smallest_pool
from vllm_sim.sizing.trace_serving import Served, serve, unbounded
from vllm_sim.workload.trace_formats import HASH_BLOCK

PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
POOL_QUESTION = "What is the smallest K/V memory with which one server serves it?"
GPU_QUESTION = "How many GPUs serve it?"
ALLOWED = "held up, at most %"
NAMES = {
    "paged": "paging",
    "oracle": "exact reservations",
    "pow2": "powers of two",
    "max": "full-length ones",
}


@dataclass(frozen=True)
class Survey:
    """The answer in one sentence, and the tables behind it."""

    answer: str
    sections: list[Section]


def survey(asked: TraceCase, step: Callable[[str], None] = lambda text: None) -> Survey:
    """Everything about one trace; `step` is told what is computed next."""
    columns, server, plan = asked.columns, asked.server, asked.case.plan
    step("serving the trace with unbounded memory")
    free = unbounded(columns, server)
    needs: list[Need] = []
    for rate in dict.fromkeys((0.0, asked.rate)):
        servers = 1
        for policy in POLICIES:
            (old,) = [need for need in needs if need.policy == policy] or [None]
            share = f"{policy}, {100 * rate:g} % held up"
            step(f"searching the smallest memory, {share}")
            pool = smallest_pool(columns, server, policy, rate, free, old and old.pool)
            step(f"searching the number of servers, {share}")
            found = servers_needed(
                columns, server, policy, rate, plan.num_blocks, servers, old and old.servers
            )
            servers = found or servers
            needs.append(Need(policy, rate, pool, found))
    sections = [contents(asked), lengths(asked)]
    if asked.trace.hash_blocks:
        sections.append(prefixes(asked))
    step("serving the trace with the memory that one server has")
    own = {policy: serve(columns, server, policy, plan.num_blocks) for policy in POLICIES}
    sections += [
        concurrency(asked, free),
        as_it_is(asked, own),
        pools(asked, needs),
        gpus(asked, needs),
    ]
    return Survey(_summary(asked, free, needs), sections)


def answer_trace(
    asked: TraceCase, comment: str = "", progress: Progress = SILENT
) -> Iterator[Section]:
    """Prints the survey's answer, then all sections: the trace's, and where the memory goes."""
    found = survey(asked, steps_of(progress, asked.rate))
    progress.clear()
    print(f"{comment}Answer: {found.answer}\n", flush=True)
    yield from found.sections
    case = asked.case
    yield bytes_per_token(case)
    if case.windowed:
        yield bytes_by_length(case)
    yield memory(case)
    yield blocks_and_slots(case)


def steps_of(progress: Progress, rate: float) -> Callable[[str], None]:
    """A `step` for `survey` that shows which one begins, of all."""
    count = 2 + 2 * len(POLICIES) * len({0.0, rate})
    number = itertools.count()
    return lambda text: progress.at(next(number), count, text)


def _summary(asked: TraceCase, free: Served, needs: list[Need]) -> str:
    trace = asked.trace
    told = [f"{len(trace):,} of {counted(trace.rows_read, 'row')} of {trace.name} served"]
    for need in needs:
        if need.policy == "paged":
            held = "at most" if need.rate else "with"
            share = f"{100 * need.rate:g} %" if need.rate else "none"
            told.append(f"{held} {share} held up by memory, paging takes {_needed(asked, need)}")
    others = ", ".join(
        f"{NAMES[need.policy]} {_needed(asked, need)}"
        for need in reversed(needs)
        if need.policy != "paged" and need.rate == 0.0
    )
    told.append(f"with none, {others}")
    behind = falls_behind(asked, free)
    return "; ".join(told + ([behind] if behind else [])) + "."


def _needed(asked: TraceCase, need: Need) -> str:
    if need.servers is None:
        many = f"no number of servers of {counted(asked.case.plan.num_blocks, 'block')}"
    else:
        number = need.servers * asked.case.plan.num_gpus
        many = counted(number, "GPU")
    blocks = need.pool.num_blocks
    return f"{counted(blocks, 'block')} ({_gib(asked, blocks):,.1f} GiB) and {many}"


def _gib(asked: TraceCase, num_blocks: int) -> float:
    """On all GPUs of one server together."""
    plan = asked.case.plan
    return num_blocks * plan.block_size * plan.slot_bytes * plan.num_gpus / GIB


def falls_behind(asked: TraceCase, free: Served) -> str:
    """What to say of one server that cannot keep up whatever its memory; '' if it can.

    It cannot if it goes on after the last arrival for over a tenth of the trace, and for longer
    than three of the longest requests take alone.
    """
    trace, latency = asked.trace, asked.speed.latency
    after = float(free.finishes.max()) - trace.span_s
    both = int((trace.prompts + trace.outputs).max())
    alone = latency.prompt_s + latency.token_s * int(trace.prompts.max())
    alone += latency.decode_steps(int(trace.outputs.max()), 1, both)
    if trace.span_s == 0.0 or after <= max(trace.span_s / 10, 3 * alone):
        return ""
    return (
        f"one server falls behind whatever its memory, going on for {after:,.0f} s after arrivals "
        f"of {trace.span_s:,.0f} s, so its blocks are those of a queue that grows: go by the GPUs"
    )


def contents(asked: TraceCase) -> Section:
    """Rows read, refused and why."""
    trace = asked.trace
    rows: list[tuple[Cell, ...]] = [("rows read", trace.rows_read, None)]
    rows += [
        (f"refused: {reason}", found.rows, found.first_line)
        for reason, found in trace.refused.items()
    ]
    rows += [("requests served", len(trace), None)]
    if trace.rows_sorted:
        rows.append(("rows earlier than the one before: sorted", trace.rows_sorted, None))
    rows.append(("seconds from the first to the last", trace.span_s, None))
    if trace.span_s:
        rows.append(("requests a second", (len(trace) - 1) / trace.span_s, None))
    refused = sum(found.rows for found in trace.refused.values())
    answer = (
        f"{trace.form}: {counted(trace.rows_read, 'row')} read, {refused:,} refused, "
        f"{counted(len(trace), 'request')} over {trace.span_s:,.0f} s"
    )
    question = "What is in the trace?"
    keys = "what", "number", "first_line"
    table = Table(
        question, ("", "number", "first in line"), rows, asked.line, name="trace", keys=keys
    )
    return Section(table, answer + ".")


def lengths(asked: TraceCase) -> Section:
    """Means and percentiles of prompt and output."""
    trace = asked.trace
    rows = [
        (
            name,
            float(tokens.mean()),
            *np.percentile(tokens, PERCENTILES, method="inverted_cdf").tolist(),
        )
        for name, tokens in (
            ("prompt", trace.prompts),
            ("output", trace.outputs),
            ("both", trace.prompts + trace.outputs),
        )
    ]
    headers = ("tokens", "mean", *(f"p{p}" for p in PERCENTILES))
    answer = (
        f"prompts of {rows[0][1]:,.1f} and outputs of {rows[1][1]:,.1f} tokens in the mean, the "
        f"longest request {rows[2][-1]:,} tokens"
    )
    question = "How long are its requests?"
    table = Table(question, headers, rows, asked.line, name="trace_lengths")
    return Section(table, answer + ".")


def prefixes(asked: TraceCase) -> Section:
    """What sharing prefixes could save at most; the simulation shares nothing."""
    hits, blocks = asked.trace.hash_hits, asked.trace.hash_blocks
    share = 100 * hits / blocks
    rows = [
        (f"blocks of {HASH_BLOCK} tokens in all prompts", blocks),
        ("leading blocks that an earlier prompt had", hits),
        ("of all, %", share),
    ]
    answer = (
        f"a cache without bound would find {share:.1f} % of the prompts' blocks, so no cache of "
        "prefixes finds more; nothing is shared in what follows"
    )
    question = "How much of its prompts could be shared?"
    setting = f"{asked.trace.name}, every row with lengths and a time, however long"
    keys = "what", "number"
    table = Table(question, ("", "number"), rows, setting, name="trace_prefixes", keys=keys)
    return Section(table, answer + ".")


def concurrency(asked: TraceCase, free: Served) -> Section:
    """Requests at a time when memory holds back none."""
    after = float(free.finishes.max()) - asked.trace.span_s
    took = float((free.finishes - asked.trace.arrivals).mean())
    rows: list[tuple[Cell, ...]] = [
        ("most requests at a time", free.peak),
        ("mean over time", free.mean),
        ("mean seconds of a request", took),
        ("seconds from the last arrival to the end", after),
    ]
    answer = f"{free.peak:,} at the most, {free.mean:,.1f} in the mean"
    behind = falls_behind(asked, free)
    question = "How many requests run at a time, if memory holds back none?"
    keys = "what", "number"
    table = Table(
        question, ("one server", "number"), rows, asked.line, name="trace_concurrency", keys=keys
    )
    return Section(table, "; ".join([answer] + ([behind] if behind else [])) + ".")


def as_it_is(asked: TraceCase, own: dict[str, Served | None]) -> Section:
    """One server with the memory that the plan leaves it."""
    rows: list[tuple[Cell, ...]] = []
    arrivals, count = asked.trace.arrivals, len(asked.trace)
    for policy, found in own.items():
        if found is None:
            rows.append((policy, *[None] * 6))
            continue
        seconds = float((found.finishes - arrivals).mean())
        rows.append(
            (
                policy,
                found.peak,
                found.mean,
                found.preemptions,
                found.kept_waiting,
                100 * found.held_up / count,
                seconds,
            )
        )
    headers = (
        "policy",
        "most at a time",
        "mean",
        "preempted",
        "kept waiting",
        "held up, %",
        "mean seconds of a request",
    )
    paged = own["paged"]
    answer = "a request of this trace does not fit alone"
    if paged is not None:
        answer = (
            f"paging preempts {counted(paged.preemptions, 'time')} and keeps "
            f"{paged.kept_waiting:,} of {counted(count, 'request')} waiting for blocks"
        )
    question = "What happens on one server as it is?"
    setting = f"{asked.line}; {counted(asked.case.plan.num_blocks, 'block')}"
    keys = (
        "policy",
        "most_at_a_time",
        "mean",
        "preempted",
        "kept_waiting",
        "held_up_percent",
        "mean_seconds",
    )
    table = Table(question, headers, rows, setting, decimals=2, name="trace_as_it_is", keys=keys)
    return Section(table, answer + ".")


def pools(asked: TraceCase, needs: list[Need]) -> Section:
    """The smallest memory of one server, by policy and share held up."""
    there = asked.case.plan.num_blocks
    rows = [
        (
            need.policy,
            100 * need.rate,
            need.pool.num_blocks,
            _gib(asked, need.pool.num_blocks),
            need.pool.num_blocks / there,
            need.pool.served.peak,
            need.pool.served.preemptions,
            need.pool.served.kept_waiting,
        )
        for need in needs
    ]
    headers = (
        "policy",
        ALLOWED,
        "blocks",
        "GiB of K/V",
        "x this server's",
        "most at a time",
        "preempted",
        "kept waiting",
    )
    times = {need.policy: need.pool.num_blocks for need in needs if need.rate == 0.0}
    answer = (
        f"with none held up paging takes {counted(times['paged'], 'block')}; exact reservations "
        f"take {times['oracle'] / times['paged']:.2f} times that, powers of two "
        f"{times['pow2'] / times['paged']:.2f} and full-length ones "
        f"{times['max'] / times['paged']:.2f} times"
    )
    keys = (
        "policy",
        "allowed_percent",
        "blocks",
        "gib",
        "times_server",
        "most_at_a_time",
        "preempted",
        "kept_waiting",
    )
    table = Table(
        POOL_QUESTION, headers, rows, asked.line, decimals=2, name="trace_pools", keys=keys, index=2
    )
    return Section(table, answer + ".")


def gpus(asked: TraceCase, needs: list[Need]) -> Section:
    """Servers as they are, requests dealt to them in turn."""
    plan = asked.case.plan
    rows = [
        (need.policy, 100 * need.rate, need.servers, need.servers and need.servers * plan.num_gpus)
        for need in needs
    ]
    found = {need.policy: need for need in needs if need.rate == 0.0}
    none = [need.policy for need in found.values() if need.servers is None]
    answer = ", ".join(
        f"{NAMES[policy]} {found[policy].servers * plan.num_gpus:,}"
        for policy in reversed(POLICIES)
        if policy not in none
    )
    answer = f"GPUs for none held up: {answer}" if answer else "no number of GPUs will do"
    if none:
        answer += (
            f"; under {', '.join(none)} a request of this trace does not fit the "
            f"{counted(plan.num_blocks, 'block')} of a server"
        )
    setting = f"{asked.line}; {counted(plan.num_blocks, 'block')} a server"
    keys = "policy", "allowed_percent", "servers", "gpus"
    headers = "policy", ALLOWED, "servers", "GPUs"
    table = Table(GPU_QUESTION, headers, rows, setting, name="trace_gpus", keys=keys, index=2)
    return Section(table, answer + ".")
