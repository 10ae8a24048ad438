"""Scenario 1, baseline fragmentation: what contiguous reservations do to KV-cache memory.

Reproduces: Fig. 3 (two requests, slot by slot), section 3.1 (reserved slots, internal and
external fragmentation) and the three Orca bars of Fig. 2. Bookkeeping only: a reservation wastes
the same slots whether or not tensors stand behind them.

    python main.py --scenario 1
"""

from __future__ import annotations

from kv_cache_manager import BaselineCacheManager, MemoryUsage
from vllm_sim import paper
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.scenarios.record import Bar, Pool, RunRecord, Spans
from vllm_sim.scenarios.report import ScenarioReport, Table, block_map
from vllm_sim.scenarios.setting import (
    BASELINE_ITERATIONS,
    WARMUP,
    Setting,
    UsageMean,
    num_queued,
    sample_requests,
    steady_state,
)
from vllm_sim.serving.scheduler import Scheduler
from vllm_sim.serving.systems import CONTIGUOUS, limits_of
from vllm_sim.workload.length_tables import SHAREGPT
from vllm_sim.workload.requests import Request

PARTS = MemoryUsage.PARTS
LEGEND = "T tokens, r reserved, i internal, o rounding, . free"
BLOCKS_PER_CHAR = 4


def run(
    setting: Setting, progress: Progress = SILENT, record: RunRecord | None = None
) -> ScenarioReport:
    """All of scenario 1; leaves the bars of Fig. 2, slots over time and pools slot by slot."""
    report = ScenarioReport(
        1,
        "baseline fragmentation",
        "How much of the KV cache holds tokens when every request reserves contiguous slots?",
    )
    _one_request(setting, report)
    _figure_3(setting, report)
    requests = sample_requests(SHAREGPT, num_queued(setting), setting)
    first_fill = {policy: _fill(setting, policy, requests) for policy in CONTIGUOUS}
    report.parts.append(_first_fill_table(setting, first_fill))
    rows = [
        (CONTIGUOUS[policy] if number == 0 else "", line)
        for policy, (manager, _) in first_fill.items()
        for number, line in enumerate(pool_map(manager).split("\n"))
    ]
    title = f"The pool at the first refusal, {BLOCKS_PER_CHAR} blocks a character"
    keys = ("policy", "line")
    report.parts.append(
        Table(
            title,
            ("policy", LEGEND),
            rows,
            setting.line,
            picture=True,
            name="pool_map",
            keys=keys,
            index=0,
        )
    )
    if record is not None:
        record.pools += [
            Pool(1, CONTIGUOUS[policy], setting.block_size, pool_spans(manager))
            for policy, (manager, _) in first_fill.items()
        ]
    _steady_state(setting, report, requests, progress, record)
    return report


def _one_request(setting: Setting, report: ScenarioReport) -> None:
    """The smallest example: a request of 50 tokens in all."""
    length = min(50, setting.max_len)
    manager = setting.new_manager("max")
    manager.allocate(0, length, length)
    usage = manager.usage()
    kept = setting.max_len - length
    report.parts.append(
        f"One request of {length} tokens under 'max': {setting.max_len} slots reserved, "
        f"{kept} of them never used ({100 * kept / setting.max_len:.1f} %)."
    )
    report.note(
        "one_request",
        tokens=usage.tokens,
        slots_reserved=setting.max_len,
        never_used=kept,
        never_used_percent=100 * kept / setting.max_len,
    )
    report.check(
        f"{length} tokens in a {setting.max_len}-slot reservation",
        (usage.tokens, usage.reserved, usage.internal) == (length, 0, kept),
        f"{usage.tokens} tokens, {usage.internal} never used",
    )


def _figure_3(setting: Setting, report: ScenarioReport) -> None:
    """Requests A and B of Fig. 3, each with its own maximum length, in a pool for the two."""
    size = paper.BLOCK_SIZE
    longest = max(request["max_len"] for request in paper.FIG3.values())
    manager = BaselineCacheManager(-(-2 * longest // size), size, policy="max", max_len=longest)
    rows, same = [], True
    before = manager.usage()
    for seq_id, (name, fig) in enumerate(paper.FIG3.items()):
        tokens = fig["prompt"] + fig["current"]
        manager.allocate(seq_id, tokens, tokens + fig["reserved"], max_len=fig["max_len"])
        after = manager.usage()
        ours = [getattr(after, p) - getattr(before, p) for p in ("tokens", "reserved", "internal")]
        theirs = [tokens, fig["reserved"], fig["never_used"]]
        same = same and ours == theirs
        for who, values in (("ours", ours), ("paper", theirs)):
            rows.append((name, fig["max_len"], who, *values))
        before = after
    headers = ("request", "maximum", "", "tokens", "reserved", "internal")
    keys = ("request", "maximum", "who", "tokens", "reserved", "internal")
    title = "Fig. 3: two requests, slot by slot"
    report.parts.append(Table(title, headers, rows, name="fig3", keys=keys, index=3))
    report.check("Fig. 3's slots", same, "both requests as drawn" if same else "differ from Fig. 3")


def _fill(
    setting: Setting, policy: str, requests: list[Request]
) -> tuple[BaselineCacheManager, Request]:
    """Admit requests in order until the first is refused; returns that one too."""
    manager = setting.new_manager(policy)
    for request in requests:
        final_len = request.prompt_len + request.output_len
        if not manager.can_allocate(request.prompt_len, final_len):
            return manager, request
        manager.allocate(request.request_id, request.prompt_len, final_len)
    raise ValueError(f"all {len(requests)} requests fit in {setting.num_blocks} blocks at once")


def _first_fill_table(
    setting: Setting, fills: dict[str, tuple[BaselineCacheManager, Request]]
) -> Table:
    rows = []
    for policy, (manager, refused) in fills.items():
        manager.check_invariants()
        usage = manager.usage()
        final_len = refused.prompt_len + refused.output_len
        asked = manager.slots_to_ask(refused.prompt_len, final_len)
        parts = [getattr(usage, part) for part in PARTS if part != "padding"]
        rows.append((CONTIGUOUS[policy], len(manager.running_ids), *parts, asked))
    parts = tuple(part for part in PARTS if part != "padding")
    headers = ("policy", "requests", *parts, "refused one asks")
    title = "Admitted in order until the first refusal, in slots"
    return Table(title, headers, rows, setting.line, name="contiguous_first_refusal")


def pool_map(manager: BaselineCacheManager) -> str:
    """Who has what in a contiguous pool, reservation by reservation."""
    letters = {"tokens": "T", "reserved": "r", "internal": "i", "rounding": "o", "free": "."}
    spans = [(count, letters[part]) for count, part in pool_spans(manager)]
    return block_map(manager.num_blocks, manager.block_size, spans, per_char=BLOCKS_PER_CHAR)


def pool_spans(manager: BaselineCacheManager) -> Spans:
    """The same as runs of slots: (how many, part of the slot identity)."""
    size = manager.block_size
    held = sorted(
        (manager.reservation(i) for i in manager.running_ids), key=lambda r: r.start_block
    )
    lengths = {manager.start_slot(i): manager.num_tokens(i) for i in manager.running_ids}
    spans: Spans = []
    slot = 0
    for r in held:
        start = r.start_block * size
        tokens = lengths[start]
        spans += [
            (start - slot, "free"),
            (tokens, "tokens"),
            (r.final_len - tokens, "reserved"),
            (r.asked - r.final_len, "internal"),
            (r.num_blocks * size - r.asked, "rounding"),
        ]
        slot = start + r.num_blocks * size
    spans.append((manager.num_blocks * size - slot, "free"))
    return spans


def _steady_state(
    setting: Setting,
    report: ScenarioReport,
    requests: list[Request],
    progress: Progress = SILENT,
    record: RunRecord | None = None,
) -> None:
    """Completions and admissions for thousands of iterations: the bars of Fig. 2."""
    counted = len(CONTIGUOUS) * BASELINE_ITERATIONS
    rows = []
    shares: dict[str, UsageMean] = {}
    external: dict[str, int] = {}
    for number, (policy, system) in enumerate(CONTIGUOUS.items()):
        part = progress.part(number, len(CONTIGUOUS), f"steady state, {system}")
        manager = setting.new_manager(policy)
        refused: set[int] = set()
        series = None if record is None else record.new_series(1, system)

        def each(scheduler: Scheduler, manager=manager, refused=refused, series=series) -> None:
            if series is not None:
                series.add(manager.usage())
            head = scheduler.waiting[0].seqs[0] if scheduler.waiting else None
            if head and manager.refused_by_fragmentation(head.num_tokens, head.final_len):
                refused.add(head.seq_id)

        limits = limits_of(system)
        mean = steady_state(
            manager, requests, limits, WARMUP, BASELINE_ITERATIONS, each, progress=part
        )
        shares[policy], external[policy] = mean, len(refused)
        parts = [mean.percent(part) for part in PARTS if part != "padding"]
        rows.append((system, "ours", mean.batch, *parts, mean.external_and_others, len(refused)))
        if record is not None:
            record.bars.append(Bar(system, mean.percents, paper.FIG2.get(system)))
        if system in paper.FIG2:  # a policy of one's own has no bar there
            bar = paper.FIG2[system]
            rows.append(
                (system, "paper", paper.FIG13["ShareGPT"][system], bar["tokens"])
                + (bar["reserved"], bar["internal"])
                + (None, None, bar["external"], None)
            )
    parts = tuple(part for part in PARTS if part != "padding")
    headers = ("policy", "", "batch", *parts, "external & others", "refused, enough free")
    keys = ("policy", "who", "batch", *parts, "external_and_others", "refused_enough_free")
    report.parts.append(
        Table(
            f"Steady state, mean of {BASELINE_ITERATIONS:,} iterations, percent of slots (Fig. 2)",
            headers,
            rows,
            setting.line + ", ShareGPT lengths, saturated queue; the paper's batch is Fig. 13's",
            name="contiguous_steady_state",
            keys=keys,
            index=2,
        )
    )
    agreed = sum(mean.agreed for mean in shares.values())
    report.check(
        "slot identity at every iteration",
        agreed == counted,
        f"tokens and reserved equal their sums over the sequences in {agreed:,} of "
        f"{counted:,} iterations",
    )
    # Holes need chunks of several sizes side by side: where a block holds the longest request, or
    # the pool no two of the largest chunks, there may be none. In a pool far above Table 1's a
    # large enough chunk is nearly always free as long as enough slots are.
    blocks = -(-setting.max_len // setting.block_size)
    few = blocks == 1 or setting.num_blocks < 2 << (blocks - 1).bit_length()
    many = setting.num_slots > max(table["slots"] for table in paper.TABLE1_DERIVED.values())
    for policy in ("pow2", "oracle"):
        report.check(
            f"external fragmentation under {policy}",
            external[policy] > 0 or few or many,
            f"{external[policy]} requests refused although enough slots were free"
            + (few or many) * " (a pool of this size may have no holes)",
        )
    low, high = (
        min(s.percent("tokens") for s in shares.values()),
        shares["oracle"].percent("tokens"),
    )
    told = [paper.FIG2[system]["tokens"] for system in paper.ORCAS]
    report.answer = (
        f"contiguous reservations keep {low:.1f} % (max) to {high:.1f} % (oracle) of the KV cache "
        f"filled with tokens; the paper's Fig. 2 says {min(told)} % to {max(told)} %."
    )
