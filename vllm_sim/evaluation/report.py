"""What reproduce.py shows: a table a figure, how many rows are held, and the same as JSON.

Reproduces nothing: the presentation only.

    show(found, {"ShareGPT": "compact table"}, "plain", elapsed_s=7.0)
    document(args, found, sources, elapsed_s=7.0)["exit_code"]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping

from vllm_sim.evaluation.comparison import Row, verdict
from vllm_sim.evaluation.runner import Found
from vllm_sim.reporting import documents
from vllm_sim.reporting.tables import Table, counted, render, wrapped
from vllm_sim.workload.data_sets import COMPACT_SOURCE

HEADERS = ("setting and metric", "paper", "ours", "off by", "at most", "held")
WORDS = """\
A row is held ('yes') if ours is within its tolerance of the paper's value, else it is missed.
'fitted': a constant of the simulator was fitted to that value; that it is held shows little."""
JUDGED = "'MISSED' and 'NOT MISSED', in capitals, are rows that are not as expected: exit code 1."
COUNTED = "Nothing is expected of this run (docs/commands.md): its rows are only counted."


def all_rows(found: Iterable[Found]) -> list[Row]:
    return [row for figure in found for row in figure.rows]


def where_from(sources: Mapping[str, str]) -> str:
    """Where the lengths are from, and what it means for the rows that they are not the authors'."""
    told = [f"{file} for {name}" for name, file in sources.items() if file != COMPACT_SOURCE]
    if drawn := [name for name, file in sources.items() if file == COMPACT_SOURCE]:
        told.append(f"compact tables for {', '.join(drawn)}, of which more rows are missed (D14)")
    return f"Lengths: {'; '.join(told)}"


def table_of(found: Found) -> Table:
    """A figure's rows under their settings, and their spread if there are several seeds."""
    spread = any(row.spread is not None for row in found.rows)
    headers = (*HEADERS, "spread") if spread else HEADERS
    groups: dict[str, list[Row]] = {}
    for row in found.rows:
        other = "" if row.figure == found.figure.name else f" ({row.figure})"
        groups.setdefault(row.setting + other, []).append(row)
    cells = []
    for setting, rows in groups.items():
        cells.append((setting, *[""] * (len(headers) - 1)))
        for row in rows:
            paper = row.paper if isinstance(row.paper, str) else number(row.paper)
            shown = (paper, number(row.ours), row.difference, row.tolerance, verdict(row))
            more = (number(row.spread),) if spread else ()
            cells.append((f"  {row.metric}", *shown, *more))
    return Table(found.figure.name, headers, cells)


def number(value: float) -> str:
    """Four significant digits, without an exponent."""
    if value == 0 or not 1e-9 < abs(value) < 1e12:
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def summary(rows: list[Row]) -> str:
    """How many are held, of them fitted, and missed; and whether that was expected."""
    held = [row for row in rows if row.held]
    fitted = sum(row.fitted for row in held)
    failed = Counter(row.held for row in rows if row.failed)
    text = f"{counted(len(rows), 'row')}: {len(held)} held"
    text += f" ({fitted} of them fitted)" * bool(fitted) + f", {len(rows) - len(held)} missed"
    text += f", {failed[False]} of them not expected" * bool(failed[False])
    text += f", {failed[True]} held but expected to be missed" * bool(failed[True])
    return text + ", all as expected" * (any(row.expected for row in rows) and not failed)


def exit_code_of(found: Iterable[Found]) -> int:
    """0 if no more and no fewer rows are missed than expected, or nothing is expected; else 1."""
    return int(any(row.failed for row in all_rows(found)))


def show(found: list[Found], sources: Mapping[str, str], fmt: str, elapsed_s: float) -> None:
    """Print all figures, then why rows are missed, which are not as expected, and how many."""
    comment = "% " if fmt == "latex" else ""

    def say(text: str) -> None:
        print("\n".join(wrapped(line, comment) for line in text.split("\n")))

    rows = all_rows(found)
    what = COUNTED if any(row.expected is None for row in rows) else JUDGED
    say(f"{where_from(sources)}\n{WORDS}\n{what}")
    print()
    for figure in found:
        print(render(table_of(figure), fmt))
        for note in figure.notes:
            say(note)
        print(flush=True)
    if listed := Counter(row.expected for row in rows if row.expected):
        say("Expected to be missed (docs/differences.md):")
    for why, number_of_rows in listed.items():
        say(f"{why} ({counted(number_of_rows, 'row')})")
    for row in rows:
        if row.failed:
            say(f"{verdict(row)}: {row.figure}, {row.setting}, {row.metric}")
    print()
    say(f"{summary(rows)}, {elapsed_s:.1f} s")


def document(
    args: argparse.Namespace, found: list[Found], sources: Mapping[str, str], elapsed_s: float
) -> documents.Json:
    """What --json writes: all rows in one table, and a check a figure."""
    title = "The paper's number beside ours"
    setting = {name: getattr(args, name) for name in ("seeds", "quick")}
    rows = [row.to_json() for row in all_rows(found)]
    return documents.document(
        "reproduce.py",
        vars(args),
        seeds=range(args.seeds),
        setting={**setting, "lengths": sources},
        notes=[note for one in found for note in one.notes],
        tables=[documents.rows_table("rows", title, rows, 3)],
        checks=[
            {"name": one.figure.name, "ok": not exit_code_of([one]), "detail": summary(one.rows)}
            for one in found
        ],
        exit_code=exit_code_of(found),
        elapsed_s=elapsed_s,
    )
