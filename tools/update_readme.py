"""Put the committed results into README.md and docs/figures.md, between their markers.

    python tools/update_readme.py            # rewrite them from results/
    python tools/update_readme.py --check    # exit 1 if that would change one

A marker pair is `<!-- result: NAME -->` ... `<!-- end -->`; NAME is a function below.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import OneLineParser, UsageError, exit_code  # noqa: E402
from comparison import verdict  # noqa: E402
from report import Table, render, write_whole  # noqa: E402

BLOCK = re.compile(r"(<!-- result: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict:
    """A file of results/, as tools/record.py wrote it. Raises UsageError."""
    try:
        return json.loads((ROOT / "results" / name).read_text(encoding="ascii"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"results/{name} cannot be read: {error}") from None


def origin(result: dict, file: str) -> str:
    """The line above a table: which command, machine and versions it comes from."""
    with_versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    return f"`{result['command']}` on {result['device']} ({with_versions}): `results/{file}`"


def scenarios() -> str:
    """What the four scenarios print, less the longest table and the checks."""
    result = load("main_cpu.json")
    text = "\n".join(result["printed"])
    text = text[text.index("## Scenario 1") : text.rindex("\nChecks\n")]
    text = re.sub(r"\nSlots over time.*?(?=\nAnswer)", "", text, flags=re.DOTALL)
    text = text.replace("## Scenario", "### Scenario").replace("Answer:", "**Answer:**")
    return origin(result, "main_cpu.json") + "\n\n" + text.strip()


def tail() -> str:
    """The end of a run."""
    result = load("main_cpu.json")["output"]
    all_checks = [(s["number"], c) for s in result["scenarios"] for c in s["checks"]]
    held = sum(check["ok"] for _, check in all_checks)
    shown = [
        (number, "ok" if check["ok"] else "FAILED", check["name"], check["detail"][:40])
        for number, check in all_checks
    ]
    headers = ("scenario", "result", "check", "found")
    table = render(Table("Checks", headers, [shown[1], shown[9], shown[-3]]), "plain")
    last = f"{held} of {len(all_checks)} checks held, {result['elapsed_s']:.1f} s"
    return f"```\n{table}\n     ...\n{last}\n```"


def checks() -> str:
    """Every check, on the CPU and on the GPU."""
    cpu, gpu = load("main_cpu.json"), load("main_h100.json")
    layers = load("main_h100_all_layers.json")
    every = [c["ok"] for s in layers["output"]["scenarios"] for c in s["checks"]]
    found: dict[tuple[int, str], list[str]] = {}
    for result in (cpu, gpu):
        for scenario in result["output"]["scenarios"]:
            for check in scenario["checks"]:
                text = ("" if check["ok"] else "FAILED: ") + check["detail"]
                found.setdefault((scenario["number"], check["name"]), []).append(text)
    rows = [(number, name, *texts) for (number, name), texts in found.items()]
    headers = ("scenario", "check", "CPU", gpu["device"])
    seconds = [f"{r['output']['elapsed_s']:.0f} s" for r in (cpu, gpu)]
    return "\n\n".join(
        [
            f"CPU ({seconds[0]}): {origin(cpu, 'main_cpu.json')}",
            f"GPU ({seconds[1]}): {origin(gpu, 'main_h100.json')}",
            render(Table("", headers, rows), "github").strip(),
            f"With K and V of all 40 layers, {sum(every)} of {len(every)} checks hold as well "
            f"({layers['output']['elapsed_s']:.0f} s): "
            + origin(layers, "main_h100_all_layers.json"),
        ]
    )


def manager() -> str:
    """The speed of the bookkeeping."""
    result = load("bench_manager.json")
    rows = []
    for row in result["output"]["rows"]:
        ns = row["ns_per_token"]
        rows.append(
            (row["workload"], row["tokens"], ns["append"], ns["append"] / ns["call"])
            + (ns["append_all"], *row["blocks"])
        )
    headers = ("workload", "tokens", "append, ns", "x empty call", "append_all, ns",
               "blocks admitted", "after step 1", "at the end")  # fmt: skip
    table = render(Table("", headers, rows), "github").strip()
    return origin(result, "bench_manager.json") + "\n\n" + table


WORDS = ("figure", "setting", "metric", "paper", "ours", "difference", "tolerance", "held")


def held(row: dict) -> str:
    """As reproduce.py's tables say it. Older results do not tell which rows were fitted."""
    return verdict(row["held"], row.get("reason", ""), row.get("fitted", False))


def value(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:.4g}"


def figures() -> str:
    """How many rows of reproduce.py held, figure by figure, and the ratios of rates."""
    result = load("reproduce.json")
    rows = result["output"]["rows"]
    columns = ["held", "explained", "not held"]
    if any("fitted" in row for row in rows):
        columns.insert(1, "of these fitted")
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        count = counts.setdefault(row["figure"], dict.fromkeys(["rows", *columns], 0))
        count["rows"] += 1
        count[{True: "held", "explained": "explained", False: "not held"}[row["held"]]] += 1
        if row["held"] is True and row.get("fitted"):
            count["of these fitted"] += 1
    summary = [(figure, *count.values()) for figure, count in counts.items()]
    summary.append(("all", *(sum(column) for column in list(zip(*summary))[1:])))
    ratios: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["metric"] == "rate, ratio at 0.5 s/token" and row["figure"].startswith("Fig."):
            panel, _, system = row["setting"].partition(", vLLM / ")
            mark = "" if row["held"] is True else f" ({held(row)})"
            cell = f"{row['ours']:.3g} / {row['paper']:.3g}{mark}"
            ratios.setdefault(f"{row['figure']}, {panel}", {})[system] = cell
    systems = ("Orca (Oracle)", "Orca (Pow2)", "Orca (Max)", "FasterTransformer")
    matrix = [
        (panel, *(cells.get(system, "-") for system in systems)) for panel, cells in ratios.items()
    ]
    return "\n\n".join([
        origin(result, "reproduce.json"),
        render(
            Table("", ("where in the paper", "rows", *columns), summary),
            "github",
        ).strip(),
        "How many times the rate of the others vLLM sustains at 0.5 s/token, ours / the paper's:",
        render(Table("", ("", *systems), matrix), "github").strip(),
    ])  # fmt: skip


def rows() -> str:
    """Every row of reproduce.py."""
    result = load("reproduce.json")
    shown = [
        (row["figure"], row["setting"], row["metric"], value(row["paper"]), value(row["ours"]),
         row["difference"], row["tolerance"], held(row))
        for row in result["output"]["rows"]
    ]  # fmt: skip
    return "\n\n".join([
        origin(result, "reproduce.json"),
        render(Table("", WORDS, shown), "github").strip(),
        "\n".join(f"* {note}" for note in result["output"]["notes"]),
    ])  # fmt: skip


def seeds() -> str:
    """Fig. 2 over 8 seeds, and OPT-175B's rates over 4."""
    parts = []
    for file, keep in (
        ("reproduce_fig2_seeds.json", lambda row: row["figure"] == "Fig. 2"),
        ("reproduce_fig12_seeds.json", lambda row: row["setting"].startswith("175B")
         and row["metric"].endswith("at 0.5 s/token")),
    ):  # fmt: skip
        result = load(file)
        shown = [
            (row["figure"], row["setting"], row["metric"], value(row["paper"]),
             value(row["ours"]), f"{row.get('spread', 0.0):.3g}", row["difference"],
             row["tolerance"], held(row))
            for row in result["output"]["rows"]
            if keep(row)
        ]  # fmt: skip
        headers = (*WORDS[:5], "highest less lowest", *WORDS[5:])
        parts += [origin(result, file), render(Table("", headers, shown), "github").strip()]
    return "\n\n".join(parts)


def serving() -> str:
    """The speed of the simulator."""
    result = load("bench_serving.json")
    rows = [
        (row["trace"], row["requests"], row["decode_tokens"], row["iterations"], row["seconds"],
         row["ns_per_token"], row["x_call"], row["plain_seconds"] or "-", row["speed_up"] or "-")
        for row in result["output"]["rows"]
    ]  # fmt: skip
    headers = ("trace", "requests", "decode tokens", "iterations", "s", "ns per token",
               "x empty call", "one by one, s", "speed-up")  # fmt: skip
    table = render(Table("", headers, rows, decimals=2), "github").strip()
    return origin(result, "bench_serving.json") + "\n\n" + table


PARTS = {
    part.__name__: part
    for part in (scenarios, tail, checks, manager, figures, rows, seeds, serving)
}


def made(name: str) -> str:
    """What stands between the markers of this name. Raises UsageError."""
    try:
        return PARTS[name]()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"the results do not give the part {name}: {what}") from None


def main(argv: list[str] | None = None) -> int:
    """0, 1 if --check finds a difference, or 2 with one line on stderr."""
    return exit_code("update_readme.py", partial(parse_and_update, argv))


def parse_and_update(argv: list[str] | None) -> int:
    """All texts are made before the first is written. Raises UsageError."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    changed = {}
    for path in (ROOT / "README.md", ROOT / "docs" / "figures.md"):
        try:
            old = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None
        new = BLOCK.sub(lambda m: f"{m[1]}{made(m[2])}\n{m[3]}", old)
        if new != old:
            changed[path] = new
    if args.check:
        return int(bool(changed))
    for path, text in changed.items():
        write_whole(path, text.encode("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
