"""The paper's number beside ours: what a row of reproduce.py is, and when it holds.

Reproduces nothing by itself. A row says which figure and setting, what was measured, the paper's
value, ours, how far apart they are, how far they may be, and whether the row held: true, false, or
"explained" with the number of the item in the README's 'Differences from the paper' that shows why
no faithful simulator can hold it. A row on a value to which a constant of ours was fitted says so:
that it holds shows little.

    row = relative("Fig. 12", "13B ShareGPT, vLLM", "requests/s at 0.5 s/token", 1.929, 1.98, 12)
    row.held, row.difference                       # True, '+2.6 %'

[explanations] Why a row of reproduce.py differs: one line each, numbered as in docs/differences.md.

Reproduces nothing. docs/differences.md tells each in full, the README's table has these lines; a
row that is not held carries its line as the reason. A row that holds needs none, whatever stands
here. D3 is retired.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial

TABLE1_SLOTS = "D1: 39.39 GiB a card gives 9,648 slots; 39.40 would give the printed 9.7K"
TABLE1_PARAMETERS = "D2: the architecture has 350 GB of parameters on 8 GPUs, the paper prints 346"
CURVE_175B = "D4: 175B runs for 15 minutes: the seed alone moves ShareGPT's rates by a tenth"
TINY_TRACE = "D5: a trace of fewer than 200 requests: which they are decides"
BEAM = "D6: beam search runs ten minutes unless --beam-seconds says more, without its software"
PREFILL = "D7: prefill decides Fig. 16, and no prefill was published that would fix its cost"
CHATBOT_TEXT = "D8: the paper's own curves show 1.5x, not the 2x of its text"
CHATBOT_DATA = "D9: the authors' conversations are not published; ours have fewer full prompts"
SMALL_BLOCKS = "D10: below 16 slots the paper's kernel reads memory badly; no kernel is modelled"
KNEE_18B = "D11: 30.1 requests/s lies on the knee: a few percent of rate are a factor in latency"
SAME_RUN_TWICE = "D12: ten minutes at the edge of overload; the paper's two drawings differ"
TEXT_RANGES = "D13: the text's extreme is not in the paper's own curves at one common latency"
ANOTHER_DRAW = "D14: the compact tables draw other requests than the authors' files have"
ONE_SEED = "D15: the paper ran one trace, of seed 0, which is held; the mean of seeds need not be"

# How many tolerances each may explain; what is further off is not held.
BOUNDS = {
    TABLE1_SLOTS: 2.0,
    TABLE1_PARAMETERS: 8.0,
    CURVE_175B: 2.0,
    TINY_TRACE: 12.0,
    BEAM: 6.0,
    PREFILL: 2.0,
    CHATBOT_TEXT: 5.0,
    CHATBOT_DATA: 2.0,
    SMALL_BLOCKS: 12.0,
    KNEE_18B: 8.0,
    SAME_RUN_TWICE: 2.0,
    TEXT_RANGES: 3.0,
    ONE_SEED: 2.0,
}


EXPLAINED = "explained"
MOST_EXPLAINED = 12.0  # tolerances, where a reason has no bound of its own


@dataclass(frozen=True)
class Row:
    """One comparison. `held` is True, False or "explained"; `reason` says why if it is the last.

    `fitted` if a constant of ours was fitted to this value of the paper's.
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
    # How far off in tolerances: 1 is the limit.
    excess: float = field(default=0.0, repr=False, compare=False)
    spread: float | None = None  # highest less lowest over the seeds, if there are several
    # The same comparison for another value of ours, if its constructor gave it.
    remake: Callable[[float], Row] | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict:
        """The row with its words as keys."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        shown = {key: value for key, value in shown.items() if value not in (None, "")}
        return {**shown, "ours": None} if math.isnan(self.ours) else shown


def verdict(held: bool | str, reason: str, fitted: bool) -> str:
    """What a table says of a row: yes, NO, or the difference that explains it; and if fitted."""
    text = {True: "yes", False: "NO"}.get(held) or reason.split(":")[0]
    return f"{text}, fitted" if fitted else text


def relative(
    figure: str,
    setting: str,
    metric: str,
    paper: float,
    ours: float,
    percent: float,
    reason: str = "",
) -> Row:
    """Held if ours is within so many percent of the paper's."""
    off = 100.0 * (ours / paper - 1.0)
    return _row(
        figure,
        setting,
        metric,
        paper,
        ours,
        f"{off:+.1f} %",
        f"{percent:g} %",
        abs(off) / percent,
        reason,
        partial(relative, figure, setting, metric, paper, percent=percent, reason=reason),
    )


def absolute(
    figure: str, setting: str, metric: str, paper: float, ours: float, most: float, reason: str = ""
) -> Row:
    """Held if ours is within so many units (percentage points, mostly) of the paper's."""
    off = ours - paper
    return _row(
        figure,
        setting,
        metric,
        paper,
        ours,
        f"{off:+.2f}",
        f"{most:g}",
        abs(off) / most,
        reason,
        partial(absolute, figure, setting, metric, paper, most=most, reason=reason),
    )


def factor(
    figure: str, setting: str, metric: str, paper: float, ours: float, most: float, reason: str = ""
) -> Row:
    """Held if neither is more than `most` times the other."""
    times = ours / paper
    excess = abs(math.log(times)) / math.log(most) if times > 0.0 else math.inf
    return _row(
        figure,
        setting,
        metric,
        paper,
        ours,
        f"x {times:.2f}",
        f"factor {most:g}",
        excess,
        reason,
        partial(factor, figure, setting, metric, paper, most=most, reason=reason),
    )


def as_printed(
    figure: str, setting: str, metric: str, paper: float, ours: float, reason: str = ""
) -> Row:
    """Held if ours, rounded to the paper's digits, is what the paper prints."""
    text = f"{paper:g}"
    digits = len(text.split(".")[1]) if "." in text else 0
    # Half a unit of the last digit, and no more than binary fractions need beyond it.
    excess = abs(ours - paper) / (0.5 * 10.0**-digits * (1 + 1e-9))
    return _row(
        figure,
        setting,
        metric,
        paper,
        ours,
        f"{ours - paper:+.3g}",
        "as printed",
        excess,
        reason,
        partial(as_printed, figure, setting, metric, paper, reason=reason),
    )


def between(
    figure: str, setting: str, metric: str, low: float, high: float, ours: float, reason: str = ""
) -> Row:
    """Held if ours lies in the range that the paper states; the infinite end is left open."""
    if math.isinf(high):
        paper = f"over {low:.4g}"
    else:
        paper = f"up to {high:.4g}" if math.isinf(low) else f"{low:.4g} to {high:.4g}"
    off = max(low - ours, ours - high, 0.0)
    # Off by a tenth of the nearer end counts as off by a tolerance.
    excess = 1.0 + off / (0.1 * abs(low if ours < low else high)) if off else 0.0
    return _row(
        figure,
        setting,
        metric,
        paper,
        ours,
        f"{off:.3g} outside" if off else "inside",
        "inside",
        excess,
        reason,
        partial(between, figure, setting, metric, low, high, reason=reason),
    )


def _row(
    figure: str,
    setting: str,
    metric: str,
    paper: float | str,
    ours: float,
    difference: str,
    tolerance: str,
    excess: float,
    reason: str,
    remake: Callable[[float], Row],
) -> Row:
    """A reason given beforehand is only used, and shown, where the row does not hold."""
    holds = bool(excess <= 1.0 + 1e-9)  # not where it is no number; rounding decides nothing
    difference = "no value" if math.isnan(ours) else difference
    explained = not holds and bool(reason) and excess <= BOUNDS.get(reason, MOST_EXPLAINED)
    held: bool | str = EXPLAINED if explained else holds
    shown = reason if explained else ""
    return Row(
        figure,
        setting,
        metric,
        paper,
        ours,
        difference,
        tolerance,
        held,
        reason=shown,
        excess=excess,
        remake=remake,
    )


def allow(row: Row, excess: float, reason: str) -> Row:
    """Explained, if it is not held but no further off than so many tolerances."""
    if row.held is False and row.excess <= excess:
        return replace(row, held=EXPLAINED, reason=reason)
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
    spread = None if math.isnan(mean) else max(values) - min(values)
    row = rows[0].remake(mean)
    if rows[0].held is True:
        row = allow(row, BOUNDS[ONE_SEED], ONE_SEED)
    return replace(row, fitted=rows[0].fitted, spread=spread)
