"""A sweep: one script over every combination of values, a cell at a time or all of them in turn.

Reproduces nothing by itself: main.py, reproduce.py and capacity.py do, in processes of their own,
so that no cell knows of another. docs/sweeps.md shows one under Slurm.

    python sweep.py --script capacity.py --model opt-13b,opt-66b --gpus 1,4 --list
    python sweep.py --scenario 1 --block-size 8,16,32 --seed 0,1,2            # all, in turn
    python sweep.py --scenario 1 --block-size 8,16,32 --seed 0,1,2 --cell 4   # this one
    sbatch --array=0-8 run_vllm_sim.slurm --sweep --scenario 1 --block-size 8,16,32 --seed 0,1,2
    python report.py results/sweep/*.json

Exit code 0, 1 if a check of a cell failed, 2 for input that cannot be used; the highest of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from vllm_sim.reporting import command_line
from vllm_sim.reporting.command_line import OneLineParser, UsageError, exit_code, folder

if __name__ == "__main__":
    command_line.begin("sweep.py", "tabulate")

from vllm_sim.reporting.documents import document
from vllm_sim.reporting.files import OutputError, check_writable, write_json
from vllm_sim.reporting.sweep_cells import SCRIPTS, Cell, expand, plan_file
from vllm_sim.reporting.sweep_table import read_document

ROOT = Path(__file__).resolve().parent
TASK = "SLURM_ARRAY_TASK_ID"


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="sweep.py",
        description="Run a script over every combination of values. All other options are the "
        "script's; one with a comma list has several values (--workload: 512,256/1000,300).",
        epilog=f"In an array job of Slurm the cell is {TASK}; without it, all run in turn.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--script",
        choices=SCRIPTS,
        default="main.py",
        metavar="NAME",
        help=f"one of {', '.join(SCRIPTS)} (default main.py)",
    )
    add(
        "--out",
        type=folder,
        default=Path("results/sweep"),
        metavar="DIR",
        help="for the results, one file a cell (default results/sweep)",
    )
    add("--cell", type=index, metavar="N", help="only this one, from 0")
    add("--list", action="store_true", help="say which cells there are, and run none")
    add("--again", action="store_true", help="run cells that are done, too")
    return parser


def index(text: str) -> int:
    """A cell's number, for argparse."""
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not the number of a cell")
    return int(text)


def chosen(args: argparse.Namespace, environment: Mapping[str, str], count: int) -> int | None:
    """The cell to run, None for all. UsageError if there is no such cell."""
    number, where = args.cell, "--cell"
    if number is None and environment.get(TASK):
        where = TASK
        try:
            number = index(environment[TASK])
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{TASK}: {error}") from None
    if number is not None and number >= count:
        cells = "1 cell, 0" if count == 1 else f"{count:,} cells, 0 to {count - 1:,}"
        raise UsageError(f"{where} {number}: the sweep has {cells}")
    return number


def plan(script: str, cells: Sequence[Cell]) -> dict[str, object]:
    """The document that lists the cells: the same whichever cell writes it."""
    rows = [{"cell": c.index, "file": c.file, "arguments": c.line} for c in cells]
    table = {
        "id": "cells",
        "title": "The cells of a sweep",
        "setting": "",
        "headers": ["cell", "file", "arguments"],
        "index": ["cell"],
        "rows": rows,
    }
    setting = {"script": script, "num_cells": len(cells)}
    return document(
        "sweep.py", {"script": script}, setting=setting, tables=[table], exit_code=0, elapsed_s=0.0
    )


def done_code(path: Path, script: str, cell: Cell) -> int | None:
    """The exit code of a cell whose result is there, None if it must run."""
    try:
        found = read_document(path)
    except UsageError:  # not there, or cut off by something that is not ours: it is written anew
        return None
    if "error" in found or found["exit_code"] == 2:  # so that it says why, again
        return None
    if (found["script"], found["options"]) != (script, cell.options):
        return None
    return found["exit_code"]


def run_cell(script: str, cell: Cell, path: Path) -> int:
    """Run it in a process of its own; its stderr is passed on. Returns its exit code."""
    start = time.perf_counter()
    command = [sys.executable, "-u", str(ROOT / script), *cell.arguments, "--json", str(path)]
    last = ""
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="backslashreplace"
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            last = line.strip() or last
            if sys.stderr is not None:
                sys.stderr.write(line)
                sys.stderr.flush()
    code = running.returncode
    if code == 2:  # so that report.py can tell why
        seconds = time.perf_counter() - start
        seeds = [cell.options["seed"]] if "seed" in cell.options else []
        write_json(
            path,
            document(
                script,
                cell.options,
                seeds=seeds,
                setting={},
                tables=[],
                exit_code=2,
                elapsed_s=seconds,
                error=last,
            ),
        )
    return code if code >= 0 else 128 - code


def parse_and_run(argv: list[str] | None) -> int:
    """The exit code. Raises UsageError for what cannot be used, before anything is written."""
    args, arguments = build_parser().parse_known_args(argv)
    cells = expand(args.script, arguments)
    number = chosen(args, os.environ, len(cells))
    wanted = cells if number is None else [cells[number]]
    if args.list:
        for cell in wanted:
            print(f"{cell.index:4}  {cell.file}  python {args.script} {cell.line}")
        last, count = len(cells) - 1, f"{len(cells)} cell{'s' * (len(cells) != 1)}"
        print(f"\n{count}: sbatch --array=0-{last} run_vllm_sim.slurm --sweep ...")
        return 0
    command_line.raise_on_interrupt()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write {args.out}: {reason}") from None
    for cell in wanted:
        check_writable(args.out / cell.file)
    write_json(args.out / plan_file(cells), plan(args.script, cells))
    worst = 0
    for cell in wanted:
        path, which = args.out / cell.file, f"cell {cell.index} of {len(cells)}"
        code = None if args.again else done_code(path, args.script, cell)
        told = "done before" if code is not None else "done"
        if code is None:
            print(f"{which}: python {args.script} {cell.line}", flush=True)
            code = run_cell(args.script, cell, path)
        print(f"{which}: {told}, exit code {code}: {path}", flush=True)
        worst = max(worst, code)
    return worst


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what cannot be used into one line and exit code 2."""
    return exit_code("sweep.py", partial(parse_and_run, argv))


if __name__ == "__main__":
    sys.exit(main())
