"""Which tile, warps, stages and programs suit a card: what the table in paged_attention_triton.py is.

    python benchmarks/tune_attention.py [--repeats 10] [--shape NAME] [--json FILE]

Serves section 4.1. Every candidate on each shape of bench_attention.py, with a plan, cold L2 cache,
in time over the floor; then for each kind of shape (how many query rows a program has, how many
bytes a slot has) the candidates that lose least in the worst of its shapes. Needs a CUDA device and
triton. Kernels are compiled beforehand by as many processes as there are cores.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_contenders import SHAPES, Data
from gpu_timing import cold_median_us, copy_bandwidth
from script import Script, entry, options, show, table

from paged_attention_triton import (
    SHARED_SPARE,
    Plan,
    Tuning,
    Workspace,
    device_limits,
    paged_attention_kernel,
)

TILES, WARPS, STAGES = (16, 32, 64, 128), (2, 4, 8), (2, 3, 4, 5)
PROGRAMS = (2, 3, 4, 5, 6, 8, 12, 16)
SLOT_BYTES = 2 * 128 * 2  # K and V of one head, as in all shapes


def candidates(shared_bytes: int) -> list[Tuning]:
    """Those of which at least one fits a multiprocessor, with enough bytes under way."""
    found = itertools.starmap(Tuning, itertools.product(TILES, WARPS, STAGES, PROGRAMS))
    return [one for one in found if fits(one, shared_bytes)]


def fits(one: Tuning, shared_bytes: int) -> bool:
    tiles = (one.num_stages - 1) * one.tile * SLOT_BYTES
    at_once = min(one.programs, shared_bytes // (tiles + SHARED_SPARE))
    return 1 << 16 <= at_once * tiles and one.tile <= 32 * one.num_warps


def compile_one(name: str, tuning: Tuning) -> None:
    """In a process of its own: one launch leaves the kernel in triton's cache on disk."""
    data = Data(SHAPES[name])
    plan = Plan(data.q, data.k, data.v, data.shape.lens, tuning=tuning)
    paged_attention_kernel(data.q, data.k, data.v, data.padded, data.lens, plan=plan)
    torch.cuda.synchronize()


def run(argv: list[str] | None) -> int:
    parser = options(__doc__, repeats=10)
    told = "only this one; may be given again"
    parser.add_argument("--shape", action="append", choices=SHAPES, help=told)
    script = Script(__file__, parser, argv)
    names = script.args.shape or list(SHAPES)
    tunings = candidates(device_limits(torch.device("cuda", 0))[1])
    kinds = {(SHAPES[name].heads, SHAPES[name].kv_heads): name for name in reversed(names)}
    kernels = {(t.tile, t.num_warps, t.num_stages): t for t in tunings}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        jobs = [
            pool.submit(compile_one, name, t) for name in kinds.values() for t in kernels.values()
        ]
        for job in script.each(jobs, "compiled"):
            job.result()
    bandwidth = copy_bandwidth()
    rows = []
    for name in names:
        data, workspace = Data(SHAPES[name]), Workspace("cuda")
        floor = SHAPES[name].live_bytes / bandwidth * 1e6
        for tuning in script.each(tunings, name):
            plan = Plan(data.q, data.k, data.v, data.shape.lens, tuning=tuning)
            us = cold_median_us(
                lambda plan=plan: paged_attention_kernel(
                    data.q, data.k, data.v, data.padded, data.lens, plan=plan, workspace=workspace
                ),
                script.args.repeats,
                graph=True,
            )
            values = {key: getattr(tuning, key) for key in Tuning.__slots__}
            rows.append({"shape": name, **values, "over_floor": us / floor})
        del data
        torch.cuda.empty_cache()
    columns = [(key, key) for key in ("shape", *Tuning.__slots__, "over_floor")]
    best = [
        row
        for name in names
        for row in sorted((r for r in rows if r["shape"] == name), key=lambda r: r["over_floor"])[
            :6
        ]
    ]
    from bench_attention import read_us

    for name in names:
        print(name, "read", read_us(SHAPES[name].live_bytes, 20, False, "cuda") / (SHAPES[name].live_bytes / bandwidth * 1e6))
    device = torch.cuda.get_device_name()
    show(table("The best of each shape", columns, best, device, decimals=3))
    return script.write(
        {"device": device, "bandwidth_bytes_per_s": bandwidth, "rows": rows}, {"rows": 5}
    )


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
