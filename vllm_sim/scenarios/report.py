"""What is shown of a scenario: tables, checks and an answer, and data for JSON and pictures.

Reproduces: the presentation only: one question, one table with its setting in the line above,
the paper's number beside ours, one sentence of answer, the checks that held. All is ASCII. A
scenario's `run` returns what it measured, and its `report` makes all of this from that alone.

    report = baseline.report(baseline.run(setting))
    print(render_scenario(report, "plain"))
    report.tables_json(), report.bars           # for --json, for --figures
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kv_cache_manager import MemoryUsage
from vllm_sim.playback.recorder import Moment, Recording
from vllm_sim.reporting.tables import Cell, Table, render, wrapped

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
    batch: float  # mean
    unexplained: int  # iterations in which the blocks saved were not those of the shared prompts


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class ScenarioReport:
    """What a scenario found: text and tables in order, checks, and one sentence of answer.

    `data` are tables for JSON alone: the figures that stand in a sentence of the text. The rest is
    what pictures and the timeline are made of.
    """

    number: int
    name: str
    question: str
    parts: Sequence[Table | str] = ()
    checks: Sequence[Check] = ()
    answer: str = ""
    data: Sequence[Table] = ()
    bars: Mapping[str, dict[str, float]] = field(default_factory=dict)  # system -> part -> percent
    series: Sequence[Series] = ()
    pools: Sequence[Pool] = ()
    savings: Sequence[Saving] = ()
    recordings: Sequence[Recording] = ()
    map: tuple[Recording, Moment] | None = None  # a moment that is worth a picture

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
            {"scenario": self.number, "name": c.name, "ok": bool(c.ok), "detail": c.detail}
            for c in self.checks
        ]


def note(name: str, **figures: Cell) -> Table:
    """A table of one row for JSON alone."""
    title, row = name.replace("_", " "), tuple(figures.values())
    return Table(title, tuple(figures), [row], name=name, index=0)


def render_scenario(report: ScenarioReport, fmt: str) -> str:
    """A whole scenario: heading, question, parts, answer; lines as long as a table's may be."""
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
            lines += ["```", *map(wrapped, part.split("\n")), "```"]
        else:
            lines += [wrapped(line, comment) for line in part.split("\n")]
        lines.append("")
    return "\n".join([*lines, wrapped(f"Answer: {report.answer}", comment), ""])


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
    slots = [kind for count, kind in spans for _ in range(count)]
    if len(slots) != num_blocks * block_size:
        raise ValueError(f"the spans cover {len(slots)} of {num_blocks * block_size} slots")
    step = per_char * block_size
    cells = (Counter(slots[first : first + step]) for first in range(0, len(slots), step))
    text = "".join(max(cell, key=cell.get) for cell in cells)
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))
