"""Turns the authors' pickle of request lengths into the CSV that `--lengths` and LENGTHS_DIR read.

Of the artifact's files of section 6.1: a list of (input, output) lengths. A pickle may name code,
which then runs as it is loaded; here whatever names anything is refused, and nothing runs.

    python tools/lengths_from_pickle.py --pickle FILE.pkl --csv lengths/sharegpt.csv
"""

import io
import pickle
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_sim.reporting.arguments import OneLineParser, file_name
from vllm_sim.reporting.command_line import UsageError, exit_code
from vllm_sim.reporting.files import check_writable, out_file, read_bounded, write_whole
from vllm_sim.workload.data_sets import PAIR_COLUMNS
from vllm_sim.workload.requests import MAX_LENGTH

MAX_BYTES = 64 * 2**20


class PlainUnpickler(pickle.Unpickler):
    """Makes lists, tuples, numbers and texts, and looks nothing up."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(
            f"it names {f'{module}.{name}'[:60]!a}, which could run code: nothing was run"
        )


def read_pairs(path: Path) -> list[tuple[int, int]]:
    """The (input, output) lengths of a pickle, in its order. Raises UsageError."""
    try:
        if (data := read_bounded(path, MAX_BYTES)) is None:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        found = PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle raises anything
        told = ascii(getattr(error, "strerror", None) or str(error))[1:-1][:200]
        raise UsageError(f"{path}: cannot be read as a pickle of lengths: {told}") from None
    pairs = found if isinstance(found, (list, tuple)) and found else [()]
    for number, pair in enumerate(pairs):
        sound = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not sound or not all(type(n) is int and 1 <= n <= MAX_LENGTH for n in pair):
            wanted = f"a pair of integers from 1 to {MAX_LENGTH:,}"
            raise UsageError(f"{path}: element {number:,} of its list is not {wanted}")
    return [tuple(pair) for pair in pairs]


def convert(arguments: list[str] | None) -> int:
    """0. Raises UsageError."""
    parser = OneLineParser(prog="lengths_from_pickle.py", description="a pickle of lengths as CSV")
    parser.add_argument("--pickle", type=file_name, required=True, metavar="FILE")
    parser.add_argument("--csv", type=out_file, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    check_writable(options.csv)
    rows = [PAIR_COLUMNS, *read_pairs(options.pickle)]
    write_whole(options.csv, "".join(f"{a},{b}\n" for a, b in rows).encode("ascii"))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (0, or 2 with one line on stderr)."""
    return exit_code("lengths_from_pickle.py", partial(convert, arguments))


if __name__ == "__main__":
    raise SystemExit(main())
