"""Seconds to simulate a trace, event by event, against iteration by iteration in the same run.

    python benchmarks/bench_serving.py [--repeats 3] [--traces DIR] [--json FILE]

    13B single      ShareGPT at 2 requests/s for an hour, OPT-13B on one A100-40GB
    13B parallel 6  Alpaca, six samples, 7 requests/s, an hour
    13B beam 6      Alpaca, beam width 6, 7 requests/s, an hour
    10 h            the first, ten times as long, at the rate that keeps it below the knee, and
    98,300 blocks   in a pool a hundred times as large: a decode token costs the same
    Azure           the conversation trace of 2023-11-16, if --traces names a folder that has it

The peer is the plain mode of the same simulator, which takes every iteration by itself; `speed-up`
is the ratio to it (only for the first two: the others would take minutes). The limit is a Python
call that does nothing: `x call` is a decode token's cost over it.
"""

from __future__ import annotations

import gc
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import Script, entry, options, show, table

from allocators import CacheError
from vllm_sim.evaluation.experiments import Run, groups_for, latency_of, manager_for
from vllm_sim.paper import MAX_BATCHED_TOKENS, VLLM
from vllm_sim.reporting.arguments import folder
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.serving.simulator import ServingResult, simulate
from vllm_sim.serving.systems import limits_of
from vllm_sim.workload.data_sets import find_lengths
from vllm_sim.workload.text_files import WorkloadError
from vllm_sim.workload.traces import read_trace

AZURE = "AzureLLMInferenceTrace_conv.csv.gz"
HOUR = 3600.0
SINGLE = Run(VLLM, "opt-13b", "ShareGPT", 2.0, HOUR)
ALPACA = replace(SINGLE, dataset="Alpaca", rate=7.0, width=6)
RUNS = {  # name: (run, factor on the number of blocks, also in plain mode)
    "13B single, 2.0/s, 1 h": (SINGLE, 1, True),
    "13B parallel 6, 7.0/s, 1 h": (replace(ALPACA, decoding="parallel"), 1, True),
    "13B beam 6, 7.0/s, 1 h": (replace(ALPACA, decoding="beam"), 1, False),
    "13B single, 1.5/s, 1 h": (replace(SINGLE, rate=1.5), 1, False),
    "13B single, 1.5/s, 10 h": (replace(SINGLE, rate=1.5, seconds=10 * HOUR), 1, False),
    "13B single, 1.5/s, 1 h, 98,300 blocks": (replace(SINGLE, rate=1.5), 100, False),
}


def empty() -> None:
    """The least that one call per token can cost."""


def seconds_per_call() -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200_000):
            empty()
        best = min(best, time.perf_counter() - start)
    return best / 200_000


def simulate_once(
    run: Run, columns: tuple[list, list, list], pool: int, plain: bool
) -> tuple[float, ServingResult]:
    """(seconds of the simulation alone, its result)."""
    groups = groups_for(run, columns)
    manager = manager_for(run)
    if pool > 1:
        manager = type(manager)(pool * manager.num_blocks, manager.block_size)
    limits = limits_of(run.system)
    gc.disable()
    start = time.perf_counter()
    result = simulate(groups, manager, limits, latency_of(run), plain=plain)
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds, result


def azure_columns(path: Path) -> tuple[list, list, list]:
    """Arrivals, prompts and outputs of the trace; what exceeds 2,560 tokens is cut to fit.

    Raises WorkloadError.
    """
    trace = read_trace(path)
    if trace.arrivals is None:
        raise WorkloadError(f"{path}: no column of times")
    outputs = np.minimum(trace.outputs, MAX_BATCHED_TOKENS - 1)
    prompts = np.minimum(trace.prompts, MAX_BATCHED_TOKENS - outputs)
    return trace.arrivals.tolist(), prompts.tolist(), outputs.tolist()


def measure(
    name: str, run: Run, columns: tuple[list, list, list], pool: int, plain: bool, repeats: int
) -> dict[str, str | float | int | None]:
    """The best of some repeats, and the plain mode once."""
    times, result = [], None
    for _ in range(repeats):
        seconds, result = simulate_once(run, columns, pool, False)
        times.append(seconds)
    tokens = run.width * (sum(columns[2]) - len(columns[2]))
    peer = simulate_once(run, columns, pool, True)[0] if plain else None
    return {
        "trace": name,
        "requests": len(columns[0]),
        "decode_tokens": tokens,
        "iterations": result.num_iterations,
        "seconds": min(times),
        "ns_per_token": 1e9 * min(times) / tokens,
        "plain_seconds": peer,
        "speed_up": peer / min(times) if peer else None,
    }


def run(argv: list[str] | None) -> int:
    parser = options(__doc__, repeats=3, counts="best")
    parser.add_argument("--traces", type=folder, metavar="DIR", help="a folder with length files")
    script = Script(__file__, parser, argv, on_gpu=False)
    traces, repeats = script.args.traces, script.args.repeats
    call_s = seconds_per_call()
    try:
        lengths = find_lengths([], str(traces) if traces else None)
        runs = {
            name: (case, lengths.columns(case.dataset, case.rate, case.seconds, case.seed), *how)
            for name, (case, *how) in RUNS.items()
        }
        if traces and (traces / AZURE).exists():
            columns = azure_columns(traces / AZURE)
            runs["Azure conversations, 2023"] = SINGLE, columns, 1, False
        rows = [measure(name, *runs[name], repeats) for name in script.each(runs)]
    except (CacheError, WorkloadError) as error:
        raise UsageError(str(error)) from None
    for row in rows:
        row["x_call"] = 1e-9 * row["ns_per_token"] / call_s
    setting = f"Python {platform.python_version()}, best of {repeats}, an empty call takes "
    setting += f"{1e9 * call_s:.0f} ns"
    show(table("Seconds to simulate", zip(rows[0], rows[0]), rows, setting, decimals=3))
    return script.write({"empty_call_ns": 1e9 * call_s, "rows": rows}, {"rows": 1})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
