"""The paper's number beside ours: what a figure must tell, what a row is, and when it is held.

Reproduces nothing by itself. A row says which figure and setting, what was measured, the paper's
value and ours, how far apart they are and how far they may be. It is

- *held* if ours is no further off than that;
- *explained* if it is further off, but an item of docs/differences.md (D1 to D15) shows why no
  faithful simulator can hold it, and it is no further off than that item allows;
- *missed as expected* if it is neither, and listed with why (expected_misses.py);
- *fitted*, besides, if a constant of ours was fitted to this value: that it holds shows little.

    row = relative("Fig. 12", "13B ShareGPT, vLLM", "requests/s at 0.5 s/token", 1.929, 1.98, 12)
    row.held, row.difference                       # True, '+2.6 %'
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import ClassVar

from vllm_sim.evaluation.experiments import Done, Run

# By item of docs/differences.md, which tells each in full: how many tolerances it explains at most,
# and what a reader is told. D3 is retired.
REASONS = {
    "D1": (2.0, "39.39 GiB a card gives 9,648 slots; 39.40 would give the printed 9.7K"),
    "D2": (8.0, "the architecture has 350 GB of parameters on 8 GPUs, the paper prints 346"),
    "D4": (2.0, "175B runs for 15 minutes: the seed alone moves ShareGPT's rates by a tenth"),
    "D5": (12.0, "a trace of fewer than 200 requests: which they are decides"),
    "D6": (
        6.0,
        "beam search runs ten minutes unless --beam-seconds says more, without its software",
    ),
    "D7": (2.0, "prefill decides Fig. 16, and no prefill was published that would fix its cost"),
    "D8": (5.0, "the paper's own curves show 1.5x, not the 2x of its text"),
    "D9": (2.0, "the authors' conversations are not published; ours have fewer full prompts"),
    "D10": (12.0, "below 16 slots the paper's kernel reads memory badly; no kernel is modelled"),
    "D11": (8.0, "30.1 requests/s lies on the knee: a few percent of rate are a factor in latency"),
    "D12": (2.0, "ten minutes at the edge of overload; the paper's two drawings differ"),
    "D13": (3.0, "the text's extreme is not in the paper's own curves at one common latency"),
    "D14": (4.0, "the compact tables draw other requests than the authors' files have"),
    "D15": (
        2.0,
        "the paper ran one trace, of seed 0, which is held; the mean of seeds need not be",
    ),
}
ONE_SEED = "D15"
EXPLAINED = "explained"
Measure = Callable[[float], tuple[str, float]]  # ours -> the difference in words, tolerances off


@dataclass(frozen=True)
class Figure(ABC):
    """A figure of the paper: the runs that it rests on, and the rows that it makes of them.

    Runs are named without a seed; runner.py repeats all of them for each.
    """

    name: ClassVar[str]

    def needed(self, done: Done) -> list[Run]:
        """The runs that can be named now; those already done may be among them."""
        return []

    @abstractmethod
    def rows(self, done: Done) -> list[Row]:
        """The comparisons, once nothing more is needed."""

    def notes(self, done: Done) -> list[str]:
        """What else the runs show, if anything."""
        return []


@dataclass(frozen=True)
class Row:
    """One comparison. `held` is True, False or "explained"; `reason` says why if it is the last.

    `expected` is why the row is expected to be missed, if it is.
    """

    figure: str
    setting: str
    metric: str
    paper: float | str
    ours: float
    difference: str
    tolerance: str
    held: bool | str
    fitted: bool = False
    reason: str = ""
    expected: str = ""
    # How far off in tolerances: 1 is the limit.
    excess: float = field(default=0.0, repr=False, compare=False)
    spread: float | None = None  # highest less lowest over the seeds, if there are several
    # The same comparison for another value of ours, if its constructor gave it.
    remake: Callable[[float], Row] | None = field(default=None, repr=False, compare=False)

    @property
    def failed(self) -> bool:
        """Missed and not expected to be, or expected and not missed."""
        return (self.held is False) != bool(self.expected)

    def to_json(self) -> dict:
        """The row with its words as keys."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        shown = {key: value for key, value in shown.items() if value not in (None, "")}
        return {**shown, "ours": None} if math.isnan(self.ours) else shown


def verdict(row: Row) -> str:
    """What a table says of a row: yes, NO, or the difference that explains it; and if fitted."""
    text = {True: "yes", False: "NO"}.get(row.held) or row.reason.split(":")[0]
    if row.expected:
        text = "NOT MISSED" if row.failed else "missed"
    return f"{text}, fitted" if row.fitted else text


def relative(
    figure: str, setting: str, metric: str, paper: float, ours: float, most: float, reason: str = ""
) -> Row:
    """Held if ours is within so many percent of the paper's."""

    def measure(ours: float) -> tuple[str, float]:
        off = 100.0 * (ours / paper - 1.0)
        return f"{off:+.1f} %", abs(off) / most

    return _row(figure, setting, metric, paper, f"{most:g} %", measure, reason, ours)


def absolute(
    figure: str,
    setting: str,
    metric: str,
    paper: float,
    ours: float,
    most: float,
    reason: str = "",
    most_of_mean: float = 0.0,
) -> Row:
    """Held if ours is within so many units (percentage points, mostly) of the paper's.

    A mean over seeds may be off by `most_of_mean`, where that is given.
    """

    def measure(ours: float) -> tuple[str, float]:
        return f"{ours - paper:+.2f}", abs(ours - paper) / most

    row = _row(figure, setting, metric, paper, f"{most:g}", measure, reason, ours)
    if not most_of_mean:
        return row
    mean = partial(absolute, figure, setting, metric, paper, most=most_of_mean, reason=reason)
    return replace(row, remake=mean)


def factor(
    figure: str, setting: str, metric: str, paper: float, ours: float, most: float, reason: str = ""
) -> Row:
    """Held if neither is more than `most` times the other."""

    def measure(ours: float) -> tuple[str, float]:
        times = ours / paper
        excess = abs(math.log(times)) / math.log(most) if times > 0.0 else math.inf
        return f"x {times:.2f}", excess

    return _row(figure, setting, metric, paper, f"factor {most:g}", measure, reason, ours)


def as_printed(
    figure: str, setting: str, metric: str, paper: float, ours: float, reason: str = ""
) -> Row:
    """Held if ours, rounded to the paper's digits, is what the paper prints."""
    text = f"{paper:g}"
    digits = len(text.split(".")[1]) if "." in text else 0
    # Half a unit of the last digit, and no more than binary fractions need beyond it.
    half = 0.5 * 10.0**-digits * (1 + 1e-9)

    def measure(ours: float) -> tuple[str, float]:
        return f"{ours - paper:+.3g}", abs(ours - paper) / half

    return _row(figure, setting, metric, paper, "as printed", measure, reason, ours)


def between(
    figure: str, setting: str, metric: str, low: float, high: float, ours: float, reason: str = ""
) -> Row:
    """Held if ours lies in the range that the paper states; an infinite end is left open."""
    paper = f"up to {high:.4g}" if math.isinf(low) else f"{low:.4g} to {high:.4g}"
    if math.isinf(high):
        paper = f"over {low:.4g}"

    def measure(ours: float) -> tuple[str, float]:
        off = max(low - ours, ours - high, 0.0)
        if not off:
            return "inside", 0.0
        # Off by a tenth of the nearer end counts as off by a tolerance.
        return f"{off:.3g} outside", 1.0 + off / (0.1 * abs(low if ours < low else high))

    return _row(figure, setting, metric, paper, "inside", measure, reason, ours)


def _row(
    figure: str,
    setting: str,
    metric: str,
    paper: float | str,
    tolerance: str,
    measure: Measure,
    reason: str,
    ours: float,
) -> Row:
    """A reason given beforehand is only used, and shown, where the row does not hold."""
    difference, excess = measure(ours)
    row = Row(
        figure,
        setting,
        metric,
        paper,
        ours,
        "no value" if math.isnan(ours) else difference,
        tolerance,
        bool(excess <= 1.0 + 1e-9),  # not where it is no number; rounding decides nothing
        excess=excess,
        remake=partial(_row, figure, setting, metric, paper, tolerance, measure, reason),
    )
    return allow(row, reason) if reason else row


def allow(row: Row, reason: str) -> Row:
    """Explained by this item, if it is not held but no further off than the item allows."""
    most, text = REASONS[reason]
    if row.held is False and row.excess <= most:
        return replace(row, held=EXPLAINED, reason=f"{reason}: {text}")
    return row


def over_seeds(rows: list[Row]) -> Row:
    """One row for the same comparison under several seeds, the paper's first: their mean is judged.

    If that is not held but the paper's own seed is, the seed explains it, up to its bound.
    """
    if len({(row.figure, row.setting, row.metric) for row in rows}) != 1:
        raise ValueError(f"not one comparison: {rows}")
    values = [row.ours for row in rows]
    if len(values) == 1:
        return rows[0]
    mean = sum(values) / len(values)
    row = rows[0].remake(mean)
    if rows[0].remake(values[0]).held is True:
        row = allow(row, ONE_SEED)
    spread = None if math.isnan(mean) else max(values) - min(values)
    return replace(row, fitted=rows[0].fitted, spread=spread)
