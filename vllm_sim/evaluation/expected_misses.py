"""The rows that a recorded run misses, each with why: like tests that are expected to fail.

Reproduces nothing. A miss excuses no distance; one that is held after all fails the run as well.
The list is of the run in results/, seed 0 without the authors' files, and of the parts of it that
`--quick` and `--figure` take; of any other run nothing is expected.

    mark(rows, expected(figures, lengths, num_seeds=1))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_sim.evaluation.comparison import Figure, Row
from vllm_sim.evaluation.figures_rates import Fig14
from vllm_sim.workload.data_sets import Lengths


@dataclass(frozen=True)
class Miss:
    """A row by what names it, and in one sentence why it is missed."""

    figure: str
    setting: str
    metric: str
    reason: str


WITHOUT_FILES = (
    Miss(
        "Fig. 12",
        "66B Alpaca, FasterTransformer",
        "s/token at 1.5 requests/s",
        "the authors' trace takes Alpaca's first 5,430 requests; seed 0's draw from all of them "
        "has 8 % longer outputs, at a rate where static batches fall behind",
    ),
)


def expected(figures: Sequence[Figure], lengths: Lengths, num_seeds: int) -> tuple[Miss, ...]:
    """The misses of the recorded run that this is, or is a part of; none of any other run."""
    as_recorded = all(figure == Fig14() for figure in figures if isinstance(figure, Fig14))
    return WITHOUT_FILES if as_recorded and num_seeds == 1 and not lengths.files else ()


def mark(rows: Sequence[Row], misses: Sequence[Miss]) -> list[Row]:
    """The rows, those that are expected to be missed with the reason."""
    reasons = {(miss.figure, miss.setting, miss.metric): miss.reason for miss in misses}
    return [
        replace(row, expected=reasons.get((row.figure, row.setting, row.metric), ""))
        for row in rows
    ]
