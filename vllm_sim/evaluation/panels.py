"""The panels of Figs. 12, 14, 16 and 17: which curve each system has there, and the runs behind it.

Reproduces: the settings of sections 6.2 to 6.5, as the artifact has them where the paper does not
say. A panel maps a system to its curve (curves.py): the paper's points, and the run that gives ours
at any rate. figures_rates.py makes rows of them, pictures.py draws them.

    fig12_panels(("ShareGPT",), seed=0)["ShareGPT", "opt-13b"]["vLLM"].rates
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any

from vllm_sim import paper
from vllm_sim.evaluation.curves import Curve, Done
from vllm_sim.evaluation.experiments import Run
from vllm_sim.evaluation.figures_memory import BATCH_WINDOW_S, THETA
from vllm_sim.paper import FASTER_TRANSFORMER, VLLM

Panels = Mapping[Any, Mapping[str, Curve]]  # by what tells the panels apart, then by system
# Fig. 14's beam search runs the artifact's ten minutes, for the time that the paper's hour takes.
BEAM_SECONDS = float(paper.ARTIFACT_RUNS["Fig. 12"]["seconds"])
KNEE = 1.5  # times the first point's latency: a drawn point above it is on the knee or beyond
# The artifact's scheduler for vLLM with prefixes, and the only reading of the 175B panels that
# fits, has the older default of 256 sequences instead of 2048 (README, Differences).
OLDER_MAX_SEQUENCES = 256


class CurveFigure(ABC):
    """A figure that is nothing but curves."""

    @abstractmethod
    def curves(self, seed: int) -> Panels:
        """Its panels."""

    def needed(self, done: Done, seed: int) -> list[Run]:
        """The next runs of every curve."""
        panels = self.curves(seed).values()
        return [run for panel in panels for curve in panel.values() for run in curve.needed(done)]

    @staticmethod
    def rates(panel: Mapping[str, Curve], done: Done) -> dict[str, float]:
        """Requests/s that each system of a panel sustains, at the latency where it is read."""
        return {system: curve.rate_at(done) for system, curve in panel.items()}

    def notes(self, done: Done, seed: int) -> list[str]:
        """All there is to say is in the rows."""
        return []


@cache
def fig12_panels(datasets: tuple[str, ...], seed: int) -> Panels:
    """By data set and model."""
    panels: dict = {}
    for (dataset, model), systems in paper.FIG12_CURVES.items():
        if dataset in datasets:
            hours = {FASTER_TRANSFORMER: 3600.0}  # an hour for every model, as in the artifact
            next_rates = paper.FIG12_NEXT_RATES[dataset, model]
            cap = OLDER_MAX_SEQUENCES if model == "opt-175b" else 0
            panels[dataset, model] = {
                system: Curve(
                    Run(
                        system,
                        model,
                        dataset,
                        1.0,
                        hours.get(system, float(paper.TRACE_SECONDS[model])),
                        seed,
                        max_num_seqs=cap if system == VLLM else 0,
                        window_s=BATCH_WINDOW_S,
                    ),
                    points,
                    next_rates.get(system),
                    paper.RATE_AT_LATENCY,
                    math.inf if system == FASTER_TRANSFORMER else KNEE,  # it rises without one
                )
                for system, points in systems.items()
            }
    return panels


@cache
def fig14_panels(seed: int, beam_seconds: float) -> Panels:
    """By decoding and number of sequences. Parallel sampling runs an hour, as the paper says."""
    seconds = {"parallel": float(paper.TRACE_SECONDS["opt-13b"]), "beam": beam_seconds}
    return {
        (decoding, width): {
            system: Curve(
                Run(
                    system,
                    "opt-13b",
                    "Alpaca",
                    1.0,
                    seconds[decoding],
                    seed,
                    decoding,
                    width,
                    theta=THETA["Alpaca"],
                ),
                points,
                paper.FIG14_NEXT_RATES[decoding, width].get(system),
                paper.RATE_AT_LATENCY,
            )
            for system, points in systems.items()
        }
        for (decoding, width), systems in paper.FIG14_CURVES.items()
    }


@cache
def fig16_panels(seed: int) -> Panels:
    """By how many examples the shared prefix holds."""
    seconds = float(paper.ARTIFACT_RUNS["Fig. 16"]["seconds"])
    return {
        shots: {
            system: Curve(
                Run(
                    system,
                    "llama-13b",
                    f"WMT16 {shots}",
                    1.0,
                    seconds,
                    seed,
                    max_num_seqs=OLDER_MAX_SEQUENCES,
                ),
                points,
                None,
                paper.RATE_AT_LATENCY,
            )
            for system, points in systems.items()
        }
        for shots, systems in paper.FIG16_CURVES.items()
    }


@cache
def fig17_panels(seed: int) -> Panels:
    """One, the chatbot's."""
    seconds = float(paper.TRACE_SECONDS["opt-13b"])
    return {
        "chatbot": {
            system: Curve(
                Run(system, "opt-13b", "chat", 1.0, seconds, seed),
                points,
                paper.FIG17_NEXT_RATES.get(system),
                paper.RATE_AT_LATENCY,
            )
            for system, points in paper.FIG17_CURVES.items()
        }
    }
