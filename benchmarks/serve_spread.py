"""How much of what serve.py measures is chance: the same runs with other seeds, simulated.

Serves section 6.2. Short traces of few requests differ from seed to seed by more than measured and
simulated runs of one seed do. With the constants that a run of serve.py has fitted this simulates
its full queue, and finds the rate at a latency, for each seed.

    rows = spread(machines, latency_s, seeds=8)     # machines: of the JSON of runs of serve.py

A trace's latency does not only grow with the rate, as each rate has requests of its own: rates are
tried 5 % apart, and lines read where they first pass. So this reads another rate than two runs
near the latency do, also for the seed that was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pictures import crossing

from vllm_sim import paper
from vllm_sim.serving.latency import ApartLatency
from vllm_sim.serving.scheduler import Limits, Manager
from vllm_sim.serving.simulator import ServingResult, simulate
from vllm_sim.serving.systems import CONTIGUOUS, PAGED, limits_of, new_manager
from vllm_sim.workload.data_sets import Lengths
from vllm_sim.workload.requests import Request

WARM_UP_SHARE = 0.2  # of a full queue's run, before its window
FINE = [0.7 + 0.05 * step for step in range(15)]  # times the measured rate
Row = dict[str, object]


def requests_of(
    lengths: Lengths, dataset: str, rate: float, seconds: float, seed: int, samples: int = 1
) -> list[Request]:
    """Poisson arrivals of a data set's lengths."""
    columns = zip(*lengths.columns(dataset, rate, seconds, seed))
    return [
        Request(nth, arrival, prompt, output, num_samples=samples)
        for nth, (arrival, prompt, output) in enumerate(columns)
    ]


def queue_of(lengths: Lengths, dataset: str, count: int, seed: int) -> list[Request]:
    """About so many requests, all there from the start."""
    found = requests_of(lengths, dataset, count / 10.0, 10.0, seed)
    return [replace(request, arrival_s=0.0) for request in found]


def window_of(seconds: float) -> tuple[float, float]:
    """What of a full queue's run counts."""
    return WARM_UP_SHARE * seconds, float(seconds)


def in_window(result: ServingResult, window_s: tuple[float, float]) -> int:
    """Requests that end in it."""
    return sum(window_s[0] <= at < window_s[1] for at in result.finish_s.values())


def pool_of(policy: str, num_blocks: int, num_cpu_blocks: int) -> Manager:
    """An empty pool of that system."""
    cpu_blocks = num_cpu_blocks if policy == PAGED else 0
    return new_manager(policy, num_blocks, paper.BLOCK_SIZE, num_cpu_blocks=cpu_blocks)


def limits_for(policy: str) -> Limits:
    """The artifact's, of the system with this policy."""
    return limits_of(CONTIGUOUS.get(policy, paper.VLLM))


class Machine:
    """What one run was made with: its constants and memory, and where its lengths were from."""

    def __init__(self, found: Mapping[str, object], lengths: Lengths) -> None:
        setting, options = found["setting"], found["options"]
        self.latency = ApartLatency(**setting["constants"])
        self.sizes = int(setting["blocks"]), int(options["cpu_blocks"])
        self.dataset, self.source = options["dataset"], setting["lengths"]
        self.seconds, self.queue = int(options["seconds"]), int(options["queue"])
        self.lengths = lengths
        self.tables = {table["id"]: table["rows"] for table in found["tables"]}

    def run(self, policy: str, requests: Sequence[Request], **window) -> ServingResult:
        manager, limits = pool_of(policy, *self.sizes), limits_for(policy)
        return simulate(requests, manager, limits, self.latency, **window)

    def full_queue(self, policy: str, seed: int) -> float:
        """Requests a second."""
        window = window_of(self.seconds)
        requests = queue_of(self.lengths, self.dataset, self.queue, seed)
        result = self.run(policy, requests, window_s=window, until_s=self.seconds)
        return in_window(result, window) / (window[1] - window[0])

    def rate_at(self, policy: str, near: float, trace_s: int, latency_s: float, seed: int):
        """Requests a second at that latency; None if it is nowhere near."""
        points = []
        for rate in (near * share for share in FINE):
            requests = requests_of(self.lengths, self.dataset, rate, trace_s, seed)
            points.append((rate, self.run(policy, requests).normalized_latency))
            if points[-1][1] >= latency_s:
                break
        return crossing(points, latency_s)


def spread(machines: Sequence[Machine], latency_s: float, seeds: int) -> list[Row]:
    """By seed: requests a second of paged over the others', with a full queue and at a latency."""
    rows: list[Row] = []
    for seed in range(seeds):
        for what, rates in _rates(machines, latency_s, seed):
            row: Row = {"what": what, "seed": seed, "paged": rates.get(PAGED)}
            for policy in reversed(CONTIGUOUS):
                sound = rates.get(PAGED) and rates.get(policy)
                row[f"over_{policy}"] = rates[PAGED] / rates[policy] if sound else None
            rows.append(row)
    return rows


def _rates(machines, latency_s, seed) -> Iterator[tuple[str, dict[str, float | None]]]:
    full: dict[str, float | None] = {}
    at: dict[str, float | None] = {}
    for machine in machines:
        for row in machine.tables.get("saturated", ()):
            full[row["system"]] = machine.full_queue(row["system"], seed)
        rows = machine.tables.get("poisson", ())
        longest = max((row["trace_s"] for row in rows), default=0)
        near: dict[str, float] = {}
        for row in rows:
            if row["trace_s"] == longest:
                near[row["system"]] = max(row["rate"], near.get(row["system"], 0.0))
        for policy, rate in near.items():
            at[policy] = machine.rate_at(policy, rate, longest, latency_s, seed)
    if full:
        yield "full queue", full
    if at:
        yield f"at {latency_s:.3f} s/token", at
