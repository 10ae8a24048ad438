"""ns per appended token of PagedKVCacheManager, on three workloads, and the blocks in use.

    python benchmarks/bench_manager.py [--repeats 5] [--json FILE]

    W1  256 sequences, prompts uniform 10..512, 512 decode steps
    W2  10,000 sequences, prompt 161, 128 decode steps
    W3  200 groups, a 500-token prompt forked to 6 (the parent freed), 128 steps, copy-on-write

Each is timed twice: `append`, one call per sequence and token, and `append_all`, one call per
step for all running sequences. The physical limit of the first is a Python method call that does
nothing, timed in the same run; `x call` is the ratio to it.
"""

from __future__ import annotations

import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import Script, entry, options, show, table

from kv_cache_manager import PagedKVCacheManager

BLOCK_SIZE = 16


class EmptyCall:
    """The least that one call per token can cost."""

    def append(self, seq_id: int) -> tuple[()]:
        return ()


def fill_w1() -> PagedKVCacheManager:
    manager = PagedKVCacheManager(20_000, BLOCK_SIZE)
    draw = random.Random(0)
    for seq_id in range(256):
        manager.allocate(seq_id, draw.randint(10, 512))
    return manager


def fill_w2() -> PagedKVCacheManager:
    manager = PagedKVCacheManager(200_000, BLOCK_SIZE)
    for seq_id in range(10_000):
        manager.allocate(seq_id, 161)
    return manager


def fill_w3() -> PagedKVCacheManager:
    manager = PagedKVCacheManager(20_000, BLOCK_SIZE)
    for group in range(200):
        parent = 7 * group
        manager.allocate(parent, 500)
        for child in range(parent + 1, parent + 7):
            manager.fork(parent, child)
        manager.free(parent)
    return manager


# Blocks in use after admission, the first step and the last: known beforehand, so a faster manager
# that takes other blocks is a wrong one.
BLOCKS = {
    "W1": (4_444, 4_467, 12_636),
    "W2": (110_000, 110_000, 190_000),
    "W3": (6_400, 7_400, 17_000),
}

WORKLOADS: dict[str, tuple[Callable[[], PagedKVCacheManager], int]] = {
    "W1": (fill_w1, 512),
    "W2": (fill_w2, 128),
    "W3": (fill_w3, 128),
}


COLUMNS = [
    ("workload", "workload"),
    ("tokens", "tokens"),
    ("append", lambda row: row["ns_per_token"]["append"]),
    ("x call", lambda row: row["ns_per_token"]["append"] / row["ns_per_token"]["call"]),
    ("append_all", lambda row: row["ns_per_token"]["append_all"]),
    ("blocks", lambda row: ", ".join(f"{count:,}" for count in row["blocks"])),
]


def run_single(manager: PagedKVCacheManager | EmptyCall, ids: list[int], steps: int) -> float:
    """Seconds of one `append` call per sequence and step."""
    start = time.perf_counter()
    append = manager.append
    for _ in range(steps):
        for seq_id in ids:
            append(seq_id)
    return time.perf_counter() - start


def run_all(manager: PagedKVCacheManager, steps: int) -> float:
    """Seconds of one `append_all` call per step."""
    start = time.perf_counter()
    for _ in range(steps):
        manager.append_all()
    return time.perf_counter() - start


def used(manager: PagedKVCacheManager) -> int:
    return manager.num_blocks - manager.num_free_blocks


def measure(name: str, repeats: int) -> dict[str, object]:
    """Best of `repeats` for each way, and the blocks after admission, step 1 and the last."""
    fill, steps = WORKLOADS[name]
    probe = fill()
    blocks = [used(probe)]
    probe.append_all()
    blocks.append(used(probe))
    ids = probe.running_ids
    tokens = len(ids) * steps
    best = {"append": float("inf"), "append_all": float("inf"), "call": float("inf")}
    for _ in range(repeats):
        single, together = fill(), fill()
        best["append"] = min(best["append"], run_single(single, ids, steps))
        best["append_all"] = min(best["append_all"], run_all(together, steps))
        best["call"] = min(best["call"], run_single(EmptyCall(), ids, steps))
        assert used(single) == used(together), "the two ways must take the same blocks"
        together.check_invariants()
    ns = {way: seconds / tokens * 1e9 for way, seconds in best.items()}
    return {
        "workload": name,
        "tokens": tokens,
        "ns_per_token": ns,
        "blocks": [*blocks, used(together)],
    }


def run(argv: list[str] | None) -> int:
    parser = options(__doc__, repeats=5, counts="best")
    script = Script(__file__, parser, argv, on_gpu=False)
    repeats = script.args.repeats
    rows = [measure(name, repeats) for name in script.each(WORKLOADS)]
    where = f"Python {platform.python_version()}, block size {BLOCK_SIZE}, best of {repeats}"
    title = "ns per appended token, and blocks after admission, the first step and the last"
    show(table(title, COLUMNS, rows, where, decimals=1))
    found = {"block_size": BLOCK_SIZE, "repeats": repeats, "rows": rows}
    return script.write(found, {"rows": 1})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
