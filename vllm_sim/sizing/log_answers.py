"""What capacity.py --log shows: each part of a server's memory, ours beside what it logged.

Reproduces nothing of the paper: Table 1's question, held against a server that runs. The log says
what was served and how (server_log.py); what it does not say is asked for by options.

    found = answer_log(case, read_log("server.log"))
    found.answer, found.sections
"""

from __future__ import annotations

import re

from vllm_sim.models.memory_plan import logged_concurrency, requests_of_length
from vllm_sim.paper import GIB
from vllm_sim.sizing.answers import LOGGED, how_good, memory_sections
from vllm_sim.sizing.case import Case, Section, Survey
from vllm_sim.sizing.server_log import ServerLog

OLDEST = (0, 11)  # of the versions in ENGINES
NEAR_GIB, NEAR = 0.1, 0.02  # a part that is nearer is not off
Row = tuple[str, float | None, float | None]


def answer_log(case: Case, log: ServerLog) -> Survey:
    """The comparison, and where the memory goes by our plan."""
    sizes, counts = parts(case, log), pools(case, log)
    found = _comparison(case, log, sizes, counts)
    kv = next((row for row in sizes if row[0] == "K and V"), None)
    told = f"{case.told} on {case.gpus}"
    if kv is not None and kv[2]:
        told += f": {kv[1]:.2f} GiB for K and V on each GPU, logged {kv[2]:.2f}"
        told += f" ({100 * (kv[1] / kv[2] - 1):+.1f} %)"
    good = how_good(case.plan)
    if log.version and older(log.version):
        good = f"; vLLM {log.version} is older than any whose logs it was held against"
    return Survey(told + good, [found, *memory_sections(case)])


def older(version: str) -> bool:
    """Whether it is before the first version of ENGINES."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < OLDEST


def parts(case: Case, log: ServerLog) -> list[Row]:
    """(part, ours, logged) in GiB on one GPU; of those that a plan and the log can have."""
    plan, kv = case.plan, log.kv_cache_gib
    theirs_graphs = log.cuda_graphs_reserved_gib
    if kv is None and not case.model.windows:  # what its counts come to
        tokens = log.kv_tokens or (log.num_gpu_blocks or 0) * plan.block_size
        kv = tokens * plan.slot_bytes / GIB or None
    rows = [
        ("memory", plan.memory / GIB, log.total_gib),
        ("weights", plan.weights / GIB, log.weights_gib),
        ("activations", plan.activations / GIB, log.activations_gib),
        ("outside torch", plan.outside / GIB, log.non_torch_gib),
        ("CUDA graphs, taken out", plan.graphs / GIB or None, theirs_graphs),
        ("K and V", plan.kv_cache / GIB, kv),
    ]
    return [row for row in rows if row[1] is not None or row[2] is not None]


def pools(case: Case, log: ServerLog) -> list[Row]:
    """The same of what the K/V memory holds. With windows vLLM's counts are of padded groups."""
    plan, length = case.plan, log.concurrency_tokens or case.max_len
    blocks, tokens = (None, None) if case.model.windows else (plan.num_blocks, plan.num_slots)
    rows = [
        ("blocks", blocks, log.num_gpu_blocks),
        ("tokens", tokens, log.kv_tokens),
        (f"{LOGGED}, {length:,} tokens", logged_concurrency(plan, length), log.max_concurrency),
    ]
    if case.windowed:
        ours = requests_of_length(plan, length)
        rows.append((f"requests of {length:,} tokens, windows counted", ours, None))
    return rows


def off(ours: float | None, logged: float | None) -> bool:
    """Whether a part is further from the log than parts of this size usually are."""
    if ours is None or logged is None:
        return False
    return abs(ours - logged) > max(NEAR_GIB, NEAR * abs(logged))


def _comparison(case: Case, log: ServerLog, sizes: list[Row], counts: list[Row]) -> Section:
    rows = [(*row, *_difference(*row[1:])) for row in (*sizes, *counts)]
    wrong = [row for row in sizes if row[0] not in ("memory", "K and V") and off(*row[1:])]
    wrong.sort(key=lambda row: -abs(row[1] - row[2]))
    both = [row for row in sizes if row[1] is not None and row[2] is not None]
    if wrong:
        name, ours, logged = wrong[0]
        answer = f"off is {name}: {ours:.2f} GiB by our plan, {logged:.2f} in the log"
        if more := [row[0] for row in wrong[1:]]:
            answer += f"; then {', '.join(more)}"
    elif not both:
        answer = "the log states no part of the memory"
    elif any(off(*row[1:]) for row in both if row[0] == "K and V"):
        answer = "K and V are off, and the log does not state the part that makes the difference"
    else:
        answer = f"no part is off by more than {NEAR_GIB:g} GiB and {100 * NEAR:g} %"
    version = log.version or "of a version that it does not state"
    return Section(
        "Does it match what the server logged?",
        ("of one GPU, in GiB; then of the server", "ours", "logged", "difference", "%"),
        rows,
        f"{case.line}; log of {log.model or 'a model'} on vLLM {version}, "
        f"{log.tensor_parallel or 1} x {log.pipeline_parallel or 1} GPUs",
        decimals=2,
        name="log",
        answer=answer + ".",
    )


def _difference(ours: float | None, logged: float | None) -> tuple[float | None, float | None]:
    if ours is None or logged is None:
        return None, None
    return ours - logged, 100 * (ours / logged - 1) if logged else None
