"""Regime item 2: random histories against a shadow that knows contents and no blocks.

The shadow keeps what each sequence's K and V should be: a list of stamps, one per token, all
different. A fake cache does what the manager says (copies and swaps at once, freed blocks are
poisoned), and the contents are compared through the tables after every step.

The shadow also predicts every number of blocks without a table. Two sequences may share a block
if and only if its contents are the same stamps, so the pool in use must be as large as the set
of different block contents, and an operation needs as many blocks as that set grows by.

The long runs (marker `slow`) go on until a million rules have run, or RULE_STEPS of them
(environment), with the seeds 0, 1, 2, ... of Hypothesis, in parts that run side by side:

    python -m pytest -m slow -n 8 tests/core/test_state_machine.py
"""

import math
import os
import random
import time
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from manager_tools import refused

from kv_cache_manager import (
    POLICIES,
    BaselineCacheManager,
    DuplicateSequenceError,
    OutOfBlocksError,
    OutOfSwapSpaceError,
    PagedKVCacheManager,
    ReservationError,
    SharedBlockError,
    UnknownSequenceError,
)
from sequence import Sequence, SequenceGroup, SequenceStatus

SHORT = settings(
    max_examples=280,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# One round of a long run: other examples for each seed, and longer ones.
ROUND = settings(SHORT, max_examples=250, stateful_step_count=100, derandomize=False)
RULE_STEPS = int(os.environ.get("RULE_STEPS", "1000000"))
PARTS = 8

PICK = st.integers(0, 2**12)  # chooses among what there is, modulo its number
BAD_COUNTS = (0, -1, True, 1.0, None)
UNUSED = 10**9  # an id that nobody has


class Machine(RuleBasedStateMachine):
    """What both have: a count of rules, and stamps that were never given before."""

    @invariant()
    def count(self):
        """Hypothesis asks after `start` and after each rule."""
        self.events["rules"] += 1

    def fresh(self, count):
        self.next_stamp += count
        return list(range(self.next_stamp - count, self.next_stamp))


class PagedMachine(Machine):
    events: ClassVar = Counter()  # what the histories went through, over all examples of a run

    @initialize(
        num_blocks=st.sampled_from([4, 5, 7, 12, 16, 24, 32]),
        size=st.sampled_from([1, 2, 3, 4, 4]),
        cpu_blocks=st.sampled_from([0, 2, 5, 16, 32]),
        watermark=st.sampled_from([0.0, 0.125, 0.5]),
        seed=st.integers(0, 99),
        prefix=st.integers(0, 6),
        generated=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    )
    def start(self, num_blocks, size, cpu_blocks, watermark, seed, prefix, generated):
        order = random.Random(seed).sample(range(num_blocks), num_blocks)
        self.size, self.num_blocks = size, num_blocks
        self.cpu_blocks = cpu_blocks
        self.watermark = math.floor(watermark * num_blocks)
        self.m = PagedKVCacheManager(
            num_blocks, size, num_cpu_blocks=self.cpu_blocks, watermark=watermark, free_order=order
        )
        self.cache = {}  # (pool, block, offset) -> stamp; a slot that is missing is poisoned
        self.running, self.swapped, self.prefixes = {}, {}, {}  # id -> stamps
        self.kept = {}  # id -> leading tokens in whole blocks of a shared prefix: never swapped
        self.places = {}  # id -> blocks of a swapped sequence, from the pairs of its swap
        self.family = {}  # id -> its group, which forks and beams stay in
        self.origin = {}  # group -> (prompt length, prefix id or None, prefix length)
        self.next_stamp = 0
        self.next_id = 0
        if prefix:
            self.allocate_prefix(prefix)
        self.admit(prompt_len=2, generated=generated, pick=0, behind=True, finished=0)
        self.events["rules"] -= 1

    # -- the shadow -------------------------------------------------------------------------

    def new_id(self):
        self.next_id += 1
        return self.next_id

    def new_family(self, ids, *origin):
        family = len(self.origin)
        self.origin[family] = origin
        for i in ids:
            self.family[i] = family

    def pieces(self, stamps):
        """The contents of each block that these tokens take."""
        return {tuple(stamps[i : i + self.size]) for i in range(0, len(stamps), self.size)}

    def gpu_pieces(self, running):
        """The different block contents in GPU memory, were these the running sequences."""
        pieces = set()
        for stamps in (*running.values(), *self.prefixes.values()):
            pieces |= self.pieces(stamps)
        for seq_id, stamps in self.swapped.items():
            pieces |= self.pieces(stamps[: self.kept[seq_id]])
        return pieces

    def moving_pieces(self, held, ids):
        """The block contents that swapping these sequences moves."""
        return set().union(*(self.pieces(held[i][self.kept[i] :]) for i in ids))

    def need(self, running):
        """Blocks that it takes to get from here to these running sequences."""
        return len(self.gpu_pieces(running)) - len(self.gpu_pieces(self.running))

    def some(self, held, pick):
        return sorted(held)[pick % len(held)]

    def members(self, held, family):
        return [i for i in held if self.family[i] == family]

    # -- the fake cache ---------------------------------------------------------------------

    def copy_blocks(self, pairs):
        """All sources are read before any destination is written, as one kernel does it."""
        sources, destinations = [s for s, _ in pairs], [d for _, d in pairs]
        assert len(set(destinations)) == len(destinations)
        assert not set(sources) & set(destinations), "a copy of a copy in one step"
        read = {
            (destination, offset): self.cache.get(("gpu", source, offset))
            for source, destination in pairs
            for offset in range(self.size)
        }
        for (destination, offset), stamp in read.items():
            self.cache["gpu", destination, offset] = stamp
        self.events["copies"] += len(pairs)

    def move_blocks(self, pairs, source, target):
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
        for block, destination in pairs:
            for offset in range(self.size):
                stamp = self.cache.pop((source, block, offset), None)
                self.cache[target, destination, offset] = stamp
        self.events[f"blocks moved to {target}"] += len(pairs)

    def poison(self, blocks):
        for block in blocks:
            for offset in range(self.size):
                self.cache.pop(("gpu", block, offset), None)

    def write(self, seq_id, stamps, start):
        """K and V of the tokens from `start` on, at the slots that the table names."""
        blocks = self.m.block_table(seq_id).blocks
        for position in range(start, len(stamps)):
            block, offset = blocks[position // self.size], position % self.size
            self.cache["gpu", block, offset] = stamps[position]

    def read(self, blocks, stamps, pool, kept=0):
        result = []
        for position in range(len(stamps)):
            where = "gpu" if position < kept else pool
            block = blocks[position // self.size]
            result.append(self.cache.get((where, block, position % self.size)))
        return result

    # -- what must hold after every step ----------------------------------------------------

    @invariant()
    def same_contents(self):
        m = self.m
        m.check_invariants()
        assert m.running_ids == list(self.running)
        for seq_id, stamps in (*self.running.items(), *self.prefixes.items()):
            assert m.num_tokens(seq_id) == len(stamps)
            table = m.block_table(seq_id)
            assert self.read(table.blocks, stamps, "gpu") == stamps
        for seq_id, stamps in self.swapped.items():
            assert self.read(self.places[seq_id], stamps, "cpu", self.kept[seq_id]) == stamps

    @invariant()
    def same_numbers(self):
        m, size = self.m, self.size
        pieces = self.gpu_pieces(self.running)
        cpu_pieces = self.moving_pieces(self.swapped, self.swapped)
        assert m.num_blocks - m.num_free_blocks == len(pieces)
        assert m.num_cpu_blocks - m.num_free_cpu_blocks == len(cpu_pieces)
        usage = m.usage()
        on_gpu = self.running.values()
        assert usage.tokens == sum(map(len, pieces))
        assert usage.padding == len(pieces) * size - usage.tokens
        assert usage.logical_tokens == sum(map(len, on_gpu))
        assert usage.logical_blocks == sum(-(-len(stamps) // size) for stamps in on_gpu)
        assert usage.physical_blocks == len(pieces)
        assert usage.reserved == usage.internal == usage.rounding == 0
        self.events["steps"] += 1
        self.events["tokens held twice"] += sum(map(len, pieces)) > len(set().union(*pieces))

    def attempt(self, running, call):
        """`call` succeeds if the blocks for these running sequences are there, and only then."""
        if self.need(running) > self.m.num_free_blocks:
            self.events["out of blocks"] += 1
            refused(self.m, OutOfBlocksError, call)
            return None
        return call()

    def shared_tails(self, ids):
        """How many of these sequences must copy their part-filled last block to write on."""
        tails = {i: tuple(s[-(len(s) % self.size) :]) for i, s in self.running.items()}
        tails = {i: tail for i, tail in tails.items() if len(self.running[i]) % self.size}
        holders = Counter(tails.values())
        writers = Counter(tails[i] for i in ids if i in tails)
        return sum(min(count, holders[tail] - 1) for tail, count in writers.items())

    # -- allocation and sharing -------------------------------------------------------------

    @rule(tokens=st.integers(1, 9), pick=PICK, behind=st.booleans())
    def allocate(self, tokens, pick, behind):
        prefix_id = self.some(self.prefixes, pick) if behind and self.prefixes else None
        prefix = [] if prefix_id is None else self.prefixes[prefix_id]
        seq_id = self.new_id()
        stamps = prefix + self.fresh(tokens)
        running = self.running | {seq_id: stamps}
        need = self.need(running)
        assert self.m.blocks_for(tokens, prefix_id) == need
        fits = self.m.num_free_blocks - need >= self.watermark
        assert self.m.can_allocate(tokens, prefix_id) == fits
        copies = self.attempt(running, lambda: self.m.allocate(seq_id, tokens, prefix_id))
        if copies is not None:
            part = len(prefix) % self.size
            assert len(copies) == (part > 0)
            self.events["prefix tail copied"] += part > 0
            self.running[seq_id] = stamps
            self.kept[seq_id] = len(prefix) - part
            self.new_family([seq_id], tokens, prefix_id, len(prefix))
            self.copy_blocks(copies)
            self.write(seq_id, stamps, len(prefix))

    @precondition(lambda self: len(self.prefixes) < 2)
    @rule(tokens=st.integers(1, 7))
    def allocate_prefix(self, tokens):
        prefix_id = self.new_id()
        call = lambda: self.m.allocate_prefix(prefix_id, tokens)  # noqa: E731
        if -(-tokens // self.size) > self.m.num_free_blocks:
            refused(self.m, OutOfBlocksError, call)
            return
        call()
        self.prefixes[prefix_id] = self.fresh(tokens)
        self.write(prefix_id, self.prefixes[prefix_id], 0)

    @precondition(lambda self: self.running)
    @rule(pick=PICK, children=st.integers(1, 3))
    def fork(self, pick, children):
        parent = self.some(self.running, pick)
        for _ in range(children):
            child = self.new_id()
            self.m.fork(parent, child)
            self.running[child] = self.running[parent].copy()
            self.kept[child], self.family[child] = self.kept[parent], self.family[parent]

    @rule(pick=PICK, group=st.booleans())
    def free(self, pick, group):
        held = {**self.running, **self.swapped, **self.prefixes}
        if not held:
            return
        seq_id = self.some(held, pick)
        if group and seq_id in self.family:
            for i in self.members([*self.running, *self.swapped], self.family[seq_id]):
                self.release(i)
        else:
            self.release(seq_id)

    def release(self, seq_id):
        before = self.used_blocks()
        freed = self.m.free(seq_id)
        for held in (self.running, self.swapped, self.prefixes):
            held.pop(seq_id, None)
        assert sorted(freed) == sorted(before - self.used_blocks())
        self.poison(freed)

    def used_blocks(self):
        """GPU blocks that some table holds."""
        tables = [self.m.block_table(i).blocks for i in (*self.running, *self.prefixes)]
        tables += [self.places[i][: self.kept[i] // self.size] for i in self.swapped]
        return set().union(*tables)

    # -- growth -----------------------------------------------------------------------------

    def grow(self, ids, count, call):
        running = self.running | {i: self.running[i] + self.fresh(count) for i in ids}
        expected = self.shared_tails(ids)
        copies = self.attempt(running, call)
        if copies is None:
            return False
        assert len(copies) == expected
        self.events["copy on write"] += bool(copies)
        self.events["several copies"] += len(copies) > 1
        self.copy_blocks(copies)
        for i in ids:
            self.write(i, running[i], len(self.running[i]))
        self.running = running
        return True

    @precondition(lambda self: self.running)
    @rule(pick=PICK, length=st.integers(0, 12))
    def truncate(self, pick, length):
        """Down to any length. Contents tell blocks apart, so inside a block its tokens are then
        new ones if it is its own, and if others have it too a new one is written at once: a copy.
        """
        seq_id = self.some(self.running, pick)
        stamps = self.running[seq_id]
        prompt_len, _, prefix_len = self.origin[self.family[seq_id]]
        length += prompt_len + prefix_len  # a group that is recomputed has its prompt
        if length > len(stamps):
            refused(self.m, ValueError, lambda: self.m.truncate(seq_id, length))
            return
        start = length - length % self.size
        others = {**self.running, **self.prefixes, **self.swapped}
        del others[seq_id]
        shared = tuple(stamps[start : start + self.size]) in self.all_pieces(others)
        if shared and length > start and not self.m.num_free_blocks:
            length = start
            if length < max(1, prompt_len + prefix_len):
                return
        before = self.used_blocks()
        freed = self.m.truncate(seq_id, length)
        assert sorted(freed) == sorted(before - self.used_blocks())
        self.poison(freed)
        if shared and length > start:
            self.m.check_invariants()
            copies = self.m.append(seq_id)
            self.copy_blocks(copies)
            self.running[seq_id] = stamps[:length] + self.fresh(1)
            self.write(seq_id, self.running[seq_id], length)
            self.events["truncate inside a shared block"] += len(copies)
        else:
            self.running[seq_id] = stamps[:start] + self.fresh(length - start)
            self.write(seq_id, self.running[seq_id], start)
        self.kept[seq_id] = min(self.kept[seq_id], start)
        self.events["truncate"] += length < len(stamps)
        self.events["truncate to a block's end"] += length == start < len(stamps)

    def all_pieces(self, held):
        """The block contents of these sequences, wherever they are."""
        return set().union(*map(self.pieces, held.values()))

    @precondition(lambda self: self.running)
    @rule(pick=PICK, count=st.sampled_from([1, 1, 1, 2, 3, 5, 9]))
    def append(self, pick, count):
        seq_id = self.some(self.running, pick)
        self.grow([seq_id], count, lambda: self.m.append(seq_id, count))
        # A token more for any of them, each by itself: whether or not they share their blocks.
        ids = [i for place, i in enumerate(self.running) if pick >> place & 1]
        grown = self.running | {i: self.running[i] + self.fresh(1) for i in ids}
        assert self.m.blocks_for_append(ids) == self.need(grown)

    @rule(counts=st.lists(st.sampled_from([1, 1, 1, 1, 1, 2, 3, 6]), min_size=1, max_size=4))
    def append_all(self, counts):
        for count in counts:
            if not self.step(count):
                break
            self.same_contents()
            self.same_numbers()

    def step(self, count):
        running = {i: s + self.fresh(count) for i, s in self.running.items()}
        assert self.m.blocks_for_step(count) == self.need(running)
        ids = list(self.running)
        assert self.m.can_append(ids) == (len(ids) <= self.m.num_free_blocks)
        copies = self.shared_tails(ids)
        if not self.grow(ids, count, lambda: self.m.append_all(count)):
            return False
        self.events["step with copies"] += copies > 0
        self.events["step without copies"] += bool(ids) and not copies
        return True

    @rule(at_most=st.integers(0, 12), reserve=st.integers(0, 3))
    def quiet(self, at_most, reserve):
        """So many steps copy nothing and leave the reserve; if there are any, one more does not."""
        steps = self.m.steps_without_copies(at_most, reserve)
        if 0 < steps < at_most:
            assert self.m.blocks_for_step(steps + 1) > self.m.num_free_blocks - reserve
        for _ in range(steps):
            assert self.shared_tails(list(self.running)) == 0
            assert self.step(1) and self.m.num_free_blocks >= reserve
        self.events["quiet step"] += steps

    @precondition(lambda self: self.running)
    @rule(
        picks=st.lists(st.tuples(PICK, PICK), min_size=1, max_size=4),
        near=st.booleans(),
        steps=st.integers(0, 2),
    )
    def reorder(self, picks, near, steps):
        """`near`: beams of one group, as beam search does it; else any sequence from any."""
        choice = list(self.running)
        if near:
            choice = self.members(self.running, self.family[self.some(self.running, picks[0][0])])
        parents = {self.some(choice, child): self.some(choice, parent) for child, parent in picks}
        before = self.used_blocks()
        freed = self.m.reorder(parents)
        assert sorted(freed) == sorted(before - self.used_blocks())
        self.poison(freed)
        for state in (self.running, self.kept, self.family):
            state.update({child: state[parent] for child, parent in parents.items()})
        moved = {child for child, parent in parents.items() if child != parent}
        self.events["reorder"] += bool(moved)
        self.events["reorder of a parent that moves"] += bool(moved & {parents[c] for c in moved})
        self.append_all([1] * steps)

    # -- swapping and recomputation ---------------------------------------------------------

    def chosen(self, held, pick, drop):
        """All sequences of a group that are in `held`, or for drop > 0 all but one."""
        ids = self.members(held, self.family[self.some(held, pick)])
        if drop and len(ids) > 1:
            del ids[drop % len(ids)]
        return ids

    @precondition(lambda self: self.running)
    @rule(pick=PICK, drop=st.sampled_from([0, 0, 0, 1, 2]))
    def swap_out(self, pick, drop):
        ids = self.chosen(self.running, pick, drop)
        moving = self.moving_pieces(self.running, ids)
        room = len(moving) <= self.m.num_free_cpu_blocks
        assert self.m.can_swap_out(ids) == room
        others = {i: s for i, s in self.running.items() if i not in ids}
        if moving & self.gpu_pieces(others):
            self.events["part of a group refused"] += 1
            refused(self.m, SharedBlockError, lambda: self.m.swap_out(ids))
        elif not room:
            self.events["out of swap space"] += 1
            refused(self.m, OutOfSwapSpaceError, lambda: self.m.swap_out(ids))
        else:
            tables = {i: self.m.block_table(i).blocks.copy() for i in ids}
            pairs = self.m.swap_out(ids)
            assert len(pairs) == len(moving)
            self.move_blocks(pairs, "gpu", "cpu")
            for i, blocks in tables.items():
                self.swapped[i] = self.running.pop(i)
                keep, moved = self.kept[i] // self.size, dict(pairs)
                self.places[i] = blocks[:keep] + [moved[block] for block in blocks[keep:]]
            self.events["swap out"] += 1
            self.events["swap out of several"] += len(ids) > 1
            self.events["swap out behind a prefix"] += any(self.kept[i] for i in ids)

    @precondition(lambda self: self.swapped)
    @rule(pick=PICK, drop=st.sampled_from([0, 0, 0, 1, 2]))
    def swap_in(self, pick, drop):
        ids = self.chosen(self.swapped, pick, drop)
        moving = self.moving_pieces(self.swapped, ids)
        spare = self.m.num_free_blocks - len(moving)
        assert self.m.can_swap_in(ids) == (spare - len(ids) >= self.watermark)
        others = [i for i in self.swapped if i not in ids]
        if moving & self.moving_pieces(self.swapped, others):
            self.events["part of a group refused"] += 1
            refused(self.m, SharedBlockError, lambda: self.m.swap_in(ids))
        elif spare < 0:
            self.events["no room to swap in"] += 1
            refused(self.m, OutOfBlocksError, lambda: self.m.swap_in(ids))
        else:
            pairs = self.m.swap_in(ids)
            assert len(pairs) == len(moving)
            self.move_blocks(pairs, "cpu", "gpu")
            for i in ids:
                self.running[i] = self.swapped.pop(i)
            self.events["swap in"] += 1

    def admit_group(self, ids, generated, prompt_len, prefix_id, finished=0):
        prefix = [] if prefix_id is None else self.prefixes[prefix_id]
        seqs = [
            Sequence(i, prompt_len, 100, len(prefix), count) for i, count in zip(ids, generated)
        ]
        for _ in range(finished):
            seqs.insert(0, Sequence(self.new_id(), prompt_len, 100, len(prefix), 2))
            seqs[0].status = SequenceStatus.FINISHED
        group = SequenceGroup(0, seqs, prefix_id=prefix_id)
        prompt = prefix + self.fresh(prompt_len)
        contents = {i: prompt + self.fresh(count) for i, count in zip(ids, generated)}
        need = self.need(self.running | contents)
        assert self.m.blocks_for_group(group) == need
        fits = self.m.num_free_blocks - need >= self.watermark
        assert self.m.can_admit(group) == fits
        copies = self.attempt(self.running | contents, lambda: self.m.admit(group))
        if copies is None:
            return False
        self.copy_blocks(copies)
        self.running |= contents
        self.new_family(ids, prompt_len, prefix_id, len(prefix))
        for i in ids:
            self.kept[i] = len(prefix) // self.size * self.size
            self.write(i, contents[i], len(prefix))
        self.events["admit"] += 1
        self.events["admit of several behind a prefix"] += len(ids) > 1 and bool(prefix)
        return True

    @rule(
        prompt_len=st.integers(1, 6),
        generated=st.lists(st.integers(0, 4), min_size=1, max_size=3),
        pick=PICK,
        behind=st.booleans(),
        finished=st.integers(0, 1),
    )
    def admit(self, prompt_len, generated, pick, behind, finished):
        prefix_id = self.some(self.prefixes, pick) if behind and self.prefixes else None
        ids = [self.new_id() for _ in generated]
        self.admit_group(ids, generated, prompt_len, prefix_id, finished)

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def recompute(self, pick):
        """Preempt a group by dropping it, and admit it again as one longer prompt."""
        family = self.family[self.some(self.running, pick)]
        lengths = {i: len(self.running[i]) for i in self.members(self.running, family)}
        prompt_len, prefix_id, prefix_len = self.origin[family]
        for i in lengths:
            self.release(i)
        if prefix_id not in self.prefixes:  # its provider has withdrawn it: all is prompt now
            prompt_len, prefix_id, prefix_len = prompt_len + prefix_len, None, 0
        generated = [n - prefix_len - prompt_len for n in lengths.values()]
        if self.admit_group(list(lengths), generated, prompt_len, prefix_id):
            self.events["recompute with tokens"] += any(generated)
            assert all(self.m.num_tokens(i) == n for i, n in lengths.items())

    # -- calls that must be refused ---------------------------------------------------------

    @rule(pick=PICK, kind=st.integers(0, 2), count=st.sampled_from(BAD_COUNTS))
    def illegal(self, pick, kind, count):
        if kind == 0:
            self.unknown_id(pick)
        elif kind == 1:
            self.duplicate_id(pick)
        else:
            self.bad_count(pick, count)

    def unknown_id(self, pick):
        m = self.m
        # Swapped sequences and prefixes are unknown to all that works on running ones.
        for other in [UNUSED, *list(self.swapped)[:1], *list(self.prefixes)[:1]]:
            calls = [
                lambda i=other: m.append(i),
                lambda i=other: m.append(i, 3),
                lambda i=other: m.truncate(i, 1),
                lambda i=other: m.fork(i, UNUSED + 1),
                lambda i=other: m.reorder({i: i}),
                lambda i=other: m.swap_out([i]),
                lambda i=other: m.can_swap_out([i]),
                lambda i=other: m.blocks_for_append([i]),
            ]
            if self.running:
                known = self.some(self.running, pick)
                calls += [
                    lambda i=other, k=known: m.reorder({k: i}),
                    lambda i=other, k=known: m.reorder({i: k}),
                    lambda i=other, k=known: m.swap_out([k, i]),
                ]
            refused(m, UnknownSequenceError, calls[pick % len(calls)])
        for other in [UNUSED, *list(self.running)[:1], *list(self.swapped)[:1]]:
            refused(m, UnknownSequenceError, lambda i=other: m.allocate(UNUSED + 1, 1, i))
        for other in [UNUSED, *list(self.running)[:1], *list(self.prefixes)[:1]]:
            ids = [*list(self.swapped)[:1], other]
            refused(m, UnknownSequenceError, lambda ids=ids: m.swap_in(ids))
            refused(m, UnknownSequenceError, lambda ids=ids: m.can_swap_in(ids))
        refused(m, UnknownSequenceError, lambda: m.free(UNUSED))
        refused(m, UnknownSequenceError, lambda: m.block_table(UNUSED))
        refused(m, UnknownSequenceError, lambda: m.num_tokens(UNUSED))

    def duplicate_id(self, pick):
        m = self.m
        held = {**self.running, **self.swapped, **self.prefixes}
        if not held:
            return
        taken = self.some(held, pick)
        calls = [lambda: m.allocate(taken, 1), lambda: m.allocate_prefix(taken, 1)]
        if self.running:
            parent = self.some(self.running, pick)
            calls.append(lambda: m.fork(parent, taken))
        refused(m, DuplicateSequenceError, calls[pick % len(calls)])
        for ids in ([taken], [UNUSED, taken], [taken, UNUSED]):
            group = SequenceGroup(0, [Sequence(i, 2, 5) for i in ids])
            error = DuplicateSequenceError
            if m.blocks_for_group(group) > m.num_free_blocks:
                error = OutOfBlocksError
            refused(m, error, lambda group=group: m.admit(group))

    def bad_count(self, pick, count):
        m = self.m
        refused(m, ValueError, lambda: m.append_all(count))
        refused(m, ValueError, lambda: m.allocate(UNUSED, count))
        refused(m, ValueError, lambda: m.allocate_prefix(UNUSED, count))
        refused(m, ValueError, lambda: m.can_allocate(count))
        if self.prefixes:
            prefix_id = self.some(self.prefixes, pick)
            refused(m, ValueError, lambda: m.allocate(UNUSED, count or False, prefix_id))  # not 0
        if self.running:
            seq_id = self.some(self.running, pick)
            refused(m, ValueError, lambda: m.append(seq_id, count))
            refused(m, ValueError, lambda: m.truncate(seq_id, count))


class BaselineMachine(Machine):
    """The same for contiguous reservations: slots are an array, a sequence lies at its start."""

    events: ClassVar = Counter()

    @initialize(
        num_blocks=st.integers(4, 20),
        size=st.integers(1, 4),
        policy=st.sampled_from(POLICIES),
        max_len=st.integers(4, 24),
        beams=st.integers(1, 4),
    )
    def start(self, num_blocks, size, policy, max_len, beams):
        self.m = BaselineCacheManager(num_blocks, size, policy=policy, max_len=max_len)
        self.size, self.num_blocks, self.max_len = size, num_blocks, max_len
        self.slots = [None] * (num_blocks * size)
        self.contents, self.final = {}, {}
        self.next_id = self.next_stamp = 0
        for _ in range(beams):
            self.allocate(tokens=2, more=max_len - 2, limit=max_len)
        self.events["rules"] -= 1

    def some(self, pick):
        return sorted(self.contents)[pick % len(self.contents)]

    def write(self, seq_id, start):
        at = self.m.start_slot(seq_id)
        stamps = self.contents[seq_id]
        self.slots[at + start : at + len(stamps)] = stamps[start:]

    def asked(self, num_tokens, final_len, limit):
        """Section 6.1's three answers, written once more."""
        if self.m.policy == "oracle":
            return final_len
        power = 1
        while power < final_len - num_tokens:
            power *= 2
        return limit if self.m.policy == "max" else min(num_tokens + power, limit)

    def chunks_free(self, num_slots):
        """Aligned runs of free blocks, a power of two long, that hold this many slots."""
        blocks, length = -(-num_slots // self.size), 1
        while length < blocks:
            length *= 2
        taken = set()
        for seq_id in self.contents:
            held = self.m.reservation(seq_id)
            mine = set(range(held.start_block, held.start_block + held.num_blocks))
            assert not taken & mine and max(mine) < self.num_blocks
            taken |= mine
        starts = range(0, self.num_blocks - length + 1, length)
        return sum(taken.isdisjoint(range(s, s + length)) for s in starts)

    @invariant()
    def same_contents(self):
        m = self.m
        m.check_invariants()
        assert m.running_ids == list(self.contents)
        for seq_id, stamps in self.contents.items():
            assert m.num_tokens(seq_id) == len(stamps)
            at = m.start_slot(seq_id)
            assert self.slots[at : at + len(stamps)] == stamps
        usage = m.usage()
        tokens = sum(map(len, self.contents.values()))
        assert usage.tokens == usage.logical_tokens == tokens
        assert usage.reserved == sum(self.final.values()) - tokens
        assert usage.padding == 0

    @rule(tokens=st.integers(1, 9), more=st.integers(0, 9), limit=st.integers(2, 16))
    def allocate(self, tokens, more, limit):
        seq_id, final = self.next_id, tokens + more
        self.next_id += 1
        limit = min(limit, self.max_len)
        call = lambda: self.m.allocate(seq_id, tokens, final, limit)  # noqa: E731
        if final > limit:
            refused(self.m, ReservationError, call)
            refused(self.m, ReservationError, lambda: self.m.can_allocate(tokens, final, limit))
            return
        asked = self.asked(tokens, final, limit)
        assert self.m.slots_to_ask(tokens, final, limit) == asked
        chunks = self.chunks_free(asked)
        for count in range(4):
            assert self.m.can_allocate(tokens, final, limit, count) == (count <= chunks)
        if not chunks:
            self.events["out of blocks"] += 1
            refused(self.m, OutOfBlocksError, call)
        else:
            call()
            self.contents[seq_id], self.final[seq_id] = self.fresh(tokens), final
            self.write(seq_id, 0)

    @rule(
        tokens=st.integers(1, 6),
        output=st.integers(2, 6),
        generated=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        finished=st.booleans(),
    )
    def admit(self, tokens, output, generated, finished):
        ids = list(range(self.next_id, self.next_id + len(generated)))
        self.next_id += len(generated)
        seqs = [Sequence(i, tokens, output, 0, g) for i, g in zip(ids, generated)]
        if finished and len(seqs) > 1:
            seqs[0].status = SequenceStatus.FINISHED
        group = SequenceGroup(0, seqs.copy())
        seqs = [seq for seq in seqs if seq.status is not SequenceStatus.FINISHED]
        if tokens + output > self.max_len:
            refused(self.m, ReservationError, lambda: self.m.admit(group))
            return
        most = max(self.asked(s.num_tokens, s.final_len, self.max_len) for s in seqs)
        fits = len(seqs) <= self.chunks_free(most)
        assert self.m.can_admit(group) == fits
        if not fits:
            self.events["out of blocks"] += 1
            refused(self.m, OutOfBlocksError, lambda: self.m.admit(group))
            return
        assert self.m.admit(group) == ()
        self.events["admit"] += 1
        for seq in seqs:
            self.contents[seq.seq_id] = self.fresh(seq.num_tokens)
            self.final[seq.seq_id] = seq.final_len
            self.write(seq.seq_id, 0)

    @precondition(lambda self: self.contents)
    @rule(pick=PICK, count=st.integers(1, 3))
    def append(self, pick, count):
        seq_id = self.some(pick)
        length = len(self.contents[seq_id])
        assert self.m.can_append([seq_id]) == (length < self.final[seq_id])
        if length + count > self.final[seq_id]:
            self.events["final length"] += 1
            refused(self.m, ReservationError, lambda: self.m.append(seq_id, count))
            return
        assert self.m.append(seq_id, count) == ()
        self.contents[seq_id] += self.fresh(count)
        self.write(seq_id, length)

    @precondition(lambda self: self.contents)
    @rule(pick=PICK, length=st.integers(0, 9))
    def truncate(self, pick, length):
        seq_id = self.some(pick)
        if not 1 <= length <= len(self.contents[seq_id]):
            refused(self.m, ValueError, lambda: self.m.truncate(seq_id, length))
            return
        assert self.m.truncate(seq_id, length) == []
        self.events["truncate"] += length < len(self.contents[seq_id])
        del self.contents[seq_id][length:]

    @rule(count=st.sampled_from([1, 1, 1, 2]))
    def append_all(self, count):
        left = [self.final[i] - len(stamps) for i, stamps in self.contents.items()]
        if left and min(left) < count:
            self.events["final length"] += 1
            refused(self.m, ReservationError, lambda: self.m.append_all(count))
            return
        assert self.m.append_all(count) == ()
        self.events["step"] += bool(left)
        for seq_id, stamps in self.contents.items():
            stamps += self.fresh(count)
            self.write(seq_id, len(stamps) - count)

    @precondition(lambda self: self.contents)
    @rule(picks=st.lists(st.tuples(PICK, PICK), min_size=1, max_size=4))
    def reorder(self, picks):
        parents = {self.some(child): self.some(parent) for child, parent in picks}
        if any(len(self.contents[a]) != len(self.contents[b]) for a, b in parents.items()):
            refused(self.m, ReservationError, lambda: self.m.reorder(parents))
            return
        old = self.slots.copy()
        for source, destination, count in self.m.reorder(parents):
            self.slots[destination : destination + count] = old[source : source + count]
        self.contents.update({a: self.contents[b].copy() for a, b in parents.items()})
        self.events["reorder"] += any(a != b for a, b in parents.items())

    @precondition(lambda self: self.contents)
    @rule(pick=PICK)
    def free(self, pick):
        self.release(self.some(pick))

    @rule()
    def free_the_finished(self):
        for seq_id in [i for i, final in self.final.items() if len(self.contents[i]) == final]:
            self.release(seq_id)

    def release(self, seq_id):
        for block in self.m.free(seq_id):
            self.slots[block * self.size : (block + 1) * self.size] = [None] * self.size
        del self.contents[seq_id], self.final[seq_id]

    @rule(pick=PICK, count=st.sampled_from(BAD_COUNTS))
    def illegal(self, pick, count):
        m = self.m
        for call in (m.append, m.free, m.num_tokens, m.reservation, lambda i: m.reorder({i: i})):
            refused(m, UnknownSequenceError, lambda call=call: call(UNUSED))
        refused(m, ValueError, lambda: m.allocate(UNUSED, count, 4))
        refused(m, ValueError, lambda: m.append_all(count))
        if self.contents:
            seq_id = self.some(pick)
            refused(m, ValueError, lambda: m.append(seq_id, count))
            refused(m, ValueError, lambda: m.truncate(seq_id, count))
            refused(m, DuplicateSequenceError, lambda: m.allocate(seq_id, 1, 2))


# What a run must have gone through to count: a shadow that agrees about nothing proves nothing.
PAGED_EVENTS = {
    "quiet step": 100,
    "steps": 2000,
    "step with copies": 50,
    "step without copies": 200,
    "copies": 100,
    "copy on write": 50,
    "several copies": 3,
    "prefix tail copied": 20,
    "tokens held twice": 100,
    "out of blocks": 100,
    "swap out": 40,
    "swap out of several": 10,
    "swap out behind a prefix": 5,
    "swap in": 15,
    "out of swap space": 10,
    "part of a group refused": 10,
    "reorder": 50,
    "reorder of a parent that moves": 10,
    "admit": 30,
    "admit of several behind a prefix": 5,
    "recompute with tokens": 15,
    "truncate": 30,
    "truncate to a block's end": 10,
    "truncate inside a shared block": 5,
}
BASELINE_EVENTS = {
    "out of blocks": 50,
    "final length": 50,
    "step": 50,
    "admit": 30,
    "reorder": 10,
    "truncate": 30,
}


def assert_exercised(machine, least):
    rare = {event: machine.events[event] for event, n in least.items() if machine.events[event] < n}
    assert not rare, f"hardly exercised: {rare}"


def run_machine(machine, how, least):
    machine.events.clear()
    run_state_machine_as_test(machine, settings=how)
    assert_exercised(machine, least)
    return machine.events["rules"]


def test_paged_manager_against_contents(figure):
    figure("state machine, paged", rules=run_machine(PagedMachine, SHORT, PAGED_EVENTS))


def test_baseline_manager_against_contents(figure):
    how = settings(SHORT, max_examples=180)
    figure("state machine, baseline", rules=run_machine(BaselineMachine, how, BASELINE_EVENTS))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    ("machine", "least"),
    [(PagedMachine, PAGED_EVENTS), (BaselineMachine, BASELINE_EVENTS)],
    ids=["paged", "baseline"],
)
def test_a_manager_against_contents_for_long(machine, least, part, figure):
    """Rounds with seeds of this part until its share of RULE_STEPS rules has run."""
    machine.events.clear()
    begin, rounds = time.process_time(), 0
    while machine.events["rules"] < RULE_STEPS / PARTS:
        one_of_its_own = type(machine.__name__, (machine,), {})  # which keeps the seed
        seed = part + PARTS * rounds
        run_state_machine_as_test(seeded(seed)(one_of_its_own), settings=ROUND)
        rounds += 1
    assert_exercised(machine, least)
    events = {event: machine.events[event] for event in ("rules", *least)}
    seconds = round(time.process_time() - begin, 1)
    figure(f"{machine.__name__} for long", seeds=rounds, **events, seconds=seconds)
