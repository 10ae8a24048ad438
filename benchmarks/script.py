"""What the benchmarks share as scripts: their options, progress, tables, and figures as JSON.

def run(argv):
    parser = options(__doc__, repeats=30)
    script = Script(__file__, parser, argv)
    rows = [measure(name, script.args.repeats) for name in script.each(SHAPES)]
    show(table("Title", COLUMNS, rows, where))
    return script.write({"rows": rows}, {"rows": 1})
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from vllm_sim.reporting.arguments import OneLineParser, positive
from vllm_sim.reporting.command_line import UsageError, exit_code
from vllm_sim.reporting.documents import measured
from vllm_sim.reporting.files import DASH, check_writable, out_file, pictures, write_json
from vllm_sim.reporting.progress import Progress
from vllm_sim.reporting.tables import Cell, Table, render

Row = Mapping[str, object]
Column = tuple[str, str | Callable[[Row], Cell]]  # header, and a key of a row or a function of it


def options(doc: str, repeats: int | None = None, counts: str = "median", drawn: str = ""):
    """A parser of --json, --quiet, and if given --repeats (`counts`: of them) and --figures."""
    parser = OneLineParser(description=doc.split("\n")[0])
    add = parser.add_argument
    if repeats:
        told = f"runs of each; the {counts} counts (default {repeats})"
        add("--repeats", type=positive, default=repeats, metavar="N", help=told)
    add("--json", type=out_file, metavar="FILE", help=f"write the figures here too ({DASH})")
    add("--quiet", action="store_true", help="no progress on stderr")
    if drawn:
        told = f"draw {drawn} there (needs matplotlib)"
        add("--figures", type=pictures, metavar="DIR", help=told)
    return parser


class Script:
    """One run of a benchmark: `args`, `progress`, and the clock. Raises UsageError."""

    def __init__(
        self, file: str, parser: OneLineParser, argv: list[str] | None, on_gpu: bool = True
    ) -> None:
        """Refuse at once an output that cannot be written, or a machine without a GPU."""
        self.name, self.args = Path(file).name, parser.parse_args(argv)
        if self.args.json:
            check_writable(self.args.json)
        if on_gpu:
            import torch  # only here: others start without it

            if not torch.cuda.is_available():
                raise UsageError("needs a CUDA device")
        self.start = time.perf_counter()
        self.progress = Progress.on(sys.stderr, self.name, quiet=self.args.quiet)

    def each(self, points: Collection, words: str = "", part: tuple[int, int] = (0, 1)) -> Iterator:
        """The points in turn, each told on stderr: as part number i of n, by `words` or itself."""
        shown = self.progress.part(*part, words)
        for number, point in enumerate(points):
            shown.at(number, len(points), "" if words else f"{point}")
            yield point
        self.progress.clear()

    def write(self, found: Mapping[str, object], index: Mapping[str, int], code: int = 0) -> int:
        """With --json the figures as a document, whose tables `index` names; returns `code`."""
        if self.args.json:
            took, name = time.perf_counter() - self.start, f"benchmarks/{self.name}"
            write_json(self.args.json, measured(name, vars(self.args), found, index, code, took))
        return code


def table(
    title: str, columns: Iterable[Column], rows: Iterable[Row], setting: str, decimals: int = 2
) -> Table:
    """A table of rows of figures."""
    headers, cells = zip(*columns)
    body = [
        tuple(row[cell] if isinstance(cell, str) else cell(row) for cell in cells) for row in rows
    ]
    return Table(title, headers, body, setting, decimals)


def show(made: Table) -> None:
    """Print a table at once, plain."""
    print(render(made, "plain"), flush=True)


def entry(file: str, run: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """main(argv=None) of a benchmark: its exit code, errors of the user in one line."""
    return lambda argv=None: exit_code(Path(file).name, lambda: run(argv))
