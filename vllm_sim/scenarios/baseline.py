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
from vllm_sim.reporting.tables import Table
from vllm_sim.scenarios.report import (
    SERIES_LENGTH,
    Pool,
    ScenarioReport,
    Series,
    Spans,
    block_map,
)
from vllm_sim.scenarios.setting import BASELINE_ITERATIONS as ITERATIONS
from vllm_sim.scenarios.setting import WARMUP, Setting, num_queued, sample_requests
from vllm_sim.serving.scheduler import Scheduler
from vllm_sim.serving.steady_state import UsageMean, steady_state
from vllm_sim.serving.systems import CONTIGUOUS, limits_of, new_manager
from vllm_sim.workload.length_tables import SHAREGPT
from vllm_sim.workload.requests import Request

PARTS = tuple(part for part in MemoryUsage.PARTS if part != "padding")  # no blocks, no padding
LETTERS = {"tokens": "T", "reserved": "r", "internal": "i", "rounding": "o", "free": "."}
LEGEND = ", ".join(f"{letter} {part}" for part, letter in LETTERS.items())
BLOCKS_PER_CHAR = 4


def run(setting: Setting, progress: Progress = SILENT) -> ScenarioReport:
    """All of scenario 1; with the bars of Fig. 2, slots over time and pools slot by slot."""
    report = ScenarioReport(
        1,
        "baseline fragmentation",
        "How much of the KV cache holds tokens when every request reserves contiguous slots?",
    )
    requests = sample_requests(SHAREGPT, num_queued(setting), setting)
    one_request(setting, report)
    figure_3(report)
    first_fill(setting, report, requests)
    steady_states(setting, report, requests, progress)
    return report


def one_request(setting: Setting, report: ScenarioReport) -> None:
    """The smallest example: a request of 50 tokens in all."""
    length, size = min(50, setting.max_len), setting.max_len
    manager = setting.new_manager("max")
    manager.allocate(0, length, length)
    usage, kept = manager.usage(), size - length
    unused = 100 * kept / size
    report.parts.append(
        f"One request of {length} tokens under 'max': {size} slots reserved, "
        f"{kept} of them never used ({unused:.1f} %)."
    )
    figures = {"tokens": usage.tokens, "slots_reserved": size, "never_used": kept}
    report.note("one_request", **figures, never_used_percent=unused)
    report.check(
        f"{length} tokens in a {size}-slot reservation",
        (usage.tokens, usage.reserved, usage.internal) == (length, 0, kept),
        f"{usage.tokens} tokens, {usage.internal} never used",
    )


def figure_3(report: ScenarioReport) -> None:
    """Requests A and B of Fig. 3, each with its own maximum length, in a pool for the two."""
    size, longest = paper.BLOCK_SIZE, max(request["max_len"] for request in paper.FIG3.values())
    manager = new_manager("max", -(-2 * longest // size), size, max_len=longest)
    rows, same, parts = [], True, ("tokens", "reserved", "internal")
    before = manager.usage()
    for seq_id, (name, fig) in enumerate(paper.FIG3.items()):
        tokens = fig["prompt"] + fig["current"]
        manager.allocate(seq_id, tokens, tokens + fig["reserved"], max_len=fig["max_len"])
        after = manager.usage()
        ours = [getattr(after, part) - getattr(before, part) for part in parts]
        theirs = [tokens, fig["reserved"], fig["never_used"]]
        same = same and ours == theirs
        for who, values in (("ours", ours), ("paper", theirs)):
            rows.append((name, fig["max_len"], who, *values))
        before = after
    headers, keys = ("request", "maximum", "", *parts), ("request", "maximum", "who", *parts)
    title = "Fig. 3: two requests, slot by slot"
    report.parts.append(Table(title, headers, rows, name="fig3", keys=keys, index=3))
    report.check("Fig. 3's slots", same, "both requests as drawn" if same else "differ from Fig. 3")


def first_fill(setting: Setting, report: ScenarioReport, requests: list[Request]) -> None:
    """Where the slots are when the first request is refused: in numbers, and as a map."""
    rows, lines = [], []
    for policy, system in CONTIGUOUS.items():
        manager, refused = fill(setting, policy, requests)
        manager.check_invariants()
        usage = manager.usage()
        asked = manager.slots_to_ask(refused.prompt_len, refused.prompt_len + refused.output_len)
        parts = [getattr(usage, part) for part in PARTS]
        rows.append((system, len(manager.running_ids), *parts, asked))
        report.pools.append(Pool(system, setting.block_size, pool_spans(manager)))
        for number, line in enumerate(pool_map(manager).split("\n")):
            lines.append(("" if number else system, line))
    headers = ("policy", "requests", *PARTS, "refused one asks")
    title, name = "Admitted in order until the first refusal, in slots", "contiguous_first_refusal"
    report.parts.append(Table(title, headers, rows, setting.line, name=name))
    title = f"The pool at the first refusal, {BLOCKS_PER_CHAR} blocks a character"
    look = {"picture": True, "name": "pool_map", "keys": ("policy", "line"), "index": 0}
    report.parts.append(Table(title, ("policy", LEGEND), lines, setting.line, **look))


def fill(
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


def pool_map(manager: BaselineCacheManager) -> str:
    """Who has what in a contiguous pool, reservation by reservation."""
    spans = [(count, LETTERS[part]) for count, part in pool_spans(manager)]
    return block_map(manager.num_blocks, manager.block_size, spans, per_char=BLOCKS_PER_CHAR)


def pool_spans(manager: BaselineCacheManager) -> Spans:
    """The same as runs of slots: (how many, part of the slot identity)."""
    size, spans, slot = manager.block_size, [], 0
    lengths = {manager.start_slot(i): manager.num_tokens(i) for i in manager.running_ids}
    held = map(manager.reservation, manager.running_ids)
    for r in sorted(held, key=lambda r: r.start_block):
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
    return [*spans, (manager.num_blocks * size - slot, "free")]


def steady_states(
    setting: Setting, report: ScenarioReport, requests: list[Request], progress: Progress = SILENT
) -> None:
    """Completions and admissions for thousands of iterations: the bars of Fig. 2."""
    rows = []
    means: dict[str, UsageMean] = {}
    external: dict[str, int] = {}
    for number, (policy, system) in enumerate(CONTIGUOUS.items()):
        part = progress.part(number, len(CONTIGUOUS), f"steady state, {system}")
        manager = setting.new_manager(policy)
        refused, usages = set(), []

        def each(scheduler: Scheduler, manager=manager, refused=refused, usages=usages) -> None:
            if len(usages) < SERIES_LENGTH:
                usages.append(manager.usage())
            head = scheduler.waiting[0].seqs[0] if scheduler.waiting else None
            if head and manager.refused_by_fragmentation(head.num_tokens, head.final_len):
                refused.add(head.seq_id)

        limits = limits_of(system)
        mean = steady_state(manager, requests, limits, WARMUP, ITERATIONS, each, progress=part)
        means[policy], external[policy] = mean, len(refused)
        report.series.append(Series(system, usages))
        report.bars[system] = mean.percents
        parts = [mean.percent(part) for part in PARTS]
        rows.append((system, "ours", mean.batch, *parts, mean.external_and_others, len(refused)))
        bar = paper.FIG2[system]
        theirs = bar["tokens"], bar["reserved"], bar["internal"], None, None, bar["external"]
        rows.append((system, "paper", paper.FIG13["ShareGPT"][system], *theirs, None))
    report.parts.append(
        Table(
            f"Steady state, mean of {ITERATIONS:,} iterations, percent of slots (Fig. 2)",
            ("policy", "", "batch", *PARTS, "external & others", "refused, enough free"),
            rows,
            setting.line + ", ShareGPT lengths, saturated queue; the paper's batch is Fig. 13's",
            name="contiguous_steady_state",
            keys=("policy", "who", "batch", *PARTS, "external_and_others", "refused_enough_free"),
            index=2,
        )
    )
    agreed, counted = sum(m.agreed for m in means.values()), len(means) * ITERATIONS
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
    low, high = min(m.percent("tokens") for m in means.values()), means["oracle"].percent("tokens")
    told = [paper.FIG2[system]["tokens"] for system in paper.ORCAS]
    report.answer = (
        f"contiguous reservations keep {low:.1f} % (max) to {high:.1f} % (oracle) of the KV cache "
        f"filled with tokens; the paper's Fig. 2 says {min(told)} % to {max(told)} %."
    )
