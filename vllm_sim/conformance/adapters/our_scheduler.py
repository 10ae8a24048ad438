"""Our `Scheduler` over our `PagedKVCacheManager`: one iteration at a time, as the engine does.

Searches section 4.5 of the paper: requests in any order, samples, beams that change parents, a
shared prefix, preemption by swap and by recomputation, sequences that end at once. What an
iteration does to the slots is told in the order in which tensors follow it: swap out, swap in,
copy, then prompts and decodes. CPU blocks have the numbers behind those of the GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from kv_cache_manager import PagedKVCacheManager
from sequence import Sequence, SequenceGroup
from vllm_sim.conformance.adapter import NOTHING, Operation, Pass, Step, Tables
from vllm_sim.conformance.adapters.paged_manager import copied
from vllm_sim.conformance.tools import Names, slot_pairs, slots_of
from vllm_sim.serving.scheduler import Iteration, Limits, Scheduler

PREFIX, LIMITS = 1000, Limits(12, 6)


@dataclass(frozen=True)
class Kind:
    """A request: tokens of its prompt, output of each of its sequences, which beam each continues
    after each token, and whether it stands behind the shared prefix."""

    prompt: int
    outputs: tuple[int, ...]
    parents: tuple[tuple[int, ...], ...] | None = None
    behind: bool = False

    def __str__(self) -> str:
        lengths = ", ".join(map(str, self.outputs))
        beams, behind = " beams" * bool(self.parents), " behind the prefix" * self.behind
        return f"{self.prompt}+({lengths}){beams}{behind}"


@dataclass(frozen=True)
class World:
    """Blocks on the GPU and on the CPU, the requests, and how room is made."""

    gpu: int
    cpu: int
    kinds: tuple[Kind, ...]
    mode: str = "auto"
    watermark: float = 0.0
    prefix_len: int = 0
    block_size: int = 2

    @property
    def num_blocks(self) -> int:
        return self.gpu + self.cpu

    def __str__(self) -> str:
        return f"{self.gpu} + {self.cpu} blocks, {'; '.join(map(str, self.kinds))}; {self.mode}"


BEAMS = Kind(1, (4, 4), ((0, 0), (1, 1), (1, 0), (0, 1)))
SAMPLES, PAIR, BEHIND = Kind(3, (3, 3)), Kind(1, (1, 3)), Kind(1, (4,), None, True)


class OurScheduler:
    """The adapter."""

    worlds: ClassVar = {
        "small": World(9, 6, (BEAMS, SAMPLES, Kind(1, (5,)), BEHIND), prefix_len=3),
        "swap": World(6, 4, (BEAMS, SAMPLES, PAIR, Kind(2, (6,))), "swap", 0.2),
        "large": World(
            9, 6, (BEAMS, SAMPLES, PAIR, Kind(1, (5,)), BEHIND, Kind(4, (6,))), "auto", 0.1, 3
        ),
    }
    required = (
        *("submit", "step", "step that ends them", "copy", "shared block", "swapped out"),
        *("swapped in", "recomputed", "a beam moves", "a group waits"),
    )

    def start(self, world: World) -> Step | None:
        self.world, self.last = world, 0
        room = {"num_cpu_blocks": world.cpu, "watermark": world.watermark}
        self.manager = PagedKVCacheManager(world.gpu, world.block_size, **room)
        self.scheduler = Scheduler(self.manager, LIMITS, world.mode)
        self.groups: dict[int, SequenceGroup] = {}
        self.tokens: dict[int, list[int]] = {}  # of a sequence, those of a prefix included
        if not world.prefix_len:
            return None
        self.manager.allocate_prefix(PREFIX, world.prefix_len)
        self.tokens[PREFIX] = self._new(world.prefix_len)
        return Step((), [self._pass(PREFIX, 0)])

    def __deepcopy__(self, memo: dict) -> OurScheduler:
        new = memo[id(self)] = object.__new__(OurScheduler)
        memo[id(self.manager)] = copied(self.manager)
        memo[id(self.world)] = self.world
        new.__dict__ |= {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        return new

    def _new(self, count: int) -> list[int]:
        """Tokens that nobody else has."""
        self.last += count
        return [*range(self.last - count + 1, self.last + 1)]

    def _pass(self, i: int, start: int) -> Pass:
        blocks, tokens = self.manager.block_table(i).blocks, self.tokens[i]
        return Pass(i, tuple(tokens), start, slots_of(blocks, len(tokens), self.world.block_size))

    # -- the adapter ----------------------------------------------------------------------------

    def operations(self) -> list[Operation]:
        self.manager.check_invariants()
        there = PREFIX in self.tokens
        kinds = [(n, kind) for n, kind in enumerate(self.world.kinds) if n not in self.groups]
        found = [Operation("submit", (n,)) for n, kind in kinds if there or not kind.behind]
        if not self.scheduler.idle:
            return [*found, Operation("step", (), progress=True), Operation("step that ends them")]
        return found + [Operation("free prefix", (), progress=True)] * there

    def apply(self, operation: Operation) -> Step:
        name, args, *_ = operation
        if name == "submit":
            return self._submit(args[0])
        if name == "free prefix":
            self.manager.free(PREFIX)
            del self.tokens[PREFIX]
            return NOTHING
        scheduler, first, size = self.scheduler, self.world.gpu, self.world.block_size
        iteration = scheduler.schedule()
        out = [(old, first + new) for old, new in iteration.swapped_out]
        back = [(first + old, new) for old, new in iteration.swapped_in]
        copies = [slot_pairs(pairs, size) for pairs in (out, back, iteration.copies)]
        passes = self._passes(iteration)
        ran = [(group, group.unfinished()) for group in scheduler.running]
        if name != "step":
            for group, seqs in ran:
                scheduler.end(group, seqs)
        completion = scheduler.complete()
        moved = {child: parent for one in completion.reorders for child, parent in one.items()}
        before = {seq.seq_id: self.tokens[seq.seq_id] for _, seqs in ran for seq in seqs}
        for i in before:
            self.tokens[i] = before[moved.get(i, i)] + self._new(1)
        events = ["swapped out"] * bool(out) + ["swapped in"] * bool(back)
        events += ["recomputed"] * bool(iteration.num_recomputations)
        events += ["a beam moves"] * bool(moved)
        events += ["a group waits"] * bool(scheduler.waiting)
        return Step(copies, passes, events)

    def _submit(self, number: int) -> Step:
        kind = self.world.kinds[number]
        prefix = self.world.prefix_len if kind.behind else 0
        seqs = [
            Sequence(10 * number + at, kind.prompt, output, prefix)
            for at, output in enumerate(kind.outputs)
        ]
        parents = [[*row] for row in kind.parents] if kind.parents else None
        prompt = self.tokens.get(PREFIX, [])[:prefix] + self._new(kind.prompt)
        order = float(len(self.groups)), PREFIX if kind.behind else None, parents
        self.groups[number] = SequenceGroup(number, seqs, *order)
        self.tokens |= {seq.seq_id: prompt for seq in seqs}
        self.scheduler.add(self.groups[number])
        return NOTHING

    def _passes(self, iteration: Iteration) -> list[Pass]:
        """As the engine gathers them: decodes first, then prompts; of a recomputed group what an
        earlier sequence does not write into blocks that both hold."""
        passes = [
            self._pass(seq.seq_id, len(self.tokens[seq.seq_id]) - 1)
            for group in iteration.decodes
            for seq in group.unfinished()
        ]
        for group in iteration.prefills:
            written: set[int] = set()
            seqs: Seq[Sequence] = group.unfinished()
            for seq in seqs if seqs[0].num_generated else seqs[:1]:
                blocks = self.manager.block_table(seq.seq_id).blocks
                shared = next(at for at, block in enumerate(blocks) if block not in written)
                start = max(seq.prefix_len, shared * self.world.block_size)
                passes.append(self._pass(seq.seq_id, start))
                written.update(blocks)
        return passes

    def _blocks(self) -> dict[int, list[int]]:
        m, first = self.manager, self.world.gpu
        found = {i: t.blocks for tables in (m._tables, m._prefixes) for i, t in tables.items()}
        for i, t in m._swapped.items():
            keep = t.num_prefix_blocks
            found[i] = t.blocks[:keep] + [first + b for b in t.blocks[keep:]]
        return found

    def tables(self) -> Tables:
        """The last token that was generated is not stored yet."""
        return {
            i: (tuple(blocks), self.tokens[i][:-1] if i != PREFIX else self.tokens[i])
            for i, blocks in self._blocks().items()
        }

    def free(self) -> list[int]:
        behind = self.manager._cpu.free_blocks
        return self.manager._gpu.free_blocks + [self.world.gpu + b for b in behind]

    def ref_counts(self) -> dict[int, int]:
        m, first = self.manager, self.world.gpu
        extra = m._gpu.extra_refs | {first + b: n for b, n in m._cpu.extra_refs.items()}
        held = {b for blocks in self._blocks().values() for b in blocks}
        return {b: 1 + extra.get(b, 0) for b in held | extra.keys()}

    def cached(self) -> dict:
        return {}

    def key(self) -> tuple:
        name, scheduler, blocks = Names(), self.scheduler, self._blocks()
        rows = tuple(
            (
                number,
                group.num_preemptions > 0,
                tuple(
                    (
                        seq.status.value,
                        seq.num_generated,
                        seq.output_len,
                        name(blocks.get(seq.seq_id, ())),
                    )
                    for seq in group.seqs
                ),
            )
            for number, group in self.groups.items()  # by arrival, which decides
            if not group.finished
        )
        done = frozenset(number for number, group in self.groups.items() if group.finished)
        queues = scheduler.waiting, scheduler.running, scheduler.swapped
        order = tuple(tuple(group.group_id for group in queue) for queue in queues)
        return (
            rows,
            done,
            order,
            scheduler._settled,
            scheduler._widest,
            name(blocks.get(PREFIX, ())),
        )
