"""Decode attention over scattered blocks on one GPU: ours, its peers, and the memory's limit.

    python benchmarks/bench_attention.py [--repeats 30] [--shape NAME] [--fa3 FILE] [--json FILE]

Serves section 4.1 and Fig. 18a: what the kernel pays for paging, in time over the floor, which is
the live K and V bytes over the bandwidth of one large copy in the same run. Needs a CUDA device and
triton. The contenders, all in one process on the same data, D = 128, fp16, blocks of 16 slots,
random block tables in a pool half as large again:

    triton        paged_attention_triton.py, which reads the blocks in place, with a plan
    no plan       the same without one
    read          a kernel that only reads as many consecutive bytes, the better of two ways
    FlashInfer    its paged decode, the better of with and without tensor cores (0.7.2 ran)
    FA3           FlashAttention-3's paged decode, of an installed vLLM or the extension --fa3 names
    XQA           TensorRT-LLM's, as FlashInfer has it
    cuDNN, Flash  torch's scaled_dot_product_attention over contiguous K and V, equal lengths only
    gather        the blocks copied together with gather_blocks, then the better of torch's kernels;
                  with different lengths only live blocks are copied, one sequence behind the other
    plain         paged_attention.py: the blocks copied, padded, then attention.py
    cat           a torch.cat for each sequence, as a naive simulation does (one shape, for scale)

Cold L2 cache, in a CUDA graph (`cat` without). All take turns, three rounds, each after a while of
nothing but itself; the median of the rounds' medians counts. Plans are made beforehand, as they
serve all layers of an iteration: what making ours costs is shown below.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pictures
from attention_contenders import (
    SHAPES,
    D,
    Data,
    Run,
    S,
    Shape,
    contenders,
    load_flash_attention,
)
from gpu_timing import cold_median_us, copy_bandwidth, heated_medians_us, replay_of, wall_times_us
from script import Script, entry, options, show, table

import paged_attention
from paged_attention import gather_blocks
from vllm_sim.reporting.arguments import file_name
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.drawing import check_folder
from vllm_sim.reporting.tables import Table

Row = dict[str, object]


class WrongResult(Exception):
    """A contender whose output is not that of the plain kernel: it is not timed."""


READS = ((4224, 8192), (1056, 8192))  # programs and tiles of the kernel that only reads
PAGED = ("FlashInfer", "FA3", "XQA")  # the peers that read blocks in place
COLUMNS = {  # column: contenders of which the better counts
    "triton": ("triton",),
    "no plan": ("unplanned",),
    "read": ("read_0", "read_1"),
    "FlashInfer": ("flashinfer", "flashinfer_tc"),
    "FA3": ("flash_attention",),
    "XQA": ("xqa",),
    "cuDNN": ("cudnn",),
    "Flash": ("flash",),
    "gather": ("gather", "gather_cudnn", "gather_flash"),
    "plain": ("plain",),
    "cat": ("cat",),
}


def prepared(name: str, data: Data, row: Row) -> dict[str, Run]:
    """Every contender that gives the right result, as a CUDA graph; an error goes into the row."""
    want = paged_attention.paged_attention_kernel(data.q, data.k, data.v, data.padded, data.lens)
    want, runs = want[0].float(), {}
    for key, run in contenders(name, data):
        try:
            if not (error := ((run().float() - want).norm() / want.norm()).item()) < 2e-3:
                raise WrongResult(f"off by {error:.1e} (relative norm)")
            runs[key] = run if key == "cat" else replay_of(run)
        except Exception as error:  # theirs are of many kinds, and the others are still to be timed
            row[f"{key}_error"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            print(f"{name}: {key}: {row[f'{key}_error']}", file=sys.stderr)
    return runs


def measure(name: str, shape: Shape, bandwidth: float, repeats: int, device: str = "cuda") -> Row:
    """All contenders on one shape, in microseconds, and what a plan costs."""
    from read_only import read_bytes

    from paged_attention_triton import Plan

    data = Data(shape, device)
    row: Row = {"shape": name, "live_bytes": shape.live_bytes}
    row["floor_us"] = shape.live_bytes / bandwidth * 1e6
    runs = prepared(name, data, row)
    source = torch.randn(shape.live_bytes // 2, dtype=torch.float16, device=device)
    for number, (programs, tile) in enumerate(READS):
        read = partial(read_bytes, source, programs, tile)
        read()
        runs[f"read_{number}"] = replay_of(read)
    row |= {f"{key}_us": us for key, us in heated_medians_us(runs, repeats).items()}
    plan = Plan(data.q, data.k, data.v, shape.lens)
    row["plan_us"] = median(wall_times_us(lambda: plan.update(shape.lens), repeats))
    # Live blocks alone: padding would repeat one block, which the cache holds.
    live = data.flat[None]
    gathered = [lambda pool=pool: gather_blocks(pool, live) for pool in (data.k, data.v)]
    moved = 2 * live.numel() * data.k[0].numel() * data.k.element_size()
    row["gather_share"] = moved / cold_median_us(gathered, repeats, graph=True) * 1e6 / bandwidth
    return row


def over_floor(row: Row, columns: Iterable[str]) -> float | None:
    keys = [f"{key}_us" for column in columns for key in COLUMNS[column]]
    times = [row[key] for key in keys if key in row]
    return min(times) / row["floor_us"] if times else None


def against(row: Row, columns: Iterable[str]) -> float | None:
    """How much longer ours takes than the best of these, in %."""
    best = over_floor(row, columns)
    return None if best is None else 100 * (over_floor(row, ["triton"]) / best - 1)


def times_tables(rows: list[Row], where: str) -> list[Table]:
    """Time over floor: ours against its peers, in % the best paged and cuDNN's; and the others."""
    peers = "triton", *PAGED, "cuDNN", "Flash"
    times = {name: (name, partial(over_floor, columns=[name])) for name in COLUMNS}
    ours = [("shape", "shape"), *(times.pop(name) for name in peers)]
    ours.append(("over paged %", partial(against, columns=PAGED)))
    ours.append(("over cuDNN %", partial(against, columns=["cuDNN"])))
    others = [("shape", "shape"), ("floor us", "floor_us"), *times.values()]
    return [
        table("Time over floor, cold L2", ours, rows, where, decimals=3),
        table("Without a plan, gathered, and a pure read", others, rows, where, decimals=3),
    ]


def wrong_keys(row: Row) -> list[str]:
    """The contenders of a row whose result was not that of the plain kernel."""
    return [key for key in row if str(row[key]).startswith("WrongResult")]


def run(argv: list[str] | None) -> int:
    parser = options(__doc__, repeats=30, drawn="the times over the floor")
    told = "only this one; may be given again"
    parser.add_argument("--shape", action="append", choices=SHAPES, help=told)
    told = "FlashAttention-3's extension, _vllm_fa3_C.abi3.so of vLLM's wheel"
    parser.add_argument("--fa3", type=file_name, metavar="FILE", help=told)
    script = Script(__file__, parser, argv)
    args = script.args
    if args.figures:
        check_folder(args.figures, [pictures.FLOOR])
    try:
        load_flash_attention(args.fa3)
    except OSError as error:
        raise UsageError(f"--fa3 {args.fa3}: {error}".partition("\n")[0]) from None
    bandwidth = copy_bandwidth()
    found = {"bandwidth_bytes_per_s": bandwidth, "repeats": args.repeats, "head_size": D}
    found |= {"block_size": S, "dtype": "float16", "shapes": []}
    rows: list[Row] = found["shapes"]
    for name in script.each(args.shape or SHAPES):
        rows.append(measure(name, SHAPES[name], bandwidth, args.repeats))
        torch.cuda.empty_cache()
        # After each shape: time on a GPU is dear.
        code = script.write(found, {"shapes": 1}, int(any(wrong_keys(row) for row in rows)))
    where = f"{torch.cuda.get_device_name()}, large copy {bandwidth / 1e9:,.0f} GB/s"
    for shown in times_tables(rows, f"{where}, median of {args.repeats}"):
        show(shown)
    print("what making a plan costs, once for all layers, us:")
    print("  " + ", ".join(f"{row['shape']} {row['plan_us']:.0f}" for row in rows))
    print("gather_blocks, share of the copy bandwidth:")
    print("  " + ", ".join(f"{row['shape']} {row['gather_share']:.2f}" for row in rows))
    if args.figures:
        drawn = {row["shape"]: {name: over_floor(row, [name]) for name in COLUMNS} for row in rows}
        pictures.draw_attention(drawn, where, args.figures)
    return code


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
