"""What paging costs on one GPU, beside the paper's figures.

    python benchmarks/bench_paging_cost.py [--quick] [--part swap] [--kernel gather] [--json FILE]
        [--figures DIR]

Serves Fig. 18a (attention over random blocks against contiguous K and V), the kernel's side of
Fig. 18b (block sizes), Fig. 19a (swapping and recomputing 256 tokens), and the fused block write
and block copy of section 5. At OPT-13B's shape in fp16; the paper does not state Fig. 18a's. Needs
a CUDA device with 50 GB of free memory and triton; takes half a minute. The parts:

    attention  the same kernel over random and over consecutive blocks, and torch's best over the
               same memory without blocks; floor: live K and V over the bandwidth of a large copy
    blocks     block sizes 1 to 256, batch 32, context 1024
    swap       on the host's clock until all is done; recompute: a prefill of the tokens through a
               random-weight OPT-13B that writes their K and V to the pool
    moves      block write and copy, beside the indexed operations of plain torch

All other times are the device's, medians, with a cold L2 cache: see gpu_timing.py. Attention has a
plan, made before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pictures
from gpu_timing import PinnedBandwidth, copy_bandwidth, pinned_bandwidth
from measure_paging import (
    Prepare,
    Row,
    Setting,
    WrongResult,
    measure_attention,
    measure_moves,
    measure_swap,
)
from opt_prefill import RandomOPT
from script import Script, entry, options, show, table

import paged_attention
from vllm_sim.paper import figures as paper
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.drawing import check_folder
from vllm_sim.reporting.tables import Table

PARTS = ("attention", "blocks", "swap", "moves")
INDEX = {"attention": 3, "blocks": 3, "swap": 1, "moves": 3}  # columns that say which row it is


def percent_over(time: float | None, base: float | None) -> float | None:
    return None if time is None or base is None else 100.0 * (time / base - 1.0)


def over_floor(row: Row) -> float:
    return row["paged_us"] / row["floor_us"]


def paging_percent(row: Row) -> float:
    return percent_over(row["paged_us"], row["contiguous_us"])


def attention_table(rows: Sequence[Row], where: str) -> Table:
    """Fig. 18a: our overheads beside the paper's. Rows of measure_attention."""

    def over_best(row: Row) -> float | None:
        peers = [row[name] for name in ("cudnn_us", "flash_us") if row[name] is not None]
        return percent_over(row["paged_us"], min(peers, default=None))

    def told(name: str, row: Row) -> float | None:
        return paper.FIG18A.get((row["batch"], row["context"]), {}).get(name)

    columns = [
        ("batch", "batch"),
        ("context", "context"),
        ("paged us", "paged_us"),
        ("over floor", over_floor),
        ("own contiguous us", "contiguous_us"),
        ("paging %", paging_percent),
        ("cuDNN us", "cudnn_us"),
        ("Flash us", "flash_us"),
        ("over best %", over_best),
        ("paper: vLLM us", partial(told, paper.VLLM)),
        ("FT us", partial(told, paper.FASTER_TRANSFORMER)),
        ("overhead %", partial(told, "overhead")),
    ]
    low, high = paper.FIG18A_TEXT_OVERHEAD
    setting = f"{where}; the paper's text: {low}-{high} % over FasterTransformer (FT)"
    return table("Fig. 18a: the attention kernel", columns, rows, setting)


def blocks_table(rows: Sequence[Row], where: str) -> Table:
    """The kernel's side of Fig. 18b: the paper's columns are end to end. Rows as in Fig. 18a's."""
    columns = [
        ("block size", "block_size"),
        ("paged us", "paged_us"),
        ("over floor", over_floor),
        ("paging %", paging_percent),
    ]
    for name, told in paper.FIG18B.items():
        columns.append((f"paper: {name} s/token", lambda row, told=told: told[row["block_size"]]))
    setting = f"{where}; the paper's are end to end: cache hits and scheduling as well"
    return table("Fig. 18b: block sizes, the kernel's side", columns, rows, setting, decimals=3)


def swap_table(rows: Sequence[Row], where: str) -> Table:
    """Fig. 19a, milliseconds. Rows of measure_swap."""

    def ratio(row: Row) -> float:
        return row["recompute_ms"] / (row["swap_in_ms"] + row["swap_out_ms"])

    columns = [("block size", "block_size")]
    ours = {f"{name} ms": name for name in ("recompute", "swap in", "swap out")}
    cells = [(h, f"{name.replace(' ', '_')}_ms", paper.FIG19A[name]) for h, name in ours.items()]
    for header, cell, told in [*cells, ("recompute/(in+out)", ratio, paper.FIG19A_RATIO)]:
        columns += [(header, cell), ("paper", lambda row, told=told: told[row["block_size"]])]
    return table("Fig. 19a: swapping and recomputing", columns, rows, where)


def transfer_table(rows: Sequence[Row], pinned: PinnedBandwidth, where: str) -> Table:
    """The same swaps as shares of what one large pinned copy reaches."""
    columns = [("block size", "block_size"), ("blocks", "blocks")]
    columns.append(("KiB each", lambda row: row["num_bytes"] // row["blocks"] // 1024))
    for way, limit in zip(("in", "out"), pinned):

        def speed(row: Row, unit: float, way: str = way) -> float:
            return row["num_bytes"] / row[f"swap_{way}_median_ms"] * 1e3 / unit

        columns.append((f"{way} GB/s", partial(speed, unit=1e9)))
        columns.append(("share of limit", partial(speed, unit=limit)))
    limits = f"limit: {pinned.to_device / 1e9:.1f} GB/s in, {pinned.to_host / 1e9:.1f} GB/s out"
    return table("Swapping against the pinned copy", columns, rows, f"{where}; {limits}")


def moves_table(rows: Sequence[Row], where: str) -> Table:
    """Block write and block copy. Rows of measure_moves."""
    columns = [(name, name) for name in ("what", "layers", "blocks")]
    for name in ("fused", "plain"):
        share = lambda row, name=name: row["limit_us"] / row[f"{name}_us"]  # noqa: E731
        columns += [(f"{name} us", f"{name}_us"), ("share of limit", share)]
    columns.append(("call us", "call_us"))
    return table("Section 5: block write and block copy", columns, rows, where)


def measure(
    setting: Setting,
    parts: Sequence[str],
    prepare: Prepare | None,
    where: str,
    each: Callable[..., Iterable],
) -> dict[str, object]:
    """Run the parts, print each table as it is made, and return all figures; `each`: Script's."""
    speed, pinned = copy_bandwidth(), pinned_bandwidth()
    where = f"{where}, large copy {speed / 1e9:,.0f} GB/s"
    m = setting.model
    found: dict[str, object] = {"model": m.name, "layers": m.num_layers, "heads": m.num_heads}
    found |= {"head_size": m.head_size, "dtype": str(setting.dtype).removeprefix("torch.")}
    found |= {"copy_bytes_per_s": speed, "pinned_bytes_per_s": pinned._asdict()}

    def rows_of(part: str, points: Sequence, measured: Callable[..., Row]) -> list[Row]:
        shown = each(points, part, (PARTS.index(part), len(PARTS)))
        found[part] = [measured(point) for point in shown]
        return found[part]

    attention = partial(measure_attention, setting, prepare, speed)
    if "attention" in parts:
        rows = rows_of("attention", setting.attention, lambda size: attention(*size))
        show(attention_table(rows, where))
    if "blocks" in parts:
        alone = partial(attention, setting.batch, setting.context, peers=False)
        rows = rows_of("blocks", setting.block_sizes, lambda size: alone(block_size=size))
        told = f"{where}, batch {setting.batch}, context {setting.context}"
        show(blocks_table(rows, told))
    if "swap" in parts:
        model = RandomOPT(m, setting.dtype, setting.device)
        rows = rows_of("swap", setting.block_sizes, partial(measure_swap, setting, model))
        del model  # its memory is needed below
        tokens = f"{where}, {setting.swap_tokens} tokens, {m.num_layers} layers"
        show(swap_table(rows, f"{tokens}, mean of {setting.swap_runs}"))
        show(transfer_table(rows, pinned, f"{tokens}, median of {setting.swap_runs}"))
    if "moves" in parts:
        found["moves"] = rows = measure_moves(setting, speed)
        show(moves_table(rows, where))
    return found


def attention_kernel(name: str) -> Prepare:
    """Makes the attention kernel with this name. Raises ImportError where triton's is not to be
    had."""
    if name == "gather":
        return lambda *made_for: paged_attention.paged_attention_kernel
    import paged_attention_triton as kernels

    # Kept from call to call, as a server would: no launch is spent on clearing it.
    kernel = partial(kernels.paged_attention_kernel, workspace=kernels.Workspace("cuda"))
    return lambda *made_for: partial(kernel, plan=kernels.Plan(*made_for))


def run(argv: list[str] | None) -> int:
    parser = options(__doc__, drawn="Figs. 18a and 19a")
    add = parser.add_argument
    add("--part", choices=PARTS, action="append", help="only this; repeatable")
    told = "whose attention; gather copies the blocks first"
    add("--kernel", choices=("triton", "gather"), default="triton", help=told)
    add("--quick", action="store_true", help="few sizes, four layers: does it run")
    script = Script(__file__, parser, argv)
    args = script.args
    parts = args.part or PARTS
    if args.figures:
        drawn = {"attention": pictures.KERNEL, "swap": pictures.SWAPS}
        check_folder(args.figures, [drawn[part] for part in parts if part in drawn])
    try:
        needed = {"attention", "blocks"} & {*parts}
        prepare = attention_kernel(args.kernel) if needed else None
        setting = Setting().quick() if args.quick else Setting()
        torch.manual_seed(0)
        where = f"{torch.cuda.get_device_name()}, {setting.model.name}'s shape"
        found = measure(setting, parts, prepare, where, script.each)
    except ImportError as error:
        raise UsageError(str(error)) from None
    except WrongResult as error:
        print(f"{script.name}: wrong result, nothing timed: {error}", file=sys.stderr)
        return 1
    code = script.write({**found, "kernel": args.kernel, "quick": args.quick}, INDEX)
    if args.figures:
        pictures.draw_paging(found, where, args.figures)
    return code


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
