"""One table: its text in three formats, and its rows as JSON under keys that stay.

Reproduces: the presentation only. A title may say how many iterations a mean is about, a header may
be empty; what reads the JSON goes by `name` and `keys` (docs/json.md).

    table = Table("Slots by part", ("policy", "tokens"), [("max", 20.4)], name="slots")
    print(render(table, "plain"))           # lines of at most 100 columns
    table.to_json()["rows"]                 # [{"policy": "max", "tokens": 20.4}]
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import tabulate

# --format: the name tabulate knows each by.
FORMATS = {"github": "pipe", "plain": "simple", "latex": "latex_booktabs"}
Cell = str | int | float | None
WIDTH = 100  # columns of a printed line


def counted(number: int, noun: str) -> str:
    """'1 block', '1,024 blocks'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


@dataclass(frozen=True, slots=True)
class Table:
    """One table. `setting` is the line above it: hardware, model, sizes.

    For JSON: `name` is its id, `keys` those of its columns (the words of the headers unless given),
    `index` the number of columns, the first ones, that together say which row it is.
    """

    title: str
    headers: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    setting: str = ""
    decimals: int = 1
    picture: bool = False  # needs characters of equal width, whatever the format
    name: str = ""
    keys: tuple[str, ...] = ()
    index: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(
                    f"{self.title}: {len(row)} cells under {len(self.headers)} headers"
                )

    def columns(self) -> tuple[str, ...]:
        """The keys of a row in JSON. ValueError unless each column has one of its own."""
        keys = self.keys or tuple(key_of(header) for header in self.headers)
        if len(set(keys)) < len(self.headers) or "" in keys:
            raise ValueError(f"{self.title}: no key for each of {self.headers}")
        return keys

    def records(self) -> list[dict[str, Cell]]:
        """The rows for JSON, numbers unrounded; under a picture's name comes more than one line."""
        columns, rows = self.columns(), []
        for row in self.rows:
            name = rows[-1][columns[0]] if self.picture and rows and row[0] == "" else row[0]
            rows.append(dict(zip(columns, (name, *row[1:]), strict=True)))
        return rows

    def to_json(self) -> dict[str, object]:
        """The table as docs/json.md has it. ValueError for one without a name."""
        if not self.name:
            raise ValueError(f"{self.title}: a table in JSON needs a name")
        return {
            "id": self.name,
            "title": self.title,
            "setting": self.setting,
            "headers": list(self.headers),
            "index": list(self.columns()[: self.index]),
            "rows": self.records(),
        }


def key_of(header: str) -> str:
    """A header as a key: lower case, words joined by _, and % as percent."""
    return "_".join(re.findall(r"[a-z0-9]+", header.lower().replace("%", " percent ")))


def cell_text(value: Cell, decimals: int) -> str:
    """A cell as text: thousands separated, floats rounded, nothing for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.{decimals}f}"
    return f"{value:,}" if isinstance(value, int) else value


def wrapped(text: str, start: str = "", width: int = WIDTH) -> str:
    """Text in lines of at most `width` columns, words whole; each line begins with `start`."""
    indents = {"initial_indent": start, "subsequent_indent": start}
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, width, **indents, **whole)


def _folded(lines: list[list[str]]) -> list[list[str]]:
    """Headers and rows with as many breaks as WIDTH asks for: the widest columns give way.

    Headers are folded before cells, and nothing where even a word a line would be too wide.
    """

    def longest(texts: Sequence[str]) -> int:
        return max(map(len, texts), default=0)

    columns = [*zip(*lines)]
    widths = [*map(longest, columns)]
    whole = [longest([*header.split(), *cells]) for header, *cells in columns]
    least = [longest(" ".join(column).split()) for column in columns]
    room = WIDTH - 2 * (len(widths) - 1)
    if sum(least) > room:
        return lines
    for floor in whole, least:
        while sum(widths) > max(room, sum(floor)):
            wide = [column for column, width in enumerate(widths) if width > floor[column]]
            widths[max(wide, key=widths.__getitem__)] -= 1
    return [
        [c if len(c) <= width else wrapped(c, width=width) for c, width in zip(line, widths)]
        for line in lines
    ]


def render(table: Table, fmt: str) -> str:
    """The table as text in one of FORMATS, its title and setting above it.

    In plain text cells and headers are folded where a line would have more than WIDTH columns.
    """
    if table.picture and fmt == "github":
        return f"```\n{render(table, 'plain')}\n```"
    body = [[cell_text(value, table.decimals) for value in row] for row in table.rows]
    numeric = [
        all(isinstance(row[i], int | float | None) for row in table.rows)
        for i in range(len(table.headers))
    ]
    headers = [*table.headers]
    if fmt == "plain" and body and not table.picture:
        headers, *body = _folded([headers, *body])
    tabulate.MIN_PADDING = 0 if fmt == "plain" else 2  # of headers: the widest need the room
    text = tabulate.tabulate(
        body,
        headers=headers,
        tablefmt=FORMATS[fmt],
        disable_numparse=True,
        colalign=["right" if n else "left" for n in numeric] if body else None,
        preserve_whitespace=True,  # of what is indented
    )
    above = [table.title, f"({table.setting})"] if table.setting else [table.title]
    lines = [wrapped(line, "% " if fmt == "latex" else "") for line in above]
    # Markdown needs an empty line before a table.
    return "\n".join([*lines, "", text] if fmt == "github" else [*lines, text])
