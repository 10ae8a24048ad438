"""The cells of a sweep: one for every combination of the values that options are given.

An option with a comma list has several values (`--seed 0,1,2`); the first option varies slowest.
Each cell has a file of its own, named after what it runs, so that sweeps share a folder and a
sweep that grows keeps what is done; beside it, as .log, is what the script printed.
"""

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from vllm_sim.reporting.arguments import OneLineParser, keep_apart
from vllm_sim.reporting.command_line import UsageError, end_with_parent
from vllm_sim.reporting.documents import Json, document, read_run, rows_table, told
from vllm_sim.reporting.files import make_folder, write_json

SEPARATOR = {"--workload": "/"}  # whose own values have commas
PATHS = ("--lengths", "--trace")  # are never a list; capacity.py's --lengths is no path
OURS = ("--json", "--figures", "--timeline", "--help", "-h")  # what a cell writes is settled
LOG = ".log"  # in place of .json: what a cell printed
MAX_CELLS = 10_000


@dataclass(frozen=True)
class Cell:
    """One run of a script; `options` are what --json will tell of its arguments."""

    index: int
    arguments: tuple[str, ...]
    options: Json
    file: str

    @property
    def line(self) -> str:
        return shlex.join(self.arguments)


def expand(script: str, parser: OneLineParser, arguments: list[str]) -> list[Cell]:
    """The cells, in order. UsageError, one line, for the first that the script would refuse."""
    axes = _axes(arguments, ("--trace",) if script == "capacity.py" else PATHS)
    count = math.prod(len(axis) for axis in axes)
    if count > MAX_CELLS:
        raise UsageError(f"a sweep of {count:,} cells: at most {MAX_CELLS:,}")
    cells: dict[str, Cell] = {}
    for index, words in enumerate(product(*axes)):
        try:
            options = told(vars(parser.parse_args(words)))
        except UsageError as error:
            raise UsageError(f"cell {index}: {error}") from None
        varied = sorted(word for word, axis in zip(words, axes, strict=True) if len(axis) > 1)
        name = re.sub(r"[^A-Za-z0-9._]+", "-", "".join(varied))[:80].strip("-.")
        digest = _digest([script, options])
        stem = "-".join(filter(None, (script.removesuffix(".py"), name, digest)))
        cell = Cell(index, words, options, f"{stem}.json")
        if (first := cells.setdefault(digest, cell)) is not cell:
            raise UsageError(f"cells {first.index} and {index} are the same: {cell.line}")
    return list(cells.values())


def _axes(arguments: list[str], paths: tuple[str, ...]) -> list[list[str]]:
    """For each option its values, as words of the form --option=value; a flag is one word."""
    axes: list[list[str]] = []
    for word in arguments:
        name, equals, text = word.partition("=")
        if not word.startswith("--"):  # a value, behind an option that is a word of its own
            if not axes or "=" in axes[-1][0]:
                raise UsageError(f"unrecognized arguments: {word}")
            (name,), equals, text = axes.pop(), "=", word
        if name in OURS:
            raise UsageError(f"{name} is not for a sweep: each cell writes a file of its own")
        values = text.split(SEPARATOR.get(name, ",")) if name not in paths else [text]
        axes.append([f"{name}{equals}{value}" for value in values])
    return axes


def _digest(value: object) -> str:
    """Eight hexadecimal digits that differ for anything else."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()[:8]


def write_list(script: str, cells: list[Cell], out: Path) -> None:
    """The file that lists the cells, the same whichever cell writes it: so a merge finds a gap."""
    found = {"setting": {"script": script, "num_cells": len(cells)}, "exit_code": 0}
    found["tables"] = [rows_table("cells", "The cells of a sweep", [*map(vars, cells)])]
    name = f"sweep-{_digest([cell.file for cell in cells])}.json"
    write_json(out / name, document("sweep.py", {"script": script}, elapsed_s=0.0, **found))


def make_place(parser: OneLineParser, cells: list[Cell], wanted: list[Cell], out: Path) -> None:
    """The folder and the list of cells in it. UsageError for what cannot be written, or is read by
    a cell, and for a pipe, which could be read once."""
    reads = [one for cell in wanted for one in parser.files(parser.parse_args(cell.arguments))[0]]
    for option, path in reads:
        with suppress(OSError):  # of a name that is too long: the cell will tell
            if path.is_fifo():
                raise UsageError(f"{option} {path} is a pipe: a sweep needs a file")
    names = [cell.file for cell in wanted]
    names += [name.removesuffix(".json") + LOG for name in names]
    keep_apart(reads, [("--out", out / name) for name in names])
    make_folder(out, names)
    write_list(parser.prog, cells, out)


def run_all(script: Path, cells: list[Cell], out: Path, again: bool) -> int:
    """Run in turn the cells that are not done, or all `again`. Returns the highest exit code."""
    worst = 0
    for cell in cells:
        path, code, told = out / cell.file, None, "done before"
        with suppress(UsageError):  # not there, or cut off by something else: it is written anew
            run = read_run(path)
            if not again and (run.script, run.options) == (script.name, cell.options):
                code = run.code if run.code in (0, 1) else None
        if code is None:
            code, told = run_cell(script, cell, path), "done"
        print(f"cell {cell.index}: {told}, exit code {code}: {path}", flush=True)
        worst = max(worst, code)
    return worst


def run_cell(script: Path, cell: Cell, path: Path) -> int:
    """Run it in a process of its own; its stderr is passed on. Returns its exit code."""
    start, last = time.perf_counter(), ""
    command = [sys.executable, "-u", script, *cell.arguments, "--json", path]
    pipe = {"stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "backslashreplace"}
    pipe["preexec_fn"] = partial(end_with_parent, os.getpid())
    with (
        path.with_suffix(LOG).open("wb") as log,
        subprocess.Popen(command, stdout=log, **pipe) as running,
    ):
        for line in running.stderr:
            last = line.strip() or last
            if sys.stderr is not None:
                print(f"cell {cell.index}: {line}", end="", file=sys.stderr, flush=True)
    if running.returncode == 2:  # so that a merge can tell why
        found = {"setting": {}, "tables": [], "exit_code": 2, "error": last}
        took = time.perf_counter() - start
        write_json(path, document(script.name, cell.options, elapsed_s=took, **found))
    return running.returncode if running.returncode >= 0 else 128 - running.returncode
