"""What all pictures have in common: colours, sizes, and files that are written whole or not at all.

`pictures.py` of evaluation/ draws the paper's figures, that of scenarios/ what main.py shows, that
of sizing/ an answer of capacity.py, and that of benchmarks/ what was measured on a GPU.

    check_folder(Path("pictures"), ["fig2.png"])        # before a long run
    save(figures, Path("pictures"))                     # after it: file name -> how to draw it

Needs matplotlib (requirements-dev.txt), which nothing else does: it is imported where it is used.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sim.reporting.files import OutputError, make_folder, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREEN = "#0072b2", "#d55e00", "#009e73"  # these differ for the colour-blind too
YELLOW, GREY, PURPLE, SKY, PALE = "#cc9a00", "#808080", "#cc79a7", "#56b4e9", "#e4e4e4"
PARTS = {  # of the slot identity, from the bottom
    "tokens": BLUE,
    "reserved": YELLOW,
    "internal": RED,
    "rounding": GREEN,
    "padding": PURPLE,
    "free": PALE,
}
EXTERNAL = "paper: external fragmentation & others,\nthat is rounding, padding and free in one"
STYLE = {
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "figure.titlesize": 14.0,
    "legend.fontsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "hatch.linewidth": 0.8,
    "savefig.dpi": 150.0,
}
# Without matplotlib's version in it, the same rows give the same bytes.
PNG = {"format": "png", "bbox_inches": "tight", "metadata": {"Software": None}}
HOLLOW = {"linestyle": "--", "linewidth": 1.3, "markerfacecolor": "white", "markersize": 6.5}
DASHED = {"fill": False, "linestyle": "--", "linewidth": 1.5}
PLATE = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
BAR = 0.38  # the width of a bar; ours and the paper's are side by side, pairs are 1 apart
SMALL = 9.5  # points: the least that a label has
Points = Sequence[tuple[float, float]]


def check_folder(directory: Path, files: Iterable[str]) -> None:
    """OutputError unless pictures can be drawn and written there; makes the directory."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        reason = "matplotlib is not installed (it is in requirements-dev.txt)"
        raise OutputError(f"cannot draw figures: {reason}") from None
    make_folder(directory, files)


def save(figures: Mapping[str, Callable[[], Figure]], directory: Path) -> list[Path]:
    """Draw each and write it under its name; returns the files written. Raises OutputError."""
    check_folder(directory, figures)
    from matplotlib import style

    paths = []
    for file, paint in figures.items():
        data = io.BytesIO()
        with style.context(["default", STYLE]):  # not what the user's matplotlibrc says
            paint().savefig(data, **PNG)
        write_whole(directory / file, data.getvalue())
        paths.append(directory / file)
    return paths


def sheet(
    title: str, columns: int, rows: int = 1, size: tuple[float, float] | None = None, **options
) -> tuple[Figure, list[Axes]]:
    """An empty figure under its title, and its panels in reading order; `size` in inches.

    A title of more than a line, the setting in it, has smaller letters.
    """
    from matplotlib.figure import Figure

    size = size or (max(7.2, 4.1 * columns), 1.1 + 3.2 * rows)
    figure = Figure(figsize=size, layout="constrained")
    small = {"fontsize": 11.0} if "\n" in title else {}
    figure.suptitle(title, **small)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def pair(axes: Axes, look: tuple[str, str], ours: Points, theirs: Points, **options) -> None:
    """Ours solid with filled markers; the paper's dashed with hollow ones, of the same colour."""
    colour, marker = look
    axes.grid(True)
    axes.plot(*zip(*theirs), color=colour, marker=marker, **HOLLOW)
    if ours:  # of a curve of which nothing is known there are none
        axes.plot(*zip(*ours), color=colour, marker=marker, **options)


def segment(
    axes: Axes, x: float, bottom: float, value: float, width: float, least: float, **look
) -> float:
    """A part of a stacked bar, with its number from `least` on; returns where the next begins."""
    bar = axes.bar(x, value, width, bottom, edgecolor="white", **look)
    if value >= least:
        axes.bar_label(bar, fmt="%.1f", label_type="center", fontsize=SMALL, bbox=PLATE)
    return bottom + value


def beside(axes: Axes, bars: Sequence[tuple[str, str, float | None, float]]) -> None:
    """Bars of (label, colour, the paper's if it has one, ours): ours filled, the paper's hollow."""
    for x, (_, colour, theirs, ours) in enumerate(bars):
        drawn = [axes.bar(x - BAR / 2, ours, 0.94 * BAR, color=colour)]
        if theirs is not None:
            drawn.append(axes.bar(x + BAR / 2, theirs, 0.94 * BAR, edgecolor=colour, **DASHED))
        for bar in drawn:
            axes.bar_label(bar, fmt="{:.3g}", padding=2, fontsize=SMALL)
    axes.set_xticks(range(len(bars)), [label for label, *_ in bars])
    axes.margins(y=0.12)


def beside_legend(figure: Figure, colour: str) -> None:
    """Whose is whose of the bars that `beside` draws."""
    from matplotlib.patches import Patch

    ours, theirs = {"color": colour}, {"edgecolor": colour, **DASHED}
    whose = [Patch(**ours, label="ours: filled"), Patch(**theirs, label="paper: hollow")]
    figure.legend(handles=whose, loc="outside lower center", ncols=2)


def legend(figure: Figure, looks: Mapping[str, tuple[str, str]], columns: int) -> None:
    """The names in their colours, then whose is whose."""
    from matplotlib.lines import Line2D

    entries = []
    for name, (colour, marker) in looks.items():
        entries.append(Line2D([], [], color=colour, marker=marker, label=name))
    dark = {"color": "#303030", "marker": "o"}
    entries.append(Line2D([], [], **dark, label="ours: solid, filled"))
    entries.append(Line2D([], [], **dark, **HOLLOW, label="paper: dashed, hollow"))
    in_row = len(entries) if columns > 2 or len(entries) <= 4 else 3
    figure.legend(handles=entries, loc="outside lower center", ncols=in_row)


def block_size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """Block sizes, each twice the one before."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log", subs=())
    axes.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
    axes.yaxis.set_major_formatter("{x:g}")


def parts_legend(figure: Figure, parts: Iterable[str] = PARTS, external: bool = False) -> None:
    """Parts of the slot identity, and the paper's that lumps three of them."""
    from matplotlib.patches import Patch

    edge = {"edgecolor": "#606060", "linewidth": 0.6}
    chosen = {*parts}
    entries = [Patch(facecolor=PARTS[part], label=part, **edge) for part in PARTS if part in chosen]
    columns = len(entries)
    if external:
        lumped = {"facecolor": "#b9b9b9", "edgecolor": "white", "hatch": "///"}
        entries.append(Patch(**lumped, label=EXTERNAL))
        columns = -(-len(entries) // 2)
    figure.legend(handles=entries, loc="outside lower center", ncols=columns)
