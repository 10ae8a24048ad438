"""What a search found, as it is shown: the answer, what happened, a fault's history step by step.

Reproduces nothing: the presentation only.

    for line in lines("ours", "small", search):
        print(line)
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sim.conformance.adapter import Operation
from vllm_sim.conformance.search import Search, State
from vllm_sim.reporting.tables import Table, counted, render, wrapped


def answer(name: str, search: Search) -> str:
    """The first line."""
    found = search.found
    where = f"{counted(found.states, 'state')} and {counted(found.transitions, 'transition')}"
    if found.fault is not None:
        steps = counted(len(found.history), "operation")
        return f"{name}: a fault after {steps}, found in {where}. {found.fault}"
    told = "all that the world can reach" if found.closed else "as far as time allowed"
    if found.missing:
        return f"{name}: no fault in {where}, but not all that it must have met: it proves little"
    return f"{name}: no fault in {where}, {told}"


def tables(world_name: str, search: Search) -> list[Table]:
    """What was searched, what happened, what is forbidden and nowhere said, and the history."""
    found = search.found
    rate = round(found.transitions / max(found.seconds, 1e-9))
    headers = ("world", "states", "transitions", "a second", "deep", "closed", "random histories")
    depth, closed = found.depth, "yes" if found.closed else "no"
    row = (world_name, found.states, found.transitions, rate, depth, closed, found.histories)
    shown = [Table("Search", headers, [row], str(search.world), name="search")]
    rows = [(name, "done", count) for name, count in sorted(found.done.items())]
    refused = ((f"{name}: {why}", count) for (name, why), count in sorted(found.refused.items()))
    rows += [(name, "refused", count) for name, count in refused]
    rows += [(name, "event", count) for name, count in sorted(found.events.items())]
    rows += [(name, "NOT SEEN", 0) for name in found.missing]
    shown.append(Table("What happened", ("what", "kind", "times"), rows, name="events", index=2))
    if found.silent:
        rows = [*sorted(found.silent.items())]
        title = "Forbidden, and nowhere said: no faults"
        shown.append(Table(title, ("what", "times"), rows, name="forbidden"))
    if found.fault is not None:
        rows = [(number, str(one)) for number, one in enumerate(found.history, 1)]
        shown.append(Table("Smallest history", ("step", "operation"), rows, name="history"))
    return shown


def held(search: Search, state: State) -> list[str]:
    """Each table and what its slots hold: who computed it first, and at what position."""
    shadow, size, adapter, told = search.shadow, search.world.block_size, state.adapter, []
    for who, (blocks, tokens) in adapter.tables().items():
        slots = [range(block * size, block * size + size) for block in blocks]
        names = [" ".join(shadow.label(state.slots, slot) for slot in row) for row in slots]
        blocks = " ".join(f"{block}[{row}]" for block, row in zip(blocks, names))
        told.append(f"{who}: {counted(len(tokens), 'token')}, blocks {blocks}")
    told.append(f"free: {' '.join(map(str, adapter.free()))}")
    cached = adapter.cached().items()
    return told + [f"cached: {block} stands for {[*tokens]}" for block, tokens in cached]


def replayed(search: Search) -> list[str]:
    """The history of a fault, step by step, and what comes of it."""
    shown: list[str] = []
    search.shadow.labels = {}

    def seen(operation: Operation, state: State) -> None:
        try:
            told = held(search, state)
        except Exception as error:  # an engine in which something does not hold
            told = [f"tables cannot be told: {error!r}"]
        told = [wrapped(line, "   ") for line in told]
        shown.append("\n".join([f"{len(shown) + 1}. {operation}", *told]))

    found = search.found
    fault, _ = search.replay(found.history, found.fault.check == "no end", seen)
    told = fault or f"nothing this time; when it was found: {found.fault}"
    return [*shown, *wrapped(f"=> {told}").splitlines()]


def lines(name: str, world_name: str, search: Search, fmt: str) -> Sequence[str]:
    """All that is printed, in order; ASCII."""
    shown = [wrapped(answer(name, search)), ""]
    for table in tables(world_name, search):
        shown += [render(table, fmt), ""]
    if search.found.fault is not None:
        shown += [
            "Step by step: who first computed what a slot holds, as sequence:position; - nobody",
            "",
        ]
        shown += [*replayed(search), ""]
    return [line.encode("ascii", "backslashreplace").decode("ascii") for line in shown]
