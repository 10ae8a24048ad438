"""An answer of capacity.py as pictures: slots and requests by policy, block sizes, a trace.

Reproduces: Fig. 2's bars and section 7.2's trade-off for any model, GPU and workload. Nothing is
computed here: capacity.py hands over the sections that it printed.

    python capacity.py --model opt-13b --figures pictures

Needs matplotlib (requirements-dev.txt), imported where it is used.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sim.reporting import drawing
from vllm_sim.sizing.answers import SIMULATED
from vllm_sim.sizing.case import Section
from vllm_sim.sizing.trace_answers import ALLOWED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SLOTS, SIZES, TRACE = "capacity_slots.png", "capacity_block_sizes.png", "capacity_trace.png"
WIDE = 0.62  # the width of a bar that has none beside it


def check(directory: Path, trace: bool = False) -> None:
    """OutputError unless the pictures can be drawn and written there."""
    drawing.check_folder(directory, (TRACE,) if trace else (SLOTS, SIZES))


def figures(sections: Sequence[Section]) -> dict[str, Callable[[], Figure]]:
    """File name -> how to draw it, of the sections that have a picture."""
    found = {section.name: section for section in sections}
    wanted = {
        SLOTS: (by_policy, "slots", "concurrency"),
        SIZES: (by_block_size, "block_sizes"),
        TRACE: (by_need, "trace_pools", "trace_gpus"),
    }
    return {
        file: partial(draw_it, *(found[name] for name in names))
        for file, (draw_it, *names) in wanted.items()
        if set(names) <= set(found)
    }


def draw(sections: Sequence[Section], directory: Path) -> list[Path]:
    """Draw what has a picture; returns the files written. Raises OutputError."""
    return drawing.save(figures(sections), directory)


def _rows(section: Section) -> list[dict]:
    return [dict(zip(section.headers, row)) for row in section.rows]


def _title(section: Section, what: str) -> str:
    return "\n".join([what, *textwrap.wrap(section.setting, 110)])


def by_policy(slots: Section, concurrency: Section) -> Figure:
    """Shares of the slots by part, and requests at a time, under each policy."""
    requests = {
        row["counted"].removeprefix(SIMULATED): row["requests"]
        for row in _rows(concurrency)
        if row["counted"].startswith(SIMULATED)
    }
    rows = _rows(slots)
    title = _title(concurrency, "Slots and requests by policy, mean of a steady state")
    figure, (left, right) = drawing.sheet(title, 2, size=(10.4, 5.4))
    for x, row in enumerate(rows):
        capacity = sum(row[part] for part in drawing.PARTS)
        bottom = 0.0
        for part, colour in drawing.PARTS.items():
            share = 100.0 * row[part] / capacity
            bottom = drawing.segment(left, x, bottom, share, WIDE, 4.5, color=colour)
        value = requests[row["policy"]]
        bar = right.bar(x, value, WIDE, color=drawing.BLUE)
        right.bar_label(bar, [f"{value:,.1f}"], padding=2, fontsize=drawing.SMALL)
    for axes in (left, right):
        axes.set_xticks(range(len(rows)), [row["policy"] for row in rows])
    left.set(ylim=(0.0, 100.0), ylabel="Share of KV cache slots (%)", title="(a) where slots are")
    right.set(ylabel="Requests", title="(b) requests at a time")
    right.margins(y=0.1)
    drawing.parts_legend(figure, (part for part in drawing.PARTS if any(row[part] for row in rows)))
    return figure


def by_need(pools: Section, gpus: Section) -> Figure:
    """The memory and the GPUs that a trace needs under each policy, a bar for each bound."""
    title = _title(pools, "What the trace needs")
    figure, (left, right) = drawing.sheet(title, 2, size=(10.4, 5.0))
    for axes, section, header in ((left, pools, "GiB of K/V"), (right, gpus, "GPUs")):
        rows = _rows(section)
        bounds = list(dict.fromkeys(row[ALLOWED] for row in rows))
        policies = list(dict.fromkeys(row["policy"] for row in rows))
        width = 0.8 / len(bounds)
        for number, (bound, colour) in enumerate(zip(bounds, (drawing.BLUE, drawing.YELLOW))):
            values = {row["policy"]: row[header] for row in rows if row[ALLOWED] == bound}
            at = [x + (number - (len(bounds) - 1) / 2) * width for x in range(len(policies))]
            heights = [values[policy] or 0 for policy in policies]  # None: no number will do
            told = [
                "none will do" if values[policy] is None else f"{values[policy]:,.4g}"
                for policy in policies
            ]
            label = f"at most {bound:g} % held up" if bound else "none held up"
            bars = axes.bar(at, heights, width, color=colour, edgecolor="white", label=label)
            axes.bar_label(bars, told, padding=2, fontsize=drawing.SMALL)
        axes.set_xticks(range(len(policies)), policies)
        axes.margins(y=0.1)
    left.set(ylabel="GiB of K and V", title="(a) smallest memory of one server")
    right.set(ylabel="GPUs", title="(b) GPUs as they are")
    right.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def by_block_size(section: Section) -> Figure:
    """What the block size changes: a panel for each, over sizes that double."""
    rows = _rows(section)
    sizes = [row["block size"] for row in rows]
    panels = (
        ("padding, %", "(a) padding of a finished request (%)", drawing.BLUE, "o", False),
        ("prefix shared, %", "(b) a prefix in whole blocks (%)", drawing.GREEN, "s", False),
        ("copies a fork", "(c) block copies of a fork", drawing.RED, "^", False),
        ("table, bytes", "(d) bytes of the longest block table", drawing.YELLOW, "D", True),
    )
    title = _title(section, "What the block size changes")
    figure, grid = drawing.sheet(title, 2, 2, size=(10.4, 7.2))
    for axes, (header, name, colour, marker, logarithmic) in zip(grid, panels):
        points = [(size, row[header]) for size, row in zip(sizes, rows) if row[header] is not None]
        if points:
            axes.plot(*zip(*points), color=colour, marker=marker)
        axes.set_title(name)
        axes.grid(True)
        drawing.block_size_axis(axes, sizes)
        axes.set_xlabel("Block size (slots)")
        if logarithmic:
            drawing.log_axis(axes)
            axes.yaxis.set_major_formatter("{x:,g}")
        else:
            axes.set_ylim(bottom=0.0)
    return figure
