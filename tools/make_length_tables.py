"""Makes vllm_sim/workload/length_tables.json: compact joint tables of request lengths.

    python tools/make_length_tables.py --data ../shared/data

They come from the full length files (their sources: see SPECS), which are not shipped. A file has
one (input, output) pair of token counts per request, or one turn of a conversation, from which
data_sets.chat_rounds makes the pairs. What is kept of each is a list of rows. A row covers the
requests whose input length lies in one range, and holds their number, the quantile function of
their input lengths, and that of their output lengths, both piecewise linear and given by their
values at fixed levels (knots). Rows follow the input length, so the dependence of output on input
survives; ranges end between two different lengths, so a common length is never torn apart.

The knots are a least-squares fit to the empirical quantile function rather than samples of
it: a least-squares line through a cell keeps the cell's mean, which sampled knots do not.
Most chat prompts have one length, the longest, which is a row of its own.
"""

import sys
import textwrap
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_sim.reporting.arguments import OneLineParser, folder
from vllm_sim.reporting.command_line import UsageError, exit_code
from vllm_sim.reporting.files import check_writable, write_json
from vllm_sim.workload import length_tables
from vllm_sim.workload.data_sets import (
    PAIR_COLUMNS,
    WMT16_OUTPUT,
    WMT16_SUFFIX,
    chat_rounds,
    read_columns,
)
from vllm_sim.workload.length_tables import knot_levels
from vllm_sim.workload.text_files import WorkloadError

MAX_TABLE_BYTES = 10_000
NAME = "length_tables.json"
# Shared tokens of WMT16's prompt that fill whole 16-token blocks, by number of examples in it.
WMT16_SHARED = {1: 80, 5: 336}


@dataclass(frozen=True)
class TableSpec:
    """How one data set is read and how finely it is kept.

    `columns` are the file's two, none if it has turns. `rows` is the number of input ranges aimed
    at, `skew` > 1 makes them narrower (in share of requests) for long inputs, `knots`
    are those of a row's inputs and outputs. `bounded` keeps the knots within the lengths that there
    are, where the longest is one of many. `source` and `about` say where the lengths are from.
    """

    name: str
    filename: str
    columns: tuple[str, ...]
    rows: int
    skew: float
    knots: tuple[int, int]
    source: str
    about: str
    max_total: int | None = None
    bounded: bool = False


SPECS = {
    "sharegpt": TableSpec(
        "ShareGPT",
        "sharegpt_sosp23_opt_lengths.csv.gz",
        PAIR_COLUMNS,
        rows=44,
        skew=1.8,
        knots=(9, 48),
        source="sosp-ae-39/sosp-ae-astra 3180d2f8 (the paper's artifact), OPT tokenizer",
        about="one BOS on each side; no licence file, its README says that only lengths are given "
        "because of licensing; pairs with input + output <= 2048",
        max_total=2048,
    ),
    "alpaca": TableSpec(
        "Alpaca",
        "alpaca_opt_lengths.csv.gz",
        PAIR_COLUMNS,
        rows=60,
        skew=1.5,
        knots=(6, 80),
        source="hikariming/alpaca_chinese_dataset a32705c (English records), OPT tokenizer",
        about='one BOS on each side; text = instruction + " " + input; CC BY-NC 4.0',
    ),
    "wmt16": TableSpec(
        "WMT16 En-De",
        "wmt16_ende_newstest2016_llama_lengths.csv.gz",
        (WMT16_SUFFIX.format(1), WMT16_OUTPUT),
        rows=40,
        skew=1.2,
        knots=(4, 48),
        source="newstest2016, LLaMA tokenizer; inputs: what follows the shared 1-shot prefix",
        about="prompts as in the paper's artifact (sosp-ae-39/sosp-ae-astra, commit 3180d2f8); "
        "WMT's own terms",
    ),
    "chat": TableSpec(
        "ShareGPT chat",
        "sharegpt_v3_first17671_turn_lengths.csv.gz",
        (),
        rows=44,
        skew=1.0,
        knots=(6, 64),
        source="ShareGPT_V3_unfiltered_cleaned_split, rounds as in data_sets, OPT tokenizer",
        about="rounds of Fig. 17 from the first conversations (125,509,632 bytes): prompts of "
        "history and query, and replies; no licence named; a stand-in: the paper's artifact does "
        "not give its own conversations",
        bounded=True,
    ),
}


def read_pairs(path: Path, spec: TableSpec) -> np.ndarray:
    """The pairs of a table, int64 (pairs, 2), from its file; WorkloadError if there are none."""
    if spec.columns:
        pairs = read_columns(path, spec.columns).T
    else:
        pairs = np.array(chat_rounds(path), dtype=np.int64).reshape(-1, 2)
    if spec.max_total is not None:
        pairs = pairs[pairs.sum(axis=1) <= spec.max_total]
    if not len(pairs):
        raise WorkloadError(f"{path}: no pair of lengths to keep")
    return pairs


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


def table_lines(pairs: np.ndarray, spec: TableSpec) -> list[str]:
    """Rows 'count input-knots | output-knots' separated by '/', wrapped to 96 characters."""
    rows = []
    for low, high in input_ranges(pairs[:, 0], spec.rows, spec.skew):
        part = pairs[(pairs[:, 0] >= low) & (pairs[:, 0] <= high)]
        if low == high:
            inputs = [low]  # one knot stands for a constant
        else:
            inputs = fit_knots(part[:, 0], np.linspace(0.0, 1.0, spec.knots[0]))
        outputs = fit_knots(part[:, 1], knot_levels(spec.knots[1]))
        if spec.bounded:
            inputs = np.clip(inputs, low, high).tolist()
            outputs = np.clip(outputs, part[:, 1].min(), part[:, 1].max()).tolist()
        rows.append(" ".join(map(str, [len(part), *inputs, "|", *outputs])))
    return textwrap.wrap(" / ".join(rows), width=96)


def wmt16_prompts(path: Path) -> dict[int, tuple[int, int]]:
    """By number of examples: tokens of the prefix in whole blocks, and those to add to an input.

    Raises WorkloadError if the latter are no constant.
    """
    suffixes = read_columns(path, [WMT16_SUFFIX.format(shots) for shots in WMT16_SHARED]).T
    added = suffixes - suffixes[:, :1]
    if (added != added[0]).any():
        raise WorkloadError(f"{path}: suffix lengths do not differ by a constant")
    return dict(zip(WMT16_SHARED, zip(WMT16_SHARED.values(), added[0].tolist())))


def generate(data: Path) -> dict[str, object]:
    """What length_tables.json says, from the files in folder `data`."""
    tables = {}
    for key, spec in SPECS.items():
        pairs = read_pairs(data / spec.filename, spec)
        lines = table_lines(pairs, spec)
        if sum(map(len, lines)) >= MAX_TABLE_BYTES:
            raise WorkloadError(
                f"{data / spec.filename}: the table is too large: {len(lines)} lines"
            )
        table = {"name": spec.name, "source": spec.source, "about": spec.about}
        tables[key] = {**table, "pairs": len(pairs), "max_total": spec.max_total, "rows": lines}
    return {
        "about": "Generated by tools/make_length_tables.py, do not edit; see length_tables.py",
        "wmt16_prompts": wmt16_prompts(data / SPECS["wmt16"].filename),
        "tables": tables,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (0, or 2 with one line on stderr)."""
    return exit_code("make_length_tables.py", partial(parse_and_make, arguments))


def parse_and_make(arguments: list[str] | None) -> int:
    """0. Raises UsageError."""
    parser = OneLineParser(description="make the compact tables from the length files")
    data, place = replace(folder, within="*.csv*"), Path(length_tables.__file__).parent
    parser.add_argument("--data", type=data, default=Path("../shared/data"), metavar="DIR")
    out = replace(folder, written=True, within=NAME)
    parser.add_argument("--out", type=out, default=place, metavar="DIR")
    options = parser.parse_args(arguments)
    check_writable(options.out / NAME)
    try:
        found = generate(options.data)
    except WorkloadError as error:
        raise UsageError(str(error)) from None
    write_json(options.out / NAME, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
