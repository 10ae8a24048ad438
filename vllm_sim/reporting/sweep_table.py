"""Many runs in one table: which options differ, each figure's mean over the seeds, what is missing.

Reproduces nothing. Reads what --json and sweep.py wrote (docs/json.md); the order of the files, and
files given twice, change nothing. report.py is its command line.

    python report.py results/sweep/*.json                        # the figures that answer
    python report.py results/sweep/*.json --table saving         # all of a table

[sweep_files] Documents of --json, read back: what is not one is refused in one line.

Reproduces nothing. The whole form is in docs/schema.json; this is what merging relies on, checked
without a package for it.

    read_document(Path("results/sweep/main-seed-0-1f0c2d3e.json"))["tables"]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from vllm_sim.reporting.command_line import OneLineParser, UsageError
from vllm_sim.reporting.documents import SCHEMA, Json, document
from vllm_sim.reporting.files import check_writable, print_then, read_bounded, write_json
from vllm_sim.reporting.sweep_cells import SCRIPTS
from vllm_sim.reporting.tables import FORMATS, Cell, Table, counted, render

MAX_BYTES = 64 << 20
LARGEST = 1e300  # so that sums stay finite


def read_document(path: Path) -> Json:
    """A document of this version of the schema. UsageError names the file and what is wrong."""
    try:
        found = json.loads(_read_text(path), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not JSON: {reason}") from None
    if isinstance(found, dict) and {"command", "commit", "output"} <= found.keys():
        raise UsageError(f"{path}: a recording: what --json wrote is under its output")
    if not isinstance(found, dict) or "schema" not in found:
        raise UsageError(f"{path}: not what --json writes: it has no schema")
    if found["schema"] != SCHEMA:
        told = json.dumps(found["schema"])[:60]
        raise UsageError(f"{path}: its schema is {told}, not {json.dumps(SCHEMA)}")
    wrong = _wrong(found)
    if wrong:
        raise UsageError(f"{path}: not as docs/json.md has it: {wrong}")
    return found


def _read_text(path: Path) -> str:
    """A regular file of UTF-8. Raises UsageError, ValueError."""
    try:
        if path.is_dir():
            raise UsageError(f"{path}: a directory; name its files, {path.name or '.'}/*.json")
        data = read_bounded(path, MAX_BYTES)
        if data is None:
            raise UsageError(f"{path}: more than {MAX_BYTES >> 20} MiB")
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: cannot be read: {reason}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _wrong(found: Json) -> str:
    """What is not as the schema has it, in words; empty if all of this is."""
    for key, kind in (
        ("script", str),
        ("options", dict),
        ("seeds", list),
        ("setting", dict),
        ("tables", list),
        ("checks", list),
    ):
        if not isinstance(found.get(key), kind):
            return f"no {key}" if key not in found else f"{key} is of another type"
    if found.get("exit_code") not in (0, 1, 2) or isinstance(found["exit_code"], bool):
        return "exit_code is not 0, 1 or 2"
    if not isinstance(found.get("error", ""), str):
        return "error is not text"
    if not all(type(seed) is int for seed in found["seeds"]):
        return "seeds are not integers"
    for name, value in found["options"].items():
        values = value if isinstance(value, list) else [value]
        if not all(_is_cell(one) for one in values):
            return f"option {name[:40]!a} is no value"
    for check in found["checks"]:
        if not isinstance(check, dict) or not (
            isinstance(check.get("name"), str)
            and isinstance(check.get("detail"), str)
            and isinstance(check.get("ok"), bool)
        ):
            return "a check has no name, ok and detail"
    return next(filter(None, map(_wrong_table, found["tables"])), "")


def _wrong_table(table: object) -> str:
    if not isinstance(table, dict) or not isinstance(table.get("id"), str):
        return "a table has no id"
    name = f"table {table['id'][:40]!a}"
    index, rows = table.get("index"), table.get("rows")
    if not isinstance(index, list) or not all(isinstance(key, str) for key in index):
        return f"{name} has no index"
    if not isinstance(rows, list):
        return f"{name} has no rows"
    seen = set()
    for row in rows:
        if not isinstance(row, dict) or not set(index) <= row.keys():
            return f"{name}: a row lacks a key of the index"
        for key, value in row.items():
            if key in index and not (isinstance(value, dict) or _is_cell(value)):
                return f"{name}: {key[:40]!a} says not which row it is"
            if isinstance(value, int | float) and not _is_cell(value):
                return f"{name}: {key[:40]!a} is no finite number"
        if index:
            which = json.dumps([row[key] for key in index])
            if which in seen:
                return f"{name}: two rows are {which[:80]}"
            seen.add(which)
    return ""


def _is_cell(value: object) -> bool:
    """Text, a finite number, true, false or null."""
    if isinstance(value, int | float):
        return abs(value) <= LARGEST and math.isfinite(value)
    return value is None or isinstance(value, str)


MAX_FILES = 20_000
SEED = "seed"
# What is shown unless --table says otherwise: (table, its row or None for all, columns).
CHOSEN: dict[str, tuple[tuple[str, tuple[str, ...] | None, tuple[str, ...]], ...]] = {
    "main.py": (
        ("contiguous_steady_state", ("Orca (Max)", "ours"), ("batch", "tokens")),
        ("contiguous_steady_state", ("Orca (Oracle)", "ours"), ("batch", "tokens")),
        ("paged_steady_state", ("vLLM", "ours"), ("batch", "tokens", "padding")),
        ("saving", None, ("ours",)),
        ("all_requests", None, ("iterations", "mean_batch")),
    ),
    "capacity.py": (
        ("blocks_and_slots", ("= slots, one token each",), ("number",)),
        ("concurrency", None, ("requests",)),
        ("slots", ("paged",), ("tokens_percent",)),
        ("trace_concurrency", None, ("number",)),
        ("trace_pools", None, ("blocks", "gib_of_k_v")),
        ("trace_gpus", None, ("gpus",)),
    ),
    "reproduce.py": (("rows", None, ("ours",)),),
}


@dataclass(frozen=True)
class Named:
    """A document, and the name of its file."""

    name: str
    found: Json

    @property
    def options(self) -> dict[str, object]:
        return self.found["options"]


@dataclass
class Figure:
    """One figure of one combination of parameters: its value for each seed."""

    table: str
    row: dict[str, Cell]
    metric: str
    parameters: dict[str, object]
    values: list[tuple[tuple[int, ...], float]] = field(default_factory=list)

    def to_json(self) -> Json:
        numbers = sorted(value for _, value in self.values)
        seeds = sorted({seed for seeds, _ in self.values for seed in seeds})
        low, high = numbers[0], numbers[-1]
        mean = min(max(math.fsum(numbers) / len(numbers), low), high)  # rounding aside, between
        return {
            "parameters": self.parameters,
            "table": self.table,
            "row": self.row,
            "metric": self.metric,
            "mean": mean,
            "lowest": low,
            "highest": high,
            "spread": high - low,
            "seeds": seeds,
        }


@dataclass(frozen=True)
class Merged:
    """Cells put together: `rows` as docs/json.md has them, a check for each cell."""

    script: str
    parameters: tuple[str, ...]
    rows: list[Json]
    checks: list[Json]
    seeds: list[int]
    num_files: int


def merge(paths: Sequence[Path]) -> Merged:
    """Read and merge. UsageError for what is no document, and for files that do not agree.

    A sweep's plan stands for its cells: those that are there are read beside it, the others are
    missing.
    """
    if len(paths) > MAX_FILES:
        raise UsageError(f"{len(paths):,} files: at most {MAX_FILES:,}")
    given = {path: read_document(path) for path in sorted(set(paths), key=str)}
    plans = {path: found for path, found in given.items() if found["script"] == "sweep.py"}
    cells = {path: found for path, found in given.items() if path not in plans}
    known = {os.path.realpath(path) for path in cells}
    missing: list[Json] = []
    for path, found in plans.items():
        for name, arguments in _planned(path, found):
            cell = path.parent / name
            if os.path.realpath(cell) in known:
                continue
            known.add(os.path.realpath(cell))
            if os.path.lexists(cell):
                cells[cell] = read_document(cell)
            else:
                missing.append({"name": name, "ok": False, "detail": f"missing: {arguments}"})
    script = _one_script([*cells.items()], plans)
    runs = _distinct([Named(str(path), found) for path, found in cells.items()])
    parameters = _parameters([run for run in runs if "error" not in run.found])
    checks = [*map(_check, runs), *missing]
    return Merged(
        script,
        parameters,
        _figures(runs, parameters),
        sorted(checks, key=lambda check: (check["name"], check["detail"])),
        sorted({seed for run in runs for seed in run.found["seeds"]}),
        len(given),
    )


def _planned(path: Path, found: Json) -> list[tuple[str, str]]:
    """(file, arguments) of the cells that a plan lists. UsageError."""
    rows = [row for table in found["tables"] if table["id"] == "cells" for row in table["rows"]]
    for row in rows:
        name, told = row.get("file"), row.get("arguments")
        named = isinstance(name, str) and name not in ("", "..") and Path(name).name == name
        if not (named and isinstance(told, str)):
            raise UsageError(f"{path}: not as docs/json.md has it: a cell has no file")
    return [(row["file"], row["arguments"]) for row in rows]


def _one_script(cells: list[tuple[Path, Json]], plans: dict[Path, Json]) -> str:
    """The script of all cells. UsageError if there are several, or it is none that has cells."""
    scripts = {found["script"]: path for path, found in reversed(cells)}
    for path, found in plans.items():
        scripts.setdefault(str(found["setting"].get("script")), path)
    for script, path in sorted(scripts.items()):
        if script not in SCRIPTS:
            raise UsageError(f"{path}: of {script[:60]!a}; {', '.join(SCRIPTS)} can be merged")
    if len(scripts) > 1:
        (one, first), (other, second), *_ = sorted(scripts.items())
        raise UsageError(f"{first} is of {one}, {second} of {other}: merge one script at a time")
    return next(iter(scripts))


def _distinct(runs: list[Named]) -> list[Named]:
    """One for each cell, by their options. UsageError if two of a cell found different things."""
    found: dict[str, Named] = {}
    for run in sorted(runs, key=lambda run: (_canonical(run.options), run.name)):
        first = found.setdefault(_canonical(run.options), run)
        same = all(
            first.found.get(key) == run.found.get(key)
            for key in ("tables", "checks", "seeds", "exit_code", "error")
        )
        if not same:
            raise UsageError(f"{first.name} and {run.name} are the same cell with other results")
    return list(found.values())


def _parameters(runs: list[Named]) -> tuple[str, ...]:
    """The options that differ between the runs, the seed aside, in the script's order."""
    values: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for name in {**runs[0].options, **run.options}:
            values[name].add(_canonical(run.options.get(name)))
    return tuple(name for name, told in values.items() if len(told) > 1 and name != SEED)


def _check(run: Named) -> Json:
    """What became of a cell."""
    found, name = run.found, Path(run.name).name
    failed = [f"{one['name']} ({one['detail']})" for one in found["checks"] if not one["ok"]]
    if "error" in found:
        return {"name": name, "ok": False, "detail": f"did not run: {found['error']}"}
    if failed or found["exit_code"]:
        return {"name": name, "ok": False, "detail": f"failed: {'; '.join(failed) or 'a check'}"}
    return {"name": name, "ok": True, "detail": f"{counted(len(found['checks']), 'check')} held"}


def _figures(runs: list[Named], parameters: tuple[str, ...]) -> list[Json]:
    """Every number of the runs, by table, row, column and parameters, over the seeds."""
    figures: dict[tuple[str, ...], Figure] = {}
    for run in runs:
        chosen = {name: run.options.get(name) for name in parameters}
        for table in run.found["tables"]:
            index = table["index"]
            for row in table["rows"]:
                which = {key: row[key] for key in index}
                for metric, value in row.items():
                    if metric in index or type(value) not in (int, float):
                        continue
                    key = (table["id"], _canonical(which), metric, _canonical(chosen))
                    figure = figures.setdefault(key, Figure(table["id"], which, metric, chosen))
                    figure.values.append((tuple(run.found["seeds"]), value))
    order = {key[:3]: number for number, key in reversed([*enumerate(figures)])}
    keys = sorted(figures, key=lambda key: (order[key[:3]], _rank(figures[key].parameters)))
    return [figures[key].to_json() for key in keys]


def _rank(parameters: dict[str, object]) -> list[tuple[int, float, str]]:
    """For sorting: nothing first, then numbers by size, then all else as text."""
    ranks = []
    for value in parameters.values():
        if type(value) in (int, float):
            ranks.append((1, float(value), ""))
        else:
            ranks.append((0 if value is None else 2, 0.0, _canonical(value)))
    return ranks


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def shown(merged: Merged, tables: Sequence[str]) -> Table:
    """The rows to print: those that answer, or all of the tables named."""
    rows = []
    for one in merged.rows:
        if _is_shown(one, merged.script, tables):
            row = ", ".join(_text(cell) for cell in one["row"].values())
            rows.append(
                (
                    f"{one['table']}: {row}" if row else one["table"],
                    one["metric"],
                    *(
                        value if type(value) is int else _text(value)
                        for value in one["parameters"].values()
                    ),
                    float(one["mean"]),
                    float(one["spread"]),
                    len(one["seeds"]),
                )
            )
    headers = ("figure", "column", *merged.parameters, "mean", "highest less lowest", "seeds")
    count = len(merged.checks)
    title = f"{merged.script}, {counted(count, 'cell')}"
    return Table(title, headers, rows, decimals=2)


def _is_shown(one: Json, script: str, tables: Sequence[str]) -> bool:
    if tables:
        return one["table"] in tables
    return any(
        one["table"] == table
        and one["metric"] in columns
        and (row is None or tuple(one["row"].values()) == row)
        for table, row, columns in CHOSEN[script]
    )


def _text(value: object) -> str:
    """A value in a cell of ASCII."""
    if isinstance(value, list):
        return " ".join(map(_text, value))
    text = "-" if value is None else str(value)
    return text if text.isascii() and text.isprintable() else ascii(text)


def parse_and_merge(argv: list[str] | None) -> int:
    """0 if every cell is there and held, else 1. Raises UsageError for what cannot be used."""
    parser = OneLineParser(
        prog="report.py",
        description="Merge what --json and sweep.py have written.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="documents of one script; a sweep-*.json stands for its cells",
    )
    add(
        "--table",
        action="append",
        default=[],
        metavar="ID",
        help="show all of this table (repeatable; default: the figures that answer)",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures of all tables here")
    add("--format", choices=tuple(FORMATS), default="plain", help="of the table")
    args = parser.parse_args(argv)
    if args.json is not None:
        check_writable(args.json)
        if os.path.realpath(args.json) in map(os.path.realpath, args.files):
            raise UsageError(f"--json {args.json} is one of the files to merge")
    start = time.perf_counter()
    merged = merge(args.files)
    known = {one["table"] for one in merged.rows}
    for name in args.table:
        if name not in known:
            told = ", ".join(sorted(known)) or "none"
            raise UsageError(f"--table {name[:40]!a}: the files have {told}")
    bad = [check for check in merged.checks if not check["ok"]]

    def show() -> None:
        write = partial(_print, "% " if args.format == "latex" else "")
        print(render(shown(merged, args.table), args.format))
        write(f"\n{len(merged.checks) - len(bad)} of {len(merged.checks)} cells held")
        for check in bad:
            write(f"{_text(check['name'])}: {_text(check['detail'])}")

    def keep() -> None:
        if args.json is not None:
            _write(args, merged, int(bool(bad)), time.perf_counter() - start)

    print_then(keep, show)
    return int(bool(bad))


def _write(args: argparse.Namespace, merged: Merged, code: int, elapsed_s: float) -> None:
    """The document of --json. Raises OutputError."""
    setting = {
        "script": merged.script,
        "num_files": merged.num_files,
        "parameters": list(merged.parameters),
    }
    table = {
        "id": "merged",
        "title": "Every figure of the cells",
        "setting": "",
        "headers": [
            "parameters",
            "table",
            "row",
            "metric",
            "mean",
            "lowest",
            "highest",
            "spread",
            "seeds",
        ],
        "index": ["parameters", "table", "row", "metric"],
        "rows": merged.rows,
    }
    files = sorted(str(path) for path in args.files)
    write_json(
        args.json,
        document(
            "report.py",
            {"files": files, "table": args.table},
            seeds=merged.seeds,
            setting=setting,
            tables=[table],
            checks=merged.checks,
            exit_code=code,
            elapsed_s=elapsed_s,
        ),
    )


def _print(comment: str, text: str) -> None:
    lead = text[: len(text) - len(text.lstrip("\n"))]
    print(f"{lead}{comment}{text.lstrip()}")
