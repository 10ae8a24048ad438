"""What is read off runs of serve.py: rates at a latency, a picture, and how much of it is chance.

Serves section 6.2. Short traces of few requests differ from seed to seed by more than measured and
simulated runs of one seed do. With the constants that a run has fitted this simulates its full
queue, and finds the rate at a latency, for each seed.

    found = rates_at(rows, alone, at_latencies(alone))     # of the part poisson, and a lone request
    code = earlier(script)                                 # serve.py --earlier FILE --seeds 8

A trace's latency does not only grow with the rate, as each rate has requests of its own: rates are
tried 5 % apart, and lines read where they first pass. So `spread` reads another rate than two runs
near the latency do, also for the seed that was measured.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pictures
from script import Row, Script, show, table

from vllm_sim import paper
from vllm_sim.evaluation.curves import crossing
from vllm_sim.reporting import drawing
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.files import read_bounded
from vllm_sim.serving.latency import ApartLatency
from vllm_sim.serving.scheduler import Limits, Manager
from vllm_sim.serving.simulator import ServingResult, simulate
from vllm_sim.serving.systems import CONTIGUOUS, PAGED, POLICIES, limits_of, new_manager
from vllm_sim.workload.data_sets import Lengths, find_lengths
from vllm_sim.workload.requests import Request

WARM_UP_SHARE = 0.2  # of a full queue's run, before its window
FINE = [0.7 + 0.05 * step for step in range(15)]  # times the measured rate
# Times a lone request's seconds per token: 0.5 s over vLLM's leftmost point in Fig. 12a.
LONE = 13.5
MOST_BYTES = 64 << 20  # of an earlier run's file
NEEDED = ("rate", "s_per_token", "simulated_s_per_token")  # of a row that is drawn
RATES = [
    *(("system", "system"), ("trace s", "trace_s"), ("s/token", "at_s_per_token")),
    *(("req/s", "rate"), ("simulated", "simulated_rate")),
]
SPREAD = [
    *(("", "what"), ("seed", "seed"), ("paged", "paged")),
    *((f"over {policy}", f"over_{policy}") for policy in reversed(CONTIGUOUS)),
]


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


# -- runs that were kept ------------------------------------------------------------------------


def rates_at(rows: Sequence[Row], alone: Row, latencies: Sequence[float]) -> list[Row]:
    """The rate at which a system's line reaches a latency, measured and simulated.

    A line goes through the runs of one length; it begins with a request alone. Runs at more than
    twice the latency are not on it: straight lines from far away say little.
    """
    found = []
    lines = dict.fromkeys((row["system"], row["trace_s"]) for row in rows)
    for (system, seconds), latency in itertools.product(lines, latencies):
        row: Row = {"system": system, "trace_s": seconds, "at_s_per_token": latency}
        for name, key in (("rate", "s_per_token"), ("simulated_rate", "simulated_s_per_token")):
            line = [r for r in rows if (r["system"], r["trace_s"]) == (system, seconds)]
            near = (one for one in line if one[key] <= 2 * latency)
            points = sorted((one["rate"], one[key]) for one in near)
            row[name] = crossing([(0.0, alone[key]), *points], latency)
        if row["rate"] is not None:
            found.append(row)
    return found


def earlier(script: Script) -> int:
    """Of runs that were kept: the rates at a latency, a picture, and what other seeds would give.
    Of their lone requests the slowest counts. Raises UsageError for other files."""
    args, lengths = script.args, find_lengths(script.args.lengths, None)
    kept = [read_earlier(Path(path), lengths) for path in args.earlier]
    rows = [row for run in kept for row in run.get("poisson", ())]
    alone = max(
        (run["alone"] for run in kept if "alone" in run),
        key=lambda row: row["s_per_token"],
        default=None,
    )
    where, *others = dict.fromkeys(run["where"] for run in kept)
    if others:
        raise UsageError(f"not runs of one model, memory and device: {where}; {others[0]}")
    found: dict[str, object] = {}
    if args.figures is not None:
        drawing.check_folder(args.figures, [pictures.SERVED])
    if alone is not None:
        found["rates_at"] = rates_at(rows, alone, at_latencies(alone))
        show_rates(found["rates_at"], where)
    elif args.figures is not None or not args.seeds:
        raise UsageError("none of these runs has the part poisson")
    if args.figures is not None:
        draw(rows, alone, where, args.figures)
    if args.seeds:
        latency = LONE * alone["s_per_token"] if alone else paper.RATE_AT_LATENCY
        machines = [run["machine"] for run in kept]
        for machine in machines:
            if machine.source != lengths.source(machine.dataset):
                raise UsageError(f"--seeds: a run's lengths are of {machine.source}: --lengths")
        found["spread"] = spread(machines, latency, args.seeds)
        if not found["spread"]:
            raise UsageError("none of these runs has the part saturated or poisson")
        title = "Requests/s of paged, and over the others', by seed, simulated"
        show(table(title, SPREAD, found["spread"], where, 3))
    return script.write(found, {"rates_at": 3, "spread": 2})


def read_earlier(path: Path, lengths: Lengths) -> dict:
    """What a run was made with, its poisson if it has one, and where it was. Raises UsageError."""
    try:
        kept = json.loads(read_bounded(path, MOST_BYTES) or b"")
        found = kept.get("output", kept)
        tables = {one["id"]: one["rows"] for one in found["tables"]}
        where = f"{found['options']['model']}, {found['setting']['blocks']} blocks"
        where += f", {kept['device']}" if "device" in kept else ""
        read: dict = {"machine": Machine(found, lengths), "where": where}
        rows = [*tables.get("poisson", ())]
        sound = all(row["system"] in POLICIES for row in [*rows, *tables.get("saturated", ())])
        sound = sound and all(row["trace_s"] > 0 for row in rows)
        if "poisson" in tables:
            alone = found["setting"]["alone"]
            read |= {"poisson": rows, "alone": alone}
            sound = sound and all(alone[key] > 0 for key in NEEDED[1:])
        sound = sound and all(row[key] >= 0 for row in rows for key in NEEDED)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        sound = False
    if not sound:
        raise UsageError(f"{path} has no figures of this script")
    return read


def draw(rows: Sequence[Row], alone: Row, where: str, directory: Path) -> None:
    """UsageError unless paged's line in the picture reaches what the rates are relative to."""
    longest = max((row["trace_s"] for row in rows), default=0)
    line = [row for row in rows if row["system"] == PAGED and row["trace_s"] == longest]
    if not all(any(row[key] >= LONE * alone[key] for row in line) for key in NEEDED[1:]):
        told = f"the rates are relative to paged's at {LONE} times a request alone"
        raise UsageError(f"no picture: {told}, which its traces of {longest} s do not reach")
    for path in pictures.draw_serving(rows, alone, LONE, where, directory):
        print(f"wrote {path}", file=sys.stderr)


def at_latencies(alone: Row) -> tuple[float, float]:
    return paper.RATE_AT_LATENCY, LONE * alone["s_per_token"]


def show_rates(rows: Sequence[Row], where: str) -> None:
    if rows:
        show(table("Requests/s at a latency", RATES, rows, where, 3))
    else:
        print("No system reaches one of the latencies at these rates.")
