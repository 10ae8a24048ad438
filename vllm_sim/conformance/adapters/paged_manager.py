"""Our `PagedKVCacheManager` alone: every call in every state, with what each must do.

Searches sections 4.2-4.5 of the paper. What is to be refused, and how many blocks the rest takes,
is worked out from the block tables alone. Two states are one if they differ only in the names of
blocks and sequences, in the time, and in the order of the free lists. CPU blocks have the numbers
behind those of the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import kv_cache_manager as ours
from allocators import BlockAllocator
from kv_cache_manager import OutOfBlocksError, PagedKVCacheManager, UnknownSequenceError
from sequence import Clock, Sequence, SequenceGroup
from vllm_sim.conformance.adapter import Operation, Pass, Step, Tables
from vllm_sim.conformance.tools import canonical, slot_pairs, slots_of

SIZE = 2
PREFIX, STRANGER = 100, 10**6
REFUSED = {
    "OutOfBlocksError": "allocate admit append append_all swap_in",
    "DuplicateSequenceError": "allocate admit fork",
    "UnknownSequenceError": "allocate append fork free reorder swap_in swap_out truncate",
    "ValueError": "append_all truncate",
    "SharedBlockError": "swap_in swap_out",
    "OutOfSwapSpaceError": "swap_out",
}


@dataclass(frozen=True)
class World:
    """Blocks on the GPU and on the CPU, sequences alive at once, tokens of a shared prefix."""

    gpu: int
    cpu: int
    num_seqs: int
    prefix_len: int = 0
    block_size: int = SIZE

    @property
    def num_blocks(self) -> int:
        return self.gpu + self.cpu

    def __str__(self) -> str:
        behind = f", a prefix of {self.prefix_len} tokens" if self.prefix_len else ""
        return f"{self.gpu} + {self.cpu} blocks, {self.num_seqs} sequences{behind}"


class PagedManager:
    """The adapter. `operations()` works out from the tables what each call must do."""

    worlds: ClassVar = {
        "small": World(5, 2, 3),
        "prefix": World(5, 3, 3, 3),
        "large": World(5, 3, 4),
        "large-prefix": World(6, 3, 3, 3),
        "tiny": World(3, 2, 2),
    }
    required = (
        *("allocate", "try_admit", "admit", "append", "append_all", "fork", "truncate", "reorder"),
        *("swap_out", "swap_in", "recompute", "free", "copy on write"),
        *("last holder writes in place", "reorder of a parent that moves", "try_admit declines"),
        *("swap_in of shared blocks", "swap_out of shared blocks"),
        *("truncate inside a shared block",),
        *(f"{call}: {error}" for error, calls in REFUSED.items() for call in calls.split()),
    )

    def start(self, world: World) -> Step | None:
        self.world, self.last, self.noted = world, 0, []
        self.manager = PagedKVCacheManager(
            world.gpu, SIZE, num_cpu_blocks=world.cpu, watermark=0.25
        )
        self.tokens: dict[int, tuple[int, ...]] = {}  # no two are written with the same number
        if not world.prefix_len:
            return None
        self.manager.allocate_prefix(PREFIX, world.prefix_len)
        return Step((), [self._write(PREFIX, 0, world.prefix_len)])

    def __deepcopy__(self, _: dict) -> PagedManager:
        new = object.__new__(PagedManager)
        new.world, new.last, new.noted = self.world, self.last, self.noted.copy()
        new.tokens, new.manager = self.tokens.copy(), copied(self.manager)
        return new

    # -- what is there ----------------------------------------------------------------------

    def _blocks(self) -> Iterator[tuple[int, list[int], object, int]]:
        """(sequence, its blocks, its table, where it is) of each."""
        m, first = self.manager, self.world.gpu
        for place, tables in enumerate((m._tables, m._swapped, m._prefixes)):
            for i, t in tables.items():
                keep = t.num_prefix_blocks if place == 1 else len(t.blocks)
                yield i, t.blocks[:keep] + [first + b for b in t.blocks[keep:]], t, place

    def tables(self) -> Tables:
        return {i: (blocks, self.tokens[i]) for i, blocks, *_ in self._blocks()}

    def free(self) -> list[int]:
        pool, behind = self.manager._gpu.free_blocks, self.manager._cpu.free_blocks
        return pool + [self.world.gpu + b for b in behind]

    def ref_counts(self) -> dict[int, int]:
        m, first = self.manager, self.world.gpu
        extra = m._gpu.extra_refs | {first + b: n for b, n in m._cpu.extra_refs.items()}
        return {b: 1 + extra.get(b, 0) for _, blocks, *_ in self._blocks() for b in blocks} | {
            b: 1 + n for b, n in extra.items()
        }

    def cached(self) -> dict:
        return {}

    def key(self) -> bytes:
        extra, first = self.manager._gpu.extra_refs, self.world.gpu
        cpu, rows = self.manager._cpu.extra_refs, []
        for _, blocks, t, place in self._blocks():
            held = [extra.get(b, 0) if b < first else cpu.get(b - first, 0) for b in blocks]
            rows.append(((place, t.unfilled, t.num_prefix_blocks, held), blocks))
        return canonical(rows)

    # -- what is called ---------------------------------------------------------------------

    def apply(self, operation: Operation) -> Step:
        name, args, *_ = operation
        m, before, events = self.manager, set(self.manager._gpu.free_blocks), [*self.noted]
        call, first = getattr(m, name, None), self.world.gpu
        ids = [args[0]] if name == "append" else m.running_ids if name == "append_all" else []
        tails = {i: t.blocks[-1] for i in ids if (t := m._tables.get(i)) and t.unfilled}
        tails = {i: b for i, b in tails.items() if m.ref_count(b) > 1}
        if name == "recompute":
            ids, group = args[0], group_of(*args)
            for i in ids:
                m.free(i)
            copies = m.admit(group) if m.can_admit(group) else None
            for i in ids if copies is None else ():
                del self.tokens[i]
            return Step() if copies is None else self._admitted(*args, copies)
        if name in ("admit", "try_admit"):
            return self._admitted(*args, call(group_of(*args)))
        result = call(dict(args)) if name == "reorder" else call(*args)
        if name == "allocate":
            return self._admitted(args[:1], args[1], (0,), args[2], 0, result)
        if name in ("append", "append_all"):
            for i, block in tails.items():
                place = m._tables[i].blocks[(len(self.tokens[i]) - 1) // SIZE]
                events.append("last holder writes in place" if place == block else "copy on write")
            passes = [self._write(i, len(self.tokens[i]), args[-1]) for i in ids]
            return Step((slot_pairs(result, SIZE),), passes, events)
        if name in ("swap_out", "swap_in"):
            shared = any(
                pool.ref_count(b) > 1
                for _, b in result
                for pool in ([m._cpu] if name == "swap_out" else [m._gpu])
            )
            events += [f"{name} of shared blocks"] * shared
            pairs = [(b, first + c) if name == "swap_out" else (first + b, c) for b, c in result]
            return Step((slot_pairs(pairs, SIZE),), (), events)
        if name == "fork":
            self.tokens[args[1]] = self.tokens[args[0]]
            return Step((), (), events)
        if name == "truncate":
            inside = args[1] % SIZE and m.ref_count(m._tables[args[0]].blocks[-1]) > 1
            events += ["truncate inside a shared block"] * bool(inside)
            self.tokens[args[0]] = self.tokens[args[0]][: args[1]]
        elif name == "reorder":
            events += ["reorder of a parent that moves"] * any(a in dict(args) for _, a in args)
            self.tokens |= {a: self.tokens[b] for a, b in args}
        else:
            del self.tokens[args[0]]
        assert sorted(result) == sorted({*m._gpu.free_blocks} - before), "not the blocks it freed"
        return Step((), (), events)

    def _write(self, i: int, start: int, count: int) -> Pass:
        """The next `count` tokens of a sequence from `start` on."""
        new = tuple(range(self.last + 1, self.last + count + 1))
        self.last += count
        self.tokens[i] = self.tokens.get(i, ())[:start] + new
        return self._pass(i, start)

    def _pass(self, i: int, start: int) -> Pass:
        blocks, tokens = self.manager.block_table(i).blocks, self.tokens[i]
        return Pass(i, tokens, start, slots_of(blocks, len(tokens), SIZE))

    def _admitted(
        self,
        ids: tuple,
        prompt: int,
        generated: tuple,
        prefix_id: int | None,
        _: int,
        copies: tuple,
    ) -> Step:
        """The prompt is computed by the first, what was generated by each, but for whole blocks
        that another has written: as the engine does."""
        context = self.tokens[prefix_id] if prefix_id is not None else ()
        start, passes, written = len(context), [], set()
        self.last += prompt
        context += tuple(range(self.last - prompt + 1, self.last + 1))
        for i, count in zip(ids, generated):
            self.tokens[i] = context
            self._write(i, len(context), count)
            blocks = self.manager.block_table(i).blocks
            shared = next((n for n, b in enumerate(blocks) if b not in written), len(blocks))
            if shared < len(blocks) or not passes:
                passes.append(self._pass(i, max(start, shared * SIZE)))
            written.update(blocks)
        return Step((slot_pairs(copies, SIZE),), passes, self.noted)

    # -- what may be called -----------------------------------------------------------------

    def operations(self) -> list[Operation]:
        """Each call, for one of the sequences that can stand in for each other."""
        m, self.noted = self.manager, []
        m.check_invariants()
        self.spare = m.num_free_blocks - m.watermark_blocks
        self.length, self.held, self.kinds, movable = {}, {}, {}, {}
        for i, blocks, t, place in self._blocks():
            self.length[i], self.held[i] = t.num_tokens, blocks
            self.kinds.setdefault((place, *blocks, t.num_tokens), []).append(i)
            movable[i] = blocks[t.num_prefix_blocks :]
        self.holders = Counter(b for blocks in self.held.values() for b in blocks)
        firsts = [ids[0] for ids in self.kinds.values()]
        running, swapped, prefixes = [*m._tables], [*m._swapped], [*m._prefixes]
        grown = [i for i in firsts if i in m._tables]
        unused = [i for i in range(self.world.num_seqs) if i not in self.length]
        found = [*self._admission(unused, prefixes)] if unused else []
        for ids, name in [((i,), "append") for i in grown] + [(running, "append_all")]:
            for count in (1, 3):
                need = self._need(ids, count)
                args = (*ids, count) if name == "append" else (count,)
                found.append(self._takes(need, name, *args))
        assert m.blocks_for_append(running) == m.blocks_for_step(1) == self._need(running, 1)
        assert m.blocks_for_step(3) == self._need(running, 3)
        for i in grown:
            length, end = self.length[i], (self.length[i] - 1) // SIZE * SIZE
            for keep in sorted({1, length - 1, end, length} - {0}):
                found.append(Operation("truncate", (i, keep)))
            found.append(Operation("truncate", (i, length + 1), ValueError))
            found += [Operation("fork", (i, unused[0]), None, 0)] if unused else []
        moves = [((a, b),) for a in grown for b in grown if a != b]
        moves += [((a, b), (b, a)) for a in grown for b in grown if a < b]
        moves += [tuple(zip(grown, grown[1:] + grown[:1]))] if len(grown) > 2 else []
        moves += [tuple((i, grown[0]) for i in running)] if len(running) > 1 else []
        found += [Operation("reorder", move) for move in moves]
        found += self._swaps(running, True, movable)
        found += self._swaps(swapped, False, movable)
        found += [Operation("free", (i,)) for i in firsts]
        return found + [*self._illegal(running, swapped, prefixes)]

    def _need(self, ids: Iterable[int], count: int) -> int:
        """Blocks for `count` tokens more of each: the last to write a shared block has it."""
        tails = Counter(self.held[i][-1] for i in ids if self.length[i] % SIZE)
        copies = sum(min(n, self.holders[tail] - 1) for tail, n in tails.items())
        return copies + sum(
            blocks_of(self.length[i] + count) - blocks_of(self.length[i]) for i in ids
        )

    def _takes(self, need: int, name: str, *args: object) -> Operation:
        short = need > self.manager.num_free_blocks
        return Operation(name, args, OutOfBlocksError if short else None, need)

    def _admission(self, unused: list[int], prefixes: list[int]) -> Iterator[Operation]:
        m, i = self.manager, unused[0]
        for prefix_id, prefix in [(None, 0)] + [(i, self.length[i]) for i in prefixes]:
            for count in (1, 2, 2 * m.num_blocks + 1):
                need = blocks_of(prefix + count) - prefix // SIZE
                assert m.can_allocate(count, prefix_id) == (need <= self.spare)
                yield self._takes(need, "allocate", i, count, prefix_id)
            kinds = [(1, (0,)), (3, (0,)), (2, (0, 1)), (1, (1, 1)), (1, (0, 0))]
            for prompt, generated in kinds if len(unused) > 1 else kinds[:2]:
                full = (prefix + prompt) // SIZE
                need = full - prefix // SIZE + ((prefix + prompt) % SIZE > 0 and 0 in generated)
                need += sum(blocks_of(prefix + prompt + n) - full for n in generated if n)
                args = tuple(unused[: len(generated)]), prompt, generated, prefix_id, prefix
                fits, group = need <= self.spare, group_of(*args)
                assert m.can_admit(group) == fits
                if not fits:
                    before = m.num_free_blocks, m.running_ids
                    assert m.try_admit(group) is None
                    assert before == (m.num_free_blocks, m.running_ids), "it declined"
                    self.noted.append("try_admit declines")
                yield self._takes(need, "try_admit" if fits else "admit", *args)

    def _swaps(self, ids: list[int], out: bool, movable: dict) -> Iterator[Operation]:
        """Of the smallest sets that share blocks that move, of all of them, and of their parts."""
        m, name = self.manager, "swap_out" if out else "swap_in"
        room = m.num_free_cpu_blocks if out else m.num_free_blocks
        groups: list[tuple[set, set]] = []
        for i in ids:
            own = {i}, set(movable[i])
            for other in [g for g in groups if g[1] & own[1]]:
                groups.remove(other)
                own = own[0] | other[0], own[1] | other[1]
            groups.append(own)
        sets = [sorted(group) for group, _ in groups]
        parts = [group[1:] for group in sets if len(group) > 1]
        for group in sets + ([ids] if len(sets) > 1 else []) + parts:
            moving = Counter(b for i in group for b in movable[i])
            full, fits = ours.OutOfSwapSpaceError if out else OutOfBlocksError, len(moving) <= room
            if out:
                assert m.can_swap_out(group) == fits
            else:
                enough = room - len(moving) - len(group) >= m.watermark_blocks
                assert m.can_swap_in(group) == enough
            shared = any(self.holders[b] != n for b, n in moving.items())
            assert shared or group not in parts
            error = ours.SharedBlockError if shared else None if fits else full
            yield Operation(name, (tuple(group),), error, 0)
        for group in sets if out else ():  # section 4.5: drop it, and admit it as a longer prompt
            least = min(self.length[i] for i in group)
            generated = tuple(self.length[i] - least for i in group)
            yield Operation("recompute", (tuple(group), least, generated, None, 0))

    def _illegal(self, running: list, swapped: list, prefixes: list) -> Iterator[Operation]:
        """Calls that no state allows, and those that this one does not: in their least cases."""
        unknown, twice, new = UnknownSequenceError, ours.DuplicateSequenceError, STRANGER + 1
        for i in [STRANGER, *swapped[:1], *prefixes]:
            yield Operation("append", (i, 1), unknown)
            yield Operation("truncate", (i, 1), unknown)
            yield Operation("fork", (i, new), unknown)
            yield Operation("swap_out", ((*running, i),), unknown)
            if running:
                yield Operation("reorder", ((running[0], i),), unknown)
        for i in [STRANGER, *running[:1]]:
            yield Operation("swap_in", ((*swapped, i),), unknown)
            yield Operation("allocate", (new, 1, i), unknown)
        yield Operation("free", (STRANGER,), unknown)
        for i in [*running[:1], *swapped[:1], *prefixes]:
            yield Operation("allocate", (i, 1), twice)
            if running:
                yield Operation("fork", (running[0], i), twice)
            if self.manager.num_free_blocks:
                yield Operation("admit", ((STRANGER, i), 1, (0, 0), None, 0), twice)
        yield Operation("append_all", (0,), ValueError)


def copied(m: PagedKVCacheManager) -> PagedKVCacheManager:
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
    for name in ("_gpu", "_cpu"):
        old, pool = getattr(m, name), object.__new__(BlockAllocator)
        pool.num_blocks, pool.free_blocks = old.num_blocks, old.free_blocks.copy()
        pool.extra_refs = old.extra_refs.copy()
        setattr(new, name, pool)
    return new


def blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // SIZE)


def group_of(
    ids: Iterable[int],
    prompt: int,
    generated: Iterable[int],
    prefix_id: int | None = None,
    prefix: int = 0,
) -> SequenceGroup:
    seqs = [Sequence(i, prompt, 64, prefix, n) for i, n in zip(ids, generated)]
    return SequenceGroup(0, seqs, prefix_id=prefix_id)
