"""The options of capacity.py, and the combinations of them that are refused.

Reproduces nothing by itself. It loads models and published numbers alone, so that `--help` starts
at once; case.py makes a Case of what was parsed.

    args = build_parser().parse_args(["--model", "opt-66b", "--gpus", "4"])
    check_options(args)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

from vllm_sim import paper
from vllm_sim.models import GPUS, PRESETS
from vllm_sim.models.memory_plan import ENGINE, ENGINES
from vllm_sim.models.transformers_model import MAX_LAYERS
from vllm_sim.reporting.arguments import (
    TIME_UNITS,
    FileName,
    OneLineParser,
    file_name,
    positive,
    seed,
)
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.files import add_output_options

WEIGHT_TYPES = ("fp16", "bf16", "fp8")
KV_BYTES = {"fp16": 2, "bf16": 2, "fp8": 1}
MAX_GPUS, MAX_BLOCK_SIZE, MAX_LEN = 1024, 4096, 2**24
MAX_GIB = 10**5
MAX_KV_BYTES = 10**8
PREEMPTION_RATE = 0.01
HIGHEST_RATE = 10**6


def _accepted(accepts: Callable[[float], bool], what: str) -> Callable[[str], float]:
    """A type for argparse: a number that is accepted, or '... is not <what>'."""

    def parse(text: str) -> float:
        try:
            value = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if len(text) > 40 or not accepts(value) or (math.isinf(value) and text != "inf"):
            raise argparse.ArgumentTypeError(f"{text[:40]!a} is {what}")
        return value

    return parse


bits = _accepted(lambda n: 1.0 <= n <= 16.0, "not a number of bits from 1 to 16")
gib = _accepted(lambda n: 0.0 < n <= MAX_GIB, f"not a number of GiB up to {MAX_GIB:,}")
share = _accepted(lambda n: 0.0 < n <= 1.0, "not a share above 0 and up to 1")
target = _accepted(lambda n: 0.0 < n <= 10**6, "not a number of seconds above 0 and up to 1e6")
preemption_rate = _accepted(lambda n: 0.0 <= n < 1.0, "not a share from 0 and below 1")
arrival_rate = _accepted(
    lambda n: 1.0 / HIGHEST_RATE <= n <= HIGHEST_RATE or n == math.inf,
    f"neither requests a second from 1e-06 to {HIGHEST_RATE:,} nor inf",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of capacity.py."""
    parser = OneLineParser(
        prog="capacity.py",
        description="How many requests a model on a GPU can hold, in figures.",
        epilog="Sizes are in GiB (2**30 bytes) where not said otherwise; a GPU sold as 80 GB "
        "reports about 79 GiB.",
        allow_abbrev=False,
    )
    gpus, size, prefix = tuple(GPUS), paper.BLOCK_SIZE, paper.FIG16["5-shot"]["prefix"]
    add = partial(_add, parser.add_argument)
    text = f"{', '.join(PRESETS)}; or a Hugging Face config.json (default opt-13b)"
    model = FileName("model or file", within="*config.json", known=tuple(PRESETS))
    add("--model", text, model, metavar="NAME|FILE")
    text = f"one of {', '.join(GPUS)} (default a100-40gb)"
    add("--gpu", text, metavar="NAME", choices=gpus)
    text = "instead: the memory of one GPU as CUDA reports it, in GiB"
    add("--gpu-memory", text, gib, metavar="GIB")
    text = "a startup log of vLLM: what it states beside ours (--model: the config.json, if the log"
    add("--log", f"{text} names no preset)", file_name, metavar="FILE")
    add("--gpus", "tensor parallel (default 1)", positive)
    add("--pipeline-parallel", "stages, of --gpus GPUs each (default 1)", positive)
    add("--dtype", "of the weights (default: the config's, or fp16)", choices=WEIGHT_TYPES)
    add("--kv-dtype", "of K and V (default: 16 bits, as the weights)", choices=tuple(KV_BYTES))
    text = "of each weight of the layers, scales included, whatever the configuration says"
    add("--weight-bits", text, bits, metavar="N")
    text = "instead of a configuration: of K and V, in all layers"
    add("--kv-bytes-per-token", text, positive)
    add("--weights-gib", "instead of a configuration: of all GPUs together", gib, metavar="GIB")
    add("--layers", "instead of a configuration, for a pipeline (default 1)", positive)
    text = "whose memory beside weights, K and V (default "
    add("--engine", f"{text}{ENGINE.name})", choices=tuple(ENGINES))
    add("--max-num-seqs", "sequences of an iteration (default: as vLLM's, and said)", positive)
    add("--max-num-batched-tokens", "tokens of an iteration (default: as vLLM's)", positive)
    text = "whose memory plan (default: the paper's for its own deployments, else that of serving"
    add("--plan", f"{text} systems)", choices=("paper", "serving"))
    text = "of each GPU's memory that is used (default 0.9)"
    add("--gpu-memory-utilization", text, share, metavar="SHARE")
    text = "for all but weights, K and V on each GPU (default: as --engine plans it)"
    add("--allowance", text, gib, metavar="GIB")
    add("--max-model-len", "longest request in tokens (default: the model's own)", positive)
    add("--block-size", f"slots per block (default {size})", positive)
    text = "sharegpt, alpaca, or the mean prompt and output in tokens, such as 512,256"
    add("--workload", f"{text} (default sharegpt)", metavar="NAME|P,O")
    text = "of --workload P,O: all alike, or geometric around these means (default geometric)"
    add("--lengths", text, choices=("fixed", "geometric"))
    text = f"tokens of a shared prefix, for the table of block sizes alone (default {prefix})"
    add("--prefix-len", text, positive, default=prefix)
    add("--seed", "same seed, same output (default 0)", seed, default=0)
    add_output_options(parser, "all figures", "slots, requests and block sizes")
    add = partial(_add, parser.add_argument_group("a request trace, and its needs").add_argument)
    text = "Azure, BurstGPT or another CSV, Mooncake or other JSON lines, plain or gzipped"
    add("--trace", f"{text} (docs/capacity.md)", file_name, metavar="FILE")
    text = f"answer (default {PREEMPTION_RATE:g}; the first is for none)"
    text = f"requests held up by memory, over all, in the second {text}"
    add("--preemption-rate", text, preemption_rate, metavar="SHARE")
    text = "requests a second, Poisson, instead of the file's times; inf: all at once"
    add("--rate", text, arrival_rate, metavar="N|inf")
    told = "that 99 of 100 requests may take: how many GPUs do it is answered as well"
    add("--ttft", f"seconds to the first token {told}", target, metavar="S")
    add("--tpot", f"seconds for each further token {told}", target, metavar="S")
    add("--trace-rows", "only the first rows of the file", positive)
    text = "of the file's times where they are numbers (default: found; what it is, is printed)"
    add("--time-unit", text, choices=TIME_UNITS)
    text = "whose bandwidth and FLOPS, with --gpu-memory (docs/capacity.md)"
    add("--speed-of", text, metavar="GPU", choices=gpus)
    return parser


def _add(add: Callable, name: str, text: str, kind: Callable = str, **more: object) -> None:
    """An option with its help and type; a positive number and a seed are N in the help."""
    if kind in (positive, seed):
        more["metavar"] = "N"
    add(name, help=text, type=kind, **more)


def check_options(args: argparse.Namespace) -> None:
    """UsageError for values that are too large and for options that contradict each other."""
    for name, value, most in (
        ("--gpus", args.gpus or 1, MAX_GPUS),
        ("--pipeline-parallel", args.pipeline_parallel or 1, MAX_GPUS),
        ("--layers", args.layers or 1, MAX_LAYERS),
        ("--max-num-seqs", args.max_num_seqs or 1, MAX_LEN),
        ("--max-num-batched-tokens", args.max_num_batched_tokens or 1, MAX_LEN),
        ("--kv-bytes-per-token", args.kv_bytes_per_token or 1, MAX_KV_BYTES),
        ("--block-size", args.block_size or 1, MAX_BLOCK_SIZE),
        ("--max-model-len", args.max_model_len or 1, MAX_LEN),
        ("--prefix-len", args.prefix_len, MAX_LEN),
    ):
        if value > most:
            raise UsageError(f"{name} {value}: at most {most:,}")
    given = args.kv_bytes_per_token, args.weights_gib
    if any(given) and not all(given):
        raise UsageError("--kv-bytes-per-token and --weights-gib go together")
    if args.layers is not None and not all(given):
        raise UsageError("--layers is for --kv-bytes-per-token and --weights-gib")
    if all(given):
        for name in ("dtype", "kv_dtype", "weight_bits", "plan"):
            if getattr(args, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} is for a model whose layers are known"
                )
        if args.max_model_len is None:
            raise UsageError("--kv-bytes-per-token says no longest request: give --max-model-len")
    if args.weight_bits is not None and args.dtype is not None:
        raise UsageError("--weight-bits and --dtype are two answers to one question: give one")
    if args.log is not None:
        for name in ("trace", "workload", "figures", "plan"):
            if getattr(args, name) is not None:
                raise UsageError(f"--log and --{name} are two questions: ask one at a time")
    if args.gpu and args.gpu_memory:
        raise UsageError("--gpu and --gpu-memory are two answers to one question: give one of them")
    if args.lengths is not None and "," not in (args.workload or ""):
        raise UsageError(f"--lengths {args.lengths} is for --workload P,O, two numbers of tokens")
    if args.trace is None:
        names = ("preemption_rate", "rate", "ttft", "tpot", "trace_rows", "time_unit", "speed_of")
        for name in names:
            if getattr(args, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is about a trace: give --trace")
        return
    if args.workload is not None:
        raise UsageError("--workload and --trace are two answers to one question: give one of them")
    if args.speed_of is not None and not args.gpu_memory:
        raise UsageError("--speed-of is for --gpu-memory: --gpu says the speed itself")
    if args.speed_of is None and args.gpu_memory:
        raise UsageError("--gpu-memory says no speed, which --trace needs: give --speed-of GPU")
