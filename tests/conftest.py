"""What tests share: one way to run a script. Without a GPU Triton's kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
def few_bytes():
    """For tensors of a few bytes: a second thread only ever waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
