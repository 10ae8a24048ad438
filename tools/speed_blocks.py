"""What README.md and docs/ show of the benchmarks, for tools/update_readme.py.

Reproduces nothing. Each function is the text between two markers: `serving`, `manager` (Python on
one core), `gpu`, `gpu_attention`, `gpu_aims`, `gpu_gaps`, `gpu_others`,
`gpu_profile`, `gpu_paging` (kernels, left out until they are recorded).
"""

from __future__ import annotations

import sys
from dataclasses import replace

from committed import ROOT, find, has, load, origin, setting, table
from committed import rows as rows_of

from vllm_sim.scenarios.report import Table, render

SERVING_AIMS = {  # trace: s
    "13B single, 2.0/s, 1 h": 0.15,
    "13B parallel 6, 7.0/s, 1 h": 0.5,
    "13B beam 6, 7.0/s, 1 h": 5.0,
    "Azure conversations, 2023": 0.5,
}
ALL_AIM_S = 90.0  # everything, on 2 cores
APPEND_AIM_NS = 130.0
APPEND_ALL_AIMS_NS = {"W1": 10.0, "W2": 3.0, "W3": 10.0}
ATTENTION, PAGING = "bench_attention.json", "bench_paging_cost.json"
PROFILE = "profile_attention.json"


def serving() -> str:
    """The speed of the simulator."""
    result = load("bench_serving.json")
    rows = [
        (
            row["trace"],
            row["requests"],
            row["decode_tokens"],
            row["iterations"],
            row["seconds"],
            SERVING_AIMS.get(row["trace"]),
            row["ns_per_token"],
            row["x_call"],
            row["plain_seconds"],
            row["speed_up"],
        )
        for row in rows_of(result, "rows")
    ]
    headers = (
        "trace",
        "requests",
        "decode tokens",
        "iterations",
        "s",
        "aim, s",
        "ns a token",
        "x empty call",
        "one by one, s",
        "speed-up",
    )
    every = load("reproduce.json")
    all_s = every["output"]["elapsed_s"]
    aims = [
        (row["seconds"], SERVING_AIMS[row["trace"]])
        for row in rows_of(result, "rows")
        if row["trace"] in SERVING_AIMS
    ]
    aims.append((all_s, ALL_AIM_S))
    missed = [seconds / aim for seconds, aim in aims if seconds > aim]
    by = f", by factors of {min(missed):.1f} to {max(missed):.1f}" if missed else ""
    return "\n\n".join(
        [
            origin(result, "bench_serving.json"),
            table(headers, rows, decimals=2),
            f"Everything: {all_s:.0f} s, aim {ALL_AIM_S:.0f} s; {origin(every, 'reproduce.json')}. "
            f"{len(missed)} of {len(aims)} aims are missed{by}.",
        ]
    )


def manager() -> str:
    """The speed of the bookkeeping."""
    result = load("bench_manager.json")
    rows = []
    for row in rows_of(result, "rows"):
        ns = row["ns_per_token"]
        aims = APPEND_AIM_NS, APPEND_ALL_AIMS_NS[row["workload"]]
        rows.append(
            (row["workload"], row["tokens"], ns["append"], aims[0], ns["append"] / ns["call"])
            + (ns["append_all"], aims[1], *row["blocks"])
        )
    headers = (
        "workload",
        "tokens",
        "append, ns",
        "aim",
        "x empty call",
        "append_all, ns",
        "aim",
        "blocks admitted",
        "after step 1",
        "at the end",
    )
    return origin(result, "bench_manager.json") + "\n\n" + table(headers, rows)


def benchmark(name: str):
    """A module of benchmarks/, which needs torch."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return __import__(name)


def shown(tables: list[Table], decimals: int) -> str:
    return "\n\n".join(render(replace(t, decimals=decimals), "github").strip() for t in tables)


def gpu_attention() -> str:
    """The attention kernel over the memory's limit, once it has been recorded."""
    result = find(ATTENTION)
    if result is None:
        return "Not recorded yet."
    found = setting(result)
    where = f"large copy {found['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s, "
    where += f"median of {found['repeats']}"
    tables = benchmark("bench_attention").tables(rows_of(result, "shapes"), where)
    return origin(result, ATTENTION) + "\n\n" + shown(tables, 3)


def gpu_others() -> str:
    """What else was aimed at, ours beside it, once both have been recorded."""
    attention, paging = find(ATTENTION), find(PAGING)
    if attention is None or paging is None:
        return "Not recorded yet."
    shapes = rows_of(attention, "shapes")
    keys = "gather", "gather_cudnn", "gather_flash"
    path = {
        row["shape"]: min(row[f"{key}_us"] for key in keys if f"{key}_us" in row) / row["floor_us"]
        for row in shapes
    }
    moves = [
        row["limit_us"] / row["fused_us"]
        for row in rows_of(paging, "moves")
        if (row["blocks"], row["layers"]) == (1000, 1)
    ]
    (swap,) = (row for row in rows_of(paging, "swap") if row["block_size"] == 16)
    pinned = max(setting(paging)["pinned_bytes_per_s"].values())  # of the two ways
    shares = [
        1e3 * swap["num_bytes"] / swap[f"{way}_median_ms"] / pinned
        for way in ("swap_in", "swap_out")
    ]
    twin = [
        100.0 * (row["paged_us"] / row["contiguous_us"] - 1.0)
        for row in rows_of(paging, "attention")
        if row["context"] >= 1024
    ]
    aims = (
        ("paged over its own contiguous twin, context 1024 up, %", twin, "<=", 1.0),
        (
            "gather of K and V, share of copy bandwidth",
            [row["gather_share"] for row in shapes],
            ">=",
            0.92,
        ),
        (
            "gather path over floor, equal lengths",
            [over for name, over in path.items() if ".." not in name],
            "<=",
            3.2,
        ),
        (
            "gather path over floor, different lengths",
            [over for name, over in path.items() if ".." in name],
            "<=",
            3.5,
        ),
        ("block copy and write, 1,000 blocks, share of copy bandwidth", moves, ">=", 0.85),
        ("swap of 256 tokens in 16 blocks, share of the pinned copy", shares, ">=", 0.80),
    )
    body = []
    for what, found, sign, aim in aims:
        missed = sum(one > aim if sign == "<=" else one < aim for one in found)
        body.append((what, min(found), max(found), f"{sign} {aim:g}", f"{missed} of {len(found)}"))
    return table(("what", "least", "most", "aim", "missed on"), body, decimals=2)


def gpu_profile() -> str:
    """What bounds the attention kernel, by the GPU's counters, once they have been recorded."""
    result = find(PROFILE)
    if result is None:
        return "Not recorded yet."
    tables = [benchmark("profile_attention").table(rows_of(result, "rows"), result["device"])]
    return origin(result, PROFILE) + "\n\n" + shown(tables, 2)


def against(rows: list[dict], keys: tuple[str, ...], suffix: str) -> list[float]:
    """Percent by which ours takes longer than the best of `keys`, for each shape that has one."""
    found = []
    for row in rows:
        times = [row[key + suffix] for key in keys if key + suffix in row]
        if times:
            found.append(100.0 * (row["triton" + suffix] / min(times) - 1.0))
    return found


PEERS = {
    "FlashInfer's paged decode": ("flashinfer", "flashinfer_tc"),
    "torch's best contiguous kernel": ("cudnn", "flash"),
}


def span(numbers: list[float]) -> str:
    return f"{min(numbers):+.1f} to {max(numbers):+.1f} %"


NOISE = 0.5  # percent by which two runs of one kernel may differ


def over_aims(rows: list[dict]) -> list[float]:
    """Percent by which each shape misses its aim, of those that do; aims are for a dirty cache."""
    times = ((row["triton_dirty_us"] / row["floor_us"], row["aim"]) for row in rows)
    return [100.0 * (over / aim - 1.0) for over, aim in times if over > aim]


def gpu_aims() -> str:
    """Ours against aims and peers."""
    result = find(ATTENTION)
    if result is None:
        return "Not recorded yet."
    rows = rows_of(result, "shapes")
    missed = over_aims(rows)
    by = f", the others missed by {span(missed)}" if missed else ""
    lines = [f"* aims (dirty): {len(rows) - len(missed)} of {len(rows)} met{by}."]
    for title, suffix in (("clean", "_us"), ("dirty", "_dirty_us")):
        for peer, keys in PEERS.items():
            if more := against(rows, keys, suffix):
                faster, level = sum(m < -NOISE for m in more), sum(abs(m) <= NOISE for m in more)
                lines.append(
                    f"* against {peer} ({title}): {span(more)}; faster on {faster} of "
                    f"{len(more)}, level on {level}."
                )
    return "\n".join(lines)


def gpu_gaps() -> str:
    """Of what a pure read makes of the memory, what the kernel loses itself and what by paging."""
    result = find(PROFILE)
    if result is None:
        return "Not recorded yet."
    busy: dict[str, dict[str, float]] = {}
    for row in rows_of(result, "rows"):
        busy.setdefault(row["shape"], {})[row["case"]] = row["memory_busy_percent"]
    body = [
        (shape, one["read"], one["consecutive"] - one["read"], one["random"] - one["consecutive"])
        for shape, one in busy.items()
    ]
    headers = "shape", "read, busy %", "the kernel, points", "random places, points"
    return table(headers, body, decimals=1)


def gpu_paging() -> str:
    """Figs. 18a, 18b and 19a and the fused kernels, once they have been recorded."""
    result = find(PAGING)
    if result is None:
        return "Not recorded yet."
    bench, found = benchmark("bench_paging_cost"), setting(result)
    where = f"{found['model']}'s shape, large copy {found['copy_bytes_per_s'] / 1e9:,.0f} GB/s"
    tables = []
    if has(result, "attention"):
        tables.append(bench.attention_table(rows_of(result, "attention"), where))
    if has(result, "blocks"):
        tables.append(bench.blocks_table(rows_of(result, "blocks"), where))
    if has(result, "swap"):
        pinned = bench.PinnedBandwidth(**found["pinned_bytes_per_s"])
        tables.append(bench.swap_table(rows_of(result, "swap"), where))
        tables.append(bench.transfer_table(rows_of(result, "swap"), pinned, where))
    if has(result, "moves"):
        tables.append(bench.moves_table(rows_of(result, "moves"), where))
    return origin(result, PAGING) + "\n\n" + shown(tables, 2)


def gpu() -> str:
    """One line for each of the two, once it has been recorded."""
    lines = []
    attention, paging = find(ATTENTION), find(PAGING)
    if attention is not None:
        rows = rows_of(attention, "shapes")
        over = [row["triton_us"] / row["floor_us"] for row in rows]
        dirty = [row["triton_dirty_us"] / row["floor_us"] for row in rows]
        peers = (
            f"{peer} {span(more)}"
            for peer, keys in PEERS.items()
            if (more := against(rows, keys, "_us"))
        )
        lines.append(
            f"* Blocks read in place, in eight shapes: {min(over):.2f} to {max(over):.2f} times "
            "what live K and V take at the rate of a large copy, its reads and writes counted "
            f"({min(dirty):.2f} to {max(dirty):.2f} with a cache full of lines to write back); "
            f"against {', '.join(peers)}. " + origin(attention, ATTENTION)
        )
    if paging is not None and has(paging, "attention"):
        over = [
            100 * (row["paged_us"] / row["contiguous_us"] - 1)
            for row in rows_of(paging, "attention")
        ]
        lines.append(
            f"* Random blocks against consecutive ones, the same kernel: {min(over):+.1f} to "
            f"{max(over):+.1f} %. " + origin(paging, PAGING)
        )
    return "\n".join(lines)
