"""Tables, the ASCII map of the pool, and JSON: how a scenario shows what it found.

Reproduces: the presentation only: one question, one table with its setting in the line above,
the paper's number beside ours, one sentence of answer, the checks that held. All is ASCII.

    table = Table("Slots by part", ("policy", "tokens"), [("max", 20.4)], "983 blocks")
    print(render(table, "plain"))
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from command_line import UsageError

# --format: the name tabulate knows each by.
FORMATS = {"github": "pipe", "plain": "simple", "latex": "latex_booktabs"}
Cell = str | int | float | None


class OutputError(UsageError):
    """A file cannot be written; one line says which and why."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table. `setting` is the line above it: hardware, model, sizes."""

    title: str
    headers: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    setting: str = ""
    decimals: int = 1
    picture: bool = False  # needs characters of equal width, whatever the format

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(
                    f"{self.title}: {len(row)} cells under {len(self.headers)} headers"
                )

    def records(self) -> list[dict[str, Cell]]:
        """The rows for JSON, numbers unrounded, each with the title of its table."""
        return [{"table": self.title, **dict(zip(self.headers, row))} for row in self.rows]


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(slots=True)
class ScenarioReport:
    """What a scenario shows: text and tables in order, checks, and one sentence of answer."""

    number: int
    name: str
    question: str
    parts: list[Table | str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    answer: str = ""

    def check(self, name: str, ok: bool, detail: str) -> None:
        """Note that something held or did not; the run goes on either way."""
        self.checks.append(Check(name, bool(ok), detail))

    def to_json(self) -> dict:
        return {
            "number": self.number,
            "name": self.name,
            "rows": [
                row for part in self.parts if isinstance(part, Table) for row in part.records()
            ],
            "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in self.checks],
            "answer": self.answer,
        }


def cell_text(value: Cell, decimals: int) -> str:
    """A cell as text: thousands separated, floats rounded, nothing for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.{decimals}f}"
    return f"{value:,}" if isinstance(value, int) else value


def render(table: Table, fmt: str) -> str:
    """The table as text in one of FORMATS, its title and setting above it."""
    if table.picture and fmt == "github":
        return f"```\n{render(table, 'plain')}\n```"
    body = [[cell_text(value, table.decimals) for value in row] for row in table.rows]
    numeric = [
        all(isinstance(row[i], int | float | None) for row in table.rows)
        for i in range(len(table.headers))
    ]
    text = tabulate(
        body,
        headers=table.headers,
        tablefmt=FORMATS[fmt],
        disable_numparse=True,
        colalign=["right" if n else "left" for n in numeric] if body else None,
    )
    lines = [f"{table.title}", f"({table.setting})"] if table.setting else [table.title]
    if fmt == "latex":
        lines = [f"% {line}" for line in lines]
    # Markdown needs an empty line before a table.
    return "\n".join([*lines, "", text] if fmt == "github" else [*lines, text])


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


def write_json(path: Path, data: object) -> None:
    """Write JSON as `write_whole` does. Raises OutputError, ValueError for NaN and infinity."""
    write_whole(path, f"{json.dumps(data, indent=1, allow_nan=False)}\n".encode("ascii"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, through a link if it is one. Raises OutputError."""
    check_writable(path)
    target = Path(os.path.realpath(path))
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.chmod(temporary, 0o666 & ~current_umask())
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """OutputError unless `path` could be written: asked before a long run, not only after it."""
    target = Path(os.path.realpath(path))
    reason = None
    try:
        target.stat()
        exists = True
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except OSError as error:  # a name that is too long, say
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    if target.is_dir():
        reason = "it is a directory"
    elif not target.parent.is_dir():
        reason = f"there is no directory {path.parent}"
    elif exists and not target.is_file():
        # Replaced by a file, a device such as /dev/null would be gone for everybody.
        reason = "it is not a regular file"
    elif exists and not os.access(target, os.W_OK):
        reason = "permission denied"
    else:
        try:
            with tempfile.TemporaryFile(dir=target.parent):  # asking for permission is not enough
                pass
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
    if reason is not None:
        raise OutputError(f"cannot write {path}: {reason}")


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
