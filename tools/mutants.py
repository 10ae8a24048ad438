"""Changes one thing at a time in the manager and the simulator, and asks whether a test notices.

    python tools/mutants.py                             # all four modules: hours on one core
    python tools/mutants.py --module serving.py         # one; each in a process of its own, say
    python tools/mutants.py --sample 30 --fresh         # a few at random, to see how long they take

Serves item 10 of the tests: mutation testing with cosmic-ray (requirements-dev.txt). Mutants are
made in a copy of the repository, .mutants/MODULE, so the checkout is never touched. The session
lies there as well: a run that was ended goes on where it was, --fresh begins again. A mutant is
run against tests that need neither torch nor a minute, the module's own first, up to the first
failure. Left out are operators that nobody would write in place of another: shifts, powers, and
whatever stands in for the `|` of an annotation.

It prints the mutants that survive, and exits with 1 if fewer than 95 % of a module's are killed.
"""

import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import OneLineParser, UsageError, exit_code, positive  # noqa: E402

GOAL = 0.95  # share of a module's mutants that tests must kill
CPU_S = 120  # of the tests of one mutant: four times what they take; a mutant may never end
MEMORY_KIB = 4 << 20
# Least time to a failure first; the same for all but the simulator, which has its own.
UNIT = ("test_paged_manager", "test_serving", "test_failures", "test_scheduler",
        "test_event_driven", "test_state_machine")  # fmt: skip
MODULES = {
    "kv_cache_manager.py": UNIT,
    "paged_tables.py": UNIT,
    "sequence.py": UNIT,
    "serving.py": ("test_serving", "test_event_driven", "test_scheduler"),
}
LEFT_OUT = [
    r"core/ReplaceBinaryOperator_BitOr_.*",
    r"core/ReplaceBinaryOperator_\w+_(RShift|LShift|Pow|BitOr|BitAnd|BitXor)",
]
CONFIG = """\
[cosmic-ray]
module-path = {module}
timeout = 3600.0
excluded-modules = []
test-command = {command}

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = {left_out}
"""


def prepare(folder: Path, module: str) -> None:
    """A copy of what the tests need, and a session with all mutants of the module."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", folder / "tests")
    files = " ".join(f"tests/{name}.py" for name in MODULES[module])
    # No conftest.py: it loads torch. The limit is of CPU time, which other work leaves as it is.
    tests = f"{sys.executable} -m pytest --noconftest -x -p no:xdist -m 'not slow' {files}"
    limits = f"ulimit -t {CPU_S}; ulimit -v {MEMORY_KIB}"
    texts = {"module": module, "command": f'bash -c "{limits}; exec {tests}"'}
    quoted = {name: json.dumps(text) for name, text in texts.items()}
    text = CONFIG.format(**quoted, left_out=json.dumps(LEFT_OUT))
    (folder / "mutants.toml").write_text(text, encoding="ascii")
    cosmic_ray(folder, "init", "mutants.toml", "new.sqlite")
    filter_operators = "cosmic_ray.tools.filters.operators_filter"
    python(folder, "-m", filter_operators, "new.sqlite", "mutants.toml")
    cosmic_ray(folder, "--verbosity", "ERROR", "baseline", "mutants.toml")  # sound tests pass
    (folder / "new.sqlite").rename(folder / "session.sqlite")


def python(folder: Path, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment)
    if done.returncode:
        raise UsageError(f"{' '.join(arguments)} ended with {done.returncode}, in {folder}")


def cosmic_ray(folder: Path, *arguments: str) -> None:
    python(folder, "-m", "cosmic_ray.cli", *arguments)


def keep_sample(session: Path, count: int, seed: int) -> None:
    """Leave only `count` of the mutants that have not been run, at random."""
    with closing(sqlite3.connect(session)) as data, data:
        query = (
            "select job_id from work_items where job_id not in (select job_id from work_results)"
        )
        jobs = [job for (job,) in data.execute(query)]
        place = "select module_path, operator_name, occurrence, job_id from mutation_specs"
        order = {job: where for *where, job in data.execute(place)}  # job ids are random
        jobs.sort(key=order.__getitem__)
        kept = set(random.Random(seed).sample(jobs, min(count, len(jobs))))
        for table in ("mutation_specs", "work_items"):
            data.executemany(
                f"delete from {table} where job_id = ?", [(job,) for job in jobs if job not in kept]
            )


def survivors(session: Path) -> tuple[int, int, list[str]]:
    """(mutants that were run, of these killed, the others: where, which operator, the line)."""
    with closing(sqlite3.connect(session)) as data:
        found = data.execute(
            "select module_path, start_pos_row, operator_name, test_outcome, diff from work_results"
            " join mutation_specs using (job_id) where worker_outcome = 'NORMAL'"
            " order by module_path, start_pos_row, operator_name, occurrence"
        ).fetchall()
    killed = sum(outcome != "SURVIVED" for *_, outcome, _ in found)
    alive = []
    for module, row, operator, outcome, diff in found:
        if outcome == "SURVIVED":
            changed = re.findall(r"^\+(?!\+\+)\s*(.*)$", diff, re.MULTILINE)
            alive.append(f"{module}:{row}: {operator.removeprefix('core/')}: {' '.join(changed)}")
    return len(found), killed, alive


def main(argv: list[str] | None = None) -> int:
    """0, 1 if too many survive, or 2 with one line on stderr."""
    return exit_code("mutants.py", partial(parse_and_run, argv))


def parse_and_run(argv: list[str] | None) -> int:
    """Raises UsageError if cosmic-ray is missing, or the tests fail without a mutant."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--module", action="append", choices=MODULES, help="only it; repeatable")
    parser.add_argument("--sample", type=positive, metavar="N", help="only N at random, of each")
    parser.add_argument("--fresh", action="store_true", help="begin again")
    options = parser.parse_args(argv)
    enough = True
    for module in options.module or MODULES:
        folder = ROOT / ".mutants" / module.removesuffix(".py")
        session = folder / "session.sqlite"
        if options.fresh or not session.exists():
            prepare(folder, module)
        if options.sample is not None:
            keep_sample(session, options.sample, seed=0)
        start, before = time.perf_counter(), survivors(session)[0]
        cosmic_ray(folder, "exec", "mutants.toml", "session.sqlite")
        minutes = (time.perf_counter() - start) / 60.0
        run, killed, alive = survivors(session)
        print("\n".join(alive))
        speed = (run - before) / max(minutes, 1e-9)
        print(f"{module}: {killed} of {run} mutants killed, {killed / max(1, run):.1%}; "
              f"{speed:.1f} a minute", flush=True)  # fmt: skip
        enough &= killed >= GOAL * run
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
