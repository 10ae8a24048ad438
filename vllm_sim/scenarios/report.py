"""How a scenario shows what it found, the ASCII map of the pool, and runs put together.

Reproduces: the presentation only: one question, one table with its setting in the line above,
the paper's number beside ours, one sentence of answer, the checks that held. All is ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_sim.reporting.files import (
    OutputError,
    check_writable,
    write_json,
    write_whole,
)
from vllm_sim.reporting.tables import FORMATS, Cell, Table, cell_text, render

__all__ = [
    "FORMATS",
    "Cell",
    "Check",
    "OutputError",
    "ScenarioReport",
    "Table",
    "block_map",
    "cell_text",
    "check_writable",
    "checks_table",
    "render",
    "render_scenario",
    "write_json",
    "write_whole",
]


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(slots=True)
class ScenarioReport:
    """What a scenario shows: text and tables in order, checks, and one sentence of answer.

    `data` are tables for JSON alone: the figures that stand in a sentence of the text.
    """

    number: int
    name: str
    question: str
    parts: list[Table | str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    answer: str = ""
    data: list[Table] = field(default_factory=list)

    def check(self, name: str, ok: bool, detail: str) -> None:
        """Note that something held or did not; the run goes on either way."""
        self.checks.append(Check(name, bool(ok), detail))

    def note(self, name: str, **figures: Cell) -> None:
        """A table of one row for JSON alone."""
        self.data.append(
            Table(
                name.replace("_", " "),
                tuple(figures),
                [tuple(figures.values())],
                name=name,
                index=0,
            )
        )

    def to_json(self) -> dict:
        """What it asked and answered; its tables and checks are in lists of their own."""
        return {
            "number": self.number,
            "name": self.name,
            "question": self.question,
            "answer": self.answer,
        }

    def tables_json(self) -> list[dict]:
        """Its tables, each with the scenario's number."""
        shown = [part for part in self.parts if isinstance(part, Table)]
        return [{**table.to_json(), "scenario": self.number} for table in [*shown, *self.data]]

    def checks_json(self) -> list[dict]:
        return [
            {"scenario": self.number, "name": c.name, "ok": c.ok, "detail": c.detail}
            for c in self.checks
        ]


def render_scenario(report: ScenarioReport, fmt: str) -> str:
    """A whole scenario: heading, question, parts, answer."""
    comment = "% " if fmt == "latex" else ""
    heading = f"Scenario {report.number}: {report.name}"
    lines = (
        [f"## {heading}"]
        if fmt == "github"
        else [f"{comment}{heading}", f"{comment}{'=' * len(heading)}"]
    )
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
    num_blocks: int,
    block_size: int,
    spans: Sequence[tuple[int, str]],
    *,
    per_char: int,
    width: int = 82,
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
