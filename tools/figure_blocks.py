"""What README.md and docs/ show of reproduce.py's runs, for tools/update_readme.py.

Reproduces nothing. Each function is the text between two markers: `headline`, `ratios`, `figures`,
`rows`, `seeds`, `differences`, `explained D6`, `beams_hour`, `beam_step`.
"""

from __future__ import annotations

from collections import Counter

from committed import find, load, origin, scenarios, table, with_links
from committed import rows as rows_of

from vllm_sim.evaluation import comparison
from vllm_sim.evaluation.comparison import verdict

WORDS = ("figure", "setting", "metric", "paper", "ours", "difference", "tolerance", "held")
RATIO = "rate, ratio at 0.5 s/token"
ORCAS = ("Orca (Oracle)", "Orca (Pow2)", "Orca (Max)")
SYSTEMS = (*ORCAS, "FasterTransformer")
# Whose doing each difference is; docs/differences.md says why.
OURS, THEIRS, CHANCE = "ours", "the paper's", "chance"
UNKNOWN = "what is not published"
WHOSE = {
    "D1": THEIRS,
    "D2": THEIRS,
    "D4": CHANCE,
    "D5": CHANCE,
    "D6": f"{OURS}, in part",
    "D7": UNKNOWN,
    "D8": THEIRS,
    "D9": UNKNOWN,
    "D10": UNKNOWN,
    "D11": UNKNOWN,
    "D12": THEIRS,
    "D13": THEIRS,
    "D14": CHANCE,
    "D15": CHANCE,
}


def held(row: dict) -> str:
    """As reproduce.py's tables say it. Older results do not tell which rows were fitted."""
    return with_links(verdict(row["held"], row.get("reason", ""), row.get("fitted", False)))


def value(number: float | str | None, digits: int = 4) -> str:
    """A number, a range in words, or nothing: a curve of ours may never have a latency."""
    if number is None:
        return "-"
    return number if isinstance(number, str) else f"{number:.{digits}g}"


def number_of(reason: str) -> str:
    return reason.split(":")[0]


def reproduced() -> list[dict]:
    return rows_of(load("reproduce.json"), "rows")


def headline() -> str:
    """What a reader will see, in three lines."""
    memory = scenarios(load("main_cpu.json"))
    kept = [check["ok"] for scenario in memory for check in scenario["checks"]]
    rows = reproduced()
    spans = {}
    for dataset in ("ShareGPT", "Alpaca"):
        pairs = [
            (row["ours"], row["paper"])
            for row in rows
            if row["figure"] == "Fig. 12"
            and row["metric"] == RATIO
            and dataset in row["setting"]
            and row["setting"].endswith(ORCAS)
            and row["ours"] is not None
        ]
        ours, theirs = (f"{min(side):.3g} to {max(side):.3g}" for side in zip(*pairs))
        spans[dataset] = f"{ours} times", f"on {dataset} (paper: {theirs})"
    count = Counter(row["held"] for row in rows)
    fitted = sum(row["held"] is True and row.get("fitted", False) for row in rows)
    of_these = f" ({fitted} of them on values that constants were fitted to)" if fitted else ""
    why = f"[explained](#differences-from-the-paper), {count[False]} neither"
    return "\n".join(
        [
            f"* **Memory** (`main.py`, {sum(kept)} of {len(kept)} checks held): "
            f"{memory[1]['answer']}",
            f"* **Serving** (`reproduce.py`): at 0.5 s/token vLLM sustains {spans['ShareGPT'][0]} the "
            f"rate of the three Orcas {spans['ShareGPT'][1]}, {' '.join(spans['Alpaca'])}.",
            f"* **The whole evaluation**: of {len(rows)} rows, the paper's number beside ours, "
            f"{count[True]} are held within their tolerance{of_these}, {count['explained']} {why}.",
        ]
    )


def ratios() -> str:
    """How many times the rate of the others vLLM sustains, ours and the paper's."""
    cells: dict[str, dict[str, str]] = {}
    for row in reproduced():
        if row["metric"] == RATIO and row["figure"].startswith("Fig."):
            panel, _, system = row["setting"].partition(", vLLM / ")
            mark = "" if row["held"] is True else f" ({held(row)})"
            text = f"{value(row['ours'], 3)} / {value(row['paper'], 3)}{mark}"
            cells.setdefault(f"{row['figure']}, {panel}", {})[system] = text
    body = [(panel, *(found.get(s, "-") for s in SYSTEMS)) for panel, found in cells.items()]
    shown = table(("requests/s of vLLM over those of", *SYSTEMS), body)
    return origin(load("reproduce.json"), "reproduce.json") + "\n\n" + shown


def figures() -> str:
    """How many rows of reproduce.py held, figure by figure."""
    rows = reproduced()
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
    shown = table(("where in the paper", "rows", *columns), summary)
    return origin(load("reproduce.json"), "reproduce.json") + "\n\n" + shown


def rows() -> str:
    """Every row of reproduce.py."""
    shown = [
        (
            row["figure"],
            row["setting"],
            row["metric"],
            value(row["paper"]),
            value(row["ours"]),
            row["difference"],
            row["tolerance"],
            held(row),
        )
        for row in reproduced()
    ]
    result = load("reproduce.json")
    return "\n\n".join(
        [
            origin(result, "reproduce.json"),
            table(WORDS, shown),
            "\n".join(f"* {note}" for note in result["output"]["notes"]),
        ]
    )


def seeds() -> str:
    """Fig. 2 over 8 seeds, and OPT-175B's rates over 4."""
    parts = []
    for file, keep in (
        ("reproduce_fig2_seeds.json", lambda row: row["figure"] == "Fig. 2"),
        (
            "reproduce_fig12_seeds.json",
            lambda row: (
                row["setting"].startswith("175B") and row["metric"].endswith("at 0.5 s/token")
            ),
        ),
    ):
        result = load(file)
        shown = [
            (
                row["figure"],
                row["setting"],
                row["metric"],
                value(row["paper"]),
                value(row["ours"]),
                f"{row.get('spread', 0.0):.3g}",
                row["difference"],
                row["tolerance"],
                held(row),
            )
            for row in rows_of(result, "rows")
            if keep(row)
        ]
        parts += [
            origin(result, file),
            table((*WORDS[:5], "highest less lowest", *WORDS[5:]), shown),
        ]
    return "\n\n".join(parts)


def differences() -> str:
    """Each D: which rows of the committed run it explains, whose doing, and its one line."""
    lines = {
        number_of(text): text.partition(": ")[2]
        for text in vars(comparison).values()
        if isinstance(text, str) and text[:1] == "D" and text[1:2].isdigit()
    }
    found: dict[str, Counter] = {number: Counter() for number in lines}
    for row in reproduced():
        if row["held"] == "explained":
            found[number_of(row["reason"])][row["figure"]] += 1
    body = [
        (
            with_links(number),
            ", ".join(f"{n} of {figure}" for figure, n in found[number].items()) or "none here",
            WHOSE[number],
            line,
        )
        for number, line in lines.items()
    ]
    return table(("", "rows", "whose doing", "in short"), body)


def explained(number: str) -> str:
    """The rows that one difference explains in the committed run, of D15 in that of the seeds."""
    seeds = find("reproduce_fig12_seeds.json") if number == "D15" else None
    rows = rows_of(seeds, "rows") if seeds else reproduced()
    shown = [
        (
            row["figure"],
            row["setting"],
            row["metric"],
            value(row["paper"]),
            value(row["ours"]),
            row["difference"],
            row["tolerance"],
        )
        for row in rows
        if number_of(row.get("reason", "")) == number
    ]
    return table(WORDS[:-1], shown) if shown else "No row of the committed run."


def beams_hour() -> str:
    """Fig. 14's beam search over an hour beside ten minutes, once it has been recorded."""
    hour = find("reproduce_beams_hour.json")
    if hour is None:
        return ""
    short = {(row["setting"], row["metric"]): row["ours"] for row in reproduced()}
    body = [
        (
            row["setting"].partition("beam ")[2],
            row["metric"],
            value(row["paper"]),
            value(short[row["setting"], row["metric"]]),
            value(row["ours"]),
            row["difference"],
            held(row),
        )
        for row in rows_of(hour, "rows")
        if row["figure"] == "Fig. 14" and "beam" in row["setting"]
    ]
    headers = (
        "beam width, system",
        "metric",
        "paper, an hour",
        "ours, ten minutes",
        "ours, an hour",
        "the hour's difference",
        "held over the hour",
    )
    return "\n\n".join(
        ["Over the paper's hour:", origin(hour, "reproduce_beams_hour.json"), table(headers, body)]
    )


def beam_step() -> str:
    """What a step of sampling and of beam search costs in software, without the model."""
    result = load("bench_beam_step.json")
    body = [
        (
            row["groups"],
            row["sequences"],
            row["sample_us"],
            row["beam_us"],
            row["beam_less_sample_us"],
        )
        for row in rows_of(result, "groups")
    ]
    headers = (
        "requests",
        "sequences each",
        "sampling, us a request",
        "beam search, us a request",
        "more, us",
    )
    return origin(result, "bench_beam_step.json") + "\n\n" + table(headers, body)
