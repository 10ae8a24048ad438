"""What paging costs in kernels and transfers: the measurements behind bench_paging_cost.py.

Serves Fig. 18a, the kernel's side of Fig. 18b, Fig. 19a and the two fused kernels of section 5.
Each function returns rows of figures; every contender's result is checked before it is timed.

Shapes: B sequences, L layers, H query heads, H_kv K/V heads, D head size, N blocks, S slots per
block, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import mean, median

import gpu_timing
import torch
import torch.nn.functional as F
from opt_prefill import RandomOPT
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from paged_attention import PagedKVCache, paged_attention_kernel, slot_mapping
from vllm_sim.models import MODELS, Model, opt
from vllm_sim.paper import BLOCK_SIZE
from vllm_sim.paper.figures import BLOCK_SIZES, FIG18A

Row = dict[str, float | int | str | None]
Kernel = Callable[..., tuple[Tensor, Tensor]]
Prepare = Callable[..., Kernel]  # of q, both pools and the lengths as numbers
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
LARGEST_ERROR = 5e-3  # of an output in fp16, in the norm
TURNS = 4  # different block maps that take turns


class WrongResult(RuntimeError):
    """A contender does not compute what it should; it is not timed."""


@dataclass(frozen=True)
class Setting:
    """What is measured. The defaults are OPT-13B's, as the figures are."""

    model: Model = MODELS["opt-13b"]
    dtype: torch.dtype = torch.float16
    device: str = "cuda"
    repeats: int = 50
    attention: tuple[tuple[int, int], ...] = tuple(
        sorted({*FIG18A, *((b, 1 << i) for b in (8, 32) for i in range(9, 14))})
    )  # (batch, context)
    batch: int = 32  # for Fig. 18b
    context: int = 1024
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    swap_tokens: int = 256  # as in the artifact
    device_slots: int = 12 * 1024  # as in the artifact
    host_slots: int = 2 * 1024
    swap_runs: int = 10  # as in the artifact
    moved_blocks: tuple[int, ...] = (1, 10, 100, 1000)
    pool_blocks: int = 2048

    def quick(self) -> Setting:
        """A few small sizes, and a model of four layers: whether all of it runs."""
        whole = self.model
        model = opt(whole.name, 4, whole.hidden_size, whole.num_heads)
        few = {"repeats": 10, "attention": ((8, 64), (32, 1024)), "block_sizes": (1, 16, 256)}
        return replace(self, model=model, **few, moved_blocks=(1, 100), pool_blocks=256)


def best_us(
    setting: Setting, runs: gpu_timing.Run | list[gpu_timing.Run], graph: bool | None = None
) -> float:
    return gpu_timing.cold_median_us(runs, setting.repeats, graph=graph)


def filled_cache(setting: Setting, *sizes: int, **options: object) -> PagedKVCache:
    """A cache of the model's shape, of so many blocks of a size, full of random numbers."""
    m = setting.model
    options |= {"num_layers": m.num_layers, "dtype": setting.dtype, "device": setting.device}
    cache = PagedKVCache(*sizes, m.num_kv_heads, m.head_size, **options)
    cache.pool.normal_()
    return cache


# --- attention: Fig. 18a and 18b ------------------------------------------------------------


def measure_attention(
    setting: Setting,
    prepare: Prepare,
    copy_speed: float,
    batch: int,
    context: int,
    block_size: int = BLOCK_SIZE,
    peers: bool = True,
) -> Row:
    """One decode step of one layer: microseconds of each contender, equal lengths.

    paged: random blocks of a pool twice as large. contiguous: the same kernel over the same pool,
    block i of the batch at place i. peers: also SDPA over that memory as (B, H, T, D) views.
    """
    m, width = setting.model, context // block_size
    assert width * block_size == context
    rng = torch.Generator(setting.device).manual_seed(context)
    shape = (2, 2 * batch * width, block_size, m.num_kv_heads, m.head_size)
    pool = torch.empty(shape, dtype=setting.dtype, device=setting.device).normal_(generator=rng)
    q = torch.empty((2, batch, m.num_heads, m.head_size), dtype=pool.dtype, device=pool.device)
    q.normal_(generator=rng)
    lens = torch.full((batch,), context, dtype=torch.int32, device=pool.device)
    # Two halves of the pool take turns: (2, B, width) block numbers.
    order = torch.arange(shape[1], dtype=torch.int32, device=pool.device)
    shuffled = order[torch.randperm(shape[1], generator=rng, device=pool.device)]
    tables = {"paged": shuffled.view(2, batch, width), "contiguous": order.view(2, batch, width)}
    num_bytes = pool.nbytes // 2
    row: Row = {"batch": batch, "context": context, "block_size": block_size}
    row |= {"floor_us": num_bytes / copy_speed * 1e6}
    kernel = prepare(q[0], *pool, [context] * batch)
    for name, table in tables.items():
        runs = [lambda i=i, table=table: kernel(q[i], *pool, table[i], lens)[0] for i in (0, 1)]
        wanted = paged_attention_kernel(q[0], *pool, table[0], lens)[0]
        check_close(name, runs[0](), wanted)
        row[f"{name}_us"] = best_us(setting, runs, graph=True)  # both alike
    halves = pool.view(2, 2, batch, context, *shape[3:]).transpose(3, 4)  # (2, 2, B, H_kv, T, D)
    for name, backend in BACKENDS.items() if peers else ():
        runs = [
            lambda i=i, backend=backend: sdpa(backend, q[i], halves[0, i], halves[1, i])
            for i in (0, 1)
        ]
        try:
            result = runs[0]()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch has no such kernel for this device
            row[f"{name}_us"] = None
            continue
        check_close(name, result, wanted)  # the contiguous kernel's
        row[f"{name}_us"] = best_us(setting, runs, graph=True)
    return row


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention by one backend: q (B, H, D), k and v (B, H, T, D); out (B, H, D)."""
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]


def check_close(name: str, result: Tensor, wanted: Tensor) -> None:
    """Raise WrongResult unless the error's norm is at most LARGEST_ERROR of the wanted one's."""
    error = ((result.float() - wanted.float()).norm() / wanted.float().norm()).item()
    if not error <= LARGEST_ERROR:  # NaN is not
        raise WrongResult(f"{name}: relative error {error}")


# --- swapping and recomputing: Fig. 19a -----------------------------------------------------


def measure_swap(setting: Setting, model: RandomOPT, block_size: int) -> Row:
    """Milliseconds to swap a sequence in or out, or to compute it again; mean and median.

    Random blocks of both pools, others each time, on the host's clock until all is done.
    """
    m, device = setting.model, torch.device(setting.device)
    num_cpu_blocks = setting.host_slots // block_size
    cache = filled_cache(
        setting, setting.device_slots // block_size, block_size, num_cpu_blocks=num_cpu_blocks
    )
    rng = random.Random(block_size)
    tokens = torch.randint(m.vocab_size, (setting.swap_tokens,), device=device)

    def tables(pool: int) -> Iterator[list[int]]:
        """Block tables of the sequence, from a pool of so many blocks."""
        blocks = -(-setting.swap_tokens // block_size)
        return cycle([rng.sample(range(pool), blocks) for _ in range(TURNS)])

    here, there = tables(cache.num_blocks), tables(cache.num_cpu_blocks)

    def recompute(table: list[int]) -> Tensor:
        slots = slot_mapping(table, 0, len(tokens), block_size, device=device)
        return model.prefill(tokens, cache, slots)

    check_swaps(cache, next(here), next(there), next(here))
    check_recompute(cache, recompute, next(here), next(here), len(tokens))
    ways = {
        "recompute": lambda: recompute(next(here)),
        "swap_in": lambda: cache.swap_in(zip(next(there), next(here))),
        "swap_out": lambda: cache.swap_out(zip(next(here), next(there))),
    }
    row: Row = {"block_size": block_size, "blocks": len(next(here))}
    row["num_bytes"] = len(next(here)) * cache.bytes_per_block
    for name, way in ways.items():
        times = [us / 1e3 for us in gpu_timing.wall_times_us(way, setting.swap_runs)]
        row |= {f"{name}_ms": mean(times), f"{name}_median_ms": median(times)}
    return row


def check_swaps(cache: PagedKVCache, old: list[int], host: list[int], new: list[int]) -> None:
    """Raise WrongResult unless a swap out and in brings the same bytes to the new blocks."""
    before = cache.pool[:, :, old].clone()
    cache.swap_out(zip(old, host))
    cache.pool[:, :, old] = torch.nan
    cache.swap_in(zip(host, new))
    if not torch.equal(cache.pool[:, :, new], before):
        raise WrongResult("swapped out and in, the blocks differ")
    cache.pool[:, :, old] = before


def check_recompute(
    cache: PagedKVCache,
    recompute: Callable[[list[int]], Tensor],
    one: list[int],
    other: list[int],
    num_tokens: int,
) -> None:
    """Raise WrongResult unless a prefill gives the same wherever its blocks lie."""
    found = []
    for table in (one, other):
        logits = recompute(table)
        slots = slot_mapping(table, 0, num_tokens, cache.block_size, device=cache.device)
        found.append([logits, *cache.read(cache.num_layers - 1, slots)])
    for name, a, b in zip(("logits", "keys", "values"), *found):
        check_close(f"{name} of a prefill", a, b)


# --- block write and block copy: section 5 --------------------------------------------------


def measure_moves(setting: Setting, copy_speed: float) -> list[Row]:
    """Block writes (one layer) and block copies (one layer, and all): ours beside plain torch.

    fused, plain: the device's work; limit: bytes read and written at the bandwidth of a large
    copy. call: the cache's method on the host's clock, the block numbers sent along.
    """
    cache = filled_cache(setting, setting.pool_blocks, BLOCK_SIZE, fused=True)
    rows = [_write_row(setting, cache, blocks) for blocks in setting.moved_blocks]
    for layers in (1, cache.num_layers):
        rows += [_copy_row(setting, cache, layers, blocks) for blocks in setting.moved_blocks]
    for row in rows:
        row["limit_us"] = 2 * row["num_bytes"] / copy_speed * 1e6
    return rows


def _write_row(setting: Setting, cache: PagedKVCache, blocks: int) -> Row:
    """T = blocks * S tokens to random slots of a layer."""
    tokens, total = blocks * cache.block_size, cache.num_blocks * cache.block_size
    shape = (tokens, cache.num_kv_heads, cache.head_size)
    slots = [torch.randperm(total, device=cache.device)[:tokens] for _ in range(TURNS)]
    k, v = (torch.randn(shape, dtype=cache.dtype, device=cache.device) for _ in "kv")
    parts = cache.pool[0].flatten(3).flatten(1, 2)  # (2, N * S, H_kv * D)

    def plain(where: Tensor) -> None:
        for part, values in zip(parts, (k, v)):
            part.index_copy_(0, where, values.flatten(1))

    def fused(where: Tensor) -> None:
        cache.write(0, where, k, v)

    row: Row = {"what": "write", "layers": 1, "blocks": blocks, "num_bytes": k.nbytes + v.nbytes}
    for name, way in (("fused", fused), ("plain", plain)):
        parts[:, slots[0]] = 0
        way(slots[0])
        if not torch.equal(parts[:, slots[0]], torch.stack((k, v)).flatten(2)):
            raise WrongResult(f"{name}: wrong write")
        runs = [lambda way=way, where=where: way(where) for where in slots]
        row[f"{name}_us"] = best_us(setting, runs)
    turns = cycle(slots)
    times = gpu_timing.wall_times_us(lambda: fused(next(turns)), setting.repeats)
    return {**row, "call_us": median(times)}


def _copy_row(setting: Setting, cache: PagedKVCache, layers: int, blocks: int) -> Row:
    """Random blocks to random others in the first layers of the pool."""
    import paged_attention_triton  # only here: it needs triton

    pool = cache.pool[:layers]
    rows = pool.flatten(3).flatten(0, 1)  # (L * 2, N, S * H_kv * D)
    maps = [torch.randperm(cache.num_blocks)[: 2 * blocks].view(blocks, 2) for _ in range(TURNS)]
    pairs = [one.to(cache.device) for one in maps]
    columns = [one.T.contiguous() for one in pairs]

    def plain(some: Tensor) -> None:
        rows.index_copy_(1, some[1], rows.index_select(1, some[0]))

    def fused(some: Tensor) -> None:
        paged_attention_triton.copy_blocks(pool, some)

    row: Row = {"what": "copy", "layers": layers, "blocks": blocks}
    row["num_bytes"] = 2 * layers * blocks * rows[0, 0].nbytes
    for name, way, turns in (("fused", fused, pairs), ("plain", plain, columns)):
        old, new = columns[0]
        rows[:, new] = 0
        way(turns[0])
        if not all(torch.equal(part[new], part[old]) for part in rows):
            raise WrongResult(f"{name}: wrong copy")
        row[f"{name}_us"] = best_us(setting, [lambda way=way, p=p: way(p) for p in turns])
    row["call_us"] = None
    if layers == cache.num_layers:
        lists = cycle([one.tolist() for one in maps])
        times = gpu_timing.wall_times_us(lambda: cache.copy_blocks(next(lists)), setting.repeats)
        row["call_us"] = median(times)
    return row
