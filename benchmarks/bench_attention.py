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

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import cold_median_us, copy_bandwidth

import paged_attention
import pictures_bench
from command_line import OneLineParser, UsageError, exit_code, positive
from json_document import measured
from paged_attention import gather_blocks, pad_block_tables
from progress import Progress
from report import Table, check_writable, render, write_json

D, S = 128, 16
Run = Callable[[], torch.Tensor]  # returns out (B, H, D)
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Shape:
    """H query heads over H_kv K/V heads, for B sequences of these lengths; `aim`: ours / floor."""

    heads: int
    kv_heads: int
    lens: tuple[int, ...]
    aim: float

    @property
    def ragged(self) -> bool:
        return len(set(self.lens)) > 1

    @property
    def live_bytes(self) -> int:
        return sum(self.lens) * self.kv_heads * D * 2 * 2  # K and V in fp16


def ragged(batch: int) -> tuple[int, ...]:
    rng = random.Random(0)
    return tuple(rng.randint(128, 2048) for _ in range(batch))


SHAPES = {
    "OPT-13B 32 x 1024": Shape(40, 40, (1024,) * 32, 1.045),
    "OPT-13B 64 x 128..2048": Shape(40, 40, ragged(64), 1.03),
    "OPT-13B 8 x 2000": Shape(40, 40, (2000,) * 8, 1.12),
    "OPT-13B 32 x 256": Shape(40, 40, (256,) * 32, 1.25),
    "Llama-3-8B 64 x 1024": Shape(32, 8, (1024,) * 64, 1.15),
    "Llama-3-8B 128 x 128..2048": Shape(32, 8, ragged(128), 1.08),
    "Llama-3-70B 64 x 4096": Shape(64, 8, (4096,) * 64, 1.025),
    "32/8 heads 1 x 32768": Shape(32, 8, (32768,), 1.35),
}
CAT_SHAPE = "OPT-13B 32 x 1024"


class WrongResult(Exception):
    """A contender whose output is not that of the plain kernel: it is not timed."""


class Data:
    """One shape's tensors: q (B, H, D), two pools (N, S, H_kv, D), tables, lengths."""

    def __init__(self, shape: Shape, device: str = "cuda") -> None:
        torch.manual_seed(0)
        self.shape, batch, self.device = shape, len(shape.lens), device
        counts = [-(-length // S) for length in shape.lens]
        blocks = 3 * sum(counts) // 2
        pool = (blocks, S, shape.kv_heads, D)
        self.q = torch.randn(batch, shape.heads, D, dtype=torch.float16, device=device)
        self.k = torch.randn(pool, dtype=torch.float16, device=device)
        self.v = torch.randn(pool, dtype=torch.float16, device=device)
        order = iter(torch.randperm(blocks).tolist())
        self.tables = [[next(order) for _ in range(count)] for count in counts]
        self.padded = pad_block_tables(self.tables, device=device)
        self.lens = torch.tensor(shape.lens, dtype=torch.int32, device=device)
        self.flat = torch.tensor([*chain(*self.tables)], dtype=torch.int32, device=device)
        ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0) * S
        self.starts = ends.to(device, torch.int32)  # of each sequence's slots, packed: (B + 1,)
        self.one_each = torch.arange(batch + 1, dtype=torch.int32, device=device)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Contiguous K and V (B, H_kv, T, D) of equal lengths."""
        length = self.shape.lens[0]
        parts = (gather_blocks(pool, self.padded)[:, :length] for pool in (self.k, self.v))
        k, v = (part.transpose(1, 2).contiguous() for part in parts)
        return k, v

    def sdpa(self, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
        """k, v: (B, H_kv, T, D), any strides."""
        gqa = self.shape.heads != self.shape.kv_heads
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(self.q[:, :, None], k, v, enable_gqa=gqa)[:, :, 0]

    def gathered(self, backend: SDPBackend) -> torch.Tensor:
        """Equal lengths: the blocks copied, then torch's kernel."""
        length = self.shape.lens[0]
        k, v = (gather_blocks(pool, self.padded)[:, :length] for pool in (self.k, self.v))
        return self.sdpa(k.transpose(1, 2), v.transpose(1, 2), backend)

    def packed(self) -> torch.Tensor:
        """Different lengths: live blocks copied behind one another, then torch's varlen kernel."""
        rows = (pool.flatten(1).index_select(0, self.flat) for pool in (self.k, self.v))
        k, v = (row.view(-1, self.shape.kv_heads, D) for row in rows)
        return torch.ops.aten._flash_attention_forward(
            self.q, k, v, self.one_each, self.starts, 1, max(self.shape.lens), 0.0, False, False,
            seqused_k=self.lens,
        )[0]  # fmt: skip

    def cat(self) -> torch.Tensor:
        """Block by block, sequence by sequence, as naively as can be."""
        rows = []
        for table, length in zip(self.tables, self.shape.lens):
            parts = (torch.cat([pool[b] for b in table])[:length] for pool in (self.k, self.v))
            k, v = (part.transpose(0, 1)[None] for part in parts)
            gqa = self.shape.heads != self.shape.kv_heads
            query = self.q[len(rows)][None, :, None]
            rows.append(F.scaled_dot_product_attention(query, k, v, enable_gqa=gqa)[0, :, 0])
        return torch.stack(rows)


def flashinfer_run(data: Data, tensor_cores: bool) -> Run:
    """FlashInfer's batch decode over the same pools; ImportError where it is not installed."""
    import flashinfer

    buffer = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        buffer, "NHD", use_tensor_cores=tensor_cores
    )
    shape = data.shape
    last = torch.tensor([(n - 1) % S + 1 for n in shape.lens], dtype=torch.int32, device="cuda")
    wrapper.plan(
        data.starts // S, data.flat, last, shape.heads, shape.kv_heads, D, S,
        pos_encoding_mode="NONE", q_data_type=torch.float16, kv_data_type=torch.float16,
    )  # fmt: skip
    return lambda: wrapper.run(data.q, (data.k, data.v))


def contenders(name: str, data: Data) -> Iterator[tuple[str, Run]]:
    """(key, run) of each that can run on this shape."""
    import paged_attention_triton as kernels

    arguments = data.q, data.k, data.v, data.padded, data.lens
    workspace = kernels.Workspace(data.device)
    yield "triton", lambda: kernels.paged_attention_kernel(*arguments, workspace=workspace)[0]
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    if data.shape.ragged:
        yield "gather", data.packed
    else:
        for key, backend in backends.items():
            yield f"gather_{key}", lambda backend=backend: data.gathered(backend)
        k, v = data.dense()
        for key, backend in backends.items():
            yield key, lambda backend=backend: data.sdpa(k, v, backend)
    for key, tensor_cores in (("flashinfer", False), ("flashinfer_tc", True)):
        try:
            yield key, flashinfer_run(data, tensor_cores)
        except Exception as error:  # what it raises where it cannot be built is its own
            print(f"{name}: {key}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
    yield "plain", lambda: paged_attention.paged_attention_kernel(*arguments)[0]
    if name == CAT_SHAPE:
        yield "cat", data.cat


def read_us(num_bytes: int, repeats: int, dirty: bool, device: str) -> float:
    """Microseconds to read as many consecutive bytes, the best of a few ways."""
    from read_only import read_bytes

    source = torch.randn(num_bytes // 2, dtype=torch.float16, device=device)
    times = []
    for programs, tile in ((4224, 8192), (1056, 8192)):
        run = lambda programs=programs, tile=tile: read_bytes(source, programs, tile)  # noqa: E731
        times.append(cold_median_us(run, repeats, graph=True, dirty=dirty))
    return min(times)


def measure(
    name: str, shape: Shape, bandwidth: float, repeats: int, device: str = "cuda"
) -> Row:
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
        row[f"read_{suffix}"] = read_us(
            shape.live_bytes, repeats, suffix == "dirty_us", device
        )
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
    "triton": ("triton",), "read": ("read",), "cuDNN": ("cudnn",), "Flash": ("flash",),
    "FlashInfer": ("flashinfer", "flashinfer_tc"), "gather": ("gather", "gather_cudnn",
    "gather_flash"), "plain": ("plain",), "cat": ("cat",),
}  # fmt: skip


def tables(rows: list[Row], where: str) -> list[Table]:
    """Time over floor, the cache flushed to clean and, for the kernels, to dirty lines."""
    result = []
    for title, suffix, names in (
        ("Time over floor, clean cold L2", "us", tuple(COLUMNS)),
        ("Time over floor, dirty cold L2", "dirty_us", tuple(COLUMNS)[:5]),
    ):
        body = [
            (row["shape"], row["floor_us"], row["aim"],
             *(over_floor(row, COLUMNS[name], suffix) for name in names))
            for row in rows
        ]  # fmt: skip
        result.append(Table(title, ("shape", "floor us", "aim", *names), body, where, 3))
    return result


def wrong_keys(row: Row) -> list[str]:
    """The contenders of a row whose result was not that of the plain kernel."""
    return [key for key in row if str(row[key]).startswith("WrongResult")]


def run(argv: list[str] | None) -> int:
    parser = OneLineParser(prog="bench_attention.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--repeats", type=positive, default=30, help="runs of each; the median counts"
    )
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="only this one; may be given again"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--figures", type=Path, metavar="DIR",
                        help="draw the times over the floor there (needs matplotlib)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json)
    if not torch.cuda.is_available():
        raise UsageError("needs a CUDA device")
    if args.figures:
        pictures_bench.check(args.figures, [pictures_bench.FLOOR])
    start = time.perf_counter()
    progress = Progress.on(sys.stderr, "bench_attention.py", quiet=args.quiet)
    bandwidth = copy_bandwidth()
    found = {"bandwidth_bytes_per_s": bandwidth, "repeats": args.repeats, "head_size": D}
    found |= {"block_size": S, "dtype": "float16"}
    rows: list[Row] = []
    names = args.shape or SHAPES
    for name in names:
        progress.at(len(rows), len(names), name)
        rows.append(measure(name, SHAPES[name], bandwidth, args.repeats))
        torch.cuda.empty_cache()
        code = int(any(wrong_keys(row) for row in rows))
        if args.json:  # after each shape: time on a GPU is dear
            write_json(args.json, measured(
                "benchmarks/bench_attention.py", vars(args), {**found, "shapes": rows},
                {"shapes": 1}, code, time.perf_counter() - start,
            ))  # fmt: skip
    progress.clear()
    where = f"{torch.cuda.get_device_name()}, large copy {bandwidth / 1e9:,.0f} GB/s"
    for table in tables(rows, f"{where}, median of {args.repeats}"):
        print(render(table, "plain"))
    print("gather_blocks, share of the copy bandwidth:")
    print("  " + ", ".join(f"{row['shape']} {row['gather_share']:.2f}" for row in rows))
    if args.figures:
        drawn = {row["shape"]: {name: over_floor(row, keys) for name, keys in COLUMNS.items()}
                 for row in rows}  # fmt: skip
        pictures_bench.draw_attention(drawn, where, args.figures)
    return code


def main(argv: list[str] | None = None) -> int:
    return exit_code("bench_attention.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
