"""One call of main.py: the setting that its options ask for, the scenarios, and what they found.

    run(build_parser().parse_args(["--scenario", "2"]))     # prints; 0 if every check held, else 1

Whatever can be refused is refused before a scenario runs; files are written after the last one.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from dataclasses import replace

import torch

from paged_attention import DeviceMemoryError, KernelError, choose_device, choose_kernel
from vllm_sim import models
from vllm_sim.playback import timeline
from vllm_sim.reporting.command_line import UsageError, raise_on_interrupt
from vllm_sim.reporting.documents import document
from vllm_sim.reporting.files import check_writable, write_json
from vllm_sim.reporting.progress import Progress
from vllm_sim.reporting.tables import render, wrapped
from vllm_sim.scenarios import baseline, mixed, paged, pictures, sampling
from vllm_sim.scenarios.report import Check, ScenarioReport, checks_table, render_scenario
from vllm_sim.scenarios.setting import Setting, check_setting
from vllm_sim.workload.traces import read_trace

SCENARIOS = {1: baseline, 2: paged, 3: sampling, 4: mixed}
RECORDED = (3, 4)  # for --timeline
MAX_TRACE_ROWS = 20_000  # of --trace: far more than any pool of scenario 4 is given
MEMORY_FLAGS = "--layers, --num-blocks or --block-size"


def run(args: argparse.Namespace) -> int:
    """Run the scenarios asked for; returns 0 if every check held, else 1.

    Raises UsageError for what cannot be used, or needs more memory than there is.
    """
    try:
        with Progress.on(sys.stderr, "main.py", quiet=args.quiet) as progress:
            return run_and_show(args, progress)
    except DeviceMemoryError as error:
        raise UsageError(f"{error}; lower {MEMORY_FLAGS}") from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).split("\n")[0]  # others may use the device too
        raise UsageError(f"out of memory: {reason}; lower {MEMORY_FLAGS}") from None


def run_and_show(args: argparse.Namespace, progress: Progress) -> int:
    """Each scenario is printed as soon as it is done; then the checks, and the files."""
    setting, chosen = make_setting(args), sorted(set(args.scenario or SCENARIOS))
    check_outputs(args, setting, chosen)
    raise_on_interrupt()
    if setting.device.type == "cpu":
        tune_cpu()
    start = time.perf_counter()  # from here on, torch's import aside
    comment = "% " if args.format == "latex" else ""
    told = ", ".join(f"{key} {value}" for key, value in setting.describe().items())
    print(wrapped(told, comment) + "\n", flush=True)
    reports = []
    for index, number in enumerate(chosen):
        part = progress.part(index, len(chosen), f"scenario {number}")
        reports.append(run_one(number, setting, part))
        progress.clear()
        print(render_scenario(reports[-1], args.format), flush=True)
    checks = [check for report in reports for check in report.checks]
    failed = sum(not check.ok for check in checks)
    elapsed_s = time.perf_counter() - start
    print(render(checks_table(reports), args.format))
    held = f"{len(checks) - failed} of {len(checks)} checks held, {elapsed_s:.1f} s"
    print(f"\n{comment}{held}")
    write_outputs(args, setting, reports, int(failed > 0), elapsed_s)
    return int(failed > 0)


def make_setting(args: argparse.Namespace) -> Setting:
    """The setting the arguments ask for. Raises UsageError if it cannot be had."""
    try:
        device = choose_device(args.device)
    except KernelError as error:
        raise UsageError(str(error)) from None
    model = replace(models.MODELS[args.model], name=args.model)  # as the user wrote it
    num_layers = model.num_layers if args.layers is None else args.layers
    if num_layers > model.num_layers:
        raise UsageError(f"--layers {num_layers}: {model.name} has {model.num_layers}")
    if args.trace is None and args.time_unit is not None:
        raise UsageError("--time-unit is about a trace: give --trace")
    if args.trace is not None and 4 not in (args.scenario or (4,)):
        raise UsageError("--trace is for scenario 4: add --scenario 4")
    # Models that the paper does not use get as many slots as its smallest.
    deployment = models.DEPLOYMENTS.get(args.model, models.DEPLOYMENTS["opt-13b"])
    num_blocks = args.num_blocks or models.kv_blocks(deployment, args.block_size)
    try:
        heads = model.num_heads, model.num_kv_heads, model.head_size
        kernel, why = choose_kernel(args.kernel, device, *heads)
        trace = None
        if args.trace is not None:
            trace = read_trace(args.trace, MAX_TRACE_ROWS, args.time_unit)
        sizes = num_layers, num_blocks, args.block_size
        setting = Setting(model, device, *sizes, args.seed, kernel, why, trace)
        check_setting(setting)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return setting


def check_outputs(args: argparse.Namespace, setting: Setting, chosen: list[int]) -> None:
    """UsageError, before anything runs, for what could not be drawn or written after it."""
    if args.json is not None:
        check_writable(args.json)
    if args.figures is not None:
        pictures.check(args.figures, chosen)
    if args.timeline is not None:
        if not {*chosen} & {*RECORDED}:
            raise UsageError("--timeline shows scenarios 3 and 4, and neither was asked for")
        timeline.check(args.timeline, setting.num_blocks if 4 in chosen else 1)  # 3 has its own


def tune_cpu() -> None:
    """Memory settings for runs on the CPU, where moving K and V is all the work there is.

    Half the cores: copies gain little from more, and on a busy machine threads that wait for one
    another lose far more than that. And freed memory stays with the process: mapping fresh
    pages for each large tensor costs more than filling them.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_trim_threshold, 1 << 30)
        mallopt(m_mmap_threshold, 1 << 28)  # the pool itself, above this, is still given back


def run_one(number: int, setting: Setting, progress: Progress) -> ScenarioReport:
    """One scenario; an invariant that does not hold is a check that failed, not a crash."""
    scenario = SCENARIOS[number]
    try:
        return scenario.report(scenario.run(setting, progress))
    except AssertionError as error:
        reason = " ".join(str(error).split()) or "assertion failed"
        checks = [Check("all invariants", False, reason)]
        answer = "an invariant did not hold, so nothing is shown."
        about = scenario.__name__, "What went wrong?"
        return ScenarioReport(number, *about, checks=checks, answer=answer)


def write_outputs(
    args: argparse.Namespace,
    setting: Setting,
    reports: list[ScenarioReport],
    exit_code: int,
    elapsed_s: float,
) -> None:
    """The files that --json, --figures and --timeline name. Raises OutputError."""
    if args.json is not None:
        found = document(
            "main.py",
            vars(args),
            seeds=[args.seed],
            setting=setting.describe(),
            scenarios=[report.to_json() for report in reports],
            tables=[table for report in reports for table in report.tables_json()],
            checks=[check for report in reports for check in report.checks_json()],
            exit_code=exit_code,
            elapsed_s=elapsed_s,
        )
        write_json(args.json, found)
    if args.figures is not None:
        pictures.draw(reports, setting.line, args.figures)
    if args.timeline is not None:
        recordings = [one for report in reports for one in report.recordings]
        timeline.write(args.timeline, setting.line, recordings)
