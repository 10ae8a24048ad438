"""What the GPU benchmarks measured as pictures, in the layout of Figs. 18a and 19a.

Reproduces: Fig. 18a (latency of the attention kernel by context length, two batch sizes) and Fig.
19a (swapping and recomputing by block size), ours and the paper's in one axis, Fig. 12a as measured
and simulated beside the paper's, and the times over the memory's floor of bench_attention.py. The
benchmarks hand over their rows.

    python benchmarks/bench_paging_cost.py --figures pictures
    python benchmarks/bench_attention.py --figures pictures
    python benchmarks/serve.py --earlier out.json --figures pictures

Needs matplotlib (requirements-dev.txt), imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sim.evaluation.curves import crossing
from vllm_sim.evaluation.pictures import LOOKS
from vllm_sim.paper.curves import FIG12_CURVES
from vllm_sim.paper.figures import (
    FASTER_TRANSFORMER,
    FIG12_RATES,
    FIG18A,
    FIG19A,
    RATE_AT_LATENCY,
    VLLM,
)
from vllm_sim.reporting import drawing
from vllm_sim.serving.systems import CONTIGUOUS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KERNEL, SWAPS, FLOOR = "fig18a.png", "fig19a.png", "attention_over_floor.png"
SERVED = "fig12_measured.png"
Row = Mapping[str, float | int | str | None]
BARS = {  # of Fig. 18a: colour, and whether it is the paper's
    "ours, over blocks": (drawing.BLUE, False),
    "ours, best without blocks": (drawing.GREY, False),
    f"paper: {VLLM}, over blocks": (drawing.BLUE, True),
    f"paper: {FASTER_TRANSFORMER}, without": (drawing.GREY, True),
}
WAYS = {  # of Fig. 19a: the row's key, colour and marker
    "recompute": ("recompute_ms", drawing.BLUE, "o"),
    "swap in": ("swap_in_ms", drawing.GREEN, "^"),
    "swap out": ("swap_out_ms", drawing.YELLOW, "v"),
    "swap in + out": (None, drawing.RED, "s"),
}
KERNELS = {  # of bench_attention.COLUMNS
    "triton": (drawing.BLUE, "o"),
    "read": ("#303030", "|"),
    "cuDNN": (drawing.GREEN, "s"),
    "Flash": (drawing.RED, "^"),
    "FlashInfer": (drawing.PURPLE, "D"),
    "FA3": (drawing.PURPLE, "*"),
    "XQA": (drawing.PURPLE, "x"),
    "no plan": (drawing.BLUE, "."),
    "gather": (drawing.YELLOW, "v"),
    "plain": (drawing.SKY, "X"),
    "cat": (drawing.GREY, "P"),
}
TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw_paging(found: Mapping[str, object], where: str, directory: Path) -> list[Path]:
    """Of what bench_paging_cost.measure found; returns the files written. Raises OutputError."""
    chosen: dict[str, Callable[[], Figure]] = {}
    if found.get("attention"):
        chosen[KERNEL] = partial(kernel_latency, found["attention"], where)
    if found.get("swap"):
        chosen[SWAPS] = partial(swap_times, found["swap"], where)
    return drawing.save(chosen, directory)


def draw_attention(
    rows: Mapping[str, Mapping[str, float | None]], where: str, directory: Path
) -> list[Path]:
    """Of bench_attention: shape -> kernel -> time over the floor."""
    return drawing.save({FLOOR: partial(over_floor, rows, where)}, directory)


def draw_serving(rows: Sequence[Row], alone: Row, times: float, where: str, directory: Path):
    """Of serve.py's poisson, and a request alone: see `served_rates`; the files written."""
    return drawing.save({SERVED: partial(served_rates, rows, alone, times, where)}, directory)


def served_rates(rows: Sequence[Row], alone: Row, times: float, where: str) -> Figure:
    """Fig. 12a: seconds per token by rate, of the traces that are longest.

    Both axes are relative, as the paper's GPU is another: to a request alone, which on its GPU
    takes 1 / `times` of 0.5 s a token, and to vLLM's rate at `times` that, which it must reach.
    """
    from matplotlib.lines import Line2D

    title = f"Fig. 12a: requests served, and simulated\n{where}; the paper's on an A100"
    figure, (axes,) = drawing.sheet(title, 1, size=(7.6, 5.6))
    axes.grid(True)
    longest, looks = max(row["trace_s"] for row in rows), {}
    keys = {"s_per_token": {"linestyle": "-"}, "simulated_s_per_token": {"linestyle": ":"}}
    lines = {
        key: {
            CONTIGUOUS.get(policy, VLLM): sorted(
                (row["rate"], row[key] / alone[key])
                for row in rows
                if row["system"] == policy and row["trace_s"] == longest
            )
            for policy in dict.fromkeys(row["system"] for row in rows)
        }
        for key in keys
    }
    for key, style in keys.items():
        unit = crossing([(0.0, 1.0), *lines[key][VLLM]], times)
        for system, points in lines[key].items():
            colour, marker = looks[system] = LOOKS[system]
            style |= {"color": colour, "marker": marker if style["linestyle"] == "-" else "."}
            axes.plot([rate / unit for rate, _ in points], [y for _, y in points], **style)
    rates, panel = FIG12_RATES["ShareGPT"]["opt-13b"], FIG12_CURVES["ShareGPT", "opt-13b"]
    for system, (colour, marker) in looks.items():
        points = [point for point in panel[system] if point[1] < RATE_AT_LATENCY]
        points.append((rates[system], RATE_AT_LATENCY))
        xy = [(rate / rates[VLLM], y * times / RATE_AT_LATENCY) for rate, y in points]
        axes.plot(*zip(*xy), color=colour, marker=marker, **drawing.HOLLOW)
    axes.axhline(times, color="#303030", linewidth=0.8)
    axes.set(xlim=(0.0, 1.15), ylim=(0.0, 1.6 * times))
    axes.set_xlabel(f"Request rate / vLLM's at {times:g} times a request alone")
    axes.set_ylabel("s/token / that of a request alone")
    entries = [
        Line2D([], [], color=colour, marker=marker, label=system)
        for system, (colour, marker) in looks.items()
    ]
    dark = {"color": "#303030"}
    entries.append(Line2D([], [], **dark, marker="o", label="measured"))
    entries.append(Line2D([], [], **dark, marker=".", linestyle=":", label="simulated"))
    entries.append(Line2D([], [], **dark, marker="o", **drawing.HOLLOW, label="paper"))
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
    return figure


def kernel_latency(rows: Sequence[Row], where: str) -> Figure:
    """Fig. 18a: microseconds by context length, a panel for each batch size."""
    batches = sorted({row["batch"] for row in rows})
    contexts = max(len({r["context"] for r in rows if r["batch"] == b}) for b in batches)
    size = (max(9.6, 1.2 + 0.85 * contexts * len(batches)), 4.9)
    title = f"Fig. 18a: latency of the attention kernel\n{where}; the paper's on an A100"
    figure, grid = drawing.sheet(title, len(batches), size=size, sharey=True)
    width = 0.21
    for axes, batch in zip(grid, batches):
        own = sorted((row for row in rows if row["batch"] == batch), key=lambda r: r["context"])
        for x, row in enumerate(own):
            told = FIG18A.get((batch, row["context"]), {})
            names = ("contiguous_us", "cudnn_us", "flash_us")
            peers = [row[name] for name in names if row.get(name) is not None]
            values = row["paged_us"], min(peers, default=None)
            values += told.get(VLLM), told.get(FASTER_TRANSFORMER)
            for place, (value, (name, (colour, papers))) in enumerate(zip(values, BARS.items())):
                look = {"fill": False, "linestyle": "--", "edgecolor": colour, "linewidth": 1.5}
                look = look if papers else {"color": colour}
                if value is not None:
                    axes.bar(x + (place - 1.5) * width, value, 0.92 * width, label=name, **look)
        axes.set_title(f"batch size {batch}")
        axes.set_xticks(range(len(own)), [f"{row['context']:,}" for row in own])
        axes.set_xlabel("Context length (tokens)")
        drawing.log_axis(axes)
        axes.yaxis.set_major_formatter("{x:,g}")
    grid[0].set_ylabel("Kernel latency (us)")
    _bar_legend(figure)
    return figure


def _bar_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(edgecolor=colour, fill=False, linestyle="--", linewidth=1.5, label=name)
        if papers
        else Patch(color=colour, label=name)
        for name, (colour, papers) in BARS.items()
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=2)


def swap_times(rows: Sequence[Row], where: str) -> Figure:
    """Fig. 19a: milliseconds by block size, ours solid and the paper's dashed."""
    title = f"Fig. 19a: recomputing and swapping 256 tokens\n{where}; the paper's on an A100"
    figure, (axes,) = drawing.sheet(title, 1, size=(7.6, 5.4))
    rows = sorted(rows, key=lambda row: row["block_size"])
    sizes = [row["block_size"] for row in rows]
    for name, (key, colour, marker) in WAYS.items():
        both = key is None
        ours = [row["swap_in_ms"] + row["swap_out_ms"] if both else row[key] for row in rows]
        parts = ("swap in", "swap out") if both else (name,)
        theirs = {size: sum(FIG19A[part][size] for part in parts) for size in FIG19A["swap in"]}
        drawing.pair(axes, (colour, marker), list(zip(sizes, ours)), list(theirs.items()))
    drawing.block_size_axis(axes, sorted({*sizes, *FIG19A["swap in"]}))
    axes.set(xlabel="Block size (tokens)", ylabel="Time (ms)")
    axes.set_ylim(bottom=0.0)
    drawing.legend(figure, {name: look for name, (_, *look) in WAYS.items()}, 1)
    return figure


def over_floor(rows: Mapping[str, Mapping[str, float | None]], where: str) -> Figure:
    """A row of points for each shape: 1 is the time in which the memory could read K and V."""
    from matplotlib.lines import Line2D

    title = f"Decode attention, time over the memory's floor\n{where}"
    figure, (axes,) = drawing.sheet(title, 1, size=(9.6, 2.2 + 0.5 * len(rows)))
    for y, kernels in enumerate(rows.values()):
        for name, (colour, marker) in KERNELS.items():
            if kernels.get(name) is not None:
                look = {"color": colour, "marker": marker, "linestyle": ""}
                look["markersize"] = 9.0 if name in ("triton", "read") else 6.5
                look["markeredgewidth"] = 2.0 if name == "read" else 1.0
                axes.plot([kernels[name]], [y], **look)
    axes.axvline(1.0, color="#303030", linewidth=1.0)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    most = max(time for kernels in rows.values() for time in kernels.values() if time is not None)
    axes.set_xlim(0.9, max(2.0, 1.2 * most))
    axes.set_yticks(range(len(rows)), list(rows), fontsize=drawing.SMALL)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="time / floor")
    axes.grid(True, axis="x")
    used = [name for name in KERNELS if any(k.get(name) is not None for k in rows.values())]
    entries = [
        Line2D([], [], color=KERNELS[name][0], marker=KERNELS[name][1], linestyle="", label=name)
        for name in used
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
    return figure
