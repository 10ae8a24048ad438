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
from dataclasses import dataclass, field, replace

import numpy as np

from vllm_sim.workload.text_files import WorkloadError, read_text
from vllm_sim.workload.trace_formats import (
    Format,
    Row,
    RowError,
    find_format,
    hash_ids,
    line_of,
    moment_of,
    tokens_of,
)

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
    times; `prompts` and `outputs` are tokens, int64 (R,). What `hash_hits` says is of all sound
    rows, whatever their length.
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
        arrivals = None if self.arrivals is None else self.arrivals[fits]
        return replace(
            self,
            prompts=self.prompts[fits],
            outputs=self.outputs[fits],
            lines=self.lines[fits],
            refused=refused,
            arrivals=arrivals,
        )

    def arriving(self, rate: float, seed: int) -> Trace:
        """The same requests in the same order, as a Poisson process of `rate` a second.

        An infinite rate lets all arrive at once (section 6.1's arrivals, for times not kept).
        """
        gaps = np.random.default_rng([seed, 7]).exponential(1.0, len(self)) / rate
        gaps[0] = 0.0
        return replace(self, arrivals=np.cumsum(gaps))


def why(refused: Mapping[str, Refusal]) -> str:
    """The reasons in one line, the commonest first."""
    found = sorted(refused.items(), key=lambda item: -item[1].rows)
    return "; ".join(
        f"{refusal.rows:,} {reason} (first in line {refusal.first_line:,})"
        for reason, refusal in found
    )


def read_trace(path: str | os.PathLike[str], at_most: int | None = None) -> Trace:
    """The requests of a file, of its first `at_most` rows if given.

    Times before the row above are put in order, and counted. Raises WorkloadError for a file that
    cannot be read (read_text), is in no known format, or has no row that can be served.
    """
    name = os.fspath(path)
    form, rows = find_format(name, read_text(path))
    return _collect(path, form, rows, at_most)


def _collect(
    path: str | os.PathLike[str], form: Format, rows: Iterator[Row], at_most: int | None
) -> Trace:
    counts: dict[str, Refusal] = {}
    times, prompts, outputs, numbers, hashes = [], [], [], [], []
    read = 0
    calendar: bool | None = None
    for place, row in rows:
        read += 1
        try:
            if isinstance(row, RowError):
                raise row
            prompt, output = tokens_of(form, row)
            moment, dated = moment_of(form, row)
            if calendar is not None and dated is not calendar:
                raise RowError("the time is of another kind than in the rows above")
            ids = hash_ids(row) if form.hashed else ()
        except RowError as error:
            old = counts.get(str(error), Refusal(0, line_of(place)))
            counts[str(error)] = Refusal(old.rows + 1, old.first_line)
        else:
            calendar = dated
            times.append(moment)
            prompts.append(prompt)
            outputs.append(output)
            numbers.append(line_of(place))
            hashes.append(ids)
        if read == at_most:
            break
    if not prompts:
        told = f"no request can be served: {why(counts)}" if counts else "no rows after the header"
        raise WorkloadError(f"{os.fspath(path)}: {told}")
    columns = [np.array(column, dtype=np.int64) for column in (prompts, outputs, numbers)]
    arrivals, late = None, 0
    if form.time is not None:
        arrivals = np.array(times)
        late = int((np.diff(arrivals) < 0).sum())
        order = np.argsort(arrivals, kind="stable")
        arrivals = arrivals[order] - arrivals.min()
        columns = [column[order] for column in columns]
        hashes = [hashes[i] for i in order.tolist()]
        if arrivals[-1] > MAX_SPAN_S:
            raise WorkloadError(
                f"{os.fspath(path)}: its times span {arrivals[-1]:.3g} s, more than ten years: "
                "times are in seconds, or milliseconds if the column says so"
            )
    name = ascii(os.path.basename(os.fspath(path)))[1:-1]
    prompts, outputs, lines = columns
    counted = (lines, late, *prefix_hits(hashes))
    return Trace(name, form.name, read, prompts, outputs, arrivals, counts, *counted)


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
