"""Run a script with --json and keep what it found in results/, with where and on what it ran.

    python tools/record.py results/main_cpu.json main.py --device cpu
    python tools/record.py results/bench_manager.json benchmarks/bench_manager.py

The file holds the command, the commit, the machine, the versions, the script's own JSON under
"output" and the lines it printed under "printed". The variable COMMIT says which commit it is where
git cannot: on a machine that was handed the files alone, or with the history of another day.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_sim.reporting.command_line import OneLineParser, UsageError, exit_code  # noqa: E402
from vllm_sim.reporting.documents import versions  # noqa: E402
from vllm_sim.scenarios.report import check_writable, write_json  # noqa: E402


def commit() -> str:
    """The commit that is checked out, '+' behind it if files differ from it, results/ aside."""
    if told := os.environ.get("COMMIT"):
        return told
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", ":!results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def device() -> str:
    """The first GPU's name, or the number of cores."""
    try:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    except ImportError:
        pass
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def main(argv: list[str] | None = None) -> int:
    """The script's own exit code, or 2 with one line on stderr."""
    return exit_code("record.py", partial(parse_and_record, argv))


def parse_and_record(argv: list[str] | None) -> int:
    """Raises UsageError for a script that there is not, or that leaves no JSON."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("result", type=Path, help="the file to write")
    parser.add_argument("script", help="the script to run, from the root")
    args, arguments = parser.parse_known_args(argv)
    check_writable(args.result)
    if not (ROOT / args.script).is_file():
        raise UsageError(f"there is no script {args.script}")
    started_at = commit()  # a long run may see others come
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "out.json"
        command = [sys.executable, args.script, *arguments, "--json", str(found)]
        printed = []
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="backslashreplace"
        ) as running:
            assert running.stdout is not None
            for line in running.stdout:
                print(line, end="", flush=True)
                printed.append(line.rstrip("\n"))
        if not found.exists():
            return running.returncode or 2
        output = load(found, args.script)
    write_json(
        args.result,
        {
            "command": " ".join(["python", args.script, *arguments]),
            "commit": started_at,
            "device": device(),
            "versions": versions(),
            "output": output,
            "printed": printed,
        },
    )
    return running.returncode


def load(path: Path, script: str) -> object:
    """What the script wrote with --json. Raises UsageError if that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="ascii"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{script}: its --json cannot be read: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


if __name__ == "__main__":
    sys.exit(main())
