"""The paper's number beside ours: what a figure must tell, what a row is, and when it is held.

Reproduces nothing by itself. A row says which figure and setting, what was measured, the paper's
value and ours, how far apart they are and how far they may be. It is *held* if ours is no further
off than that, else *missed*; which misses are expected, expected_misses.py lists. It is *fitted*
besides if a constant of ours was fitted to this value: that it is held then shows little.

    row = relative("Fig. 12", "13B ShareGPT, vLLM", "requests/s at 0.5 s/token", 1.929, 1.98, 12)
    row.held, row.difference                       # True, '+2.6 %'
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from vllm_sim.evaluation.experiments import Done, Run

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
    """One comparison, which measures itself: with another value of ours it is another.

    `expected` is why the row is expected to be missed, empty if it is expected to be held, None if
    nothing is expected of its run.
    """

    figure: str
    setting: str
    metric: str
    paper: float | str
    ours: float
    difference: str = field(init=False)
    tolerance: str
    held: bool = field(init=False)
    measure: Measure = field(repr=False, compare=False)
    fitted: bool = False
    expected: str | None = None
    spread: float | None = None  # highest less lowest over the seeds, if there are several
    # The same comparison with the tolerance that a mean over seeds has, if that is another.
    of_mean: Row | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        difference, tolerances_off = self.measure(self.ours)
        object.__setattr__(self, "difference", "no value" if math.isnan(self.ours) else difference)
        # Not where it is no number; rounding decides nothing.
        object.__setattr__(self, "held", bool(tolerances_off <= 1.0 + 1e-9))

    @property
    def failed(self) -> bool:
        """Missed and not expected to be, or expected to be missed and held."""
        return self.expected is not None and self.held == bool(self.expected)

    def to_json(self) -> dict:
        """The row with its words as keys."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        shown = {key: value for key, value in shown.items() if value not in (None, "")}
        return {**shown, "ours": None} if math.isnan(self.ours) else shown


def verdict(row: Row) -> str:
    """What a table says of a row, in capitals where the run fails by it; and if it is fitted."""
    text = "yes" if row.held else "missed"
    if row.failed:
        text = "NOT MISSED" if row.held else "MISSED"
    return f"{text}, fitted" if row.fitted else text


def relative(figure: str, setting: str, metric: str, paper: float, ours: float, most: float) -> Row:
    """Held if ours is within so many percent of the paper's."""

    def measure(ours: float) -> tuple[str, float]:
        off = 100.0 * (ours / paper - 1.0)
        return f"{off:+.1f} %", abs(off) / most

    return Row(figure, setting, metric, paper, ours, f"{most:g} %", measure)


def absolute(figure: str, setting: str, metric: str, paper: float, ours: float, most: float) -> Row:
    """Held if ours is within so many units (percentage points, mostly) of the paper's."""

    def measure(ours: float) -> tuple[str, float]:
        return f"{ours - paper:+.2f}", abs(ours - paper) / most

    return Row(figure, setting, metric, paper, ours, f"{most:g}", measure)


def factor(figure: str, setting: str, metric: str, paper: float, ours: float, most: float) -> Row:
    """Held if neither is more than `most` times the other."""

    def measure(ours: float) -> tuple[str, float]:
        times = ours / paper
        off = abs(math.log(times)) / math.log(most) if times > 0.0 else math.inf
        return f"x {times:.2f}", off

    return Row(figure, setting, metric, paper, ours, f"factor {most:g}", measure)


def as_printed(figure: str, setting: str, metric: str, paper: float, ours: float) -> Row:
    """Held if ours, rounded to the paper's digits, is what the paper prints."""
    text = f"{paper:g}"
    digits = len(text.split(".")[1]) if "." in text else 0
    # Half a unit of the last digit, and no more than binary fractions need beyond it.
    half = 0.5 * 10.0**-digits * (1 + 1e-9)

    def measure(ours: float) -> tuple[str, float]:
        return f"{ours - paper:+.3g}", abs(ours - paper) / half

    return Row(figure, setting, metric, paper, ours, "as printed", measure)


def between(figure: str, setting: str, metric: str, low: float, high: float, ours: float) -> Row:
    """Held if ours lies in the range that the paper states; an infinite end is left open."""
    paper = f"up to {high:.4g}" if math.isinf(low) else f"{low:.4g} to {high:.4g}"
    if math.isinf(high):
        paper = f"over {low:.4g}"

    def measure(ours: float) -> tuple[str, float]:
        off = max(low - ours, ours - high, 0.0)
        return (f"{off:.3g} outside", 1.0 + off) if off else ("inside", 0.0)

    return Row(figure, setting, metric, paper, ours, "inside", measure)


def over_seeds(rows: list[Row]) -> Row:
    """One row for the same comparison under several seeds: their mean is judged."""
    if len({(row.figure, row.setting, row.metric) for row in rows}) != 1:
        raise ValueError(f"not one comparison: {rows}")
    values = [row.ours for row in rows]
    if len(values) == 1:
        return rows[0]
    mean, row = sum(values) / len(values), rows[0].of_mean or rows[0]
    spread = None if math.isnan(mean) else max(values) - min(values)
    return replace(row, ours=mean, fitted=rows[0].fitted, spread=spread)
