"""A sweep: one script over every combination of values, and what its cells found in one table.

Each cell is a process of its own. docs/sweeps.md shows a sweep under Slurm.

    python sweep.py --script capacity.py --model opt-13b,opt-66b --gpus 1,4 --list
    python sweep.py --scenario 1 --block-size 8,16,32 --seed 0,1,2            # all, in turn
    python sweep.py --scenario 1 --block-size 8,16,32 --seed 0,1,2 --cell 4   # this one
    python sweep.py --merge results/sweep/*.json --table paged_steady_state

Exit code 0; 1 if a check of a cell failed, or a cell to merge is missing; 2 for input that cannot
be used; of a sweep the highest.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from vllm_sim.reporting.arguments import OneLineParser, file_name, whole
from vllm_sim.reporting.command_line import UsageError, begin, exit_code, raise_on_interrupt

if __name__ == "__main__":
    begin("sweep.py", "numpy", "tabulate")

from vllm_sim.evaluation import options as evaluation
from vllm_sim.reporting import sweep_cells, sweep_table
from vllm_sim.reporting.files import DASH, out_file, out_folder
from vllm_sim.reporting.tables import FORMATS, counted
from vllm_sim.scenarios import options as scenarios
from vllm_sim.sizing import options as sizing

PARSERS = {
    "main.py": scenarios.build_parser,
    "reproduce.py": evaluation.build_parser,
    "capacity.py": sizing.build_parser,
}
TASK = "SLURM_ARRAY_TASK_ID"
index = partial(whole, range(10**9), "the number of a cell")


def build_parser() -> argparse.ArgumentParser:
    """The parser of sweep.py's own options; all others are the script's."""
    parser = OneLineParser(
        prog="sweep.py",
        description="Run a script over every combination of values. All other options are the "
        "script's; one with a comma list has several values (--workload: 512,256/1000,300).",
        allow_abbrev=False,
    )
    add, names = parser.add_argument, ", ".join(PARSERS)
    add("--script", choices=PARSERS, default="main.py", metavar="NAME", help=f"one of {names}")
    where = "for the results, one file a cell (default results/sweep)"
    add("--out", type=out_folder, default=Path("results/sweep"), metavar="DIR", help=where)
    told = f"only this one, from 0 (default: {TASK}, and without it all in turn)"
    add("--cell", type=index, default=os.environ.get(TASK) or None, metavar="N", help=told)
    add("--list", action="store_true", help="say which cells there are, and run none")
    add("--again", action="store_true", help="run cells that are done, too")
    merged = "run none: put results of one script together; a sweep-*.json stands for its cells"
    add("--merge", type=file_name, nargs="+", metavar="FILE", help=merged)
    table = "with --merge: show this table (repeatable), not what became of the cells"
    add("--table", action="append", default=[], metavar="ID", help=table)
    where = f"with --merge: write all tables here ({DASH})"
    add("--json", type=out_file, metavar="FILE", help=where)
    add("--format", choices=(*FORMATS,), default="plain", help="of the tables")
    return parser


def parse_and_run(argv: list[str] | None) -> int:
    """The exit code. Raises UsageError for what cannot be used, before anything is written."""
    args, arguments = build_parser().parse_known_args(argv)
    raise_on_interrupt()
    if args.merge:
        if arguments:
            raise UsageError(f"unrecognized arguments: {' '.join(arguments)}")
        return sweep_table.merge_and_show(args.merge, args.table, args.json, args.format)
    if args.json or args.table:
        raise UsageError("--json and --table are for --merge: each cell writes a file of its own")
    arguments += [] if args.format == "plain" else ["--format", args.format]
    cells = sweep_cells.expand(args.script, PARSERS[args.script](), arguments)
    if args.cell is not None and args.cell >= len(cells):
        raise UsageError(f"--cell or {TASK} {args.cell}: the sweep has cells 0 to {len(cells) - 1}")
    wanted = cells if args.cell is None else [cells[args.cell]]
    if args.list:
        for cell in wanted:
            print(f"{cell.index:4}  {cell.file}  python {args.script} {cell.line}")
        array = f"sbatch --array=0-{len(cells) - 1} run_vllm_sim.slurm --sweep ..."
        print(f"\n{counted(len(cells), 'cell')}: {array}")
        return 0
    sweep_cells.make_place(PARSERS[args.script](), cells, wanted, args.out)
    script = Path(__file__).resolve().parent / args.script
    return sweep_cells.run_all(script, wanted, args.out, args.again)


def main(argv: list[str] | None = None) -> int:
    return exit_code("sweep.py", partial(parse_and_run, argv))


if __name__ == "__main__":
    sys.exit(main())
