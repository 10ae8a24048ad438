"""What servers measured: whole runs, request by request, and tables of times; and ours beside it.

Reproduces nothing of the paper: it holds the scheduler's rules of vLLM v1 (`Limits(chunked=True)`,
no watermark, recomputation) and serving/server_latency.py against servers of today.

    run = read_run(Path("llmservingsim/RTX4090_Llama-3.1-8B"), num_blocks=None)
    compare(run, replay(run, work))["latency_mean"]         # (ours, theirs)

A run is a folder of LLMServingSim's bench/examples: requests.jsonl, timeseries.csv, meta.json and
config.json. Times are s from the first request's arrival. A table is aiconfigurator's
silicon_sample.csv. MeasuredError, in one line, for a file that is missing or odd. benchmarks/
replay.py prints what comes out.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kv_cache_manager import PagedKVCacheManager
from sequence import Sequence, SequenceGroup
from vllm_sim.serving.scheduler import Iteration, Limits, Scheduler
from vllm_sim.serving.server_latency import CARDS, Card, ServerLatency, Work
from vllm_sim.serving.simulator import simulate
from vllm_sim.sizing.speed import Precision
from vllm_sim.sizing.trace_serving import Watch

BLOCK_SIZE = 16
PROMPT_BUDGET = 8192  # tokens of an iteration where a table does not say: vLLM's default
ROUNDS = 3  # of as many requests as run together, in a closed loop


class MeasuredError(ValueError):
    """A measurement that cannot be read or replayed; the message is one line."""


# ---- a server under a list of requests ----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Times:
    """Of each request, s: admission, first token and last; and how many run, from when on."""

    starts: np.ndarray
    firsts: np.ndarray
    lasts: np.ndarray
    log: np.ndarray  # of each decision: time, requests running, waiting
    preemptions: int

    def running_under_pressure(self) -> float | None:
        """Mean of those running while others wait, over that time."""
        seconds, waits = np.diff(self.log[:, 0]), self.log[:-1, 2] > 0
        total = float(seconds[waits].sum())
        return float((seconds * self.log[:-1, 1])[waits].sum()) / total if total else None


class _Log(Watch):
    """Also keeps, at each decision, how many run and wait."""

    log: list[tuple[float, int, int]]

    def __call__(self, scheduler: Scheduler, iteration: Iteration) -> None:
        super().__call__(scheduler, iteration)
        part = scheduler.partial is not None  # still at the head of those that wait
        counts = len(scheduler.running) + part, len(scheduler.waiting) - part
        self.log.append((iteration.start_s, *counts))


def serve_requests(
    requests: list[tuple[float, int, int]],
    work: Work,
    card: Card,
    limits: Limits,
    num_blocks: int | None = None,
) -> Times:
    """Requests of (arrival, prompt, output) under v1's rules; memory without bound unless given.
    RequestTooLargeError for one that never fits."""
    latency = ServerLatency(work, card)
    groups = [
        SequenceGroup(i, [Sequence(i, *shape)], at) for i, (at, *shape) in enumerate(requests)
    ]
    if num_blocks is None:
        num_blocks = sum([(prompt + output) // BLOCK_SIZE + 2 for _, prompt, output in requests])
    watch = _Log([at for at, *_ in requests], latency=latency)
    watch.log = []
    manager = PagedKVCacheManager(num_blocks, BLOCK_SIZE, watermark=0.0)
    result = simulate(groups, manager, limits, latency, preemption="recompute", on_decision=watch)
    of_each = (
        np.array([found[i] for i in range(len(groups))])
        for found in (watch.starts, watch.firsts, result.finish_s)
    )
    return Times(*of_each, np.array(watch.log, dtype=float), watch.preemptions)


# ---- whole runs ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """One run: what served, what was asked, and when each request got its tokens."""

    name: str
    model: str
    card: Card
    gpus: int  # of a replica
    replicas: int
    limits: Limits  # of all replicas together, which step at once
    num_blocks: int | None  # of all of them; None: the cache is never full
    requests: list[tuple[float, int, int]]
    firsts: np.ndarray
    lasts: np.ndarray
    running_under_pressure: float | None


def read_run(folder: Path, num_blocks: int | None) -> MeasuredRun:
    """The run of a folder; `num_blocks` of a replica unless its meta.json has them."""
    meta = _json(folder / "meta.json")
    setting = _json(folder / "config.json")
    rows = [_parse(folder / "requests.jsonl", line) for line in _lines(folder / "requests.jsonl")]
    seconds = list(csv.DictReader(_lines(folder / "timeseries.csv")))
    try:
        engine = meta["engine_kwargs"]
        name = setting["nodes"][0]["instances"][0]["hardware"]
        replicas = int(engine["data_parallel_size"])
        blocks = num_blocks or meta.get("kv_cache", {}).get("num_gpu_blocks")
        rows.sort(key=lambda row: row["arrival_time"])
        # Arrivals are on another clock than the rest: the first request came when it was queued.
        arrival, queued = rows[0]["arrival_time"], rows[0]["queued_ts"]
        pressed = [float(row["running"]) for row in seconds if float(row["waiting"]) > 0]
        return MeasuredRun(
            folder.name,
            meta["model"],
            _card(name),
            int(engine["tensor_parallel_size"]),
            replicas,
            Limits(
                replicas * int(engine["max_num_batched_tokens"]),
                replicas * int(engine["max_num_seqs"]),
                chunked=True,
            ),
            replicas * int(blocks) if blocks else None,
            [(r["arrival_time"] - arrival, r["input_toks"], r["output_toks"]) for r in rows],
            np.array([row["first_token_ts"] - queued for row in rows]),
            np.array([row["last_token_ts"] - queued for row in rows]),
            float(np.mean(pressed)) if pressed else None,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise MeasuredError(f"{folder}: not a run that can be read: {error!r}") from None


def replay(run: MeasuredRun, work: Work, card: Card | None = None) -> Times:
    """The run's requests, served by us."""
    return serve_requests(run.requests, work, card or run.card, run.limits, run.num_blocks)


def compare(run: MeasuredRun, ours: Times) -> dict[str, tuple[float | None, float | None]]:
    """(ours, theirs) of each figure, s and requests."""
    arrivals = np.array([arrival for arrival, _, _ in run.requests])
    outputs = np.array([output for _, _, output in run.requests])
    found = [
        _figures(firsts, lasts, arrivals, outputs)
        for firsts, lasts in ((ours.firsts, ours.lasts), (run.firsts, run.lasts))
    ]
    both = {"running": (ours.running_under_pressure(), run.running_under_pressure)}
    return both | {key: (found[0][key], found[1][key]) for key in found[0]}


def errors_of_requests(run: MeasuredRun, ours: Times) -> dict[str, np.ndarray]:
    """Of each request ours / theirs: latency, time to first token, and per token where it has two
    tokens or more."""
    arrivals = np.array([arrival for arrival, _, _ in run.requests])
    many = np.array([output > 1 for _, _, output in run.requests])
    return {
        "latency": (ours.lasts - arrivals) / (run.lasts - arrivals),
        "ttft": (ours.firsts - arrivals) / (run.firsts - arrivals),
        "tpot": ((ours.lasts - ours.firsts)[many] / (run.lasts - run.firsts)[many]),
    }


def _figures(
    firsts: np.ndarray, lasts: np.ndarray, arrivals: np.ndarray, outputs: np.ndarray
) -> dict[str, float]:
    latency, many = lasts - arrivals, outputs > 1
    return {
        "end": float(lasts.max()),
        "latency_mean": float(latency.mean()),
        "latency_p99": float(np.percentile(latency, 99)),
        "ttft_mean": float((firsts - arrivals).mean()),
        "tpot_mean": float(((lasts - firsts)[many] / (outputs[many] - 1)).mean()),
    }


# ---- tables of times ----------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredRow:
    """One row of a table: so many requests at a time, each of so many tokens; times in s."""

    model: str
    card: Card
    precision: Precision
    gpus: int
    replicas: int
    prompt_len: int
    output_len: int
    concurrency: int
    uneven: bool  # lengths are drawn from 0.8 of these on, as InferenceMAX's client does
    ttft_s: float
    tpot_s: float


# By the quantisation that a table names: bytes of a parameter and speed-up, dense and of experts.
# Weights of 4 bits are those of experts alone, with a scale for 32, and compute in 16 bits.
PRECISIONS = {
    "": Precision(),
    "fp8": Precision(1.0, 1.0, dense_speedup=2.0, expert_speedup=2.0),
    "int4_wo": Precision(2.0, 0.5625),
    "nvfp4": Precision(2.0, 0.53125),
}


def read_table(path: Path) -> list[MeasuredRow]:
    """The rows of an aiconfigurator table, plain or .gz."""
    rows = []
    for number, row in enumerate(csv.DictReader(_lines(path)), 2):
        try:
            split = int(row["moe_tp_size"] or 1) * int(row["moe_ep_size"] or 1)
            replicas = int(row["attention_dp_size"] or 1)
            rows.append(
                MeasuredRow(
                    row["model_path"],
                    _card(row["system"].removesuffix("_sxm")),
                    PRECISIONS[row["gemm_quant_mode"]],
                    max(int(row["tp_size"]), split // replicas),
                    replicas,
                    int(row["isl"]),
                    int(row["osl"]),
                    int(row["batch_size"]),
                    "workflow_run_id" in row["silicon_data_source"],
                    1e-3 * float(row["silicon_ttft_ms"]),
                    1e-3 * float(row["silicon_tpot_ms"]),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MeasuredError(f"{path}, line {number}: not a row of times: {error!r}") from None
    if not rows:
        raise MeasuredError(f"{path}: no rows")
    return rows


def times_of(row: MeasuredRow, work: Work, card: Card | None = None) -> tuple[float, float]:
    """(time to first token, time per token) of the row, ours: medians over requests that come as
    others end, in a memory that holds all."""
    count = ROUNDS * row.concurrency
    # Spread evenly and without a pattern, so that they do not all end at once.
    low = 0.8 if row.uneven else 1.0
    spread = [
        [low + (1.0 - low) * (i * step % 1.0) for i in range(count)]
        for step in (0.618034, 0.754878)
    ]
    requests = [
        (0.0, max(1, int(row.prompt_len * a)), max(2, int(row.output_len * b)))
        for a, b in zip(*spread)
    ]
    limits = Limits(max(PROMPT_BUDGET, row.concurrency), row.concurrency, chunked=True)
    times = serve_requests(requests, work, card or row.card, limits)
    tokens = np.array([output - 1 for _, _, output in requests])
    return (
        float(np.median(times.firsts - times.starts)),
        float(np.median((times.lasts - times.firsts) / tokens)),
    )


# ---- reading ------------------------------------------------------------------------------------


def _card(name: str) -> Card:
    key = name.lower().replace("-", "").replace(" ", "")
    if key not in CARDS:
        raise ValueError(f"card {name!r} is not one of {', '.join(CARDS)}")
    return CARDS[key]


def _lines(path: Path) -> list[str]:
    try:
        opened: Callable = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, EOFError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        told = getattr(error, "strerror", None) or error
        raise MeasuredError(f"{path}: cannot be read: {told}") from None


def _parse(path: Path, text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise MeasuredError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise MeasuredError(f"{path}: not a JSON object")
    return found


def _json(path: Path) -> dict:
    return _parse(path, "\n".join(_lines(path)))


def with_constants(card: Card, **changed: float) -> Card:
    """A card with other fitted constants, of Shares or the latency of its link."""
    link = card.link
    if "latency_s" in changed:
        link = replace(link, latency_s=changed.pop("latency_s"))
    return replace(card, link=link, shares=replace(card.shares, **changed))
