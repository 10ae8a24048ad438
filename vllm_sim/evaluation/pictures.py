"""The figures as pictures: ours in solid lines and filled bars, the paper's dashed and hollow.

Reproduces: the layout of Figs. 2, 12 to 17, 18b and 19b (sections 3, 6 and 7). Nothing is
simulated here: reproduce.py hands over what it found, and one PNG a figure is written.

    LENGTHS_DIR=data python reproduce.py --quick --figures pictures

Needs matplotlib (requirements-dev.txt), which nothing else does: it is imported where it is used.
Curves are those of seed 0; bars and points by block size are the rows, so the mean over the seeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from vllm_sim import paper
from vllm_sim.evaluation.curves import crossing
from vllm_sim.evaluation.runner import Found
from vllm_sim.reporting import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vllm_sim.evaluation.curves import Point

TOP = 1.0  # s/token, where the paper's latency axes end
LOOKS = {  # colour and marker
    paper.FASTER_TRANSFORMER: (drawing.GREY, "D"),
    paper.ORCA_MAX: (drawing.RED, "^"),
    paper.ORCA_POW2: (drawing.YELLOW, "v"),
    paper.ORCA_ORACLE: (drawing.GREEN, "s"),
    paper.VLLM: (drawing.BLUE, "o"),
    "ShareGPT": (drawing.BLUE, "o"),
    "Alpaca": (drawing.RED, "s"),
    "recompute": (drawing.BLUE, "o"),
    "swap": (drawing.RED, "s"),
    "parallel": (drawing.BLUE, ""),
    "beam": (drawing.GREEN, ""),
}
PARTS = {  # of Fig. 2's bars, from the bottom
    "tokens": ("Token states", drawing.BLUE),
    "reserved": ("Reservation", drawing.YELLOW),
    "internal": ("Internal fragmentation", drawing.RED),
    "external": ("External fragmentation and others", drawing.GREY),
}
LATENCY = "Normalized latency (s/token)"
Bar = tuple[str, str, float, float]  # label, name in LOOKS, the paper's, ours
Panel = tuple[str, Mapping[str, float]]  # title, the paper's rates at its RATE_AT_LATENCY


def check_pictures(directory: Path) -> None:
    """OutputError unless pictures can be drawn and written there; makes the directory."""
    drawing.check_folder(directory, map(_file, PICTURES))


def draw(found: list[Found], directory: Path) -> list[Path]:
    """Draw what has a picture; returns the files written. Raises OutputError."""
    chosen = [one for one in found if one.rows and one.figure.name in PICTURES]
    return drawing.save({_file(one.figure.name): partial(paint, one) for one in chosen}, directory)


def paint(found: Found) -> Figure:
    """The picture of one figure."""
    return PICTURES[found.figure.name][0](found)


def _file(name: str) -> str:
    """'Fig. 18b' is drawn in fig18b.png."""
    return name.lower().replace(". ", "") + ".png"


def _sheet(found: Found, columns: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure under its title, and its panels in reading order."""
    name = found.figure.name
    return drawing.sheet(f"{name}: {PICTURES[name][1]}", columns, rows)


def _read(found: Found, pattern: str, metric: str) -> list[tuple[tuple[str, ...], float, float]]:
    """(what the pattern finds in the setting, the paper's, ours) of the rows that are drawn."""
    return [
        (match.groups(), row.paper, row.ours)
        for row in found.rows
        if row.figure == found.figure.name and row.metric == metric
        if (match := re.fullmatch(pattern, row.setting))
    ]


def panel_of(figure: str, key: Any) -> Panel:
    """What a key of a figure's curves means."""
    if figure == "Fig. 12":
        dataset, model = key
        return f"{model.upper()}, {dataset}", paper.FIG12_RATES[dataset][model]
    if figure == "Fig. 14":
        decoding, width = key
        words = {"parallel": "Parallel sampling, {} outputs", "beam": "Beam search, width {}"}
        return words[decoding].format(width), paper.FIG14_RATES[decoding][width]
    if figure == "Fig. 16":
        return f"{key} prefix", paper.FIG16[key]
    return "", paper.FIG17_RATES


def _curves(found: Found) -> Figure:
    """A panel a setting, three in a row."""
    panels = found.figure.curves
    columns = min(3, len(panels))
    figure, grid = _sheet(found, columns, -(-len(panels) // columns))
    for number, (axes, (key, curves)) in enumerate(zip(grid, panels.items())):
        title, rates = panel_of(found.figure.name, key)
        right = 0.0
        for system, curve in curves.items():
            lines = curve.line(found.done), _beyond_top(curve.paper, rates[system])
            drawing.pair(axes, LOOKS[system], *lines)
            right = max([right, *(_leaves(line) for line in lines if line)])
        axes.set(xlim=(0.0, 1.04 * right), ylim=(0.0, TOP), xlabel="Request rate (req/s)")
        axes.set_title(f"({ascii_lowercase[number]}) {title}" if title else "")
        axes.set_ylabel("" if number % columns else LATENCY)
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    drawing.legend(figure, {name: LOOKS[name] for name in names}, columns)
    return figure


def _beyond_top(points: Sequence[Point], rate: float) -> Sequence[Point]:
    """The drawn line goes on to a point off the axis: straight through the rate that it reaches."""
    last, latency = points[-1]
    if latency >= paper.RATE_AT_LATENCY:
        return points
    times = (2.0 * TOP - latency) / (paper.RATE_AT_LATENCY - latency)
    return [*points, (last + times * max(0.0, rate - last), 2.0 * TOP)]


def _leaves(line: Sequence[Point]) -> float:
    """The rate at which a line goes through the top of the axis, or else ends."""
    found = crossing(line, TOP)
    return line[-1][0] if found is None else found


def _blocks(found: Found) -> Figure:
    """Latency over block size, both axes logarithmic; a line a data set, or a way to preempt."""
    figure, (axes,) = _sheet(found, 1)
    pattern = r"13B (?:ShareGPT, )?(\w+), blocks of (\d+)"
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for (name, block), *values in _read(found, pattern, "s/token"):
        lines.setdefault(name, []).append((int(block), *values))
    for name, points in lines.items():
        blocks, theirs, ours = zip(*sorted(points))
        drawing.pair(axes, LOOKS[name], list(zip(blocks, ours)), list(zip(blocks, theirs)))
    drawing.block_size_axis(axes, paper.BLOCK_SIZES)
    drawing.log_axis(axes)
    axes.set(xlabel="Block size (tokens)", ylabel=LATENCY)
    drawing.legend(figure, {name: LOOKS[name] for name in lines}, 1)
    return figure


def _fig2(found: Found) -> Figure:
    """Shares of the slots, stacked; each system's two bars side by side."""
    figure, (axes,) = _sheet(found, 1)
    systems: dict[str, int] = {}
    bottoms: dict[float, float] = {}
    for part, (label, colour) in PARTS.items():
        for (system,), theirs, ours in _read(found, "13B ShareGPT, (.+)", f"{part}, % of slots"):
            middle = systems.setdefault(system, len(systems))
            for whose, value, side in (("ours", ours, -0.53), ("paper", theirs, 0.53)):
                x = middle + side * drawing.BAR
                look = {"label": label} if whose == "ours" else {"alpha": 0.55, "hatch": "///"}
                if x not in bottoms:
                    axes.text(x, 101.0, whose, ha="center", fontsize=drawing.SMALL)
                bottom = bottoms.get(x, 0.0)
                bottoms[x] = drawing.segment(
                    axes, x, bottom, value, drawing.BAR, 5.0, color=colour, **look
                )
    axes.set_xticks(list(systems.values()), list(systems))
    axes.set(ylim=(0.0, 107.0), yticks=range(0, 101, 20), ylabel="Share of KV cache slots (%)")
    handles, labels = axes.get_legend_handles_labels()
    parts = dict(zip(labels, handles))  # one handle a label, whatever the number of systems
    figure.legend(parts.values(), parts, loc="outside lower center", ncols=2)
    return figure


def _fig13(found: Found) -> Figure:
    bars: dict[str, list[Bar]] = {}
    for (data, system), *values in _read(found, r"13B (\w+), (.+)", "mean batched requests"):
        bars.setdefault(data, []).append((system.replace(" ", "\n"), system, *values))
    return _bars(found, bars, "Mean batched requests")


def _fig15(found: Found) -> Figure:
    bars: dict[str, list[Bar]] = {}
    for (name, width), *values in _read(found, r"13B Alpaca, (\w+) (\d+)", "% of blocks saved"):
        title = {"parallel": "Parallel sampling", "beam": "Beam search"}[name]
        bars.setdefault(title, []).append((f"{width} sequences", name, *values))
    return _bars(found, bars, "Blocks saved (%)")


def _bars(found: Found, panels: Mapping[str, Sequence[Bar]], unit: str) -> Figure:
    """A panel a title, with ours and the paper's side by side."""
    figure, grid = _sheet(found, len(panels))
    for number, (axes, (title, bars)) in enumerate(zip(grid, panels.items())):
        drawing.beside(axes, [(text, LOOKS[name][0], *values) for text, name, *values in bars])
        axes.set_title(f"({ascii_lowercase[number]}) {title}")
    grid[0].set_ylabel(unit)
    drawing.beside_legend(figure, drawing.GREY)
    return figure


PICTURES: dict[str, tuple[Callable[[Found], Figure], str]] = {  # what draws it, its title
    "Fig. 2": (_fig2, "where the KV cache goes, OPT-13B, ShareGPT"),
    "Fig. 12": (_curves, "latency by request rate, basic sampling"),
    "Fig. 13": (_fig13, "batched requests, OPT-13B"),
    "Fig. 14": (_curves, "parallel sampling and beam search, OPT-13B, Alpaca"),
    "Fig. 15": (_fig15, "memory saved by sharing, OPT-13B, Alpaca"),
    "Fig. 16": (_curves, "shared prefix, LLaMA-13B, WMT16 English to German"),
    "Fig. 17": (_curves, "chatbot, OPT-13B, ShareGPT"),
    "Fig. 18b": (_blocks, "latency by block size, OPT-13B"),
    "Fig. 19b": (_blocks, "recomputation and swapping, OPT-13B, ShareGPT"),
}
