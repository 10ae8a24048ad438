"""Decode attention over scattered blocks on one GPU: ours, its peers, and the memory's limit.

    python benchmarks/bench_attention.py [--repeats 30] [--shape NAME] [--json FILE] [--figures DIR]

Serves section 4.1 and Fig. 18a: what the kernel pays for paging, in time over the floor, which is
the live K and V bytes over the bandwidth of one large copy in the same run. Needs a CUDA device and
triton. The contenders, all in one process on the same data, D = 128, fp16, blocks of 16 slots,
random block tables in a pool half as large again:

    triton        paged_attention_triton.py, which reads the blocks in place
    gather        the blocks copied together with gather_blocks, then the better of torch's kernels;
                  with different lengths only live blocks are copied, one sequence behind the other
    plain         paged_attention.py: the blocks copied, padded, then attention.py
    cat           a torch.cat for each sequence, as a naive simulation does (one shape, for scale)
    cuDNN, Flash  torch's scaled_dot_product_attention over contiguous K and V, equal lengths only
    FlashInfer    its paged decode, with and without tensor cores, if it is installed (0.6.1 ran)
    read          a kernel that only reads as many consecutive bytes, the better of two ways

Cold L2 cache, median, in a CUDA graph (`cat` without). The cache is flushed by writing and then
reading; `dirty` flushes by writing alone, as triton's do_bench does: then each kernel also pays for
tens of megabytes that are still to be written back.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pictures
from attention_contenders import SHAPES, D, Data, S, Shape, contenders
from gpu_timing import cold_median_us, copy_bandwidth
from script import Script, entry, options, show, table

import paged_attention
from paged_attention import gather_blocks
from vllm_sim.reporting.drawing import check_folder
from vllm_sim.reporting.tables import Table

Row = dict[str, object]


class WrongResult(Exception):
    """A contender whose output is not that of the plain kernel: it is not timed."""


def read_us(num_bytes: int, repeats: int, dirty: bool, device: str) -> float:
    """Microseconds to read as many consecutive bytes, the best of a few ways."""
    from read_only import read_bytes

    source = torch.randn(num_bytes // 2, dtype=torch.float16, device=device)
    times = []
    for programs, tile in ((4224, 8192), (1056, 8192)):
        run = lambda programs=programs, tile=tile: read_bytes(source, programs, tile)  # noqa: E731
        times.append(cold_median_us(run, repeats, graph=True, dirty=dirty))
    return min(times)


def measure(name: str, shape: Shape, bandwidth: float, repeats: int, device: str = "cuda") -> Row:
    """All contenders on one shape, in microseconds; the best of each family under its name."""
    data = Data(shape, device)
    want = paged_attention.paged_attention_kernel(data.q, data.k, data.v, data.padded, data.lens)
    want = want[0].float()
    row: Row = {"shape": name, "live_bytes": shape.live_bytes, "aim": shape.aim}
    row["floor_us"] = shape.live_bytes / bandwidth * 1e6
    for key, run in contenders(name, data):
        try:
            if not (error := ((run().float() - want).norm() / want.norm()).item()) < 2e-3:
                raise WrongResult(f"off by {error:.1e} (relative norm)")
            graph = key != "cat"
            row[f"{key}_us"] = cold_median_us(run, repeats, graph=graph)
            row[f"{key}_dirty_us"] = cold_median_us(run, repeats, graph=graph, dirty=True)
        except Exception as error:  # theirs are of many kinds, and the others are still to be timed
            row[f"{key}_error"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            print(f"{name}: {key}: {row[f'{key}_error']}", file=sys.stderr)
    for suffix in ("us", "dirty_us"):
        row[f"read_{suffix}"] = read_us(shape.live_bytes, repeats, suffix == "dirty_us", device)
    # Live blocks alone: padding would repeat one block, which the cache holds.
    live = data.flat[None]
    gathered = [lambda pool=pool: gather_blocks(pool, live) for pool in (data.k, data.v)]
    moved = 2 * live.numel() * data.k[0].numel() * data.k.element_size()
    row["gather_share"] = moved / cold_median_us(gathered, repeats, graph=True) * 1e6 / bandwidth
    return row


def over_floor(row: Row, keys: tuple[str, ...], suffix: str = "us") -> float | None:
    times = [row[f"{key}_{suffix}"] for key in keys if f"{key}_{suffix}" in row]
    return min(times) / row["floor_us"] if times else None


COLUMNS = {  # column: contenders of which the better counts
    "triton": ("triton",),
    "read": ("read",),
    "cuDNN": ("cudnn",),
    "Flash": ("flash",),
    "FlashInfer": ("flashinfer", "flashinfer_tc"),
    "gather": ("gather", "gather_cudnn", "gather_flash"),
    "plain": ("plain",),
    "cat": ("cat",),
}


def tables(rows: list[Row], where: str) -> list[Table]:
    """Time over floor, the cache flushed to clean and, for the kernels, to dirty lines."""
    result = []
    for title, suffix, names in (
        ("Time over floor, clean cold L2", "us", tuple(COLUMNS)),
        ("Time over floor, dirty cold L2", "dirty_us", tuple(COLUMNS)[:5]),
    ):
        times = [(name, partial(over_floor, keys=COLUMNS[name], suffix=suffix)) for name in names]
        columns = [("shape", "shape"), ("floor us", "floor_us"), ("aim", "aim"), *times]
        result.append(table(title, columns, rows, where, decimals=3))
    return result


def wrong_keys(row: Row) -> list[str]:
    """The contenders of a row whose result was not that of the plain kernel."""
    return [key for key in row if str(row[key]).startswith("WrongResult")]


def run(argv: list[str] | None) -> int:
    parser = options(__doc__, repeats=30, drawn="the times over the floor")
    told = "only this one; may be given again"
    parser.add_argument("--shape", action="append", choices=SHAPES, help=told)
    script = Script(__file__, parser, argv)
    args = script.args
    if args.figures:
        check_folder(args.figures, [pictures.FLOOR])
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
    for made in tables(rows, f"{where}, median of {args.repeats}"):
        show(made)
    print("gather_blocks, share of the copy bandwidth:")
    print("  " + ", ".join(f"{row['shape']} {row['gather_share']:.2f}" for row in rows))
    if args.figures:
        drawn = {
            row["shape"]: {name: over_floor(row, keys) for name, keys in COLUMNS.items()}
            for row in rows
        }
        pictures.draw_attention(drawn, where, args.figures)
    return code


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
