"""How far a long run is, on stderr: a bar on a terminal, a line every ten seconds in a log.

Reproduces nothing. A script makes one Progress and hands it, or a part of it, to whatever takes
long; what is not given one works in silence. Nothing goes to stdout, and nothing at all is shown of
a run that ends before the first line is due.

    with Progress.on(sys.stderr, "main.py", quiet=args.quiet) as progress:
        for number in range(4):
            work(progress.part(number, 4, f"scenario {number + 1}"))     # calls at(done, total)

The clock and the stream are given, so that tests decide both.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

LOG_S = 10.0  # between two lines in a log, and before the first
FIRST_S, NEXT_S = 0.5, 0.2  # before a bar is drawn, and between two drawings
BAR = 24  # characters
Clock = Callable[[], float]  # seconds that only grow


@dataclass(slots=True)
class Display:
    """Where progress is shown, and when next. A stream that fails is not written to again."""

    stream: TextIO
    script: str
    clock: Clock
    columns: int | None  # of the terminal; None: a log
    start: float = 0.0
    due: float = 0.0
    shown: float = 0.0  # share, which never goes back
    drawn: int = field(default=0)  # characters on the terminal's line

    def __post_init__(self) -> None:
        self.start = self.clock()
        self.due = self.start + (LOG_S if self.columns is None else FIRST_S)

    def show(self, share: float, words: str) -> None:
        now = self.clock()
        self.shown = max(self.shown, min(1.0, share))
        seconds = f"{100 * self.shown:.0f} %, {now - self.start:.0f} s"
        if self.columns is None:
            self.due = now + LOG_S
            self._write(f"{self.script}: {seconds}{words and ', '}{words}\n")
            return
        self.due = now + NEXT_S
        filled = int(BAR * self.shown)
        line = f"[{'#' * filled}{'.' * (BAR - filled)}] {seconds}{words and ', '}{words}"
        line = line[: self.columns - 1]
        before, self.drawn = self.drawn, len(line)
        self._write(f"\r{line.ljust(before)}")

    def clear(self) -> None:
        """Take the bar away, so that something else can be printed; the next is drawn in time."""
        before, self.drawn = self.drawn, 0
        if before:
            self._write(f"\r{' ' * before}\r")

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # full, gone or closed: the run goes on without
            self.due = float("inf")
            self.drawn = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """A part of a run, from `low` on and `width` wide, of the whole's 0 to 1; or silence."""

    display: Display | None = None
    low: float = 0.0
    width: float = 1.0
    words: str = ""

    @classmethod
    def on(
        cls,
        stream: TextIO | None,
        script: str,
        *,
        quiet: bool = False,
        clock: Clock = time.monotonic,
        columns: int | None = None,
    ) -> Progress:
        """The whole of a run, shown on `stream` (none if that is None, or with `quiet`).

        `columns` is the terminal's width, asked of it unless given.
        """
        if stream is None or quiet:
            return cls()
        if not _is_terminal(stream):
            columns = None
        elif columns is None:
            columns = shutil.get_terminal_size().columns
        return cls(Display(stream, script, clock, columns))

    def part(self, index: float, count: float, words: str = "") -> Progress:
        """Part `index` of `count` equal ones, which say `words` after what this one says."""
        both = ", ".join(filter(None, (self.words, words)))
        width = self.width / max(1, count)
        return Progress(self.display, self.low + index * width, width, both)

    def at(self, done: float, total: float, words: str = "") -> None:
        """So much of so much is done. Cheap where nothing is due."""
        display = self.display
        if display is None or display.clock() < display.due:
            return
        both = ", ".join(filter(None, (self.words, words)))
        display.show(self.low + self.width * done / max(1, total), both)

    def clear(self) -> None:
        """Before anything else is printed to the terminal."""
        if self.display is not None:
            self.display.clear()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


SILENT = Progress()


def _is_terminal(stream: TextIO) -> bool:
    with contextlib.suppress(OSError, ValueError):  # closed
        return stream.isatty()
    return False
