"""What a scenario returns: what it measured, as tables and checks and as data for pictures.

Reproduces: the presentation only: one question, one table with its setting in the line above,
the paper's number beside ours, one sentence of answer, the checks that held. All is ASCII.

    report = baseline.run(setting)
    print(render_scenario(report, "plain"))
    report.tables_json(), report.bars           # for --json, for --figures
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kv_cache_manager import MemoryUsage
from vllm_sim.reporting.tables import Cell, Table, render
from vllm_sim.scenarios.recorder import Moment, Recording

SERIES_LENGTH = 2000  # iterations of a steady state that a picture shows
Spans = list[tuple[int, str]]  # runs of slots from slot 0 on: how many, and a part of MemoryUsage


@dataclass(frozen=True, slots=True)
class Series:
    """The slots of one run over its iterations, and those of them in which a group gave way."""

    name: str
    usages: Sequence[MemoryUsage]
    preemptions: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Pool:
    """Slot by slot, what a pool holds; spans of different requests are never joined."""

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


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(slots=True)
class ScenarioReport:
    """What a scenario found: text and tables in order, checks, and one sentence of answer.

    `data` are tables for JSON alone: the figures that stand in a sentence of the text. The rest is
    what pictures and the timeline are made of.
    """

    number: int
    name: str
    question: str
    parts: list[Table | str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    answer: str = ""
    data: list[Table] = field(default_factory=list)
    bars: dict[str, dict[str, float]] = field(default_factory=dict)  # system -> part -> percent
    series: list[Series] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    savings: list[Saving] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)
    map: tuple[Recording, Moment] | None = None  # a moment that is worth a picture

    def check(self, name: str, ok: bool, detail: str) -> None:
        """Note that something held or did not; the run goes on either way."""
        self.checks.append(Check(name, bool(ok), detail))

    def note(self, name: str, **figures: Cell) -> None:
        """A table of one row for JSON alone."""
        row = [tuple(figures.values())]
        self.data.append(Table(name.replace("_", " "), tuple(figures), row, name=name, index=0))

    def to_json(self) -> dict:
        """What it asked and answered; its tables and checks are in lists of their own."""
        return {key: getattr(self, key) for key in ("number", "name", "question", "answer")}

    def tables_json(self) -> list[dict]:
        """Its tables, each with the scenario's number."""
        shown = [part for part in self.parts if isinstance(part, Table)]
        return [{**table.to_json(), "scenario": self.number} for table in [*shown, *self.data]]

    def checks_json(self) -> list[dict]:
        """Its checks, each with the scenario's number."""
        return [
            {"scenario": self.number, "name": c.name, "ok": c.ok, "detail": c.detail}
            for c in self.checks
        ]


def render_scenario(report: ScenarioReport, fmt: str) -> str:
    """A whole scenario: heading, question, parts, answer."""
    comment = "% " if fmt == "latex" else ""
    heading = f"Scenario {report.number}: {report.name}"
    lines = [f"{comment}{heading}", f"{comment}{'=' * len(heading)}"]
    if fmt == "github":
        lines = [f"## {heading}"]
    lines += [f"{comment}{report.question}", ""]
    for part in report.parts:
        if isinstance(part, Table):
            lines.append(render(part, fmt))
        elif fmt == "github":
            lines.append(f"```\n{part}\n```")
        else:
            lines += [comment + line for line in part.split("\n")]
        lines.append("")
    return "\n".join([*lines, f"{comment}Answer: {report.answer}", ""])


def checks_table(reports: Sequence[ScenarioReport]) -> Table:
    """All checks of all scenarios, failed ones marked."""
    rows = [
        (report.number, "ok" if check.ok else "FAILED", check.name, check.detail)
        for report in reports
        for check in report.checks
    ]
    return Table("Checks", ("scenario", "result", "check", "found"), rows)


def block_map(
    num_blocks: int, block_size: int, spans: Spans, *, per_char: int, width: int = 82
) -> str:
    """An ASCII picture of the pool, each character the commonest kind among `per_char` blocks.

    `spans` gives runs of slots from slot 0 on: (number of slots, kind), a kind being a character.
    """
    total = sum(count for count, _ in spans)
    if total != num_blocks * block_size:
        raise ValueError(f"the spans cover {total} of {num_blocks * block_size} slots")
    per_cell = per_char * block_size
    cells: list[dict[str, int]] = [{} for _ in range(-(-total // per_cell))]
    slot = 0
    for count, kind in spans:
        end = slot + count
        while slot < end:
            cell = slot // per_cell
            step = min(end, (cell + 1) * per_cell) - slot
            cells[cell][kind] = cells[cell].get(kind, 0) + step
            slot += step
    text = "".join(max(cell, key=lambda kind: cell[kind]) for cell in cells)
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))
