"""What reproduce.py shows: a table a figure, how many rows are held, and the same as JSON.

Reproduces nothing: the presentation only.

    show(found, {"ShareGPT": "compact table"}, "plain", elapsed_s=7.0)
    document(args, found, sources, elapsed_s=7.0)["exit_code"]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping

from vllm_sim.evaluation.comparison import EXPLAINED, Row, verdict
from vllm_sim.evaluation.runner import Found
from vllm_sim.reporting import documents
from vllm_sim.reporting.tables import Table, counted, render, wrapped
from vllm_sim.workload.data_sets import COMPACT_SOURCE

HEADERS = ("setting and metric", "paper", "ours", "off by", "at most", "held")
WORDS = """\
A row is held ('yes') if ours is within its tolerance of the paper's value. If it is not, 'D1' to
'D15' name the difference that explains it, 'missed' is a miss that is expected and listed below,
and 'NO' says that nothing explains it. 'fitted': a constant of the simulator was fitted to that
value, so that the row is held shows little."""


def all_rows(found: Iterable[Found]) -> list[Row]:
    return [row for figure in found for row in figure.rows]


def where_from(sources: Mapping[str, str]) -> str:
    """Where the lengths are from, and what it means for the rows that they are not the authors'."""
    drawn = [dataset for dataset, source in sources.items() if source == COMPACT_SOURCE]
    files = [f"{source} for {name}" for name, source in sources.items() if name not in drawn]
    if not files:
        return (
            "Lengths: compact tables, not the authors' files: more rows are off, and by more (D14)"
        )
    if drawn:
        files.append(f"compact tables for {', '.join(drawn)}, of which more rows are off (D14)")
    return f"Lengths: {'; '.join(files)}"


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


def summary(rows: list[Row], of_these: str = "") -> str:
    """How many are held, explained, missed as expected, or none of these."""
    count = Counter(row.held for row in rows)
    listed = Counter(row.failed for row in rows if row.expected)
    told = [f"{count[True]} held{of_these}", f"{count[EXPLAINED]} explained"]
    told += [f"{listed[False]} missed as expected"] * bool(listed[False])
    told += [f"{listed[True]} not missed as expected"] * bool(listed[True])
    told += [f"{count[False] - listed[False]} not held"]
    return f"{counted(len(rows), 'row')}: {', '.join(told)}"


def exit_code_of(found: Iterable[Found]) -> int:
    """0 if every row is held, explained or missed as expected, else 1."""
    return int(any(row.failed for row in all_rows(found)))


def show(found: list[Found], sources: Mapping[str, str], fmt: str, elapsed_s: float) -> None:
    """Print all figures, then which rows are not held and how many are."""
    comment = "% " if fmt == "latex" else ""

    def say(text: str) -> None:
        print("\n".join(wrapped(line, comment) for line in text.split("\n")))

    say(f"{where_from(sources)}\n{WORDS}")
    print()
    for figure in found:
        print(render(table_of(figure), fmt))
        for note in figure.notes:
            say(note)
        print(flush=True)
    rows = all_rows(found)
    reasons = {row.reason for row in rows if row.reason}
    if reasons:
        by_item = sorted(reasons, key=lambda text: int(text[1 : text.index(":")]))
        say("\n".join(["Explained (docs/differences.md):", *by_item]))
    for what, failed, listed in (
        ("Not held:", True, False),
        ("Expected to be missed, and not missed (expected_misses.py):", True, True),
        ("Missed as expected:", False, True),
    ):
        named = [row for row in rows if (row.failed, bool(row.expected)) == (failed, listed)]
        for row in named:
            told = f"{what} {row.figure}, {row.setting}, {row.metric}"
            say(f"{told}: {row.expected}" if listed else told)
    fitted = sum(row.held is True and row.fitted for row in rows)
    of_these = f" ({fitted} of them fitted)" if fitted else ""
    print()
    say(f"{summary(rows, of_these)}, {elapsed_s:.1f} s")


def document(
    args: argparse.Namespace, found: list[Found], sources: Mapping[str, str], elapsed_s: float
) -> documents.Json:
    """What --json writes: all rows in one table, and a check a figure."""
    title = "The paper's number beside ours"
    rows = [row.to_json() for row in all_rows(found)]
    return documents.document(
        "reproduce.py",
        vars(args),
        seeds=range(args.seeds),
        setting={
            "seeds": args.seeds,
            "quick": args.quick,
            "beam_seconds": args.beam_seconds,
            "lengths": sources,
        },
        notes=[note for one in found for note in one.notes],
        tables=[documents.rows_table("rows", title, rows, 3)],
        checks=[
            {"name": one.figure.name, "ok": not exit_code_of([one]), "detail": summary(one.rows)}
            for one in found
        ],
        exit_code=exit_code_of(found),
        elapsed_s=elapsed_s,
    )
