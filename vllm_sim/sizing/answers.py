"""What capacity.py shows: one question, one table and one sentence of answer after the other.

Reproduces: section 3's bytes of a token, Table 1's slots, Fig. 2's parts of the slots and section
7.2's choice of the block size, for any model, GPU and workload.

    for section in sections(case):
        print(section.question, section.answer)
"""

from __future__ import annotations

from collections.abc import Iterator

from kv_cache_manager import MemoryUsage, PagedKVCacheManager
from vllm_sim import paper
from vllm_sim.models.memory_plan import requests_of_length
from vllm_sim.paper import GIB
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import counted
from vllm_sim.scenarios.report import Cell, Table
from vllm_sim.serving.systems import POLICIES
from vllm_sim.sizing.case import Case, Section, is_papers
from vllm_sim.sizing.concurrency import Holding, Means, hold, means

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # as in Fig. 18
TABLE_ENTRY_BYTES = 4  # int32
FORKS = 200  # prompts that are forked to count copies
# What pictures_capacity.py knows its tables by.
CONCURRENCY_QUESTION = "How many requests run at once?"
SLOT_QUESTION = "Where does every slot go, in the mean of a steady state?"
BLOCK_SIZE_QUESTION = "What does the block size change?"
SIMULATED = "simulated: "  # before the policy
GB = 10**9
MIB = 1 << 20


def sections(case: Case, progress: Progress = SILENT) -> Iterator[Section]:
    """All sections in order, each computed as it is asked for."""
    yield bytes_per_token(case)
    if case.windowed:
        yield bytes_by_length(case)
    yield memory(case)
    yield blocks_and_slots(case)
    holdings = [
        hold(
            case.workload,
            policy,
            case.plan.num_blocks,
            case.plan.block_size,
            case.max_len,
            case.seed,
            progress.part(number, len(POLICIES), f"steady state, {policy}"),
        )
        for number, policy in enumerate(POLICIES)
    ]
    found = means(case.workload, case.max_len, case.seed)
    yield concurrency(case, found, holdings)
    yield slot_table(case, holdings)
    yield block_sizes(case, found)


def bytes_per_token(case: Case) -> Section:
    """The formula with its inputs, all GPUs together and on each."""
    d, size = case.model, case.plan.sizes.kv_bytes
    rows: list[tuple[Cell, ...]]
    if d.latent:
        rows = [
            ("latent vector (kv_lora_rank)", d.latent.kv_rank, "for all heads, K and V in one"),
            ("+ key's rotary part", d.latent.rope_size, "qk_rope_head_dim, one for all heads"),
            ("x layers", d.num_layers, ""),
        ]
        formula = f"({d.latent.kv_rank} + {d.latent.rope_size}) x {d.num_layers}"
    else:
        said = f"not the {d.num_heads} query heads that share them"
        product = d.num_kv_heads * d.head_size
        rows = [
            ("K and V", 2, ""),
            ("x layers", d.num_layers, ""),
            ("x K/V heads", d.num_kv_heads, said if d.num_heads > d.num_kv_heads else ""),
            (
                "x head size",
                d.head_size,
                f"x K/V heads: {product:,}; the hidden size is {d.hidden_size:,}",
            ),
        ]
        formula = f"2 x {d.num_layers} x {d.num_kv_heads} x {d.head_size}"
    total = d.slot_elements * size
    per_gpu = case.plan.slot_bytes
    rows += [
        ("x bytes an element", size, f"{case.kv_type}: {8 * size} bits"),
        ("= bytes a token", total, "all layers: one slot"),
        ("bytes a token on each GPU", per_gpu, _split(case)),
    ]
    answer = (
        f"{formula} x {size} = {total:,} bytes a token, so 1 GiB of {_gpus(case)} "
        f"holds {GIB // per_gpu:,} tokens"
    )
    if d.latent or d.num_kv_heads < d.num_heads:
        value_size = d.latent.value_size if d.latent else d.head_size
        wrong = d.num_layers * d.num_heads * (d.head_size + value_size) * size
        answer += f"; with K and V for every query head it would be {wrong / total:.1f} times that"
    question = "How many bytes are the K and V of one token?"
    table = Table(
        question,
        ("factor", "value", ""),
        rows,
        case.line,
        name="bytes_per_token",
        keys=("factor", "value", "remark"),
    )
    return Section(table, answer + ".")


def _gpus(case: Case) -> str:
    return "the GPU" if case.plan.num_gpus == 1 else f"each of {case.plan.num_gpus} GPUs"


def _split(case: Case) -> str:
    d, gpus, heads = case.model, case.plan.num_gpus, case.plan.deployment.kv_heads
    if gpus == 1:
        return ""
    if d.latent:
        return "the latent vector is whole on every GPU: more GPUs do not make it smaller"
    if gpus > d.num_kv_heads:
        return f"fewer K/V heads than GPUs: each is copied to {gpus // d.num_kv_heads} of them"
    return f"{heads} of {d.num_kv_heads} K/V heads"


def bytes_by_length(case: Case) -> Section:
    """What windows save, by length."""
    d, size = case.model, case.plan.sizes.kv_bytes
    windows = sorted({layers.window for layers in d.cache_layers if layers.window})
    lengths = sorted(
        {*windows, *(1 << n for n in range(7, case.max_len.bit_length())), case.max_len}
    )
    whole = d.slot_elements * size
    rows = [
        (
            length,
            length * whole / MIB,
            d.cached_elements(length) * size / MIB,
            d.cached_elements(length) * size / length,
            100 * d.cached_elements(length) / (d.slot_elements * length),
        )
        for length in lengths
        if length <= case.max_len
    ]
    headers = ("tokens", "every layer whole, MiB", "with windows, MiB", "bytes a token", "% of it")
    kinds = ", ".join(
        f"{layers.count} layers keep " + (f"{layers.window:,} tokens" if layers.window else "all")
        for layers in d.cache_layers
    )
    answer = (
        f"{kinds}: a token is {whole:,} bytes up to {windows[0]:,} tokens and "
        f"{rows[-1][3]:,.0f} on average at {case.max_len:,}."
    )
    question = "How do the bytes a token change with the length, as windows drop what is behind?"
    setting = f"{case.line}; all GPUs together"
    keys = ("tokens", "whole_mib", "windowed_mib", "bytes_per_token", "windowed_percent")
    table = Table(question, headers, rows, setting, name="bytes_by_length", keys=keys)
    return Section(table, answer)


def memory(case: Case) -> Section:
    """The parts of each GPU's memory, in GiB and in GB."""
    p, w = case.plan, case.model.weights()
    parts = [
        ("held back", p.held_back),
        ("weights", p.weights),
        ("activations (estimate)" if p.workspace else "allowance as given", p.activations),
        ("workspace (assumed)", p.workspace),
        ("K and V", p.kv_cache),
        ("all, as CUDA reports it", p.memory),
    ]
    rows = [(what, n, n / GIB, n / GB, 100 * n / p.memory) for what, n in parts if n]
    params = f"{w.total / 1e9:.2f} B parameters"
    if case.model.experts:
        params += f" (a token passes {w.active / 1e9:.2f} B of them, memory holds all)"
    sold = f"; sold as {case.gpu.sold_gb} GB" if case.gpu.sold_gb else ""
    answer = (
        f"{p.kv_cache / GIB:.2f} GiB ({p.kv_cache / GB:.2f} GB) of each GPU's "
        f"{p.memory / GIB:.2f} GiB ({p.memory / GB:.2f} GB{sold}) are left for K and V beside "
        f"{params}."
    )
    headers = ("part", "bytes", "GiB", "GB", "%")
    question = "Where does the memory of each GPU go?"
    return Section(Table(question, headers, rows, case.line, decimals=2, name="memory"), answer)


def blocks_and_slots(case: Case) -> Section:
    """Blocks and slots, with Table 1's number where the deployment is the paper's."""
    p = case.plan
    rows: list[tuple[Cell, ...]] = [
        ("K/V memory of each GPU, bytes", p.kv_cache),
        ("/ bytes of a block there", p.slot_bytes * p.block_size),
        ("= blocks", p.num_blocks),
        ("x slots a block", p.block_size),
        ("= slots, one token each", p.num_slots),
    ]
    told = _table1(case)
    answer = (
        f"{counted(p.num_blocks, 'block')} of {counted(p.block_size, 'slot')}: room for "
        f"{counted(p.num_slots, 'token')}"
    )
    if told is not None:
        rows.append(("thousands of slots in the paper's Table 1", told))
        answer += f" (Table 1: {told}K)"
    question = "How many blocks and slots is that?"
    table = Table(
        question, ("", "number"), rows, case.line, name="blocks_and_slots", keys=("what", "number")
    )
    return Section(table, answer + ".")


def _table1(case: Case) -> float | None:
    papers = is_papers(case.plan.deployment)
    published = paper.TABLE1.get(case.model.name)
    return published["kilo_slots"] if published and papers and case.plan.name == "paper" else None


def concurrency(case: Case, found: Means, holdings: list[Holding]) -> Section:
    """Requests at once: by division, and by simulation."""
    plan = case.plan
    final, held = round(found.final), round(found.held)
    rows: list[tuple[Cell, ...]] = [
        ("all at full length", case.max_len, requests_of_length(plan, case.max_len)),
        ("all at the workload's mean final length", final, requests_of_length(plan, final)),
        ("all at the mean length while running", held, requests_of_length(plan, held)),
    ]
    rows += [(SIMULATED + h.policy, None, h.requests) for h in holdings]
    by_policy = {h.policy: h.requests for h in holdings}
    full = int(rows[0][2])
    answer = (
        f"memory holds {full:,} requests of {case.max_len:,} tokens; of this workload, paging "
        f"holds {by_policy['paged']:,.1f} at a time, "
        f"exact reservations {by_policy['oracle']:,.1f} and full-length ones "
        f"{by_policy['max']:,.1f}"
    )
    if not full:
        answer += "; not one request fits at full length, so a server would refuse this maximum"
    setting = f"{case.workload_line}; no limit but memory"
    if found.share_cut:
        answer += f"; {100 * found.share_cut:.0f} % of it was longer than the maximum and cut to it"
        setting += f"; {100 * found.share_cut:.1f} % of the requests cut to the maximum"
    if case.windowed:
        answer += "; the simulation holds every layer whole, so windows let more run than it says"
        setting += "; simulated without windows, every layer whole"
    headers = ("counted", "tokens a request", "requests")
    keys = ("counted", "tokens_per_request", "requests")
    table = Table(CONCURRENCY_QUESTION, headers, rows, setting, name="concurrency", keys=keys)
    return Section(table, answer + ".")


def slot_table(case: Case, holdings: list[Holding]) -> Section:
    """The slot identity of memory_usage.py under each policy."""
    capacity = case.plan.num_slots
    rows = [
        (
            h.policy,
            h.simulated_blocks,
            *(h.slots[part] for part in MemoryUsage.PARTS),
            100 * h.slots["tokens"] / capacity,
        )
        for h in holdings
    ]
    headers = ("policy", "blocks simulated", *MemoryUsage.PARTS, "tokens, %")
    share = {h.policy: 100 * h.slots["tokens"] / capacity for h in holdings}
    answer = (
        f"tokens are in {share['paged']:.1f} % of {capacity:,} slots under paging, in "
        f"{share['oracle']:.1f} % with exact and {share['max']:.1f} % with full-length "
        "reservations."
    )
    setting = f"{case.workload_line}; a part of a large pool is simulated, in proportion"
    table = Table(SLOT_QUESTION, headers, rows, setting, decimals=0, name="slots")
    return Section(table, answer)


def block_sizes(case: Case, found: Means) -> Section:
    """Padding, table, sharing and copies by block size."""
    prompts, outputs = case.workload.sample(FORKS, case.max_len, case.seed)
    lengths = (prompts + outputs).tolist()
    rows = []
    for size in BLOCK_SIZES:
        blocks = case.plan.kv_cache // (size * case.plan.slot_bytes)
        padding = sum(-length % size for length in lengths) / FORKS
        table = TABLE_ENTRY_BYTES * -(-case.max_len // size)
        shared = case.prefix_len - case.prefix_len % size
        copies = copies_per_fork(prompts.tolist(), size)
        rows.append(
            (
                size,
                blocks,
                padding,
                100 * padding / (found.final + padding),
                table,
                100 * shared / case.prefix_len if case.prefix_len else None,
                copies,
                size * case.plan.slot_bytes / MIB,
            )
        )
    headers = (
        "block size",
        "blocks",
        "padding, slots",
        "padding, %",
        "table, bytes",
        "prefix shared, %",
        "copies a fork",
        "MiB a copy",
    )
    at = min(BLOCK_SIZES, key=lambda size: abs(size - case.plan.block_size))
    row = rows[BLOCK_SIZES.index(at)]
    answer = (
        f"at {at} slots a block a finished request leaves {row[2]:.1f} slots of its last block "
        f"empty ({row[3]:.1f} %) and a table of {row[4]:,} bytes serves {case.max_len:,} tokens"
    )
    if row[5] is not None:
        answer += f"; {row[5]:.0f} % of a {case.prefix_len:,}-token prefix is in whole blocks"
    setting = f"{case.workload_line}; prefix of {case.prefix_len:,} tokens; sizes on each GPU"
    table = Table(BLOCK_SIZE_QUESTION, headers, rows, setting, decimals=2, name="block_sizes")
    return Section(table, answer + ".")


def copies_per_fork(prompt_lens: list[int], block_size: int) -> float:
    """Copy-on-write copies when parent and child of a fork each write a token, on average."""
    blocks = -(-max(prompt_lens) // block_size) + 2
    manager = PagedKVCacheManager(blocks, block_size, watermark=0.0)
    copies = 0
    for prompt_len in prompt_lens:
        manager.allocate(0, prompt_len)
        manager.fork(0, 1)
        copies += len(manager.append(0)) + len(manager.append(1))
        manager.free(0)
        manager.free(1)
    return copies / len(prompt_lens)
