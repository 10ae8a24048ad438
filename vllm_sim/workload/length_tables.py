"""Compact joint tables of (input, output) lengths in tokens, to sample from (section 6.1, Fig. 11).

They stand in for the full length files, which are not shipped: same distribution, no order.
length_tables.json has them; tools/make_length_tables.py writes it, from sources named in it.

    inputs, outputs = SHAREGPT.sample(1000, np.random.default_rng(0))

Rows are separated by '/'. A row reads: number of requests, knots of the quantile function of their
inputs (a single knot: all have that length), '|', knots of that of their outputs. Input knots lie
at evenly spaced levels; output knots, n of them, at
(1 - w) * t + w * (1 - cos(pi * t)) / 2 for t = 0, 1/(n-1), ..., 1, w = KNOT_WARP.
Interpolate linearly, round to the nearest integer.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

KNOT_WARP = 0.85  # 0: levels evenly spaced, 1: cosine spacing; knots crowd into both tails


@dataclass(frozen=True, eq=False)
class LengthTable:
    """Joint distribution of (input, output) lengths in tokens, to sample from (Fig. 11).

    `rows` is a text as above (ValueError for another form). No sampled pair has
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
        if count < 0:
            raise ValueError(f"count must not be negative, not {count!r}")
        which, input_level, output_level = rng.random((3, count))
        row = np.searchsorted(self._share, which, side="right")
        inputs = _quantiles(self._inputs, 0.0, row, input_level)
        outputs = _quantiles(self._outputs, KNOT_WARP, row, output_level)
        if self.max_total is not None:
            inputs = np.minimum(inputs, self.max_total - 1)
            outputs = np.minimum(outputs, self.max_total - inputs)
        return inputs, outputs


def knot_levels(count: int, warp: float = KNOT_WARP) -> np.ndarray:
    """Levels in [0, 1] of a row's knots, shape (count,)."""
    even = np.linspace(0.0, 1.0, count)
    return (1.0 - warp) * even + warp * (1.0 - np.cos(np.pi * even)) / 2.0


def _quantiles(knots: np.ndarray, warp: float, row: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values at level `at` of the quantile functions knots[row]: whole, >= 1, int64 (count,)."""
    levels = knot_levels(knots.shape[1], warp)
    cell = np.searchsorted(levels[1:-1], at, side="right")
    part = (at - levels[cell]) / (levels[cell + 1] - levels[cell])
    value = knots[row, cell] + part * (knots[row, cell + 1] - knots[row, cell])
    return np.maximum(np.floor(value + 0.5).astype(np.int64), 1)


_FILE = json.loads(Path(__file__).with_suffix(".json").read_text("ascii"))
LENGTH_TABLES = {
    key: LengthTable(table["name"], table["source"], " ".join(table["rows"]), table["max_total"])
    for key, table in _FILE["tables"].items()
}
SHAREGPT, ALPACA, WMT16, CHAT = LENGTH_TABLES.values()
# Examples in the translation prompt (Fig. 16): tokens of the shared prefix that fill whole 16-token
# blocks, and what is left of it to add to each input (make_trace: prefix_len, added_prompt_len).
WMT16_PROMPTS = {int(shots): tuple(found) for shots, found in _FILE["wmt16_prompts"].items()}
