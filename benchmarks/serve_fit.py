"""What a server's iterations take on this device: over their floor, paged and not; constants.

Serves sections 4.1 and 6.1: the decode step of benchmarks/serve.py beside the bytes that it must
read, kernel by kernel, the same step over consecutive blocks (what paging costs), and the constants
of the simulator, fitted to runs that no memory holds up.

    rows = decode_steps(worker, num_blocks, bandwidth, [7, 15, 30, 60])
    latency = fit(calibrate(worker, num_blocks), worker, bandwidth)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from kv_cache_manager import PagedKVCacheManager
from vllm_sim.engine.server import Server, Took
from vllm_sim.engine.worker import Moment, Order, Worker
from vllm_sim.paper import MAX_BATCHED_TOKENS
from vllm_sim.serving.latency import ApartLatency
from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.simulator import make_groups
from vllm_sim.workload.requests import Request

ROUNDS, STEPS, WARM_UP = 3, 20, 5
SEQUENCES, PROMPTS, NEW = (1, 4, 8, 16, 32, 64, 128), (32, 128, 512, 1024), 24
ON_CPU = 3  # of SEQUENCES, and steps: a CPU takes long, and nothing is held against it
# Whose kernel it is, by its name; the others are small ones and copies.
KERNELS = {"attention": "^_attend", "sums": "nccl", "products": "gemm|gemv|nvjet|cutlass|splitK"}
PARTS = (*KERNELS, "others")
LONG = 512  # prompt tokens of an iteration from which on the tokens' own time shows
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of this worker's weights that a step reads, and of K and V of a token."""

    weights: int
    slot: int

    @classmethod
    def of(cls, worker: Worker) -> Sizes:
        """Of a token's embeddings a step reads next to nothing, unless they are the output's."""
        model = worker.model
        head = model.get_output_embeddings().weight
        read = {
            id(weight): weight.nbytes
            for name, weight in model.named_parameters()
            if "embed" not in name or weight is head
        }
        return cls(sum(read.values()), worker.cache.pool.bytes_per_token)


def decode_steps(
    worker: Worker, num_blocks: int, bandwidth: float, batches: Sequence[int]
) -> list[Row]:
    """Of each batch over all of the pool: device seconds of a step over its floor, and over
    consecutive blocks of the same sequences."""
    rows = []
    for batch in batches:
        blocks = num_blocks // batch
        length = min(blocks, worker.max_blocks) * worker.block_size - 1
        blocks = -(-length // worker.block_size)
        places = np.random.default_rng(batch).permutation(num_blocks)[: batch * blocks]
        ways = {"scattered": places, "in a row": np.arange(batch * blocks)}
        orders = {
            way: Order(
                rows=list(range(batch)),
                lens=[length] * batch,
                tables=numbers.reshape(batch, blocks).tolist(),
            )
            for way, numbers in ways.items()
        }
        took: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, order in orders.items():
                skip, count = (WARM_UP, STEPS) if worker.on_gpu else (0, ON_CPU)
                flights = [worker.run(order) for _ in range(skip + count)]
                flights[-1].end.wait()
                found = [one.start.until(one.end) for one in flights[skip:]]
                took[way].append(median(found))
        scattered, in_a_row = (median(took[way]) for way in ways)
        sizes = Sizes.of(worker)
        floors = {"products": sizes.weights, "attention": batch * length * sizes.slot}
        floors = {part: 1e3 * size / bandwidth for part, size in floors.items()}
        floor = sum(floors.values())
        row = {
            "batch": batch,
            "context": length,
            "step_ms": 1e3 * scattered,
            "floor_ms": floor,
            "over_floor": 1e3 * scattered / floor,
            "paging_percent": 100 * (scattered / in_a_row - 1),
        }
        if worker.on_gpu:
            row |= kernels_of(worker, orders["scattered"])
            row |= {f"{part}_over_floor": row[f"{part}_ms"] / floors[part] for part in floors}
        rows.append(row)
    return rows


def kernels_of(worker: Worker, order: Order) -> Row:
    """Milliseconds of this step in the kernels of each part, as the trace of this process's device
    has them, and how many the others are."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        for _ in range(STEPS):
            flight = worker.run(order)
        flight.end.wait()
        torch.cuda.synchronize()
    times = ((one.key, one.count, one.self_device_time_total) for one in trace.key_averages())
    return by_part(((name, count / STEPS, us / STEPS) for name, count, us in times if us))


def by_part(kernels: Iterable[tuple[str, float, float]]) -> Row:
    """Of kernels by name, with their number and microseconds: the milliseconds of each part."""
    row = {f"{part}_ms": 0.0 for part in PARTS} | {"other_launches": 0.0}
    for name, count, us in kernels:
        part = next((part for part, told in KERNELS.items() if re.search(told, name)), PARTS[-1])
        row[f"{part}_ms"] += us / 1e3
        row["other_launches"] += count if part == PARTS[-1] else 0.0
    row["other_launches"] = round(row["other_launches"])
    return row


def calibrate(worker: Worker, num_blocks: int) -> list[Took]:
    """Iterations of batches of equal requests, each of which fits into the pool from the start."""
    took: list[Took] = []
    counts = SEQUENCES if worker.on_gpu else SEQUENCES[:ON_CPU]
    for count, prompt in itertools.product(counts, PROMPTS):
        need = count * -(-(prompt + NEW) // worker.block_size)
        if need > 0.9 * num_blocks:
            continue
        manager = PagedKVCacheManager(num_blocks, worker.block_size)
        server = Server(worker, manager, Limits(MAX_BATCHED_TOKENS, worker.most_rows))
        batch = [Request(one, 0.0, prompt, NEW) for one in range(count)]
        took += server.serve(make_groups(batch)).took
    return took


def fit(took: Sequence[Took], worker: Worker, bandwidth: float) -> ApartLatency:
    """The constants that these iterations show, by least squares of relative errors.

    Of decodes by the host's clock; of prompts by the device's, as the host is ahead of it.
    """
    sizes = Sizes.of(worker)
    weights_s = sizes.weights / bandwidth
    alone = [one for one in took if one.num_decodes and not one.prompt_tokens]
    shapes = np.array([(1, one.num_decodes, one.context_tokens) for one in alone], dtype=float)
    walls = np.array([one.wall_s for one in alone])
    base, seq_s, context_s = solved(shapes, walls)
    prompts = [(one.prompt_tokens, one.prompt_s) for one in took if one.prompt_tokens]
    long = [(tokens, rest) for tokens, rest in prompts if tokens >= LONG]
    lengths = np.array([(1, tokens) for tokens, _ in long], dtype=float)
    _, token_s = solved(lengths, np.array([rest for _, rest in long]))
    swap_out_s, swap_in_s = swap_seconds(worker)
    beside = [rest - max(weights_s, token_s * tokens) for tokens, rest in prompts]
    return ApartLatency(
        step_s=max(0.0, base - weights_s),
        token_s=token_s,
        context_s=context_s,
        seq_s=seq_s,
        copy_s=2 * sizes.slot / bandwidth,
        swap_out_s=swap_out_s,
        swap_in_s=swap_in_s,
        block_size=worker.block_size,
        weights_s=weights_s,
        prompt_s=max(0.0, median(beside)),
    )


def swap_seconds(worker: Worker, blocks: int = 32) -> tuple[float, float]:
    """Seconds to move a block out to the host, and in, in the mean over so many."""
    pool, found = worker.cache.pool, []
    pairs = [(block, block) for block in range(min(blocks, pool.num_cpu_blocks, pool.num_blocks))]
    if not pairs:
        return 0.0, 0.0
    for move in (pool.swap_out, pool.swap_in):
        times = []
        for _ in range(WARM_UP):
            start = Moment(worker.device)
            move(pairs)
            end = Moment(worker.device)
            end.wait()
            times.append(start.until(end))
        found.append(median(times) / len(pairs))
    return tuple(found)


def solved(shapes: np.ndarray, seconds: np.ndarray) -> list[float]:
    """x >= 0 for which shapes (n, k) @ x is near seconds (n,), in relative terms; without the few
    that a pause of the host made long."""
    kept = np.ones(len(seconds), dtype=bool)
    for _ in range(3):
        scaled = shapes[kept] / seconds[kept, None]
        found = np.linalg.lstsq(scaled, np.ones(kept.sum()), rcond=None)[0].clip(min=0.0)
        over = seconds / np.maximum(shapes @ found, 1e-12)
        kept = over < 1.5 * np.median(over)
    return found.tolist()
