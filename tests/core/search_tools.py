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
from collections import Counter
from dataclasses import dataclass, field
from itertools import permutations, product
from operator import itemgetter

from allocators import BlockAllocator
from kv_cache_manager import CacheError, CopyLedger, PagedKVCacheManager
from sequence import BlockTable, Clock


@dataclass
class Search:
    """What a search went through."""

    states: int = 0
    transitions: int = 0  # calls made, refused ones included
    depth: int = 0  # calls from the start to the farthest state
    done: Counter = field(default_factory=Counter)  # calls that succeeded, by name
    refused: Counter = field(default_factory=Counter)  # by name and error
    seen: Counter = field(default_factory=Counter)  # what the checks noticed, by name


def breadth_first(start, copy, canonical, frozen, moves):
    """Search from `start`; returns the Search. `frozen(manager)`: all of it, as a value."""
    search = Search()
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
    search.states = len(known)
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
    new._tables = tables = _copied_tables(m._tables, clock)
    new._swapped = _copied_tables(m._swapped, clock)
    new._prefixes = _copied_tables(m._prefixes, clock)
    new._loose = {i: tables[i] for i in m._loose}
    new._due = [{i: tables[i].blocks for i in due} if due else {} for due in m._due]
    new._gpu, new._cpu = _copied_pool(m._gpu), _copied_pool(m._cpu)
    nodes = {}
    new._gpu_copies = _copied_ledger(m._gpu_copies, nodes)
    new._cpu_copies = _copied_ledger(m._cpu_copies, nodes)
    return new


def _copied_tables(tables, clock):
    result = {}
    for seq_id, table in tables.items():
        result[seq_id] = t = object.__new__(BlockTable)
        t.blocks, t.block_size, t.clock = table.blocks.copy(), table.block_size, clock
        t.room, t.held, t.phase = table.room, table.held, table.phase
        t.num_prefix_blocks = table.num_prefix_blocks
    return result


def _copied_pool(pool):
    twin = object.__new__(BlockAllocator)
    twin.num_blocks = pool.num_blocks
    twin.free_blocks, twin.extra_refs = pool.free_blocks.copy(), pool.extra_refs.copy()
    return twin


def _copied_ledger(ledger, nodes):
    new = CopyLedger()
    if ledger.nodes:
        new.nodes = {block: _copied_node(node, nodes) for block, node in ledger.nodes.items()}
    return new


def _copied_node(node, nodes):
    if node is None:
        return None
    if node not in nodes:
        nodes[node] = CopyLedger.Node(_copied_node(node.parent, nodes), node.copied)
    return nodes[node]


def frozen_paged(m):
    """All of a manager, as a value: equal if and only if nothing has happened."""

    def tables(held):
        return [
            (i, *t.blocks, t.room, t.held, t.phase, t.num_prefix_blocks) for i, t in held.items()
        ]

    def ledger(nodes):
        return [(b, n.copied, n.parent) for b, n in nodes.items()]

    return (
        tables(m._tables),
        tables(m._swapped),
        tables(m._prefixes),
        list(m._loose),
        [list(due) for due in m._due],
        m._clock.now,
        m._in_step_unfilled,
        m._logical_blocks,
        m._gpu.free_blocks.copy(),
        m._cpu.free_blocks.copy(),
        m._gpu.extra_refs.copy(),
        m._cpu.extra_refs.copy(),
        ledger(m._gpu_copies.nodes),
        ledger(m._cpu_copies.nodes),
    )


def canonical_paged(m):
    """The state without the names of blocks and sequences, and with time relative to the clock.

    Of a table: where it is, its blocks, the slots that it may and may not write, when its last
    block is full if it is in step, and how many blocks belong to a prefix. Blocks are named in the
    order in which they are met, going through the tables in the order of what is known of them
    without names; where that leaves a choice, all choices are tried and the least result counts.
    Of the copies ever made, which slots still hold the same token matters and nothing else. The
    order of the free lists is a matter of names too.
    """
    num_blocks, size, now = m.num_blocks, m.block_size, m._clock.now
    same = same_tokens(m) if m._gpu_copies.nodes or m._cpu_copies.nodes else {}
    refs, cpu_refs = m._gpu.extra_refs.get, m._cpu.extra_refs.get
    rows = []
    for place, tables in enumerate((m._tables, m._swapped, m._prefixes)):
        for t in tables.values():
            waits = -1 if t.phase is None else (t.phase - now) % size
            blocks, keep = t.blocks, t.num_prefix_blocks
            if place == 1:
                held = [refs(b, 0) for b in blocks[:keep]]
                held += [cpu_refs(b, 0) for b in blocks[keep:]]
                blocks = blocks[:keep] + [num_blocks + b for b in blocks[keep:]]
            else:
                held = [refs(b, 0) for b in blocks]
            alike = [len(same[b]) if b in same else 0 for b in blocks] if same else ()
            rows.append(((place, t.room, t.held, waits, keep, held, alike), tuple(blocks)))
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
    keys = [(*key[:5], *key[5], -1, *key[6]) for key, _ in rows]
    if len(ties) == len(rows) or all(len(tie) == 1 for tie in ties):
        names = _named([tie[0] for tie in ties], same)
    else:
        orders = product(*map(permutations, ties))
        names = min(_named([t for tie in order for t in tie], same) for order in orders)
    return marshal.dumps((keys, names), 0)  # as bytes it is small; later formats know identities


def _named(tables, same):
    """Tables (blocks, how many hold just these) with blocks and copied tokens named in order."""
    names, tokens, result = {}, {}, []
    name, token = names.setdefault, tokens.setdefault
    for blocks, count in tables:
        result.append(count)
        for block in blocks:
            result.append(name(block, len(names)))
        if same:
            for block in blocks:
                for at in same.get(block, ()):
                    result.append(token(at, len(tokens)))
    return tuple(result)


def same_tokens(m):
    """Which slots hold the same token: {block (CPU blocks behind the others): one item a slot}.

    Only slots that are not alone with their token; an item names the token.
    """
    live, holders = {}, {}
    for first, ledger in ((0, m._gpu_copies), (m.num_blocks, m._cpu_copies)):
        for block, node in ledger.nodes.items():
            live[node] = first + block
    for node, block in live.items():
        for slot in range(node.copied):
            writer = node
            while slot < writer.copied:
                writer = writer.parent
            token = (id(writer), slot)
            if token not in holders:
                holders[token] = [live[writer]] if writer in live else []
            holders[token].append(block)
    result = {}
    for token, blocks in holders.items():
        if len(blocks) > 1:
            for block in blocks:
                result.setdefault(block, []).append(token)
    for tokens in result.values():
        tokens.sort(key=itemgetter(1))
    return result
