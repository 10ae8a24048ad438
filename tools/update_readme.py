"""Puts the committed results into docs/results/ and the README's table of five rows.

    python tools/update_readme.py            # write them anew from results/
    python tools/update_readme.py --check    # exit code 1 if that would change one

Reproduces nothing. A page shows what the commands printed, as tools/record.py kept it, each with
its command, commit and machine; of two runs no more was kept, and their "output" is null. The
README's rows stand between two marks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # page: its title, one sentence, the results
    "scenarios": (
        "The four scenarios of main.py",
        "On a CPU, then on a GPU, then with K and V of all 40 layers.",
        ("main_cpu", "main_h100", "main_h100_all_layers"),
    ),
    "figures": (
        "Every row of reproduce.py",
        "All figures at seed 0, with the authors' lengths and, second, without; then, with them, "
        "Fig. 2 and Fig. 12 over several seeds. D-numbers: [differences](../differences.md).",
        (
            "reproduce",
            "reproduce_without_lengths",
            "reproduce_fig2_seeds",
            "reproduce_fig12_seeds",
        ),
    ),
    "gpu": (
        "Kernels on a GPU",
        "What each number means, and which aims are missed: [Kernels on a GPU](../gpu.md). "
        "The attention measured on an H100 is the kernel before plans.",
        (
            "bench_attention",
            "tune_attention",
            "bench_attention_h100",
            "profile_attention",
            "bench_paging_cost",
            "bench_beam_step",
        ),
    ),
    "speed": (
        "Speed of the bookkeeping and of the simulator",
        "Python on one core; what is timed: [Speed](../speed.md).",
        ("bench_manager", "bench_serving"),
    ),
    "models": (
        "A real model on the blocks",
        "What each number means: [a real model](../models.md).",
        ("fig15_measured", "fig15_searches", "bench_generate_cpu", "bench_generate_h200"),
    ),
    "serving": (
        "Served for real, on one H200 and on two",
        "What each number means, and which aims are missed: [Served for real](../serving.md).",
        (
            "serve_saturated_60s",
            "serve_saturated",
            "serve_poisson_max_paged",
            "serve_poisson_pow2_oracle",
            "serve_samples",
            "serve_peer",
            "serve_spread",
            "serve_two_gpus",
            "serve_two_gpus_66b",
        ),
    ),
    "servers": (
        "capacity.py held against real servers",
        "What each number means: [how many requests fit](../capacity.md).",
        ("measured_servers", "replay"),
    ),
    "conformance": (
        "Managers searched",
        "What is searched, how, and which faults are reported: "
        "[Bring your own manager](../conformance.md).",
        (
            "conformance_ours",
            "conformance_ours_manager",
            "conformance_transformers",
            "conformance_transformers_pressed",
            "conformance_transformers_late",
            "conformance_transformers_late_no_cancels",
            "conformance_nano_vllm",
            "conformance_nano_vllm_wide",
            "conformance_mini_sglang",
            "conformance_mini_sglang_aborts",
            "conformance_mini_sglang_prefixes",
            "conformance_mini_sglang_contents",
            "conformance_tokasaurus",
            "conformance_vllm",
        ),
    ),
    "sweep": (
        "A sweep: three block sizes, three seeds",
        "How to run one: [Sweeps](../sweeps.md).",
        ("sweep_block_size",),
    ),
}
RATE = "rate, ratio at 0.5 s/token"
FIVE = (  # what, figure, setting of the 13B model, how its metric begins
    ("% of the KV cache that holds tokens: vLLM", "Fig. 2", "ShareGPT, vLLM", "tokens"),
    ("the same: Orca (Max)", "Fig. 2", "ShareGPT, Orca (Max)", "tokens"),
    ("requests at a time, vLLM / Orca (Max)", "Sec. 6.2", "ShareGPT, vLLM / Orca (Max)", "batch"),
    ("requests a second, vLLM / Orca (Max)", "Fig. 12", "ShareGPT, vLLM / Orca (Max)", RATE),
    ("% of blocks saved, 6 samples of a prompt", "Fig. 15", "Alpaca, parallel 6", "% of blocks"),
)
SERVED = {"saturated": "serve_saturated", "poisson": "serve_poisson_max_paged"}  # one GPU's
BLOCK = re.compile(r"(<!-- headline -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict:
    """A file of results/."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="ascii"))


def section(name: str) -> str:
    """One result: where it comes from, and the lines that its command printed."""
    found = load(name)
    printed = "\n".join(found["printed"]).strip()
    if "--format github" in found["command"]:
        printed = re.sub("^#", "##", printed, flags=re.MULTILINE)
    else:
        printed = f"```\n{printed}\n```"
    # A folder of the machine's.
    command = re.sub(r"(?<= )(\.\./\S+|/\S*(?=/))", "DIR", found["command"])
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    kept = "" if found["output"] else "; its figures in full were lost, this is what it printed"
    which = " without the authors' lengths" * name.endswith("without_lengths")
    return (
        f"## `{command}`{which}\n\nAt commit {found['commit'][:7]}, whose command this is, on "
        f"{found['device']} ({versions}): [{name}.json](../../results/{name}.json){kept}"
        f"\n\n{printed}\n"
    )


def page(title: str, sentence: str, names: tuple[str, ...]) -> str:
    """A whole page of docs/results/."""
    head = f"# {title}\n\n{sentence} Made by `tools/update_readme.py` from `results/`.\n"
    return "\n".join([head, *(section(name) for name in names)])


def counts(found: list[dict]) -> str:
    """How many rows were held, of these fitted, and missed."""
    held = [row for row in found if row["held"] is True]
    fitted = sum(row["fitted"] for row in held)
    return f"{len(held)} are held ({fitted} of them fitted), {len(found) - len(held)} missed"


def measured(saturated: list[dict], rates: list[dict]) -> tuple[float | None, ...]:
    """The five as benchmarks/serve.py measured them; None for Fig. 15: its part samples has another
    rate, and lasts seconds.

    Of the rates those of the longest trace, at the lower of the two latencies.
    """
    full = {row["system"]: row for row in saturated}
    longest = max(row["trace_s"] for row in rates)
    rates = [row for row in rates if row["trace_s"] == longest]
    lower = min(row["at_s_per_token"] for row in rates)
    rate = {row["system"]: row["rate"] for row in rates if row["at_s_per_token"] == lower}
    tokens, batch = "tokens_percent", full["paged"]["batch"] / full["max"]["batch"]
    return full["paged"][tokens], full["max"][tokens], batch, rate["paged"] / rate["max"], None


def headline(found: list[dict], without: list[dict], served: tuple[float | None, ...]) -> str:
    """Five rows: the paper's, simulated with the authors' lengths, measured, simulated without
    them; and counts."""
    head = "| | where | paper | simulated | measured | simulated, other lengths |"
    lines = [head, "|---|---|---|---|---|---|"]
    for (what, figure, setting, metric), own in zip(FIVE, served):
        row, other = (
            row
            for row in [*found, *without]
            if (row["figure"], row["setting"]) == (figure, f"13B {setting}")
            and row["metric"].startswith(metric)
        )
        values = row["paper"], row["ours"], own, other["ours"]
        told = " | ".join("-" if value is None else f"{value:.3g}" for value in values)
        lines.append(f"| {what} | {figure} | {told} |")
    return "\n".join(lines) + (
        f"\n\nOf all {len(found)} rows, with the authors' lengths {counts(found)}; without them "
        f"{counts(without)}.\n"
    )


def texts() -> dict[Path, str]:
    """Every generated file, as it has to be."""
    made = {ROOT / f"docs/results/{name}.md": page(*parts) for name, parts in PAGES.items()}
    readme = ROOT / "README.md"
    runs = (load(name)["output"] for name in ("reproduce", "reproduce_without_lengths"))
    rows = [output["tables"][0]["rows"] for output in runs]
    full, poisson = (load(name)["output"]["tables"] for name in SERVED.values())
    named = {table["id"]: table["rows"] for table in [*full, *poisson]}
    block = headline(*rows, measured(named["saturated"], named["rates_at"]))
    made[readme] = BLOCK.sub(
        lambda match: match[1] + block + match[2], readme.read_text(encoding="utf-8")
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """0, or 1 if --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(argv).check
    changed = {
        path: text
        for path, text in texts().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in changed.items():
        if check:
            print(f"{path.relative_to(ROOT)} is not what results/ give", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
