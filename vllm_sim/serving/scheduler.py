"""One iteration at a time: who grows, who gives way, who comes back, who is admitted.

Reproduces: section 4.5 (first come first served; the latest arrived is preempted first; all
sequences of a group together; swap or recompute; nothing new is admitted while anything is
swapped out) with the rules of the authors' artifact where the paper is silent: the watermark, the
limit on batched tokens, the order in which running, swapped and waiting groups are served. With
`Limits(..., chunked=True)` prompts are computed part by part, as today's vLLM (v1) does. An
`Iteration` is what the workers are sent (section 4.6): blocks to swap and to copy, prompts to
compute, sequences to extend.

    scheduler = Scheduler(PagedKVCacheManager(983, 16), Limits(2560, 2048))
    scheduler.add(group)
    iteration = scheduler.schedule()     # what the tensors must do now
    completion = scheduler.complete()    # what is finished, which beams changed parents

Between two decisions every iteration is like the one before: `quiet_steps()` says for how many,
and `advance(n)` takes them at once. Bookkeeping only. simulator.py runs it over a workload.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from operator import attrgetter

from kv_cache_manager import (
    BaselineCacheManager,
    BlockPairs,
    CacheError,
    PagedKVCacheManager,
    RequestTooLargeError,
)
from sequence import FINISHED, Clock, Sequence, SequenceGroup, SequenceStatus

Manager = PagedKVCacheManager | BaselineCacheManager


@dataclass(frozen=True, slots=True)
class Limits:
    """What an iteration may hold: prompt and decode tokens, and sequences.

    A group that is recomputed may have outgrown `max_batched_tokens`: it gets an iteration to
    itself. As in the artifact, a group joins if its own sequences and the groups that run are
    together at most `max_num_seqs`: a group that runs counts as one, so more sequences may run.

    `chunked` are vLLM v1's: decodes come first, what they leave of `max_batched_tokens` goes to
    prompts in order, and one that is longer than that is computed part by part. Neither limit is
    ever exceeded then, and every sequence counts, so there must be a token for each.
    """

    max_batched_tokens: int
    max_num_seqs: int
    chunked: bool = False

    def __post_init__(self) -> None:
        if self.max_batched_tokens < 1 or self.max_num_seqs < 1:
            raise ValueError(f"limits must be positive, got {self}")
        if self.chunked and self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(f"chunked needs a token for each sequence, got {self}")


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
    num_decodes: int = 0  # sequences of `decodes`: each computes one token
    context_tokens: int = 0  # K/V that they read, each for itself, also where it is shared
    num_seqs: int = 0  # that generate a token: those of `decodes` and of `prefills`
    prompt_tokens: int = 0  # that `prefills` compute; without sharing, of every sequence
    # The same, prompt by prompt: tokens before the part that is computed, and of the part. The
    # last may be of a prompt whose group is not yet among `prefills`.
    parts: list[tuple[int, int]] = field(default_factory=list)

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


# By mode of preemption: groups of so many sequences are swapped, narrower ones recomputed.
SWAPPED_FROM = {"auto": 2, "swap": 1, "recompute": math.inf}
ORDER = attrgetter("order")


class StalledError(CacheError):
    """Requests are left, but an iteration can do nothing for any of them."""


class Scheduler:
    """FCFS continuous batching (section 4.5). `schedule()` and `complete()` alternate."""

    def __init__(self, manager: Manager, limits: Limits, preemption: str = "auto") -> None:
        """`preemption`: auto recomputes single sequences and swaps groups, as the artifact."""
        if preemption not in SWAPPED_FROM:
            raise ValueError(f"preemption is one of {(*SWAPPED_FROM,)}, got {preemption!r}")
        self.manager = manager
        self.limits = limits
        self.swapped_from = SWAPPED_FROM[preemption]
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []
        self.swapped: list[SequenceGroup] = []
        self.short_of_blocks = False  # whether the last iteration left a group without memory
        self.num_running_seqs = 0
        self.context_tokens = 0  # of the running sequences, what they have generated included
        self._clock = Clock()  # iterations completed
        # Running groups by the step that completes a sequence of theirs or moves a beam.
        self._events: dict[int, list[SequenceGroup]] = {}
        self._next_events: list[int] = []  # the keys of _events, a heap
        self._widest = 1  # sequences of the largest group so far
        self._settled = False  # until a completion or an arrival, there is nothing to decide
        # The waiting group whose prompt is in part computed (chunked), how many of its tokens are,
        # and the blocks set aside for it. Its table comes with the last part: all tables grow.
        self.partial: SequenceGroup | None = None
        self._computed = self._held = 0

    @property
    def num_iterations(self) -> int:
        """Iterations scheduled and completed."""
        return self._clock.now

    def add(self, group: SequenceGroup) -> None:
        """Submit a group. Raises RequestTooLargeError if it could never run to its end."""
        self.check(group)
        self.enqueue(group)

    def enqueue(self, group: SequenceGroup) -> None:
        """Submit a group that has passed `check`."""
        if len(group.seqs) > self._widest:
            self._widest = len(group.seqs)
        if not (self.waiting or self.swapped):
            self._settled = False  # otherwise it is behind one that waits for memory
        _place(self.waiting, group)

    def check(self, group: SequenceGroup) -> None:
        """RequestTooLargeError if a group could not run even alone; any other comes to its end."""
        width, limits = len(group.seqs), self.limits
        self.manager.require_fits(group)
        too_long = not limits.chunked and group.own_prompt_len > limits.max_batched_tokens
        if too_long or width > limits.max_num_seqs:
            raise RequestTooLargeError(
                f"request {group.group_id}: {group.own_prompt_len} tokens in {width} sequences "
                f"exceed {limits.max_batched_tokens} tokens or {limits.max_num_seqs} sequences"
            )

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.swapped)

    # -- iteration by iteration ---------------------------------------------------------------

    def schedule(self, now_s: float = 0.0) -> Iteration:
        """Decide one iteration: who grows, who gives way, who comes back, who is admitted."""
        iteration = Iteration(self._clock.now, now_s)
        preempted = self._grow(iteration)
        if self.swapped and not iteration.num_swaps:
            self._swap_in(iteration)
        iteration.decodes = self.running.copy()
        iteration.num_decodes = self.num_running_seqs
        iteration.context_tokens = self.context_tokens
        all_tried = True
        self.short_of_blocks = bool(preempted or self.swapped)
        if self.waiting and not self.swapped:
            all_tried = self._admit(iteration, preempted)
        iteration.num_seqs = self.num_running_seqs
        if not (self.running or self.idle or preempted or self.partial):
            raise StalledError("nothing runs and nothing can be admitted")
        self._settled = all_tried and not preempted
        return iteration

    def complete(self, num_steps: int = 1) -> Completion:
        """One token more for every running sequence; free what is complete, re-parent beams."""
        self._clock.now = now = self._clock.now + num_steps
        self.context_tokens += num_steps * self.num_running_seqs
        done = Completion()
        if self._next_events and self._next_events[0] <= now:
            self._take_events(done)
        return done

    def end(self, group: SequenceGroup, seqs: list[Sequence]) -> None:
        """These, which run, end with this iteration's token: it says so, whatever their length.

        For a model that generates what ends a sequence; of a beam search all must end together.
        Between `schedule()` and `complete()`.
        """
        for seq in seqs:
            seq.output_len = seq.num_generated + 1
        if seqs and group.event_step != self._clock.now + 1:
            self._events[group.event_step].remove(group)
            self._await_event(group, seqs)

    # -- many iterations at once --------------------------------------------------------------

    @property
    def admits_arrivals(self) -> bool:
        """Whether a request that arrives now would be tried at once: none waits before it."""
        return not (self.waiting or self.swapped)

    def quiet_steps(self) -> int:
        """How many iterations from here on decide nothing, short of an arrival; may be 0.

        The last of them may complete a sequence or move a beam. Until then free memory only
        shrinks, so who waits for memory, or for a sequence to end, still waits; and there is a
        block for all.
        """
        if not self._settled or not self.running:
            return 0
        events = self._next_events
        while not self._events[events[0]]:  # preempted since
            del self._events[heappop(events)]
        steps = events[0] - self._clock.now
        if isinstance(self.manager, PagedKVCacheManager):
            steps = self.manager.steps_without_copies(steps, self._widest)
        return steps

    def advance(self, num_steps: int) -> Completion:
        """Take that many iterations, at most `quiet_steps()`, at once."""
        self.manager.append_all(num_steps)
        return self.complete(num_steps)

    # -- the parts of an iteration ----------------------------------------------------------

    def _grow(self, iteration: Iteration) -> list[SequenceGroup]:
        """A slot more for each running sequence; returns the groups that had to give way.

        In order of arrival, a group at whose turn fewer blocks are free than it has sequences
        takes them from the latest arrived; alone it needs only those that it takes. Growing does
        not change what a later group holds, so the turns are counted first and those that stay
        then grow in one call.
        """
        manager = self.manager
        preempted: list[SequenceGroup] = []
        if isinstance(manager, PagedKVCacheManager):
            need = manager.blocks_for_step()
            spare = manager.num_free_blocks - need - self._widest
            if self.partial and self.running and spare < self._held:
                preempted.append(self._drop_partial(iteration))  # the last who came
            # If so many are left even after the last turn, every turn had enough.
            if manager.num_free_blocks - need < self._widest:
                preempted += self._make_room(need, iteration)
        iteration.copies += manager.append_all()
        return preempted

    def _make_room(self, need: int, iteration: Iteration) -> list[SequenceGroup]:
        """Preempt until every turn has enough, when all of them together take `need` blocks."""
        manager, running, widest = self.manager, self.running, self._widest
        preempted: list[SequenceGroup] = []
        turn = taken = 0
        while turn < len(running):
            if len(running) == 1 and need <= manager.num_free_blocks:
                break  # alone it needs no block to spare
            # Where all are equally wide the last turn is the hardest, so it decides for all.
            if self.num_running_seqs == widest * len(running):
                last = manager.blocks_for_append(running[-1].unfinished_ids())
                if manager.num_free_blocks - (need - last) >= widest:
                    break
                need -= last
            else:
                ids = running[turn].unfinished_ids()
                if len(ids) <= manager.num_free_blocks - taken:
                    taken += manager.blocks_for_append(ids)
                    turn += 1
                    continue
                need -= manager.blocks_for_append(running[-1].unfinished_ids())
            preempted.append(running.pop())  # it may be the very group whose turn it is
            self._preempt(preempted[-1], iteration)
        return preempted

    def _preempt(self, group: SequenceGroup, iteration: Iteration) -> None:
        """Take all sequences of a group out of GPU memory, all or none (section 4.5)."""
        seqs = group.unfinished()
        ids = group.unfinished_ids()
        group.num_preemptions += 1
        self._events[group.event_step].remove(group)
        if len(seqs) >= self.swapped_from and self.manager.can_swap_out(ids):
            iteration.swapped_out += self.manager.swap_out(ids)
            iteration.num_swaps += 1
            _place(self.swapped, group)
            status = SequenceStatus.SWAPPED
        else:  # also where the CPU pool is full
            for seq_id in ids:
                iteration.freed += self.manager.free(seq_id)
            iteration.num_recomputations += 1
            _place(self.waiting, group)
            status = SequenceStatus.WAITING
        for seq in seqs:
            self._stop(seq, status)

    def _swap_in(self, iteration: Iteration) -> None:
        """Bring swapped groups back, first come first served."""
        while self.swapped:
            group = self.swapped[0]
            seqs = group.unfinished()
            ids = [seq.seq_id for seq in seqs]
            # As the artifact counts: running groups, and the sequences that would join them.
            if self._places_taken() + len(ids) > self.limits.max_num_seqs:
                break
            if not self.manager.can_swap_in(ids, alone=not self.running):
                break
            self.swapped.pop(0)
            iteration.swapped_in += self.manager.swap_in(ids)
            for seq_id in ids:
                iteration.copies += self.manager.append(seq_id)
            self._run(group, seqs)

    def _admit(self, iteration: Iteration, preempted: list[SequenceGroup]) -> bool:
        """Admit waiting groups, first come first served, until one does not fit.

        False if that one may fit in the next iteration although nothing is freed.
        """
        batched = self.num_running_seqs
        limits, waiting, manager = self.limits, self.waiting, self.manager
        while waiting and waiting[0] not in preempted:
            group = self.partial or waiting[0]
            seqs = group.unfinished()
            if self._places_taken() + len(seqs) > limits.max_num_seqs:
                return True
            # The prompt is computed once; after a recomputation the longest sequence counts.
            prompt_len = group.own_prompt_len
            generated = [seq.num_generated for seq in seqs]
            tokens = prompt_len + max(generated)
            # Without sharing every sequence computes the prompt for itself, as in the artifact.
            prompts = 1 if isinstance(manager, PagedKVCacheManager) else len(seqs)
            left = prompts * prompt_len + sum(generated) - self._computed
            if limits.chunked:
                tokens, room = left, limits.max_batched_tokens - batched
                if tokens > room:
                    return self._compute_part(group, room, iteration)
            # What was preempted comes back whatever it has grown to, if need be by itself.
            by_itself = group.num_preemptions and not batched
            if batched + tokens > limits.max_batched_tokens and not by_itself:
                return False
            copies = manager.try_admit(group, alone=not self.running or group is self.partial)
            if copies is None:
                self.short_of_blocks = True
                return True
            waiting.remove(group)  # the first, unless one that had arrived before it came later
            iteration.copies += copies
            iteration.prefills.append(group)
            self._note_part(group, left, iteration)
            self.partial, self._computed, self._held = None, 0, 0
            batched += tokens
            self._run(group, seqs)
        return True

    def _compute_part(self, group: SequenceGroup, room: int, iteration: Iteration) -> bool:
        """Compute as much of a prompt as there is room for; its blocks are there from the start.

        False, as of `_admit`, unless these are what is missing.
        """
        if room and self.partial is None:
            if not self.manager.can_admit(group, alone=not self.running):
                self.short_of_blocks = True
                return True
            self.partial = group
            if isinstance(self.manager, PagedKVCacheManager):  # elsewhere to grow takes none
                self._held = self.manager.blocks_for_group(group)
        if room:
            self._note_part(group, room, iteration)
            self._computed += room
        return False

    def _note_part(self, group: SequenceGroup, tokens: int, iteration: Iteration) -> None:
        before = group.seqs[0].context_len - group.own_prompt_len + self._computed
        iteration.parts.append((before, tokens))
        iteration.prompt_tokens += tokens

    def _drop_partial(self, iteration: Iteration) -> SequenceGroup:
        """What was computed of a prompt gives way, and is computed again."""
        group = self.partial
        group.num_preemptions += 1
        iteration.num_recomputations += 1
        self.partial, self._computed, self._held = None, 0, 0
        return group

    def _places_taken(self) -> int:
        """Of `max_num_seqs`: by groups that run, as in the artifact, or by sequences (chunked)."""
        return self.num_running_seqs if self.limits.chunked else len(self.running)

    def _run(self, group: SequenceGroup, seqs: list[Sequence]) -> None:
        clock = self._clock
        for seq in seqs:
            self.context_tokens += seq.prefix_len + seq.prompt_len + seq.num_generated
            seq.start(clock)
        self.num_running_seqs += len(seqs)
        _place(self.running, group)
        self._await_event(group, seqs)

    def _await_event(self, group: SequenceGroup, seqs: list[Sequence]) -> None:
        """Note when the first of these, its running sequences, ends or changes parents."""
        if group.beam_parents is None:
            steps = min([seq.output_len - seq.num_generated for seq in seqs])
        else:
            generated = seqs[0].num_generated  # beams are equally long
            steps = seqs[0].output_len - generated
            # The first token comes from the prompt, which all of them have: nobody moves.
            move = group.beam_parents.next_move(max(1, generated))
            if move is not None:
                steps = min(steps, move + 1 - generated)
        group.event_step = step = self._clock.now + steps
        if step not in self._events:
            self._events[step] = []
            heappush(self._next_events, step)
        self._events[step].append(group)

    def _stop(self, seq: Sequence, status: SequenceStatus) -> None:
        seq.stop(status)
        self.num_running_seqs -= 1
        self.context_tokens -= seq.prefix_len + seq.prompt_len + seq.num_generated

    def _take_events(self, done: Completion) -> None:
        """Sequences whose last token came with this step, and beams that move, in order."""
        groups = self._events.pop(heappop(self._next_events))
        groups.sort(key=ORDER)
        for group in groups:
            seqs = group.seqs
            first = seqs[0]  # beams are equally long: none ends before the others
            generated = first.num_generated
            if group.beam_parents is not None and generated < first.output_len:
                self._reorder(seqs, group.beam_parents[generated - 1], done)
                self._await_event(group, seqs)
                continue
            left = []
            for seq in seqs:
                if seq.status is not FINISHED:
                    if seq.num_generated < seq.output_len:
                        left.append(seq)
                    else:
                        self._stop(seq, FINISHED)
                        done.freed += self.manager.free(seq.seq_id)
            if left:
                self._await_event(group, left)
            else:
                done.finished.append(group)
                self.running.remove(group)
        if groups and not self.admits_arrivals:
            self._settled = False

    def _reorder(self, seqs: list[Sequence], parents: list[int], done: Completion) -> None:
        ids = [seq.seq_id for seq in seqs]
        moved = {ids[c]: ids[parent] for c, parent in enumerate(parents) if c != parent}
        if moved:
            done.reorders.append(moved)
            done.moves.append(self.manager.reorder(moved))


def _place(queue: list[SequenceGroup] | deque[SequenceGroup], group: SequenceGroup) -> None:
    """Insert in order; mostly that is the end."""
    if not queue or queue[-1].order < group.order:
        queue.append(group)
    else:
        insort(queue, group, key=ORDER)
