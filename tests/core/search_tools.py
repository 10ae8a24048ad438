"""Breadth first over all states that a manager can reach: the engine of regime item 4.

`breadth_first` goes from state to state through the real classes. What is searched gives it
    copy(manager)        an independent copy
    canonical(manager)   a value that two states share if and only if nothing tells them apart
                         but the names of blocks and sequences, and the time since the start
    moves(manager)       (name, error expected or None, call, check of what it returns)
Every call is made in every state. One that is to be refused must raise exactly that error and
leave all as it was, one that is not to be refused must raise nothing. Each new state must pass
`check_invariants`.
"""

from __future__ import annotations

import gc
import marshal
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import permutations, product

from allocators import BlockAllocator
from kv_cache_manager import CacheError, PagedKVCacheManager
from sequence import Clock


@dataclass
class Search:
    """What a search went through."""

    states: int = 0
    transitions: int = 0  # calls made, refused ones included
    depth: int = 0  # calls from the start to the farthest state
    done: Counter = field(default_factory=Counter)  # calls that succeeded, by name
    refused: Counter = field(default_factory=Counter)  # by name and error
    seen: Counter = field(default_factory=Counter)  # what the checks noticed, by name
    seconds: float = 0.0  # of CPU

    def figures(self):
        found = {"states": self.states, "transitions": self.transitions, "calls deep": self.depth}
        return found | {"seconds": round(self.seconds, 1)}


def names(text):
    return set(text.split(", "))


def pairs(refused):
    """(call, error) for each, from {error: "call, call"}."""
    return {(name, error) for error, calls in refused.items() for name in names(calls)}


def breadth_first(start, copy, canonical, frozen, moves):
    """Search from `start`; returns the Search. `frozen(manager)`: all of it, as a value."""
    search, begin = Search(), time.process_time()
    start.check_invariants()
    known, level = {canonical(start)}, [start]
    gc.disable()  # nothing here is cyclic, and there is much of it
    try:
        while level:
            following = []
            for state in level:
                _visit(state, copy, canonical, frozen, moves, search, known, following)
            level = following
            search.depth += bool(level)
    finally:
        gc.enable()
    search.states, search.seconds = len(known), time.process_time() - begin
    return search


def _visit(state, copy, canonical, frozen, moves, search, known, following):
    """All calls in one state; new ones go to `known` and `following`."""
    before = frozen(state)
    tried = []  # refused since the state was last compared

    def unchanged():
        assert frozen(state) == before, f"refused, and changed something: one of {tried}"
        tried.clear()

    for name, error, call, check in moves(state, search.seen):
        search.transitions += 1
        if error is None:
            if tried:
                unchanged()
            trial = copy(state)
            check(trial, call(trial))
            search.done[name] += 1
            key = canonical(trial)
            if key not in known:
                known.add(key)
                trial.check_invariants()
                following.append(trial)
            continue
        tried.append(name)
        try:
            call(state)
        except CacheError as raised:
            assert type(raised) is error, f"{name}: {raised!r}, not {error.__name__}"
        except ValueError:
            assert error is ValueError, f"{name}: ValueError, not {error.__name__}"
        else:
            raise AssertionError(f"{name}: no {error.__name__}")
        search.refused[name, error.__name__] += 1
    unchanged()


# ---- the paged manager ------------------------------------------------------------------------


def copy_paged(m):
    """As copy.deepcopy, in a fortieth of its time."""
    new = object.__new__(PagedKVCacheManager)
    new.__dict__ |= m.__dict__
    new._clock = clock = Clock()
    clock.now = m._clock.now
    new._tables = tables = {i: t.twin(clock) for i, t in m._tables.items()}
    new._swapped = {i: t.twin(None) for i, t in m._swapped.items()}
    new._prefixes = {i: t.twin(None) for i, t in m._prefixes.items()}
    new._tails = {i: tables[i] for i in m._tails}
    new._due = [{i: tables[i].blocks for i in due} if due else {} for due in m._due]
    new._gpu, new._cpu = _copied_pool(m._gpu), _copied_pool(m._cpu)
    return new


def _copied_pool(pool):
    twin = object.__new__(BlockAllocator)
    twin.num_blocks = pool.num_blocks
    twin.free_blocks, twin.extra_refs = pool.free_blocks.copy(), pool.extra_refs.copy()
    return twin


def frozen_paged(m):
    """All of a manager, as a value: equal if and only if nothing has happened."""
    places = (m._tables, m._swapped, m._prefixes)
    return (
        [[(i, *t.blocks, t.offset, t.num_prefix_blocks) for i, t in p.items()] for p in places],
        [list(due) for due in m._due],
        list(m._tails),
        (m._clock.now, m._offsets, m._logical_blocks),
        [(pool.free_blocks.copy(), pool.extra_refs.copy()) for pool in (m._gpu, m._cpu)],
    )


def canonical_paged(m):
    """The state without the names of blocks and sequences, and with lengths in place of times.

    Of a table: where it is, its blocks, the unfilled slots of the last, and how many belong to a
    prefix. Blocks are named in the order in which they are met, going through the tables in the
    order of what is known of them without names; where that leaves a choice, all choices are tried
    and the least result counts. The order of the free lists and of the buckets, and so which of
    the holders of a shared block copies it, is a matter of names too.
    """
    num_blocks = m.num_blocks
    refs, cpu_refs = m._gpu.extra_refs.get, m._cpu.extra_refs.get
    rows = []
    for place, tables in enumerate((m._tables, m._swapped, m._prefixes)):
        for t in tables.values():
            blocks, keep = t.blocks, t.num_prefix_blocks
            if place == 1:
                held = [refs(b, 0) for b in blocks[:keep]]
                held += [cpu_refs(b, 0) for b in blocks[keep:]]
                blocks = blocks[:keep] + [num_blocks + b for b in blocks[keep:]]
            else:
                held = [refs(b, 0) for b in blocks]
            rows.append(((place, t.unfilled, keep, held), tuple(blocks)))
    rows.sort()
    # Tables that hold the same blocks are equal in all respects: they stay together.
    ties, last = [], None
    for key, blocks in rows:
        if key != last:
            ties.append([])
            last = key
        if not ties[-1] or ties[-1][-1][0] != blocks:
            ties[-1].append([blocks, 0])
        ties[-1][-1][1] += 1
    keys = [(*key[:3], *key[3]) for key, _ in rows]
    if all(len(tie) == 1 for tie in ties):
        named = _named([tie[0] for tie in ties])
    else:
        orders = product(*map(permutations, ties))
        named = min(_named([t for tie in order for t in tie]) for order in orders)
    return marshal.dumps((keys, named), 0)  # as bytes it is small; later formats know identities


def _named(tables):
    """Tables (blocks, how many hold just these) with blocks named in order."""
    names, result = {}, []
    for blocks, count in tables:
        result.append(count)
        result += [names.setdefault(block, len(names)) for block in blocks]
    return tuple(result)
