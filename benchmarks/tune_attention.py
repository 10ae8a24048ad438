"""Which tile, warps, stages and programs suit a card: paged_attention_triton.py has the result.

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
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_contenders import SHAPES, Data
from gpu_timing import copy_bandwidth, heated_medians_us, replay_of
from script import Script, entry, options, show, table

from paged_attention_triton import (
    SHARED_SPARE,
    Plan,
    Tuning,
    Workspace,
    device_limits,
    paged_attention_kernel,
)

TILES, WARPS, STAGES = (16, 32, 64, 128), (2, 4), (2, 3, 4, 5, 6)
PROGRAMS = (2, 3, 4, 5, 6, 7, 8)
HEAT_S = 0.01
SLOT_BYTES = 2 * 128 * 2  # K and V of one head, as in all shapes


def candidates(shared_bytes: int) -> list[Tuning]:
    """Those of which at least one fits a multiprocessor, with enough bytes under way."""
    found = itertools.starmap(Tuning, itertools.product(TILES, WARPS, STAGES, PROGRAMS))
    return [one for one in found if fits(one, shared_bytes)]


def fits(one: Tuning, shared_bytes: int) -> bool:
    tiles = (one.num_stages - 1) * one.tile * SLOT_BYTES
    room = one.programs * (tiles + SHARED_SPARE) <= shared_bytes
    return (
        room
        and one.programs * tiles >= 1 << 16
        and 8 <= one.tile // one.num_warps <= 16
        and one.registers >= 96
    )


def compile_one(name: str, tuning: Tuning) -> None:
    """In a process of its own: one launch leaves the kernel in triton's cache on disk."""
    data = Data(SHAPES[name])
    plan = Plan(data.q, data.k, data.v, data.shape.lens, tuning=tuning)
    paged_attention_kernel(data.q, data.k, data.v, data.padded, data.lens, plan=plan)
    torch.cuda.synchronize()


def times_us(name: str, tunings: list[Tuning], repeats: int) -> dict[Tuning, float]:
    """Microseconds of each candidate on one shape, the card heated by it."""
    data, workspace, runs = Data(SHAPES[name]), Workspace("cuda"), {}
    for tuning in tunings:
        plan = Plan(data.q, data.k, data.v, data.shape.lens, tuning=tuning)
        inputs = data.q, data.k, data.v, data.padded, data.lens
        call = partial(paged_attention_kernel, *inputs, plan=plan, workspace=workspace)
        call()
        runs[tuning] = replay_of(call)
    return heated_medians_us(runs, repeats, rounds=1, heat_s=HEAT_S)


def run(argv: list[str] | None) -> int:
    parser = options(__doc__, repeats=10)
    told = "only this one; may be given again"
    parser.add_argument("--shape", action="append", choices=SHAPES, help=told)
    script = Script(__file__, parser, argv)
    names = script.args.shape or list(SHAPES)
    tunings = candidates(device_limits(torch.device("cuda", 0))[1])
    kinds = {(SHAPES[name].heads, SHAPES[name].kv_heads): name for name in reversed(names)}
    kernels = {(t.tile, t.num_warps, t.num_stages, t.registers): t for t in tunings}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        jobs = [
            pool.submit(compile_one, name, t) for name in kinds.values() for t in kernels.values()
        ]
        for job in script.each(jobs, "compiled"):
            job.result()
    bandwidth = copy_bandwidth()
    rows = []
    for name in script.each(names):
        floor_us = SHAPES[name].live_bytes / bandwidth * 1e6
        for tuning, us in times_us(name, tunings, script.args.repeats).items():
            values = {key: getattr(tuning, key) for key in Tuning.__slots__}
            rows.append({"shape": name, **values, "over_floor": us / floor_us})
        torch.cuda.empty_cache()
    columns = [(key, key) for key in ("shape", *Tuning.__slots__, "over_floor")]
    best = [
        row
        for name in names
        for row in sorted((r for r in rows if r["shape"] == name), key=lambda r: r["over_floor"])[
            :6
        ]
    ]
    device = torch.cuda.get_device_name()
    show(table("The best of each shape", columns, best, device, decimals=3))
    return script.write(
        {"device": device, "bandwidth_bytes_per_s": bandwidth, "rows": rows}, {"rows": 5}
    )


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
