"""Finds the fitted constants of vllm_sim/serving/latency.py, FITTED and SWAP_*, in the paper.

    LENGTHS_DIR=data python tools/fit_latency.py            # minutes
    LENGTHS_DIR=data python tools/fit_latency.py --check --model opt-175b

Serves section 6. These constants rest on no more than

- the left ends of Fig. 12: the first points of each curve of Orca and vLLM, while their latency is
  below 1.25 times the first one's; and the first point of FasterTransformer on ShareGPT
  (`fitted_points` of curves.py, where reproduce.py looks too, to mark its rows on them);
- the left ends of Fig. 16 for LLaMA-13B, and those of Fig. 14's beam search for what beams cost;
- Fig. 1 (right): tokens/s of OPT-13B by batch size, where each request is taken to have the context
  with which Fig. 1's requests fill Table 1's slots;
- Fig. 19a: a lone prompt of 256 tokens (the median of what is drawn, without the artifact's factor
  of 0.9), and for SWAP_* swapping: least squares of the relative error.

Each has the least root mean square of log(ours / paper) over a model's points, all of equal weight,
found by Gauss and Newton's method with differences, and is rounded to GRID. static_step_s is the
multiple of 0.05 ms nearest to its point. Traces are as long as the paper's, but for Alpaca as the
artifact's, 600 s: longer ones raise latencies by at most 2 %, but where requests begin to wait.

Exit code 1 if --check finds other constants than latency.py has, 2 for input that cannot be used.
"""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from allocators import CacheError
from vllm_sim import paper
from vllm_sim.evaluation.curves import fitted_points, left_end
from vllm_sim.evaluation.experiments import Run, execute, latency_of
from vllm_sim.evaluation.figures_rates import CurveFigure, Fig14, Fig16
from vllm_sim.models import DEPLOYMENTS
from vllm_sim.reporting.arguments import OneLineParser
from vllm_sim.reporting.command_line import UsageError, exit_code
from vllm_sim.reporting.tables import Table, render
from vllm_sim.serving import latency
from vllm_sim.serving.latency import Software, Swap, latency_model
from vllm_sim.serving.scheduler import Iteration
from vllm_sim.workload.data_sets import Lengths, find_lengths

GRID = {  # s
    "step_s": 0.25e-3,
    "request_s": 0.25e-3,
    "seq_s": 0.005e-3,
    "static_step_s": 0.05e-3,
    "beam_s": 0.02e-3,
    "copy_call_s": 0.1e-6,
}
START = Software(step_s=10e-3, seq_s=0.2e-3, request_s=5e-3)
MOST_ROUNDS = 12
LONGEST_S = {"ShareGPT": math.inf, "Alpaca": float(paper.ARTIFACT_RUNS["Fig. 12"]["seconds"])}
FIG1_MODEL = "opt-13b"
SWAPPED_TOKENS = max(paper.BLOCK_SIZES)  # Fig. 19a moves as many as one of its largest blocks


@dataclass(frozen=True)
class Point:
    """A point of the paper: s/token of a run, or Fig. 1's tokens/s of a batch, or Fig. 19a's
    seconds of a lone prompt."""

    source: Run | int | str
    paper: float

    def __str__(self) -> str:
        if isinstance(self.source, int):
            return f"Fig. 1, batch of {self.source}"
        if isinstance(self.source, str):
            return "Fig. 19a, recompute"
        return f"{self.source.dataset}, {self.source.system}, {self.source.rate:g} req/s"


def points_of(model: str) -> list[Point]:
    """What the constants of a model are fitted to: Fig. 12 or 16, then Fig. 1 if it is of this
    model, and Fig. 19a, which is of models of OPT-13B's shape."""
    points = []
    for dataset, longest_s in LONGEST_S.items():
        if (dataset, model) not in paper.FIG12_CURVES:
            continue
        seconds = min(float(paper.TRACE_SECONDS[model]), longest_s)
        for system in (*paper.ORCAS, paper.VLLM):
            for rate, at in fitted_points(dataset, model, system):
                points.append(Point(Run(system, model, dataset, float(rate), seconds), at))
    if not points:
        points = left_ends(Fig16())
    if model == FIG1_MODEL:
        points += [Point(batch, at) for batch, at in paper.FIG1_THROUGHPUT.items()]
    if DEPLOYMENTS[model].model.num_layers == DEPLOYMENTS[FIG1_MODEL].model.num_layers:
        drawn = median(paper.FIG19A["recompute"].values())
        points.append(Point(model, 1e-3 * drawn / paper.FIG19A_RECOMPUTE_FACTOR))
    return points


def left_ends(
    figure: CurveFigure, decoding: str = "single", longest_s: float = math.inf
) -> list[Point]:
    """The points of the left ends of all curves of a figure with this decoding."""
    return [
        Point(replace(curve.at(float(rate)), seconds=min(curve.run.seconds, longest_s)), at)
        for panel in figure.curves.values()
        for curve in panel.values()
        if curve.run.decoding == decoding
        for rate, at in left_end(curve.paper)
    ]


def ours(source: Run | int | str, lengths: Lengths, software: Software) -> float:
    """What these constants give in place of a point. Fig. 1's are tokens/s of a decode step, each
    request at the context with which its requests fill Table 1's slots: 409 tokens."""
    if isinstance(source, Run):
        speed = latency_of(source, software)
        return execute(source, lengths, latency=speed).normalized_latency
    if isinstance(source, str):
        model = latency_model(DEPLOYMENTS[source], paper.BLOCK_SIZE, software)
        return model.iteration(Iteration(0, 0.0, num_seqs=1, prompt_tokens=SWAPPED_TOKENS))
    slots = 1000.0 * paper.TABLE1[FIG1_MODEL]["kilo_slots"]
    context = slots / paper.FIG1_FULL_AT[paper.VLLM + "_requests"]
    model = latency_model(DEPLOYMENTS[FIG1_MODEL], paper.BLOCK_SIZE, software)
    return source / model.decode_steps(1, source, round(source * context))


def log_ratios(points: Sequence[Point], lengths: Lengths, software: Software) -> list[float]:
    """log(ours / paper) of each point."""
    return [math.log(ours(at.source, lengths, software) / at.paper) for at in points]


def rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def fit(
    points: Sequence[Point], lengths: Lengths, start: Software, names: Sequence[str]
) -> Software:
    """`start` with the constants of these names that have the least rms, none below 0."""
    # Times jump a little where another iteration takes an arrival: wide differences see past that.
    steps = 4.0 * np.array([GRID[name] for name in names])

    def errors(values: np.ndarray) -> np.ndarray:
        constants = dict(zip(names, values.tolist()))
        return np.array(log_ratios(points, lengths, replace(start, **constants)))

    best = np.array([getattr(start, name) for name in names])
    found = errors(best)
    for _ in range(MOST_ROUNDS):
        slopes = np.stack([errors(best + row) - found for row in np.diag(steps)], axis=1) / steps
        move = np.linalg.lstsq(slopes, -found, rcond=None)[0]
        slopes[:, (best == 0.0) & (move < 0.0)] = 0.0  # these stay at 0
        move = np.linalg.lstsq(slopes, -found, rcond=None)[0]
        tried = np.maximum(best + move, 0.0)
        after = errors(tried)
        if rms(after.tolist()) >= 0.9999 * rms(found.tolist()):
            break
        best, found = tried, after
    rounded = [round(round(at / GRID[name]) * GRID[name], 9) for name, at in zip(names, best)]
    return replace(start, **dict(zip(names, rounded)))


def fit_static(model: str, lengths: Lengths) -> float:
    """The static_step_s nearest to FasterTransformer's leftmost point on ShareGPT."""
    ((rate, at),) = fitted_points("ShareGPT", model, paper.FASTER_TRANSFORMER)
    run = Run(paper.FASTER_TRANSFORMER, model, "ShareGPT", rate, 3600.0)  # the artifact's hour
    return fit([Point(run, at)], lengths, START, ("static_step_s",)).static_step_s


def fit_model(model: str, lengths: Lengths) -> Software:
    """All constants of a model. Fig. 16's few points leave LLaMA-13B's seq_s open: OPT-13B's."""
    if ("ShareGPT", model) not in paper.FIG12_CURVES:
        start = replace(START, seq_s=latency.FITTED[FIG1_MODEL].seq_s)
        return fit(points_of(model), lengths, start, ("step_s", "request_s"))
    found = fit(points_of(model), lengths, START, ("step_s", "request_s", "seq_s"))
    found = replace(found, static_step_s=fit_static(model, lengths))
    if model != FIG1_MODEL:
        return found
    beams = left_ends(Fig14(), "beam", LONGEST_S["Alpaca"])
    return fit(beams, lengths, found, ("beam_s", "copy_call_s"))


def fit_swap(milliseconds: dict[int, float]) -> tuple[Swap, list[float]]:
    """From Fig. 19a's ms by block size: the constants, to 1 and 0.1 us, and relative errors."""
    sizes = np.array(list(milliseconds), dtype=float)
    blocks = SWAPPED_TOKENS / sizes / (1e-3 * np.array(list(milliseconds.values())))
    parts = np.stack([blocks, blocks * sizes], axis=1)  # of the time drawn
    call_s, slot_s = np.linalg.lstsq(parts, np.ones(len(sizes)), rcond=None)[0].tolist()
    swap = Swap(round(call_s, 6), round(slot_s, 7))
    return swap, (parts @ [swap.call_s, swap.slot_s] - 1.0).tolist()


def row(name: str, software: Software, points: Sequence[Point], lengths: Lengths) -> tuple:
    """A row of the table: the constants of a model, and how far they are from its points."""
    ratios = log_ratios(points, lengths, software)
    worst, at = max(zip(ratios, points), key=lambda pair: abs(pair[0]))
    *in_s, call_s = astuple(software)
    in_ms = [1e3 * seconds for seconds in (*in_s, 1e3 * call_s)]
    return (name, *in_ms, len(points), 100.0 * rms(ratios), f"{at}: {math.expm1(worst):+.1%}")


def check_software(names: Iterable[str], lengths: Lengths) -> list[str]:
    """Fit these models and print what is found; a line for each that latency.py has otherwise."""
    rows, other = [], []
    for name in names:
        points, present = points_of(name), latency.FITTED[name]
        found = fit_model(name, lengths)
        rows.append(row(name, found, points, lengths))
        if found != present:
            rows.append(row("(latency.py)", present, points, lengths))
            other.append(f"FITTED[{name!r}] is {present}, found {found}")
    headers = "", "step", "seq", "request", "static", "beam", "copy us", "points", "rms %", "worst"
    table = Table("Constants in ms; rms of log(ours / paper)", headers, rows, decimals=3)
    print(render(table, "plain") + "\n", flush=True)
    return other


def check_swaps() -> list[str]:
    """The same for SWAP_IN and SWAP_OUT."""
    rows, other = [], []
    for name, figure in (("SWAP_IN", "swap in"), ("SWAP_OUT", "swap out")):
        (found, errors), present = fit_swap(paper.FIG19A[figure]), getattr(latency, name)
        in_ms, worst = (1e3 * found.call_s, 1e3 * found.slot_s), max(errors, key=abs)
        rows.append((name, *in_ms, 100.0 * rms(errors), f"{worst:+.1%}"))
        if found != present:
            other.append(f"{name} is {present}, found {found}")
    headers = ("", "call ms", "slot ms", "rms %", "worst")
    print(render(Table("Swapping", headers, rows, decimals=4), "plain"))
    return other


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (0, 1, or 2 with a line on stderr)."""
    return exit_code("fit_latency.py", partial(parse_and_fit, arguments))


def parse_and_fit(arguments: list[str] | None) -> int:
    """0, or 1 if --check finds other constants. Raises UsageError."""
    parser = OneLineParser(description="find the fitted constants of latency.py")
    parser.add_argument("--check", action="store_true", help="exit 1 if latency.py has others")
    parser.add_argument("--model", action="append", choices=tuple(latency.FITTED), help="only it")
    options = parser.parse_args(arguments)
    try:
        lengths = find_lengths([], os.environ.get("LENGTHS_DIR"))
        if options.check and not set(LONGEST_S) <= set(lengths.files):
            raise UsageError("--check needs LENGTHS_DIR, a folder of the full length files")
        print(*(f"{name}: {lengths.source(name)}" for name in LONGEST_S), "", sep="\n", flush=True)
        other = check_software(dict.fromkeys(options.model or latency.FITTED), lengths)
    except (CacheError, ValueError) as error:  # bad lengths, or a request that no memory holds
        raise UsageError(str(error)) from None
    other += check_swaps()
    if options.check:
        print("", *(other or ["latency.py has what is found"]), sep="\n")
    return 1 if options.check and other else 0


if __name__ == "__main__":
    raise SystemExit(main())
