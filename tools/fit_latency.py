"""Finds the fitted constants of vllm_sim/serving/latency.py, FITTED and SWAP_*, in the paper.

    LENGTHS_DIR=data python tools/fit_latency.py            # minutes
    LENGTHS_DIR=data python tools/fit_latency.py --check --model opt-175b

Serves section 6. These constants rest on no more than

- the left ends of Fig. 12: the first points of each curve of Orca and vLLM, while their latency is
  below 1.25 times the first one's; and the first point of FasterTransformer on ShareGPT
  (`fitted_points` of curves.py, where reproduce.py looks too, to mark its rows on them);
- Fig. 1 (right): tokens/s of OPT-13B by batch size, where each request is taken to have the context
  with which Fig. 1's requests fill Table 1's slots;
- Fig. 19a's swapping, for SWAP_*: least squares of the relative error.

step_s and prompt_s are the multiples of 0.25 ms with the least root mean square of log(ours /
paper) over a model's points, all of equal weight, static_step_s that of 0.05 ms nearest to its
point. The search starts from nothing. Traces are as long as the paper's, but for Alpaca as the
artifact's, 600 s. Longer ones raise latencies by at most 2 %, but for three points where requests
begin to wait: by 4, and OPT-66B's by 11 and 17 %. So an hour would give OPT-66B 24.5 and 3 ms.

Exit code 1 if --check finds other constants than latency.py has, 2 for input that cannot be used.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from allocators import CacheError
from vllm_sim import models, paper
from vllm_sim.evaluation.curves import fitted_points
from vllm_sim.evaluation.experiments import Run, execute
from vllm_sim.reporting.arguments import OneLineParser
from vllm_sim.reporting.command_line import UsageError, exit_code
from vllm_sim.reporting.tables import Table, render
from vllm_sim.serving import latency
from vllm_sim.serving.latency import Software, Swap, latency_model
from vllm_sim.workload.data_sets import Lengths, find_lengths

GRID_S, STATIC_GRID_S = 0.25e-3, 0.05e-3
STRIDES = (64, 8, 1)  # grid steps
LONGEST_S = {"ShareGPT": math.inf, "Alpaca": float(paper.ARTIFACT_RUNS["Fig. 12"]["seconds"])}
FIG1_MODEL = "opt-13b"
SWAPPED_TOKENS = max(paper.BLOCK_SIZES)  # Fig. 19a moves as many as one of its largest blocks


@dataclass(frozen=True)
class Point:
    """A point of the paper: s/token of a run, or, where it is a batch size, Fig. 1's tokens/s."""

    source: Run | int
    paper: float

    def __str__(self) -> str:
        if isinstance(self.source, int):
            return f"Fig. 1, batch of {self.source}"
        return f"{self.source.dataset}, {self.source.system}, {self.source.rate:g} req/s"


def points_of(model: str) -> list[Point]:
    """What step_s and prompt_s are fitted to: Fig. 12, then Fig. 1 if it is of this model."""
    points = []
    for dataset, longest_s in LONGEST_S.items():
        seconds = min(float(paper.TRACE_SECONDS[model]), longest_s)
        for system in (*paper.ORCAS, paper.VLLM):
            for rate, at in fitted_points(dataset, model, system):
                points.append(Point(Run(system, model, dataset, float(rate), seconds), at))
    if model == FIG1_MODEL:
        points += [Point(batch, at) for batch, at in paper.FIG1_THROUGHPUT.items()]
    return points


def ours(source: Run | int, lengths: Lengths, software: Software) -> float:
    """What these constants give in place of a point. Fig. 1's are tokens/s of a decode step, each
    request at the context with which its requests fill Table 1's slots: 409 tokens."""
    if isinstance(source, Run):
        return execute(source, lengths, software=software).normalized_latency
    slots = 1000.0 * paper.TABLE1[FIG1_MODEL]["kilo_slots"]
    context = slots / paper.FIG1_FULL_AT[paper.VLLM + "_requests"]
    model = latency_model(models.DEPLOYMENTS[FIG1_MODEL], paper.BLOCK_SIZE, software)
    return source / model.decode_steps(1, source, round(source * context))


def log_ratios(points: Sequence[Point], lengths: Lengths, software: Software) -> list[float]:
    """log(ours / paper) of each point."""
    return [math.log(ours(at.source, lengths, software) / at.paper) for at in points]


def rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def descend(score: Callable[[int], float], start: int, stride: int) -> int:
    """The lowest number of grid steps seen while going from `start` either way, in strides, until
    it gets higher: single steps twice in a row, as latencies are not quite smooth."""
    best, lowest = start, score(start)
    for step in (stride, -stride):
        at, higher = best, 0
        while higher < (2 if stride == 1 else 1) and (at := at + step) >= 0:
            value, higher = score(at), higher + 1
            if value < lowest:
                best, lowest, higher = at, value, 0
    return best


def fit_software(points: Sequence[Point], lengths: Lengths) -> Software:
    """The step_s and prompt_s on the grid with the least rms over the points."""

    @cache
    def score(step: int, prompt: int) -> float:
        return rms(log_ratios(points, lengths, on_grid(step, prompt)))

    step = prompt = 0
    for stride in STRIDES:
        prompts = {step: prompt}  # the best for each step_s tried

        def profile(at: int, stride: int = stride, prompts: dict[int, int] = prompts) -> float:
            start = prompts[min(prompts, key=lambda tried: abs(tried - at))]
            prompts[at] = descend(partial(score, at), start, stride)
            return score(at, prompts[at])

        step = descend(profile, step, stride)
        prompt = prompts[step]
    return on_grid(step, prompt)


def on_grid(step: int, prompt: int, static: int = 0) -> Software:
    """Constants from numbers of grid steps, in whole nanoseconds as latency.py writes them."""
    in_s = (step * GRID_S, prompt * GRID_S, static * STATIC_GRID_S)
    return Software(*(round(value, 9) for value in in_s))


def fit_static(model: str, lengths: Lengths) -> float:
    """The static_step_s nearest to FasterTransformer's leftmost point on ShareGPT."""
    ((rate, at),) = fitted_points("ShareGPT", model, paper.FASTER_TRANSFORMER)
    run = Run(paper.FASTER_TRANSFORMER, model, "ShareGPT", rate, 3600.0)  # the artifact's hour

    def score(static: int) -> float:
        return rms(log_ratios([Point(run, at)], lengths, on_grid(0, 0, static)))

    static = 0
    for stride in STRIDES:
        static = descend(score, static, stride)
    return on_grid(0, 0, static).static_step_s


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
    fig12 = sum(isinstance(at.source, Run) for at in points)  # the first of them
    worst, at = max(zip(ratios, points), key=lambda pair: abs(pair[0]))
    in_ms = [1e3 * seconds for seconds in astuple(software)]
    parts = ratios[:fig12], ratios[fig12:], ratios
    percent = (100.0 * rms(part) if part else None for part in parts)
    return (name, *in_ms, len(points), *percent, f"{at}: {math.expm1(worst):+.1%}")


def check_software(names: Iterable[str], lengths: Lengths) -> list[str]:
    """Fit these models and print what is found; a line for each that latency.py has otherwise."""
    rows, other = [], []
    for name in names:
        points, present = points_of(name), latency.FITTED[name]
        found = replace(fit_software(points, lengths), static_step_s=fit_static(name, lengths))
        rows.append(row(name, found, points, lengths))
        if found != present:
            rows.append(row("(latency.py)", present, points, lengths))
            other.append(f"FITTED[{name!r}] is {present}, found {found}")
    headers = "", "step ms", "prompt ms", "static ms", "points", "Fig. 12", "Fig. 1", "all", "worst"
    table = Table("Constants; rms of log(ours / paper) in %", headers, rows, decimals=2)
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
