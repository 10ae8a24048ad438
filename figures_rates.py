"""Figs. 12, 14, 16 and 17: how many requests per second each system sustains.

Reproduces: sections 6.2 to 6.5. Every curve is simulated at the rates that the paper draws and read
as the paper's is (curves.py); the rows are the rate at 0.5 s/token, vLLM's ratio to the others at
0.5 and 0.2, and every drawn point of Fig. 12: below the knee its latency, above it the rate. Points
to which the latency model was fitted are marked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import explanations as why
import paper
from comparison import Row, between, relative
from curves import Curve, Done, Point
from experiments import Run
from figures_memory import BATCH_WINDOW_S, THETA
from fitted_points import fitted_points
from paper import FASTER_TRANSFORMER, ORCA_MAX, ORCA_ORACLE, ORCA_POW2, ORCAS, VLLM

AT = f"requests/s at {paper.RATE_AT_LATENCY:g} s/token"
RATIO = f"rate, ratio at {paper.RATE_AT_LATENCY:g} s/token"
SHORT = {"opt-13b": "13B", "opt-66b": "66B", "opt-175b": "175B"}
FEW_REQUESTS = 200
KNEE = 1.5  # times the first point's latency: a drawn point above it is on the knee or beyond
# The artifact's scheduler for vLLM with prefixes, and the only reading of the 175B panels that
# fits, has the older default of 256 sequences instead of 2048 (README, Differences).
OLDER_MAX_SEQUENCES = 256


@dataclass(frozen=True)
class Fig12:
    """Basic sampling: two data sets, three models, five systems."""

    datasets: tuple[str, ...] = ("ShareGPT", "Alpaca")
    name = "Fig. 12"

    def curves(self, seed: int) -> dict[tuple[str, str], dict[str, Curve]]:
        return _fig12_curves(self.datasets, seed)

    def needed(self, done: Done, seed: int) -> list[Run]:
        return _needed(self.curves(seed), done)

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows: list[Row] = []
        ratios: list[tuple[float, float]] = []
        for (dataset, model), curves in self.curves(seed).items():
            panel = f"{SHORT[model]} {dataset}"
            rates = {system: curve.rate_at(done) for system, curve in curves.items()}
            for system, printed in paper.FIG12_RATES[dataset][model].items():
                percent, reason = self._tolerance(model, system)
                rows.append(relative(
                    self.name, f"{panel}, {system}", AT, printed, rates[system], percent, reason
                ))  # fmt: skip
            for system, printed in paper.FIG12_VLLM_OVER[dataset][model].items():
                ours = rates[VLLM] / rates[system]
                static = system == FASTER_TRANSFORMER
                rows.append(relative(
                    self.name, f"{panel}, vLLM / {system}", RATIO, printed, ours,
                    25.0 if static else 18.0,
                ))  # fmt: skip
                if not static:
                    ratios.append((printed, ours))
            for system, printed in paper.FIG12_VLLM_OVER_AT_02[dataset][model].items():
                ours = curves[VLLM].rate_at(done, 0.2) / curves[system].rate_at(done, 0.2)
                rows.append(relative(
                    self.name, f"{panel}, vLLM / {system}", "rate, ratio at 0.2 s/token", printed,
                    ours, 18.0,
                ))  # fmt: skip
            for system, curve in curves.items():
                fitted = fitted_points(dataset, model, system)
                rows += self._points(f"{panel}, {system}", curve, done, fitted)
        if len(self.datasets) == 2:
            rows += self._text(ratios, rows)
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        return []

    def _tolerance(self, model: str, system: str) -> tuple[float, str]:
        if system == FASTER_TRANSFORMER:
            return 10.0, ""
        reason = why.CURVE_175B if model == "opt-175b" else ""
        return (12.0 if system == VLLM else 25.0), reason

    def _points(
        self, setting: str, curve: Curve, done: Done, fitted: tuple[Point, ...]
    ) -> list[Row]:
        """Each drawn point: below the knee at equal rate, above it at equal latency."""
        rows = []
        ours = dict(curve.line(done))
        below = curve.knee * curve.paper[0][1]
        seen = set()
        for rate, latency in curve.paper:
            if latency < below and rate in seen:
                continue  # one curve has two points at one rate: the first counts
            seen.add(rate)
            reason = why.TINY_TRACE if rate * curve.run.seconds < FEW_REQUESTS else ""
            if latency < below:
                row = relative(
                    self.name, setting, f"s/token at {rate:g} requests/s", latency,
                    ours[float(rate)], 20.0, reason,
                )  # fmt: skip
                rows.append(replace(row, fitted=(rate, latency) in fitted))
            else:
                try:
                    found = curve.rate_at(done, latency)
                except ValueError:  # our curve never has this latency
                    found = 0.0
                rows.append(relative(
                    self.name, setting, f"requests/s at {latency:g} s/token", float(rate), found,
                    25.0, reason,
                ))  # fmt: skip
        return rows

    def _text(self, ratios: list[tuple[float, float]], rows: list[Row]) -> list[Row]:
        """What the text says of all panels together."""
        name, text = self.name, paper.TEXT
        near = sum(abs(ours / printed - 1.0) <= 0.10 for printed, ours in ratios)
        found = [between(
            name, "6 panels, vLLM / Orca", "ratios within 10 % (our criterion)", 15, 18, near,
            why.CURVE_175B,
        )]  # fmt: skip
        over = {row.setting: row.ours for row in rows if row.metric == RATIO}
        sharegpt = {s: v for s, v in over.items() if "ShareGPT" in s}

        def extreme(key: str, system: str, pick: int, reason: str = "") -> None:
            values = sorted(v for s, v in sharegpt.items() if s.endswith(f"/ {system}"))
            printed = text[key].value[pick]
            found.append(relative(
                text[key].figure, f"ShareGPT, vLLM / {system}",
                f"rate, {('lowest', 'highest')[pick]} ratio", printed, values[-pick], 18.0, reason,
            ))  # fmt: skip

        extreme("over_oracle_sharegpt", ORCA_ORACLE, 0)
        extreme("over_oracle_sharegpt", ORCA_ORACLE, 1, why.TEXT_RANGES)
        extreme("over_max_sharegpt", ORCA_MAX, 0)
        extreme("over_max_sharegpt", ORCA_MAX, 1, why.TEXT_RANGES)
        static = max(v for s, v in over.items() if s.endswith(FASTER_TRANSFORMER))
        found.append(relative(
            text["over_ft_up_to"].figure, "vLLM / FasterTransformer", "rate, highest ratio",
            text["over_ft_up_to"].value, static, 18.0,
        ))  # fmt: skip
        low, high = text["overall"].value
        found.append(between(
            text["overall"].figure, "6 panels, vLLM / Orca", "rate, median of 18 ratios", low, high,
            median(ours for _, ours in ratios),
        ))  # fmt: skip
        basic = text["over_oracle_alpaca"]
        found.append(relative(
            basic.figure, "13B Alpaca, vLLM / Orca (Oracle)", RATIO, basic.value,
            over["13B Alpaca, vLLM / Orca (Oracle)"], 18.0,
        ))  # fmt: skip
        return found


@dataclass(frozen=True)
class Fig14:
    """Parallel sampling and beam search, OPT-13B, Alpaca."""

    name = "Fig. 14"

    def curves(self, seed: int) -> dict[tuple[str, int], dict[str, Curve]]:
        return _fig14_curves(seed)

    def needed(self, done: Done, seed: int) -> list[Run]:
        return _needed(self.curves(seed), done)

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        for (decoding, width), curves in self.curves(seed).items():
            panel = f"13B Alpaca, {decoding} {width}"
            rates = {system: curve.rate_at(done) for system, curve in curves.items()}
            reason = why.BEAM if decoding == "beam" else ""
            for system, printed in paper.FIG14_RATES[decoding][width].items():
                rows.append(relative(
                    self.name, f"{panel}, {system}", AT, printed, rates[system], 20.0, reason
                ))  # fmt: skip
            for system, printed in paper.FIG14_VLLM_OVER[decoding][width].items():
                most = {ORCA_ORACLE: 10.0, ORCA_POW2: 10.0, ORCA_MAX: 20.0}[system]
                if decoding == "beam":
                    most = {ORCA_ORACLE: 15.0, ORCA_POW2: 20.0, ORCA_MAX: 30.0}[system]
                rows.append(relative(
                    self.name, f"{panel}, vLLM / {system}", RATIO, printed,
                    rates[VLLM] / rates[system], most, reason,
                ))  # fmt: skip
        curves = self.curves(seed)["beam", 6]
        text = paper.TEXT["over_oracle_beam6"]
        rows.append(relative(
            text.figure, "13B Alpaca, beam 6, vLLM / Orca (Oracle)", RATIO, text.value,
            curves[VLLM].rate_at(done) / curves[ORCA_ORACLE].rate_at(done), 15.0, why.BEAM,
        ))  # fmt: skip
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        return []


@dataclass(frozen=True)
class Fig16:
    """A shared prefix: translation with LLaMA-13B."""

    name = "Fig. 16"

    def curves(self, seed: int) -> dict[str, dict[str, Curve]]:
        return _fig16_curves(seed)

    def needed(self, done: Done, seed: int) -> list[Run]:
        return _needed(self.curves(seed), done)

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        for shots, curves in self.curves(seed).items():
            rates = {system: curve.rate_at(done) for system, curve in curves.items()}
            printed = paper.FIG16[shots]
            for system, rate in rates.items():
                rows.append(relative(
                    self.name, f"LLaMA-13B WMT16 {shots}, {system}", AT, printed[system], rate,
                    20.0, why.PREFILL,
                ))  # fmt: skip
            rows.append(relative(
                self.name, f"LLaMA-13B WMT16 {shots}, vLLM / Orca (Oracle)", RATIO,
                printed["ratio"], rates[VLLM] / rates[ORCA_ORACLE], 15.0, why.PREFILL,
            ))  # fmt: skip
            rows.append(relative(
                "Sec. 6.4", f"LLaMA-13B WMT16 {shots}, vLLM / Orca (Oracle)", RATIO,
                printed["text_ratio"], rates[VLLM] / rates[ORCA_ORACLE], 15.0, why.PREFILL,
            ))  # fmt: skip
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        return []


@dataclass(frozen=True)
class Fig17:
    """The chatbot: prompts cut to 1024 tokens."""

    name = "Fig. 17"

    def curves(self, seed: int) -> dict[str, dict[str, Curve]]:
        return _fig17_curves(seed)

    def needed(self, done: Done, seed: int) -> list[Run]:
        return _needed(self.curves(seed), done)

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        (curves,) = self.curves(seed).values()
        rates = {system: curve.rate_at(done) for system, curve in curves.items()}
        printed = paper.FIG17_RATES
        rows = [
            relative(
                self.name, f"13B chatbot, {system}", AT, printed[system], rates[system], 20.0,
                why.CHATBOT_DATA,
            )
            for system in printed
        ]  # fmt: skip
        for system in ORCAS:
            rows.append(relative(
                self.name, f"13B chatbot, vLLM / {system}", RATIO,
                printed[VLLM] / printed[system], rates[VLLM] / rates[system], 8.0,
                why.CHATBOT_DATA,
            ))  # fmt: skip
        text = paper.TEXT["chatbot"]
        rows.append(relative(
            text.figure, "13B chatbot, vLLM / Orca (Oracle)", RATIO, text.value,
            rates[VLLM] / rates[ORCA_ORACLE], 8.0, why.CHATBOT_TEXT,
        ))  # fmt: skip
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        return []


def _needed(panels: dict, done: Done) -> list[Run]:
    return [run for curves in panels.values() for c in curves.values() for run in c.needed(done)]


@cache
def _fig12_curves(datasets: tuple[str, ...], seed: int) -> dict:
    panels: dict = {}
    for (dataset, model), systems in paper.FIG12_CURVES.items():
        if dataset in datasets:
            hours = {FASTER_TRANSFORMER: 3600.0}  # an hour for every model, as in the artifact
            next_rates = paper.FIG12_NEXT_RATES[dataset, model]
            cap = OLDER_MAX_SEQUENCES if model == "opt-175b" else 0
            panels[dataset, model] = {
                system: Curve(
                    Run(system, model, dataset, 1.0,
                        hours.get(system, float(paper.TRACE_SECONDS[model])), seed,
                        max_num_seqs=cap if system == VLLM else 0, window_s=BATCH_WINDOW_S),
                    points, next_rates.get(system), paper.RATE_AT_LATENCY,
                    math.inf if system == FASTER_TRANSFORMER else KNEE,  # it rises without one
                )
                for system, points in systems.items()
            }  # fmt: skip
    return panels


@cache
def _fig14_curves(seed: int) -> dict:
    # An hour, as the paper says; beam search the artifact's ten minutes, for the time it takes.
    seconds = {
        "parallel": float(paper.TRACE_SECONDS["opt-13b"]),
        "beam": float(paper.ARTIFACT_RUNS["Fig. 12"]["seconds"]),
    }
    return {
        (decoding, width): {
            system: Curve(
                Run(system, "opt-13b", "Alpaca", 1.0, seconds[decoding], seed, decoding, width,
                    theta=THETA["Alpaca"]),
                points, paper.FIG14_NEXT_RATES[decoding, width].get(system),
                paper.RATE_AT_LATENCY,
            )
            for system, points in systems.items()
        }
        for (decoding, width), systems in paper.FIG14_CURVES.items()
    }  # fmt: skip


@cache
def _fig16_curves(seed: int) -> dict:
    seconds = float(paper.ARTIFACT_RUNS["Fig. 16"]["seconds"])
    return {
        shots: {
            system: Curve(
                Run(system, "llama-13b", f"WMT16 {shots}", 1.0, seconds, seed,
                    max_num_seqs=OLDER_MAX_SEQUENCES),
                points, None, paper.RATE_AT_LATENCY,
            )
            for system, points in systems.items()
        }
        for shots, systems in paper.FIG16_CURVES.items()
    }  # fmt: skip


@cache
def _fig17_curves(seed: int) -> dict:
    seconds = float(paper.TRACE_SECONDS["opt-13b"])
    return {
        "chatbot": {
            system: Curve(
                Run(system, "opt-13b", "chat", 1.0, seconds, seed), points,
                paper.FIG17_NEXT_RATES.get(system), paper.RATE_AT_LATENCY,
            )
            for system, points in paper.FIG17_CURVES.items()
        }
    }  # fmt: skip
