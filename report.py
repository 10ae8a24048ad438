"""Runs put together: what --json and sweep.py have written, as one table (docs/sweeps.md).

python report.py results/sweep/*.json
"""

import sys

from vllm_sim.reporting import command_line

if __name__ == "__main__":
    command_line.begin("report.py", "tabulate")


def main(argv: list[str] | None = None) -> int:
    """0 if every cell is there and held, 1 if not, or 2 with one line on stderr."""
    from vllm_sim.reporting.sweep_table import parse_and_merge

    command_line.raise_on_interrupt()
    return command_line.exit_code("report.py", lambda: parse_and_merge(argv))


if __name__ == "__main__":
    sys.exit(main())
