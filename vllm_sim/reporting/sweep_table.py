"""Many runs in one table: which options vary, means over the seeds, what failed, what is missing.

The order of the files, and files given twice, change nothing.
"""

import os
import time
from pathlib import Path
from statistics import fmean

from vllm_sim.reporting.arguments import Named, keep_apart
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.documents import Run, ascii_cell, document, read_run, rows_table
from vllm_sim.reporting.files import check_writable, print_then, write_json
from vllm_sim.reporting.tables import Table, counted, render, wrapped


def merge(paths: list[Path], writes: Named = ()) -> tuple[dict[str, Table], bool]:
    """The tables of these documents by id, "runs" with a row for each, and whether all held.

    A sweep's list of cells stands for them: those not there are missing. Raises UsageError, also
    where one of them is to be written.
    """
    runs: dict[str, Run] = {}
    for run in map(read_run, sorted(set(paths))):
        for one in run.listed or [run]:
            there = run.listed and os.path.lexists(one.path)
            runs.setdefault(os.path.realpath(one.path), read_run(one.path) if there else one)
    keep_apart([("--merge", run.path) for run in runs.values()], writes)
    scripts = {run.script: run.path for run in runs.values()}
    if len(scripts) > 1:
        several = ", ".join(f"{path} is of {script}" for script, path in sorted(scripts.items()))
        raise UsageError(f"{several}: merge one script at a time")
    kept: dict[str, Run] = {}
    for run in sorted(runs.values(), key=lambda run: run.path):
        if (first := kept.setdefault(repr(run.options), run)) != run:
            raise UsageError(f"{first.path} and {run.path} are the same cell with other results")
    options = [run.options for run in kept.values()]
    names = dict.fromkeys(name for one in options for name in one)
    vary = [name for name in names if len({repr(one.get(name)) for one in options}) > 1]
    cells = sorted(kept.values(), key=lambda run: [_rank(run.options.get(n)) for n in vary])
    rows = [(ascii_cell(run.path.name), *run.chosen(vary), ascii_cell(run.told)) for run in cells]
    held = sum(run.code == 0 for run in cells)
    title = f"{ascii_cell(*scripts)}: {held} of {counted(len(cells), 'cell')} held"
    shown = Table(title, ("file", *map(ascii_cell, vary), "result"), rows)
    return {"runs": shown} | _means(cells, vary), held == len(cells)


def _means(runs: list[Run], vary: list[str]) -> dict[str, Table]:
    """Every number by row, column and options: its mean over the seeds, and between what it is."""
    vary = [name for name in vary if name != "seed"]
    found: dict[str, dict[tuple, dict[tuple, list[float]]]] = {}
    for run in runs:
        for (table, *label), value in run.figures.items():
            choices = found.setdefault(table, {}).setdefault(tuple(label), {})
            choices.setdefault(run.chosen(vary), []).append(value)
    headers = ("row", "column", *map(ascii_cell, vary), "mean", "lowest", "highest", "cells")
    tables = {}
    for name, labels in found.items():
        rows = [
            (*label, *chosen, fmean(values), float(min(values)), float(max(values)), len(values))
            for label, choices in labels.items()
            for chosen, values in choices.items()
        ]
        tables[name] = Table(f"{name}: means over the seeds", headers, rows, decimals=2)
    return tables


def merge_and_show(paths: list[Path], names: list[str], out: Path | None, fmt: str) -> int:
    """Print tables and what became of the cells; write all to `out`. 0 if every cell held."""
    start = time.perf_counter()
    if out is not None:
        check_writable(out)
    tables, held = merge(paths, [] if out is None else [("--json", out)])
    for name in set(names) - {*tables}:
        raise UsageError(f"--table {name[:40]!a}: the files have {', '.join(tables)}")

    def keep() -> None:
        found = {"setting": {}, "exit_code": int(not held), "tables": []}
        for name, one in tables.items():
            rows = [dict(zip(one.headers, row, strict=True)) for row in one.rows]
            found["tables"].append(rows_table(name, one.title, rows))
        if out is not None:
            found["elapsed_s"] = time.perf_counter() - start
            write_json(out, document("sweep.py", {"merge": paths, "table": names}, **found))

    def show() -> None:
        for name in dict.fromkeys((*names, "runs")):
            print(render(tables[name], fmt), end="\n\n")
        print(wrapped(f"--table shows one of {', '.join(tables)}", "% " * (fmt == "latex")))

    print_then(keep, show)
    return int(not held)


def _rank(value: object) -> tuple[bool, bool, float, str]:
    """For sorting: nothing first, then numbers by size, then all else as text."""
    number = type(value) in (int, float)
    return value is not None, not number, value if number else 0, repr(value)
