"""What every slot holds, by the prefix of tokens that it was computed from, and what must hold.

The K and V of a token depend on all tokens before it, so a slot's content is named by that whole
prefix. A block that is shared, found again by its prefix, copied or swapped is thus held against
what its reader would have computed itself, and a slot that nobody has written holds nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vllm_sim.conformance.adapter import Adapter, Fault, Operation, Step, World

CHECKS = ("partition", "references")  # that can be left out
Slots = dict[int, int]  # slot -> its content


class Shadow:
    """The rules, and the names of contents. One for a search; slots are a state's own."""

    def __init__(self, world: World, without: Collection[str] = ()) -> None:
        self.world, self.without = world, without
        self.blocks = frozenset(range(world.num_blocks))
        self._known: dict[tuple[int, ...], list[int]] = {}
        self.labels: dict[int, str] | None = None  # content -> who wrote it first, if asked for

    def contents(self, tokens: Sequence[int]) -> list[int]:
        """The content of each position of a sequence: a hash of all tokens up to it."""
        tokens = tuple(tokens)
        found = self._known.get(tokens)
        if found is None:
            if len(self._known) > 100_000:
                self._known.clear()
            found, content = [], 0
            for token in tokens:
                found.append(content := hash((content, token)))
            self._known[tokens] = found
        return found

    def run(self, step: Step, slots: Slots, events: Counter) -> None:
        """Copies, writes and reads of a step, in this order; Fault for what is read and wrong."""
        for stage in step.copies:
            self._copy(list(stage), slots, events)
        written: Slots = {}
        wanted = []
        for one in step.passes:
            contents = self.contents(one.tokens)
            targets = one.slots[one.start :] if one.writes is None else one.writes
            if not len(one.slots) == len(contents) == one.start + len(targets):
                raise Fault("slots", f"{one.sequence} has {len(contents)} tokens in other slots")
            for slot, content in zip(targets, contents[one.start :]):
                if written.setdefault(slot, content) != content:
                    raise Fault("overwrite", f"slot {slot} is written twice in one step")
                self._name(content, one)
            wanted.append((one, contents))
        if any(slot in slots and slots[slot] != written[slot] for slot in written):
            events["slot reused"] += 1
        slots |= written
        for one, contents in wanted:
            for position in range(one.first, len(contents)):
                self._compare(slots, one.slots[position], contents[position], one.sequence)
        for event in step.events:
            events[event] += 1

    def _copy(self, pairs: list[tuple[int, int]], slots: Slots, events: Counter) -> None:
        if len({new for _, new in pairs}) < len(pairs):
            raise Fault("overwrite", f"a slot is the target of two copies: {pairs}")
        moved = {new: slots.get(old) for old, new in pairs}
        for slot, content in moved.items():
            if content is None:
                slots.pop(slot, None)
            else:
                slots[slot] = content
        if pairs:
            events["copy"] += 1

    def _compare(self, slots: Slots, slot: int, content: int, who: Any) -> None:
        if slots.get(slot) == content:
            return
        if slot not in slots:
            raise Fault("unwritten", f"{who} reads slot {slot}, which nobody has written")
        told = f"{who} reads slot {slot}, which holds {self.label(slots, slot)}"
        raise Fault("contents", told)

    def holds(self, adapter: Adapter, slots: Slots, events: Counter) -> tuple:
        """All that must hold between two operations. The tables, free blocks and what is cached."""
        tables, free, size = adapter.tables(), list(adapter.free()), self.world.block_size
        used: dict[int, int] = {}
        for who, (blocks, tokens) in tables.items():
            for block in blocks:
                used[block] = used.get(block, 0) + 1
            if len(tokens) > len(blocks) * size:
                raise Fault("slots", f"{who} has {len(tokens)} tokens in {len(blocks)} blocks")
            for position, content in enumerate(self.contents(tokens)):
                slot = blocks[position // size] * size + position % size
                if slots.get(slot) != content:
                    self._compare(slots, slot, content, who)
        cached = adapter.cached()
        for block, tokens in cached.items():
            whole = self.contents(tokens)
            for at in range(size):
                self._compare(
                    slots, block * size + at, whole[at - size], f"who finds cached block {block}"
                )
        kept = cached if getattr(adapter, "cache_holds", False) else ()
        if "partition" not in self.without:
            self._partition(used, free, kept)
        counts = None if "references" in self.without else adapter.ref_counts()
        if counts is not None and counts != used:
            wrong = {b: (counts.get(b, 0), used.get(b, 0)) for b in counts.keys() | used.keys()}
            wrong = {block: both for block, both in wrong.items() if both[0] != both[1]}
            raise Fault("references", f"block: (its count, tables that hold it): {wrong}")
        if used and max(used.values()) > 1:
            events["shared block"] += 1
        return tables, free, cached

    def _partition(self, used: dict[int, int], free: list[int], kept: Iterable[int]) -> None:
        free_set = set(free)
        if len(free_set) < len(free):
            raise Fault("partition", f"a block is free twice: {free}")
        for what, blocks in ("in use", used), ("cached", kept):
            if both := sorted(free_set.intersection(blocks)):
                raise Fault("partition", f"blocks are free and {what}: {both}")
        there = free_set.union(used, kept)
        if there != self.blocks:
            lost, new = sorted(self.blocks - there), sorted(there - self.blocks)
            raise Fault("partition", f"blocks lost: {lost}" if lost else f"no such blocks: {new}")

    def ended(self, tables: dict) -> None:
        """Every request has ended: nothing is left."""
        if tables:
            raise Fault("end", f"all requests have ended, and {[*tables]} still have tables")

    def took(self, operation: Operation, before: int, after: int) -> None:
        if operation.takes is not None and before - after != operation.takes:
            told = f"{operation} took {before - after} blocks, not {operation.takes}"
            raise Fault("blocks taken", told)

    # -- words ------------------------------------------------------------------------------

    def _name(self, content: int, one: Any) -> None:
        if self.labels is not None and content not in self.labels:
            position = self.contents(one.tokens).index(content)
            self.labels[content] = f"{one.sequence}:{position}"

    def label(self, slots: Slots, slot: int) -> str:
        """What a slot holds: the sequence that first computed it, and the position."""
        content = slots.get(slot)
        if content is None:
            return "-"
        return (self.labels or {}).get(content, "another prefix")
