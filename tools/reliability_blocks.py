"""What docs/reliability.md shows of results/, for tools/update_readme.py.

Reproduces nothing. `mutants` is how many mutants of each module the tests kill, `survivors` which
they do not, and why nothing can tell those from the code.
"""

from __future__ import annotations

from committed import find, origin, table
from committed import rows as rows_of

MUTANTS = "mutants.json"


def mutants() -> str:
    """How many are killed, by module, once it has been recorded."""
    result = find(MUTANTS)
    if result is None:
        return "Not recorded yet."
    found = rows_of(result, "mutants")
    body = [
        (
            f"`{row['module']}`",
            row["mutants"],
            row["killed"],
            f"{row['share']:.1%}",
            row["test_seconds"],
        )
        for row in found
    ]
    ran, killed = (sum(row[key] for row in found) for key in ("mutants", "killed"))
    body.append(("all", ran, killed, f"{killed / max(1, ran):.1%}", None))
    headers = "module", "mutants", "killed", "share", "its tests, CPU s"
    return f"{origin(result, MUTANTS)}\n\n{table(headers, body)}"


def survivors() -> str:
    """Those that survive, with the reason, once it has been recorded."""
    result = find(MUTANTS)
    if result is None:
        return "Not recorded yet."
    body = []
    for row in rows_of(result, "survivors"):
        where = f"`{row['module']}`" + (f", `{row['function']}`" if row["function"] else "")
        line = row["change"].partition("  #")[0]
        change = f"`{line}`".replace("|", "\\|")  # a bar would end the cell
        body.append((where, change, row["count"], row["reason"] or "NO REASON"))
    headers = "where", "the line as the mutant has it", "mutants", "why nothing can tell"
    return table(headers, body)
