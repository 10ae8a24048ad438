"""Scenario 2, paged allocation: the same requests in the same memory, block by block.

Reproduces: the vLLM bar of Fig. 2, section 4.3 (waste below one block per sequence), and the claim
under all of it (section 4.1, Eq. 4): attention over scattered blocks is attention, bit for bit.
K and V of every token of the steady state are written through block tables into the pool and read
back by the paged kernel, which is compared with the same kernel over contiguous K and V and with
dense attention in float64.

    python main.py --scenario 2
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attention import attention, length_mask
from kv_cache_manager import MemoryUsage, PagedKVCacheManager
from paged_attention import (
    GATHER,
    PagedKVCache,
    attention_kernel,
    gather_bytes,
    pad_block_tables,
    slot_mapping,
)
from vllm_sim import paper
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import Table, counted
from vllm_sim.scenarios.report import Check, Pool, ScenarioReport, Series, Spans, note
from vllm_sim.scenarios.setting import (
    BASELINE_ITERATIONS,
    ITERATIONS,
    SERIES_LENGTH,
    WARMUP,
    Setting,
    num_queued,
    sample_requests,
)
from vllm_sim.serving.scheduler import Scheduler
from vllm_sim.serving.steady_state import UsageMean, steady_state
from vllm_sim.serving.systems import PAGED, POLICY, limits_of
from vllm_sim.workload.length_tables import SHAREGPT
from vllm_sim.workload.requests import Request

BANK = 1021  # different random K and V vectors of a token
CUDA_GRANULE = 2 << 20  # torch rounds large allocations up to a multiple of this
WASTE_UNDER = paper.BLOG["waste_vllm_under"].value  # percent
ERROR_FACTOR = 4.0  # our error may be this many times plain torch's in the same dtype


@dataclass(frozen=True, slots=True)
class Steady:
    """Admission until the first refusal, and thousands of iterations under a full queue."""

    admitted: int
    first: MemoryUsage  # at the first refusal
    ours: UsageMean
    oracle: UsageMean  # Orca's, for as many requests
    series: Series
    pool: Pool  # at the end
    worst_padding: int  # of a sequence, in slots
    padded_right: int  # sequences with less than a block of padding
    looks: int  # at sequences


@dataclass(frozen=True, slots=True)
class Attended:
    """K and V of every running sequence in the pool, and attention over them three ways."""

    num_bytes: tuple[int, ...]  # of the pool: asked for, and on a GPU allocated for it
    num_seqs: int
    num_tokens: int
    compared: int  # once a sequence and layer
    identical: int  # to attention over contiguous K and V
    ours_error: float  # relative, from dense attention in float64; the largest
    torch_error: float
    gathered: int  # bytes of the largest batch's blocks


@dataclass(frozen=True, slots=True)
class Found:
    """What scenario 2 measured."""

    setting: Setting
    steady: Steady
    attended: Attended


def run(setting: Setting, progress: Progress = SILENT) -> Found:
    """All of scenario 2."""
    requests = sample_requests(SHAREGPT, num_queued(setting), setting)
    steady, manager = fill_and_run(setting, requests, progress.part(0, 2, "steady state"))
    return Found(setting, steady, attend(setting, manager, progress.part(1, 2, "attention")))


# ---- bookkeeping ------------------------------------------------------------------------------


def fill_and_run(
    setting: Setting, requests: list[Request], progress: Progress = SILENT
) -> tuple[Steady, PagedKVCacheManager]:
    """Admission until the first refusal, then a steady state; with the manager in it."""
    first = setting.new_manager(PAGED, num_cpu_blocks=setting.num_blocks)
    for request in requests:
        if not first.can_allocate(request.prompt_len):
            break
        first.allocate(request.request_id, request.prompt_len)

    manager = setting.new_manager(PAGED, num_cpu_blocks=setting.num_blocks)
    worst_padding = padded_right = looks = 0
    usages = []

    def each(scheduler: Scheduler) -> None:
        nonlocal worst_padding, padded_right, looks
        if len(usages) < SERIES_LENGTH:
            usages.append(manager.usage())
        for group in scheduler.running:
            for seq in group.unfinished():
                # What the sequence has, by its own count, against what its table holds.
                slots = len(manager.block_table(seq.seq_id).blocks) * setting.block_size
                worst_padding = max(worst_padding, slots - seq.num_tokens)
                padded_right += 0 <= slots - seq.num_tokens < setting.block_size
        looks += len(scheduler.running)

    limits, length = limits_of(paper.VLLM), (WARMUP, ITERATIONS)
    ours = steady_state(manager, requests, limits, *length, each, progress=progress.part(0, 2))
    other, limits = setting.new_manager(POLICY[paper.ORCA_ORACLE]), limits_of(paper.ORCA_ORACLE)
    length = WARMUP, BASELINE_ITERATIONS
    oracle = steady_state(other, requests, limits, *length, progress=progress.part(1, 2))
    admitted, series = len(first.running_ids), Series(paper.VLLM, usages)
    pool = Pool(paper.VLLM, setting.block_size, pool_spans(manager))
    counts = worst_padding, padded_right, looks
    return Steady(admitted, first.usage(), ours, oracle, series, pool, *counts), manager


def pool_spans(manager: PagedKVCacheManager) -> Spans:
    """Runs of slots in the order of the physical blocks: (how many, part of the slot identity)."""
    size = manager.block_size
    filled = {b: n for i in manager.running_ids for b, n in manager.block_table(i).entries()}
    spans: Spans = []
    for block in range(manager.num_blocks):
        tokens = filled.get(block)
        if tokens is None:
            spans.append((size, "free"))
        else:
            spans += [(tokens, "tokens"), (size - tokens, "padding")]
    return spans


# ---- tensors ----------------------------------------------------------------------------------


def attend(setting: Setting, manager: PagedKVCacheManager, progress: Progress = SILENT) -> Attended:
    """K and V of every running sequence in the pool, and attention over them three ways."""
    cache, num_bytes = _allocate_and_weigh(setting)
    m, device, num_layers = setting.model, setting.device, setting.num_layers
    generator = torch.Generator(device=device).manual_seed(setting.seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=setting.dtype)

    bank_k, bank_v = (random(BANK, m.num_kv_heads, m.head_size) for _ in range(2))
    ids = sorted(manager.running_ids, key=manager.num_tokens)
    queries = {seq_id: random(m.num_heads, m.head_size) for seq_id in ids}
    tables = {seq_id: manager.block_table(seq_id).blocks for seq_id in ids}
    lens = {seq_id: manager.num_tokens(seq_id) for seq_id in ids}
    # Token p of the sequence with running number i has row (337 * i + p) of the bank, and each
    # layer holds the bank in another order.
    rows = {
        seq_id: (337 * i + torch.arange(lens[seq_id], device=device)) % BANK
        for i, seq_id in enumerate(ids)
    }
    for seq_id in ids:
        slots = slot_mapping(tables[seq_id], 0, lens[seq_id], setting.block_size, device=device)
        for layer in range(num_layers):
            row = (rows[seq_id] + layer) % BANK
            cache.write(layer, slots, bank_k[row], bank_v[row])

    kernel = attention_kernel(setting.kernel)
    identical = compared = widest = 0
    ours_error = torch_error = 0.0
    batches = _batches(ids, tables, setting)
    for number, batch in enumerate(batches):
        for layer in range(num_layers):
            progress.at(number * num_layers + layer, len(batches) * num_layers)
            q = torch.stack([queries[i] for i in batch])  # (B, H, D)
            block_tables = pad_block_tables([tables[i] for i in batch], device=device)
            seq_lens = torch.tensor([lens[i] for i in batch], device=device)
            k_pool, v_pool = cache.k_pool(layer), cache.v_pool(layer)
            widest = max(widest, gather_bytes(k_pool, block_tables))
            out, lse = kernel(q, k_pool, v_pool, block_tables, seq_lens)

            num_slots = block_tables.shape[1] * setting.block_size
            row = torch.zeros(len(batch), num_slots, dtype=torch.int64, device=device)
            for b, i in enumerate(batch):
                row[b, : lens[i]] = (rows[i] + layer) % BANK
            k, v = bank_k[row], bank_v[row]  # contiguous: (B, T, H_kv, D)
            same_out, same_lse = _contiguous(setting, q, k, v, block_tables, seq_lens)
            for b, i in enumerate(batch):
                compared += 1
                identical += torch.equal(out[b], same_out[b]) and torch.equal(lse[b], same_lse[b])
                exact, plain = _references(q[b], k[b, : lens[i]], v[b, : lens[i]])
                ours_error = max(ours_error, _distance(out[b], exact))
                torch_error = max(torch_error, _distance(plain, exact))
            del k, v, out, same_out
    del cache
    gc.collect()
    counts = len(ids), sum(lens.values()), compared, identical
    return Attended(num_bytes, *counts, ours_error, torch_error, widest)


def _allocate_and_weigh(setting: Setting) -> tuple[PagedKVCache, tuple[int, ...]]:
    """The pool, and the bytes its tensors take: asked for, and on a GPU what torch allocated."""
    if setting.device.type != "cuda":
        cache = setting.new_cache()
        return cache, (cache.pool.untyped_storage().nbytes(),)
    before = _cuda_bytes(setting.device)
    cache = setting.new_cache()
    return cache, tuple(b - a for a, b in zip(before, _cuda_bytes(setting.device)))


def _cuda_bytes(device: torch.device) -> tuple[int, int]:
    requested = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)
    return requested, torch.cuda.memory_allocated(device)


def _batches(ids: list[int], tables: dict[int, list[int]], setting: Setting) -> list[list[int]]:
    """Sequences of similar length together, so that little is gathered only as padding."""
    limit = setting.gathered_slots // setting.block_size
    batches: list[list[int]] = [[]]
    for seq_id in ids:  # in order of length: the newest is the longest of its batch
        if batches[-1] and (len(batches[-1]) + 1) * len(tables[seq_id]) > limit:
            batches.append([])
        batches[-1].append(seq_id)
    return batches


def _contiguous(
    setting: Setting,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same kernel over contiguous K and V (B, T, H_kv, D): out (B, H, D) and lse (B, H).

    To kernel triton they are blocks that lie in order.
    """
    if setting.kernel == GATHER:
        out, lse = attention(q[:, None], k, v, length_mask(seq_lens, k.shape[1]))
        return out[:, 0], lse[:, 0]
    k, v = (x.reshape(-1, setting.block_size, *x.shape[2:]) for x in (k, v))  # (N, S, H_kv, D)
    in_order = torch.arange(block_tables.numel(), dtype=torch.int32, device=q.device)
    return attention_kernel(setting.kernel)(q, k, v, in_order.view_as(block_tables), seq_lens)


def _references(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention of one sequence: dense in float64, and torch's own in the given dtype.

    q: (H, D); k, v: (T, H_kv, D). Both results (H, D).
    """
    group = q.shape[0] // k.shape[1]
    grouped = q.double().unflatten(0, (k.shape[1], group))  # (H_kv, G, D)
    scores = torch.einsum("hgd,thd->hgt", grouped, k.double()) / q.shape[1] ** 0.5
    exact = torch.einsum("hgt,thd->hgd", scores.softmax(-1), v.double()).flatten(0, 1)
    plain = F.scaled_dot_product_attention(
        q[None, :, None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa=group > 1
    )
    return exact, plain[0, :, 0]


def _distance(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in norm; infinite where NaN, which no maximum would show."""
    error = float((out.double() - exact).norm() / exact.norm())
    return math.inf if math.isnan(error) else error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- what is shown ------------------------------------------------------------------------------


def report(found: Found) -> ScenarioReport:
    """All that is shown; with the bars of Fig. 2, slots over time and a pool slot by slot."""
    setting, steady, m = found.setting, found.steady, found.setting.model
    ours, oracle, dtype = steady.ours, steady.oracle, _name(setting.dtype)
    predicted, whole = setting.pool_bytes(), m.kv_bytes_per_token * setting.num_slots
    widest, gathers = found.attended.gathered, setting.kernel == GATHER
    share, told = 100 * widest / predicted, paper.FIG13_VLLM_OVER["ShareGPT"][paper.ORCA_ORACLE]
    more = f"{widest / paper.GIB:.2f} GiB ({share:.1f} % of the pool)"
    gather = {"bytes": widest, "percent_of_pool": share, "needed": gathers}
    pool = {"bytes": predicted, "layers": setting.num_layers, "model_layers": m.num_layers}
    pool |= {"dtype": dtype, "model_fp16_bytes": whole, "model_fp16_gib": whole / paper.GIB}
    pool["model_fp16_bytes_per_token"] = m.kv_bytes_per_token
    return ScenarioReport(
        2,
        "paged allocation",
        "How many requests fit, and is attention over scattered blocks exact?",
        [
            *tables(found),
            f"K/V pool: {predicted / paper.GIB:.2f} GiB for {setting.num_layers} of "
            f"{m.num_layers} layers in {dtype}; the whole model in fp16: "
            f"{whole / paper.GIB:.2f} GiB\n"
            f"(2 x {m.num_layers} layers x {m.num_kv_heads} heads x {m.head_size} x 2 bytes = "
            f"{m.kv_bytes_per_token:,} bytes per token).",
            f"Kernel gather: copying the blocks of the largest batch together takes {more} more "
            "for the copies alone. Kernel triton, on a GPU, reads them in place and needs none."
            if gathers
            else f"Kernel triton reads the blocks in place: it does not need the {more} into which "
            "kernel gather would copy the blocks of the largest batch.",
        ],
        [*checks(found)],
        f"paging fills {ours.percent('tokens'):.1f} % of the KV cache with tokens (paper: "
        f"{paper.FIG2[paper.VLLM]['tokens']} %) and serves {ours.batch:.1f} requests at a time, "
        f"{ours.batch / oracle.batch:.2f}x Orca (Oracle) (paper: {told}x); {_waste(ours):.2f} % of "
        f"the allocated slots are wasted (launch blog: under {WASTE_UNDER} %).",
        data=[note("kv_pool", **pool), note("gather", kernel=setting.kernel, **gather)],
        bars={paper.ORCA_ORACLE: oracle.percents, paper.VLLM: ours.percents},
        series=[steady.series],
        pools=[steady.pool],
    )


def _waste(mean: UsageMean) -> float:
    """Padding in percent of the allocated slots."""
    return 100.0 * mean.percent("padding") / (100.0 - mean.percent("free"))


def tables(found: Found) -> Iterator[Table]:
    """The first refusal and the steady state."""
    line, steady, parts = found.setting.line, found.steady, ("tokens", "padding", "free")
    title, name = "Admitted in order until the first refusal, in slots", "paged_first_refusal"
    row = ("paged", steady.admitted, *(getattr(steady.first, part) for part in parts))
    setting = line + "; prompts only: outputs take blocks as they grow"
    yield Table(title, ("policy", "requests", *parts), [row], setting, name=name)
    drawn = paper.FIG2_DRAWN[paper.VLLM]
    rows = []
    for system, mean, theirs in (
        (paper.VLLM, steady.ours, (drawn["external"], drawn["reserved"] + drawn["internal"])),
        (paper.ORCA_ORACLE, steady.oracle, (None, None)),
    ):
        batch, tokens = paper.FIG13["ShareGPT"][system], paper.FIG2[system]["tokens"]
        rows.append((system, "ours", mean.batch, *map(mean.percent, parts)))
        rows.append((system, "paper", batch, tokens, *theirs))
    title = f"Steady state, mean of {ITERATIONS:,} iterations ({BASELINE_ITERATIONS:,} for Orca), "
    title += "in percent of all slots"
    setting = line + ", ShareGPT lengths, saturated queue; the paper's batch is Fig. 13's "
    setting += "(2 requests/s), its shares are Fig. 2's"
    keys = ("policy", "who", "batch", *parts)
    look = {"decimals": 2, "name": "paged_steady_state", "keys": keys, "index": 2}
    yield Table(title, ("policy", "", "batch", *parts), rows, setting, **look)


def checks(found: Found) -> Iterator[Check]:
    """What must hold of the slots, the tensors and attention."""
    setting, s, a = found.setting, found.steady, found.attended
    told = f"at most {s.worst_padding} of {setting.block_size} slots, "
    told += f"{s.padded_right:,} of {s.looks:,} times"
    yield Check("padding under one block per sequence", s.padded_right == s.looks, told)
    if setting.block_size <= paper.BLOCK_SIZE:  # the claim is about that size; larger ones pad more
        waste = _waste(s.ours)
        told = f"{waste:.2f} % of the allocated slots hold no token"
        yield Check("waste of allocated memory under 4 %", waste < WASTE_UNDER, told)
    agreed, count = s.ours.agreed + s.oracle.agreed, ITERATIONS + BASELINE_ITERATIONS
    told = f"tokens equal their sum over the sequences in {agreed:,} of {count:,} iterations"
    yield Check("slots add up at every iteration", agreed == count, told)
    predicted, (taken, *allocated) = setting.pool_bytes(), a.num_bytes
    same = taken == predicted
    told = f"{predicted:,} predicted; the tensor's storage has {taken:,}"
    if allocated:
        same = same and predicted <= allocated[0] < predicted + CUDA_GRANULE
        told = f"{predicted:,} predicted; torch.cuda: {taken:,} requested, "
        told += f"memory_allocated {allocated[0]:,} (of 2 MiB)"
    yield Check("predicted bytes are the tensors' bytes", same, told)
    same = a.identical == a.compared == a.num_seqs * setting.num_layers
    told = f"{a.identical} of {a.compared} ({a.num_seqs} sequences x "
    told += f"{counted(setting.num_layers, 'layer')}, {a.num_tokens:,} tokens)"
    yield Check("paged attention bit-identical to contiguous", same, told)
    told = f"largest relative error {a.ours_error:.1e}; torch's own in {_name(setting.dtype)} "
    told += f"{a.torch_error:.1e}, budget {ERROR_FACTOR:.0f} x that"
    close = a.ours_error <= ERROR_FACTOR * a.torch_error
    yield Check("within the error budget of dense float64", close, told)
