"""What capacity.py shows: one question, one table and one sentence of answer after the other.

Reproduces: section 3's bytes of a token, Table 1's slots, Fig. 2's parts of the slots and section
7.2's choice of the block size, for any model, GPU and workload.

    found = survey(case)
    print(found.answer, *(section.title for section in found.sections))
"""

from __future__ import annotations

from collections.abc import Iterator

from kv_cache_manager import MemoryUsage
from vllm_sim import paper
from vllm_sim.models.memory_plan import requests_of_length
from vllm_sim.paper import BLOCK_SIZES, GIB
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import counted
from vllm_sim.serving.systems import PAGED, POLICIES, new_manager
from vllm_sim.sizing.case import Case, Section, Survey, is_papers
from vllm_sim.sizing.concurrency import Holding, Means, hold, means, reserved

TABLE_ENTRY_BYTES = 4  # int32
FORKS = 200  # prompts that are forked to count copies
SIMULATED = "simulated: "  # before the policy
GB, MIB = 10**9, 1 << 20
WHAT = ("what", "number")  # keys of tables whose first column has no header


def survey(case: Case, progress: Progress = SILENT) -> Survey:
    """How many requests run at a time, and all sections in order."""
    plan, held = case.plan, []
    for number, policy in enumerate(POLICIES):
        part = progress.part(number, len(POLICIES), f"steady state, {policy}")
        pool = plan.num_blocks, plan.block_size
        held.append(hold(case.workload, policy, *pool, case.max_len, case.seed, part))
    found = means(case.workload, case.max_len, case.seed)
    simulated = [concurrency(case, found, held), slot_table(case, held), block_sizes(case, found)]
    return Survey(headline(case, found, held), [*memory_sections(case), *simulated])


def headline(case: Case, found: Means, held: list[Holding]) -> str:
    """The answer in one line: requests at a time under paging."""
    (requests,) = (h.requests for h in held if h.policy == PAGED)
    where = f"{case.told} on {case.plan.num_gpus} x {case.gpu.name}, {case.kv_type} K/V"
    told = (
        f"{where}: {requests:,.{int(requests < 100)}f} requests of {case.workload.told} at a time"
    )
    if found.share_cut:
        told += f", {100 * found.share_cut:.0f} % of them cut to {case.max_len:,} tokens"
    return told


def memory_sections(case: Case) -> Iterator[Section]:
    """Those that need no workload: bytes of a token, parts of the memory, blocks."""
    yield bytes_per_token(case)
    if case.windowed:
        yield bytes_by_length(case)
    yield memory(case)
    yield blocks_and_slots(case)


def bytes_per_token(case: Case) -> Section:
    """The formula with its inputs, all GPUs together and on each."""
    m, plan, size = case.model, case.plan, case.plan.sizes.kv_bytes
    if m.latent:
        rows = [
            ("latent vector (kv_lora_rank)", m.latent.kv_rank, "for all heads, K and V in one"),
            ("+ key's rotary part", m.latent.rope_size, "qk_rope_head_dim, one for all heads"),
            ("x layers", m.num_layers, ""),
        ]
        formula = f"({m.latent.kv_rank} + {m.latent.rope_size}) x {m.num_layers}"
    else:
        shared = f"not the {m.num_heads} query heads that share them"
        product = f"x K/V heads: {m.num_kv_heads * m.head_size:,}"
        rows = [
            ("K and V", 2, ""),
            ("x layers", m.num_layers, ""),
            ("x K/V heads", m.num_kv_heads, shared if m.num_heads > m.num_kv_heads else ""),
            ("x head size", m.head_size, f"{product}; the hidden size is {m.hidden_size:,}"),
        ]
        formula = f"2 x {m.num_layers} x {m.num_kv_heads} x {m.head_size}"
    total = m.slot_elements * size
    rows += [
        ("x bytes an element", size, f"{case.kv_type}: {8 * size} bits"),
        ("= bytes a token", total, "all layers: one slot"),
        ("bytes a token on each GPU", plan.slot_bytes, _split(case)),
    ]
    gpus = "the GPU" if plan.num_gpus == 1 else f"each of {plan.num_gpus} GPUs"
    answer = (
        f"{formula} x {size} = {total:,} bytes a token, so 1 GiB of {gpus} "
        f"holds {GIB // plan.slot_bytes:,} tokens"
    )
    if m.latent or m.num_kv_heads < m.num_heads:
        value_size = m.latent.value_size if m.latent else m.head_size
        wrong = m.num_layers * m.num_heads * (m.head_size + value_size) * size
        answer += f"; with K and V for every query head it would be {wrong / total:.1f} times that"
    return Section(
        "How many bytes are the K and V of one token?",
        ("factor", "value", ""),
        rows,
        case.line,
        name="bytes_per_token",
        keys=("factor", "value", "remark"),
        answer=answer + ".",
    )


def _split(case: Case) -> str:
    m, gpus, heads = case.model, case.plan.num_gpus, case.plan.deployment.kv_heads
    if gpus == 1:
        return ""
    if m.latent:
        return "the latent vector is whole on every GPU: more GPUs do not make it smaller"
    if gpus > m.num_kv_heads:
        return f"fewer K/V heads than GPUs: each is copied to {gpus // m.num_kv_heads} of them"
    return f"{heads} of {m.num_kv_heads} K/V heads"


def bytes_by_length(case: Case) -> Section:
    """What windows save, by length."""
    m, size, most = case.model, case.plan.sizes.kv_bytes, case.max_len
    windows = sorted({layers.window for layers in m.cache_layers if layers.window})
    lengths = {*windows, *(1 << n for n in range(7, most.bit_length())), most}
    whole = m.slot_elements * size
    rows = []
    for length in sorted(n for n in lengths if n <= most):
        kept, percent = m.cached_elements(length) * size, 100 * m.cached_elements(length)
        percent /= m.slot_elements * length
        rows.append((length, length * whole / MIB, kept / MIB, kept / length, percent))
    kinds = ", ".join(
        f"{layers.count} layers keep " + (f"{layers.window:,} tokens" if layers.window else "all")
        for layers in m.cache_layers
    )
    return Section(
        "How do the bytes a token change with the length, as windows drop what is behind?",
        ("tokens", "every layer whole, MiB", "with windows, MiB", "bytes a token", "% of it"),
        rows,
        f"{case.line}; all GPUs together",
        name="bytes_by_length",
        answer=f"{kinds}: a token is {whole:,} bytes up to {windows[0]:,} tokens and "
        f"{rows[-1][3]:,.0f} on average at {most:,}.",
    )


def memory(case: Case) -> Section:
    """The parts of each GPU's memory, in GiB and in GB."""
    p, w = case.plan, case.model.weights()
    parts = (
        ("held back", p.held_back),
        ("weights", p.weights),
        ("activations (estimate)" if p.workspace else "allowance as given", p.activations),
        ("workspace (assumed)", p.workspace),
        ("K and V", p.kv_cache),
        ("all, as CUDA reports it", p.memory),
    )
    params = f"{w.total / 1e9:.2f} B parameters"
    if case.model.experts:
        params += f" (a token passes {w.active / 1e9:.2f} B of them, memory holds all)"
    sold = f"; sold as {case.gpu.sold_gb} GB" if case.gpu.sold_gb else ""
    return Section(
        "Where does the memory of each GPU go?",
        ("part", "bytes", "GiB", "GB", "%"),
        [(what, n, n / GIB, n / GB, 100 * n / p.memory) for what, n in parts if n],
        case.line,
        decimals=2,
        name="memory",
        answer=f"{p.kv_cache / GIB:.2f} GiB ({p.kv_cache / GB:.2f} GB) of each GPU's "
        f"{p.memory / GIB:.2f} GiB ({p.memory / GB:.2f} GB{sold}) are left for K and V beside "
        f"{params}.",
    )


def blocks_and_slots(case: Case) -> Section:
    """Blocks and slots, with Table 1's number where the deployment is the paper's."""
    p = case.plan
    rows = [
        ("K/V memory of each GPU, bytes", p.kv_cache),
        ("/ bytes of a block there", p.slot_bytes * p.block_size),
        ("= blocks", p.num_blocks),
        ("x slots a block", p.block_size),
        ("= slots, one token each", p.num_slots),
    ]
    answer = (
        f"{counted(p.num_blocks, 'block')} of {counted(p.block_size, 'slot')}: room for "
        f"{counted(p.num_slots, 'token')}"
    )
    published = paper.TABLE1.get(case.model.name)
    if published and is_papers(p.deployment) and p.name == "paper":
        rows.append(("thousands of slots in the paper's Table 1", published["kilo_slots"]))
        answer += f" (Table 1: {published['kilo_slots']}K)"
    question, answer = "How many blocks and slots is that?", answer + "."
    form = {"name": "blocks_and_slots", "keys": WHAT, "answer": answer}
    return Section(question, ("", "number"), rows, case.line, **form)


def concurrency(case: Case, found: Means, held: list[Holding]) -> Section:
    """Requests at once: by division, and by simulation."""
    lengths = {
        "all at full length": case.max_len,
        "all at the workload's mean final length": round(found.final),
        "all at the mean length while running": round(found.held),
    }
    rows = [(what, n, requests_of_length(case.plan, n)) for what, n in lengths.items()]
    full, slots = int(rows[0][2]), reserved(case.max_len, case.plan.block_size)
    rows += [(SIMULATED + h.policy, None, h.requests) for h in held]
    by_policy = {h.policy: h.requests for h in held}
    answer = (
        f"paging would hold {full:,} requests if all had {case.max_len:,} tokens; of this workload "
        f"it holds {by_policy['paged']:,.1f} at a time, exact reservations "
        f"{by_policy['oracle']:,.1f}, and reservations of {slots:,} slots, whatever the request, "
        f"{by_policy['max']:,.1f}"
    )
    setting = f"{case.workload_line}; no limit but memory"
    if not full:
        answer += "; not one request fits at full length, so a server would refuse this maximum"
    if found.share_cut:
        answer += f"; {100 * found.share_cut:.0f} % of it was longer than the maximum and cut to it"
        setting += f"; {100 * found.share_cut:.1f} % of the requests cut to the maximum"
    if case.windowed:
        answer += "; the simulation holds every layer whole, so windows let more run than it says"
        setting += "; simulated without windows, every layer whole"
    question, headers = (
        "How many requests run at once?",
        ("counted", "tokens a request", "requests"),
    )
    return Section(question, headers, rows, setting, name="concurrency", answer=answer + ".")


def slot_table(case: Case, held: list[Holding]) -> Section:
    """The slot identity of MemoryUsage under each policy."""
    capacity, parts = case.plan.num_slots, MemoryUsage.PARTS
    share = {h.policy: 100 * h.slots["tokens"] / capacity for h in held}
    rows = [
        (h.policy, h.simulated_blocks, *(h.slots[part] for part in parts), share[h.policy])
        for h in held
    ]
    return Section(
        "Where does every slot go, in the mean of a steady state?",
        ("policy", "blocks simulated", *parts, "tokens, %"),
        rows,
        f"{case.workload_line}; a part of a large pool is simulated, in proportion",
        decimals=0,
        name="slots",
        answer=f"tokens are in {share['paged']:.1f} % of {capacity:,} slots under paging, in "
        f"{share['oracle']:.1f} % with exact and {share['max']:.1f} % with full-length "
        "reservations.",
    )


def block_sizes(case: Case, found: Means) -> Section:
    """Padding, table, sharing and copies by block size."""
    prompts, outputs = case.workload.sample(FORKS, case.max_len, case.seed)
    lengths, prefix, slot = (prompts + outputs).tolist(), case.prefix_len, case.plan.slot_bytes
    rows = {}
    for size in BLOCK_SIZES:
        padding = sum(-length % size for length in lengths) / FORKS
        rows[size] = (
            size,
            case.plan.kv_cache // (size * slot),
            padding,
            100 * padding / (found.final + padding),
            TABLE_ENTRY_BYTES * -(-case.max_len // size),
            100 * (prefix - prefix % size) / prefix if prefix else None,
            copies_per_fork(prompts.tolist(), size),
            size * slot / MIB,
        )
    headers = ("block size", "blocks", "padding, slots", "padding, %", "table, bytes")
    headers += ("prefix shared, %", "copies a fork", "MiB a copy")
    at = min(BLOCK_SIZES, key=lambda size: abs(size - case.plan.block_size))
    _, _, slots, percent, table, shared, *_ = rows[at]
    answer = (
        f"at {at} slots a block a finished request leaves {slots:.1f} slots of its last block "
        f"empty ({percent:.1f} %) and a table of {table:,} bytes serves {case.max_len:,} tokens"
    )
    if shared is not None:
        answer += f"; {shared:.0f} % of a {prefix:,}-token prefix is in whole blocks"
    return Section(
        "What does the block size change?",
        headers,
        [*rows.values()],
        f"{case.workload_line}; prefix of {prefix:,} tokens; sizes on each GPU",
        decimals=2,
        name="block_sizes",
        answer=answer + ".",
    )


def copies_per_fork(prompt_lens: list[int], block_size: int) -> float:
    """Copy-on-write copies when parent and child of a fork each write a token, on average."""
    blocks = -(-max(prompt_lens) // block_size) + 2
    manager = new_manager(PAGED, blocks, block_size, watermark=0.0)
    copies = 0
    for prompt_len in prompt_lens:
        manager.allocate(0, prompt_len)
        manager.fork(0, 1)
        copies += len(manager.append(0)) + len(manager.append(1))
        manager.free(0)
        manager.free(1)
    return copies / len(prompt_lens)
