"""Every state of a small world, breadth first, as far as time allows; at random beyond.

    found = Search(PagedManager, PagedManager.worlds["small"], seconds=60).run()
    found.fault, found.history     # None and (), or what does not hold and the shortest way there

In every state every operation is called. One that must be refused is called in the state itself and
must leave all as it was; the others are called in a copy, whose slots are then held against what
every sequence wrote (shadow.py). Requests end: in the graph of states the operation that makes
progress leads to a state without one. A history that was found at random is made smaller by leaving
out operations while the same check still fails.
"""

from __future__ import annotations

import copy
import gc
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_sim.conformance.adapter import Adapter, Fault, Forbidden, Operation, World
from vllm_sim.conformance.shadow import Shadow, Slots
from vllm_sim.reporting.progress import SILENT, Progress

MOST_STATES = 400_000  # kept in memory; beyond, at random
LONGEST = 60  # operations of a random history, before all requests are brought to their end
MOST_STEPS = 500  # that this may take
SHRINK_S = 30.0
COLLECT_S = 10.0


@dataclass
class Found:
    """What a search went through."""

    states: int = 0  # that differ
    transitions: int = 0  # operations called, refused ones included
    depth: int = 0  # operations from the start to the farthest state of the search in breadth
    closed: bool = False  # every state of the world was seen
    histories: int = 0  # at random
    seconds: float = 0.0  # of CPU
    done: Counter = field(default_factory=Counter)  # operations that were not refused, by name
    refused: Counter = field(default_factory=Counter)  # by name and error
    events: Counter = field(default_factory=Counter)
    silent: Counter = field(default_factory=Counter)  # forbidden, and nowhere said
    missing: tuple[str, ...] = ()  # required events that did not happen
    fault: Fault | None = None
    history: tuple[Operation, ...] = ()  # to the fault

    @property
    def happened(self) -> set[str]:
        """Names of operations done, 'name: Error' of those refused, and of events."""
        names = {f"{name}: {error}" for name, error in self.refused}
        return names | self.done.keys() | self.events.keys()

    @property
    def clean(self) -> bool:
        return self.fault is None and not self.missing


class State:
    """An engine and what its slots hold; `history` alone where the engine cannot be copied."""

    __slots__ = ("adapter", "cached", "history", "num_free", "slots", "tables")

    def __init__(self, adapter: Adapter | None, slots: Slots, history: tuple = ()) -> None:
        self.adapter, self.slots, self.history = adapter, slots, history
        self.num_free, self.tables, self.cached = 0, {}, {}


class Search:
    """One search of one world. `run()` once."""

    def __init__(
        self,
        new: Callable[[], Adapter],
        world: World,
        *,
        seconds: float = 60.0,
        seed: int = 0,
        without: Collection[str] = (),
        progress: Progress = SILENT,
    ) -> None:
        """`without` are checks of CHECKS that are left out: to see what a fault leads to."""
        self.new, self.world, self.progress = new, world, progress
        self.found, self.shadow = Found(), Shadow(world, without)
        self._rng = random.Random(seed)
        self._seconds, self._begin = seconds, time.monotonic()
        self._parents: dict[Any, tuple[Any, Operation] | None] = {}
        self._leads: dict[Any, Any] = {}  # where the operation that makes progress leads
        self._drives = False  # whether there is one
        self._first: State | None = None  # the empty engine
        self._replayed = False  # whether states cannot be copied

    def run(self) -> Found:
        found, cpu = self.found, time.process_time()
        gc.disable()  # there is much, and little of it is cyclic
        try:
            self._breadth_first()
            found.states = len(self._parents)
            if not found.fault:
                self._all_end()
            if not (found.closed or found.fault):
                self._at_random()
        finally:
            gc.enable()
        found.seconds = time.process_time() - cpu
        if not found.fault:
            happened = found.happened.union(getattr(self.world, "never", ()))
            found.missing = tuple(e for e in self.new().required if e not in happened)
        return found

    # -- one operation ----------------------------------------------------------------------

    def begin(self) -> State:
        """An empty engine, built once if it can be copied. Raises what the adapter raises."""
        if self._first is None or self._replayed:
            state = State(self.new(), {})
            self._replayed = getattr(state.adapter, "replayed", False)
            if step := state.adapter.start(self.world):
                self.shadow.run(step, state.slots, Counter())
            self._look(state, Counter())
            self._first = state
        return self._first if self._replayed else self._branch(self._first)

    def _look(self, state: State, events: Counter) -> None:
        state.tables, free, state.cached = self.shadow.holds(state.adapter, state.slots, events)
        state.num_free = len(free)

    def take(self, state: State, operation: Operation) -> bool:
        """Call it, and hold all that it did against the rules; False if the engine forbids it."""
        found, adapter, before = self.found, state.adapter, state.num_free
        if operation.refusal is not None:
            self._refuse(adapter, [operation], [])
            return False
        found.transitions += 1
        try:
            step = adapter.apply(operation)
        except Forbidden as refusal:
            if refusal.where:
                found.refused[operation.name, str(refusal)] += 1
            else:
                found.silent[f"{operation.name}: {refusal}"] += 1
            return False
        tables, cached, events = state.tables, state.cached, found.events
        for one in step if isinstance(step, list) else [step]:
            for done in one.passes:
                if done.start and not (done.sequence in tables and len(tables[done.sequence][1])):
                    events["prefix hit"] += 1
            self.shadow.run(one, state.slots, events)
        self._look(state, events)
        self.shadow.took(operation, before, state.num_free)
        if cached and any(block not in state.cached for block in cached):
            events["eviction"] += 1
        found.done[operation.name] += 1
        return True

    def _refuse(self, adapter: Adapter, refused: Sequence[Operation], at: list[Operation]) -> None:
        """Call these in turn; `at` is the one that is being called, or all: they change nothing."""
        frozen = _frozen(adapter)
        for operation in refused:
            at[:] = [operation]
            self.found.transitions += 1
            wanted = operation.refusal
            try:
                adapter.apply(operation)
            except Exception as error:
                if type(error) is not wanted:
                    told = f"{operation}: {error!r}, not {wanted.__name__}"
                    raise Fault("refusal", told) from error
            else:
                raise Fault("refusal", f"{operation}: no {wanted.__name__}")
            self.found.refused[operation.name, wanted.__name__] += 1
        at[:] = refused
        if _frozen(adapter) != frozen:
            told = "one of " * (len(refused) > 1) + ", ".join(map(str, refused))
            raise Fault("refusal", f"refused, and changed something: {told}")

    def operations(self, state: State) -> Sequence[Operation]:
        """What may be called; where nothing makes progress, all must have ended."""
        offered = state.adapter.operations()
        if any(operation.progress for operation in offered):
            self._drives = True
        elif self._drives:
            self.shadow.ended(state.tables)
        return offered

    # -- in breadth -------------------------------------------------------------------------

    def _breadth_first(self) -> None:
        found, key, at = self.found, None, []  # of `key` what is being called
        try:
            state = self.begin()
            key = state.adapter.key()
            self._parents[key] = None
            level, collect = [(key, self._kept(state, ()))], time.monotonic() + COLLECT_S
            while level:
                following: list[tuple[Any, State]] = []
                while level:
                    key, kept = level.pop()  # once it was visited, nobody keeps it
                    at.clear()
                    if kept.adapter is None:
                        kept.adapter = self._again(kept.history)
                    self._visit(key, kept, following, at)
                    now = time.monotonic()
                    if now > collect:  # at most a twentieth of the time
                        gc.collect()
                        collect = time.monotonic() + max(COLLECT_S, 20 * (time.monotonic() - now))
                    seconds = now - self._begin
                    if seconds > self._seconds / 2 or len(self._parents) > MOST_STATES:
                        return
                    self.progress.at(seconds, self._seconds, f"{len(self._parents):,} states")
                level = following[::-1]
                found.depth += bool(level)
        except Exception as error:  # the engine's own too
            found.fault, found.history = _fault(error, at), (*self._path(key), *at)
            if len(at) > 1:  # one of these was refused, and changed something
                found.history = self._smaller(found.history, found.fault.check)
            return
        found.closed = True

    def _visit(self, key: Any, state: State, following: list, at: list[Operation]) -> None:
        """All operations in one state; `at` is the one that is being called."""
        parents = self._parents
        offered = self.operations(state)
        refused = [operation for operation in offered if operation.refusal is not None]
        if refused:
            self._refuse(state.adapter, refused, at)
        for operation in offered:
            if operation.refusal is not None:
                continue
            at[:] = [operation]
            trial = self._branch(state)
            taken, new = self.take(trial, operation), trial.adapter.key()
            if not taken:
                if new != key:
                    raise Fault("refusal", f"{operation} is forbidden, and changed something")
                continue
            if operation.progress:
                self._leads[key] = new
            if new not in parents:
                parents[new] = key, operation
                following.append((new, self._kept(trial, (*state.history, operation))))

    def _branch(self, state: State) -> State:
        again = self._again(state.history) if self._replayed else copy.deepcopy(state.adapter)
        trial = State(again, state.slots.copy())
        trial.num_free, trial.tables, trial.cached = state.num_free, state.tables, state.cached
        return trial

    def _kept(self, state: State, history: tuple) -> State:
        """As it is, or if it cannot be copied what leads to it."""
        if self._replayed:
            state.adapter, state.history = None, history
        return state

    def _again(self, history: Iterable[Operation]) -> Adapter:
        adapter = self.new()
        adapter.start(self.world)
        for operation in history:
            adapter.apply(operation)
        return adapter

    def _path(self, key: Any) -> list[Operation]:
        """The operations from the start to a state."""
        path = []
        while (parent := self._parents.get(key)) is not None:
            key, operation = parent
            path.append(operation)
        return path[::-1]

    def _all_end(self) -> None:
        """As far as states are known, progress leads from none of them in a circle."""
        fine: set[Any] = set()
        for start in self._leads:
            way: dict[Any, None] = {}
            key = start
            while key in self._leads and key not in fine:
                if key in way:
                    told = "progress leads in a circle, and never ends"
                    self.found.fault = Fault("no end", told)
                    self.found.history = tuple(self._path(start))
                    return
                way[key] = None
                key = self._leads[key]
            fine.update(way)

    # -- at random --------------------------------------------------------------------------

    def _at_random(self) -> None:
        found, rng = self.found, self._rng
        states = {hash(key) for key in self._parents}
        self._parents.clear()
        self._leads.clear()
        while (seconds := time.monotonic() - self._begin) < self._seconds:
            self.progress.at(seconds, self._seconds, f"{len(states):,} states")
            history: list[Operation] = []
            try:
                state = self.begin()
                for _ in range(rng.randint(LONGEST // 4, LONGEST)):
                    by_name: dict[str, list[Operation]] = {}
                    for operation in self.operations(state):
                        by_name.setdefault(operation.name, []).append(operation)
                    if not by_name:
                        break
                    history.append(rng.choice(by_name[rng.choice([*by_name])]))
                    if self.take(state, history[-1]):
                        states.add(hash(state.adapter.key()))
                self._drain(state, history)
            except Exception as error:
                found.fault = _fault(error, history[-1:])
                found.history = self._smaller(history, found.fault.check)
                break
            found.histories += 1
            if found.histories % 200 == 0:
                gc.collect()
        found.states = len(states)

    def _drain(self, state: State, history: list[Operation]) -> None:
        """Bring all requests to their end."""
        for _ in range(MOST_STEPS):
            step = [operation for operation in self.operations(state) if operation.progress]
            if not step:
                return
            history.append(step[0])
            self.take(state, step[0])
        del history[-MOST_STEPS:]  # as `replay` takes them again
        raise Fault("no end", f"requests are left after {MOST_STEPS} steps")

    def _smaller(self, history: Sequence[Operation], check: str) -> tuple[Operation, ...]:
        """Without what it can do without, as long as the same check fails."""
        until = time.monotonic() + SHRINK_S
        history, left = tuple(history), True
        while left:
            left = False
            for place in reversed(range(len(history))):
                shorter = history[:place] + history[place + 1 :]
                fault, done = self.replay(shorter, check == "no end")
                if fault is not None and fault.check == check:
                    history, left = shorter[:done], True
                if time.monotonic() > until:
                    return history
        return history

    def replay(
        self,
        history: Sequence[Operation],
        drain: bool = False,
        seen: Callable[[Operation, State], None] = lambda operation, state: None,
    ) -> tuple[Fault | None, int]:
        """Call these in turn: (what did not hold, operations until then); (None, 0) if all did, or
        one is not offered. `seen(operation, state)` is called after each, also after the last."""
        kept, self.found = self.found, Found()  # what is replayed counts nowhere
        done = 0
        try:
            state = self.begin()
            for wanted in history:
                same = [one for one in self.operations(state) if one[:2] == wanted[:2]]
                if not same:
                    return None, 0
                done += 1
                try:
                    self.take(state, same[0])
                finally:
                    seen(same[0], state)
            self.operations(state)
            if drain:
                self._drain(state, [])
        except Exception as error:
            return _fault(error, history[max(0, done - 1) : done]), done
        finally:
            self.found = kept
        return None, 0


def _frozen(adapter: Adapter) -> tuple:
    """All of a state, as a value; `frozen` is what an adapter has whose key knows a memory too."""
    tables = {who: (tuple(held), tuple(tokens)) for who, (held, tokens) in adapter.tables().items()}
    shown = list(adapter.free()), dict(adapter.ref_counts() or ()), dict(adapter.cached())
    return tables, shown, getattr(adapter, "frozen", adapter.key)()


def _fault(error: Exception, at: Sequence[Operation]) -> Fault:
    """What an adapter or its engine raised, as a fault."""
    if isinstance(error, Fault):
        return error
    told = f"{at[0]}: " if len(at) == 1 else ""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    fault = Fault("exception", f"{told}{type(error).__name__}: {error} ({where})")
    fault.__cause__ = error
    return fault
