"""Scenario 4's requests from a real trace: its lengths, its order, its bursts.

Reproduces: section 4.4's mixed decoding on requests that servers recorded; a trace says nothing of
samples, beams or prefixes, so these are assigned in the scenario's own proportions, at random.

    requests = requests_of(read_trace("azure.csv.gz"), options, 2048, 320, 0.5, rng)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from traces import Trace
from workload import Request


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
