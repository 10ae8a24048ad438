"""Changes one thing at a time in the managers and the simulator: does a test notice?

    python tools/mutants.py                             # all modules: an hour or two on one core
    python tools/mutants.py --module serving.py         # one; each in a process of its own, say
    python tools/mutants.py --again                     # survivors against the tests of now
    python tools/mutants.py --again unexplained         # of these only those without a reason
    python tools/mutants.py --report --json FILE        # run nothing: what was found so far
    python tools/mutants.py --sample 30 --fresh         # a few at random, to see how long they take

Serves item 10 of the tests: mutation testing with cosmic-ray (requirements-dev.txt). Mutants are
made in a copy of the repository, .mutants/MODULE, so the checkout is never touched. The session
lies there as well: a run that was ended goes on where it was, --fresh begins again. A mutant is
run against tests that need neither torch nor a minute, the module's own first, up to the first
failure. Left out are operators that nobody would write in place of another: shifts, powers, and
whatever stands in for the `|` of an annotation.

It prints the mutants that survive, each with the reason why nothing can tell it from the code
(equivalent_mutants.py). It exits with 1 if fewer than 95 % of a module's are killed, if one that
survives has no reason, or if a reason is of no mutant that survives.
"""

import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from equivalent_mutants import REASONS  # noqa: E402
from mutant_sessions import MODULES, Found, Session  # noqa: E402

from vllm_sim.reporting.command_line import OneLineParser, UsageError, exit_code, positive  # noqa: E402
from vllm_sim.reporting.documents import Json, document, rows_table  # noqa: E402
from vllm_sim.reporting.files import check_writable, write_json  # noqa: E402

GOAL = 0.95  # share of a module's mutants that tests must kill
Change = tuple[str, str]  # function, the line as the mutant has it


def reasons_of(module: str) -> dict[Change, str]:
    """Why each of its equivalent mutants is one."""
    return {
        (where, change): reason
        for where, changes in REASONS.get(module, {}).items()
        for change, reason in changes.items()
    }


def shown(where: str, change: str) -> str:
    return f"{where}: {change}" if where else change


class Result:
    """What one module's session has to say."""

    def __init__(self, session: Session, found: Found) -> None:
        self.module = session.module
        self.found = found
        self.share = found.killed / max(1, found.run)
        self.seconds = sum(session.facts["test_seconds"].values())
        self.lines_gone = session.lines_gone()
        self.alive = Counter((one.where, one.change) for one in found.alive)
        self.reasons = reasons_of(self.module)
        self.unexplained = [change for change in self.alive if change not in self.reasons]
        whole = not session.facts["sample"] and not found.left
        self.stale = [c for c in self.reasons if c not in self.alive] if whole else []

    def rows(self) -> list[Json]:
        return [
            {
                "module": self.module,
                "function": where,
                "change": change,
                "count": count,
                "reason": self.reasons.get((where, change)),
            }
            for (where, change), count in self.alive.items()
        ]

    def row(self) -> Json:
        return {
            "module": self.module,
            "mutants": self.found.run,
            "killed": self.found.killed,
            "share": self.share,
            "test_seconds": round(self.seconds, 2),
            "lines_gone": self.lines_gone,
        }

    def checks(self) -> list[Json]:
        left = f", {self.found.left} not run" if self.found.left else ""
        named = (
            (
                f"{self.module}: {GOAL:.0%} killed",
                self.share >= GOAL and not left,
                f"{self.found.killed} of {self.found.run}{left}",
            ),
            (
                f"{self.module}: every survivor has its reason",
                not self.unexplained,
                "; ".join(shown(*change) for change in self.unexplained),
            ),
            (
                f"{self.module}: every reason has its survivor",
                not self.stale,
                "; ".join(shown(*change) for change in self.stale),
            ),
        )
        return [{"name": name, "ok": ok, "detail": detail} for name, ok, detail in named]

    def lines(self) -> list[str]:
        """As printed: the survivors, reasons that are stale, and how many were killed."""
        lines = []
        for one in self.found.alive:
            reason = self.reasons.get((one.where, one.change), "NO REASON")
            what = shown(one.where, one.change)
            lines.append(f"{self.module}:{one.row}: {one.operator}: {what}  [{reason}]")
        lines += [f"{self.module}: stale, no survivor: {shown(*change)}" for change in self.stale]
        more = f", {self.lines_gone} lines of the first tests gone" if self.lines_gone else ""
        left = f", {self.found.left} not run" if self.found.left else ""
        lines.append(
            f"{self.module}: {self.found.killed} of {self.found.run} mutants killed, "
            f"{self.share:.1%}{left}; tests take {self.seconds:.0f} s{more}"
        )
        return lines


def begin(session: Session, fresh: bool, again: str | None) -> None:
    """Make what `session.run` shall run. Raises UsageError."""
    if fresh or not session.started:
        if again:
            raise UsageError(f"--again: {session.module} has not been run")
        session.prepare()
    elif again:
        if session.found().left:
            raise UsageError(f"--again: {session.module} has not been run to its end")
        session.again(reasons_of(session.module) if again == "unexplained" else ())
    else:
        session.resume()


def finished(session: Session) -> bool:
    """Whether --report can tell of it; says why not."""
    why = ""
    if not session.started:
        why = "not run"
    elif session.changed:
        why = "has changed since it was run"
    elif session.found().left:
        why = "not run to its end"
    if why:
        print(f"{session.module}: {why}")
    return not why


def main(argv: list[str] | None = None) -> int:
    """0; 1 if too many survive or reasons and survivors differ; 2 with one line on stderr."""
    return exit_code("mutants.py", partial(parse_and_run, argv))


def parse_and_run(argv: list[str] | None) -> int:
    """Raises UsageError if cosmic-ray is missing, or the tests fail without a mutant."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--module", action="append", choices=MODULES, help="only it; repeatable")
    parser.add_argument("--sample", type=positive, metavar="N", help="only N at random, of each")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fresh", action="store_true", help="begin again")
    how.add_argument(
        "--again",
        nargs="?",
        const="all",
        choices=("all", "unexplained"),
        help="survivors, all or without a reason, with the tests of now",
    )
    how.add_argument("--report", action="store_true", help="run nothing, tell what was found")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found")
    options = parser.parse_args(argv)
    if options.json is not None:
        check_writable(options.json)
    start = time.perf_counter()
    results, missing = [], False
    for module in options.module or MODULES:
        session = Session(ROOT / ".mutants" / module.removesuffix(".py"), module)
        if not options.report:
            begin(session, options.fresh, options.again)
            if options.sample is not None:
                session.sample(options.sample, seed=0)
            before, clock = session.found().run, time.perf_counter()
            session.run()
            minutes = (time.perf_counter() - clock) / 60.0
            speed = (session.found().run - before) / max(minutes, 1e-9)
            print(f"{module}: {speed:.1f} mutants a minute")
        elif not finished(session):
            missing = True
            continue
        results.append(Result(session, session.found()))
        print("\n".join(results[-1].lines()), flush=True)
    checks = [check for result in results for check in result.checks()]
    code = int(missing or not all(check["ok"] for check in checks))
    if options.json is not None:
        rows = [row for result in results for row in result.rows()]
        tables = [rows_table("mutants", "mutants", [result.row() for result in results])]
        if rows:
            tables.append(rows_table("survivors", "survivors", rows, 3))
        elapsed_s = time.perf_counter() - start
        write_json(
            options.json,
            document(
                "tools/mutants.py",
                vars(options),
                setting={"goal": GOAL},
                tables=tables,
                checks=checks,
                exit_code=code,
                elapsed_s=elapsed_s,
            ),
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
