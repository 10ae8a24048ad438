"""Workloads: request lengths and arrival times as in section 6.1 and Fig. 11 of the paper.

A request is two lengths and an arrival time. Lengths come from the small tables shipped here
(SHAREGPT, ALPACA, WMT16, CHAT; see length_tables.py) or from a full length file:

    requests = make_trace(SHAREGPT, rate=2.0, duration_s=3600.0, seed=0)
    requests = make_trace(read_lengths("lengths.csv.gz"), 2.0, 3600.0, seed=0, total_below=2048)

The second, given the authors' lengths in order, is their artifact's trace, request by request.
"""

import csv
import gzip
import math
import numbers
import os
import random
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle, islice

import numpy as np

from vllm_sim.reporting.files import open_regular
from vllm_sim.workload import length_tables

SLOT_S = 0.01  # arrivals are drawn per slot of 10 ms, as in the authors' artifact
MAX_EXPECTED = 10**8  # slots, or expected requests, that one trace may have
MAX_LENGTH = 10**7
MAX_FILE_BYTES = 256 * 2**20
MAX_PACKED_BYTES = 2**24  # of a gzipped file: what costs time and unpacks to nothing
MAX_LINE_BYTES = 2**16
MAX_LINES = 2 * 10**6
# Examples in the translation prompt (Fig. 16): (prefix_len, added_prompt_len) for make_trace.
WMT16_PROMPTS = length_tables.WMT16_PROMPTS
Pair = tuple[int, int]  # input and output length of one request
Row = tuple[str, list[str]]  # 'file, line n' and cells of it


class WorkloadError(ValueError):
    """A length file cannot be used; the message is one line with the file and the line number."""


def check_integer(name: str, value: object, low: int, high: int = 2**63 - 1) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, not {value!r}")


def check_number(name: str, value: object, low: float, high: float = sys.float_info.max) -> None:
    if not isinstance(value, numbers.Real) or not low <= value <= high:  # NaN fails as well
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Request:
    """One request; lengths in tokens, `arrival_s` in seconds from the start of the trace.

    `prompt_len` leaves out the `prefix_len` tokens before it, shared with other requests (Fig.
    10). Every sequence generates exactly `output_len` tokens (section 6.1). `num_samples` outputs
    are sampled in parallel (Fig. 8), or `beam_width` beams searched (Fig. 9). Raises ValueError.
    """

    request_id: int
    arrival_s: float
    prompt_len: int
    output_len: int
    num_samples: int = 1
    beam_width: int = 1
    prefix_len: int = 0

    def __post_init__(self) -> None:
        check_integer("request_id", self.request_id, 0)
        check_number("arrival_s", self.arrival_s, 0.0)
        for name in ("prompt_len", "output_len", "num_samples", "beam_width"):
            check_integer(name, getattr(self, name), 1)
        check_integer("prefix_len", self.prefix_len, 0)
        if self.num_samples > 1 and self.beam_width > 1:
            raise ValueError("at most one of num_samples and beam_width may be above 1")

    @property
    def num_seqs(self) -> int:
        """Sequences of the request that generate at the same time."""
        return max(self.num_samples, self.beam_width)

    @property
    def decoding(self) -> str:
        """'single', 'parallel' (sampling) or 'beam'."""
        if self.beam_width > 1:
            return "beam"
        return "parallel" if self.num_samples > 1 else "single"


@dataclass(frozen=True, eq=False)
class LengthTable:
    """Joint distribution of (input, output) lengths in tokens, to sample from (Fig. 11).

    `rows` is a text of length_tables.py (ValueError for another form). No sampled pair has
    input + output above `max_total`; outputs are cut to fit (0.1 % of ShareGPT's).
    """

    name: str
    source: str
    rows: str = field(repr=False)
    max_total: int | None = None
    _share: np.ndarray = field(init=False, repr=False)  # (rows,) cumulative share of requests
    _inputs: np.ndarray = field(init=False, repr=False)  # (rows, input knots)
    _outputs: np.ndarray = field(init=False, repr=False)  # (rows, output knots)

    def __post_init__(self) -> None:
        halves = [[part.split() for part in row.split("|")] for row in self.rows.split("/")]
        counted = [[int(word) for word in left] for left, _ in halves]
        outputs = [[int(word) for word in right] for _, right in halves]
        knots = max(2, *(len(row) - 1 for row in counted))
        inputs = [row[1:] * knots if len(row) == 2 else row[1:] for row in counted]
        counts = np.cumsum([row[0] for row in counted])
        object.__setattr__(self, "_share", counts / counts[-1])
        object.__setattr__(self, "_inputs", np.array(inputs))
        object.__setattr__(self, "_outputs", np.array(outputs))

    def sample(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`count` independent pairs as int64 arrays (count,), (count,); the same for a seed."""
        check_integer("count", count, 0)
        which, input_level, output_level = rng.random((3, count))
        row = np.searchsorted(self._share, which, side="right")
        inputs = _quantiles(self._inputs, 0.0, row, input_level)
        outputs = _quantiles(self._outputs, length_tables.KNOT_WARP, row, output_level)
        if self.max_total is not None:
            inputs = np.minimum(inputs, self.max_total - 1)
            outputs = np.minimum(outputs, self.max_total - inputs)
        return inputs, outputs


def _quantiles(knots: np.ndarray, warp: float, row: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values at level `at` of the quantile functions knots[row]: whole, >= 1, int64 (count,)."""
    even = np.linspace(0.0, 1.0, knots.shape[1])
    levels = (1.0 - warp) * even + warp * (1.0 - np.cos(np.pi * even)) / 2.0  # of the knots
    cell = np.searchsorted(levels[1:-1], at, side="right")
    part = (at - levels[cell]) / (levels[cell + 1] - levels[cell])
    value = knots[row, cell] + part * (knots[row, cell + 1] - knots[row, cell])
    return np.maximum(np.floor(value + 0.5).astype(np.int64), 1)


_SHAREGPT_SOURCE = "sosp-ae-39/sosp-ae-astra 3180d2f8 (the paper's artifact), OPT tokenizer"
SHAREGPT = LengthTable(
    "ShareGPT", _SHAREGPT_SOURCE, length_tables.SHAREGPT_ROWS, length_tables.SHAREGPT_MAX_TOTAL
)
_ALPACA_SOURCE = "hikariming/alpaca_chinese_dataset a32705c (English records), OPT tokenizer"
ALPACA = LengthTable("Alpaca", _ALPACA_SOURCE, length_tables.ALPACA_ROWS)
_WMT16_SOURCE = "newstest2016, LLaMA tokenizer; inputs: what follows the shared 1-shot prefix"
WMT16 = LengthTable("WMT16 En-De", _WMT16_SOURCE, length_tables.WMT16_ROWS)
_CHAT_SOURCE = "ShareGPT_V3_unfiltered_cleaned_split, rounds as in length_files, OPT tokenizer"
CHAT = LengthTable("ShareGPT chat", _CHAT_SOURCE, length_tables.CHAT_ROWS)
LENGTH_TABLES = {"sharegpt": SHAREGPT, "alpaca": ALPACA, "wmt16": WMT16, "chat": CHAT}


def poisson_arrivals(rate: float, duration_s: float, seed: int) -> np.ndarray:
    """Arrival times in seconds, ascending, float64 (requests,): Poisson at `rate` per second.

    As in the authors' artifact: numpy's legacy generator draws the number of arrivals of every
    10 ms slot, and all arrive as their slot begins; the same seed gives the same times as there.
    A rate of 0 gives no requests. Raises ValueError (section 6.1).
    """
    check_number("duration_s", duration_s, 0.0, MAX_EXPECTED * SLOT_S)
    check_number("rate", rate, 0.0, MAX_EXPECTED / max(duration_s, SLOT_S))
    check_integer("seed", seed, 0, 2**32 - 1)
    slots = int(duration_s * (1.0 / SLOT_S))
    arrivals = np.random.RandomState(seed).poisson(rate * SLOT_S, size=slots)
    return np.repeat(np.arange(slots) * SLOT_S, arrivals)


def make_trace(
    lengths: LengthTable | tuple[np.ndarray, np.ndarray],
    rate: float,
    duration_s: float,
    seed: int,
    *,
    total_below: int | None = None,
    num_samples: int = 1,
    beam_width: int = 1,
    prefix_len: int = 0,
    added_prompt_len: int = 0,
) -> list[Request]:
    """Requests in order of arrival, at `rate` per second for `duration_s` seconds.

    A LengthTable is sampled with the seed. Exact pairs (from read_lengths) are used as the
    artifact does: as many as there are arrivals, in order, from the top again if they run out,
    then shuffled; so a short trace has other means than the data. `total_below` first drops
    pairs with input + output not below it (artifact: 2048). `added_prompt_len` tokens go to
    every prompt; the other options are Request's. Raises ValueError (sections 6.1 to 6.4).
    """
    check_integer("added_prompt_len", added_prompt_len, 0)
    arrivals = poisson_arrivals(rate, duration_s, seed).tolist()
    if isinstance(lengths, LengthTable):
        if total_below is not None:
            raise ValueError("total_below is for exact pairs; a table has its own max_total")
        sampled = lengths.sample(len(arrivals), np.random.default_rng(seed))
        pairs = list(zip(*(part.tolist() for part in sampled)))
    else:
        limit = math.inf if total_below is None else total_below
        known = zip(*(np.asarray(part).tolist() for part in lengths), strict=True)
        known = [pair for pair in known if sum(pair) < limit]
        if not known:
            raise ValueError("no pairs of lengths to make a trace from")
        pairs = first_pairs(known, len(arrivals), seed)
    rest = (num_samples, beam_width, prefix_len)
    return [
        Request(index, arrivals[index], prompt + added_prompt_len, output, *rest)
        for index, (prompt, output) in enumerate(pairs)
    ]


def first_pairs(known: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """`count` pairs as the artifact takes them: in order, from the top again, then shuffled."""
    pairs = list(islice(cycle(known), count))
    random.Random(seed).shuffle(pairs)
    return pairs


def read_lengths(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, outputs) in tokens, int64 (rows,) each, in file order: input_len, output_len."""
    return tuple(read_columns(path, ("input_len", "output_len")))


def read_columns(path: str | os.PathLike[str], names: Sequence[str]) -> np.ndarray:
    """The columns `names` of a length file, whole numbers from 1, int64 (columns, rows)."""
    lengths = array("q")  # flat, row by row
    for place, cells in read_cells(path, names):
        lengths.extend([whole_number(place, cell) for cell in cells])
    if not lengths:
        raise WorkloadError(f"{path}: no rows after the header")
    return np.array(lengths, dtype=np.int64).reshape(-1, len(names)).T.copy()


def read_cells(path: str | os.PathLike[str], names: Sequence[str]) -> Iterator[Row]:
    """('file, line n', cells of the columns `names`) of each row; the first line names columns."""
    lines = read_lines(path)
    place, header = next(lines, (os.fspath(path), []))
    if any(header.count(name) != 1 for name in names):
        raise WorkloadError(f"{place}: the header must name {', '.join(names)}, once each")
    wanted = [header.index(name) for name in names]
    for place, cells in lines:
        if len(cells) != len(header):
            raise WorkloadError(f"{place}: {len(cells)} cells, the header has {len(header)}")
        yield place, [cells[index] for index in wanted]


def whole_number(place: str, cell: str, low: int = 1) -> int:
    """The number that a cell spells, from `low` to 10**7; WorkloadError with `place` if not."""
    # Digits only: int() would take '1_0' and '+1', and refuses very long numbers.
    whole = cell.isascii() and cell.isdigit() and len(cell) < 20
    if not whole or not low <= int(cell) <= MAX_LENGTH:
        wanted = f"a whole number from {low} to {MAX_LENGTH}"
        raise WorkloadError(f"{place}: {cell[:30]!a} is not {wanted}")
    return int(cell)


def read_lines(path: str | os.PathLike[str]) -> Iterator[Row]:
    """('file, line n', cells) of every row of a CSV, the header included; blank lines are none.

    Raises WorkloadError as `read_text` and `split_cells` do.
    """
    return split_cells(read_text(path))


def split_cells(lines: Iterator[tuple[str, str]]) -> Iterator[Row]:
    """('file, line n', cells) of the rows that lines make up, n the row's first line.

    A cell in quotes may hold commas and line breaks. WorkloadError for one that does not end.
    """
    for place, text in lines:
        cells = _quoted(place, text, lines) if '"' in text else text.split(",")
        yield place, [cell.strip() for cell in cells]


def _quoted(place: str, first: str, lines: Iterator[tuple[str, str]]) -> list[str]:
    """The cells of a row with a quote in it, taking as many further lines as it goes on for."""

    def parts() -> Iterator[str]:
        size = 0
        for _, text in chain([(place, first)], lines):
            size += len(text)
            if size > MAX_LINE_BYTES:
                break
            yield f"{text}\n"
        raise WorkloadError(f"{place}: a cell in quotes does not end")

    try:
        return next(csv.reader(parts()))
    except csv.Error:  # a line break without a line feed
        return [first]


def read_text(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """('file, line n', the line without the blanks around it) of every line that is not blank.

    The file is plain or gzipped (told by its content), 16 MiB at most if it is, and read line by
    line: at most 256 MiB of it once unpacked, and 2 million lines. Raises WorkloadError for
    anything else; a pipe or a device, which may never end, is not read at all.
    """
    size = 0
    try:
        with open_regular(path) as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            if os.fstat(file.fileno()).st_size > (MAX_PACKED_BYTES if packed else MAX_FILE_BYTES):
                raise WorkloadError(f"{os.fspath(path)}: the file is too long")
            stream = gzip.GzipFile(fileobj=file) if packed else file
            lines = iter(partial(stream.readline, MAX_LINE_BYTES + 1), b"")
            for number, line in enumerate(lines, 1):
                size += len(line)
                place = f"{os.fspath(path)}, line {number}"
                too_many = size > MAX_FILE_BYTES or number > MAX_LINES
                if too_many or len(line) > MAX_LINE_BYTES:
                    raise WorkloadError(f"{place}: the file, or this line, is too long")
                text = line.decode("utf-8-sig", errors="replace").strip()  # bad bytes fail as cells
                if text:
                    yield place, text
    except WorkloadError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise WorkloadError(f"{path}: cannot be read: {reason}") from None
