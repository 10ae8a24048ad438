"""Table 1 and Figs. 2, 13 and 15: what fits, and where the memory goes.

Reproduces: Table 1 and section 3's sizes; Fig. 2 (share of each kind of slot), Fig. 13 (mean
batched requests), Fig. 15 (blocks saved by sharing). Each figure says which runs it needs and
makes its rows of their outcomes; reproduce.py does the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vllm_sim import models, paper
from vllm_sim.evaluation import comparison as why
from vllm_sim.evaluation.comparison import Row, absolute, as_printed, between, relative
from vllm_sim.evaluation.curves import Done
from vllm_sim.evaluation.experiments import Run
from vllm_sim.paper import FIG2, FIG13, FIG13_RATES, FIG15, FIG15_SHAREGPT, ORCAS, VLLM

GIB = paper.GIB
MODEL = "opt-13b"
# One parameter for each data set (beam_search.py), fitted to Fig. 15 itself: see the README.
THETA = {"Alpaca": 0.27, "ShareGPT": 0.035}
SHAREGPT_SHARING_RATE = 4.0  # requests/s; the paper gives none for its ShareGPT figures
KNEE_RATES = (25.0, 27.5, 29.0)  # on the way to Fig. 13's 30 requests/s; Fig. 12 has them too
BATCH_WINDOW_S = (float(paper.ARTIFACT_RUNS["Fig. 13"]["window"][0]), 3600.0)


KNOWN = {
    ("opt-66b", "kilo_slots"): why.TABLE1_SLOTS,
    ("opt-175b", "parameters_gb"): why.TABLE1_PARAMETERS,
}


@dataclass(frozen=True)
class Table1:
    """Sizes from the model shapes and the artifact's memory plan; nothing is simulated."""

    name = "Table 1"

    def needed(self, done: Done, seed: int) -> list[Run]:
        return []

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        for model, printed in paper.TABLE1.items():
            deployment = models.DEPLOYMENTS[model]
            memory = models.paper_plan(deployment)
            gpus = deployment.num_gpus
            slots = models.kv_blocks(deployment) * paper.BLOCK_SIZE
            measured = {
                "total_gb": gpus * deployment.gpu.sold_gb,
                "parameters_gb": gpus * memory.weights / 1e9,
                "kv_cache_gb": gpus * memory.kv_cache / GIB,
                "kilo_slots": slots / 1000.0,
            }
            for what, value in printed.items():
                reason = KNOWN.get((model, what), "")
                metric = what.replace("_gb", ", GB").replace("_", " ")
                rows.append(as_printed(self.name, model, metric, value, measured[what], reason))
        slot_bytes = models.MODELS[MODEL].kv_bytes_per_token
        text = paper.TEXT
        for key, unit, value in (
            ("kv_bytes_per_token", "bytes of K/V a token", slot_bytes),
            ("kv_gb_per_request", "GiB of K/V a request", slot_bytes * paper.MAX_MODEL_LEN / GIB),
        ):
            rows.append(as_printed(text[key].figure, MODEL, unit, text[key].value, value))
        left = paper.FIG1_MEMORY
        deployment = models.DEPLOYMENTS[MODEL]
        memory = models.paper_plan(deployment)
        total = deployment.gpu.sold_gb * 1e9
        share = 100.0 * 2 * models.MODELS[MODEL].num_params / total
        rows.append(
            absolute(
                "Fig. 1", MODEL, "parameters, % of the GPU", left["parameters_percent"], share, 1.0
            )
        )
        rows.append(
            between(
                "Fig. 1",
                MODEL,
                "K/V cache, % of the GPU",
                left["kv_cache_percent_over"],
                math.inf,
                100.0 * memory.kv_cache / deployment.gpu.memory_bytes,
            )
        )
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        return []


@dataclass(frozen=True)
class Fig2:
    """Shares of all slots in the artifact's setting: overload, 300 s to 900 s."""

    name = "Fig. 2"

    def _run(self, system: str, seed: int) -> Run:
        setting = paper.ARTIFACT_RUNS["Fig. 2"]
        return Run(
            system,
            MODEL,
            "ShareGPT",
            setting["rate"],
            float(setting["seconds"]),
            seed,
            window_s=setting["window"],
            memory=True,
        )

    def needed(self, done: Done, seed: int) -> list[Run]:
        return [self._run(system, seed) for system in FIG2]

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        for system, printed in FIG2.items():
            shares = {
                part: 100.0 * share for part, share in done[self._run(system, seed)].shares.items()
            }
            if system == VLLM:  # the artifact splits what vLLM has not allocated into halves
                shares["reserved"] = shares["internal"] = shares["free"] / 2.0
                shares["external"] = shares["padding"]
            else:
                shares["external"] = shares["rounding"] + shares["padding"] + shares["free"]
            for part, value in printed.items():
                rows.append(
                    absolute(
                        self.name,
                        f"13B ShareGPT, {system}",
                        f"{part}, % of slots",
                        value,
                        shares[part],
                        2.5 if several else 1.0,
                    )
                )
        blocks = models.kv_blocks(models.DEPLOYMENTS[MODEL])
        rows.append(
            between(
                "Sec. 4.5",
                "13B ShareGPT, vLLM",
                "least free after an admission, % (artifact)",
                100.0 * int(paper.WATERMARK * blocks) / blocks,
                math.inf,
                100.0 * done[self._run(VLLM, seed)].least_free,
            )
        )
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        run = self._run(VLLM, seed)
        slots = models.kv_blocks(models.DEPLOYMENTS[MODEL]) * paper.BLOCK_SIZE
        padding = done[run].shares["padding"] * slots / done[run].mean_batch
        return [
            f"vLLM leaves {padding:.1f} slots unfilled per request: under one block of 16 (Sec. 4)."
        ]


@dataclass(frozen=True)
class Fig13:
    """Mean batched requests from 600 s to the end of the hour."""

    name = "Fig. 13"

    def _run(self, dataset: str, system: str, seed: int) -> Run:
        seconds = float(paper.TRACE_SECONDS[MODEL])
        rate = FIG13_RATES[dataset]
        return Run(system, MODEL, dataset, rate, seconds, seed, window_s=BATCH_WINDOW_S)

    def _knee(self, seed: int) -> list[Run]:
        return [replace(self._run("Alpaca", VLLM, seed), rate=rate) for rate in KNEE_RATES]

    def needed(self, done: Done, seed: int) -> list[Run]:
        runs = [self._run(d, system, seed) for d, systems in FIG13.items() for system in systems]
        return runs + self._knee(seed)

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        ours: dict[tuple[str, str], float] = {}
        for dataset, systems in FIG13.items():
            for system, printed in systems.items():
                ours[dataset, system] = done[self._run(dataset, system, seed)].mean_batch
                percent = 5.0 if system in ORCAS else {"ShareGPT": 8.0, "Alpaca": 15.0}[dataset]
                rows.append(
                    relative(
                        self.name,
                        f"13B {dataset}, {system}",
                        "mean batched requests",
                        printed,
                        ours[dataset, system],
                        percent,
                    )
                )
        for system, printed in paper.FIG13_VLLM_OVER["ShareGPT"].items():
            rows.append(
                relative(
                    "Sec. 6.2",
                    f"13B ShareGPT, vLLM / {system}",
                    "batched requests, ratio",
                    printed,
                    ours["ShareGPT", VLLM] / ours["ShareGPT", system],
                    10.0,
                )
            )
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        runs = sorted([*self._knee(seed), self._run("Alpaca", VLLM, seed)])
        points = ", ".join(f"{run.rate:g}: {done[run].mean_batch:.0f}" for run in runs)
        return [f"Alpaca, vLLM: mean batch by requests/s (30 lies on the knee): {points}"]


@dataclass(frozen=True)
class Fig15:
    """Blocks saved by sharing, 300 s to 900 s. THETA was fitted to the rows of beam search."""

    name = "Fig. 15"
    beams: bool = True

    def _run(self, dataset: str, decoding: str, width: int, seed: int) -> Run:
        setting = paper.ARTIFACT_RUNS["Fig. 15"]
        rate = setting["rate"] if dataset == "Alpaca" else SHAREGPT_SHARING_RATE
        return Run(
            VLLM,
            MODEL,
            dataset,
            rate,
            float(setting["seconds"]),
            seed,
            decoding,
            width,
            theta=THETA[dataset],
            window_s=setting["window"],
            memory=True,
        )

    def _decodings(self) -> list[str]:
        return [decoding for decoding in FIG15 if self.beams or decoding != "beam"]

    def needed(self, done: Done, seed: int) -> list[Run]:
        runs = []
        for decoding in self._decodings():
            runs += [self._run("Alpaca", decoding, width, seed) for width in FIG15[decoding]]
            runs += [self._run("ShareGPT", decoding, width, seed) for width in (2, 4, 6)]
        return runs

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        rows = []
        for decoding in self._decodings():
            exact = {"parallel": (0.5, 1.0), "beam": (1.6, 2.5)}[decoding]
            first = len(rows)
            saved = {}
            for width, printed in FIG15[decoding].items():
                saved[width] = 100.0 * done[self._run("Alpaca", decoding, width, seed)].saving
                rows.append(
                    absolute(
                        self.name,
                        f"13B Alpaca, {decoding} {width}",
                        "% of blocks saved",
                        printed,
                        saved[width],
                        exact[0],
                    )
                )
            for width, printed in zip((2, 6), FIG15_SHAREGPT[decoding]):
                rows.append(
                    absolute(
                        "Sec. 6.3",
                        f"13B ShareGPT, {decoding} {width}",
                        "% of blocks saved",
                        printed,
                        100.0 * done[self._run("ShareGPT", decoding, width, seed)].saving,
                        exact[1],
                    )
                )
            if decoding == "parallel":
                text = paper.TEXT["prompt_kv_share"]
                share = saved[6] * 6 / 5  # of n copies of the prompt, n - 1 are saved
                rows.append(
                    absolute(
                        text.figure,
                        "13B Alpaca, parallel 6",
                        "prompt's share of K/V, %",
                        text.value,
                        share,
                        1.0,
                    )
                )
            else:
                text = paper.TEXT["beam_saving_up_to"]
                rows.append(
                    absolute(
                        text.figure,
                        "13B Alpaca, beam search",
                        "% of blocks saved, most",
                        text.value,
                        max(saved.values()),
                        exact[0],
                    )
                )
                rows[first:] = [replace(row, fitted=True) for row in rows[first:]]
        return rows

    def notes(self, done: Done, seed: int) -> list[str]:
        return []
