"""Run one of the long searches behind docs/reliability.md, and write down what it went through.

    python tools/hunt.py exhaustive                     # every state of the large worlds, 6 minutes
    python tools/hunt.py state-machine                  # a million rules, 20 minutes
    python tools/record.py results/hunt_fuzz.json tools/hunt.py fuzz

Serves items 2, 3, 4 and 9 of the tests, and the fuzzing. A hunt is a few tests marked `slow`; each
hands its figures to pytest's `record_property`, and they come back through pytest's own report
(JUnit's XML), so a figure is what the test that passed has counted. `small` are those of the same
files that `make test` runs. `coverage` is `make coverage`, which wants the virtual environment of
the Makefile. Exit code 0 if all passed, else 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_sim.reporting.command_line import OneLineParser, UsageError, exit_code, print_then  # noqa: E402
from vllm_sim.reporting.documents import Json, document, rows_table  # noqa: E402
from vllm_sim.scenarios.report import check_writable, write_json  # noqa: E402


@dataclass(frozen=True)
class Hunt:
    """Tests of tests/, what chooses among them, and variables that they read."""

    files: tuple[str, ...]
    chosen: str = ""  # pytest's -k
    environment: dict[str, str] = field(default_factory=dict)
    marked: str = "slow"  # pytest's -m

    def command(self, report: Path) -> list[str]:
        tests = [f"tests/{name}.py" for name in self.files]
        chosen = ["-k", self.chosen] if self.chosen else []
        return [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:xdist",
            "-m",
            self.marked,
            *tests,
            *chosen,
            f"--junitxml={report}",
        ]


MILLION = {"RULE_STEPS": "1000000"}
TEN_THOUSAND = {"ISOLATION_LIFETIMES": "10000"}
LEAST_COVERAGE = 0.98  # share of the branches of the root modules
HUNTS = {
    "exhaustive": Hunt(("test_exhaustive",), "large_world"),
    "exhaustive-baseline": Hunt(("test_exhaustive_baseline",), "large"),
    "exhaustive-serving": Hunt(("test_exhaustive_serving",), "large"),
    "state-machine": Hunt(("test_state_machine",), "paged", MILLION),
    "state-machine-baseline": Hunt(("test_state_machine",), "baseline", MILLION),
    "isolation-gather": Hunt(("test_isolation",), "gather", TEN_THOUSAND),
    "isolation-triton": Hunt(("test_isolation",), "triton", TEN_THOUSAND),
    "fuzz": Hunt(("test_fuzz",), "ten_thousand"),
}
SMALL = Hunt(
    tuple(sorted({name for hunt in HUNTS.values() for name in hunt.files})), marked="not slow"
)
COVERAGE = "coverage"
CHOICES = {**HUNTS, "small": SMALL, COVERAGE: None}


def run_tests(hunt: Hunt) -> tuple[list[Json], int]:
    """(a row for each test, pytest's exit code). Raises UsageError where pytest left no report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | hunt.environment
        environment.pop("PYTEST_ADDOPTS", None)  # might choose other tests
        code = run(hunt.command(report), environment)
        try:
            return rows_of(report.read_text(encoding="utf-8")), code
        except (OSError, ET.ParseError):
            raise UsageError(f"pytest ended with {code} and left no report") from None


def run(command: list[str], environment: dict[str, str]) -> int:
    """The exit code of a command from the root. Raises UsageError where there is no such."""
    try:
        return subprocess.run(command, cwd=ROOT, env=environment).returncode
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be run: {error.strerror or error}") from None


def rows_of(report: str) -> list[Json]:
    """What a JUnit report says of each test: its name, how it ended, wall seconds, its figures."""
    rows: list[Json] = []
    for case in ET.fromstring(report).iter("testcase"):
        ended = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        figures = {one.attrib["name"]: number(one.attrib["value"]) for one in case.iter("property")}
        rows.append(
            {
                "test": f"{case.attrib['classname'].rpartition('.')[2]}.py::{case.attrib['name']}",
                "outcome": ended[0] if ended else "passed",
                "seconds": float(case.attrib["time"]),
                "figures": figures,
            }
        )
    return rows


def number(text: str) -> int | float | str:
    """What `record_property` was given, which the report has as text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run_coverage() -> tuple[list[Json], int]:
    """(a row for each root module with a branch that `make test` does not take and one for all of
    them, make's exit code)."""
    found = ROOT / ".coverage.json"
    found.unlink(missing_ok=True)
    start = time.perf_counter()
    code = run(["make", "coverage"], dict(os.environ))
    seconds = time.perf_counter() - start
    if not found.exists():
        raise UsageError(f"make coverage ended with {code} and left no figures")
    return coverage_rows(json.loads(found.read_text(encoding="utf-8")), seconds), code


def coverage_rows(found: Json, seconds: float) -> list[Json]:
    """coverage's own JSON, in short: branches, how many are taken, which are not. The last row, of
    all modules, has failed if they are too few."""
    files = {name: one for name, one in sorted(found["files"].items()) if one["missing_branches"]}
    parts = [(name, one["summary"], one["missing_branches"]) for name, one in files.items()]
    totals = found["totals"]
    enough = totals["covered_branches"] >= LEAST_COVERAGE * totals["num_branches"]
    parts.append(("all", totals, []))
    return [
        {
            "test": name,
            "outcome": "passed" if enough or name != "all" else "failure",
            "seconds": seconds if name == "all" else 0.0,
            "figures": {
                "branches": summary["num_branches"],
                "taken": summary["covered_branches"],
                **({"not taken": shown(missing)} if missing else {}),
            },
        }
        for name, summary, missing in parts
    ]


def shown(branches: list[list[int]]) -> str:
    """`12 to 14` for each branch; a line below 0 is the end of the function."""
    return ", ".join(f"{a} to {b if b > 0 else 'the end'}" for a, b in branches)


def main(argv: list[str] | None = None) -> int:
    """0, 1 if a test failed or was skipped, or 2 with one line on stderr."""
    return exit_code("hunt.py", partial(parse_and_hunt, argv))


def parse_and_hunt(argv: list[str] | None) -> int:
    """Raises UsageError if nothing could be run."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("hunt", choices=CHOICES, help="which")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args(argv)
    if args.json:
        check_writable(args.json)
    start = time.perf_counter()
    hunt = CHOICES[args.hunt]
    rows, code = run_coverage() if hunt is None else run_tests(hunt)
    held = code == 0 and bool(rows) and all(row["outcome"] == "passed" for row in rows)
    if hunt is SMALL:  # most tests of these files go through nothing that is counted
        rows = [row for row in rows if row["figures"] or row["outcome"] != "passed"]

    def keep() -> None:
        if args.json:
            write_json(
                args.json,
                document(
                    "tools/hunt.py",
                    vars(args),
                    setting={} if hunt is None else hunt.environment,
                    tables=[rows_table("tests", f"hunt: {args.hunt}", rows)],
                    exit_code=0 if held else 1,
                    elapsed_s=time.perf_counter() - start,
                ),
            )

    print_then(keep, lambda: print("\n".join(map(line, rows))))
    return 0 if held else 1


def line(row: Json) -> str:
    """A row as printed."""
    told = ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
        for name, value in row["figures"].items()
    )
    return f"{row['outcome']}  {row['test']}: {told}"


if __name__ == "__main__":
    sys.exit(main())
