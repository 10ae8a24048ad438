"""Which tile, warps, stages and programs suit a card: TUNINGS of paged_attention_triton.py.

    python benchmarks/tune_attention.py [--repeats 10] [--shape NAME] [--json FILE]

Serves section 4.1. Every candidate on each shape of bench_attention.py, with a plan, cold L2 cache,
in time over the floor, if its result is right; then for each kind of shape that TUNINGS tells apart
the candidates that lose least in the worst of its shapes. Needs a CUDA device and triton. Kernels
are compiled beforehand by as many processes as there are cores.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_contenders import SHAPES, Data, Shape
from gpu_timing import copy_bandwidth, heated_medians_us, replay_of
from script import Script, entry, options, show, table

import paged_attention

if TYPE_CHECKING:
    from paged_attention_triton import Tuning

TILES, WARPS, STAGES = (16, 32, 64, 128), (1, 2, 4), (2, 3, 4, 5, 6)
PROGRAMS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
LEAST_BYTES, LEAST_REGISTERS = 1 << 16, 96  # under way in a multiprocessor; of a thread
SLOT_BYTES = 2 * 128 * 2  # K and V of one head, as in all shapes
HEAT_S, SHOWN = 0.01, 6
Row = dict[str, object]


def candidates(shared_bytes: int) -> list[Tuning]:
    """Those that fit a multiprocessor, with bytes enough under way and registers to hold them."""
    from paged_attention_triton import Tuning

    def fits(one: Tuning) -> bool:
        if one.shared_bytes(16, SLOT_BYTES, SLOT_BYTES // 2) > shared_bytes:
            return False  # and choose_tuning would cut it down
        under_way = one.programs * (one.num_stages - 1) * one.tile * SLOT_BYTES
        enough = under_way >= LEAST_BYTES and one.registers >= LEAST_REGISTERS
        return enough and 8 <= one.tile // one.num_warps <= 16

    return [
        *filter(fits, itertools.starmap(Tuning, itertools.product(TILES, WARPS, STAGES, PROGRAMS)))
    ]


def call_of(data: Data, tuning: Tuning) -> partial:
    """The kernel on this data, cut this way."""
    from paged_attention_triton import Plan, Workspace, paged_attention_kernel

    plan = Plan(data.q, data.k, data.v, data.shape.lens, tuning=tuning)
    inputs = data.q, data.k, data.v, data.padded, data.lens
    return partial(paged_attention_kernel, *inputs, plan=plan, workspace=Workspace(data.device))


def compile_one(name: str, tuning: Tuning) -> None:
    """In a process of its own: one launch leaves the kernel in triton's cache on disk."""
    call_of(Data(SHAPES[name]), tuning)()
    torch.cuda.synchronize()


def times_us(name: str, tunings: list[Tuning], repeats: int) -> dict[Tuning, float]:
    """Microseconds of each candidate on one shape if its result is right, the card heated."""
    data, runs = Data(SHAPES[name]), {}
    want = paged_attention.paged_attention_kernel(data.q, data.k, data.v, data.padded, data.lens)[0]
    for tuning in tunings:
        call = call_of(data, tuning)
        if (call()[0].float() - want).norm() < 2e-3 * want.float().norm():
            runs[tuning] = replay_of(call)
        else:
            print(f"{name}: wrong with {tuning}", file=sys.stderr)
    return heated_medians_us(runs, repeats, rounds=1, heat_s=HEAT_S)


def kind_of(shape: Shape, multiprocessors: int) -> str:
    """Which of a card's four tunings it takes: see `choose_tuning`."""
    from paged_attention_triton import LITTLE_WORK, MANY_HEADS, SHORT, TUNINGS

    if shape.kv_heads > MANY_HEADS:
        return "short" if sum(shape.lens) < SHORT * len(shape.lens) else "many heads"
    programs = next(iter(TUNINGS.values()))[2].programs * multiprocessors
    return (
        "little work" if sum(shape.lens) * shape.kv_heads < LITTLE_WORK * programs else "few heads"
    )


def worst_losses(rows: list[Row], multiprocessors: int) -> list[Row]:
    """Of each kind of shape, the candidates whose worst time over a shape's best is least."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["shape"]] = min(row["over_floor"], best.get(row["shape"], row["over_floor"]))
    losses: dict[tuple, list[float]] = {}
    for row in rows:
        kind = kind_of(SHAPES[row["shape"]], multiprocessors)
        key = kind, *(row[name] for name in ("tile", "num_warps", "num_stages", "programs"))
        losses.setdefault(key, []).append(row["over_floor"] / best[row["shape"]] - 1)
    kinds = {
        key[0]: sum(1 for name in best if kind_of(SHAPES[name], multiprocessors) == key[0])
        for key in losses
    }
    found = [(key, max(found)) for key, found in losses.items() if len(found) == kinds[key[0]]]
    names = "kind", "tile", "num_warps", "num_stages", "programs"
    return [
        dict(zip(names, key)) | {"loss": loss}
        for kind in kinds
        for key, loss in sorted(
            (one for one in found if one[0][0] == kind), key=lambda one: one[1]
        )[:SHOWN]
    ]


def run(argv: list[str] | None) -> int:
    parser = options(__doc__, repeats=10)
    told = "only this one; may be given again"
    parser.add_argument("--shape", action="append", choices=SHAPES, help=told)
    script = Script(__file__, parser, argv)
    from paged_attention_triton import Tuning, device_limits  # needs triton

    names = script.args.shape or list(SHAPES)
    card, shared_bytes = device_limits(torch.device("cuda", 0))
    tunings = candidates(shared_bytes)
    compiled = {(SHAPES[name].heads, SHAPES[name].kv_heads): name for name in reversed(names)}
    kernels = {(t.tile, t.num_warps, t.num_stages, t.registers): t for t in tunings}
    jobs = [*itertools.product(compiled.values(), kernels.values())]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        for job in script.each([pool.submit(compile_one, *job) for job in jobs], "compiled"):
            job.result()
    bandwidth, rows = copy_bandwidth(), []
    for name in script.each(names):
        floor_us = SHAPES[name].live_bytes / bandwidth * 1e6
        for tuning, us in times_us(name, tunings, script.args.repeats).items():
            values = {key: getattr(tuning, key) for key in Tuning.__slots__}
            rows.append({"shape": name, **values, "over_floor": us / floor_us})
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    losses = worst_losses(rows, card.multiprocessors)
    columns = [(key, key) for key in losses[0]]
    show(table("Loss in the worst shape of a kind", columns, losses, device, decimals=3))
    found = {"device": device, "bandwidth_bytes_per_s": bandwidth, "rows": rows}
    return script.write(found, {"rows": 5})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
