"""The options of main.py: what is measured on what, and where the results go.

args = build_parser().parse_args(["--scenario", "2", "--device", "cpu"])
"""

from __future__ import annotations

import argparse

from vllm_sim import models, paper
from vllm_sim.reporting.arguments import TIME_UNITS, OneLineParser, file_name, positive, seed
from vllm_sim.reporting.files import add_output_options, out_file

EXAMPLE = """\
example:
  python main.py --scenario 1 --scenario 2 --device cpu --seed 1 --json out.json
  shows fragmentation and paging on the CPU and keeps all figures in out.json"""


def layers(text: str) -> int | None:
    """A positive integer, or None for all."""
    return None if text.lower() == "all" else positive(text)


def build_parser() -> argparse.ArgumentParser:
    """main.py's parser; a mistake raises UsageError."""
    parser = OneLineParser(
        prog="main.py",
        description="PagedAttention's memory management, shown on real K/V tensors.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    four = {"type": positive, "choices": (1, 2, 3, 4), "metavar": "1..4"}
    add("--scenario", action="append", help="run only this one (repeatable); default all", **four)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto")
    help = "gather copies blocks together, triton reads them in place (default: auto, that is "
    help += "triton on a GPU if it runs there)"
    add("--kernel", choices=("auto", "gather", "triton"), default="auto", help=help)
    names, help = tuple(models.MODELS), f"default opt-13b; one of {', '.join(models.MODELS)}"
    add("--model", choices=names, default="opt-13b", metavar="NAME", help=help)
    help = "layers of K and V on the device (default 1; bookkeeping is for all)"
    add("--layers", type=layers, default=1, metavar="N|all", help=help)
    help = "blocks in the pool (default: as in Table 1, 983 for opt-13b)"
    add("--num-blocks", type=positive, metavar="N", help=help)
    size, help = paper.BLOCK_SIZE, f"slots per block (default {paper.BLOCK_SIZE})"
    add("--block-size", type=positive, default=size, metavar="N", help=help)
    help = "scenario 4 serves the first requests of this trace (docs/capacity.md)"
    add("--trace", type=file_name, metavar="FILE", help=help)
    help = "of the trace's times where they are numbers (default: found; what it is, is printed)"
    add("--time-unit", choices=TIME_UNITS, help=help)
    add("--seed", type=seed, default=0, metavar="N", help="same seed, same output (default 0)")
    help = "write a page here that plays scenarios 3 and 4 back, block by block"
    add("--timeline", type=out_file, metavar="FILE", help=help)
    add_output_options(parser, "all figures and checks", "what was found")
    return parser
