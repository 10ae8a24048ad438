"""What tests share: one way to run a script, and how searches tell what they went through.

Without a CUDA device Triton's kernels run through its interpreter.

A long search tells what it went through with `figure(name, states=..., seconds=...)`: one line for
each stands at the end of the run, and `--figures FILE` writes those of the last run as JSON.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import record
import torch

from vllm_sim.reporting.documents import versions

ROOT = Path(__file__).resolve().parent.parent

# Read when a kernel is decorated, so before anything imports one. Nothing else here uses triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def run_script():
    """Runs a script of the repository to its end, as a process: run_script("main.py", "--seed", 1).

    run_script("-c", code) runs Python code. `env` is added to the environment, where None takes a
    variable out; variables that decide what a script does are out unless given. What else
    subprocess.run takes may be given, stdout for example. Returns its CompletedProcess, as text.
    """

    def run(name, *args, cwd=ROOT, env=None, stdin=None, timeout=100, **options):
        script = name if name.startswith("-") else ROOT / name
        variables = {**os.environ, "LENGTHS_DIR": None, "SLURM_ARRAY_TASK_ID": None, **(env or {})}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.run(
            [sys.executable, script, *map(str, args)],
            cwd=cwd,
            env={key: str(value) for key, value in variables.items() if value is not None},
            timeout=timeout,
            **{"stdin": stdin or subprocess.DEVNULL, "text": True, **pipes, **options},
        )

    return run


@pytest.fixture
def write(tmp_path):
    """write(text, name) makes a file and returns its path."""

    def write(text, name="trace"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def refused(capfd):
    """refused(main, "--seed", "x"): why a script refuses these, in one line and with code 2."""

    def refused(script, *args):
        code = script.main([*map(str, args)])
        printed, errors = capfd.readouterr()
        told, _, reason = errors.partition(": error: ")
        name = getattr(script, "PROGRAM", f"{script.__name__}.py")  # of a package, run by -m
        assert (code, printed, told) == (2, "", name), errors
        assert errors.count("\n") == 1 and errors.isascii()
        return reason

    return refused


@pytest.fixture
def few_bytes():
    """For tensors of a few bytes: a second thread only ever waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def figure(request):
    """figure(name, **numbers): what a search went through, shown at the end if its test passes."""
    return lambda name, **numbers: request.node.user_properties.append((name, numbers))


def pytest_addoption(parser):
    parser.addoption("--figures", type=Path, help="write the figures of the searches here, as JSON")


def pytest_terminal_summary(terminalreporter, config):
    """Reports come from all processes of the run; a line for each search that passed."""
    passed = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    told = [pair for report in passed for pair in report.user_properties]
    searches: dict[str, dict] = {}
    for name, numbers in told:  # the parts of a search have its name, and are summed
        if isinstance(numbers, dict):
            sums = searches.setdefault(name, {})
            sums |= {key: round(sums.get(key, 0) + value, 1) for key, value in numbers.items()}
    lines = [
        f"{name}: {', '.join(f'{value:,} {key}' for key, value in numbers.items())}"
        for name, numbers in searches.items()
    ]
    if lines:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(lines))
    if path := config.getoption("--figures"):
        document = {
            "command": shlex.join(["pytest", *sys.argv[1:]]),
            "commit": record.commit(),
            "device": record.device(),
            "versions": versions(),
            "output": searches,
            "printed": lines,
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="ascii")
