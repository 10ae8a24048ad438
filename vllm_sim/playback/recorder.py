"""What happened to every block in a run of the paged manager, step by step, to be played back.

Reproduces nothing by itself: a Recorder watches a run (sections 4.3 to 4.5: blocks on demand,
copy-on-write, beam search, preemption by swapping and by recomputation) and keeps what changed in
the block tables. It decides nothing and repeats no rule: GPU tables are read from the manager after
each step, CPU blocks from the map that swapping returned, queues from the sequences' own status.
timeline.py makes a page of it, pictures.py of the scenarios the block map.

    recorder = Recorder("paged, swap", "64 requests", manager, groups, prefix_ids=(0,))
    simulate(groups, manager, limits, observers=[recorder])
    recorder.recording().frames
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, is_dataclass

from kv_cache_manager import BlockPairs, PagedKVCacheManager
from sequence import SequenceGroup, SequenceStatus
from vllm_sim.serving.scheduler import Completion, Iteration
from vllm_sim.serving.simulator import Observer

WAITING, RUNNING, SWAPPED, FINISHED = (status.value for status in SequenceStatus)
PREEMPTIONS = ("swap_out", "recompute")  # kinds of events


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened in a step; each kind has the fields named here, the others None.

    arrive, recompute, finish (group); admit (group, again: not for the first time); swap_out and
    swap_in (group, num_blocks); prefix (sequence); fork, move (sequence, parent: a sample that
    shares its blocks, a beam that goes on from it); block (sequence, index, block: a new one,
    logical and physical); copy (source, block: physical, of the sequence that writes).
    """

    kind: str
    group: int | None = None
    again: bool | None = None
    num_blocks: int | None = None
    sequence: int | None = None
    parent: int | None = None
    index: int | None = None
    source: int | None = None
    block: int | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A sequence's table is its first `keep` GPU blocks as they were, and then these."""

    sequence: int
    keep: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Frame:
    """What a step changed, to be applied in the order of the fields."""

    title: str
    iteration: int | None = None  # of a scheduled run
    swapped_out: Seq[Change] = ()  # what follows the kept blocks, a prefix's, is on the CPU
    gone: Seq[int] = ()  # sequences that hold no block any more
    grown: int | None = None  # every other one in GPU memory, prefixes apart, has a token more
    changed: Seq[Change] = ()  # tables in GPU memory
    tokens: dict[int, int] = field(default_factory=dict)  # sequence -> tokens, if not as above
    statuses: dict[int, str] = field(default_factory=dict)  # group -> waiting, running, ...
    events: Seq[Event] = ()


@dataclass(frozen=True, slots=True)
class Held:
    """What a sequence holds: its blocks in order, and the tokens in them."""

    blocks: tuple[int, ...]
    num_tokens: int
    num_prefix_blocks: int = 0
    swapped: bool = False  # all but the prefix's are CPU blocks

    def filled(self, index: int, block_size: int) -> int:
        """Slots of a logical block that hold a token."""
        return min(block_size, self.num_tokens - index * block_size)


@dataclass(frozen=True, slots=True)
class Moment:
    """All tables at one step."""

    title: str
    tables: dict[int, Held]
    num_kinds: int  # of the running groups
    num_saved: int  # references to blocks beyond the first

    @property
    def rank(self) -> tuple[int, int]:
        """Which moment shows most: one with all kinds of requests, and much shared."""
        return self.num_kinds, self.num_saved


@dataclass(frozen=True, slots=True)
class Group:
    """The sequences of a request, what kind it is, and the lengths of its prompt and output."""

    id: int
    name: str
    kind: str
    seqs: Seq[int]
    prompt: int | None = None
    output: int | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """A whole run. `last` is how it ended, `fullest` the moment that shows most."""

    name: str
    about: str
    num_blocks: int
    num_cpu_blocks: int
    block_size: int
    prefixes: Seq[int]
    groups: Seq[Group]
    frames: Seq[Frame]
    last: Moment
    fullest: Moment

    def to_json(self) -> dict:
        """All but the moments; a frame's fields that are empty are left out."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)[:-2]}

    def owners(self) -> dict[int, tuple[str, str]]:
        """Sequence -> (what its group is called, its kind); of a prefix too."""
        found = dict.fromkeys(self.prefixes, ("P", "prefix itself"))
        for group in self.groups:
            found |= dict.fromkeys(group.seqs, (group.name, group.kind))
        return found

    def preemptions(self) -> list[int]:
        """The iterations that preempted a group."""
        return [f.iteration for f in self.frames if any(e.kind in PREEMPTIONS for e in f.events)]


def _filled(record: object) -> dict:
    named = ((f.name, getattr(record, f.name)) for f in fields(record))
    return {name: _plain(value) for name, value in named if value not in (None, (), [], {})}


def _plain(value: object) -> object:
    if is_dataclass(value):
        return _filled(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


class Recorder(Observer):
    """Watches one run. Of scheduled runs it is an observer; others call `step`."""

    def __init__(
        self,
        name: str,
        about: str,
        manager: PagedKVCacheManager,
        groups: Iterable[SequenceGroup] = (),
        prefix_ids: Seq[int] = (),
        kind: str = "parallel",
    ) -> None:
        """`kind`, of a run without groups: single, parallel or beam."""
        self.name, self.about, self.manager = name, about, manager
        self.groups = sorted(groups, key=lambda group: group.order)
        self.prefix_ids = tuple(prefix_ids)
        self.kind = kind
        self.frames: list[Frame] = []
        self.last: Moment | None = None
        self.fullest: Moment | None = None
        self._now: dict[int, Held] = {}
        self._status: dict[int, str] = {}
        self._samples: list[int] = []  # of a run without groups
        self._preempted: set[int] = set()

    def recording(self) -> Recording:
        """All that was seen so far."""
        m = self.manager
        groups = [] if self.groups else [Group(0, "A", self.kind, self._samples)]
        for g in self.groups:
            seqs, lengths = [s.seq_id for s in g.seqs], (g.seqs[0].prompt_len, g.seqs[0].output_len)
            groups.append(Group(g.group_id, str(g.group_id), _kind(g), seqs, *lengths))
        sizes = m.num_blocks, m.num_cpu_blocks, m.block_size
        seen = self.prefix_ids, groups, self.frames, self.last, self.fullest
        return Recording(self.name, self.about, *sizes, *seen)

    # -- what is observed ---------------------------------------------------------------------

    def on_iteration(self, iteration: Iteration) -> None:
        """The tables as they stand after scheduling."""
        statuses, events, out = self._statuses(iteration.start_s)
        moved = dict(iteration.swapped_out)
        after = self._tables()
        for group in out:
            blocks = set()
            for seq in group.unfinished():
                before = self._now[seq.seq_id]
                kept = before.num_prefix_blocks
                cpu = tuple(moved[block] for block in before.blocks[kept:])
                blocks |= set(cpu)
                after[seq.seq_id] = Held(before.blocks[:kept] + cpu, before.num_tokens, kept, True)
            events.append(Event("swap_out", group.group_id, num_blocks=len(blocks)))
        title, copies = f"iteration {iteration.index}", iteration.copies
        self._keep(title, iteration.index, after, statuses, events, copies)

    def on_completion(self, completion: Completion) -> None:
        """The tables once sequences have ended and beams have moved; no frame if neither did."""
        statuses, events, _ = self._statuses(float("-inf"))
        pairs = (pair for moved in completion.reorders for pair in moved.items())
        events += [Event("move", sequence=child, parent=parent) for child, parent in pairs]
        after, index = self._tables(), self.frames[-1].iteration
        if events or after != self._now:
            self._keep(f"after iteration {index}", index, after, statuses, events, completed=True)

    def step(
        self,
        text: str,
        copies: BlockPairs = (),
        forked: Iterable[tuple[int, int]] = (),
        moved: Mapping[int, int] | None = None,
    ) -> None:
        """A step of a run without scheduler: samples or beams of one prompt.

        `forked` are (parent, child) pairs; `moved` says which beam, child: parent, goes on from
        which other.
        """
        after = self._tables()
        events = [Event("fork", parent=parent, sequence=child) for parent, child in forked]
        events += [Event("move", sequence=c, parent=p) for c, p in (moved or {}).items()]
        self._samples += [seq_id for seq_id in after if seq_id not in self._samples]
        self._keep(text, None, after, {}, events, copies)

    # -- the parts ----------------------------------------------------------------------------

    def _statuses(self, now_s: float) -> tuple[dict[int, str], list[Event], list[SequenceGroup]]:
        """Groups whose status changed, what happened to them, and those that were swapped out."""
        changed, events, out = {}, [], []
        for group in self.groups:
            number = group.group_id
            old = self._status.get(number)
            if old == FINISHED:
                continue
            new = _status(group)
            if new == old or (old is None and group.arrival_s > now_s and new == WAITING):
                continue  # in the second case it is not here yet
            if old is None:
                events.append(Event("arrive", number))
            if new == RUNNING and old == SWAPPED:
                moved = set()
                for seq in group.unfinished():
                    held = self._now[seq.seq_id]
                    moved |= set(held.blocks[held.num_prefix_blocks :])
                events.append(Event("swap_in", number, num_blocks=len(moved)))
            elif new == RUNNING:
                events.append(Event("admit", number, again=number in self._preempted))
            elif new == SWAPPED:
                out.append(group)
            elif new == WAITING and old == RUNNING:
                events.append(Event("recompute", number))
            elif new == FINISHED:
                events.append(Event("finish", number))
            if old == RUNNING and new in (WAITING, SWAPPED):
                self._preempted.add(number)
            changed[number] = new
        self._status |= changed
        return changed, events, out

    def _tables(self) -> dict[int, Held]:
        """All GPU tables as the manager has them, and what is known of those still swapped."""
        found = {}
        for seq_id in (*self.prefix_ids, *self.manager.running_ids):
            table = self.manager.block_table(seq_id)
            found[seq_id] = Held(tuple(table.blocks), table.num_tokens, table.num_prefix_blocks)
        for group in self.groups:
            if self._status.get(group.group_id) == SWAPPED:
                for seq in group.unfinished():
                    if seq.seq_id in self._now and self._now[seq.seq_id].swapped:
                        found[seq.seq_id] = self._now[seq.seq_id]
        return found

    def _keep(
        self,
        title: str,
        iteration: int | None,
        after: dict[int, Held],
        statuses: dict[int, str],
        events: list[Event],
        copies: BlockPairs = (),
        completed: bool = False,
    ) -> None:
        """A frame of what differs from the one before."""
        before = self._now
        prefixes = (p for p in self.prefix_ids if p in after and p not in before)
        events += [Event("prefix", sequence=p) for p in prefixes]
        changed, out = [], []
        for seq_id, held in after.items():
            old = before.get(seq_id)
            if held.swapped:
                if held != old:
                    kept = held.num_prefix_blocks
                    out.append(Change(seq_id, kept, held.blocks[kept:]))
                continue
            keep = 0
            if old is not None:
                if not old.swapped and old.blocks == held.blocks:
                    continue  # tokens alone
                new = () if completed else range(len(old.blocks), len(held.blocks))
                for index in new:
                    block = held.blocks[index]
                    events.append(Event("block", sequence=seq_id, index=index, block=block))
                there = old.blocks[: old.num_prefix_blocks] if old.swapped else old.blocks
                for one, other in zip(there, held.blocks):
                    if one != other:
                        break
                    keep += 1
            changed.append(Change(seq_id, keep, held.blocks[keep:]))
        holder = {block: entry.sequence for entry in reversed(changed) for block in entry.blocks}
        for source, block in copies:
            events.append(Event("copy", sequence=holder[block], source=source, block=block))
        gone = [seq_id for seq_id in before if seq_id not in after]
        grown, tokens = self._token_counts(after)
        self.frames.append(
            Frame(title, iteration, out, gone, grown, changed, tokens, statuses, events)
        )
        self._now = after
        self._consider(title)

    def _token_counts(self, after: dict[int, Held]) -> tuple[int | None, dict[int, int]]:
        """Whether the tables in GPU memory grew by a token, and those of which it is not true."""
        grow = {
            seq_id: held.num_tokens
            for seq_id, held in self._now.items()
            if not held.swapped and seq_id not in self.prefix_ids
        }
        running = {s: held.num_tokens for s, held in after.items() if not held.swapped}
        more = Counter(running[s] - tokens for s, tokens in grow.items() if s in running)
        known = {s: held.num_tokens for s, held in self._now.items()}
        grown = 1 if more[1] > more[0] else None
        if grown:
            known |= {seq_id: tokens + 1 for seq_id, tokens in grow.items()}
        return grown, {s: tokens for s, tokens in running.items() if known.get(s) != tokens}

    def _consider(self, title: str) -> None:
        """Note the moment, also as the one that shows most if it does."""
        on_gpu = [h.blocks for h in self._now.values() if not h.swapped]
        saved = sum(map(len, on_gpu)) - len(set().union(*on_gpu))
        kinds = {_kind(g) for g in self.groups if self._status.get(g.group_id) == RUNNING}
        self.last = Moment(title, self._now, len(kinds), saved)
        if self.fullest is None or self.last.rank > self.fullest.rank:
            self.fullest = self.last


def _status(group: SequenceGroup) -> str:
    left = group.unfinished()
    return left[0].status.value if left else FINISHED


def _kind(group: SequenceGroup) -> str:
    if group.prefix_id is not None:
        return "prefix"
    if group.beam_parents is not None:
        return "beam"
    return "parallel" if len(group.seqs) > 1 else "single"
