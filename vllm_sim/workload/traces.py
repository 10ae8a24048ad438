"""Request traces: who arrived when, with how many tokens, as servers recorded it.

Reproduces nothing of the paper, whose arrivals are drawn (section 6.1); capacity.py and main.py
serve these instead with `--trace FILE`. trace_formats.py knows the formats, by content.

    trace = read_trace("AzureLLMInferenceTrace_conv.csv.gz")
    trace = trace.up_to(2048)               # what is longer is refused
    trace.arrivals, trace.prompts, trace.outputs, trace.refused

A row that cannot be served is refused by itself, with its reason; a file of which nothing can be
is a WorkloadError. docs/capacity.md lists formats, names of columns and reasons.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from vllm_sim.reporting.files import short_name
from vllm_sim.reporting.tables import counted
from vllm_sim.workload.text_files import TooLongError, WorkloadError, read_text
from vllm_sim.workload.trace_formats import (
    COLUMNS,
    Format,
    Row,
    RowError,
    block_of,
    find_format,
    hash_ids,
    line_of,
    tokens_of,
)
from vllm_sim.workload.trace_times import understand

MAX_SPAN_S = 10 * 366 * 86400.0


@dataclass(frozen=True)
class Refusal:
    """How many rows were refused for one reason, and the line of the first."""

    rows: int
    first_line: int


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival, and what became of the rows of their file.

    `arrivals` are seconds from the first request, float64 (R,), or None where the file has no
    times; `prompts` and `outputs` are tokens, int64 (R,). What `times` and `hash_hits` say is of
    all sound rows, whatever their length.
    """

    name: str
    form: str  # which of the formats
    rows_read: int
    prompts: np.ndarray
    outputs: np.ndarray
    arrivals: np.ndarray | None = None
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    lines: np.ndarray | None = None  # of each request, int64 (R,)
    rows_sorted: int = 0  # whose time lies before that of the row above
    hash_hits: int = 0  # leading prefix blocks that an earlier request of the file had
    hash_blocks: int = 0  # 0: the file has none
    hash_block: int = 0  # tokens of one; 0: not known
    times: str = "no times"  # how they were understood, with their span and the mean rate

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrivals[-1] - self.arrivals[0])

    def up_to(self, max_len: int) -> Trace:
        """The requests of at most `max_len` tokens in all; WorkloadError if there is none."""
        fits = self.prompts + self.outputs <= max_len
        if fits.all():
            return self
        reason = f"longer than {max_len:,} tokens"
        too_long = self.lines[~fits]
        refused = {**self.refused, reason: Refusal(len(too_long), int(too_long.min()))}
        if not fits.any():
            raise WorkloadError(f"{self.name}: no request can be served: {why(refused)}")
        return replace(self._of(fits), refused=refused)

    def part(self, first: int, end: int, name: str) -> Trace:
        """Some requests in a row, as a trace of this name that begins with the first of them."""
        part = self._of(slice(first, end))
        return replace(part, name=name, arrivals=part.arrivals - part.arrivals[0])

    def _of(self, which: slice | np.ndarray) -> Trace:
        columns = ("prompts", "outputs", "lines", "arrivals")
        found = {name: getattr(self, name) for name in columns}
        kept = {name: None if one is None else one[which] for name, one in found.items()}
        return replace(self, **kept)

    def arriving(self, rate: float, seed: int) -> Trace:
        """The same requests in the same order, as a Poisson process of `rate` a second.

        An infinite rate lets all arrive at once (section 6.1's arrivals, for times not kept).
        """
        gaps = np.random.default_rng([seed, 7]).exponential(1.0, len(self)) / rate
        gaps[0] = 0.0
        arrivals = np.cumsum(gaps)
        return replace(self, arrivals=arrivals, times=_times(f"times drawn, {rate:g}/s", arrivals))


def _times(told: str, arrivals: np.ndarray) -> str:
    """One line: what times are, how long they span and their mean rate."""
    count, span = len(arrivals), float(arrivals[-1] - arrivals[0])
    told += f": {counted(count, 'request')} over {span:,.3f} s"
    rate = (count - 1) / span if span else 0.0
    return f"{told}, {rate:,.{'0f' if rate >= 1000 else '3g'}} requests a second" if span else told


def why(refused: Mapping[str, Refusal]) -> str:
    """The reasons in one line, the commonest first."""
    found = sorted(refused.items(), key=lambda item: -item[1].rows)
    return "; ".join(
        f"{refusal.rows:,} {reason} (first in line {refusal.first_line:,})"
        for reason, refusal in found
    )


def read_trace(
    path: str | os.PathLike[str], at_most: int | None = None, unit: str | None = None
) -> Trace:
    """The requests of a file, of its first `at_most` rows if given, however large the file.

    `unit` (s, ms, us, ns) is that of times that are numbers, found unless given. Times before the
    row above are put in order, and counted. Raises WorkloadError for a file that cannot be read
    (read_text), is in no known format, has no row that can be served, or times whose unit must be
    asked for.
    """
    name = os.fspath(path)
    with closing(read_text(path, part=at_most is not None)) as lines:
        try:
            form, rows = find_format(name, lines)
            return _collect(name, form, islice(rows, at_most), unit)
        except TooLongError as error:
            raise TooLongError(f"{error}: read its first rows with --trace-rows N") from None


def _collect(name: str, form: Format, rows: Iterator[Row], unit: str | None) -> Trace:
    counts: dict[str, Refusal] = {}

    def refuse(reason: str, line: int) -> None:
        old = counts.get(reason, Refusal(0, line))
        counts[reason] = Refusal(old.rows + 1, old.first_line)

    found, times, hashes = [], [], []
    read = 0
    for place, row in rows:
        read += 1
        try:
            if isinstance(row, RowError):
                raise row
            tokens = tokens_of(form, row)
            hashes.append(hash_ids(row) if form.hashed else ())
            found.append((*tokens, line_of(place)))
            times.append(row.get(form.time))
        except RowError as error:
            refuse(str(error), line_of(place))
    block, told, arrivals, late = block_of([row[0] for row in found], hashes), "no times", None, 0
    if form.time is not None and found:
        try:
            told, seconds = understand(times, form, block, unit)
        except WorkloadError as error:
            raise WorkloadError(f"{name}: {error}") from None
        sound = [i for i, one in enumerate(seconds) if not isinstance(one, str)]
        for row, one in zip(found, seconds):
            if isinstance(one, str):
                refuse(one, row[2])
        found, hashes = [found[i] for i in sound], [hashes[i] for i in sound]
        arrivals = np.array([seconds[i] for i in sound])
    if not found:
        raise WorkloadError(f"{name}: {_nothing(form, counts)}")
    columns = np.array(found, dtype=np.int64).T
    if arrivals is not None:
        late = int((np.diff(arrivals) < 0).sum())
        order = np.argsort(arrivals, kind="stable")
        arrivals = arrivals[order] - arrivals.min()
        columns = columns[:, order]
        hashes = [hashes[i] for i in order.tolist()]
        if arrivals[-1] > MAX_SPAN_S:
            raise WorkloadError(
                f"{name}: {told}: they span {arrivals[-1]:.3g} s, more than ten years: give "
                "--time-unit"
            )
        told = _times(told, arrivals)
    prompts, outputs, lines = columns
    rest = (lines, late, *prefix_hits(hashes), block, told)
    name = short_name(name)
    return Trace(name, form.name, read, prompts, outputs, arrivals, counts, *rest)


def _nothing(form: Format, counts: Mapping[str, Refusal]) -> str:
    """Why no row of a file can be served."""
    if not counts:
        return "no rows after the header"
    told = [f"no request can be served: {why(counts)}"]
    for role, name in (("prompt", form.prompt), ("output", form.output)):
        if f"the {role} is not a number of tokens" in counts and name in COLUMNS[role][1].split():
            told.append(
                f"{name!a} seems to be text: give its tokens as {COLUMNS[role][0].split()[0]}"
            )
            told += ["there are no times such as arrival_time"] * (form.time is None)
    return "; ".join(told)


def prefix_hits(hashes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(blocks found, blocks asked for) of prompts in order of arrival, with an unbounded cache.

    Of each prompt its leading blocks count as found, up to the first that no earlier prompt had:
    no cache of prefixes can find more, as an id stands for a block and all before it.
    """
    seen: set[int] = set()
    hits = blocks = 0
    for ids in hashes:
        blocks += len(ids)
        for one in ids:
            if one not in seen:
                break
            hits += 1
        seen.update(ids)
    return hits, blocks
