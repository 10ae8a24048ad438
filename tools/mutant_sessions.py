"""A session of cosmic-ray over one module: made, run, run again for its survivors, read.

Serves tools/mutants.py, which is the command line. A session is a folder, .mutants/MODULE: a copy
of the root modules and of tests/, the tests' script, cosmic-ray's database and facts.json (a hash
of the module, the seconds of the tests). `first_tests` are the tests of the session's first run:
what they killed is not run again, so `lines_gone` tells how much of them is no longer there.

    session = Session(folder, "serving.py")
    session.prepare()
    session.run()
    print(session.found().killed)
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Container
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_sim.reporting.command_line import UsageError  # noqa: E402

MOST_TEST_S = 60.0  # CPU seconds that all tests of one module may take
MEMORY_KIB = 3 << 20
# Least time to a failure first.
UNIT = (
    "test_paged_manager",
    "test_serving",
    "test_failures",
    "test_scheduler",
    "test_event_driven",
    "test_state_machine",
)
SERVING = ("test_serving", "test_event_driven", "test_scheduler")
MODULES = {
    "allocator.py": (
        "test_allocator",
        "test_paged_manager",
        "test_baseline_manager",
        "test_exhaustive_baseline",
        "test_state_machine",
    ),
    "copy_ledger.py": ("test_allocator", "test_paged_manager", "test_state_machine"),
    "memory_usage.py": (
        "test_memory_usage",
        "test_paged_manager",
        "test_baseline_manager",
        "test_static_batching",
    ),
    "iteration.py": ("test_iteration", "test_scheduler", *SERVING[:2], "test_static_batching"),
    "static_batching.py": ("test_static_batching",),
    "baseline_manager.py": (
        "test_baseline_manager",
        *SERVING,
        "test_exhaustive_baseline",
        "test_state_machine",
    ),
    "paged_tables.py": UNIT,
    "scheduler.py": ("test_scheduler", "test_serving", "test_event_driven", "test_failures"),
    "kv_cache_manager.py": UNIT,
    "sequence.py": UNIT,
    "serving.py": SERVING,
    "beam_search.py": ("test_beam_search",),
    "invariants.py": ("test_paged_manager",),
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
test-command = "bash run_tests.sh"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = {left_out}
"""
# A file of tests is a process of its own: most mutants end in the first, and need not wait until
# pytest has read the others. The limit is of CPU time, which other work leaves as it is.
SCRIPT = """\
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1
ulimit -v {memory}
"""
LINE = "(ulimit -t {seconds}; exec {command}) || exit 1\n"
# Hypothesis shall find an example that fails, the same in every run; a small one is of no use.
PROFILE = """\
from hypothesis import Phase, settings

settings.register_profile("mutants", derandomize=True, database=None, deadline=None,
                          phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")
"""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A mutant that no test noticed."""

    row: int
    operator: str
    where: str  # name of the function, the innermost, or "" for the module
    change: str  # the line as it is with the mutant


@dataclass(frozen=True, slots=True)
class Found:
    """What a session says so far."""

    run: int  # mutants that have been run
    killed: int
    left: int  # mutants that have not
    alive: list[Survivor]


class Session:
    """One module's. `facts` are those of facts.json, empty before `prepare`."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder = folder
        self.module = module
        self.path = folder / "session.sqlite"
        there = self.path.exists() and (folder / "facts.json").exists()
        text = (folder / "facts.json").read_text(encoding="ascii") if there else "{}"
        self.facts: dict = json.loads(text)

    @property
    def started(self) -> bool:
        return bool(self.facts)

    @property
    def changed(self) -> bool:
        """Whether the module is another than that which the mutants are of."""
        return self.facts["module_sha256"] != digest(ROOT / self.module)

    def prepare(self) -> None:
        """Begin: a copy of what the tests need, and a database of all mutants."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        shutil.copytree(ROOT / "tests", self.folder / "first_tests")
        self.copy()
        left_out = json.dumps(LEFT_OUT)
        text = CONFIG.format(module=json.dumps(self.module), left_out=left_out)
        (self.folder / "mutants.toml").write_text(text, encoding="ascii")
        self.cosmic_ray("init", "mutants.toml", "new.sqlite")
        filter_operators = "cosmic_ray.tools.filters.operators_filter"
        self.python("-m", filter_operators, "new.sqlite", "mutants.toml")
        self.facts = {"module_sha256": digest(ROOT / self.module), "sample": False}
        self.time_tests()
        (self.folder / "new.sqlite").rename(self.path)

    def resume(self) -> None:
        """Go on where a run was ended, with the copy that it had. UsageError if that is old."""
        if self.changed:
            raise UsageError(f"{self.module} is not what its mutants were made of: --fresh")
        shutil.copy(ROOT / self.module, self.folder)  # a run that was killed leaves its mutant

    def again(self, but: Container[tuple[str, str]] = ()) -> None:
        """Have the survivors run once more, against the tests as they are now, those aside whose
        (function, changed line) is in `but`."""
        if self.changed:
            raise UsageError(f"{self.module} is not what its mutants were made of: --fresh")
        self.copy()
        self.time_tests()
        forget_survivors(self.path, but)

    def copy(self) -> None:
        """The root modules and tests of now."""
        for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
            shutil.copy(path, self.folder)
        shutil.rmtree(self.folder / "tests", ignore_errors=True)
        shutil.copytree(ROOT / "tests", self.folder / "tests")
        (self.folder / "mutants_profile.py").write_text(PROFILE, encoding="ascii")

    def command(self, test: str) -> list[str]:
        """No conftest.py: it loads torch."""
        file = f"tests/{test}.py"
        text = (self.folder / file).read_text(encoding="ascii")
        profile = ["-p", "mutants_profile"] if "hypothesis" in text else []
        return [
            sys.executable,
            "-m",
            "pytest",
            "--noconftest",
            "-x",
            *profile,
            "-m",
            "not slow",
            file,
        ]

    def time_tests(self) -> None:
        """Run the tests without a mutant, for their CPU seconds and their bytecode."""
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        seconds = {}
        script = SCRIPT.format(memory=MEMORY_KIB)
        for test in MODULES[self.module]:
            command = self.command(test)
            quoted = shlex.join(command)
            line = ["bash", "-c", f"ulimit -v {MEMORY_KIB}; exec {quoted}"]
            before = cpu_s()
            done = subprocess.run(line, cwd=self.folder, env=environment, capture_output=True)
            if done.returncode:
                raise UsageError(
                    f"without a mutant: {quoted} ended with {done.returncode}, in {self.folder}"
                )
            seconds[test] = round(cpu_s() - before, 2)
            # A mutant may never end. Four times what it takes, as bytecode was made in that.
            limit = max(10, int(4 * seconds[test]))
            script += LINE.format(seconds=limit, command=quoted)
        if sum(seconds.values()) > MOST_TEST_S:
            raise UsageError(f"the tests of {self.module} take {sum(seconds.values()):.0f} s")
        for path in (self.folder / "__pycache__").glob(f"{Path(self.module).stem}.*"):
            path.unlink()  # of the mutants there shall be none
        (self.folder / "run_tests.sh").write_text(script, encoding="ascii")
        self.keep(test_seconds=seconds)

    def keep(self, **facts: object) -> None:
        """Note facts."""
        self.facts |= facts
        text = json.dumps(self.facts, indent=1)
        (self.folder / "facts.json").write_text(text, encoding="ascii")

    def run(self) -> None:
        """All mutants that have not been run."""
        self.cosmic_ray("exec", "mutants.toml", "session.sqlite")

    def sample(self, count: int, seed: int) -> None:
        keep_sample(self.path, count, seed)
        self.keep(sample=True)

    def found(self) -> Found:
        return found(self.path)

    def lines_gone(self) -> int:
        """Lines of the first tests, those for this module, that the tests of now have not."""
        return sum(
            lines_gone(self.folder / "first_tests" / f"{test}.py", ROOT / "tests" / f"{test}.py")
            for test in MODULES[self.module]
        )

    def python(self, *arguments: str) -> None:
        done = subprocess.run([sys.executable, *arguments], cwd=self.folder)
        if done.returncode:
            raise UsageError(
                f"{' '.join(arguments)} ended with {done.returncode}, in {self.folder}"
            )

    def cosmic_ray(self, *arguments: str) -> None:
        self.python("-m", "cosmic_ray.cli", *arguments)


def cpu_s() -> float:
    """CPU seconds of the processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines_gone(old: Path, new: Path) -> int:
    """Lines that are no longer there or have changed; those that were added do not count."""
    before, after = (
        path.read_text(encoding="ascii").splitlines() if path.exists() else []
        for path in (old, new)
    )
    return sum(line.startswith("- ") for line in difflib.ndiff(before, after))


def forget_survivors(session: Path, but: Container[tuple[str, str]]) -> None:
    """Their results, so that they are to be run again."""
    with closing(sqlite3.connect(session)) as data, data:
        alive = data.execute(
            "select job_id, definition_name, diff from work_results join mutation_specs"
            " using (job_id) where test_outcome = 'SURVIVED'"
        ).fetchall()
        for job, where, diff in alive:
            if (where or "", changed_line(diff)) not in but:
                data.execute("delete from work_results where job_id = ?", (job,))


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


def found(session: Path) -> Found:
    """What the database says. Mutants of operators left out are neither run nor left."""
    with closing(sqlite3.connect(session)) as data:
        rows = data.execute(
            "select start_pos_row, operator_name, definition_name, test_outcome, diff"
            " from work_results join mutation_specs using (job_id)"
            " where worker_outcome = 'NORMAL' order by start_pos_row, operator_name, occurrence"
        ).fetchall()
        (left,) = data.execute(
            "select count(*) from work_items where job_id not in (select job_id from work_results"
            " where worker_outcome in ('NORMAL', 'SKIPPED'))"
        ).fetchone()
    alive = [
        Survivor(row, operator.removeprefix("core/"), where or "", changed_line(diff))
        for row, operator, where, outcome, diff in rows
        if outcome == "SURVIVED"
    ]
    return Found(len(rows), len(rows) - len(alive), left, alive)


def changed_line(diff: str) -> str:
    """What a mutant puts there, or what it takes away."""
    for sign in ("+", "-"):
        lines = re.findall(rf"^\{sign}(?!\{sign}\{sign})[ \t]*(.*)$", diff, re.MULTILINE)
        if lines:
            line = " ".join(lines).strip()
            return line if sign == "+" else f"without {line}"
    raise ValueError("a mutant that changes nothing")
