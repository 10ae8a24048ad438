"""What can be called in a state of the paged manager, and what each call must do (regime item 4).

What is to be refused, and how many blocks the rest takes, is worked out in `View` from the block
tables alone. `after` compares: the blocks taken and given back; that every sequence finds through
its table, after the copies that the call returned, what it held before; that no block that is
written into is anybody else's. test_exhaustive.py searches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from manager_tools import group_of
from search_tools import frozen_paged

from kv_cache_manager import (
    DuplicateSequenceError,
    OutOfBlocksError,
    OutOfSwapSpaceError,
    PagedKVCacheManager,
    SharedBlockError,
    UnknownSequenceError,
)

SIZE = 2
PREFIX, STRANGER = 100, 10**6


@dataclass(frozen=True)
class World:
    num_blocks: int
    num_cpu_blocks: int
    num_seqs: int
    prefix_len: int = 0

    def __str__(self):
        behind = f", a prefix of {self.prefix_len} tokens" if self.prefix_len else ""
        return (
            f"{self.num_blocks} + {self.num_cpu_blocks} blocks, {self.num_seqs} sequences{behind}"
        )

    def start(self):
        manager = PagedKVCacheManager(
            self.num_blocks, SIZE, num_cpu_blocks=self.num_cpu_blocks, watermark=0.25
        )
        if self.prefix_len:
            manager.allocate_prefix(PREFIX, self.prefix_len)
        return manager


def blocks_of(num_tokens):
    return -(-num_tokens // SIZE)


class View:
    """What the block tables of a state say: lengths, blocks, holders. CPU blocks lie behind."""

    def __init__(self, m):
        self.m = m
        self.free, self.free_cpu = m.num_free_blocks, m.num_free_cpu_blocks
        self.length, self.blocks = {}, {}
        for tables in (m._tables, m._swapped, m._prefixes):
            for i, t in tables.items():
                keep = t.num_prefix_blocks if tables is m._swapped else len(t.blocks)
                behind = [m.num_blocks + b for b in t.blocks[keep:]]
                self.length[i], self.blocks[i] = t.num_tokens, t.blocks[:keep] + behind
        self.holders = Counter(b for blocks in self.blocks.values() for b in blocks)

    def shared_tail(self, i):
        """The part-filled last block, if others hold it too."""
        last = self.blocks[i][-1]
        return last if self.length[i] % SIZE and self.holders[last] > 1 else None

    def growth(self, i, count):
        return blocks_of(self.length[i] + count) - blocks_of(self.length[i])

    def need(self, ids, count):
        """Blocks for `count` tokens more of each: the last to write a shared block has it."""
        writers = Counter(tail for tail in map(self.shared_tail, ids) if tail is not None)
        copies = sum(min(n, self.holders[tail] - 1) for tail, n in writers.items())
        return sum(self.growth(i, count) for i in ids) + copies

    def movable(self, ids):
        tables = {**self.m._tables, **self.m._swapped}
        return Counter(b for i in ids for b in self.blocks[i][tables[i].num_prefix_blocks :])

    def groups(self, ids):
        """The smallest sets of sequences that can be swapped: who share a block that moves."""
        groups = []
        for i in ids:
            own = {i}, set(self.movable([i]))
            for other in [g for g in groups if g[1] & own[1]]:
                groups.remove(other)
                own = own[0] | other[0], own[1] | other[1]
            groups.append(own)
        return [sorted(group) for group, _ in groups]

    def alone(self, ids):
        """By kind: sequences of the same blocks and length can stand in for each other."""
        kinds = {}
        for i in ids:
            kinds.setdefault((*self.blocks[i], self.length[i]), []).append(i)
        return list(kinds.values())


def group_need(prompt_len, generated, prefix_len):
    """New blocks of a group: those of the prompt, and each sequence's own behind them."""
    context = prefix_len + prompt_len
    need = context // SIZE - prefix_len // SIZE
    need += sum(blocks_of(context + n) - context // SIZE for n in generated if n)
    return need + (context % SIZE > 0 and 0 in generated)


class Moves:
    """Everything that is called in a state, with what it must do. Give it to `breadth_first`."""

    def __init__(self, world):
        self.world = world

    def __call__(self, m, seen):
        view = View(m)
        ids = [i for i in view.length if i != PREFIX]
        running, swapped = list(m._tables), list(m._swapped)
        unused = [i for i in range(self.world.num_seqs) if i not in view.length]
        yield from self.admission(m, view, unused, seen)
        yield from self.growth(m, view, running, seen)
        yield from self.truncation(view, running, seen)
        yield from self.beams(view, running, unused, seen)
        yield from self.swapping(m, view, running, swapped, seen)
        for kind in view.alone(ids):
            yield "free", None, lambda t, i=kind[0]: t.free(i), after(view, lost=[kind[0]])
        if m._prefixes:
            yield "free prefix", None, lambda t: t.free(PREFIX), after(view, lost=[PREFIX])
        yield from illegal(m, view, running, swapped)

    def admission(self, m, view, unused, seen):
        behind = [(None, 0)] + [(i, view.length[i]) for i in m._prefixes]
        for prefix_id, prefix_len in behind if unused else ():
            for count in (1, 2, 2 * self.world.num_blocks + 1):
                need = blocks_of(prefix_len + count) - prefix_len // SIZE
                error = OutOfBlocksError if need > view.free else None
                fits = view.free - need >= m.watermark_blocks
                assert m.can_allocate(count, prefix_id) == fits
                call = lambda t, n=count, p=prefix_id: t.allocate(unused[0], n, p)  # noqa: E731
                yield "allocate", error, call, after(view, need, new={unused[0]: prefix_id})
            kinds = [(1, (0,)), (3, (0,))]
            if len(unused) > 1:
                kinds += [(2, (0, 1)), (1, (1, 1)), (1, (0, 0))]
            for prompt_len, generated in kinds:
                need = group_need(prompt_len, generated, prefix_len)
                group = group_of(unused, prompt_len, generated, prefix_len, prefix_id)
                yield from self.admit(m, view, group, need, seen)

    def admit(self, m, view, group, need, seen):
        """Within the watermark by `try_admit`, which else declines, above it by `admit`."""
        fits = view.free - need >= m.watermark_blocks
        assert m.can_admit(group) == fits
        new = {seq.seq_id: group.prefix_id for seq in group.seqs}
        if fits:
            call = lambda t: t.try_admit(group)  # noqa: E731
            yield "try_admit", None, call, after(view, need, new=new)
            return
        before = frozen_paged(m)
        assert m.try_admit(group) is None and frozen_paged(m) == before
        seen["try_admit declines"] += 1
        error = OutOfBlocksError if need > view.free else None
        yield "admit", error, lambda t: t.admit(group), after(view, need, new=new)

    def growth(self, m, view, running, seen):
        for kind in view.alone(running):
            i = kind[0]
            for count in (1, 3):
                need = view.need([i], count)
                error = OutOfBlocksError if need > view.free else None
                call = lambda t, i=i, n=count: t.append(i, n)  # noqa: E731
                yield f"append {count}", error, call, after(view, need, {i: count}, seen=seen)
        assert m.blocks_for_append(running) == view.need(running, 1)
        for count in (1, 3):
            need = view.need(running, count)
            assert m.blocks_for_step(count) == need
            error = OutOfBlocksError if need > view.free else None
            grown = dict.fromkeys(running, count)
            call = lambda t, n=count: t.append_all(n)  # noqa: E731
            yield f"append_all {count}", error, call, after(view, need, grown, seen=seen)

    def truncation(self, view, running, seen):
        for kind in view.alone(running):
            i = kind[0]
            length, end = view.length[i], (view.length[i] - 1) // SIZE * SIZE
            for keep in sorted({1, length - 1, end, length} - {0}):
                into = view.blocks[i][blocks_of(keep) - 1]
                seen["truncate inside a shared block"] += keep % SIZE and view.holders[into] > 1
                call = lambda t, i=i, n=keep: t.truncate(i, n)  # noqa: E731
                yield "truncate", None, call, after(view, shorter={i: keep})
            call = lambda t, i=i, n=length + 1: t.truncate(i, n)  # noqa: E731
            yield "truncate", ValueError, call, None

    def beams(self, view, running, unused, seen):
        kinds = view.alone(running)
        for kind in kinds:
            i = kind[0]
            if unused:
                call = lambda t, i=i: t.fork(i, unused[0])  # noqa: E731
                yield "fork", None, call, after(view, parents={unused[0]: i})
        firsts = [kind[0] for kind in kinds]
        moves = [{a: b} for a in firsts for b in firsts if a != b]
        moves += [{a: b, b: a} for a in firsts for b in firsts if a < b]
        if len(firsts) > 2:
            moves.append(dict(zip(firsts, firsts[1:] + firsts[:1])))
        moves += [dict.fromkeys(running, firsts[0])] if len(running) > 1 else []
        for parents in moves:
            seen["reorder of a parent that moves"] += not parents.keys().isdisjoint(
                b for a, b in parents.items() if a != b
            )
            call = lambda t, p=parents: t.reorder(p)  # noqa: E731
            yield "reorder", None, call, after(view, parents=parents)

    def swapping(self, m, view, running, swapped, seen):
        for ids, room, full, out in (
            (running, view.free_cpu, OutOfSwapSpaceError, True),
            (swapped, view.free, OutOfBlocksError, False),
        ):
            groups = view.groups(ids)
            parts = [group[1:] for group in groups if len(group) > 1]
            whole = [ids] if len(groups) > 1 else []
            for group in groups + whole + parts:
                moving = view.movable(group)
                error = full if len(moving) > room else None
                # Also of a sequence that was truncated into a block of a prefix.
                if any(view.holders[block] != count for block, count in moving.items()):
                    error = SharedBlockError
                assert error is SharedBlockError or group not in parts
                if out:
                    assert m.can_swap_out(group) == (len(moving) <= room)
                    call = lambda t, g=group: t.swap_out(g)  # noqa: E731
                else:
                    fits = room - len(moving) - len(group) >= m.watermark_blocks
                    assert m.can_swap_in(group) == fits
                    call = lambda t, g=group: t.swap_in(g)  # noqa: E731
                name = "swap_out" if out else "swap_in"
                seen[f"{name} of shared blocks"] += (
                    max(moving.values(), default=0) > 1 and error is None
                )
                yield name, error, call, swapped_all(view, len(moving), out)
            if out:
                for group in groups:
                    yield from self.recompute(m, view, group)

    def recompute(self, m, view, group):
        """Section 4.5: drop a group, and admit it again as a longer prompt."""
        least = min(view.length[i] for i in group)
        again = group_of(group, least, [view.length[i] - least for i in group])

        def call(trial):
            for i in group:
                trial.free(i)
            if trial.can_admit(again):
                return trial.admit(again)
            return None

        def check(trial, copies):
            for i in group if copies is not None else ():
                assert trial.num_tokens(i) == view.length[i]
            others = [i for i in view.blocks if i not in group]
            same_contents(view, trial, {i: i for i in others}, {})

        yield "recompute", None, call, check


def labels_after(view, trial, pairs):
    """Where each block's contents of before the call lie after it."""
    into = {new: old for old, new in pairs}
    assert len(into) == len(pairs), "a block is written twice"
    assert all(view.holders[new] == 0 for new in into), "a block in use is overwritten"
    return into


def same_contents(view, trial, parents, into, shorter=None):
    """Every sequence finds, block by block, what the one that it continues held before: all of it
    but of those in `shorter`, which have so many tokens left."""
    num_blocks = trial.num_blocks
    for i, parent in parents.items():
        table = trial._tables.get(i) or trial._prefixes.get(i)
        blocks = table.blocks if table else None
        if table is None:
            table = trial._swapped[i]
            keep = table.num_prefix_blocks
            blocks = table.blocks[:keep] + [num_blocks + b for b in table.blocks[keep:]]
        held = view.blocks[parent]
        if shorter and i in shorter:
            held = held[: blocks_of(shorter[i])]
            assert len(blocks) == len(held) and table.num_tokens == shorter[i]
        found = [into.get(block, block) for block in blocks[: len(held)]]
        assert found == held, f"{i} finds {found}, where {parent} held {held}"
        least = (shorter or {}).get(i, view.length[parent])
        assert table.num_tokens >= least, f"{i} is shorter than before"


def after(view, need=None, grown=None, parents=None, new=None, lost=(), seen=None, shorter=None):
    """The check of a call that takes `need` blocks (None: gives some back, and returns them)."""
    grown, new = grown or {}, new or {}
    continues = {i: i for i in view.blocks if i not in lost}
    continues |= parents or {}

    def check(trial, result):
        copies = () if need is None or result is None else result
        into = labels_after(view, trial, copies)
        for i, prefix_id in new.items():
            if prefix_id is not None:
                continues[i] = prefix_id
        same_contents(view, trial, continues, into, shorter)
        if need is not None:
            assert trial.num_free_blocks == view.free - need, "not what it needs"
        elif result is not None:
            freed = set(trial._gpu.free_blocks) - set(view.m._gpu.free_blocks)
            assert sorted(result) == sorted(freed), "freed blocks are not those returned"
        else:
            assert trial.num_free_blocks == view.free
        for i, count in grown.items():
            table = trial._tables[i]
            assert table.num_tokens == view.length[i] + count, "not grown by what was asked"
            for block in table.blocks[view.length[i] // SIZE :]:
                assert trial.ref_count(block) == 1, "a shared block is written"
            if seen is not None and view.shared_tail(i) is not None:
                place = table.blocks[len(view.blocks[i]) - 1]
                last = place == view.blocks[i][-1]
                seen["last holder writes in place" if last else "copy on write"] += 1
        for i in new:
            for block in set(trial._tables[i].blocks).difference(into):
                known = new[i] is not None and block in view.blocks[new[i]]
                assert known or view.holders[block] == 0, "a new sequence holds an old block"

    return check


def swapped_all(view, moving, out):
    def check(trial, pairs):
        first = trial.num_blocks
        if out:
            into = {first + new: old for old, new in pairs}
            assert trial.num_free_cpu_blocks == view.free_cpu - moving
            assert trial.num_free_blocks == view.free + moving
        else:
            into = {new: first + old for old, new in pairs}
            assert trial.num_free_cpu_blocks == view.free_cpu + moving
            assert trial.num_free_blocks == view.free - moving
        assert len(into) == len(pairs) == moving, "a block moves twice, or not at all"
        assert all(view.holders[block] == 0 for block in into), "a block in use is overwritten"
        same_contents(view, trial, {i: i for i in view.blocks}, into)

    return check


def illegal(m, view, running, swapped):
    """Calls that no state allows, and those that this one does not: in the names' least cases."""
    for i in [STRANGER, *swapped[:1], *list(m._prefixes)]:
        yield "append", UnknownSequenceError, lambda t, i=i: t.append(i), None
        yield "truncate", UnknownSequenceError, lambda t, i=i: t.truncate(i, 1), None
        yield "fork", UnknownSequenceError, lambda t, i=i: t.fork(i, STRANGER + 1), None
        yield "swap_out", UnknownSequenceError, lambda t, i=i: t.swap_out([*running, i]), None
        if running:
            both = {running[0]: i}
            yield "reorder", UnknownSequenceError, lambda t, p=both: t.reorder(p), None
    for i in [STRANGER, *running[:1]]:
        yield "swap_in", UnknownSequenceError, lambda t, i=i: t.swap_in([*swapped, i]), None
        yield "prefix", UnknownSequenceError, lambda t, i=i: t.allocate(STRANGER + 1, 1, i), None
    yield "free", UnknownSequenceError, lambda t: t.free(STRANGER), None
    for i in [*running[:1], *swapped[:1], *list(m._prefixes)]:
        yield "allocate", DuplicateSequenceError, lambda t, i=i: t.allocate(i, 1), None
        if running:
            yield "fork", DuplicateSequenceError, lambda t, i=i: t.fork(running[0], i), None
        if view.free > 0:
            group = group_of([STRANGER, i], 1, (0, 0))
            yield "admit", DuplicateSequenceError, lambda t, g=group: t.admit(g), None
    yield "append_all", ValueError, lambda t: t.append_all(0), None
