"""One iteration at a time: who grows, who gives way, who comes back, who is admitted.

Reproduces: section 4.5 (first come first served; the latest arrived is preempted first; all
sequences of a group together; swap or recompute; nothing new is admitted while anything is
swapped out) with the rules of the authors' artifact where the paper is silent: the watermark, the
limit on batched tokens, the order in which running, swapped and waiting groups are served.

    scheduler = Scheduler(PagedKVCacheManager(983, 16), Limits(2560, 2048))
    scheduler.add(group)
    iteration = scheduler.schedule()     # what the tensors must do now
    completion = scheduler.complete()    # what is finished, which beams changed parents

Bookkeeping only. serving.py runs it over a workload.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from kv_cache_manager import (
    BaselineCacheManager,
    BlockPairs,
    CacheError,
    PagedKVCacheManager,
    RequestTooLargeError,
)
from sequence import SequenceGroup, SequenceStatus

Manager = PagedKVCacheManager | BaselineCacheManager
PREEMPTION_MODES = ("auto", "swap", "recompute")


class StalledError(CacheError):
    """Requests are left, but an iteration can do nothing for any of them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an iteration may hold: prompt and decode tokens, and sequences."""

    max_batched_tokens: int
    max_num_seqs: int

    def __post_init__(self) -> None:
        if self.max_batched_tokens < 1 or self.max_num_seqs < 1:
            raise ValueError(f"limits must be positive, got {self}")


@dataclass(slots=True)
class Iteration:
    """What one iteration does, in the order in which tensors must follow:
    swap out, forget freed blocks, swap in, copy, then write K and V of prefills and decodes."""

    index: int
    start_s: float
    swapped_out: BlockPairs = ()
    freed: list[int] = field(default_factory=list)
    swapped_in: BlockPairs = ()
    copies: BlockPairs = ()
    prefills: list[SequenceGroup] = field(default_factory=list)
    decodes: list[SequenceGroup] = field(default_factory=list)
    num_swaps: int = 0
    num_recomputations: int = 0

    @property
    def num_groups(self) -> int:
        """Batched requests (Fig. 13)."""
        return len(self.prefills) + len(self.decodes)


@dataclass(slots=True)
class Completion:
    """What follows an iteration: sequences that are complete, and beams that changed parents."""

    finished: list[SequenceGroup] = field(default_factory=list)
    reorders: list[dict[int, int]] = field(default_factory=list)  # child id -> parent id
    moves: list[list] = field(default_factory=list)  # what the manager returned for each
    freed: list[int] = field(default_factory=list)


class Scheduler:
    """FCFS continuous batching (section 4.5). `schedule()` and `complete()` alternate."""

    def __init__(self, manager: Manager, limits: Limits, preemption: str = "auto") -> None:
        """`preemption`: auto recomputes single sequences and swaps groups, as the artifact."""
        if preemption not in PREEMPTION_MODES:
            raise ValueError(f"preemption is one of {PREEMPTION_MODES}, got {preemption!r}")
        self.manager = manager
        self.limits = limits
        self.preemption = preemption
        self.waiting: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.swapped: list[SequenceGroup] = []
        self.num_iterations = 0

    def add(self, group: SequenceGroup) -> None:
        """Submit a group. Raises RequestTooLargeError if it could never run to its end."""
        self.check(group)
        insort(self.waiting, group, key=priority)

    def check(self, group: SequenceGroup) -> None:
        """RequestTooLargeError unless the group could run to its end if it were alone."""
        computed = group.own_prompt_len + max(seq.output_len for seq in group.seqs)
        limits = self.limits
        if computed > limits.max_batched_tokens or len(group.seqs) > limits.max_num_seqs:
            raise RequestTooLargeError(
                f"request {group.group_id}: {computed} tokens in {len(group.seqs)} sequences "
                f"exceed {limits.max_batched_tokens} tokens or {limits.max_num_seqs} sequences"
            )
        self.manager.require_fits(group)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.swapped)

    def schedule(self, now_s: float = 0.0) -> Iteration:
        """Decide one iteration: who grows, who gives way, who comes back, who is admitted."""
        iteration = Iteration(self.num_iterations, now_s)
        self.num_iterations += 1
        preempted = self._grow(iteration)
        if not iteration.num_swaps:
            self._swap_in(iteration, preempted)
        iteration.decodes = self.running.copy()
        if not self.swapped:
            self._admit(iteration, preempted)
        if not self.running and not self.idle and not preempted:
            raise StalledError("nothing runs and nothing can be admitted")
        return iteration

    def complete(self) -> Completion:
        """One token more for every running sequence; free what is complete, re-parent beams."""
        done = Completion()
        manager = self.manager
        still = []
        for group in self.running:
            ended = False
            for seq in group.seqs:
                if seq.status is SequenceStatus.RUNNING:
                    seq.num_generated += 1
                    if seq.num_generated == seq.output_len:
                        seq.status = SequenceStatus.FINISHED
                        done.freed += manager.free(seq.seq_id)
                        ended = True
            if ended and group.finished:
                done.finished.append(group)
                continue
            still.append(group)
            if group.beam_parents is not None:
                parents = group.beam_parents[group.seqs[0].num_generated - 1]
                ids = [seq.seq_id for seq in group.seqs]
                moved = {ids[i]: ids[p] for i, p in enumerate(parents) if i != p}
                if moved:
                    done.reorders.append(moved)
                    done.moves.append(manager.reorder(moved))
        self.running = still
        return done

    # -- the parts of an iteration ----------------------------------------------------------

    def _grow(self, iteration: Iteration) -> list[SequenceGroup]:
        """A slot more for each running sequence; returns the groups that had to give way.

        In order of arrival, a group at whose turn fewer blocks are free than it has sequences
        takes them from the latest arrived. Growing does not change what a later group holds, so
        the turns are counted first and those that stay then grow in one call.
        """
        manager, running = self.manager, self.running
        preempted: list[SequenceGroup] = []
        if isinstance(manager, PagedKVCacheManager):
            largest = max((len(group.seqs) for group in running), default=0)
            taken = turn = 0
            # If so many are left even after the last turn, every turn had enough.
            if manager.num_free_blocks - manager.blocks_for_step() >= largest:
                turn = len(running)
            while turn < len(running):
                ids = [seq.seq_id for seq in running[turn].unfinished()]
                if len(ids) <= manager.num_free_blocks - taken:
                    taken += manager.blocks_for_append(ids)
                    turn += 1
                else:
                    preempted.append(running.pop())  # it may be this very group
                    self._preempt(preempted[-1], iteration)
        iteration.copies += manager.append_all()
        return preempted

    def _preempt(self, group: SequenceGroup, iteration: Iteration) -> None:
        """Take all sequences of a group out of GPU memory, all or none (section 4.5)."""
        seqs = group.unfinished()
        ids = [seq.seq_id for seq in seqs]
        group.num_preemptions += 1
        swap = self.preemption == "swap" or (self.preemption == "auto" and len(seqs) > 1)
        if swap and self.manager.can_swap_out(ids):
            iteration.swapped_out += self.manager.swap_out(ids)
            iteration.num_swaps += 1
            insort(self.swapped, group, key=priority)
            status = SequenceStatus.SWAPPED
        else:  # also where the CPU pool is full
            for seq_id in ids:
                iteration.freed += self.manager.free(seq_id)
            iteration.num_recomputations += 1
            insort(self.waiting, group, key=priority)
            status = SequenceStatus.WAITING
        for seq in seqs:
            seq.status = status

    def _swap_in(self, iteration: Iteration, preempted: list[SequenceGroup]) -> None:
        """Bring swapped groups back, first come first served."""
        while self.swapped and self.swapped[0] not in preempted:
            group = self.swapped[0]
            ids = [seq.seq_id for seq in group.unfinished()]
            # As the artifact counts: running groups, and the sequences that would join them.
            if len(self.running) + len(ids) > self.limits.max_num_seqs:
                break
            if not self.manager.can_swap_in(ids):
                break
            self.swapped.pop(0)
            iteration.swapped_in += self.manager.swap_in(ids)
            for seq_id in ids:
                iteration.copies += self.manager.append(seq_id)
            self._run(group)

    def _admit(self, iteration: Iteration, preempted: list[SequenceGroup]) -> None:
        """Admit waiting groups, first come first served, until one does not fit."""
        batched = sum(len(group.unfinished()) for group in self.running)
        while self.waiting and self.waiting[0] not in preempted:
            group = self.waiting[0]
            seqs = group.unfinished()
            # The prompt is computed once; after a recomputation the longest sequence counts.
            tokens = group.own_prompt_len + max(seq.num_generated for seq in seqs)
            if not self.manager.can_admit(group):
                break
            if batched + tokens > self.limits.max_batched_tokens:
                break
            if len(self.running) + len(seqs) > self.limits.max_num_seqs:
                break
            self.waiting.pop(0)
            iteration.copies += self.manager.admit(group)
            batched += tokens
            iteration.prefills.append(group)
            self._run(group)

    def _run(self, group: SequenceGroup) -> None:
        for seq in group.unfinished():
            seq.status = SequenceStatus.RUNNING
        insort(self.running, group, key=priority)


def priority(group: SequenceGroup) -> tuple[float, int]:
    """First come first served: by arrival, then by number."""
    return group.arrival_s, group.group_id
