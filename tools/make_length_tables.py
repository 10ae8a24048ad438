"""Makes length_tables.py: compact joint tables of request lengths, from the full length files.

    python tools/make_length_tables.py --data ../shared/data

The full files (sources: see SOURCES below, repeated in the generated docstring) hold one
(input, output) pair of token counts per request and are not shipped. What is kept of each is
a list of rows. A row covers the requests whose input length lies in one range, and holds
their number, the quantile function of their input lengths, and that of their output lengths,
both piecewise linear and given by their values at fixed levels (knots). Rows follow the input
length, so the dependence of output on input survives; ranges end between two different
lengths, so a common length is never torn apart.

The knots are a least-squares fit to the empirical quantile function rather than samples of
it: a least-squares line through a cell keeps the cell's mean, which sampled knots do not.
"""

import argparse
import csv
import gzip
import os
import sys
import tempfile
import textwrap
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MAX_TABLE_BYTES = 10_000
KNOT_WARP = 0.85  # 0: levels evenly spaced, 1: cosine spacing; knots crowd into both tails

WMT16_NAME = "wmt16_ende_newstest2016_llama_lengths.csv.gz"
WMT16_SUFFIX = "suffix_tokens_after_shared_prefix_{}shot"
# Shared tokens of the prompt that fill whole 16-token blocks, by number of examples in it.
WMT16_SHARED = {1: 80, 5: 336}

SOURCES = """\
SHAREGPT_ROWS: the ShareGPT lengths of the paper's own artifact (OPT tokenizer, one BOS on each
  side), repository sosp-ae-39/sosp-ae-astra, commit 3180d2f8; no licence file, its README says
  that only lengths are given because of licensing. Pairs with input + output <= 2048.
ALPACA_ROWS: counted with the OPT tokenizer (one BOS on each side) over all English Alpaca
  records, text = instruction + " " + input, repository hikariming/alpaca_chinese_dataset,
  commit a32705c; Alpaca data CC BY-NC 4.0.
WMT16_ROWS: newstest2016 English-German counted with the LLaMA tokenizer, prompts as in the
  paper's artifact (sosp-ae-39/sosp-ae-astra, commit 3180d2f8); WMT's own terms. The input is
  what follows the shared prefix in the 1-shot prompt."""


class BadInput(Exception):
    """A source file is missing or not what it should be; the message is one line."""


@dataclass(frozen=True)
class TableSpec:
    """How one data set is read and how finely it is kept.

    `rows` is the number of input ranges aimed at, `skew` > 1 makes them narrower (in share of
    requests) for long inputs, `input_knots` / `output_knots` are the knots per row.
    """

    constant: str
    filename: str
    input_column: str
    output_column: str
    rows: int
    skew: float
    input_knots: int
    output_knots: int
    max_total: int | None = None


SPECS = (
    TableSpec("SHAREGPT", "sharegpt_sosp23_opt_lengths.csv.gz", "input_len", "output_len",
              rows=44, skew=1.8, input_knots=9, output_knots=48, max_total=2048),
    TableSpec("ALPACA", "alpaca_opt_lengths.csv.gz", "input_len", "output_len",
              rows=60, skew=1.5, input_knots=6, output_knots=80),
    TableSpec("WMT16", WMT16_NAME, WMT16_SUFFIX.format(1), "output_llama_tokens",
              rows=40, skew=1.2, input_knots=4, output_knots=48),
)  # fmt: skip


def read_columns(path: Path, columns: tuple[str, ...]) -> np.ndarray:
    """The named columns of a gzipped CSV as an int64 array (rows, columns); BadInput if not."""
    values = []
    try:
        with gzip.open(path, "rt", encoding="ascii", newline="") as stream:
            reader = csv.DictReader(stream)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise BadInput(f"{path}: no column {missing[0]}")
            for row in reader:
                try:
                    values.append([int(row[name]) for name in columns])
                except (TypeError, ValueError):
                    raise BadInput(f"{path}: line {reader.line_num}: not an integer") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: {reason}") from None
    if not values:
        raise BadInput(f"{path}: no rows")
    lengths = np.array(values, dtype=np.int64)
    if lengths.min() < 1:
        raise BadInput(f"{path}: a length below 1")
    return lengths


def knot_levels(count: int) -> np.ndarray:
    """Levels in [0, 1] of a row's output knots, shape (count,); workload.py has the same rule."""
    even = np.linspace(0.0, 1.0, count)
    return (1.0 - KNOT_WARP) * even + KNOT_WARP * (1.0 - np.cos(np.pi * even)) / 2.0


def fit_knots(lengths: np.ndarray, levels: np.ndarray) -> list[int]:
    """Knots of the piecewise-linear quantile function nearest (least squares) to `lengths`.

    Readers draw a level, interpolate and round to the nearest integer, which is why knots may
    not lie below 0.5 before their own rounding.
    """
    repeats = -(-8192 // len(lengths))  # each length stands for a whole step of the function
    steps = np.repeat(np.sort(lengths), repeats).astype(float)
    at = (np.arange(len(steps)) + 0.5) / len(steps)
    cell = np.searchsorted(levels, at, side="right") - 1
    right = (at - levels[cell]) / (levels[cell + 1] - levels[cell])
    left = 1.0 - right
    normal = np.zeros((len(levels), len(levels)))
    target = np.zeros(len(levels))
    for offset_a, weight_a in ((0, left), (1, right)):
        np.add.at(target, cell + offset_a, weight_a * steps)
        for offset_b, weight_b in ((0, left), (1, right)):
            np.add.at(normal, (cell + offset_a, cell + offset_b), weight_a * weight_b)
    knots = np.maximum.accumulate(np.maximum(np.linalg.solve(normal, target), 0.5))
    # A hair above one half, so that an exact tie never hangs on the last bit of the solver.
    return np.floor(knots + 0.5 + 1e-6).astype(int).tolist()


def input_ranges(inputs: np.ndarray, rows: int, skew: float) -> list[tuple[int, int]]:
    """Inclusive (low, high) ranges of input length that partition all lengths present."""
    values, counts = np.unique(inputs, return_counts=True)
    share = np.cumsum(counts) / len(inputs)
    wanted = 1.0 - (1.0 - np.arange(1, rows + 1) / rows) ** skew
    ends = sorted({int(np.argmin(np.abs(share - level))) for level in wanted} | {len(values) - 1})
    starts = [0] + [end + 1 for end in ends[:-1]]
    return [(int(values[start]), int(values[end])) for start, end in zip(starts, ends)]


def table_text(pairs: np.ndarray, spec: TableSpec) -> str:
    """Rows 'count input-knots | output-knots' separated by '/', wrapped to 100 characters."""
    rows = []
    for low, high in input_ranges(pairs[:, 0], spec.rows, spec.skew):
        part = pairs[(pairs[:, 0] >= low) & (pairs[:, 0] <= high)]
        if low == high:
            inputs = [low]  # one knot stands for a constant
        else:
            inputs = fit_knots(part[:, 0], np.linspace(0.0, 1.0, spec.input_knots))
        outputs = fit_knots(part[:, 1], knot_levels(spec.output_knots))
        rows.append(" ".join(map(str, [len(part), *inputs, "|", *outputs])))
    return textwrap.fill(" / ".join(rows), width=100)


def wmt16_added_tokens(data: Path) -> dict[int, int]:
    """Tokens to add to a WMT16 input, by number of examples; BadInput if not one constant."""
    columns = tuple(WMT16_SUFFIX.format(shots) for shots in WMT16_SHARED)
    suffixes = read_columns(data / WMT16_NAME, columns)
    added = suffixes - suffixes[:, :1]
    if (added != added[0]).any():
        raise BadInput(f"{data / WMT16_NAME}: suffix lengths do not differ by a constant")
    return dict(zip(WMT16_SHARED, added[0].tolist()))


def generate(data: Path) -> str:
    """The whole text of length_tables.py, from the files in folder `data`."""
    parts = [
        '"""Joint tables of (input, output) lengths in tokens: ShareGPT, Alpaca, WMT16.',
        "",
        "Generated by tools/make_length_tables.py, do not edit.",
        "",
        SOURCES,
        "",
        "Rows are separated by '/'. A row reads: number of requests, knots of the quantile",
        "function of their inputs (a single knot: all have that length), '|', knots of that of",
        "their outputs. Input knots lie at evenly spaced levels; output knots, n of them, at",
        "(1 - w) * t + w * (1 - cos(pi * t)) / 2 for t = 0, 1/(n-1), ..., 1, w = KNOT_WARP.",
        "Interpolate linearly, round to the nearest integer. workload.LengthTable does this.",
        '"""',
        "",
        f"KNOT_WARP = {KNOT_WARP}",
        "",
    ]
    for spec in SPECS:
        pairs = read_columns(data / spec.filename, (spec.input_column, spec.output_column))
        if spec.max_total is not None:
            pairs = pairs[pairs.sum(axis=1) <= spec.max_total]
            if not len(pairs):
                raise BadInput(f"{data / spec.filename}: nothing is as short as {spec.max_total}")
        text = table_text(pairs, spec)
        if len(text) >= MAX_TABLE_BYTES:
            raise BadInput(f"{data / spec.filename}: table takes {len(text)} bytes, too many")
        if spec.max_total is not None:
            parts.append(f"{spec.constant}_MAX_TOTAL = {spec.max_total}  # input + output")
        parts += [f"# {len(pairs)} pairs", f'{spec.constant}_ROWS = """', text, '"""', ""]
    added = wmt16_added_tokens(data)
    parts += [
        "# examples in the prompt: (tokens of the shared prefix that fill whole 16-token blocks,",
        "# what is left of the prefix: tokens to add to each input of WMT16_ROWS)",
        f"WMT16_PROMPTS = { {shots: (WMT16_SHARED[shots], added[shots]) for shots in added} }",
        "",
    ]
    return "\n".join(parts)


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` with `text` in one step, so that no reader sees half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="ascii", newline="\n") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (0, or 2 with one line on stderr)."""
    parser = argparse.ArgumentParser(description="make length_tables.py from the length files")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "length_tables.py", metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        write_atomically(options.out, generate(options.data))
    except BadInput as error:
        print(f"make_length_tables: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_length_tables: {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
