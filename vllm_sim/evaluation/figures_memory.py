"""Table 1 and Figs. 2, 13 and 15: what fits, and where the memory goes.

Reproduces: Table 1 and section 3's sizes; Fig. 2 (share of each kind of slot), Fig. 13 (mean
batched requests), Fig. 15 (blocks saved by sharing). Each figure says which runs it needs and
makes its rows of their outcomes; runner.py does the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vllm_sim import models, paper
from vllm_sim.evaluation.comparison import Figure, Row, absolute, as_printed, between, relative
from vllm_sim.evaluation.experiments import Done, Run
from vllm_sim.paper import FIG2, FIG13, FIG13_RATES, FIG15, FIG15_SHAREGPT, ORCAS, TEXT, VLLM

GIB = paper.GIB
MODEL = "opt-13b"
# One parameter for each data set (vllm_sim/serving/beam_search.py), fitted to Fig. 15 itself.
THETA = {"Alpaca": 0.27, "ShareGPT": 0.035}
SHAREGPT_SHARING_RATE = 4.0  # requests/s; the paper gives none for its ShareGPT figures
KNEE_RATES = (25.0, 27.5, 29.0)  # on the way to Fig. 13's 30 requests/s; Fig. 12 has them too
BATCH_WINDOW_S = (float(paper.ARTIFACT_RUNS["Fig. 13"]["window"][0]), 3600.0)


class Table1(Figure):
    """Sizes from the model shapes and the artifact's memory plan; nothing is simulated."""

    name = "Table 1"

    def rows(self, done: Done) -> list[Row]:
        rows = []
        for model, printed in paper.TABLE1.items():
            deployment = models.DEPLOYMENTS[model]
            memory = models.paper_plan(deployment)
            gpus = deployment.num_gpus
            measured = {
                "total_gb": gpus * deployment.gpu.sold_gb,
                "parameters_gb": gpus * memory.weights / 1e9,
                "kv_cache_gb": gpus * memory.kv_cache / GIB,
                "kilo_slots": models.kv_blocks(deployment) * paper.BLOCK_SIZE / 1000.0,
            }
            for what, value in printed.items():
                metric = what.replace("_gb", ", GB").replace("_", " ")
                rows.append(as_printed(self.name, model, metric, value, measured[what]))
        slot = models.MODELS[MODEL].kv_bytes_per_token
        for key, unit, value in (
            ("kv_bytes_per_token", "bytes of K/V a token", slot),
            ("kv_gb_per_request", "GiB of K/V a request", slot * paper.MAX_MODEL_LEN / GIB),
        ):
            rows.append(as_printed(TEXT[key].figure, MODEL, unit, TEXT[key].value, value))
        left = paper.FIG1_MEMORY
        deployment = models.DEPLOYMENTS[MODEL]
        total = deployment.gpu.sold_gb * 1e9
        parameters = 100.0 * 2 * models.MODELS[MODEL].num_params / total
        metric, printed = "parameters, % of the GPU", left["parameters_percent"]
        rows.append(absolute("Fig. 1", MODEL, metric, printed, parameters, 1.0))
        kv_cache = 100.0 * models.paper_plan(deployment).kv_cache / deployment.gpu.memory_bytes
        metric, printed = "K/V cache, % of the GPU", left["kv_cache_percent_over"]
        rows.append(between("Fig. 1", MODEL, metric, printed, math.inf, kv_cache))
        return rows


class Fig2(Figure):
    """Shares of all slots in the artifact's setting: overload, 300 s to 900 s."""

    name = "Fig. 2"

    def _run(self, system: str) -> Run:
        setting = paper.ARTIFACT_RUNS["Fig. 2"]
        memory = {"window_s": setting["window"], "memory": True}
        return Run(system, MODEL, "ShareGPT", setting["rate"], float(setting["seconds"]), **memory)

    def needed(self, done: Done) -> list[Run]:
        return [self._run(system) for system in FIG2]

    def rows(self, done: Done) -> list[Row]:
        rows = []
        for system, printed in FIG2.items():
            percent = {p: 100.0 * share for p, share in done[self._run(system)].shares.items()}
            if system == VLLM:  # the artifact splits what vLLM has not allocated into halves
                percent["reserved"] = percent["internal"] = percent["free"] / 2.0
                percent["external"] = percent["padding"]
            else:
                percent["external"] = percent["rounding"] + percent["padding"] + percent["free"]
            where = self.name, f"13B ShareGPT, {system}"
            for part, value in printed.items():
                what = *where, f"{part}, % of slots", value, percent[part]
                rows.append(replace(absolute(*what, 1.0), of_mean=absolute(*what, 2.5)))
        blocks = models.kv_blocks(models.DEPLOYMENTS[MODEL])
        watermark = 100.0 * int(paper.WATERMARK * blocks) / blocks
        free = 100.0 * done[self._run(VLLM)].least_free
        metric = "least free after an admission, % (artifact)"
        rows.append(between("Sec. 4.5", f"13B ShareGPT, {VLLM}", metric, watermark, math.inf, free))
        return rows

    def notes(self, done: Done) -> list[str]:
        outcome = done[self._run(VLLM)]
        slots = models.kv_blocks(models.DEPLOYMENTS[MODEL]) * paper.BLOCK_SIZE
        padding = outcome.shares["padding"] * slots / outcome.mean_batch
        return [
            f"vLLM leaves {padding:.1f} slots unfilled per request: under one block of 16 (Sec. 4)."
        ]


class Fig13(Figure):
    """Mean batched requests from 600 s to the end of the hour."""

    name = "Fig. 13"

    def _run(self, dataset: str, system: str) -> Run:
        seconds = float(paper.TRACE_SECONDS[MODEL])
        return Run(system, MODEL, dataset, FIG13_RATES[dataset], seconds, window_s=BATCH_WINDOW_S)

    def _knee(self) -> list[Run]:
        return [replace(self._run("Alpaca", VLLM), rate=rate) for rate in KNEE_RATES]

    def needed(self, done: Done) -> list[Run]:
        runs = [self._run(d, system) for d, systems in FIG13.items() for system in systems]
        return runs + self._knee()

    def rows(self, done: Done) -> list[Row]:
        rows = []
        ours: dict[tuple[str, str], float] = {}
        for dataset, systems in FIG13.items():
            for system, printed in systems.items():
                ours[dataset, system] = batch = done[self._run(dataset, system)].mean_batch
                most = 5.0 if system in ORCAS else {"ShareGPT": 8.0, "Alpaca": 15.0}[dataset]
                where = self.name, f"13B {dataset}, {system}", "mean batched requests"
                rows.append(relative(*where, printed, batch, most))
        for system, printed in paper.FIG13_VLLM_OVER["ShareGPT"].items():
            ratio = ours["ShareGPT", VLLM] / ours["ShareGPT", system]
            where = "Sec. 6.2", f"13B ShareGPT, vLLM / {system}", "batched requests, ratio"
            rows.append(relative(*where, printed, ratio, 10.0))
        return rows

    def notes(self, done: Done) -> list[str]:
        runs = sorted([*self._knee(), self._run("Alpaca", VLLM)])
        points = ", ".join(f"{run.rate:g}: {done[run].mean_batch:.0f}" for run in runs)
        return [f"Alpaca, vLLM: mean batch by requests/s (30 lies on the knee): {points}"]


@dataclass(frozen=True)
class Fig15(Figure):
    """Blocks saved by sharing, 300 s to 900 s. THETA was fitted to the rows of beam search."""

    name = "Fig. 15"
    beams: bool = True

    def _run(self, dataset: str, decoding: str, width: int) -> Run:
        setting = paper.ARTIFACT_RUNS["Fig. 15"]
        rate = setting["rate"] if dataset == "Alpaca" else SHAREGPT_SHARING_RATE
        memory = {"window_s": setting["window"], "memory": True}
        what = {"decoding": decoding, "width": width, "theta": THETA[dataset]}
        return Run(VLLM, MODEL, dataset, rate, float(setting["seconds"]), **what, **memory)

    def _decodings(self) -> list[str]:
        return [decoding for decoding in FIG15 if self.beams or decoding != "beam"]

    def needed(self, done: Done) -> list[Run]:
        runs = []
        for decoding in self._decodings():
            runs += [self._run("Alpaca", decoding, width) for width in FIG15[decoding]]
            runs += [self._run("ShareGPT", decoding, width) for width in (2, 4, 6)]
        return runs

    def rows(self, done: Done) -> list[Row]:
        return [row for decoding in self._decodings() for row in self._of(decoding, done)]

    def _of(self, decoding: str, done: Done) -> list[Row]:
        """The rows of parallel sampling, or of beam search."""

        def saved(dataset: str, width: int) -> float:
            return 100.0 * done[self._run(dataset, decoding, width)].saving

        most, most_sharegpt = {"parallel": (0.5, 1.0), "beam": (1.6, 2.5)}[decoding]
        metric = "% of blocks saved"
        rows = []
        for width, printed in FIG15[decoding].items():
            where = self.name, f"13B Alpaca, {decoding} {width}", metric
            rows.append(absolute(*where, printed, saved("Alpaca", width), most))
        for width, printed in zip((2, 6), FIG15_SHAREGPT[decoding]):
            where = "Sec. 6.3", f"13B ShareGPT, {decoding} {width}", metric
            rows.append(absolute(*where, printed, saved("ShareGPT", width), most_sharegpt))
        if decoding == "parallel":
            text = TEXT["prompt_kv_share"]
            share = saved("Alpaca", 6) * 6 / 5  # of n copies of the prompt, n - 1 are saved
            where = text.figure, "13B Alpaca, parallel 6", "prompt's share of K/V, %"
            return [*rows, absolute(*where, text.value, share, 1.0)]
        text = TEXT["beam_saving_up_to"]
        highest = max(saved("Alpaca", width) for width in FIG15[decoding])
        where = text.figure, "13B Alpaca, beam search", f"{metric}, most"
        rows.append(absolute(*where, text.value, highest, most))
        return [replace(row, fitted=True) for row in rows]
