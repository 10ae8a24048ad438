"""The options of capacity.py about a request trace, and the case that they make.

Reproduces nothing by itself: capacity.py adds the options, reads the trace with them and hands it
to trace_tables.py. It loads nothing else until a trace is there, so that `--help` starts at once.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from vllm_sim.reporting.command_line import UsageError, file_name, positive

if TYPE_CHECKING:
    from vllm_sim.sizing.case import Case, TraceCase

PREEMPTION_RATE = 0.01
HIGHEST_RATE = 10**6


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("a request trace, and what it needs").add_argument
    add(
        "--trace",
        type=file_name,
        metavar="FILE",
        help="Azure, BurstGPT or another CSV, Mooncake or other JSON lines, plain or gzipped "
        "(docs/capacity.md)",
    )
    add(
        "--preemption-rate",
        type=preemption_rate,
        metavar="SHARE",
        help="requests held up by memory, over all, in the second answer (default "
        f"{PREEMPTION_RATE:g}; the first is for none)",
    )
    add(
        "--rate",
        type=arrival_rate,
        metavar="N|inf",
        help="requests a second, Poisson, instead of the file's times; inf: all at once",
    )
    add("--trace-rows", type=positive, metavar="N", help="only the first rows of the file")
    add(
        "--speed-of",
        type=str.lower,
        metavar="GPU",
        help="whose bandwidth and FLOPS, with --gpu-memory (docs/capacity.md)",
    )


def preemption_rate(text: str) -> float:
    """A share from 0, below 1."""
    value = _number(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a share from 0 and below 1")
    return value


def arrival_rate(text: str) -> float:
    """Requests a second, or inf."""
    value = _number(text)
    if not (1.0 / HIGHEST_RATE <= value <= HIGHEST_RATE or text == "inf"):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!a} is neither requests a second from 1e-06 to {HIGHEST_RATE:,} nor inf"
        )
    return value


def _number(text: str) -> float:
    try:
        plain = text.isascii() and "_" not in text and len(text) <= 40
        return float(text) if plain else math.nan
    except ValueError:
        return math.nan


def check_options(args: argparse.Namespace) -> None:
    """UsageError for options that contradict each other."""
    if args.trace is None:
        for name in ("preemption_rate", "rate", "trace_rows", "speed_of"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is about a trace: give --trace")
        return
    if args.workload is not None:
        raise UsageError("--workload and --trace are two answers to one question: give one of them")
    if args.speed_of is not None and not args.gpu_memory:
        raise UsageError("--speed-of is for --gpu-memory: --gpu says the speed itself")
    if args.speed_of is None and args.gpu_memory:
        raise UsageError("--gpu-memory says no speed, which --trace needs: give --speed-of GPU")


def make_trace_case(args: argparse.Namespace, case: Case) -> TraceCase:
    """The trace that the arguments name, for this case. Raises UsageError, WorkloadError."""
    from vllm_sim.sizing.case import ACCELERATORS, TraceCase, speed_of
    from vllm_sim.workload.traces import read_trace

    accelerator = args.speed_of or case.gpu.name
    if accelerator not in ACCELERATORS:
        known = ", ".join(ACCELERATORS)
        raise UsageError(f"--speed-of {accelerator[:40]!a}: known are {known}")
    trace = read_trace(args.trace, args.trace_rows)
    if args.rate is None and trace.arrivals is None:
        raise UsageError(
            f"{args.trace}: no column of times: give --rate, requests a second, or --rate inf"
        )
    trace = trace.up_to(case.max_len)
    if args.rate is not None:
        trace = trace.arriving(args.rate, args.seed)
    rate = PREEMPTION_RATE if args.preemption_rate is None else args.preemption_rate
    return TraceCase(case, trace, speed_of(case, accelerator), rate, args.rate)
