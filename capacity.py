"""How many requests fit: your model, your GPU, your traffic.

Reproduces: Table 1's slots and Fig. 2's use of them, and answers the same questions for other
models (by their Hugging Face config.json), GPUs and workloads. No GPU is needed, nothing is run.

    python capacity.py                                        # OPT-13B on an A100-40GB: Table 1
    python capacity.py --model opt-66b --gpus 4
    python capacity.py --model Llama-3-8B/config.json --gpu h100 --workload 2000,300
    python capacity.py --model config.json --gpu-memory 44.5 --dtype fp8 --max-model-len 8192
    python capacity.py --trace AzureLLMInferenceTrace_conv.csv.gz       # what a real trace needs

Exit code 0, or 2 for input that cannot be used and for a model that does not fit.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sim.reporting import command_line
from vllm_sim.reporting.command_line import (
    OneLineParser,
    UsageError,
    exit_code,
    folder,
    positive,
    seed,
)

if __name__ == "__main__":
    command_line.begin("capacity.py", "numpy", "tabulate")

from vllm_sim import paper
from vllm_sim.models.gpus import GPUS
from vllm_sim.paper import GIB
from vllm_sim.reporting.progress import Progress
from vllm_sim.sizing.options import add_trace_options, check_options, make_trace_case

if TYPE_CHECKING:
    from vllm_sim.models.load import Model
    from vllm_sim.models.memory_plan import Plan, Sizes
    from vllm_sim.sizing.case import Case

MATRIX_BITS = {"fp16": 16, "bf16": 16, "fp8": 8}
KV_BYTES = {"fp16": 2, "bf16": 2, "fp8": 1}
MAX_GPUS, MAX_BLOCK_SIZE, MAX_LEN = 1024, 4096, 10**7
MAX_GIB = 10**5
PREFIX_LEN = paper.FIG16["5-shot"]["prefix"]


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="capacity.py",
        description="How many requests a model on a GPU can hold, in figures.",
        epilog="Sizes are in GiB (2**30 bytes) where not said otherwise; a GPU sold as 80 GB "
        "reports about 79 GiB.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        default="opt-13b",
        metavar="NAME|FILE",
        help=f"{', '.join(paper.MODELS)}; or a Hugging Face config.json (default opt-13b)",
    )
    add(
        "--gpu",
        type=str.lower,
        choices=tuple(GPUS),
        metavar="NAME",
        help=f"one of {', '.join(GPUS)} (default a100-40gb)",
    )
    add(
        "--gpu-memory",
        type=gib,
        metavar="GIB",
        help="instead: the memory of one GPU as CUDA reports it, in GiB",
    )
    add("--gpus", type=positive, default=1, metavar="N", help="tensor parallel (default 1)")
    add("--dtype", choices=tuple(MATRIX_BITS), help="of the weights (default fp16)")
    add("--kv-dtype", choices=tuple(KV_BYTES), help="of K and V (default fp16, or bf16 with it)")
    add(
        "--plan",
        choices=("paper", "serving"),
        help="whose memory plan (default: the paper's for its own deployments, else that of "
        "serving systems)",
    )
    add(
        "--gpu-memory-utilization",
        type=share,
        metavar="SHARE",
        help="of each GPU's memory that is used (default 0.9)",
    )
    add(
        "--allowance",
        type=gib,
        metavar="GIB",
        help="for activations and workspace on each GPU (default: an estimate and 1 GiB)",
    )
    add(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="longest request in tokens (default: the model's own)",
    )
    add(
        "--block-size",
        type=positive,
        default=paper.BLOCK_SIZE,
        metavar="N",
        help=f"slots per block (default {paper.BLOCK_SIZE})",
    )
    add(
        "--workload",
        metavar="NAME|P,O",
        help="sharegpt, alpaca, or the mean prompt and output in tokens, such as 512,256 "
        "(geometric lengths; default sharegpt)",
    )
    add(
        "--prefix-len",
        type=positive,
        default=PREFIX_LEN,
        metavar="N",
        help=f"tokens of a shared prefix, for the table of block sizes alone (default "
        f"{PREFIX_LEN})",
    )
    add("--seed", type=seed, default=0, metavar="N", help="same seed, same output (default 0)")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    add(
        "--figures",
        type=folder,
        metavar="DIR",
        help="draw slots, requests and block sizes there (needs matplotlib: requirements-dev.txt)",
    )
    add("--format", choices=("plain", "github", "latex"), default="plain", help="of the tables")
    add_trace_options(parser)
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def gib(text: str) -> float:
    """A positive number of GiB, for argparse."""
    value = _number(text)
    if not 0.0 < value <= MAX_GIB:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a number of GiB up to {MAX_GIB:,}")
    return value


def share(text: str) -> float:
    """A number above 0, at most 1."""
    value = _number(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a share above 0 and up to 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text) if text.isascii() and len(text) <= 40 else math.nan
    except ValueError:
        return math.nan


def make_case(args: argparse.Namespace) -> Case:
    """The case the arguments describe. Raises UsageError if it cannot be had."""
    from vllm_sim.models.load import load_model
    from vllm_sim.models.memory_plan import Sizes
    from vllm_sim.sizing.case import Case
    from vllm_sim.sizing.concurrency import parse_workload

    for name, value, most in (
        ("--gpus", args.gpus, MAX_GPUS),
        ("--block-size", args.block_size, MAX_BLOCK_SIZE),
        ("--max-model-len", args.max_model_len or 1, MAX_LEN),
        ("--prefix-len", args.prefix_len, MAX_LEN),
    ):
        if value > most:
            raise UsageError(f"{name} {value}: at most {most:,}")
    if args.gpu and args.gpu_memory:
        raise UsageError("--gpu and --gpu-memory are two answers to one question: give one of them")
    check_options(args)
    workload = parse_workload("sharegpt" if args.workload is None else args.workload)
    model = load_model(args.model)
    weight_type = args.dtype or "fp16"
    kv_type = args.kv_dtype or ("bf16" if weight_type == "bf16" else "fp16")
    if model.quantisation and args.dtype == "fp8":
        raise UsageError(
            f"--dtype fp8: {model.name} is quantised already, as {model.quantisation.method}"
        )
    sizes = Sizes(MATRIX_BITS[weight_type], KV_BYTES[kv_type], args.block_size)
    gpu = None if args.gpu_memory else GPUS[args.gpu or "a100-40gb"]
    plan = make_plan(args, model, sizes)
    if model.quantisation:
        weight_type = model.quantisation.method
    return Case(
        model,
        gpu,
        plan,
        sizes,
        weight_type,
        kv_type,
        longest(args, model),
        workload,
        args.prefix_len,
        args.seed,
    )


def longest(args: argparse.Namespace, model: Model) -> int:
    """The longest request: as asked for, or the model's own maximum."""
    own = model.decoder.max_len
    if own is None and args.max_model_len is None:
        raise UsageError(f"{model.name} says no longest request: give --max-model-len")
    asked = args.max_model_len or own
    if own is not None and asked > own:
        raise UsageError(f"--max-model-len {asked}: {model.name} goes up to {own:,} tokens")
    if not 2 <= asked <= MAX_LEN:
        raise UsageError(f"a longest request of {asked:,} tokens is not 2 to {MAX_LEN:,}")
    return asked


def make_plan(args: argparse.Namespace, model: Model, sizes: Sizes) -> Plan:
    """The paper's plan for its deployments or if asked for, otherwise a serving system's."""
    from vllm_sim.models.memory_plan import UTILIZATION, paper_plan, serving_plan
    from vllm_sim.sizing.case import is_papers

    gpu = None if args.gpu_memory else GPUS[args.gpu or "a100-40gb"]
    memory = gpu.memory_bytes if gpu else int(args.gpu_memory * GIB)
    tuned = args.gpu_memory_utilization is not None or args.allowance is not None
    plain = sizes.matrix_bits == 16 and sizes.kv_bytes == 2
    chosen = args.plan or (
        "paper" if plain and not tuned and is_papers(model, gpu, args.gpus) else "serving"
    )
    if chosen == "paper":
        if tuned:
            raise UsageError("--plan paper has its own utilization and allowance")
        return paper_plan(model, gpu.name if gpu else "GPU", memory, args.gpus, sizes)
    allowance = None if args.allowance is None else int(args.allowance * GIB)
    utilization = args.gpu_memory_utilization or UTILIZATION
    return serving_plan(model, memory, args.gpus, sizes, utilization, allowance)


def setting_of(case: Case) -> dict[str, object]:
    """For --json: what was asked, and what it came to."""
    from vllm_sim.sizing.case import describe

    return {
        "model": case.model.name,
        **describe(case.model.decoder),
        "gpu": case.gpu.name if case.gpu else None,
        "gpus": case.plan.num_gpus,
        "memory_bytes": case.plan.memory,
        "plan": case.plan.name,
        "dtype": case.weight_type,
        "kv_dtype": case.kv_type,
        "kv_bytes_per_token": case.model.decoder.slot_elements * case.sizes.kv_bytes,
        "weight_bytes_per_gpu": case.plan.weights,
        "kv_cache_bytes_per_gpu": case.plan.kv_cache,
        "num_blocks": case.plan.num_blocks,
        "block_size": case.plan.block_size,
        "num_slots": case.plan.num_slots,
        "max_model_len": case.max_len,
        "workload": case.workload.name,
        "prefix_len": case.prefix_len,
        "seed": case.seed,
        "notes": list(case.model.decoder.notes),
    }


def run(args: argparse.Namespace, progress: Progress) -> int:
    """Size, simulate, show."""
    from vllm_sim.reporting.documents import document
    from vllm_sim.scenarios.report import check_writable, render, write_json
    from vllm_sim.sizing.answers import sections

    command_line.raise_on_interrupt()
    if args.json is not None:
        check_writable(args.json)
    start = time.perf_counter()
    case = make_case(args)
    trace = None if args.trace is None else make_trace_case(args, case)
    if args.figures is not None:
        from vllm_sim.sizing import pictures

        pictures.check(args.figures, trace is not None)
    comment = "% " if args.format == "latex" else ""
    setting = setting_of(case)
    if trace is None:
        answers = sections(case, progress)
    else:
        from vllm_sim.sizing.trace_answers import answer_trace

        setting |= {"workload": trace.trace.name, "trace": trace.to_json()}
        answers = answer_trace(trace, comment, progress)
    for note in case.model.decoder.notes:
        print(f"{comment}{case.model.name}: {note}\n")
    found = []
    for section in answers:
        progress.clear()
        found.append(section)
        print(render(section.table, args.format))
        print(f"\n{comment}Answer: {section.answer}\n", flush=True)
    if args.json is not None:
        write_json(
            args.json,
            document(
                "capacity.py",
                vars(args),
                seeds=[args.seed],
                setting=setting,
                tables=[section.to_json() for section in found],
                exit_code=0,
                elapsed_s=time.perf_counter() - start,
            ),
        )
    if args.figures is not None:
        pictures.draw(found, args.figures)
    return 0


def parse_and_run(argv: list[str] | None) -> int:
    """The exit code. Raises UsageError for what cannot be used."""
    args = build_parser().parse_args(argv)
    try:
        with Progress.on(sys.stderr, "capacity.py", quiet=args.quiet) as progress:
            return run(args, progress)
    except ValueError as error:  # ConfigError, PlanError, WorkloadNameError are ValueErrors
        raise UsageError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what cannot be used into one line and exit code 2."""
    return exit_code("capacity.py", partial(parse_and_run, argv))


if __name__ == "__main__":
    sys.exit(main())
