"""What README.md and docs/ show of main.py's runs, for tools/update_readme.py.

Reproduces nothing. Each function is the text between two markers: `quickstart`, `tail`, `answers`,
`scenarios`, `checks`, `sweep`.
"""

from __future__ import annotations

import re

from committed import find, load, machine, origin, table
from committed import scenarios as scenarios_of

# The one table of each scenario that its answer rests on.
DECIDING = ("Steady state", "Steady state", "Saving by sharing", "All requests served")


def sections() -> list[str]:
    """What each of the four scenarios printed, less the longest table."""
    text = "\n".join(load("main_cpu.json")["printed"])
    text = text[text.index("## Scenario 1") : text.rindex("\nChecks\n")]
    text = re.sub(r"\nSlots over time.*?(?=\nAnswer)", "", text, flags=re.DOTALL)
    text = text.replace("## Scenario", "### Scenario").replace("Answer:", "**Answer:**")
    return ["### " + part.strip() for part in text.split("### ")[1:]]


def scenarios() -> str:
    """All of that."""
    return origin(load("main_cpu.json"), "main_cpu.json") + "\n\n" + "\n\n".join(sections())


def answers() -> str:
    """Of each scenario the question, the deciding table and the answer."""
    parts = [f"{origin(load('main_cpu.json'), 'main_cpu.json')}. {machine()}"]
    for section, title in zip(sections(), DECIDING, strict=True):
        name, question, *_ = section.removeprefix("### ").split("\n")
        above, shown = re.search(
            rf"^({title}.*?)\n\n(.*?)\n\n", section, re.DOTALL | re.MULTILINE
        ).groups()
        what = above.replace("\n", " ")
        answer = section[section.index("**Answer") :]
        parts += [f"**{name}.** {question} {what}:", shown, answer]
    return "\n\n".join(parts)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def quickstart() -> str:
    """What to run, and how long it took where it was recorded."""
    cpu, gpu, every = (
        minutes(load(name)["output"]["elapsed_s"])
        for name in ("main_cpu.json", "main_h100.json", "reproduce.json")
    )
    return table(
        ("you have", "run", "time"),
        [
            (
                "a laptop (2 cores, 2 GB of free memory, no GPU)",
                "`make run`",
                f"installing torch, then {cpu}",
            ),
            ("a node with a GPU", "`make run`, or `python main.py` in your own environment", gpu),
            ("Slurm", "`sbatch run_vllm_sim.slurm`", "the same, in the queue's own time"),
            (
                "any of them: every figure",
                "`make figures`; `make figures ARGS=--quick`",
                f"{every} (2 cores); seconds",
            ),
            ("any of them: the tests", "`make test`", "a few minutes"),
        ],
    )


def tail() -> str:
    """The end of a run."""
    found = load("main_cpu.json")
    all_checks = [(s["number"], c) for s in scenarios_of(found) for c in s["checks"]]
    held = sum(check["ok"] for _, check in all_checks)
    shown = [
        f"{number}  {'ok' if check['ok'] else 'FAILED':6}  {check['name']:45}  {check['detail']}"
        for number, check in all_checks
    ]
    last = f"{held} of {len(all_checks)} checks held, {found['output']['elapsed_s']:.1f} s"
    return "\n".join(["```", shown[1], shown[9], "     ...", last, "```"])


def checks() -> str:
    """Every check, on the CPU and on the GPU."""
    cpu, gpu = load("main_cpu.json"), load("main_h100.json")
    layers = load("main_h100_all_layers.json")
    every = [c["ok"] for s in scenarios_of(layers) for c in s["checks"]]
    found: dict[tuple[int, str], list[str]] = {}
    for result in (cpu, gpu):
        for scenario in scenarios_of(result):
            for check in scenario["checks"]:
                text = ("" if check["ok"] else "FAILED: ") + check["detail"]
                found.setdefault((scenario["number"], check["name"]), []).append(text)
    rows = [(number, name, *texts) for (number, name), texts in found.items()]
    seconds = [f"{r['output']['elapsed_s']:.0f} s" for r in (cpu, gpu)]
    return "\n\n".join(
        [
            f"CPU ({seconds[0]}): {origin(cpu, 'main_cpu.json')}",
            f"GPU ({seconds[1]}): {origin(gpu, 'main_h100.json')}",
            table(("scenario", "check", "CPU", gpu["device"]), rows),
            f"With K and V of all 40 layers, {sum(every)} of {len(every)} checks hold as well "
            f"({layers['output']['elapsed_s']:.0f} s): "
            + origin(layers, "main_h100_all_layers.json"),
        ]
    )


def sweep() -> str:
    """A sweep's cells in one table, once they have been merged and recorded."""
    result = find("sweep_block_size.json")
    if result is None:
        return ""
    shown = "\n".join(result["printed"])
    return origin(result, "sweep_block_size.json") + "\n\n" + shown
