"""What README.md and docs/reliability.md show of the long searches, for tools/update_readme.py.

Reproduces nothing. `hunts` is a table of all that tools/hunt.py has left in results/, `small` a
sentence of what `make test` goes through, `coverage` what it takes of the root modules,
`reliability` a few lines of all of this and of the mutants. A search that has not been recorded
leaves its line out; one that failed is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from committed import find, link, rows, table
from hunt import COVERAGE, HUNTS

from vllm_sim.reporting.command_line import UsageError

MUTANTS = "mutants.json"


def file_of(hunt: str) -> str:
    return f"hunt_{hunt.replace('-', '_')}.json"


def recorded(*hunts: str) -> Iterator[tuple[str, dict]]:
    """(file, result) of those that have been recorded."""
    for hunt in hunts:
        if (result := find(file_of(hunt))) is not None:
            if result["output"]["exit_code"] != 0:
                raise UsageError(f"results/{file_of(hunt)} is of a hunt that failed")
            yield file_of(hunt), result


def hunts() -> str:
    """Each test of each search: its command, what it went through, how long it took and where."""
    body = []
    for file, result in recorded(*HUNTS):
        for row in rows(result, "tests"):
            figures = dict(row["figures"])
            cpu_s = figures.pop("cpu_s", None)
            body.append(
                (
                    f"`{result['command']}`",
                    of_test(row["test"]),
                    told(figures),
                    cpu_s if cpu_s is None else round(cpu_s),
                    round(row["seconds"]),
                    f"{result['device']}, {link(file)}",
                )
            )
    headers = "command", "test", "went through", "CPU s", "s", "on, kept in"
    return table(headers, body, decimals=0)


def of_test(name: str) -> str:
    """The world in a parametrized test's brackets, or else the test's own name in words."""
    function, _, parameters = name.partition("::")[2].partition("[")
    if " blocks" in parameters:  # figures that are expected stand behind the world
        return parameters.rstrip("]").partition("-")[0]
    return " ".join(
        filter(
            None,
            [
                function.removeprefix("test_").replace("_", " "),
                parameters.rstrip("]").replace("-", ", "),
            ],
        )
    )


def told(figures: dict) -> str:
    """`12,353 copies` for each figure, and words as they are."""
    return ", ".join(
        f"{value:,} {name}" if isinstance(value, int) else f"{name} {value}"
        for name, value in figures.items()
    )


def coverage() -> str:
    """Branches of the root modules that the tests take, and those that they do not."""
    for _, result in recorded(COVERAGE):
        return taken(result)
    return "Not recorded yet."


def taken(result: dict) -> str:
    """The share, and a line for each module that has more."""
    *modules, whole = rows(result, "tests")
    figures = whole["figures"]
    share = figures["taken"] / figures["branches"]
    text = (
        f"{figures['taken']:,} of {figures['branches']:,} branches, {share:.1%} "
        f"(`{result['command']}`, {result['device']}: {link(file_of(COVERAGE))})."
    )
    if not modules:
        return text
    body = [(f"`{row['test']}`", row["figures"]["not taken"]) for row in modules]
    return text + "\n\n" + table(("module", "from line to line"), body)


# hunt: its line, with its totals by name.
LINES = {
    "exhaustive": "{states:,} states of the paged manager, all that small worlds can reach, and "
    "{transitions:,} calls in them",
    "exhaustive-baseline": "{states:,} states of the contiguous manager and of its buddy "
    "allocator, and {transitions:,} calls in them",
    "exhaustive-serving": "{workloads:,} workloads, all of a small world, served beside a naive "
    "scheduler, {iterations:,} iterations",
    "state-machine": "{rules:,} random calls of the paged manager against a shadow that knows "
    "contents and no blocks",
    "state-machine-baseline": "{rules:,} of the contiguous one",
    "isolation-gather": "{outputs:,} attention outputs of kernel gather over the lives of "
    "{sequences:,} sequences in pools full of NaN",
    "isolation-triton": "{outputs:,} of kernel triton over those of {sequences:,}",
    "fuzz": "{inputs:,} malformed inputs, one line and exit code 2 each",
}


def totals(found: Iterable[dict]) -> dict[str, int]:
    """Sums of the figures of these tests, by name; a name that none has is no key."""
    sums: Counter = Counter()
    for row in found:
        sums.update({key: n for key, n in row["figures"].items() if isinstance(n, int)})
    return dict(sums)


# File of tests: what `make test` goes through in it.
SMALL = {
    "test_exhaustive.py": "{states:,} states of the paged manager, {transitions:,} calls in them",
    "test_exhaustive_baseline.py": "{states:,} states of the contiguous one and of its buddy "
    "allocator, and {transitions:,} calls",
    "test_exhaustive_serving.py": "{workloads:,} workloads, {contiguous workloads:,} contiguous",
    "test_state_machine.py": "{rules:,} random calls",
    "test_isolation.py": "{sequences:,} sequences",
    "test_fuzz.py": "{inputs:,} malformed inputs",
}


def small() -> str:
    """What the same tests go through in `make test`."""
    for file, result in recorded("small"):
        by_file: dict[str, list[dict]] = {}
        for row in rows(result, "tests"):
            by_file.setdefault(row["test"].partition("::")[0], []).append(row)
        parts = [line.format(**totals(by_file[name])) for name, line in SMALL.items()]
        where = f"{result['output']['elapsed_s']:,.0f} s on {result['device']}, {link(file)}"
        return f"{'; '.join(parts)}: `{result['command']}`, {where}."
    return "Not recorded yet."


def reliability() -> str:
    """What was hunted, in a line each."""
    lines = []
    for hunt, line in LINES.items():
        for _, result in recorded(hunt):
            where = f"`{result['command']}`, {result['output']['elapsed_s']:,.0f} s on"
            found = line.format(**totals(rows(result, "tests")))
            lines.append(f"{found} ({where} {result['device']})")
    mutants = find(MUTANTS)
    if mutants is not None:
        modules = rows(mutants, "mutants")
        made, killed = (sum(row[key] for row in modules) for key in ("mutants", "killed"))
        reasons = [row["reason"] for row in rows(mutants, "survivors")]
        rest = "each of the others explained" if all(reasons) else "NOT ALL others explained"
        lines.append(
            f"{killed:,} of {made:,} changes to {len(modules)} modules noticed by tests, "
            f"{rest} (`make mutants`)"
        )
    for _, result in recorded(COVERAGE):
        figures = rows(result, "tests")[-1]["figures"]
        lines.append(
            f"{figures['taken'] / figures['branches']:.1%} of the branches of the root "
            "modules taken by `make test` (`make coverage`)"
        )
    return "\n".join(f"* {line}" for line in lines)
