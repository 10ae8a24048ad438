"""The command line of reproduce.py: its options, and what is refused before anything runs.

Reproduces nothing. It starts at once: nothing of the simulator is loaded for --help.

    args = build_parser().parse_args(["--figure", "2", "--seeds", "8"])
    check(args)                             # UsageError, or nothing
"""

from __future__ import annotations

import argparse
import os

from vllm_sim.reporting.arguments import OneLineParser, file_name, positive
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.files import add_output_options

MAX_SEEDS = 1000
MAX_JOBS = 1024
FIGURES = ("table1", "2", "12", "13", "14", "15", "16", "17", "18b", "19b")


def build_parser() -> argparse.ArgumentParser:
    """All options of reproduce.py."""
    parser = OneLineParser(
        prog="reproduce.py",
        description="Regenerate the figures of the PagedAttention paper by simulation.",
        epilog="LENGTHS_DIR names a folder of length files; see docs/commands.md.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = f"only this one (repeatable): {', '.join(FIGURES)}"
    add("--figure", choices=FIGURES, action="append", metavar="NAME", help=text)
    add("--quick", action="store_true", help="only what is cheap to simulate, in seconds")
    jobs, text = min(_cores(), MAX_JOBS), "processes (default: one a core)"
    add("--jobs", type=positive, default=jobs, metavar="N", help=text)
    text = "seeds 0 to N - 1: rows are about their mean (default 1, seed 0)"
    add("--seeds", type=positive, default=1, metavar="N", help=text)
    text = "a full length file (repeatable); default LENGTHS_DIR, then tables"
    add("--lengths", type=file_name, action="append", default=[], metavar="FILE", help=text)
    add_output_options(parser, "all rows", "the figures")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def check(args: argparse.Namespace) -> None:
    """UsageError for values that make no sense, alone or together."""
    for option, most in (
        ("seeds", MAX_SEEDS),
        ("jobs", MAX_JOBS),  # all are started at once
    ):
        if (value := getattr(args, option)) > most:
            raise UsageError(f"--{option.replace('_', '-')} {value}: at most {most}")
    if args.figures is not None and str(args.figures) in FIGURES:
        raise UsageError(f"--figures takes a folder; for one figure use --figure {args.figures}")
