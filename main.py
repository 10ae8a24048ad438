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

import os
import sys

from vllm_sim.reporting.command_line import begin, exit_code

if __name__ == "__main__":
    begin("main.py", "torch", "numpy", "tabulate")

from vllm_sim.scenarios.options import build_parser


def parse_and_run(argv: list[str] | None) -> int:
    """The exit code. Raises UsageError for what cannot be used."""
    args = build_parser().parse_args(argv)
    from vllm_sim.scenarios.run import run  # torch takes a while, and --help needs none

    return run(args)


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what cannot be used into one line and exit code 2."""
    # Threads that spin while they wait cost a busy CPU far more than they save. OpenMP reads this
    # once, when torch is first imported: nothing above this line may import it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return exit_code("main.py", lambda: parse_and_run(argv))


if __name__ == "__main__":
    sys.exit(main())
