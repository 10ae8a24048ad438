"""The rows that the recorded runs miss, each with why: like tests that are expected to fail.

Reproduces nothing. A reason excuses no distance: a row that is missed and not listed fails the run,
and so does one that is listed and held. There is a list for each of two runs, both of seed 0: with
all of the files that results/reproduce.json had, and without any. Of `--quick` and `--figure` their
part is expected; of any other run nothing is.

    mark(rows, expected(figures, lengths, num_seeds=1))
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vllm_sim.evaluation.comparison import Row
from vllm_sim.evaluation.figures_rates import AT, RATIO
from vllm_sim.workload.data_sets import DATASETS, Lengths

WHY = {  # by the paragraph of docs/differences.md that tells more
    "D1": "39.39 GiB a card gives 9,648 slots; 39.40 would give the printed 9.7K",
    "D2": "the architecture has 350 GB of parameters on 8 GPUs, the paper prints 346",
    "D4": "vLLM with 175B on ShareGPT is 8 % too fast in the mean of four seeds; not known why",
    "D5": "a trace of fewer than 200 requests: which they are decides",
    "D8": "the paper's own curves show 1.5x, not the 2x of its text",
    "D9": "the authors' conversations are not published; what they have otherwise is not known",
    "D10": "below 16 slots the paper's latencies rise up to 30-fold; why is not known",
    "D11": "ten minutes of overload; blocks of 64 and more cost the paper's more than empty slots",
    "D12": "the edge of overload: a few percent of the rate; large blocks cost the paper's more",
    "D13": "the text's extreme is not in the paper's own curves at one common latency",
    "D14": "the compact tables draw other requests than the authors' files have",
    "D16": "the paper's Fig. 12d has its knee at 28 requests/s, its Fig. 13 none at 30",
    "D17": "a point of the fit, whose traces last ten minutes; over the hour requests wait there",
}
# Of the pairs that the recorded run read, in their order; what the files are called is no matter.
CHECKSUM = 845524013
Where = tuple[str, str, str]  # a row's figure, setting and metric
Rows = tuple[str, str, str, str]  # why, and where: 'beam {2,4}' is 'beam 2' and 'beam 4'

BOTH: tuple[Rows, ...] = (
    ("D1", "Table 1", "opt-66b", "kilo slots"),
    ("D2", "Table 1", "opt-175b", "parameters, GB"),
    ("D4", "Fig. 12", "6 panels, vLLM / Orca", "ratios within 10 % (our criterion)"),
    ("D13", "Sec. 6.2", "ShareGPT, vLLM / Orca (Max)", "rate, highest ratio"),
    ("D16", "Fig. 13", "13B Alpaca, vLLM", "mean batched requests"),
    ("D8", "Sec. 6.5", "13B chatbot, vLLM / Orca (Oracle)", RATIO),
    ("D10", "Fig. 18b", "13B ShareGPT, blocks of {1,2,4,8}", "s/token"),
    ("D10", "Fig. 18b", "13B Alpaca, blocks of {1,2,4}", "s/token"),
    ("D11", "Fig. 18b", "13B Alpaca, blocks of {16,32,128,256}", "s/token"),
    ("D10", "Fig. 19b", "13B ShareGPT, {recompute,swap}, blocks of {1,2,4,8}", "s/token"),
    ("D10", "Fig. 19b", "13B ShareGPT, blocks of 1", "recompute over swap"),
)
WITH_FILES: tuple[Rows, ...] = (
    *BOTH,
    ("D4", "Fig. 12", "175B ShareGPT, vLLM", AT),
    ("D17", "Fig. 12", "66B Alpaca, Orca (Pow2)", "s/token at 5 requests/s"),
    ("D9", "Fig. 17", "13B chatbot, vLLM / Orca (Oracle)", RATIO),
    ("D12", "Fig. 18b", "13B ShareGPT, blocks of 128", "s/token"),
    ("D11", "Fig. 18b", "13B Alpaca, blocks of 64", "s/token"),
    ("D12", "Fig. 19b", "13B ShareGPT, recompute, blocks of 128", "s/token"),
    ("D12", "Fig. 19b", "13B ShareGPT, swap, blocks of 256", "s/token"),
)
WITHOUT_FILES: tuple[Rows, ...] = (
    *BOTH,
    ("D14", "Fig. 2", "13B ShareGPT, Orca (Pow2)", "{tokens,reserved,external}, % of slots"),
    ("D5", "Fig. 12", "{13B,66B} ShareGPT, FasterTransformer", "s/token at {0.01,0.05} requests/s"),
    ("D14", "Fig. 12", "66B ShareGPT, vLLM / Orca (Max)", "rate, ratio at 0.2 s/token"),
    ("D5", "Fig. 12", "175B ShareGPT, FasterTransformer", "s/token at {0.01,0.05} requests/s"),
    ("D14", "Fig. 12", "175B ShareGPT, FasterTransformer", "s/token at 0.3 requests/s"),
    ("D14", "Fig. 12", "13B Alpaca, FasterTransformer", AT),
    ("D14", "Fig. 12", "13B Alpaca, vLLM / Orca (Max)", RATIO),
    ("D14", "Fig. 12", "13B Alpaca, FasterTransformer", "s/token at {2.25,2.5,2.75,3} requests/s"),
    ("D14", "Fig. 12", "66B Alpaca, FasterTransformer", "s/token at {1.25,1.5} requests/s"),
    ("D14", "Fig. 12", "66B Alpaca, Orca (Max)", "requests/s at 0.1447 s/token"),
    ("D14", "Fig. 12", "66B Alpaca, vLLM", "s/token at 17.5 requests/s"),
    ("D14", "Fig. 14", "13B Alpaca, parallel 6, vLLM / Orca ({Oracle,Pow2})", RATIO),
    ("D14", "Fig. 14", "13B Alpaca, beam 4, Orca (Max)", AT),
    ("D14", "Fig. 14", "13B Alpaca, beam 6, vLLM / Orca (Pow2)", RATIO),
    ("D14", "Fig. 15", "13B Alpaca, {parallel,beam} 6", "% of blocks saved"),
    ("D14", "Sec. 3", "13B Alpaca, parallel 6", "prompt's share of K/V, %"),
    ("D14", "Sec. 3", "13B Alpaca, beam search", "% of blocks saved, most"),
    ("D12", "Fig. 18b", "13B ShareGPT, blocks of 16", "s/token"),
    ("D11", "Fig. 18b", "13B Alpaca, blocks of 8", "s/token"),
    ("D10", "Fig. 19b", "13B ShareGPT, blocks of 2", "recompute over swap"),
    ("D12", "Fig. 19b", "13B ShareGPT, blocks of 128", "recompute over swap"),
)


def by_row(listed: Iterable[Rows]) -> dict[Where, str]:
    """Why each of the rows is missed."""
    return {
        (figure, setting, metric): f"{why}: {WHY[why]}"
        for why, figure, settings, metrics in listed
        for setting in spelled(settings)
        for metric in spelled(metrics)
    }


def spelled(pattern: str) -> list[str]:
    """All that a text with braces stands for, as in a shell."""
    before, _, rest = pattern.partition("{")
    choice, _, after = rest.partition("}")
    if not rest:
        return [before]
    return [before + one + end for one in choice.split(",") for end in spelled(after)]


def expected(lengths: Lengths, num_seeds: int) -> Mapping[Where, str] | None:
    """The misses of the recorded run that this is, or is a part of; None of any other run.

    Reads the length files, and raises WorkloadError for a bad one.
    """
    if num_seeds > 1:
        return None
    if not lengths.files:
        return by_row(WITHOUT_FILES)
    same_files = set(lengths.files) == set(DATASETS) and checksum(lengths) == CHECKSUM
    return by_row(WITH_FILES) if same_files else None


def checksum(lengths: Lengths) -> int:
    """Of all pairs of all data sets; each has a file."""
    return zlib.crc32(str([lengths.pairs(dataset) for dataset in DATASETS]).encode())


def mark(rows: Sequence[Row], misses: Mapping[Where, str] | None) -> list[Row]:
    """The rows with what is expected of each."""
    if misses is None:
        return [*rows]
    told = [misses.get((row.figure, row.setting, row.metric), "") for row in rows]
    return [replace(row, expected=why) for row, why in zip(rows, told)]
