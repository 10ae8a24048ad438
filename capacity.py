"""How many requests fit: your model, your GPU, your traffic.

Reproduces: Table 1's slots and Fig. 2's use of them, and answers the same questions for other
models (by their Hugging Face config.json), GPUs and workloads. No GPU is needed, nothing is run.

    python capacity.py                                        # OPT-13B on an A100-40GB: Table 1
    python capacity.py --model opt-66b --gpus 4
    python capacity.py --model Llama-3-8B/config.json --gpu h100 --workload 2000,300
    python capacity.py --log vllm-startup.log             # ours beside what a server logged
    python capacity.py --trace AzureLLMInferenceTrace_conv.csv.gz       # what a real trace needs

Exit code 0, or 2 for input that cannot be used and for a model that does not fit.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

from vllm_sim.reporting.command_line import UsageError, begin, exit_code, raise_on_interrupt

if __name__ == "__main__":
    begin("capacity.py", "numpy", "tabulate")

from vllm_sim.reporting.progress import Progress
from vllm_sim.sizing.options import build_parser, check_options


def run(args: argparse.Namespace, progress: Progress) -> int:
    """Size, simulate, show. Modules that load numpy come here, so that --help is quick."""
    from vllm_sim.reporting.documents import document
    from vllm_sim.reporting.files import check_writable, print_then, write_json
    from vllm_sim.reporting.tables import render, wrapped
    from vllm_sim.sizing import answers, log_answers, pictures, trace_answers
    from vllm_sim.sizing.case import make_case, make_trace_case
    from vllm_sim.sizing.server_log import read_log
    from vllm_sim.sizing.trace_needs import Targets

    raise_on_interrupt()
    if args.json is not None:
        check_writable(args.json)
    start = time.perf_counter()
    log = read_log(args.log) if args.log else None
    case = make_case(args, log)
    asked = None if args.trace is None else make_trace_case(args, case)
    if args.figures is not None:
        pictures.check(args.figures, asked is not None)
    comment = "% " if args.format == "latex" else ""
    if log is not None:
        found = log_answers.answer_log(case, log)
    elif asked is None:
        found = answers.survey(case, progress)
    else:
        found = trace_answers.answer_trace(asked, progress, Targets(args.ttft, args.tpot))
    progress.clear()

    first, *more = found.answer.split("\n")

    def show() -> None:
        print(f"{comment}{first}\n")
        for line in (*more, *(f"{case.model.name}: {note}" for note in case.model.notes)):
            print(wrapped(line, comment) + "\n")
        for section in found.sections:
            print(f"{render(section, args.format)}\n\n{wrapped(section.answer, comment)}\n")

    def keep() -> None:
        tables = [section.to_json() for section in found.sections]
        told = {"answer": first, "tables": tables, "exit_code": 0}
        told["setting"] = (asked or case).to_json()
        told["elapsed_s"] = time.perf_counter() - start
        if args.json is not None:
            write_json(args.json, document("capacity.py", vars(args), seeds=[args.seed], **told))
        if args.figures is not None:
            pictures.draw(found.sections, args.figures)

    print_then(keep, show)
    return 0


def parse_and_run(argv: list[str] | None) -> int:
    """The exit code. Raises UsageError for what cannot be used."""
    args = build_parser().parse_args(argv)
    check_options(args)
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
