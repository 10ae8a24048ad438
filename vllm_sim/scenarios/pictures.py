"""What main.py found as pictures: Fig. 2's bars, slots over time, pools slot by slot, block maps.

Reproduces: Fig. 2 (section 3.1) and Fig. 15's parallel half (section 6.3), ours beside the paper's,
and what stands behind them: every slot by its part of the slot identity (MemoryUsage), every block
by who holds it. Nothing is run here: all is in what the scenarios returned.

    python main.py --figures pictures
    draw([baseline.report(baseline.run(setting))], setting.line, Path("pictures"))

Needs matplotlib (requirements-dev.txt), imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm_sim import paper
from vllm_sim.playback.recorder import Moment, Recording
from vllm_sim.reporting import drawing
from vllm_sim.scenarios.report import Saving, ScenarioReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THEIRS = ("tokens", "reserved", "internal", "external")  # parts of the paper's bars
KINDS = {  # of a request, as a block map colours its blocks
    "prefix itself": drawing.GREY,
    "prefix": drawing.SKY,
    "beam": drawing.GREEN,
    "parallel": drawing.YELLOW,
    "single": drawing.BLUE,
}
# Where a map shows one request alone.
SAMPLES = (drawing.BLUE, drawing.YELLOW, drawing.GREEN, drawing.PURPLE)
LINE = 64  # blocks in a row of a pool drawn slot by slot
MOST_PER_ROW = 40  # blocks of a block map


FILES = {  # by scenario
    1: ("memory_bars.png", "scenario1_over_time.png", "scenario1_pool.png"),
    2: ("memory_bars.png", "scenario2_over_time.png", "scenario2_pool.png"),
    3: ("scenario3_saving.png", "scenario3_blocks.png"),
    4: ("scenario4_over_time.png", "scenario4_blocks.png"),
}


def figures(reports: Iterable[ScenarioReport], setting: str) -> dict[str, Callable[[], Figure]]:
    """File name -> how to draw it, of all that the scenarios found in a setting."""
    chosen: dict[str, Callable[[], Figure]] = {}
    bars: dict[str, dict[str, float]] = {}
    for report in reports:
        name, given = f"scenario{report.number}", (report, setting)
        for system, shares in report.bars.items():
            bars.setdefault(system, shares)
        if report.series:
            chosen[f"{name}_over_time.png"] = partial(over_time, *given)
        if report.pools:
            chosen[f"{name}_pool.png"] = partial(pool_slots, *given)
        if report.savings:
            chosen[f"{name}_saving.png"] = partial(saving_bars, *given)
        if report.map:
            chosen[f"{name}_blocks.png"] = partial(block_map, *report.map)
    if bars:
        chosen["memory_bars.png"] = partial(memory_bars, bars, setting)
    return chosen


def check(directory: Path, scenarios: Iterable[int]) -> None:
    """OutputError unless the pictures of these scenarios can be written there."""
    drawing.check_folder(directory, {file for number in scenarios for file in FILES[number]})


def draw(reports: Iterable[ScenarioReport], setting: str, directory: Path) -> list[Path]:
    """Draw all that the scenarios found; returns the files written. Raises OutputError."""
    return drawing.save(figures(reports, setting), directory)


def memory_bars(bars: dict[str, dict[str, float]], setting: str) -> Figure:
    """Fig. 2: the slots of each system, ours by part and the paper's by its own."""
    title = f"Where the KV cache goes (Fig. 2)\n{setting}"
    figure, (axes,) = drawing.sheet(title, 1, size=(2.0 + 1.75 * max(3, len(bars)), 5.4))
    colours = {**drawing.PARTS, "external": drawing.GREY}
    for middle, (system, ours) in enumerate(bars.items()):
        _stack(axes, middle - 0.53 * drawing.BAR, "ours", ours, colours)
        told = {part: paper.FIG2[system][part] for part in THEIRS}
        _stack(axes, middle + 0.53 * drawing.BAR, "paper", told, colours)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set(ylim=(0.0, 107.0), yticks=range(0, 101, 20), ylabel="Share of KV cache slots (%)")
    drawing.parts_legend(figure, external=True)
    return figure


def _stack(
    axes: Axes, x: float, whose: str, shares: dict[str, float], colours: dict[str, str]
) -> None:
    """One bar of percentages; the paper's is hatched."""
    bottom = 0.0
    look = {"alpha": 0.55, "hatch": "///"} if whose == "paper" else {}
    for part, share in shares.items():
        bottom = drawing.segment(
            axes, x, bottom, share, drawing.BAR, 3.5, color=colours[part], **look
        )
    axes.text(x, 101.0, whose, ha="center", fontsize=drawing.SMALL)


def over_time(report: ScenarioReport, setting: str) -> Figure:
    """Every slot by its part, iteration by iteration; a row for each run, all on one time axis."""
    runs, title = report.series, f"Scenario {report.number}: slots over time\n{setting}"
    size = (9.6, 1.6 + (2.6 if len(runs) == 1 else 1.75 * len(runs)))
    figure, grid = drawing.sheet(title, 1, len(runs), size, sharex=True)
    seen = set()
    for axes, run in zip(grid, runs):
        shares = [[100.0 * usage.share(part) for usage in run.usages] for part in drawing.PARTS]
        x = range(len(run.usages))
        axes.stackplot(x, shares, colors=list(drawing.PARTS.values()), linewidth=0.0)
        axes.set(ylim=(0.0, 100.0), yticks=(0, 50, 100), ylabel="slots (%)")
        axes.set_title(run.name, loc="left", fontsize=11.0, y=1.04)
        if run.preemptions:
            look = {"marker": "v", "color": "#303030", "markersize": 4.5, "clip_on": False}
            height, count = [103.0] * len(run.preemptions), len(run.preemptions)
            axes.plot(run.preemptions, height, linestyle="", **look)
            words = {"loc": "right", "fontsize": drawing.SMALL, "color": "#303030", "y": 1.04}
            axes.set_title(f"{count} iterations preempt (marked)", **words)
        seen |= {part for part, share in zip(drawing.PARTS, shares) if any(share)}
    grid[-1].set_xlim(0, max(len(run.usages) for run in runs) - 1)
    whose = "" if report.number == 4 else " of the steady state"
    grid[-1].set_xlabel(f"iteration{whose}")
    drawing.parts_legend(figure, seen)
    return figure


def pool_slots(report: ScenarioReport, setting: str) -> Figure:
    """Every slot of a pool by its part, in the order of memory, 64 blocks a row."""
    from matplotlib.colors import ListedColormap

    pools, colours = report.pools, ListedColormap([*drawing.PARTS.values(), "white"])
    names = list(drawing.PARTS)
    rows = [-(-sum(count for count, _ in p.spans) // (LINE * p.block_size)) for p in pools]
    size = (9.6, 1.5 + sum(0.45 + 0.1 * n for n in rows))
    when = "at the first refusal" if report.number == 1 else "in the steady state"
    title = f"Scenario {report.number}: the pool slot by slot, {when}\n{setting}"
    figure, grid = drawing.sheet(title, 1, len(pools), size, height_ratios=rows)
    for axes, pool, height in zip(grid, pools, rows):
        slots = [names.index(part) for count, part in pool.spans for _ in range(count)]
        width = LINE * pool.block_size
        slots += [len(names)] * (height * width - len(slots))
        axes.imshow(
            np.array(slots, dtype=np.int8).reshape(height, width),
            cmap=colours,
            vmin=-0.5,
            vmax=len(names) + 0.5,
            aspect="auto",
            interpolation="nearest",
            extent=(0, LINE, height, 0),
        )
        for row in range(1, height):  # memory goes on in the next row
            axes.axhline(row, color="white", linewidth=1.0)
        axes.set_title(pool.name, loc="left", fontsize=11.0)
        axes.set(xticks=range(0, LINE + 1, 16), yticks=range(0, height, max(4, height // 4)))
        axes.set_yticklabels([f"{LINE * tick:,}" for tick in axes.get_yticks()])
        axes.set_ylabel("first block")
        axes.spines[:].set_visible(False)
    grid[-1].set_xlabel("block in the row")
    drawing.parts_legend(figure, (part for pool in pools for count, part in pool.spans if count))
    return figure


def saving_bars(report: ScenarioReport, setting: str) -> Figure:
    """Fig. 15a's bars and the text's range for ShareGPT: ours filled, the paper's hollow."""
    panels: dict[str, list[Saving]] = {}
    for saving in report.savings:
        panels.setdefault(saving.lengths, []).append(saving)
    title = f"Scenario 3: blocks saved by sharing the prompt (Fig. 15)\n{setting}"
    figure, grid = drawing.sheet(title, len(panels), sharey=True)
    for axes, (name, found) in zip(grid, panels.items()):
        drawing.beside(
            axes,
            [(f"{one.num_samples} samples", drawing.BLUE, one.paper, one.ours) for one in found],
        )
        told = " (the paper's text: a range)" if any(one.paper is None for one in found) else ""
        axes.set_title(f"{name} lengths{told}")
    grid[0].set_ylabel("Blocks saved (%)")
    drawing.beside_legend(figure, drawing.BLUE)
    return figure


def block_map(recording: Recording, moment: Moment) -> Figure:
    """Every GPU block: whose it is, how many sequences share it, how much of it is padding."""
    from matplotlib.patches import Patch, Rectangle

    owners, total, size = recording.owners(), recording.num_blocks, recording.block_size
    alone = len(recording.groups) == 1  # one request: its samples are told apart, not requests
    holders: dict[int, list[int]] = {}
    filled: dict[int, int] = {}
    for seq_id, held in moment.tables.items():
        here = held.blocks[: held.num_prefix_blocks] if held.swapped else held.blocks
        for index, block in enumerate(here):
            holders.setdefault(block, []).append(seq_id)
            filled[block] = held.filled(index, size)
    columns = min(MOST_PER_ROW, total)
    if total <= 3 * MOST_PER_ROW:
        columns = -(-total // -(-total // 20))
    rows = -(-total // columns)
    wide = columns > 20
    cell = 0.3 if wide else 0.46  # inches
    title = f"{recording.name}, {moment.title}\n{recording.about}"
    figure, (axes,) = drawing.sheet(
        title, 1, size=(max(8.4, columns * cell + 0.9), rows * cell + 1.6)
    )
    free = {"facecolor": "white", "edgecolor": "#c8c8c8"}
    padding = {"facecolor": "white", "hatch": "//////", "linewidth": 0.0}
    shared = {"fill": False, "edgecolor": "black", "linewidth": 1.3}
    small = {"fontsize": 6.4 if wide else drawing.SMALL, "linespacing": 0.9}
    plate = drawing.PLATE | {"boxstyle": "round,pad=0.06"}
    seen = {}
    for block in range(total):
        x, y = block % columns, block // columns
        inner = (x + 0.04, y + 0.04), 0.92, 0.92
        axes.add_patch(Rectangle(*inner, **free, linewidth=0.5))
        who = holders.get(block, [])
        if not who:
            continue
        name, kind = owners[who[0]]
        colour, entry = KINDS[kind], kind
        if alone:
            several = len(who) > 1
            colour = drawing.GREY if several else SAMPLES[who[0] % len(SAMPLES)]
            entry = "shared" if several else f"sample {who[0] + 1}"
            name = "" if several else str(who[0] + 1)
        seen[entry] = colour
        axes.add_patch(Rectangle(*inner, **padding, edgecolor=colour))
        share = 0.92 * filled[block] / size
        axes.add_patch(Rectangle(inner[0], share, 0.92, facecolor=colour, linewidth=0.0))
        if len(who) > 1:
            name = f"{name}\nx{len(who)}".strip()
            axes.add_patch(Rectangle((x + 0.07, y + 0.07), 0.86, 0.86, **shared))
        axes.text(x + 0.5, y + 0.52, name, ha="center", va="center", bbox=plate, **small)
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    axes.set_xticks([])
    step = max(1, rows // 12)
    first = range(0, rows, step)
    axes.set_yticks([row + 0.5 for row in first], [f"{row * columns:,}" for row in first])
    axes.set_ylabel("first block of the row")
    axes.spines[:].set_visible(False)
    order = [kind for kind in KINDS if kind in seen] or sorted(seen)
    words = {
        "prefix itself": "P: the shared prefix",
        "prefix": "request behind the prefix",
        "beam": "beam search",
        "parallel": "parallel sampling",
        "single": "single request",
    }
    entries = [Patch(facecolor=seen[kind], label=words.get(kind, kind)) for kind in order]
    entries += [
        Patch(**shared, label="x4: shared by four"),
        Patch(**padding, edgecolor=drawing.GREY, label="padding"),
        Patch(**free, label="free"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
    return figure
