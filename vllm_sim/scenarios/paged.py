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

import torch
import torch.nn.functional as F

from attention import attention, length_mask
from kv_cache_manager import PagedKVCacheManager
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
from vllm_sim.scenarios.report import SERIES_LENGTH, Pool, ScenarioReport, Series, Spans
from vllm_sim.scenarios.setting import (
    BASELINE_ITERATIONS,
    ITERATIONS,
    WARMUP,
    Setting,
    num_queued,
    sample_requests,
)
from vllm_sim.serving.scheduler import Scheduler
from vllm_sim.serving.steady_state import steady_state
from vllm_sim.serving.systems import PAGED, POLICY, limits_of
from vllm_sim.workload.length_tables import SHAREGPT
from vllm_sim.workload.requests import Request

BANK = 1021  # different random K and V vectors of a token
CUDA_GRANULE = 2 << 20  # torch rounds large allocations up to a multiple of this
ERROR_FACTOR = 4.0  # our error may be this many times plain torch's in the same dtype


def run(setting: Setting, progress: Progress = SILENT) -> ScenarioReport:
    """All of scenario 2; with the bars of Fig. 2, slots over time and a pool slot by slot."""
    report = ScenarioReport(
        2,
        "paged allocation",
        "How many requests fit, and is attention over scattered blocks exact?",
    )
    requests = sample_requests(SHAREGPT, num_queued(setting), setting)
    manager = fill_and_run(setting, report, requests, progress.part(0, 2, "steady state"))
    attend(setting, report, manager, progress.part(1, 2, "attention"))
    return report


# ---- bookkeeping ------------------------------------------------------------------------------


def fill_and_run(
    setting: Setting, report: ScenarioReport, requests: list[Request], progress: Progress = SILENT
) -> PagedKVCacheManager:
    """Admission until the first refusal, then a steady state; returns the manager in it."""
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
    pool, limits = setting.new_manager(POLICY[paper.ORCA_ORACLE]), limits_of(paper.ORCA_ORACLE)
    length = WARMUP, BASELINE_ITERATIONS
    oracle = steady_state(pool, requests, limits, *length, progress=progress.part(1, 2))
    report.bars |= {paper.ORCA_ORACLE: oracle.percents, paper.VLLM: ours.percents}
    report.series.append(Series(paper.VLLM, usages))
    report.pools.append(Pool(paper.VLLM, setting.block_size, pool_spans(manager)))

    parts, batch, bar = ("tokens", "padding", "free"), paper.FIG13["ShareGPT"], paper.FIG2
    report.parts.append(
        Table(
            "Admitted in order until the first refusal, in slots",
            ("policy", "requests", *parts),
            [("paged", len(first.running_ids), *(getattr(first.usage(), p) for p in parts))],
            setting.line + "; prompts only: outputs take blocks as they grow",
            name="paged_first_refusal",
        )
    )
    drawn = paper.FIG2_DRAWN[paper.VLLM]
    rows = []
    for system, mean, theirs in (
        (paper.VLLM, ours, (drawn["external"], drawn["reserved"] + drawn["internal"])),
        (paper.ORCA_ORACLE, oracle, (None, None)),
    ):
        rows.append((system, "ours", mean.batch, *map(mean.percent, parts)))
        rows.append((system, "paper", batch[system], bar[system]["tokens"], *theirs))
    report.parts.append(
        Table(
            f"Steady state, mean of {ITERATIONS:,} iterations ({BASELINE_ITERATIONS:,} for Orca), "
            "in percent of all slots",
            ("policy", "", "batch", *parts),
            rows,
            setting.line + ", ShareGPT lengths, saturated queue; the paper's batch is Fig. 13's "
            "(2 requests/s), its shares are Fig. 2's",
            decimals=2,
            name="paged_steady_state",
            keys=("policy", "who", "batch", *parts),
            index=2,
        )
    )
    waste = 100.0 * ours.percent("padding") / (100.0 - ours.percent("free"))
    report.check(
        "padding under one block per sequence",
        padded_right == looks,
        f"at most {worst_padding} of {setting.block_size} slots, {padded_right:,} of "
        f"{looks:,} times",
    )
    claim = paper.BLOG["waste_vllm_under"].value
    if setting.block_size <= paper.BLOCK_SIZE:  # the claim is about that size; larger ones pad more
        report.check(
            "waste of allocated memory under 4 %",
            waste < claim,
            f"{waste:.2f} % of the allocated slots hold no token",
        )
    agreed, count = ours.agreed + oracle.agreed, ITERATIONS + BASELINE_ITERATIONS
    report.check(
        "slots add up at every iteration",
        agreed == count,
        f"tokens equal their sum over the sequences in {agreed:,} of {count:,} iterations",
    )
    told = paper.FIG13_VLLM_OVER["ShareGPT"][paper.ORCA_ORACLE]
    report.answer = (
        f"paging fills {ours.percent('tokens'):.1f} % of the KV cache with tokens (paper: "
        f"{bar[paper.VLLM]['tokens']} %) and serves {ours.batch:.1f} requests at a time, "
        f"{ours.batch / oracle.batch:.2f}x Orca (Oracle) (paper: {told}x); {waste:.2f} % of the "
        f"allocated slots are wasted (launch blog: under {claim} %)."
    )
    return manager


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


def attend(
    setting: Setting,
    report: ScenarioReport,
    manager: PagedKVCacheManager,
    progress: Progress = SILENT,
) -> None:
    """K and V of every running sequence in the pool, and attention over them three ways."""
    cache = _allocate_and_weigh(setting, report)
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
    what = f"{len(ids)} sequences x {counted(num_layers, 'layer')}, {sum(lens.values()):,} tokens"
    report.check(
        "paged attention bit-identical to contiguous",
        identical == compared == len(ids) * num_layers,
        f"{identical} of {compared} ({what})",
    )
    report.check(
        "within the error budget of dense float64",
        ours_error <= ERROR_FACTOR * torch_error,
        f"largest relative error {ours_error:.1e}; torch's own in {_name(setting.dtype)} "
        f"{torch_error:.1e}, budget {ERROR_FACTOR:.0f} x that",
    )
    share, gathers = 100 * widest / setting.pool_bytes(), setting.kernel == GATHER
    figures = {"kernel": setting.kernel, "bytes": widest, "percent_of_pool": share}
    report.note("gather", **figures, needed=gathers)
    report.parts.append(
        f"Kernel gather: copying the blocks of the largest batch together takes {widest:,} "
        f"more bytes ({share:.1f} % of the pool),\nfor the copies alone. Kernel "
        "triton, on a GPU, reads them in place and does not need these."
        if gathers
        else f"Kernel triton reads the blocks in place: the {widest:,} bytes "
        f"({share:.1f} % of the pool) into which kernel gather\nwould copy the "
        "blocks of the largest batch are not needed."
    )
    del cache
    gc.collect()


def _allocate_and_weigh(setting: Setting, report: ScenarioReport) -> PagedKVCache:
    """The pool, after comparing the bytes accounted for with the bytes the tensors take."""
    predicted = setting.pool_bytes()
    before = _cuda_bytes(setting)
    cache = setting.new_cache()
    if setting.device.type == "cuda":
        requested, allocated = (b - a for a, b in zip(before, _cuda_bytes(setting)))
        same = requested == predicted <= allocated < predicted + CUDA_GRANULE
        found = f"torch.cuda: {requested:,} requested, memory_allocated {allocated:,} (of 2 MiB)"
    else:
        taken = cache.pool.untyped_storage().nbytes()
        same, found = taken == predicted, f"the tensor's storage has {taken:,}"
    report.check(
        "predicted bytes are the tensors' bytes", same, f"{predicted:,} predicted; {found}"
    )
    m = setting.model
    whole = m.kv_bytes_per_token * setting.num_slots
    report.note(
        "kv_pool",
        bytes=predicted,
        layers=setting.num_layers,
        model_layers=m.num_layers,
        dtype=_name(setting.dtype),
        model_fp16_bytes=whole,
        model_fp16_gib=whole / paper.GIB,
        model_fp16_bytes_per_token=m.kv_bytes_per_token,
    )
    report.parts.append(
        f"K/V pool: {predicted:,} bytes for {setting.num_layers} of {m.num_layers} layers in "
        f"{_name(setting.dtype)}; the whole model in fp16: {whole / paper.GIB:.2f} GiB\n"
        f"(2 x {m.num_layers} layers x {m.num_kv_heads} heads x {m.head_size} x 2 bytes = "
        f"{m.kv_bytes_per_token:,} bytes per token)."
    )
    return cache


def _cuda_bytes(setting: Setting) -> tuple[int, int]:
    """(bytes that tensors asked for, bytes torch allocated for them) on the device."""
    if setting.device.type != "cuda":
        return 0, 0
    requested = torch.cuda.memory_stats(setting.device).get("requested_bytes.all.current", 0)
    return requested, torch.cuda.memory_allocated(setting.device)


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
