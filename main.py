"""The four scenarios of the reproduction, on real K/V tensors, from one command.

Reproduces: Efficient Memory Management for Large Language Model Serving with PagedAttention
(arXiv:2309.06180): (1) baseline fragmentation, (2) paged allocation, (3) parallel sampling with
copy-on-write, (4) a mixed workload under memory pressure.

    python main.py                                  # all four: OPT-13B on an A100-40GB, one layer
    python main.py --scenario 2 --layers all        # K and V of all 40 layers, on a GPU
    python main.py --seed 1 --json out.json --format github
    python main.py --figures pictures --timeline run.html   # as pictures, and to be played back
    python main.py --scenario 4 --trace azure.csv.gz   # the requests of a real trace

Exit code 0 if every check held, 1 if one failed, 2 for input that cannot be used.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vllm_sim.reporting import command_line
from vllm_sim.reporting.command_line import (
    OneLineParser,
    UsageError,
    exit_code,
    file_name,
    folder,
    positive,
    seed,
)

if __name__ == "__main__":
    command_line.begin("main.py", "torch", "numpy", "tabulate")

from vllm_sim import models, paper
from vllm_sim.reporting.progress import Progress

if TYPE_CHECKING:
    from vllm_sim.scenarios.record import RunRecord
    from vllm_sim.scenarios.report import ScenarioReport
    from vllm_sim.scenarios.setting import Setting

EXAMPLE = """\
example:
  python main.py --scenario 1 --scenario 2 --device cpu --seed 1 --json out.json
  shows fragmentation and paging on the CPU and keeps all figures in out.json"""


MAX_TRACE_ROWS = 20_000  # of --trace: far more than any pool of scenario 4 is given
MEMORY_FLAGS = "--layers, --num-blocks or --block-size"


def layers(text: str) -> int | None:
    """A positive integer, or None for all."""
    return None if text == "all" else positive(text)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="main.py",
        description="PagedAttention's memory management, shown on real K/V tensors.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--scenario",
        type=positive,
        choices=(1, 2, 3, 4),
        action="append",
        metavar="1..4",
        help="run only this one (repeatable); default all",
    )
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto")
    add(
        "--kernel",
        choices=("auto", "gather", "triton"),
        default="auto",
        help="gather copies blocks together, triton reads them in place (default: auto, that is "
        "triton on a GPU if it runs there)",
    )
    add(
        "--model",
        choices=tuple(models.MODELS),
        default="opt-13b",
        metavar="NAME",
        help=f"default opt-13b; one of {', '.join(models.MODELS)}",
    )
    add(
        "--layers",
        type=layers,
        default=1,
        metavar="N|all",
        help="layers of K and V on the device (default 1; bookkeeping is for all)",
    )
    add(
        "--num-blocks",
        type=positive,
        metavar="N",
        help="blocks in the pool (default: as in Table 1, 983 for opt-13b)",
    )
    add(
        "--block-size",
        type=positive,
        default=paper.BLOCK_SIZE,
        metavar="N",
        help=f"slots per block (default {paper.BLOCK_SIZE})",
    )
    add(
        "--trace",
        type=file_name,
        metavar="FILE",
        help="scenario 4 serves the first requests of this trace (docs/capacity.md)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="same seed, same output (default 0)")
    add("--json", type=Path, metavar="FILE", help="write all figures and checks here")
    add(
        "--figures",
        type=folder,
        metavar="DIR",
        help="draw what was found there (needs matplotlib: requirements-dev.txt)",
    )
    add(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="write a page here that plays scenarios 3 and 4 back, block by block",
    )
    add("--format", choices=("plain", "github", "latex"), default="plain", help="of the tables")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def make_setting(args: argparse.Namespace) -> Setting:
    """The setting the arguments ask for. Raises UsageError if it cannot be had."""
    import torch

    from paged_attention import choose_kernel
    from vllm_sim.scenarios.setting import Setting, check_setting
    from vllm_sim.workload.traces import read_trace

    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu")
    device = torch.device("cuda" if cuda and args.device != "cpu" else "cpu")
    model = models.MODELS[args.model]
    num_layers = model.num_layers if args.layers is None else args.layers
    if num_layers > model.num_layers:
        raise UsageError(f"--layers {num_layers}: {model.name} has {model.num_layers}")
    if args.trace is not None and 4 not in (args.scenario or (4,)):
        raise UsageError("--trace is for scenario 4: add --scenario 4")
    num_blocks = args.num_blocks
    if num_blocks is None:
        # Models that the paper does not use get as many slots as its smallest.
        deployment = models.DEPLOYMENTS.get(args.model, models.DEPLOYMENTS["opt-13b"])
        num_blocks = models.kv_blocks(deployment, args.block_size)
    try:
        heads = model.num_heads, model.num_kv_heads, model.head_size
        kernel, why = choose_kernel(args.kernel, device, *heads)
        trace = None if args.trace is None else read_trace(args.trace, MAX_TRACE_ROWS)
        setting = Setting(
            model, device, num_layers, num_blocks, args.block_size, args.seed, kernel, why, trace
        )
        check_setting(setting)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return setting


def tune_cpu() -> None:
    """Memory settings for runs on the CPU, where moving K and V is all the work there is.

    Half the cores: copies gain little from more, and on a busy machine threads that wait for one
    another lose far more than that. And freed memory stays with the process: mapping fresh
    pages for each large tensor costs more than filling them.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_trim_threshold, 1 << 30)
        mallopt(m_mmap_threshold, 1 << 28)  # the pool itself, above this, is still given back


def run(args: argparse.Namespace, progress: Progress) -> int:
    """Run the scenarios asked for; returns 0 if every check held, else 1."""
    from vllm_sim.reporting.documents import document
    from vllm_sim.scenarios.report import (
        check_writable,
        checks_table,
        render,
        render_scenario,
        write_json,
    )

    if args.json is not None:
        check_writable(args.json)
    setting = make_setting(args)
    chosen = sorted(set(args.scenario or (1, 2, 3, 4)))
    record = make_record(args, setting, chosen)
    from vllm_sim.scenarios import baseline, mixed, paged, sampling

    command_line.raise_on_interrupt()
    if setting.device.type == "cpu":
        tune_cpu()
    scenarios = (baseline, paged, sampling, mixed)
    start = time.perf_counter()  # from here on, torch's import aside
    comment = "% " if args.format == "latex" else ""
    described = setting.describe()
    print(comment + ", ".join(f"{key} {value}" for key, value in described.items()), flush=True)
    print()
    reports = []
    for index, number in enumerate(chosen):
        part = progress.part(index, len(chosen), f"scenario {number}")
        reports.append(run_one(scenarios[number - 1], number, setting, part, record))
        progress.clear()
        print(render_scenario(reports[-1], args.format), flush=True)
    checks = [check for report in reports for check in report.checks]
    failed = sum(not check.ok for check in checks)
    elapsed = time.perf_counter() - start
    print(render(checks_table(reports), args.format))
    print(f"\n{comment}{len(checks) - failed} of {len(checks)} checks held, {elapsed:.1f} s")
    if args.json is not None:
        write_json(
            args.json,
            document(
                "main.py",
                vars(args),
                seeds=[args.seed],
                setting=described,
                scenarios=[report.to_json() for report in reports],
                tables=[table for report in reports for table in report.tables_json()],
                checks=[check for report in reports for check in report.checks_json()],
                exit_code=1 if failed else 0,
                elapsed_s=elapsed,
            ),
        )
    if args.figures is not None:
        from vllm_sim.scenarios import pictures

        pictures.draw(record, args.figures)
    if args.timeline is not None:
        from vllm_sim.scenarios import timeline

        timeline.write(args.timeline, record)
    return 1 if failed else 0


def make_record(
    args: argparse.Namespace, setting: Setting, scenarios: list[int]
) -> RunRecord | None:
    """Where the scenarios leave what --figures and --timeline show; None if neither was asked for.

    Raises UsageError, before anything runs, for what could not be drawn or written after it.
    """
    if args.figures is None and args.timeline is None:
        return None
    if args.figures is not None:
        from vllm_sim.scenarios import pictures

        pictures.check(args.figures, scenarios)
    if args.timeline is not None:
        from vllm_sim.scenarios import timeline

        if args.json is not None and args.json.resolve() == args.timeline.resolve():
            raise UsageError(f"--json and --timeline are the same file, {args.timeline}")
        timeline.check(args.timeline, scenarios, setting.num_blocks)
    from vllm_sim.scenarios.record import RunRecord

    return RunRecord(setting.line)


def run_one(
    scenario: ModuleType,
    number: int,
    setting: Setting,
    progress: Progress,
    record: RunRecord | None = None,
) -> ScenarioReport:
    """One scenario; an invariant that does not hold is a check that failed, not a crash."""
    from vllm_sim.scenarios.report import ScenarioReport

    try:
        return scenario.run(setting, progress, *(() if record is None else (record,)))
    except AssertionError as error:
        report = ScenarioReport(number, scenario.__name__, "What went wrong?")
        report.check("all invariants", False, " ".join(str(error).split()) or "assertion failed")
        report.answer = "an invariant did not hold, so nothing is shown."
        return report


def parse_and_run(argv: list[str] | None) -> int:
    """The exit code. Raises UsageError for what cannot be used, or needs more memory than is."""
    args = build_parser().parse_args(argv)
    import torch

    from paged_attention import DeviceMemoryError

    try:
        with Progress.on(sys.stderr, "main.py", quiet=args.quiet) as progress:
            return run(args, progress)
    except DeviceMemoryError as error:
        raise UsageError(f"{error}; lower {MEMORY_FLAGS}") from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).split("\n")[0]  # others may use the device too
        raise UsageError(f"out of memory: {reason}; lower {MEMORY_FLAGS}") from None


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what cannot be used into one line and exit code 2."""
    # Threads that spin while they wait cost a busy CPU far more than they save. OpenMP reads this
    # once, when torch is first imported: nothing above this line may import it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return exit_code("main.py", partial(parse_and_run, argv))


if __name__ == "__main__":
    sys.exit(main())
