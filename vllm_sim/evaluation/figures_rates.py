"""Figs. 12, 14, 16 and 17: how many requests per second each system sustains.

Reproduces: sections 6.2 to 6.5. Every curve (panels.py) is simulated at the rates that the paper
draws and read as the paper's is (curves.py); the rows are the rate at 0.5 s/token, vLLM's ratio to
the others at 0.5 and 0.2, and every drawn point of Fig. 12: below the knee its latency, above it
the rate. Points to which the latency model was fitted are marked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from vllm_sim import paper
from vllm_sim.evaluation import comparison as why
from vllm_sim.evaluation.comparison import Row, between, relative
from vllm_sim.evaluation.curves import Curve, Done, Point, fitted_points
from vllm_sim.evaluation.panels import (
    BEAM_SECONDS,
    CurveFigure,
    Panels,
    fig12_panels,
    fig14_panels,
    fig16_panels,
    fig17_panels,
)
from vllm_sim.paper import FASTER_TRANSFORMER, ORCA_MAX, ORCA_ORACLE, ORCA_POW2, ORCAS, VLLM

AT = f"requests/s at {paper.RATE_AT_LATENCY:g} s/token"
RATIO = f"rate, ratio at {paper.RATE_AT_LATENCY:g} s/token"
SHORT = {"opt-13b": "13B", "opt-66b": "66B", "opt-175b": "175B"}
FEW_REQUESTS = 200


@dataclass(frozen=True)
class Fig12(CurveFigure):
    """Basic sampling: two data sets, three models, five systems."""

    datasets: tuple[str, ...] = ("ShareGPT", "Alpaca")
    name = "Fig. 12"

    def curves(self, seed: int) -> Panels:
        return fig12_panels(self.datasets, seed)

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows: list[Row] = []
        ratios: list[tuple[float, float]] = []
        for (dataset, model), curves in self.curves(seed).items():
            panel = f"{SHORT[model]} {dataset}"
            rates = self.rates(curves, done)
            for system, printed in paper.FIG12_RATES[dataset][model].items():
                percent, reason = self._tolerance(model, system)
                rows.append(
                    relative(
                        self.name, f"{panel}, {system}", AT, printed, rates[system], percent, reason
                    )
                )
            for system, printed in paper.FIG12_VLLM_OVER[dataset][model].items():
                ours = rates[VLLM] / rates[system]
                static = system == FASTER_TRANSFORMER
                rows.append(
                    relative(
                        self.name,
                        f"{panel}, vLLM / {system}",
                        RATIO,
                        printed,
                        ours,
                        25.0 if static else 18.0,
                    )
                )
                if not static:
                    ratios.append((printed, ours))
            for system, printed in paper.FIG12_VLLM_OVER_AT_02[dataset][model].items():
                ours = curves[VLLM].rate_at(done, 0.2) / curves[system].rate_at(done, 0.2)
                rows.append(
                    relative(
                        self.name,
                        f"{panel}, vLLM / {system}",
                        "rate, ratio at 0.2 s/token",
                        printed,
                        ours,
                        18.0,
                    )
                )
            for system, curve in curves.items():
                fitted = fitted_points(dataset, model, system)
                rows += self._points(f"{panel}, {system}", curve, done, fitted)
        if len(self.datasets) == 2:
            rows += self._text(ratios, rows)
        return rows

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
                    self.name,
                    setting,
                    f"s/token at {rate:g} requests/s",
                    latency,
                    ours[float(rate)],
                    20.0,
                    reason,
                )
                rows.append(replace(row, fitted=(rate, latency) in fitted))
            else:
                rows.append(
                    relative(
                        self.name,
                        setting,
                        f"requests/s at {latency:g} s/token",
                        float(rate),
                        curve.rate_at(done, latency),
                        25.0,
                        reason,
                    )
                )
        return rows

    def _text(self, ratios: list[tuple[float, float]], rows: list[Row]) -> list[Row]:
        """What the text says of all panels together."""
        name, text = self.name, paper.TEXT
        near = sum(abs(ours / printed - 1.0) <= 0.10 for printed, ours in ratios)
        found = [
            between(
                name,
                "6 panels, vLLM / Orca",
                "ratios within 10 % (our criterion)",
                15,
                18,
                near,
                why.CURVE_175B,
            )
        ]
        over = {row.setting: row.ours for row in rows if row.metric == RATIO}
        sharegpt = {s: v for s, v in over.items() if "ShareGPT" in s}

        def extreme(key: str, system: str, pick: int, reason: str = "") -> None:
            values = [v for s, v in sharegpt.items() if s.endswith(f"/ {system}")]
            printed = text[key].value[pick]
            found.append(
                relative(
                    text[key].figure,
                    f"ShareGPT, vLLM / {system}",
                    f"rate, {('lowest', 'highest')[pick]} ratio",
                    printed,
                    of_all((min, max)[pick], values),
                    18.0,
                    reason,
                )
            )

        extreme("over_oracle_sharegpt", ORCA_ORACLE, 0)
        extreme("over_oracle_sharegpt", ORCA_ORACLE, 1, why.TEXT_RANGES)
        extreme("over_max_sharegpt", ORCA_MAX, 0)
        extreme("over_max_sharegpt", ORCA_MAX, 1, why.TEXT_RANGES)
        static = of_all(max, [v for s, v in over.items() if s.endswith(FASTER_TRANSFORMER)])
        found.append(
            relative(
                text["over_ft_up_to"].figure,
                "vLLM / FasterTransformer",
                "rate, highest ratio",
                text["over_ft_up_to"].value,
                static,
                18.0,
            )
        )
        low, high = text["overall"].value
        found.append(
            between(
                text["overall"].figure,
                "6 panels, vLLM / Orca",
                "rate, median of 18 ratios",
                low,
                high,
                of_all(median, [ours for _, ours in ratios]),
            )
        )
        basic = text["over_oracle_alpaca"]
        found.append(
            relative(
                basic.figure,
                "13B Alpaca, vLLM / Orca (Oracle)",
                RATIO,
                basic.value,
                over["13B Alpaca, vLLM / Orca (Oracle)"],
                18.0,
            )
        )
        return found


def of_all(pick: Callable[[list[float]], float], values: list[float]) -> float:
    """What `pick` finds; NaN if a value is: where a curve has no rate, nothing holds of all."""
    return math.nan if any(map(math.isnan, values)) else pick(values)


@dataclass(frozen=True)
class Fig14(CurveFigure):
    """Parallel sampling, and beam search for so many seconds, OPT-13B, Alpaca."""

    beam_seconds: float = BEAM_SECONDS
    name = "Fig. 14"

    def curves(self, seed: int) -> Panels:
        return fig14_panels(seed, self.beam_seconds)

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        for (decoding, width), curves in self.curves(seed).items():
            panel = f"13B Alpaca, {decoding} {width}"
            rates = self.rates(curves, done)
            reason = why.BEAM if decoding == "beam" else ""
            for system, printed in paper.FIG14_RATES[decoding][width].items():
                rows.append(
                    relative(
                        self.name, f"{panel}, {system}", AT, printed, rates[system], 20.0, reason
                    )
                )
            for system, printed in paper.FIG14_VLLM_OVER[decoding][width].items():
                most = {ORCA_ORACLE: 10.0, ORCA_POW2: 10.0, ORCA_MAX: 20.0}[system]
                if decoding == "beam":
                    most = {ORCA_ORACLE: 15.0, ORCA_POW2: 20.0, ORCA_MAX: 30.0}[system]
                rows.append(
                    relative(
                        self.name,
                        f"{panel}, vLLM / {system}",
                        RATIO,
                        printed,
                        rates[VLLM] / rates[system],
                        most,
                        reason,
                    )
                )
        curves = self.curves(seed)["beam", 6]
        text = paper.TEXT["over_oracle_beam6"]
        rows.append(
            relative(
                text.figure,
                "13B Alpaca, beam 6, vLLM / Orca (Oracle)",
                RATIO,
                text.value,
                curves[VLLM].rate_at(done) / curves[ORCA_ORACLE].rate_at(done),
                15.0,
                why.BEAM,
            )
        )
        return rows


@dataclass(frozen=True)
class Fig16(CurveFigure):
    """A shared prefix: translation with LLaMA-13B."""

    name = "Fig. 16"

    def curves(self, seed: int) -> Panels:
        return fig16_panels(seed)

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        for shots, curves in self.curves(seed).items():
            rates = self.rates(curves, done)
            printed = paper.FIG16[shots]
            for system, rate in rates.items():
                rows.append(
                    relative(
                        self.name,
                        f"LLaMA-13B WMT16 {shots}, {system}",
                        AT,
                        printed[system],
                        rate,
                        20.0,
                        why.PREFILL,
                    )
                )
            rows.append(
                relative(
                    self.name,
                    f"LLaMA-13B WMT16 {shots}, vLLM / Orca (Oracle)",
                    RATIO,
                    printed["ratio"],
                    rates[VLLM] / rates[ORCA_ORACLE],
                    15.0,
                    why.PREFILL,
                )
            )
            rows.append(
                relative(
                    "Sec. 6.4",
                    f"LLaMA-13B WMT16 {shots}, vLLM / Orca (Oracle)",
                    RATIO,
                    printed["text_ratio"],
                    rates[VLLM] / rates[ORCA_ORACLE],
                    15.0,
                    why.PREFILL,
                )
            )
        return rows


@dataclass(frozen=True)
class Fig17(CurveFigure):
    """The chatbot: prompts cut to 1024 tokens."""

    name = "Fig. 17"

    def curves(self, seed: int) -> Panels:
        return fig17_panels(seed)

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        (curves,) = self.curves(seed).values()
        rates = self.rates(curves, done)
        printed = paper.FIG17_RATES
        rows = [
            relative(
                self.name,
                f"13B chatbot, {system}",
                AT,
                printed[system],
                rates[system],
                20.0,
                why.CHATBOT_DATA,
            )
            for system in printed
        ]
        for system in ORCAS:
            rows.append(
                relative(
                    self.name,
                    f"13B chatbot, vLLM / {system}",
                    RATIO,
                    printed[VLLM] / printed[system],
                    rates[VLLM] / rates[system],
                    8.0,
                    why.CHATBOT_DATA,
                )
            )
        text = paper.TEXT["chatbot"]
        rows.append(
            relative(
                text.figure,
                "13B chatbot, vLLM / Orca (Oracle)",
                RATIO,
                text.value,
                rates[VLLM] / rates[ORCA_ORACLE],
                8.0,
                why.CHATBOT_TEXT,
            )
        )
        return rows
