"""What paging costs on one GPU, beside the paper's figures.

    python benchmarks/bench_paging_cost.py [--quick] [--part swap] [--kernel gather] [--json FILE]
        [--figures DIR]

Serves Fig. 18a (attention over random blocks against contiguous K and V), the kernel's side of
Fig. 18b (block sizes), Fig. 19a (swapping and recomputing 256 tokens), and the fused block write
and block copy of section 5. At OPT-13B's shape in fp16; the paper does not state Fig. 18a's. Needs
a CUDA device with 50 GB of free memory and triton; takes some two minutes. The parts:

    attention  the same kernel over random and over consecutive blocks, and torch's best over the
               same memory without blocks; floor: live K and V over the bandwidth of a large copy
    blocks     block sizes 1 to 256, batch 32, context 1024
    swap       on the host's clock until all is done; recompute: a prefill of the tokens through a
               random-weight OPT-13B that writes their K and V to the pool
    moves      block write and copy, beside the indexed operations of plain torch

All other times are the device's, medians, with a cold L2 cache: see gpu_timing.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pictures
from gpu_timing import PinnedBandwidth, copy_bandwidth, pinned_bandwidth
from measure_paging import (
    Kernel,
    Row,
    Setting,
    WrongResult,
    measure_attention,
    measure_moves,
    measure_swap,
)
from opt_prefill import RandomOPT

import paged_attention
from vllm_sim.paper.figures import (
    FASTER_TRANSFORMER,
    FIG18A,
    FIG18A_TEXT_OVERHEAD,
    FIG18B,
    FIG19A,
    FIG19A_RATIO,
    VLLM,
)
from vllm_sim.reporting.command_line import OneLineParser, UsageError, exit_code, folder
from vllm_sim.reporting.documents import measured
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.scenarios.report import Table, check_writable, render, write_json

PARTS = ("attention", "blocks", "swap", "moves")
INDEX = {"attention": 3, "blocks": 3, "swap": 1, "moves": 3}  # columns that say which row it is


def percent_over(time: float | None, base: float | None) -> float | None:
    return None if time is None or base is None else 100.0 * (time / base - 1.0)


def attention_table(rows: Sequence[Row], where: str) -> Table:
    """Fig. 18a: our overheads beside the paper's. Rows of measure_attention."""
    headers = (
        "batch",
        "context",
        "paged us",
        "over floor",
        "own contiguous us",
        "paging %",
        "cuDNN us",
        "Flash us",
        "over best %",
        "paper: vLLM us",
        "FT us",
        "overhead %",
    )
    body = []
    for row in rows:
        peers = [row[name] for name in ("cudnn_us", "flash_us") if row[name] is not None]
        paper = FIG18A.get((row["batch"], row["context"]), {})
        body.append(
            (
                row["batch"],
                row["context"],
                row["paged_us"],
                row["paged_us"] / row["floor_us"],
                row["contiguous_us"],
                percent_over(row["paged_us"], row["contiguous_us"]),
                row["cudnn_us"],
                row["flash_us"],
                percent_over(row["paged_us"], min(peers, default=None)),
                paper.get(VLLM),
                paper.get(FASTER_TRANSFORMER),
                paper.get("overhead"),
            )
        )
    low, high = FIG18A_TEXT_OVERHEAD
    setting = f"{where}; the paper's text: {low}-{high} % over FasterTransformer (FT)"
    return Table("Fig. 18a: the attention kernel", headers, body, setting, decimals=2)


def blocks_table(rows: Sequence[Row], where: str) -> Table:
    """The kernel's side of Fig. 18b: the paper's columns are end to end. Rows as in Fig. 18a's."""
    headers = (
        "block size",
        "paged us",
        "over floor",
        "paging %",
        *(f"paper: {name} s/token" for name in FIG18B),
    )
    body = [
        (
            row["block_size"],
            row["paged_us"],
            row["paged_us"] / row["floor_us"],
            percent_over(row["paged_us"], row["contiguous_us"]),
            *(column[row["block_size"]] for column in FIG18B.values()),
        )
        for row in rows
    ]
    setting = f"{where}; the paper's are end to end: cache hits and scheduling as well"
    return Table("Fig. 18b: block sizes, the kernel's side", headers, body, setting, decimals=3)


def swap_table(rows: Sequence[Row], where: str) -> Table:
    """Fig. 19a, milliseconds. Rows of measure_swap."""
    ours = {"recompute": "recompute_ms", "swap in": "swap_in_ms", "swap out": "swap_out_ms"}
    headers = (
        "block size",
        *(h for name in ours for h in (f"{name} ms", "paper")),
        "recompute/(in+out)",
        "paper",
    )
    body = []
    for row in rows:
        size = row["block_size"]
        times = [cell for name, key in ours.items() for cell in (row[key], FIG19A[name][size])]
        both = row["swap_in_ms"] + row["swap_out_ms"]
        body.append((size, *times, row["recompute_ms"] / both, FIG19A_RATIO[size]))
    return Table("Fig. 19a: swapping and recomputing", headers, body, where, decimals=2)


def transfer_table(rows: Sequence[Row], pinned: PinnedBandwidth, where: str) -> Table:
    """The same swaps as shares of what one large pinned copy reaches."""
    headers = (
        "block size",
        "blocks",
        "KiB each",
        "in GB/s",
        "share of limit",
        "out GB/s",
        "share of limit",
    )
    body = []
    for row in rows:
        speeds = [row["num_bytes"] / row[f"swap_{way}_median_ms"] * 1e3 for way in ("in", "out")]
        shares = [speed / limit for speed, limit in zip(speeds, pinned)]
        cells = [cell for speed, share in zip(speeds, shares) for cell in (speed / 1e9, share)]
        each = row["num_bytes"] // row["blocks"] // 1024
        body.append((row["block_size"], row["blocks"], each, *cells))
    limits = f"limit: {pinned.to_device / 1e9:.1f} GB/s in, {pinned.to_host / 1e9:.1f} GB/s out"
    return Table("Swapping against the pinned copy", headers, body, f"{where}; {limits}", 2)


def moves_table(rows: Sequence[Row], where: str) -> Table:
    """Block write and block copy. Rows of measure_moves."""
    headers = (
        "what",
        "layers",
        "blocks",
        "fused us",
        "share of limit",
        "plain us",
        "share of limit",
        "call us",
    )
    body = [
        (
            row["what"],
            row["layers"],
            row["blocks"],
            row["fused_us"],
            row["limit_us"] / row["fused_us"],
            row["plain_us"],
            row["limit_us"] / row["plain_us"],
            row["call_us"],
        )
        for row in rows
    ]
    return Table("Section 5: block write and block copy", headers, body, where, decimals=2)


def measure(
    setting: Setting,
    parts: Sequence[str],
    kernel: Kernel | None,
    where: str,
    progress: Progress = SILENT,
) -> dict[str, object]:
    """Run the parts, print each table as it is made, and return all figures."""
    speed, pinned = copy_bandwidth(), pinned_bandwidth()
    where = f"{where}, large copy {speed / 1e9:,.0f} GB/s"
    m = setting.model
    found: dict[str, object] = {
        "model": m.name,
        "layers": m.num_layers,
        "heads": m.num_heads,
        "head_size": m.head_size,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "copy_bytes_per_s": speed,
        "pinned_bytes_per_s": pinned._asdict(),
    }
    if "attention" in parts:
        points = setting.attention
        found["attention"] = rows = []
        for number, size in enumerate(points):
            progress.part(0, len(PARTS), "attention").at(number, len(points))
            rows.append(measure_attention(setting, kernel, speed, *size))
        progress.clear()
        show(attention_table(rows, where))
    if "blocks" in parts:
        point = (setting.batch, setting.context)
        found["blocks"] = rows = []
        for number, size in enumerate(setting.block_sizes):
            progress.part(1, len(PARTS), "blocks").at(number, len(setting.block_sizes))
            rows.append(
                measure_attention(setting, kernel, speed, *point, block_size=size, peers=False)
            )
        progress.clear()
        show(blocks_table(rows, f"{where}, batch {point[0]}, context {point[1]}"))
    if "swap" in parts:
        model = RandomOPT(m, setting.dtype, setting.device)
        found["swap"] = rows = []
        for number, size in enumerate(setting.block_sizes):
            progress.part(2, len(PARTS), "swap").at(number, len(setting.block_sizes))
            rows.append(measure_swap(setting, model, size))
        progress.clear()
        del model  # its memory is needed below
        tokens = f"{where}, {setting.swap_tokens} tokens, {m.num_layers} layers"
        show(swap_table(rows, f"{tokens}, mean of {setting.swap_runs}"))
        show(transfer_table(rows, pinned, f"{tokens}, median of {setting.swap_runs}"))
    if "moves" in parts:
        found["moves"] = rows = measure_moves(setting, speed)
        show(moves_table(rows, where))
    return found


def show(table: Table) -> None:
    print(render(table, "plain"), end="\n\n", flush=True)


def attention_kernel(name: str) -> Kernel:
    """The attention kernel with this name. Raises ImportError where triton's is not to be had."""
    if name == "gather":
        return paged_attention.paged_attention_kernel
    import paged_attention_triton

    # Kept from call to call, as a server would: no launch is spent on clearing it.
    workspace = paged_attention_triton.Workspace("cuda")
    return partial(paged_attention_triton.paged_attention_kernel, workspace=workspace)


def run(argv: list[str] | None) -> int:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; repeatable")
    parser.add_argument(
        "--kernel",
        choices=("triton", "gather"),
        default="triton",
        help="whose attention; gather copies the blocks first",
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, four layers: does it run")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument(
        "--figures",
        type=folder,
        metavar="DIR",
        help="draw Figs. 18a and 19a there (needs matplotlib)",
    )
    args = parser.parse_args(argv)
    parts = args.part or PARTS
    if args.json:
        check_writable(args.json)
    if not torch.cuda.is_available():
        raise UsageError("needs a CUDA device")
    if args.figures:
        drawn = {"attention": pictures.KERNEL, "swap": pictures.SWAPS}
        pictures.check(args.figures, [drawn[part] for part in parts if part in drawn])
    start = time.perf_counter()
    progress = Progress.on(sys.stderr, "bench_paging_cost.py", quiet=args.quiet)
    try:
        kernel = attention_kernel(args.kernel) if {"attention", "blocks"} & {*parts} else None
        setting = Setting().quick() if args.quick else Setting()
        torch.manual_seed(0)
        where = f"{torch.cuda.get_device_name()}, {setting.model.name}'s shape"
        found = measure(setting, parts, kernel, where, progress)
    except ImportError as error:
        raise UsageError(str(error)) from None
    if args.json:
        found |= {"kernel": args.kernel, "quick": args.quick}
        write_json(
            args.json,
            measured(
                "benchmarks/bench_paging_cost.py",
                vars(args),
                found,
                INDEX,
                0,
                time.perf_counter() - start,
            ),
        )
    if args.figures:
        pictures.draw_paging(found, where, args.figures)
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return exit_code("bench_paging_cost.py", lambda: run(argv))
    except WrongResult as error:
        print(f"bench_paging_cost.py: wrong result, nothing timed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
