"""Scenario 1, baseline fragmentation: what contiguous reservations do to KV-cache memory.

Reproduces: Fig. 3 (two requests, slot by slot), section 3.1 (reserved slots, internal and
external fragmentation) and the three Orca bars of Fig. 2. Bookkeeping only: a reservation wastes
the same slots whether or not tensors stand behind them.

    python main.py --scenario 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kv_cache_manager import BaselineCacheManager, MemoryUsage
from vllm_sim import paper
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import Table
from vllm_sim.scenarios.report import Check, Pool, ScenarioReport, Series, Spans, block_map, note
from vllm_sim.scenarios.setting import BASELINE_ITERATIONS as ITERATIONS
from vllm_sim.scenarios.setting import SERIES_LENGTH, WARMUP, Setting, num_queued, sample_requests
from vllm_sim.serving.scheduler import Scheduler
from vllm_sim.serving.steady_state import UsageMean, steady_state
from vllm_sim.serving.systems import CONTIGUOUS, limits_of, new_manager
from vllm_sim.workload.length_tables import SHAREGPT
from vllm_sim.workload.requests import Request

PARTS = tuple(part for part in MemoryUsage.PARTS if part != "padding")  # no blocks, no padding
LETTERS = {"tokens": "T", "reserved": "r", "internal": "i", "rounding": "o", "free": "."}
LEGEND = ", ".join(f"{letter} {part}" for part, letter in LETTERS.items())
BLOCKS_PER_CHAR = 4
ONE_LENGTH = 50  # tokens of the one request
FIG3_PARTS = ("tokens", "reserved", "internal")
FIG3_DRAWN = {
    name: [fig["prompt"] + fig["current"], fig["reserved"], fig["never_used"]]
    for name, fig in paper.FIG3.items()
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A pool that was filled in order until a request was refused."""

    num_requests: int
    usage: MemoryUsage
    pool: Pool
    asked: int  # slots that the refused request asks for


@dataclass(frozen=True, slots=True)
class Steady:
    """Completions and admissions for thousands of iterations."""

    mean: UsageMean
    series: Series  # its first iterations
    refused: int  # requests, although enough slots were free


@dataclass(frozen=True, slots=True)
class Found:
    """What scenario 1 measured: by request of Fig. 3 (slots by part), and by policy."""

    setting: Setting
    one_request: MemoryUsage
    figure_3: dict[str, list[int]]
    first_fill: dict[str, Refusal]
    steady_states: dict[str, Steady]


def run(setting: Setting, progress: Progress = SILENT) -> Found:
    """All of scenario 1."""
    requests = sample_requests(SHAREGPT, num_queued(setting), setting)
    fills, steady = first_fill(setting, requests), steady_states(setting, requests, progress)
    return Found(setting, one_request(setting), figure_3(), fills, steady)


def one_request(setting: Setting) -> MemoryUsage:
    """The smallest example: a request of 50 tokens in all."""
    length = min(ONE_LENGTH, setting.max_len)
    manager = setting.new_manager("max")
    manager.allocate(0, length, length)
    return manager.usage()


def figure_3() -> dict[str, list[int]]:
    """Requests A and B of Fig. 3, each with its own maximum length, in a pool for the two."""
    size, longest = paper.BLOCK_SIZE, max(request["max_len"] for request in paper.FIG3.values())
    manager = new_manager("max", -(-2 * longest // size), size, max_len=longest)
    found, before = {}, manager.usage()
    for seq_id, (name, fig) in enumerate(paper.FIG3.items()):
        tokens = fig["prompt"] + fig["current"]
        manager.allocate(seq_id, tokens, tokens + fig["reserved"], max_len=fig["max_len"])
        after = manager.usage()
        found[name] = [getattr(after, part) - getattr(before, part) for part in FIG3_PARTS]
        before = after
    return found


def first_fill(setting: Setting, requests: list[Request]) -> dict[str, Refusal]:
    """Requests admitted in order until the first is refused."""
    found = {}
    for policy, system in CONTIGUOUS.items():
        manager = setting.new_manager(policy)
        for request in requests:
            lengths = request.prompt_len, request.prompt_len + request.output_len
            if not manager.can_allocate(*lengths):
                break
            manager.allocate(request.request_id, *lengths)
        else:
            raise ValueError(f"all {len(requests)} requests fit in {setting.num_blocks} blocks")
        manager.check_invariants()
        pool, asked = Pool(system, setting.block_size, pool_spans(manager)), manager.slots_to_ask
        found[policy] = Refusal(len(manager.running_ids), manager.usage(), pool, asked(*lengths))
    return found


def pool_spans(manager: BaselineCacheManager) -> Spans:
    """Who has what in a contiguous pool: runs of slots (how many, part of the slot identity)."""
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
    setting: Setting, requests: list[Request], progress: Progress = SILENT
) -> dict[str, Steady]:
    """Completions and admissions for thousands of iterations: the bars of Fig. 2."""
    found = {}
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
        found[policy] = Steady(mean, Series(system, usages), len(refused))
    return found


# ---- what is shown ------------------------------------------------------------------------------


def report(found: Found) -> ScenarioReport:
    """All that is shown; with the bars of Fig. 2, slots over time and pools slot by slot."""
    one, reserved, steady = found.one_request, found.setting.max_len, found.steady_states
    unused = reserved - one.tokens
    percent = 100 * unused / reserved
    figures = {"tokens": one.tokens, "slots_reserved": reserved, "never_used": unused}
    shares = {policy: s.mean.percent("tokens") for policy, s in steady.items()}
    low, high = min(shares.values()), shares["oracle"]
    told = [paper.FIG2[system]["tokens"] for system in paper.ORCAS]
    return ScenarioReport(
        1,
        "baseline fragmentation",
        "How much of the KV cache holds tokens when every request reserves contiguous slots?",
        [
            f"One request of {one.tokens} tokens under 'max': {reserved} slots reserved, "
            f"{unused} of them never used ({percent:.1f} %).",
            *tables(found),
        ],
        [*checks(found)],
        f"contiguous reservations keep {low:.1f} % (max) to {high:.1f} % (oracle) of the KV cache "
        f"filled with tokens; the paper's Fig. 2 says {min(told)} % to {max(told)} %.",
        data=[note("one_request", **figures, never_used_percent=percent)],
        bars={s.series.name: s.mean.percents for s in steady.values()},
        series=[s.series for s in steady.values()],
        pools=[refusal.pool for refusal in found.first_fill.values()],
    )


def tables(found: Found) -> Iterator[Table]:
    """Fig. 3; the first refusals, in numbers and as a map; the steady states."""
    line, fig3, refusals, maps, steady = found.setting.line, [], [], [], []
    for name, fig in paper.FIG3.items():
        for who, slots in (("ours", found.figure_3), ("paper", FIG3_DRAWN)):
            fig3.append((name, fig["max_len"], who, *slots[name]))
    for r in found.first_fill.values():
        parts = (getattr(r.usage, part) for part in PARTS)
        refusals.append((r.pool.name, r.num_requests, *parts, r.asked))
        drawn = pool_map(r.pool, found.setting.num_blocks).split("\n")
        maps += zip((r.pool.name, *[""] * (len(drawn) - 1)), drawn)
    for s in found.steady_states.values():
        system, mean = s.series.name, s.mean
        shares = map(mean.percent, PARTS)
        steady.append((system, "ours", mean.batch, *shares, mean.external_and_others, s.refused))
        if bar := paper.FIG2.get(system):  # not of a policy that is not the paper's
            theirs = (*(bar[part] for part in FIG3_PARTS), None, None, bar["external"], None)
            steady.append((system, "paper", paper.FIG13["ShareGPT"][system], *theirs))
    title, head = "Fig. 3: two requests, slot by slot", ("request", "maximum", "", *FIG3_PARTS)
    look = {"name": "fig3", "keys": ("request", "maximum", "who", *FIG3_PARTS), "index": 3}
    yield Table(title, head, fig3, **look)
    title, name = "Admitted in order until the first refusal, in slots", "contiguous_first_refusal"
    head = ("policy", "requests", *PARTS, "refused one asks")
    yield Table(title, head, refusals, line, name=name)
    title = f"The pool at the first refusal, {BLOCKS_PER_CHAR} blocks a character"
    look = {"picture": True, "name": "pool_map", "keys": ("policy", "line"), "index": 0}
    yield Table(title, ("policy", LEGEND), maps, line, **look)
    title = f"Steady state, mean of {ITERATIONS:,} iterations, percent of slots (Fig. 2)"
    head = ("policy", "", "batch", *PARTS, "external & others", "refused, enough free")
    line += ", ShareGPT lengths, saturated queue; the paper's batch is Fig. 13's"
    keys = ("policy", "who", "batch", *PARTS, "external_and_others", "refused_enough_free")
    look = {"name": "contiguous_steady_state", "keys": keys, "index": 2}
    yield Table(title, head, steady, line, **look)


def pool_map(pool: Pool, num_blocks: int) -> str:
    """Who has what in a contiguous pool, reservation by reservation."""
    spans = [(count, LETTERS[part]) for count, part in pool.spans]
    return block_map(num_blocks, pool.block_size, spans, per_char=BLOCKS_PER_CHAR)


def checks(found: Found) -> Iterator[Check]:
    """What must hold of each part."""
    setting, one, steady = found.setting, found.one_request, found.steady_states
    length, size = min(ONE_LENGTH, setting.max_len), setting.max_len
    right = (one.tokens, one.reserved, one.internal) == (length, 0, size - length)
    told = f"{one.tokens} tokens, {one.internal} never used"
    yield Check(f"{length} tokens in a {size}-slot reservation", right, told)
    same = found.figure_3 == FIG3_DRAWN
    yield Check("Fig. 3's slots", same, "both requests as drawn" if same else "differ from Fig. 3")
    agreed, counted = sum(s.mean.agreed for s in steady.values()), len(steady) * ITERATIONS
    told = "tokens and reserved equal their sums over the sequences in "
    told += f"{agreed:,} of {counted:,} iterations"
    yield Check("slot identity at every iteration", agreed == counted, told)
    # Holes need chunks of several sizes side by side: where a block holds the longest request, or
    # the pool no two of the largest chunks, there may be none. In a pool far above Table 1's a
    # large enough chunk is nearly always free as long as enough slots are.
    blocks = -(-setting.max_len // setting.block_size)
    few = blocks == 1 or setting.num_blocks < 2 << (blocks - 1).bit_length()
    many = setting.num_slots > max(table["slots"] for table in paper.TABLE1_DERIVED.values())
    for policy in ("pow2", "oracle"):
        refused = steady[policy].refused
        told = f"{refused} requests refused although enough slots were free"
        told += (few or many) * " (a pool of this size may have no holes)"
        yield Check(f"external fragmentation under {policy}", refused > 0 or few or many, told)
