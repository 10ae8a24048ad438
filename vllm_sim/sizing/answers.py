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
from vllm_sim.models.memory_plan import Plan, logged_concurrency, requests_of_length
from vllm_sim.models.model import ENCODER, FULL, LATENT, NONE, STATE, WINDOW
from vllm_sim.models.presets import GIVEN
from vllm_sim.paper import BLOCK_SIZES, GIB
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import counted
from vllm_sim.serving.systems import PAGED, POLICIES, new_manager
from vllm_sim.sizing.case import Case, Section, Survey, is_papers
from vllm_sim.sizing.concurrency import Holding, Means, hold, kept_less, means, reserved
from vllm_sim.sizing.measured import errors_of

TABLE_ENTRY_BYTES = 4  # int32
FORKS = 200  # prompts that are forked to count copies
SIMULATED = "simulated: "  # before the policy
GB, MIB = 10**9, 1 << 20
LOGGED = "what vLLM logs as maximum concurrency"
KEPT = {  # by a layer's kind
    FULL: "K and V of all tokens",
    WINDOW: "K and V of the last {window:,} tokens",
    LATENT: "a latent vector for each token",
    STATE: "a state, whatever the length",
    NONE: "nothing of its own",
}
WHAT = ("what", "number")  # keys of tables whose first column has no header


def survey(case: Case, progress: Progress = SILENT) -> Survey:
    """How many requests run at a time, and all sections in order."""
    plan, held = case.plan, []
    found = means(case.workload, case.max_len, case.seed)
    if not plan.slot_bytes:  # nothing grows with the length: no blocks to simulate
        return Survey(headline(case, found, held), [*memory_sections(case), states(case)])
    for number, policy in enumerate(POLICIES):
        part = progress.part(number, len(POLICIES), f"steady state, {policy}")
        pool = plan.num_blocks, plan.block_size
        held.append(hold(case.workload, policy, *pool, case.max_len, case.seed, part))
    simulated = [concurrency(case, found, held), slot_table(case, held), block_sizes(case, found)]
    return Survey(headline(case, found, held), [*memory_sections(case), *simulated])


def headline(case: Case, found: Means, held: list[Holding]) -> str:
    """The answer in one line: requests at a time under paging, and how good such answers were."""
    requests = float(case.plan.num_blocks)
    for holding in held:
        if holding.policy == PAGED:
            requests = with_states(case, holding, kept_factor(case))
    told = f"{case.told} on {case.gpus}, {case.kv_type} K/V: "
    told += f"{requests:,.{int(requests < 100)}f} requests of {case.workload.told} at a time"
    if found.share_cut:
        share = f"{100 * found.share_cut:.0f}" if found.share_cut >= 0.01 else "under 1"
        told += f", {share} % of them cut to {case.max_len:,} tokens"
    batch = case.plan.batch
    if batch is not None and requests > batch.seqs:
        told += f", of which max_num_seqs lets {batch.seqs:,} run"
    return told + how_good(case.plan)


def how_good(plan: Plan) -> str:
    """The error that was measured of this kind of plan; nothing of the paper's."""
    if plan.engine is None:
        return ""
    error = errors_of(plan.engine, plan.num_gpus > 1)
    if error is None:
        return "; no log of this kind was at hand to hold its memory against"
    return (
        f"; K/V memory was {error.median:.1f} % off in the median, {error.most:.1f} % at most, on "
        f"{counted(error.logs, 'log')} of {plan.engine.told} on {error.kind}"
    )


def kept_factor(case: Case) -> float:
    """Requests with windows and states, over as many as whole layers would let run."""
    if not case.windowed and not case.plan.state_bytes:
        return 1.0
    return kept_less(case.plan, case.workload, case.max_len, case.seed)


def with_states(case: Case, holding: Holding, factor: float) -> float:
    """Requests that a policy lets run, each with its states; `factor` is paging's."""
    if holding.policy == PAGED:
        return holding.requests * factor
    return holding.requests / (1.0 + holding.requests * case.plan.state_bytes / case.plan.kv_cache)


def memory_sections(case: Case) -> Iterator[Section]:
    """Those that need no workload: bytes of a token, parts of the memory, blocks."""
    yield bytes_per_token(case)
    if case.windowed:
        yield bytes_by_length(case)
    yield memory(case)
    if case.plan.slot_bytes:
        yield blocks_and_slots(case)


def bytes_per_token(case: Case) -> Section:
    """The formula with its inputs where all layers are alike, else a row for each kind."""
    m, plan, size = case.model, case.plan, case.plan.sizes.kv_bytes
    (first, *others) = m.layers
    total = round((m.slot_elements + m.extra_elements) * size)
    if others or first.kind == STATE or first.extra or m.family == GIVEN:
        return _by_kind(case, total)
    if first.kind == LATENT:
        rows = [("latent vector, with its rotary part", first.elements, "K and V of all heads")]
        formula = f"{first.elements} x {m.num_layers}"
    else:
        shared = f"not the {m.num_heads} query heads that share them"
        product = f"x K/V heads: {m.num_kv_heads * m.head_size:,}"
        rows = [
            ("K and V", 2, ""),
            ("x K/V heads", m.num_kv_heads, shared if m.num_heads > m.num_kv_heads else ""),
            ("x head size", m.head_size, f"{product}; the hidden size is {m.hidden_size:,}"),
        ]
        formula = f"2 x {m.num_layers} x {m.num_kv_heads} x {m.head_size}"
    rows += [
        ("x layers", m.num_layers, ""),
        ("x bytes an element", size, f"{case.kv_type}: {8 * size} bits"),
        ("= bytes a token", total, "all layers: one slot"),
        ("bytes a token on each GPU", plan.slot_bytes, _split(case)),
    ]
    gpus = "the GPU" if plan.num_gpus == 1 else f"each of {plan.num_gpus} GPUs"
    answer = (
        f"{formula} x {size} = {total:,} bytes a token, so 1 GiB of {gpus} "
        f"holds {GIB // plan.slot_bytes:,} tokens"
    )
    wrong = m.num_layers * m.num_heads * first.head_sizes * size
    if wrong > total:
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


def _by_kind(case: Case, total: int) -> Section:
    """What each kind of layer keeps, in all layers of that kind."""
    m, size, gpus = case.model, case.plan.sizes.kv_bytes, case.plan.deployment.num_gpus
    rows = []
    for layers in m.layers:
        slot = layers.count * (layers.elements + layers.extra) * size
        kept = KEPT[layers.kind].format(window=layers.window)
        told = layers.count, kept, layers.elements, layers.extra or None, slot
        rows.append((*told, layers.count * layers.state_bytes, layers.slot_bytes(size, gpus)))
    headers = ("layers", "keep", "K and V, elements", "beside them", "bytes a token")
    answer = f"{total:,} bytes a token in all layers"
    if m.state_bytes:
        answer += f", and {m.state_bytes:,} bytes a sequence, whatever its length"
    if case.plan.slot_bytes:
        answer += f"; {case.plan.slot_bytes:,} bytes a token on each GPU"
    return Section(
        "What does each layer keep of a token, and of a sequence?",
        (*headers, "bytes a sequence", "bytes a token on each GPU"),
        rows,
        case.line,
        name="bytes_per_token",
        answer=answer + ".",
    )


def _split(case: Case) -> str:
    m, deployment = case.model, case.plan.deployment
    gpus, stages, told = deployment.num_gpus, deployment.pipeline, []
    if stages > 1:
        told.append(f"{deployment.stages[case.plan.stage]} of {m.num_layers} layers")
    if gpus > 1 and m.latent:
        told.append("the latent vector is whole on every GPU: more GPUs do not make it smaller")
    elif gpus > m.num_kv_heads:
        copies = gpus // m.num_kv_heads
        told.append(f"fewer K/V heads than GPUs: each is copied to {copies} of them")
    elif gpus > 1:
        told.append(f"{deployment.kv_heads} of {m.num_kv_heads} K/V heads")
    return ", ".join(told)


def bytes_by_length(case: Case) -> Section:
    """What windows save, by length."""
    m, size, most = case.model, case.plan.sizes.kv_bytes, case.max_len
    windows = m.windows
    lengths = {*windows, *(1 << n for n in range(7, most.bit_length())), most}
    whole = (m.slot_elements + m.extra_elements) * size
    rows = []
    for length in sorted(n for n in lengths if n <= most):
        kept = m.cached_bytes(length, size)
        rows.append((length, length * whole / MIB, kept / MIB, kept / length))
        rows[-1] = (*rows[-1], 100 * kept / (whole * length))
    kinds = ", ".join(
        f"{layers.count} layers keep " + (f"{layers.window:,} tokens" if layers.window else "all")
        for layers in m.layers
        if layers.elements
    )
    return Section(
        "How do the bytes a token change with the length, as windows drop what is behind?",
        ("tokens", "every layer whole, MiB", "with windows, MiB", "bytes a token", "% of it"),
        rows,
        f"{case.line}; all GPUs together",
        name="bytes_by_length",
        answer=f"{kinds}: a token is {whole:,.0f} bytes up to {windows[0]:,} tokens and "
        f"{rows[-1][3]:,.0f} on average at {most:,}.",
    )


def memory(case: Case) -> Section:
    """The parts of each GPU's memory, in GiB and in GB."""
    p, m = case.plan, case.model
    parts = (
        ("held back", p.held_back),
        ("weights", p.weights),
        ("activations" if p.outside else "allowance as given", p.activations),
        ("outside torch" if p.engine else "workspace (assumed)", p.outside),
        ("CUDA graphs", p.graphs),
        ("K and V", p.kv_cache),
        ("all, as CUDA reports it", p.memory),
    )
    params = f"{m.num_params / 1e9:.2f} B parameters"
    if m.num_experts:
        params += f" (a token passes {m.active_params / 1e9:.2f} B of them, memory holds all)"
    if encoders := m.params(ENCODER):
        params += f", {encoders / 1e9:.2f} B of them of encoders"
    sold = f"; sold as {case.gpu.sold_gb} GB" if case.gpu.sold_gb else ""
    stages = p.deployment.pipeline
    where = f", stage {p.stage + 1} of {stages}, which has the least room" if stages > 1 else ""
    return Section(
        "Where does the memory of each GPU go?",
        ("part", "bytes", "GiB", "GB", "%"),
        [(what, n, n / GIB, n / GB, 100 * n / p.memory) for what, n in parts if n],
        case.line,
        decimals=2,
        name="memory",
        answer=f"{p.kv_cache / GIB:.2f} GiB ({p.kv_cache / GB:.2f} GB) of each GPU's "
        f"{p.memory / GIB:.2f} GiB ({p.memory / GB:.2f} GB{sold}) are left for K and V beside "
        f"{params}{where}.",
    )


def blocks_and_slots(case: Case) -> Section:
    """Blocks and slots, with Table 1's number where the deployment is the paper's."""
    p = case.plan
    rows = [
        ("K/V memory of each GPU, bytes", p.kv_cache),
        ("/ bytes of a block there", p.block_bytes),
        ("= blocks", p.num_blocks),
        ("x slots a block", p.block_size),
        ("= slots, one token each", p.num_slots),
    ]
    answer = (
        f"{counted(p.num_blocks, 'block')} of {counted(p.block_size, 'slot')}: room for "
        f"{counted(p.num_slots, 'token')}"
    )
    if case.windowed:
        answer += ", every layer whole"
    published = paper.TABLE1.get(case.model.name)
    if published and is_papers(p.deployment) and p.name == "paper":
        rows.append(("thousands of slots in the paper's Table 1", published["kilo_slots"]))
        answer += f" (Table 1: {published['kilo_slots']}K)"
    question, answer = "How many blocks and slots is that?", answer + "."
    form = {"name": "blocks_and_slots", "keys": WHAT, "answer": answer}
    return Section(question, ("", "number"), rows, case.line, **form)


def states(case: Case) -> Section:
    """Sequences of a model that keeps nothing but states."""
    count, batch = case.plan.num_blocks, case.plan.batch
    rows = [("states that fit", count)]
    if batch is not None:
        rows.append(("max_num_seqs", batch.seqs))
    return Section(
        "How many requests run at once?",
        ("", "number"),
        rows,
        case.line,
        name="concurrency",
        keys=WHAT,
        answer=f"{count:,} states of {case.plan.state_bytes:,} bytes, however long the requests.",
    )


def concurrency(case: Case, found: Means, held: list[Holding]) -> Section:
    """Requests at once: by division, and by simulation."""
    lengths = {
        "all at full length": case.max_len,
        "all at the workload's mean final length": round(found.final),
        "all at the mean length while running": round(found.held),
    }
    rows = [(what, n, requests_of_length(case.plan, n)) for what, n in lengths.items()]
    full, slots = int(rows[0][2]), reserved(case.max_len, case.plan.block_size)
    factor, batch = kept_factor(case), case.plan.batch
    by_policy = {h.policy: with_states(case, h, factor) for h in held}
    rows += [(SIMULATED + policy, None, requests) for policy, requests in by_policy.items()]
    logged = logged_concurrency(case.plan, case.max_len) if case.plan.engine else None
    if logged is not None:
        rows.append((LOGGED, case.max_len, logged))
    if batch is not None:
        rows.append(("max_num_seqs: as many run at the most", None, batch.seqs))
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
    if factor != 1.0:
        answer += "; windows count under paging, states under all"
        setting += "; paging with windows, reservations with every layer whole, all with states"
    if logged is not None and case.windowed:
        answer += (
            f"; what vLLM logs as its maximum concurrency, {logged:,.1f}, pads kinds of layers to "
            "equal groups and gives each window room for an iteration's tokens"
        )
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
