"""A latency curve: which rates to simulate, and the rate at which it reaches a latency.

Reproduces: how Figs. 12, 14, 16 and 17 are read. The paper draws straight lines between the rates
it measured, so ours are measured at the same rates and read along the same straight lines. Where
ours has not reached 0.5 s/token at the last of them, further rates follow, 10 % apart; where ours
crosses it between two rates far apart, between which the paper's does not, the gap is halved until
it is narrow.

The left ends of curves, where nothing waits for memory, are among what the constants of
vllm_sim/serving/latency.py are fitted to (tools/fit_latency.py). reproduce.py marks the rows on
those of Fig. 12, which `fitted_points` names: that one is held shows little.

    Curve(run, ((1, 0.05), (2, 0.07), (2.2, 1.1))).needed({})       # the next runs
    fitted_points("ShareGPT", "opt-13b", VLLM)     # ((1, 0.0371), (1.25, 0.0401), (1.5, 0.0424))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

from vllm_sim import paper
from vllm_sim.evaluation.experiments import Done, Run

Point = tuple[float, float]  # requests/s, s/token
STEP = 1.1  # further rates, where the paper's do not suffice
WIDE = 0.08  # a gap between rates, over the higher of them, that is halved
MAX_RATES = 60
FAR_BELOW = 0.75  # rates up to this share of the highest are simulated without waiting for others
LEFT_END = 1.25  # times a curve's first latency


def crossing(line: Sequence[Point], height: float) -> float | None:
    """Where straight lines between these points first reach it; None if they do not."""
    for (low, before), (high, after) in pairwise(line):
        if before < height <= after:
            return low + (height - before) / (after - before) * (high - low)
    return None


@dataclass(frozen=True)
class Curve:
    """One system's curve: the paper's points, and the run that gives ours at any rate."""

    run: Run  # its rate is replaced
    paper: tuple[Point, ...]
    next_rate: float | None = None  # where the drawn line leads when it leaves the axis
    read_at: float = paper.RATE_AT_LATENCY  # s/token
    knee: float = 0.0  # every drawn point below so many times the first is simulated

    @property
    def rates(self) -> list[float]:
        """Rates that the paper, or the artifact next after it, measured."""
        rates = {float(rate) for rate, _ in self.paper}
        if self.next_rate is not None:
            rates.add(self.next_rate)
        return sorted(rates)

    def at(self, rate: float) -> Run:
        return replace(self.run, rate=rate)

    def line(self, done: Done) -> list[Point]:
        """Our points so far, in order of rate, up to the first that has passed all that is read."""
        points: list[Point] = []
        for rate in self._candidates():
            outcome = done.get(self.at(rate))
            if outcome is None:
                break
            points.append((rate, outcome.normalized_latency))
            if self._passed(points):
                break
        gap = self._gap(points)
        while gap is not None:  # halved before?
            rate = _middle(*gap)
            outcome = done.get(self.at(rate))
            if outcome is None:
                break
            points = sorted([*points, (rate, outcome.normalized_latency)])
            gap = self._gap(points)
        return points

    def needed(self, done: Done) -> list[Run]:
        """The next runs that the curve asks for; none if all that is read from it is there."""
        points = self.line(done)
        if self._passed(points):
            gap = self._gap(points)
            return [] if gap is None else [self.at(_middle(*gap))]
        rates = self.rates
        # Overloaded runs take longest: only those far below the highest rate go ahead of need.
        ahead = [rate for rate in rates if rate <= FAR_BELOW * rates[-1]]
        runs = [run for run in map(self.at, ahead) if run not in done]
        return runs or [run for run in map(self.at, self._candidates()) if run not in done][:1]

    def rate_at(self, done: Done, latency: float | None = None) -> float:
        """Requests/s at which our line reaches a latency, by default the one it is read at.

        NaN if it is above it from its first rate on, or never reaches it: no row with it holds.
        """
        found = crossing(self.line(done), self.read_at if latency is None else latency)
        return math.nan if found is None else found

    def _passed(self, points: list[Point]) -> bool:
        """Whether the line has reached all that is read from it."""
        if not points or points[-1][1] < self.read_at:
            return False
        below = self.knee * self.paper[0][1]
        if any(latency < below and rate > points[-1][0] for rate, latency in self.paper):
            return False
        return points[-1][1] >= max(latency for _, latency in self.paper)

    def _gap(self, points: list[Point]) -> tuple[float, float] | None:
        """The rates between which ours crosses, if they are too far apart to read a line there."""
        for (low, before), (high, after) in pairwise(points):
            if before < self.read_at <= after:
                drawn = self._papers_gap()
                if high - low <= WIDE * high or drawn == (low, high):
                    return None
                return low, high
        return None

    def _papers_gap(self) -> tuple[float, float]:
        """The rates between which the paper's own line crosses."""
        below = [rate for rate, latency in self.paper if latency < self.read_at]
        low = max(below, default=self.rates[0])
        return low, min((rate for rate in self.rates if rate > low), default=low)

    def _candidates(self) -> list[float]:
        rates = self.rates
        while len(rates) < MAX_RATES:
            rates.append(round(rates[-1] * STEP, 4))
        return rates


def _middle(low: float, high: float) -> float:
    return round((low + high) / 2.0, 6)


def fitted_points(dataset: str, model: str, system: str) -> tuple[Point, ...]:
    """The points (requests/s, s/token) of one curve of Fig. 12 that the fit uses.

    Of Orca and vLLM the left end; of FasterTransformer the first point on ShareGPT, for its one
    constant. KeyError for a panel or system that the figure does not have.
    """
    curve = paper.FIG12_CURVES[dataset, model][system]
    if system == paper.FASTER_TRANSFORMER:
        return curve[:1] if dataset == "ShareGPT" else ()
    return left_end(curve)


def left_end(curve: Sequence[Point]) -> tuple[Point, ...]:
    """The leading points whose latency is below LEFT_END times the first one's."""
    return tuple(takewhile(lambda point: point[1] < LEFT_END * curve[0][1], curve))
