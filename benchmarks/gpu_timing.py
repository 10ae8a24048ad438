"""Timing on one CUDA device, for the benchmarks here: a cold cache, medians, and the limits.

    from gpu_timing import cold_median_us, copy_bandwidth, pinned_bandwidth

    floor_us = num_bytes / copy_bandwidth() * 1e6
    us = cold_median_us(lambda: kernel(q, k, v), repeats=50)
    us = cold_median_us([lambda x=x: kernel(x) for x in batches], graph=True)  # data in turn
    us = heated_medians_us({"a": replay_of(run_a), "b": replay_of(run_b)})  # in turn

Events on the device around each run, so that no host clock takes part. Before each run a buffer of
several times the L2 cache is written, which drops what the last run left there, and another is
read, which has the written lines out of the cache too: else their way to memory would be charged to
the run. While the device does this the host issues the run, so a launch costs the device no
waiting. In a CUDA graph the gaps between the launches of one run go as well. What is compared runs
in turn, each after a while of nothing but itself: a card that has just been idle takes up to 3.5
times as long for a moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

GRAPH_BELOW_US = 200.0  # a run this short is timed as a CUDA graph, unless told otherwise
FLUSH_BYTES = 256 << 20  # at least; four times the L2 cache if that is more
COPY_BYTES, PINNED_BYTES = 2 << 30, 512 << 20
WARM_UP = 3
HEAT_S = 0.05

Run = Callable[[], object]


class PinnedBandwidth(NamedTuple):
    """Bytes per second between pinned host memory and the device, each way alone."""

    to_device: float
    to_host: float


class CacheFlush:
    """Call it to leave nothing in the L2 cache that a run could use or would have to write."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        words = max(FLUSH_BYTES, 4 * cache) // 4
        self._written = torch.empty(words, dtype=torch.int32, device="cuda")
        self._read = torch.zeros(words, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), dtype=torch.float32, device="cuda")

    def __call__(self) -> None:
        self._written.zero_()
        torch.sum(self._read, dim=0, out=self._sum)


def cold_median_us(
    run: Run | Sequence[Run], repeats: int = 50, *, graph: bool | None = None
) -> float:
    """Median microseconds of `run` on the device, the L2 cache cold; see `cold_times_us`."""
    return median(cold_times_us(run, repeats, graph=graph))


def cold_times_us(
    run: Run | Sequence[Run], repeats: int = 50, *, graph: bool | None = None
) -> list[float]:
    """Microseconds of each of `repeats` runs on the device, the L2 cache cold before each.

    run: a function that issues work on the current stream, or several that take turns (the same
    work on other data). graph: whether to replay it from a CUDA graph; it must then not wait for
    the device nor send anything from the host. None: if it takes less than GRAPH_BELOW_US.
    """
    runs = [run] if callable(run) else list(run)
    flush = CacheFlush()
    for i in range(max(WARM_UP, len(runs))):
        runs[i % len(runs)]()
    torch.cuda.synchronize()
    if graph is None:
        graph = median(_times_us(runs, WARM_UP, flush)) < GRAPH_BELOW_US
    if graph:
        graphs = [captured(one) for one in runs]
        runs = [one.replay for one in graphs]
        for one in runs:  # the first replay of a graph uploads it
            one()
    return _times_us(runs, repeats, flush)


def heated_medians_us(
    runs: Mapping[str, Run], repeats: int = 30, *, rounds: int = 3, heat_s: float = HEAT_S
) -> dict[str, float]:
    """Microseconds of each of these, in turn, `rounds` times: the median of the rounds' medians.

    Each is first repeated for `heat_s` seconds, then timed as in `cold_times_us`, as it is.
    """
    flush = CacheFlush()
    medians: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            end = time.perf_counter() + heat_s
            while time.perf_counter() < end:
                run()
                torch.cuda.synchronize()
            medians[key].append(median(_times_us([run], repeats, flush)))
    return {key: median(found) for key, found in medians.items()}


def replay_of(run: Run) -> Run:
    """`run` as the replay of a CUDA graph; it keeps what `run` holds, which the graph points to."""
    graph = captured(run)
    return lambda held=run: graph.replay()


def captured(run: Run) -> torch.cuda.CUDAGraph:
    """What `run` issues, as a CUDA graph; `run` must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _times_us(runs: Sequence[Run], repeats: int, flush: Run) -> list[float]:
    """Microseconds of each run between two events, the runs in turn."""
    pairs = [
        [torch.cuda.Event(enable_timing=True) for _ in ("start", "end")] for _ in range(repeats)
    ]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(pairs):
        flush()
        start.record()
        runs[i % len(runs)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def wall_times_us(run: Run, repeats: int = 10) -> list[float]:
    """Microseconds of each run on the host's clock, from a device at rest until it rests again.

    What a caller waits who needs the result: the host's own work and every launch count.
    """
    times = []
    for _ in range(WARM_UP + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return times[WARM_UP:]


def copy_bandwidth(num_bytes: int = COPY_BYTES, repeats: int = 20) -> float:
    """Bytes per second, read and written, of one large copy inside device memory."""
    source = torch.randint(1 << 30, (num_bytes // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    us = cold_median_us(lambda: target.copy_(source), repeats, graph=False)
    return 2 * source.nbytes / us * 1e6


def pinned_bandwidth(num_bytes: int = PINNED_BYTES, repeats: int = 10) -> PinnedBandwidth:
    """Bytes per second of one large copy from and to pinned host memory: a limit, so the best."""
    host = torch.ones(num_bytes // 4, dtype=torch.int32).pin_memory()
    on_device = torch.empty_like(host, device="cuda")
    ways = (
        lambda: on_device.copy_(host, non_blocking=True),
        lambda: host.copy_(on_device, non_blocking=True),
    )
    return PinnedBandwidth(
        *(host.nbytes / min(cold_times_us(way, repeats, graph=False)) * 1e6 for way in ways)
    )
