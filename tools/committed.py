"""The committed measurements of results/, and how a line or a link speaks of them.

Serves tools/update_readme.py and its blocks. Each file is what tools/record.py wrote: the command,
the commit, the machine, the versions, the script's own JSON under "output", its lines under
"printed". That JSON is a document of docs/json.md, or older: then a table was a list of rows under
a key of its own, the setting was not apart, and each scenario had its checks. Both are read here.

    result = load("main_cpu.json")
    print(origin(result, "main_cpu.json"))     # command, machine, link: the line above a table
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_sim.reporting.command_line import UsageError  # noqa: E402
from vllm_sim.scenarios.report import Table, render  # noqa: E402

USUAL = "main_cpu.json"  # whose machine and versions need no telling
DIFFERENCES = "docs/differences.md"


def load(name: str) -> dict:
    """A file of results/. Raises UsageError."""
    try:
        return json.loads((ROOT / "results" / name).read_text(encoding="ascii"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"results/{name} cannot be read: {error}") from None


def find(name: str) -> dict | None:
    """The same, or None while it has not been recorded."""
    return load(name) if (ROOT / "results" / name).exists() else None


def rows(result: dict, name: str) -> list[dict]:
    """The rows of the table with this id. KeyError if there is none."""
    output = result["output"]
    if "schema" not in output:
        return output[name]
    for one in output["tables"]:
        if one["id"] == name:
            return one["rows"]
    raise KeyError(f"no table {name}")


def has(result: dict, name: str) -> bool:
    """Whether there is such a table."""
    output = result["output"]
    tables = [one["id"] for one in output["tables"]] if "schema" in output else output
    return name in tables


def setting(result: dict) -> dict:
    """What is not rows: sizes, limits, repeats."""
    output = result["output"]
    return output["setting"] if "schema" in output else output


def scenarios(result: dict) -> list[dict]:
    """Of main.py each scenario's number, name, answer and checks."""
    output = result["output"]
    if "schema" not in output:
        return output["scenarios"]
    return [
        {**one, "checks": [c for c in output["checks"] if c["scenario"] == one["number"]]}
        for one in output["scenarios"]
    ]


def versions(result: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def link(file: str) -> str:
    return f"[`results/{file}`](results/{file})"


def origin(result: dict, file: str) -> str:
    """Command, machine and file; the versions only where they are not the usual ones."""
    usual = load(USUAL)
    same = (result["device"], result["versions"]) == (usual["device"], usual["versions"])
    more = "" if same else f" ({versions(result)})"
    return f"`{result['command']}` on {result['device']}{more}: {link(file)}"


def machine() -> str:
    """What every other line leaves out."""
    usual = load(USUAL)
    return (
        f"Tables name the command, the machine and the file that they come from; where no versions "
        f"stand, they are {versions(usual)}."
    )


def with_links(text: str) -> str:
    """D-numbers as links to what is said of them."""
    return re.sub(r"\bD(\d+)\b", rf"[D\1]({DIFFERENCES}#d\1)", text)


def table(headers: tuple[str, ...], rows: list, decimals: int = 1) -> str:
    """A table for Markdown, without a title."""
    return render(Table("", headers, rows, decimals=decimals), "github").strip()
