"""Scenario 2, paged allocation: the same requests in the same memory, block by block.

Reproduces: the vLLM bar of Fig. 2, section 4.3 (waste below one block per sequence), and the
claim under all of it (section 4.1), in scenario_paged_tensors.py: attention over scattered blocks
is attention, bit for bit.

    python main.py --scenario 2
"""

from __future__ import annotations

import paper
from kv_cache_manager import BaselineCacheManager, PagedKVCacheManager
from progress import SILENT, Progress
from report import ScenarioReport, Table
from run_record import Bar, Pool, RunRecord, Spans
from scenario import (
    BASELINE_ITERATIONS,
    ITERATIONS,
    WARMUP,
    Setting,
    num_queued,
    sample_requests,
    steady_state,
)
from scenario_paged_tensors import attend
from scheduler import Scheduler
from workload import SHAREGPT, Request


def run(
    setting: Setting, progress: Progress = SILENT, record: RunRecord | None = None
) -> ScenarioReport:
    """All of scenario 2; leaves the bars of Fig. 2, slots over time and a pool slot by slot."""
    report = ScenarioReport(
        2,
        "paged allocation",
        "How many requests fit, and is attention over scattered blocks exact?",
    )
    requests = sample_requests(SHAREGPT, num_queued(setting), setting)
    part = progress.part(0, 2, "steady state")
    manager = _fill_and_run(setting, report, requests, part, record)
    attend(setting, report, manager, progress.part(1, 2, "attention"))
    return report


def _new_manager(setting: Setting) -> PagedKVCacheManager:
    return PagedKVCacheManager(
        setting.num_blocks,
        setting.block_size,
        num_cpu_blocks=setting.num_blocks,
        watermark=paper.WATERMARK,
    )


def pool_spans(manager: PagedKVCacheManager) -> Spans:
    """Runs of slots in the order of the physical blocks: (how many, part of the slot identity)."""
    size = manager.block_size
    filled = {b: n for i in manager.running_ids for b, n in manager.block_table(i).entries()}
    spans: Spans = []
    for block in range(manager.num_blocks):
        tokens = filled.get(block)
        parts = [("free", size)] if tokens is None else [("tokens", tokens),
                                                         ("padding", size - tokens)]  # fmt: skip
        spans += [(count, part) for part, count in parts]
    return spans


def _fill_and_run(
    setting: Setting,
    report: ScenarioReport,
    requests: list[Request],
    progress: Progress = SILENT,
    record: RunRecord | None = None,
) -> PagedKVCacheManager:
    """Admission until the first refusal, then a steady state; returns the manager in it."""
    first = _new_manager(setting)
    for request in requests:
        if not first.can_allocate(request.prompt_len):
            break
        first.allocate(request.request_id, request.prompt_len)
    filled = first.usage()

    manager = _new_manager(setting)
    worst_padding = padded_right = 0
    counted: list[int] = []
    series = None if record is None else record.new_series(2, paper.VLLM)

    def each(scheduler: Scheduler) -> None:
        nonlocal worst_padding, padded_right
        if series is not None:
            series.add(manager.usage())
        for group in scheduler.running:
            for seq in group.unfinished():
                # What the sequence has, by its own count, against what its table holds.
                slots = len(manager.block_table(seq.seq_id).blocks) * setting.block_size
                worst_padding = max(worst_padding, slots - seq.num_tokens)
                padded_right += 0 <= slots - seq.num_tokens < setting.block_size
        counted.append(len(scheduler.running))

    limits = setting.limits(paper.VLLM)
    mean = steady_state(
        manager, requests, limits, WARMUP, ITERATIONS, each, progress=progress.part(0, 2)
    )
    oracle = steady_state(
        BaselineCacheManager(
            setting.num_blocks, setting.block_size, policy="oracle", max_len=setting.max_len
        ),
        requests,
        setting.limits(paper.ORCA_ORACLE),
        WARMUP,
        BASELINE_ITERATIONS,
        progress=progress.part(1, 2),
    )

    if record is not None:
        known = {bar.system for bar in record.bars}  # of scenario 1, if it ran
        record.bars += [
            Bar(system, found.percents, paper.FIG2[system])
            for system, found in ((paper.ORCA_ORACLE, oracle), (paper.VLLM, mean))
            if system not in known
        ]
        record.pools.append(Pool(2, paper.VLLM, setting.block_size, pool_spans(manager)))

    parts = ("tokens", "padding", "free")
    slots = [getattr(filled, part) for part in parts]
    report.parts.append(
        Table(
            "Admitted in order until the first refusal, in slots",
            ("policy", "requests", *parts),
            [("paged", len(first.running_ids), *slots)],
            setting.line + "; prompts only: outputs take blocks as they grow",
            name="paged_first_refusal",
        )
    )
    bar, drawn = paper.FIG2[paper.VLLM], paper.FIG2_DRAWN[paper.VLLM]
    unallocated = drawn["reserved"] + drawn["internal"]
    oracle_bar, batch = paper.FIG2[paper.ORCA_ORACLE], paper.FIG13["ShareGPT"]
    report.parts.append(
        Table(
            f"Steady state, mean of {ITERATIONS:,} iterations ({BASELINE_ITERATIONS:,} for Orca), "
            "in percent of all slots",
            ("policy", "", "batch", "tokens", "padding", "free"),
            [
                (paper.VLLM, "ours", mean.batch, *(mean.percent(part) for part in parts)),
                (paper.VLLM, "paper", batch[paper.VLLM], bar["tokens"], drawn["external"])
                + (unallocated,),
                (paper.ORCA_ORACLE, "ours", oracle.batch)
                + tuple(oracle.percent(part) for part in parts),
                (paper.ORCA_ORACLE, "paper", batch[paper.ORCA_ORACLE], oracle_bar["tokens"])
                + (None, None),
            ],
            setting.line + ", ShareGPT lengths, saturated queue; the paper's batch is Fig. 13's "
            "(2 requests/s), its shares are Fig. 2's",
            decimals=2,
            name="paged_steady_state",
            keys=("policy", "who", "batch", "tokens", "padding", "free"),
            index=2,
        )
    )
    waste = 100.0 * mean.percent("padding") / (100.0 - mean.percent("free"))
    report.check(
        "padding under one block per sequence",
        padded_right == sum(counted),
        f"at most {worst_padding} of {setting.block_size} slots, {padded_right:,} of "
        f"{sum(counted):,} times",
    )
    claim = paper.BLOG["waste_vllm_under"].value
    if (
        setting.block_size <= paper.BLOCK_SIZE
    ):  # the claim is about that size; larger blocks pad more
        report.check(
            "waste of allocated memory under 4 %",
            waste < claim,
            f"{waste:.2f} % of the allocated slots hold no token",
        )
    report.check(
        "slots add up at every iteration",
        mean.agreed == ITERATIONS and oracle.agreed == BASELINE_ITERATIONS,
        f"tokens equal their sum over the sequences in {mean.agreed + oracle.agreed:,} of "
        f"{ITERATIONS + BASELINE_ITERATIONS:,} iterations",
    )
    told = paper.FIG13_VLLM_OVER["ShareGPT"][paper.ORCA_ORACLE]
    report.answer = (
        f"paging fills {mean.percent('tokens'):.1f} % of the KV cache with tokens (paper: "
        f"{bar['tokens']} %) and serves {mean.batch:.1f} requests at a time, "
        f"{mean.batch / oracle.batch:.2f}x Orca (Oracle) (paper: {told}x); {waste:.2f} % of the "
        f"allocated slots are wasted (launch blog: under {claim} %)."
    )
    return manager
