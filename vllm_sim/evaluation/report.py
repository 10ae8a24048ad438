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
from vllm_sim.reporting.tables import Table, counted, render

HEADERS = ("figure", "setting", "metric", "paper", "ours", "difference", "tolerance", "held")
WORDS = """\
A row is held ('yes') if ours is within its tolerance of the paper's value. If it is not, 'D1' to
'D15' name the difference that explains it, and 'NO' says that nothing does. 'fitted': a constant of
the simulator was fitted to that value, so that the row is held shows little."""


def all_rows(found: Iterable[Found]) -> list[Row]:
    return [row for figure in found for row in figure.rows]


def table_of(found: Found) -> Table:
    """A figure's rows; a column for their spread if there are several seeds."""
    spread = any(row.spread is not None for row in found.rows)
    headers = (*HEADERS, "spread") if spread else HEADERS
    cells = []
    for row in found.rows:
        paper = row.paper if isinstance(row.paper, str) else number(row.paper)
        held = verdict(row.held, row.reason, row.fitted)
        shown = (paper, number(row.ours), row.difference, row.tolerance, held)
        more = (number(row.spread),) if spread else ()
        cells.append((row.figure, row.setting, row.metric, *shown, *more))
    return Table(found.figure.name, headers, cells)


def number(value: float) -> str:
    """Four significant digits, without an exponent."""
    if value == 0 or not 1e-9 < abs(value) < 1e12:
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def summary(rows: list[Row], of_these: str = "") -> str:
    """How many are held, explained, or neither."""
    count = Counter(row.held for row in rows)
    failed = f"{count[EXPLAINED]} explained, {count[False]} not held"
    return f"{counted(len(rows), 'row')}: {count[True]} held{of_these}, {failed}"


def exit_code_of(found: Iterable[Found]) -> int:
    """0 if every row is held or explained, else 1."""
    return int(any(row.held is False for row in all_rows(found)))


def show(found: list[Found], sources: Mapping[str, str], fmt: str, elapsed_s: float) -> None:
    """Print all figures, and how many rows are held, explained or neither."""
    comment = "% " if fmt == "latex" else ""

    def say(text: str) -> None:
        print(comment + text.replace("\n", f"\n{comment}"))

    say("Lengths: " + "; ".join(f"{k}: {v}" for k, v in sources.items()) + f"\n{WORDS}")
    print()
    for figure in found:
        print(render(table_of(figure), fmt))
        print("\n".join(comment + note for note in figure.notes) + "\n", flush=True)
    rows = all_rows(found)
    reasons = {row.reason for row in rows if row.reason}
    if reasons:
        by_item = sorted(reasons, key=lambda text: int(text[1 : text.index(":")]))
        say("\n".join(["Explained (docs/differences.md):", *by_item]))
    fitted = sum(row.held is True and row.fitted for row in rows)
    of_these = f" ({fitted} of them on values that constants were fitted to)" if fitted else ""
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
