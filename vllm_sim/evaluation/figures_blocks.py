"""Figs. 18b and 19b: the block size, and what to do with a preempted request.

Reproduces: sections 7.2 and 7.3, end to end. (Figs. 18a and 19a time kernels and copies: they are
inputs of the latency model or GPU measurements, not outcomes of a simulation.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_sim import paper
from vllm_sim.evaluation.comparison import Figure, Row, between, factor
from vllm_sim.evaluation.experiments import Done, Run
from vllm_sim.paper import FIG18B, FIG19A_RATIO, FIG19B, TEXT, VLLM

MOST = 1.4


def _run(figure: str, dataset: str, block: int, preemption: str = "auto") -> Run:
    """A run as the artifact has it for a figure, with another block size."""
    setting = paper.ARTIFACT_RUNS[figure]
    seconds = float(setting["seconds"])
    options = {"block_size": block, "preemption": preemption}
    return Run(VLLM, "opt-13b", dataset, setting["rate"], seconds, **options)


@dataclass(frozen=True)
class Fig18b(Figure):
    """Normalized latency by block size, ShareGPT and Alpaca, one rate each."""

    alpaca: bool = True
    name = "Fig. 18b"

    def runs(self) -> dict[tuple[str, int], Run]:
        """By data set and block size. ShareGPT's rate is not stated: Fig. 19b's, which the
        artifact's plots pair with it."""
        figures = {"ShareGPT": "Fig. 19b", "Alpaca": "Fig. 18b"}
        return {
            (dataset, block): _run(figures[dataset], dataset, block)
            for dataset, printed in FIG18B.items()
            if self.alpaca or dataset != "Alpaca"
            for block in printed
        }

    def needed(self, done: Done) -> list[Run]:
        return list(self.runs().values())

    def rows(self, done: Done) -> list[Row]:
        ours = {key: done[run].normalized_latency for key, run in self.runs().items()}
        rows = []
        for (dataset, block), latency in ours.items():
            where = self.name, f"13B {dataset}, blocks of {block}", "s/token"
            rows.append(factor(*where, FIG18B[dataset][block], latency, MOST))
        for dataset in dict.fromkeys(dataset for dataset, _ in ours):
            text = TEXT[f"good_blocks_{dataset.lower()}"]
            low, high = text.value
            good = [value for (d, b), value in ours.items() if d == dataset and low <= b <= high]
            larger = [value for (d, b), value in ours.items() if d == dataset and b > high]
            metric = "s/token, worst of larger blocks over worst of these (our criterion)"
            where = text.figure, f"13B {dataset}, blocks of {low} to {high}", metric
            rows.append(between(*where, 2.0, math.inf, max(larger) / max(good)))
        return rows


class Fig19b(Figure):
    """Recomputation against swapping, ShareGPT, the same rate."""

    name = "Fig. 19b"

    def runs(self) -> dict[tuple[str, int], Run]:
        """By mode and block size. Alone, a sequence is recomputed by default: Fig. 18b's runs."""
        modes = {"recompute": "auto", "swap": "swap"}
        return {
            (mode, block): _run(self.name, "ShareGPT", block, modes[mode])
            for mode, printed in FIG19B.items()
            for block in printed
        }

    def needed(self, done: Done) -> list[Run]:
        return list(self.runs().values())

    def rows(self, done: Done) -> list[Row]:
        rows, setting, ratio = [], "13B ShareGPT", "recompute over swap"
        ours = {key: done[run].normalized_latency for key, run in self.runs().items()}
        for (mode, block), latency in ours.items():
            where = self.name, f"{setting}, {mode}, blocks of {block}", "s/token"
            rows.append(factor(*where, FIG19B[mode][block], latency, MOST))
        ratios = {b: ours["recompute", b] / ours["swap", b] for b in FIG19B["swap"]}
        for block, found in ratios.items():
            printed = FIG19B["recompute"][block] / FIG19B["swap"][block]
            where = self.name, f"{setting}, blocks of {block}", ratio
            rows.append(factor(*where, printed, found, MOST))
        text = TEXT["comparable_blocks"]
        low, high = text.value
        middle = [found for block, found in ratios.items() if low <= block <= high]
        furthest = max(middle, key=lambda found: abs(found - 1.0))
        metric = f"{ratio}, furthest from 1 (our criterion)"
        where = text.figure, f"{setting}, blocks of {low} to {high}", metric
        rows.append(between(*where, 1 / 1.25, 1.25, furthest))
        text = TEXT["recompute_over_swap_up_to"]
        where = text.figure, "Fig. 19a as the paper draws it", f"{ratio} in + out, % above"
        most = 100.0 * (max(FIG19A_RATIO.values()) - 1.0)
        rows.append(between(*where, -math.inf, text.value, most))
        return rows
