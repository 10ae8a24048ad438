"""Requests of known lengths served for real, as section 6 runs them: by any of its systems.

Reproduces: sections 4.3 to 4.6 and 6.1 on a real model. The simulator's own `Scheduler` decides
over the simulator's own managers; a worker (worker.py) does what it says. Every system has the same
worker: contiguous reservations are blocks in a row, and share nothing.

    server = Server(worker, new_manager("paged", 983, 16))
    served = server.serve(make_groups(requests))
    served.result.normalized_latency, served.result.mean_batch

As outputs end at known lengths, an iteration is decided while the device still computes the one
before: the device need not wait for the host. Times are the host's: a token is there when the host
has it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from kv_cache_manager import PagedKVCacheManager, RequestTooLargeError
from sequence import Sequence, SequenceGroup
from vllm_sim.engine.worker import MOST_ROWS, Flight, Order, Prompt, Worker
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.serving.scheduler import ORDER, Iteration, Limits, Manager, Scheduler
from vllm_sim.serving.simulator import ARTIFACT_LIMITS, Observer, ServingResult

AHEAD = 1  # iterations that the device may be given beyond the one that it computes
NAP_S = 1e-3  # between two looks at the clock while nothing runs


@dataclass(frozen=True, slots=True)
class Took:
    """One iteration that was computed: what it held, and seconds.

    `prompt_s` and `decode_s` are the device's; `wall_s` runs from the end of the one before, or
    from when it was decided if nothing was on its way then.
    """

    num_decodes: int  # sequences
    context_tokens: int  # that decodes read
    prompt_tokens: int
    prompt_s: float
    decode_s: float
    wall_s: float


@dataclass(slots=True)
class Served:
    """One run: totals as the simulator counts them, and every iteration."""

    result: ServingResult = field(default_factory=ServingResult)
    took: list[Took] = field(default_factory=list)
    num_tokens: int = 0  # generated in the window
    end_s: float = 0.0

    def busy_share(self) -> float:
        """Seconds that the device is at an iteration it was given, over those of all. What it
        waits for within one, where the host is not ahead, counts as the device's."""
        busy = sum(one.prompt_s + one.decode_s for one in self.took)
        return busy / max(1e-9, sum(one.wall_s for one in self.took))


@dataclass(slots=True)
class _Flying:
    """An iteration on its way, and who ends with it."""

    flight: Flight
    iteration: Iteration
    rows: dict[int, int]  # sequence -> row, of those that draw
    finished: list[SequenceGroup]
    decided_s: float


class Server:
    """One system: a manager, the scheduler over it, and the worker that it commands."""

    def __init__(
        self,
        worker: Worker,
        manager: Manager,
        limits: Limits = ARTIFACT_LIMITS,
        *,
        preemption: str = "auto",
        observers: Seq[Observer] = (),
        seed: int = 0,
    ) -> None:
        """`seed`: of the prompts' tokens, which are drawn for each request. ValueError for limits
        that compute a prompt part by part."""
        if limits.chunked:
            raise ValueError("a worker computes a prompt at once: no chunked limits")
        self.worker, self.manager, self.observers = worker, manager, observers
        self.scheduler = Scheduler(manager, limits, preemption)
        self._vocabulary = worker.model.config.get_text_config(decoder=True).vocab_size
        self._seed = seed
        self._free_rows = list(range(worker.most_rows))[::-1]
        self._rows: dict[int, int] = {}  # of each sequence that has drawn a token
        self.tokens: dict[int, list[int]] = {}  # of each sequence: its prompt's and generated ones
        self.outputs: dict[int, list[list[int]]] = {}  # of each group that is done
        self._flying: deque[_Flying] = deque()

    def serve(
        self,
        groups: Iterable[SequenceGroup],
        *,
        window_s: tuple[float, float] = (0.0, math.inf),
        until_s: float = math.inf,
        keep: bool = False,
        progress: Progress = SILENT,
    ) -> Served:
        """Serve all to their end, or until that second; means are over iterations in the window,
        and observers are told of these.

        `keep` the tokens in `outputs`. Raises RequestTooLargeError, and ValueError for beams and
        prefixes, before anything runs.
        """
        queue = deque(sorted(groups, key=ORDER))
        for group in queue:
            self._check(group)
        served, number, self._landed_s = Served(), len(queue), -math.inf
        self._window, self._keep, self._served = window_s, keep, served
        self._start = time.perf_counter()
        while queue or self._flying or not self.scheduler.idle:
            now = time.perf_counter() - self._start
            if now >= until_s:
                break
            while queue and queue[0].arrival_s <= now:
                self.scheduler.enqueue(queue.popleft())
            if not self.scheduler.idle:
                self._step(now)
            elif self._flying:
                self._land()
            else:
                time.sleep(min(NAP_S, max(0.0, queue[0].arrival_s - now)))
            progress.at(len(served.result.finish_s), number)
        while self._flying:
            self._land()
        served.end_s = time.perf_counter() - self._start
        return served

    def _check(self, group: SequenceGroup) -> None:
        """Refuse what the scheduler does, and what is not for this worker."""
        self.scheduler.check(group)
        if group.beam_parents is not None or group.prefix_id is not None:
            raise ValueError(f"request {group.group_id}: no beams and no prefix are served")
        longest = max(seq.context_len + seq.output_len for seq in group.seqs)
        width, most = len(group.seqs), min(MOST_ROWS[1], self.worker.most_rows)
        if longest > self.worker.max_len or width > most:
            raise RequestTooLargeError(
                f"request {group.group_id}: {longest} tokens or {width} sequences exceed the "
                f"worker's {self.worker.max_len} or {most}"
            )

    def _step(self, now: float) -> None:
        """Decide an iteration, have it computed, and wait for the one before it."""
        iteration = self.scheduler.schedule(now)
        in_window = self._window[0] <= now < self._window[1]
        watching = self.observers if in_window else ()
        for observer in watching:
            observer.on_iteration(iteration)
        order, rows = self._order(iteration)
        flight = self.worker.run(order)
        completion = self.scheduler.complete()
        for observer in watching:
            observer.on_completion(completion)
        self._served.result.count(iteration)
        self._flying.append(_Flying(flight, iteration, rows, completion.finished, now))
        while len(self._flying) > AHEAD:
            self._land()

    def _land(self) -> None:
        """Wait for the oldest iteration on its way, and note what it brings."""
        one = self._flying.popleft()
        tokens = one.flight.tokens()
        now = time.perf_counter() - self._start
        for seq_id, row in one.rows.items():
            self.tokens[seq_id].append(tokens[row])
        flight, iteration, result = one.flight, one.iteration, self._served.result
        in_window = self._window[0] <= one.decided_s < self._window[1]
        result.count_batch(1, iteration.num_groups, in_window)
        if in_window:
            self._served.num_tokens += len(one.rows)
            shape = iteration.num_decodes, iteration.context_tokens, iteration.prompt_tokens
            seconds = flight.start.until(flight.between), flight.between.until(flight.end)
            wall = now - max(self._landed_s, one.decided_s)
            self._served.took.append(Took(*shape, *seconds, wall))
        self._landed_s = now
        for group in one.finished:
            result.finish(group, now)
            ids = [seq.seq_id for seq in group.seqs]
            for seq_id in ids:
                self._free_rows.append(self._rows.pop(seq_id))
            done = [self.tokens.pop(seq_id) for seq_id in ids]
            if self._keep:
                start = group.own_prompt_len
                self.outputs[group.group_id] = [tokens[start:] for tokens in done]

    # -- what the worker is told ------------------------------------------------------------

    def _order(self, iteration: Iteration) -> tuple[Order, dict[int, int]]:
        """An iteration in numbers, and the row of each sequence that draws a token in it."""
        rows, lens, tables, drawing = [], [], [], {}
        for group in iteration.decodes:
            for seq in group.unfinished():
                blocks, length = self._where(seq.seq_id)
                drawing[seq.seq_id] = self._rows[seq.seq_id]
                rows.append(self._rows[seq.seq_id])
                lens.append(length)
                tables.append(blocks)
        prompts = []
        for group in iteration.prefills:
            prompts += self._prompts(group, drawing)
        moves = iteration.swapped_out, iteration.swapped_in, iteration.copies
        return Order(*map(tuple, moves), prompts, rows, lens, tables), drawing

    def _prompts(self, group: SequenceGroup, drawing: dict[int, int]) -> list[Prompt]:
        """What a group that is admitted computes: its prompt, or all it had before it gave way."""
        seqs, paged = group.unfinished(), isinstance(self.manager, PagedKVCacheManager)
        ids = [seq.seq_id for seq in seqs]
        again = seqs[0].num_generated > 0
        if again:
            while any(seq_id in one.rows for one in self._flying for seq_id in ids):
                self._land()  # its last tokens are still on their way
        else:
            while len(self._free_rows) < len(ids) and self._flying:
                self._land()  # some may be of groups that end with it
            if len(self._free_rows) < len(ids):
                raise ValueError(f"more than {self.worker.most_rows} sequences: raise most_rows")
            self._rows |= {seq_id: self._free_rows.pop() for seq_id in ids}
            prompt = self._prompt(group)
            self.tokens |= {seq_id: prompt.copy() for seq_id in ids}
        rows = [self._rows[seq_id] for seq_id in ids]
        drawing |= zip(ids, rows)
        if paged and not again:  # all have one prompt, and go on from its last logits
            blocks, _ = self._where(ids[0])
            return [Prompt(self.tokens[ids[0]], 0, blocks, rows)]
        return [self._own(seq, row) for seq, row in zip(seqs, rows)]

    def _own(self, seq: Sequence, row: int) -> Prompt:
        """All tokens of one sequence so far. Blocks that another shares are written twice, with
        the same."""
        blocks, length = self._where(seq.seq_id)
        tokens = self.tokens[seq.seq_id]
        assert length == len(tokens), "the blocks hold another number of tokens"
        return Prompt(tokens.copy(), 0, blocks, [row])

    def _where(self, seq_id: int) -> tuple[list[int], int]:
        """A sequence's blocks in order, and how many tokens they hold."""
        manager = self.manager
        if isinstance(manager, PagedKVCacheManager):
            table = manager.block_table(seq_id)
            return table.blocks.copy(), table.num_tokens
        length = manager.num_tokens(seq_id)
        start = manager.reservation(seq_id).start_block
        return list(range(start, start + -(-length // manager.block_size))), length

    def _prompt(self, group: SequenceGroup) -> list[int]:
        """Its tokens: drawn for this request, whatever the system."""
        generator = np.random.default_rng([self._seed, group.group_id])
        return generator.integers(0, self._vocabulary, group.own_prompt_len).tolist()
