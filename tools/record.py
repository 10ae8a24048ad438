"""Runs a script with --json and keeps what it found in results/, with where and on what it ran.

    python tools/record.py results/main_cpu.json main.py --device cpu --format github

The file holds the command, the commit, the machine, the versions, the script's own JSON ("output")
and its lines ("printed"). The variable COMMIT says which commit it is where git cannot.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """What is checked out, with '+' behind it if files differ from it, results/ aside."""
    changed = git("status", "--porcelain", "--untracked-files=no", ":!results")
    return os.environ.get("COMMIT") or git("rev-parse", "HEAD") + ("+" if changed else "")


def device() -> str:
    """The first GPU's name, or the number of cores."""
    try:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    except ImportError:
        pass
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def main(result: str, *command: str) -> int:
    """The script's own exit code. Nothing is written if it leaves no JSON."""
    if os.path.realpath(result) in map(os.path.realpath, command):
        sys.exit(f"record.py: {result} is what the command reads")
    started_at = commit()  # a long run may see others come
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "out.json"
        run = [sys.executable, *command, "--json", str(found)]
        printed = []
        with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
            for line in running.stdout:
                print(line, end="", flush=True)
                printed.append(line.rstrip("\n"))
        if not found.exists():
            return running.returncode or 2
        output = json.loads(found.read_text(encoding="ascii"))
    document = {
        "command": " ".join(["python", *command]),
        "commit": started_at,
        "device": device(),
        "versions": output["versions"],
        "output": output,
        "printed": printed,
    }
    Path(result).write_text(json.dumps(document, indent=1) + "\n", encoding="ascii")
    return running.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 2 else __doc__)
