"""What capacity.py --trace shows: the trace, what it needs, and how much of its prompts recurs.

Reproduces: section 6.1's serving of a trace and the question behind Fig. 12, turned round: not how
many requests a second a memory sustains, but how much memory these requests take, under the
paper's policies. trace_needs.py searches and defines what serving a trace means.

    found = survey(trace_case, progress, Targets(ttft_s=1.0))
    found.answer, found.sections
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from vllm_sim.paper import GIB
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import counted
from vllm_sim.serving.scheduler import Iteration
from vllm_sim.serving.systems import POLICIES
from vllm_sim.sizing.answers import WHAT, memory_sections
from vllm_sim.sizing.case import Section, Survey, TraceCase
from vllm_sim.sizing.trace_needs import Need, Targets, servers_for, servers_needed, smallest_pool
from vllm_sim.sizing.trace_serving import Served, serve, times_of, unbounded

# A longer trace is searched, where some may be held up, in its busiest so many requests in a row.
LONGEST, STRETCH = 50_000, 10_000
PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
ALLOWED = "held up, at most %"
NAMES = {
    "paged": "paging",
    "oracle": "exact reservations",
    "pow2": "powers of two",
    "max": "full-length ones",
}


def survey(asked: TraceCase, progress: Progress = SILENT, targets: Targets | None = None) -> Survey:
    """Everything about one trace."""
    server, num_blocks = asked.server, asked.case.plan.num_blocks
    targets = targets or Targets()
    rates = dict.fromkeys((0.0, asked.rate))
    count = 2 + 2 * len(POLICIES) * len(rates) + targets.given
    number = itertools.count()

    def step(text: str) -> Progress:
        part = progress.part(next(number), count, text)
        part.at(0, 1)
        return part

    columns, part = asked.columns, asked
    whole = free = unbounded(columns, server, step("serving the trace with unbounded memory"))
    needs: dict[tuple[str, float], Need] = {}
    runs = {(1, 0): free}
    for rate in rates:
        servers, before = 1, None
        if rate and len(asked.trace) > LONGEST:
            part = busiest(asked, whole)
            columns, free = part.columns, unbounded(part.columns, server)
            runs = {(1, 0): free}
        for policy in POLICIES:
            old = needs.get((policy, 0.0))
            share = f"{policy}, {100 * rate:g} % held up"
            told = step(f"searching the smallest memory, {share}")
            pool = smallest_pool(columns, server, policy, rate, free, old and old.pool, told)
            told = step(f"searching the number of servers, {share}")
            if before is not None:  # fewer than as many as the smallest memories let expect
                servers = max(1, servers * pool.num_blocks // before)
            before = pool.num_blocks
            more = (servers, old and old.servers, runs, told)
            found = servers_needed(columns, server, policy, rate, num_blocks, *more)
            servers = found or servers
            needs[policy, rate] = Need(policy, rate, pool, found)
    told = step("serving the trace with the memory that one server has")
    own = {policy: serve(columns, server, policy, num_blocks, progress=told) for policy in POLICIES}
    sections = [contents(asked), lengths(asked)]
    sections += [prefixes(asked)] if asked.trace.hash_blocks else []
    sections += [concurrency(asked, whole), as_it_is(part, own)]
    sections.append(seconds(part, own["paged"]))
    line = asked.line if part is asked else f"{asked.line}; where some are held up: {_searched()}"
    sections += [pools(asked, [*needs.values()], line), gpus(asked, [*needs.values()], line)]
    answer = _summary(asked, whole, [*needs.values()])
    if targets.given:
        told = step("searching the number of servers for the seconds asked for")
        enough = servers_for(part.columns, server, num_blocks, targets, told)
        sections.append(targeted(part, targets, enough))
        answer = answer.removesuffix(".") + f"; {sections[-1].answer}"
    return Survey(answer, sections)


def busiest(asked: TraceCase, free: Served) -> TraceCase:
    """The requests in a row at whose starts the running ones take the most blocks in the mean."""
    trace = asked.trace
    taken = free.together(asked.server.chunks("paged", trace.prompts, trace.outputs))
    sums = np.cumsum(np.concatenate([[0], taken]))
    first = int(np.argmax(sums[STRETCH:] - sums[:-STRETCH]))
    name = f"{trace.name}, {_searched()}"
    return replace(asked, trace=trace.part(first, first + STRETCH, name))


def _searched() -> str:
    return f"its busiest {STRETCH:,} requests in a row"


def answer_trace(
    asked: TraceCase, progress: Progress = SILENT, targets: Targets | None = None
) -> Survey:
    """The survey, and where the memory goes."""
    found = survey(asked, progress, targets)
    return Survey(found.answer, [*found.sections, *memory_sections(asked.case)])


def _summary(asked: TraceCase, free: Served, needs: list[Need]) -> str:
    trace, first = asked.trace, "a request does not fit alone"
    told = [f"{len(trace):,} of {counted(trace.rows_read, 'row')} of {trace.name} served"]
    for need in needs:
        if need.policy == "paged" and not need.rate:
            first = f"{_needed(asked, need)} with paging and no request held up by memory"
        elif need.policy == "paged":
            share = f"at most {100 * need.rate:g} %"
            share += f" ({_searched()})" * (len(trace) > LONGEST)
            told.append(f"{share} held up by memory, paging takes {_needed(asked, need)}")
    others = ", ".join(
        f"{NAMES.get(need.policy, need.policy)} {_needed(asked, need)}"
        for need in reversed(needs)
        if need.policy != "paged" and need.rate == 0.0
    )
    more = "; ".join([*told, f"with none, {others}", *falls_behind(asked, free)]) + "."
    return f"{trace.name}: {first}\n{more}"


def _needed(asked: TraceCase, need: Need) -> str:
    plan, blocks = asked.case.plan, need.pool.num_blocks
    many = f"no number of servers of {counted(plan.num_blocks, 'block')}"
    if need.servers is not None:
        many = counted(need.servers * plan.num_gpus, "GPU")
    return f"{counted(blocks, 'block')} ({_gib(asked, blocks):,.1f} GiB) and {many}"


def _gib(asked: TraceCase, num_blocks: int) -> float:
    """On all GPUs of one server together."""
    plan = asked.case.plan
    return num_blocks * plan.block_size * plan.slot_bytes * plan.num_gpus / GIB


def falls_behind(asked: TraceCase, free: Served) -> list[str]:
    """What to say of one server that cannot keep up whatever its memory; nothing if it can.

    It cannot if it goes on after the last arrival for over a tenth of the trace, and for longer
    than three of the longest requests take alone.
    """
    trace, latency = asked.trace, asked.speed.latency
    after = float(free.finishes.max()) - trace.span_s
    prompt, output = int(trace.prompts.max()), int(trace.outputs.max())
    lone = Iteration(0, 0.0, num_seqs=1, prompt_tokens=prompt, parts=[(0, prompt)])
    alone = latency.iteration(lone)
    alone += latency.decode_steps(output - 1, 1, prompt + 1)
    if trace.span_s == 0.0 or after <= max(trace.span_s / 10, 3 * alone):
        return []
    return [
        f"one server falls behind whatever its memory, going on for {after:,.0f} s after arrivals "
        f"of {trace.span_s:,.0f} s, so its blocks are those of a queue that grows: go by the GPUs"
    ]


def contents(asked: TraceCase) -> Section:
    """Rows read, refused and why."""
    trace = asked.trace
    rows = [("rows read", trace.rows_read, None)]
    for reason, found in trace.refused.items():
        rows.append((f"refused: {reason}", found.rows, found.first_line))
    rows.append(("requests served", len(trace), None))
    if trace.rows_sorted:
        rows.append(("rows earlier than the one before: sorted", trace.rows_sorted, None))
    rows.append(("seconds from the first to the last", trace.span_s, None))
    if trace.span_s:
        rows.append(("requests a second", (len(trace) - 1) / trace.span_s, None))
    refused = sum(found.rows for found in trace.refused.values())
    return Section(
        "What is in the trace?",
        ("", "number", "first in line"),
        rows,
        asked.line,
        name="trace",
        keys=(*WHAT, "first_line"),
        answer=f"{trace.form}: {counted(trace.rows_read, 'row')} read, {refused:,} refused; "
        f"{trace.times}; {counted(len(trace), 'request')} served.",
    )


def lengths(asked: TraceCase) -> Section:
    """Means and percentiles of prompt and output."""
    prompts, outputs = asked.trace.prompts, asked.trace.outputs
    rows = []
    for name, tokens in (("prompt", prompts), ("output", outputs), ("both", prompts + outputs)):
        points = np.percentile(tokens, PERCENTILES, method="inverted_cdf").tolist()
        rows.append((name, float(tokens.mean()), *points))
    return Section(
        "How long are its requests?",
        ("tokens", "mean", *(f"p{p}" for p in PERCENTILES)),
        rows,
        asked.line,
        name="trace_lengths",
        answer=f"prompts of {rows[0][1]:,.1f} and outputs of {rows[1][1]:,.1f} tokens in the mean, "
        f"the longest request {rows[2][-1]:,} tokens.",
    )


def prefixes(asked: TraceCase) -> Section:
    """What sharing prefixes could save at most; the simulation shares nothing."""
    hits, blocks = asked.trace.hash_hits, asked.trace.hash_blocks
    share = 100 * hits / blocks
    return Section(
        "How much of its prompts could be shared?",
        ("", "number"),
        [
            (f"blocks of {asked.trace.hash_block or 'unknown'} tokens in all prompts", blocks),
            ("leading blocks that an earlier prompt had", hits),
            ("of all, %", share),
        ],
        f"{asked.trace.name}, every row with lengths and a time, however long",
        name="trace_prefixes",
        keys=WHAT,
        answer=f"a cache without bound would find {share:.1f} % of the prompts' blocks, so no "
        "cache of prefixes finds more; nothing is shared in what follows.",
    )


def concurrency(asked: TraceCase, free: Served) -> Section:
    """Requests at a time when memory holds back none."""
    after = float(free.finishes.max()) - asked.trace.span_s
    answer = f"{free.peak:,} at the most, {free.mean:,.1f} in the mean"
    return Section(
        "How many requests run at a time, if memory holds back none?",
        ("one server", "number"),
        [
            ("most requests at a time", free.peak),
            ("mean over time", free.mean),
            ("mean seconds of a request", _seconds(asked, free)),
            ("seconds from the last arrival to the end", after),
        ],
        asked.line,
        name="trace_concurrency",
        keys=WHAT,
        answer="; ".join([answer, *falls_behind(asked, free)]) + ".",
    )


def _seconds(asked: TraceCase, served: Served) -> float:
    """Of a request from its arrival to its end, in the mean."""
    return float((served.finishes - asked.trace.arrivals).mean())


def as_it_is(asked: TraceCase, own: dict[str, Served | None]) -> Section:
    """One server with the memory that the plan leaves it."""
    count = len(asked.trace)
    rows = []
    for policy, found in own.items():
        cells = [None] * 6
        if found is not None:
            cells = [found.peak, found.mean, found.preemptions, found.kept_waiting]
            cells += [100 * found.held_up / count, _seconds(asked, found)]
        rows.append((policy, *cells))
    headers = ("policy", "most at a time", "mean", "preempted", "kept waiting", "held up, %")
    paged = own["paged"]
    answer = "a request of this trace does not fit alone"
    if paged is not None:
        answer = (
            f"paging preempts {counted(paged.preemptions, 'time')} and keeps "
            f"{paged.kept_waiting:,} of {counted(count, 'request')} waiting for blocks"
        )
    return Section(
        "What happens on one server as it is?",
        (*headers, "mean seconds of a request"),
        rows,
        f"{asked.line}; {counted(asked.case.plan.num_blocks, 'block')}",
        decimals=2,
        name="trace_as_it_is",
        answer=answer + ".",
    )


def pools(asked: TraceCase, needs: list[Need], line: str) -> Section:
    """The smallest memory of one server, by policy and share held up."""
    rows = []
    for need in needs:
        blocks, served = need.pool.num_blocks, need.pool.served
        sizes = blocks, _gib(asked, blocks), blocks / asked.case.plan.num_blocks
        told = served.peak, served.preemptions, served.kept_waiting
        rows.append((need.policy, 100 * need.rate, *sizes, *told))
    headers = ("policy", ALLOWED, "blocks", "GiB of K/V", "x this server's", "most at a time")
    blocks = {need.policy: need.pool.num_blocks for need in needs if need.rate == 0.0}
    times = {policy: f"{number / blocks['paged']:.2f}" for policy, number in blocks.items()}
    return Section(
        "What is the smallest K/V memory with which one server serves it?",
        (*headers, "preempted", "kept waiting"),
        rows,
        line,
        decimals=2,
        name="trace_pools",
        index=2,
        answer=f"with none held up paging takes {counted(blocks['paged'], 'block')}; exact "
        f"reservations take {times['oracle']} times that, powers of two {times['pow2']} and "
        f"full-length ones {times['max']} times.",
    )


def gpus(asked: TraceCase, needs: list[Need], line: str) -> Section:
    """Servers as they are, requests dealt to them in turn."""
    plan = asked.case.plan
    pool = counted(plan.num_blocks, "block")
    many = {need: need.servers and need.servers * plan.num_gpus for need in needs}
    plain = {need.policy: many[need] for need in needs if need.rate == 0.0}
    none = [policy for policy, number in plain.items() if number is None]
    told = [f"{NAMES.get(name, name)} {plain[name]:,}" for name in reversed(plain) if plain[name]]
    answer = f"GPUs for none held up: {', '.join(told)}" if told else "no number of GPUs will do"
    if none:
        answer += (
            f"; under {', '.join(none)} a request of this trace does not fit the {pool} of a server"
        )
    return Section(
        "How many GPUs serve it?",
        ("policy", ALLOWED, "servers", "GPUs"),
        [(need.policy, 100 * need.rate, need.servers, many[need]) for need in needs],
        f"{line}; {pool} a server",
        name="trace_gpus",
        index=2,
        answer=answer + ".",
    )


def seconds(asked: TraceCase, served: Served | None) -> Section:
    """What one server as it is makes of the trace, in seconds."""
    rows = []
    if served is not None:
        arrivals, outputs = asked.trace.arrivals, asked.trace.outputs
        ttft, tpot = times_of(served, arrivals, outputs)
        of_each = {"to the first token": ttft, "for each further token": tpot}
        of_each["in all"] = served.finishes - arrivals
        for name, taken in of_each.items():
            middle = np.percentile(taken, (50, 99)).tolist() if len(taken) else [None] * 2
            rows.append((name, float(taken.mean()) if len(taken) else None, *middle))
    answer = "a request of this trace does not fit alone"
    if rows:
        answer = (
            f"99 of 100 requests have their first token after {rows[0][3]:,.2f} s or sooner, and "
            f"{rows[0][2]:,.2f} s is the middle"
        )
    return Section(
        "What seconds do its requests take on one server as it is, with paging?",
        ("seconds", "mean", "p50", "p99"),
        rows,
        f"{asked.line}; {counted(asked.case.plan.num_blocks, 'block')}",
        decimals=4,
        name="trace_seconds",
        answer=answer + ".",
    )


def targeted(asked: TraceCase, targets: Targets, servers: int | None) -> Section:
    """Servers with which the times asked for are met."""
    plan = asked.case.plan
    many = servers and servers * plan.num_gpus
    answer = f"no number of servers gives 99 of 100 requests {targets}"
    if many:
        answer = f"{targets} for 99 of 100 requests takes {counted(many, 'GPU')}"
    return Section(
        "With how many GPUs are the seconds met?",
        ("s to the first token", "s for each further one", "servers", "GPUs"),
        [(targets.ttft_s, targets.tpot_s, servers, many)],
        f"{asked.line}; {counted(plan.num_blocks, 'block')} a server; requests dealt in turn",
        decimals=3,
        name="trace_targets",
        index=2,
        answer=answer + ".",
    )
