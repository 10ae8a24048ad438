"""What bounds the attention kernel, read from the GPU's own counters by Nsight Compute.

    python benchmarks/profile_attention.py [--shape NAME] [--json FILE]

Serves section 4.1 beside bench_attention.py, which says how long; this says why. Needs a CUDA
device, triton and `ncu`, which comes with CUDA and may need the right to read counters. Each shape
of bench_attention.py, one launch each, caches cleared before:

    random       the kernel over random block tables
    consecutive  the same over blocks in order: what random places cost
    read         as many consecutive bytes, read and nothing else

Bytes are those that came from device memory; busy is how much of its peak the memory delivered,
over the kernel's whole time; warps are those at work on a multiprocessor, of the 64 possible; issue
is the share of cycles in which an instruction was issued; waves are programs over how many fit.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_contenders import SHAPES, Data, S
from script import Script, entry, options, show, table

from vllm_sim.reporting.command_line import UsageError

CASES = ("random", "consecutive", "read")  # in the order of their launches
METRICS = {
    "us": "gpu__time_duration.sum",
    "bytes_read": "dram__bytes_read.sum",
    "memory_busy_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "waves": "launch__waves_per_multiprocessor",
    "registers": "launch__registers_per_thread",
}
# ncu chooses units by size unless told to print base units.
NCU = ("ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none")
NCU += ("--kernel-name", "regex:^_(attend|read)$", "--metrics", ",".join(METRICS.values()))
COLUMNS = [
    ("shape", "shape"),
    ("blocks", "case"),
    ("us", "us"),
    ("bytes / live", "read_over_live"),
    ("busy %", "memory_busy_percent"),
    ("warps %", "warps_percent"),
    ("issue %", "issue_percent"),
    ("waves", "waves"),
    ("registers", lambda row: int(row["registers"])),
]
Row = dict[str, object]


class ProfilerError(UsageError):
    """ncu is missing, or did not say what was asked."""


def launch(name: str) -> None:
    """The three kernels of a shape, once each: what ncu watches."""
    from read_only import read_bytes

    from paged_attention_triton import Plan, paged_attention_kernel

    data = Data(SHAPES[name])
    plan = Plan(data.q, data.k, data.v, data.shape.lens)
    counts = [len(table) for table in data.tables]
    ordered = torch.zeros_like(data.padded)
    for row, (count, start) in enumerate(zip(counts, data.starts.tolist())):
        ordered[row, :count] = torch.arange(start // S, start // S + count)
    source = torch.randn(SHAPES[name].live_bytes // 2, dtype=torch.float16, device=data.device)
    for tables in (data.padded, ordered):
        paged_attention_kernel(data.q, data.k, data.v, tables, data.lens, plan=plan)
    read_bytes(source, 4224, 8192)
    torch.cuda.synchronize()


def parse(text: str) -> list[Row]:
    """The rows of ncu's CSV, one a launch. Raises ProfilerError."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(io.StringIO("\n".join(lines))))
    try:
        head, launches = table[0], table[2:]  # the line between has the units
        places = {key: head.index(metric) for key, metric in METRICS.items()}
        rows = [
            {key: float(cells[at].replace(",", "")) for key, at in places.items()}
            for cells in launches
        ]
    except (IndexError, ValueError) as error:
        raise ProfilerError(f"ncu's output is not as expected: {error}") from error
    if len(rows) != len(CASES):
        raise ProfilerError(f"ncu saw {len(rows)} launches, not {len(CASES)}")
    for row in rows:
        row["us"] /= 1e3  # in ns
    return rows


def profile(name: str) -> list[Row]:
    """One shape's launches under ncu. Raises ProfilerError."""
    command = [*NCU, sys.executable, __file__, "--launch", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing was said"]
        raise ProfilerError(f"ncu ended with {done.returncode}: {said[-1]}")
    floor = SHAPES[name].live_bytes
    return [
        {"shape": name, "case": case, **row, "read_over_live": row["bytes_read"] / floor}
        for case, row in zip(CASES, parse(done.stdout))
    ]


def run(argv: list[str] | None) -> int:
    parser = options(__doc__)
    told = "only this one; may be given again"
    parser.add_argument("--shape", action="append", choices=SHAPES, help=told)
    parser.add_argument("--launch", choices=SHAPES, help="only launch its kernels, for a profiler")
    script = Script(__file__, parser, argv)
    if script.args.launch:
        launch(script.args.launch)
        return 0
    if shutil.which(NCU[0]) is None:
        raise ProfilerError("there is no ncu on the PATH; it comes with CUDA (Nsight Compute)")
    rows = [row for name in script.each(script.args.shape or SHAPES) for row in profile(name)]
    device = torch.cuda.get_device_name()
    show(table("What the counters say", COLUMNS, rows, device))
    return script.write({"device": device, "rows": rows}, {"rows": 2})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
