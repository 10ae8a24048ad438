"""Search a manager of KV-cache blocks for states in which something does not hold.

    python -m vllm_sim.conformance ours                     # our scheduler and manager, 60 seconds
    python -m vllm_sim.conformance ours-manager --world large
    python -m vllm_sim.conformance nano-vllm --from DIR --seconds 600 --json out.json
    python -m vllm_sim.conformance mine.py:MyAdapter

Reproduces sections 4.2-4.5 of the paper as rules for any engine: docs/conformance.md says which,
and how to write an adapter for your own. Exit code 0 if no fault was found, 1 for a fault or a
search that did not meet what it must, 2 for input that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

from vllm_sim.reporting.command_line import UsageError, begin, exit_code, raise_on_interrupt

if __name__ == "__main__":
    begin("conformance", "numpy", "tabulate")

from vllm_sim.conformance.adapter import NotInstalledError
from vllm_sim.conformance.report import answer, lines, tables
from vllm_sim.conformance.search import Search
from vllm_sim.conformance.shadow import CHECKS
from vllm_sim.conformance.targets import TARGETS, find
from vllm_sim.reporting.arguments import OneLineParser, folder, positive, seed
from vllm_sim.reporting.documents import document
from vllm_sim.reporting.files import add_output_options, check_writable, print_then, write_json
from vllm_sim.reporting.progress import Progress

PROGRAM = "conformance"


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=PROGRAM, description=__doc__.split("\n")[0], allow_abbrev=False)
    add, names = parser.add_argument, ", ".join(TARGETS)
    help = f"one of {names} (default ours), or an adapter of your own, mine.py:MyAdapter"
    add("target", nargs="?", default="ours", metavar="TARGET", help=help)
    add("--world", metavar="NAME", help="what is searched (default: the target's first)")
    help = "of search; a world that is closed sooner ends it (default 60)"
    add("--seconds", type=positive, default=60, metavar="N", help=help)
    add("--seed", type=seed, default=0, metavar="N", help="of the histories at random (default 0)")
    help = "a checkout or installation of the engine, where Python does not find it"
    add("--from", type=folder, metavar="DIR", dest="source", help=help)
    help = "leave this check out (repeatable): to see what a fault of it leads to"
    add("--without", choices=CHECKS, action="append", default=[], help=help)
    add_output_options(parser, "all that was found")
    return parser


def parse_and_run(argv: list[str] | None) -> int:
    """The exit code. Raises UsageError for what cannot be used, before anything is written."""
    args = build_parser().parse_args(argv)
    raise_on_interrupt()
    try:
        target = find(args.target)
    except ValueError as error:
        raise UsageError(f"argument TARGET: {error}") from None
    world_name = args.world or next(iter(target.worlds))
    if world_name not in target.worlds:
        raise UsageError(f"--world {world_name}: {args.target} has {', '.join(target.worlds)}")
    if args.json is not None:
        check_writable(args.json)
    source = getattr(target, "source", None)  # where an engine of others is found
    if source is None and args.source is not None:
        raise UsageError(f"--from: {args.target} is not looked for anywhere")
    begun = time.monotonic()
    try:
        version = source(args.source) if source else "as it is here"
        with Progress.on(sys.stderr, PROGRAM, quiet=args.quiet) as progress:
            limits = {"seconds": args.seconds, "seed": args.seed, "without": args.without}
            search = Search(target, target.worlds[world_name], **limits, progress=progress)
            found = search.run()
    except NotInstalledError as error:
        raise UsageError(str(error)) from None
    name = f"{args.target} ({version})"
    shown = lines(name, world_name, search, args.format)
    code = 0 if found.clean else 1

    def keep() -> None:
        if args.json is not None:
            setting = {"target": args.target, "version": version, "world": str(search.world)}
            held = {"name": "no fault", "ok": found.clean, "detail": answer(name, search)}
            rows = [table.to_json() for table in tables(world_name, search)]
            what = {"seeds": [args.seed], "setting": setting, "tables": rows, "checks": [held]}
            what |= {"exit_code": code, "elapsed_s": time.monotonic() - begun}
            write_json(args.json, document(PROGRAM, vars(args), **what))

    print_then(keep, lambda: print("\n".join(shown)))
    return code


def main(argv: list[str] | None = None) -> int:
    return exit_code(PROGRAM, partial(parse_and_run, argv))


if __name__ == "__main__":
    sys.exit(main())
