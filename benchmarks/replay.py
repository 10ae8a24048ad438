"""Replays what servers measured through our scheduler and latency model, ours beside theirs.

    python benchmarks/replay.py DIR --configs CONFIGS        # a run, or a folder of runs
    python benchmarks/replay.py silicon_sample.csv.gz --configs CONFIGS

Reproduces nothing of the paper (vllm_sim/sizing/measured_runs.py says what is read). A run gives
requests running while others wait, its end, latency, time to first token and per token, and the
mean error of single requests; a table, the errors by model. Models are presets or config.json files
in CONFIGS, found by name; those that cannot be sized are listed, not counted.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import Script, entry, options, show, table

from kv_cache_manager import CacheError
from vllm_sim.models import PRESETS, Model, load_model
from vllm_sim.reporting.arguments import keep_apart, positive
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.sizing.measured_runs import (
    MeasuredError,
    compare,
    errors_of_requests,
    read_run,
    read_table,
    replay,
    times_of,
)
from vllm_sim.sizing.speed import Precision, work_of

FIGURES = {
    "running": ("running while others wait", 1),
    "end": ("end, s", 1),
    "latency_mean": ("latency, mean, s", 1),
    "latency_p99": ("latency, p99, s", 1),
    "ttft_mean": ("first token, mean, s", 1),
    "tpot_mean": ("per token, mean, ms", 1000),
}
PER_REQUEST = {"latency": "latency", "ttft": "first token", "tpot": "per token"}
# What a name says of a checkpoint's form, not of the model's dimensions.
FORMS = re.compile(r"^meta-|-(instruct|2507|fp8|nvfp4)\b")


def key_of(name: str) -> str:
    """A model's name without its owner and without its form."""
    return FORMS.sub("", re.split(r"/|--|__", name)[-1].lower())


def finder(configs: Path | None) -> Callable[[str], Model]:
    """A function from a measured name to a model; it raises ValueError for one not to be had."""
    files = defaultdict(list)
    for path in sorted(configs.glob("*.json")) if configs else ():
        files[key_of(path.stem)].append(path)

    @cache
    def find(name: str) -> Model:
        key, told = key_of(name), f"{name}: no preset and no file of that name in --configs"
        if key in PRESETS:
            return PRESETS[key]
        for path in files[key]:
            try:
                return load_model(str(path))
            except ValueError as error:
                told = str(error)
        raise ValueError(told)

    return find


def of_run(folder: Path, find: Callable, num_blocks: int | None) -> list[dict[str, object]]:
    """A row for each figure of one run."""
    run = read_run(folder, num_blocks)
    work = work_of(find(run.model), Precision(), run.gpus, run.replicas)
    ours = replay(run, work)
    rows = []
    for name, (mine, theirs) in compare(run, ours).items():
        told, unit = FIGURES[name]
        known = mine is not None and theirs is not None
        row = {"run": run.name, "figure": told}
        row |= {"ours": unit * mine, "measured": unit * theirs} if known else {}
        rows.append(row | {"error_pct": 100 * (mine / theirs - 1) if known else None})
    for name, ratios in errors_of_requests(run, ours).items():
        error = 100 * float(np.mean(abs(ratios - 1)))
        told = f"{PER_REQUEST[name]}, mean error of a request"
        rows.append({"run": run.name, "figure": told, "error_pct": error})
    return [{"run": "", "figure": "", "ours": None, "measured": None} | row for row in rows]


def of_table(path: Path, script: Script, find: Callable) -> tuple[list[dict], dict[str, str]]:
    """(errors by model and of all, why models are not answered)."""
    found, refused = defaultdict(list), {}
    rows = read_table(path)
    for number, row in enumerate(rows):
        script.progress.at(number, len(rows), row.model)
        try:
            model = find(row.model)
        except ValueError as error:
            refused[row.model] = str(error)
            continue
        ttft, tpot = times_of(row, work_of(model, row.precision, row.gpus, row.replicas))
        found[row.model].append((tpot / row.tpot_s - 1, ttft / row.ttft_s - 1))
    script.progress.clear()
    everything = [one for errors in found.values() for one in errors]
    return [
        {"model": name, "rows": len(errors)} | _spread(np.array(errors))
        for name, errors in (*sorted(found.items()), ("all", everything))
        if errors
    ], refused


def _spread(errors: np.ndarray) -> dict[str, float]:
    """In percent: the middle error, and of its size the middle and nine in ten, of the time per
    token; and the middle size for the time to first token."""
    tpot, ttft = 100 * errors.T
    return {
        "tpot_bias_pct": float(np.median(tpot)),
        "tpot_median_pct": float(np.median(abs(tpot))),
        "tpot_p90_pct": float(np.percentile(abs(tpot), 90)),
        "ttft_median_pct": float(np.median(abs(ttft))),
    }


def run(argv: list[str] | None) -> int:
    parser = options(__doc__)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="a run, a folder of runs, or a table")
    add("--configs", type=Path, metavar="DIR", help="a folder of config.json files by model")
    told = "K/V blocks of a replica where the run does not say (default: enough for all)"
    add("--num-blocks", type=positive, metavar="N", help=told)
    script = Script(__file__, parser, argv, on_gpu=False)
    args, find = script.args, finder(script.args.configs)
    inside = [one for path in args.paths if path.is_dir() for one in path.rglob("*")]
    reads = [("PATH", path) for path in (*args.paths, *inside)]
    keep_apart(reads, [("--json", args.json)] if args.json else [])
    runs, tables, refused = [], [], {}
    try:
        for path in args.paths:
            if path.is_dir():
                inside = sorted(one.parent for one in path.glob("*/requests.jsonl"))
                for folder in inside or [path]:
                    runs += of_run(folder, find, args.num_blocks)
            else:
                rows, why = of_table(path, script, find)
                tables, refused = tables + rows, refused | why
    except (CacheError, MeasuredError, ValueError) as error:
        raise UsageError(str(error)) from None
    if runs:
        columns = [(header, header) for header in runs[0]]
        show(table("Runs", columns, runs, "vLLM's scheduler v1, server_latency.py", decimals=3))
    if tables:
        columns = [(header, header) for header in tables[0]]
        show(table("Errors of the time per token", columns, tables, "median sizes", decimals=1))
    for name, why in refused.items():
        print(f"not answered: {name}: {why}")
    found = {"runs": runs, "tables": tables, "refused": refused}
    return script.write(found, {"runs": 2, "tables": 1})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
