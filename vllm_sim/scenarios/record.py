"""What the scenarios leave for pictures and for a timeline, where somebody asked for them.

Reproduces nothing by itself: main.py hands a RunRecord to the scenarios only with --figures or
--timeline; without one nothing here is made, so that a run costs and prints what it always does.

    record = RunRecord(pictures=True)
    scenario_baseline.run(setting, record)
    record.bars, record.series
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kv_cache_manager import MemoryUsage
from vllm_sim.scenarios.recorder import Moment, Recorder

SERIES_LENGTH = 2000  # iterations of a steady state that a picture shows
Spans = list[tuple[int, str]]  # runs of slots from slot 0 on: how many, and a part of MemoryUsage


@dataclass(frozen=True, slots=True)
class Bar:
    """The slots of one system in percent: ours by part of MemoryUsage, the paper's as Fig. 2's."""

    system: str
    ours: dict[str, float]
    paper: dict[str, float] | None


@dataclass(slots=True)
class Series:
    """The slots of one run over its iterations."""

    scenario: int
    name: str
    usages: list[MemoryUsage] = field(default_factory=list)
    preemptions: list[int] = field(default_factory=list)  # iterations in which a group gave way

    def add(self, usage: MemoryUsage) -> None:
        """The next iteration's; of more than SERIES_LENGTH the first are kept."""
        if len(self.usages) < SERIES_LENGTH:
            self.usages.append(usage)


@dataclass(frozen=True, slots=True)
class Pool:
    """Slot by slot, what a pool holds; spans of different requests are never joined."""

    scenario: int
    name: str
    block_size: int
    spans: Spans


@dataclass(frozen=True, slots=True)
class Saving:
    """Blocks saved by sharing in percent (Fig. 15): ours and, where there is one, the paper's."""

    lengths: str
    num_samples: int
    ours: float
    paper: float | None


@dataclass(slots=True)
class RunRecord:
    """All of it, in the order in which the scenarios came to it."""

    setting: str = ""  # the line that is printed above tables
    bars: list[Bar] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    savings: list[Saving] = field(default_factory=list)
    runs: list[Recorder] = field(default_factory=list)
    # Moments of `runs` that are worth a picture, by scenario.
    maps: dict[int, tuple[Recorder, Moment]] = field(default_factory=dict)

    def new_series(self, scenario: int, name: str) -> Series:
        """An empty series, to be filled while a run goes on."""
        self.series.append(Series(scenario, name))
        return self.series[-1]
