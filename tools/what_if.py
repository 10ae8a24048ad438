"""What would have to be otherwise for some rows that are missed to be held.

    LENGTHS_DIR=data python tools/what_if.py            # two minutes

Serves section 6.5 and Fig. 18b: the figures of docs/differences.md, D9 to D11. How Fig. 17's rates
move with the share of prompts that are cut to 1,024 tokens, and with outputs 0.6 as long; how many
times longer K and V would take to be read for blocks below 16 slots to be as slow as the paper
draws; at which rate ours has the drawn latency (2.01 requests/s are ShareGPT's, 30.1 Alpaca's).
"""

import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_sim import paper
from vllm_sim.evaluation.experiments import Run, execute, latency_of
from vllm_sim.evaluation.figures_blocks import Fig18b
from vllm_sim.evaluation.figures_rates import Fig17
from vllm_sim.evaluation.runner import reproduce
from vllm_sim.reporting.arguments import OneLineParser
from vllm_sim.reporting.command_line import UsageError, exit_code
from vllm_sim.reporting.tables import Table, render
from vllm_sim.workload.data_sets import Lengths, find_lengths
from vllm_sim.workload.text_files import WorkloadError

FULL, SMALL = 1024, 16
# Fig. 17's share of full prompts (0: as the data are), and outputs times this.
CHATS = ((0.0, 1.0), (0.7, 1.0), (0.8, 1.0), (0.9, 1.0), (1.0, 1.0), (0.0, 0.6), (1.0, 0.6))


def chat(lengths: Lengths, share: float, scale: float = 1.0) -> Lengths:
    """The same rounds, some drawn to have a full prompt until this share has, outputs scaled."""
    pairs, rng = lengths.pairs("chat"), random.Random(0)
    full = sum(prompt >= FULL for prompt, _ in pairs) / len(pairs)
    filled = (share - full) / (1.0 - full)
    prompts = [FULL if rng.random() < filled else prompt for prompt, _ in pairs]
    outputs = [max(1, round(scale * output)) for _, output in pairs]
    return Lengths({"chat": ""}, {"chat": list(zip(prompts, outputs))})


def crossing(f: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where f, which rises, has the wanted value: the interval is halved eight times."""
    for _ in range(8):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if f(middle) < wanted else (low, middle)
    return (low * high) ** 0.5


def main() -> int:
    OneLineParser(description="what would have to be otherwise for rows to be held").parse_args()
    try:
        lengths = find_lengths([], os.environ.get("LENGTHS_DIR"))
    except WorkloadError as error:
        raise UsageError(str(error)) from None
    if not {"chat", "ShareGPT", "Alpaca"} <= set(lengths.files):
        raise UsageError("LENGTHS_DIR must name a folder of the full length files")
    rows = []
    for share, scale in CHATS:
        found = reproduce([Fig17()], chat(lengths, share, scale), 1, os.cpu_count() or 1)[0].rows
        rows.append((share or "data", scale, *(row.ours for row in found[:-1])))
    headers = "full prompts", "outputs", *paper.FIG17_RATES, *(f"/ {s}" for s in paper.ORCAS)
    chats = Table("Fig. 17: requests/s at 0.5 s/token", headers, rows, decimals=3)
    rows = []
    for (dataset, block), run in Fig18b().runs().items():

        def seconds(rate: float, times: float = 1.0, run: Run = run) -> float:
            at, speed = replace(run, rate=rate), latency_of(run)
            longer = replace(speed, context_s=times * speed.context_s)
            return execute(at, lengths, latency=longer).normalized_latency

        drawn, times = paper.FIG18B[dataset][block], None
        if block < SMALL:
            times = crossing(partial(seconds, run.rate), drawn, 0.5, 16.0)
        rate = crossing(seconds, drawn, 0.5 * run.rate, 2.0 * run.rate)
        rows.append((dataset, block, drawn, seconds(run.rate), times, rate))
    headers = "data", "block", "paper s/token", "ours", "K/V x", "requests/s"
    print(render(chats, "plain"), render(Table("Fig. 18b", headers, rows, decimals=3), "plain"))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code("what_if.py", main))
