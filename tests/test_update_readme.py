"""tools/update_readme.py: how the README counts rows, of results with and without 'fitted'."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import update_readme  # noqa: E402


def row(figure, held, **more):
    return {
        "figure": figure, "setting": "13B Alpaca, vLLM", "metric": "s/token", "paper": 1.0,
        "ours": 1.0, "difference": "+0.0 %", "tolerance": "5 %", "held": held, **more,
    }  # fmt: skip


def results(*rows):
    return {
        "command": "python reproduce.py", "device": "a machine", "versions": {"python": "3"},
        "output": {"rows": list(rows), "notes": []},
    }  # fmt: skip


NEW = results(
    row("Fig. 2", True, fitted=False),
    row("Fig. 12", True, fitted=True),
    row("Fig. 12", True, fitted=False),
    row("Fig. 12", "explained", fitted=True, reason="D5: a reason"),
    row("Fig. 12", False, fitted=True),
)
OLD = results(*({k: v for k, v in one.items() if k != "fitted"} for one in NEW["output"]["rows"]))


def cells(text):
    """The table's rows, without headers, by their first cell."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines[2:]}


@pytest.mark.parametrize(
    ("found", "columns", "counts"),
    [
        (NEW, "held | of these fitted | explained | not held", ["5", "3", "1", "1", "1"]),
        (OLD, "held | explained | not held", ["5", "3", "1", "1"]),
    ],
    ids=["new", "old"],
)
def test_fitted_rows_are_counted_where_the_results_tell_them(monkeypatch, found, columns, counts):
    monkeypatch.setattr(update_readme, "load", lambda name: found)
    text = update_readme.figures().split("How many times")[0]
    (headers,) = [line for line in text.splitlines() if "where in the paper" in line]
    assert " | ".join(cell.strip() for cell in headers.strip("|").split("|")[2:]) == columns
    assert cells(text)["all"] == counts


def test_fitted_rows_are_marked_where_the_results_tell_them(monkeypatch):
    last = []
    for found in (NEW, OLD):
        monkeypatch.setattr(update_readme, "load", lambda name, found=found: found)
        lines = [line for line in update_readme.rows().splitlines() if line.startswith("| Fig.")]
        last.append([line.strip("|").split("|")[-1].strip() for line in lines])
    assert last == [
        ["yes", "yes, fitted", "yes", "D5, fitted", "NO, fitted"],
        ["yes", "yes", "yes", "D5", "NO"],
    ]
