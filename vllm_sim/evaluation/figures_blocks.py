"""Figs. 18b and 19b: the block size, and what to do with a preempted request.

Reproduces: sections 7.2 and 7.3, end to end. (Figs. 18a and 19a time kernels and copies: they are
inputs of the latency model or GPU measurements, not outcomes of a simulation.)
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sim import paper
from vllm_sim.evaluation import comparison as why
from vllm_sim.evaluation.comparison import Row, between, factor
from vllm_sim.evaluation.curves import Done
from vllm_sim.evaluation.experiments import Run
from vllm_sim.paper import FIG18B, FIG19A_RATIO, FIG19B, VLLM

SMALL = 16  # slots; below, the paper's kernel decides
MOST = 1.4


def _latency(
    figure: str, setting: str, block: int, paper_s: float, ours: float, reason: str
) -> Row:
    return factor(
        figure,
        f"{setting}, blocks of {block}",
        "s/token",
        paper_s,
        ours,
        MOST,
        why.SMALL_BLOCKS if block < SMALL else reason,
    )


@dataclass(frozen=True)
class Fig18b:
    """Normalized latency by block size, ShareGPT and Alpaca, one rate each."""

    alpaca: bool = True
    name = "Fig. 18b"

    def _run(self, dataset: str, block: int, seed: int) -> Run:
        if dataset == "Alpaca":
            setting = paper.ARTIFACT_RUNS["Fig. 18b"]
        else:  # its rate is not stated: Fig. 19b's, which the artifact's plots pair with it
            setting = paper.ARTIFACT_RUNS["Fig. 19b"]
        return Run(
            VLLM,
            "opt-13b",
            dataset,
            setting["rate"],
            float(setting["seconds"]),
            seed,
            block_size=block,
        )

    def _datasets(self) -> list[str]:
        return [dataset for dataset in FIG18B if self.alpaca or dataset != "Alpaca"]

    def needed(self, done: Done, seed: int) -> list[Run]:
        return [self._run(d, block, seed) for d in self._datasets() for block in FIG18B[d]]

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        ours: dict[tuple[str, int], float] = {}
        for dataset in self._datasets():
            for block, printed in FIG18B[dataset].items():
                latency = done[self._run(dataset, block, seed)].normalized_latency
                ours[dataset, block] = latency
                reason = why.KNEE_18B if dataset == "Alpaca" else why.SAME_RUN_TWICE
                rows.append(_latency(self.name, f"13B {dataset}", block, printed, latency, reason))
        for dataset in self._datasets():
            text = paper.TEXT[f"good_blocks_{dataset.lower()}"]
            low, high = text.value
            good = [value for (d, b), value in ours.items() if d == dataset and low <= b <= high]
            larger = [value for (d, b), value in ours.items() if d == dataset and b > high]
            rows.append(
                between(
                    text.figure,
                    f"13B {dataset}, blocks of {low} to {high}",
                    "s/token, worst of larger blocks over worst of these (our criterion)",
                    2.0,
                    float("inf"),
                    max(larger) / max(good),
                )
            )
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        return []


@dataclass(frozen=True)
class Fig19b:
    """Recomputation against swapping, ShareGPT, the same rate."""

    name = "Fig. 19b"

    def _run(self, preemption: str, block: int, seed: int) -> Run:
        setting = paper.ARTIFACT_RUNS["Fig. 19b"]
        # Alone, a sequence is recomputed by default: the same run as Fig. 18b's.
        mode = "auto" if preemption == "recompute" else preemption
        return Run(
            VLLM,
            "opt-13b",
            "ShareGPT",
            setting["rate"],
            float(setting["seconds"]),
            seed,
            block_size=block,
            preemption=mode,
        )

    def needed(self, done: Done, seed: int) -> list[Run]:
        return [self._run(mode, block, seed) for mode in FIG19B for block in FIG19B[mode]]

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        ours = {
            (mode, block): done[self._run(mode, block, seed)].normalized_latency
            for mode in FIG19B
            for block in FIG19B[mode]
        }
        for (mode, block), latency in ours.items():
            printed = FIG19B[mode][block]
            rows.append(
                _latency(
                    self.name, f"13B ShareGPT, {mode}", block, printed, latency, why.SAME_RUN_TWICE
                )
            )
        for block in FIG19B["swap"]:
            printed = FIG19B["recompute"][block] / FIG19B["swap"][block]
            found = ours["recompute", block] / ours["swap", block]
            rows.append(
                factor(
                    self.name,
                    f"13B ShareGPT, blocks of {block}",
                    "recompute over swap",
                    printed,
                    found,
                    MOST,
                    why.SMALL_BLOCKS if block < SMALL else why.SAME_RUN_TWICE,
                )
            )
        text = paper.TEXT["comparable_blocks"]
        low, high = text.value
        blocks = [block for block in FIG19B["swap"] if low <= block <= high]
        ratios = [ours["recompute", block] / ours["swap", block] for block in blocks]
        rows.append(
            between(
                text.figure,
                f"13B ShareGPT, blocks of {low} to {high}",
                "recompute over swap, furthest from 1 (our criterion)",
                1 / 1.25,
                1.25,
                max(ratios, key=lambda ratio: abs(ratio - 1.0)),
            )
        )
        text = paper.TEXT["recompute_over_swap_up_to"]
        rows.append(
            between(
                text.figure,
                "Fig. 19a as the paper draws it",
                "recompute over swap in + out, % above",
                float("-inf"),
                text.value,
                100.0 * (max(FIG19A_RATIO.values()) - 1.0),
            )
        )
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        return []
