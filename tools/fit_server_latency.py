"""Finds the fitted constants of vllm_sim/serving/server_latency.py in measurements.

    python tools/fit_server_latency.py RUN --configs DIR             # FITTED
    python tools/fit_server_latency.py TABLE.csv.gz --configs DIR    # HOPPER and NVLink's latency
    ... --check

Reproduces nothing of the paper. RUN is LLMServingSim's of Llama 3.1 8B on an RTX 4090: the least
root mean square, over requests, of log(ours / theirs) of the latency and of the time per token, and
of the end. TABLE is aiconfigurator's: the least mean of |log(ours / theirs)| of the time per token,
which its odd rows do not rule, over the rows of MODEL alone.
From START each constant goes up and down by 8, 4, 2 and 1 times its GRID while that helps. What a
run cannot tell apart is tied: attention has the share of FLOPS that matrices have, the table takes
this share from the run.

Exit code 1 if --check finds other constants than server_latency.py has, 2 for unusable input.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from replay import finder

from vllm_sim.reporting.arguments import OneLineParser
from vllm_sim.reporting.command_line import UsageError, exit_code
from vllm_sim.serving.server_latency import FITTED, HOPPER, LINKS
from vllm_sim.sizing.measured_runs import (
    MeasuredError,
    compare,
    errors_of_requests,
    read_run,
    read_table,
    replay,
    times_of,
    with_constants,
)
from vllm_sim.sizing.speed import Precision, work_of

MODEL = "Qwen/Qwen3-32B"
GRID = {
    "bandwidth": 0.01,
    "flops": 0.01,
    "kernel_s": 0.25e-6,
    "tail": 0.05,
    "most_tail": 0.05,
    "latency_s": 1e-6,
}
START = {"bandwidth": 0.92, "flops": 0.9, "kernel_s": 1.5e-6, "tail": 1.2, "most_tail": 0.6}
HOPPER_START = {"bandwidth": 0.85, "kernel_s": 5e-6, "latency_s": 10e-6}
MOST = {"bandwidth": 0.95}  # a share that no kernel exceeds


def search(start: dict[str, float], error: Callable[[dict[str, float]], float]) -> dict[str, float]:
    """The constants, on the grid, from which no single step of any size is better."""
    best, least = start, error(start)
    for scale in (8, 4, 2, 1):
        moved = True
        while moved:
            moved = False
            for name in start:
                for sign in (1, -1):
                    value = round(best[name] + sign * scale * GRID[name], 9)
                    if not 0.0 < value <= MOST.get(name, np.inf):
                        continue
                    tried = best | {name: value}
                    if (found := error(tried)) < least - 1e-9:
                        best, least, moved = tried, found, True
                        break
    return best


def tied(constants: dict[str, float]) -> dict[str, float]:
    """With the attention's share of FLOPS, which is that of matrices."""
    if "flops" in constants:
        return constants | {"attention_flops": constants["flops"]}
    return constants


def fit_run(folder: Path, find: Callable) -> dict[str, float]:
    run = read_run(folder, None)
    work = work_of(find(run.model), Precision(), run.gpus, run.replicas)

    def error(constants: dict[str, float]) -> float:
        ours = replay(run, work, with_constants(run.card, **tied(constants)))
        end, theirs = compare(run, ours)["end"]
        logs = errors_of_requests(run, ours)
        squares = [float(np.mean(np.log(logs[name]) ** 2)) for name in ("latency", "tpot")]
        return (sum(squares) + np.log(end / theirs) ** 2) ** 0.5

    return tied(search(START, error))


def fit_table(path: Path, find: Callable) -> dict[str, float]:
    rows = [row for row in read_table(path) if row.model == MODEL]
    if not rows:
        raise MeasuredError(f"{path}: no rows of {MODEL}")
    cases = [(row, work_of(find(row.model), row.precision, row.gpus, row.replicas)) for row in rows]

    def error(constants: dict[str, float]) -> float:
        logs = []
        for row, work in cases:
            card = with_constants(row.card, **constants)
            logs.append(np.log(times_of(row, work, card)[1] / row.tpot_s))
        return float(np.mean(np.abs(logs)))

    return search(HOPPER_START, error)


def run() -> int:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, metavar="PATH", help="the run, or the table")
    parser.add_argument("--configs", type=Path, metavar="DIR", help="a folder of config.json files")
    parser.add_argument("--check", action="store_true", help="fail unless the code has the same")
    args = parser.parse_args()
    find = finder(args.configs)
    try:
        if args.path.is_dir():
            found, now = fit_run(args.path, find), asdict(FITTED)
        else:
            found = fit_table(args.path, find)
            now = asdict(HOPPER) | {"latency_s": LINKS["nvlink"].latency_s}
    except (MeasuredError, ValueError) as error:
        raise UsageError(str(error)) from None
    for name, value in found.items():
        print(f"{name:16} {value:.9g}   (server_latency.py: {now[name]:.9g})")
    return int(args.check and any(abs(found[name] - now[name]) > 1e-12 for name in found))


if __name__ == "__main__":
    sys.exit(exit_code(Path(__file__).name, run))
