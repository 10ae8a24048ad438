"""What happened to every block in a run of the paged manager, step by step, to be played back.

Reproduces nothing by itself: a Recorder watches the run of a scenario (sections 4.3 to 4.5: blocks
on demand, copy-on-write, beam search, preemption by swapping and by recomputation) and keeps what
changed in the block tables. It decides nothing and repeats no rule: GPU tables are read from the
manager after each step, CPU blocks from the map that swapping returned, queues from the
sequences' own status. timeline.py makes a page of it, pictures_memory.py the block map.

    recorder = Recorder("paged, swap", "64 requests", manager, groups, prefix_ids=(0,))
    simulate(groups, manager, limits, observers=[recorder])
    recorder.to_json()["frames"]

A step is a frame, a dict with only those of these that are not empty:

    i, p   number of the iteration, and the phase: "s" scheduled, "c" completed
    t      in place of those, a text
    g      [group, status]: "w" waiting, "r" running, "s" swapped, "f" finished
    o      [sequence, k, blocks]: swapped, it keeps its first k GPU blocks, a shared prefix's; the
           rest are these CPU blocks
    x      sequences that hold no block any more
    a      1: every other sequence that was in GPU memory, prefixes apart, has a token more
    d      [sequence, k, blocks]: its GPU blocks are the first k it had there, and then these
    n      [sequence, tokens] where they are others than that, or the sequence is new
    e      events, a name and what it is about: arrive, admit (group, 1 if not for the first time),
           swap_out (group, blocks), recompute (group), swap_in (group, blocks), prefix (sequence),
           fork (parent, child), block (sequence, logical block, physical block),
           copy (source, destination, sequence), move (child, parent), finish (group)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kv_cache_manager import BlockPairs, PagedKVCacheManager
from sequence import SequenceGroup, SequenceStatus
from vllm_sim.serving.scheduler import Completion, Iteration
from vllm_sim.serving.simulator import Observer

LETTERS = {
    SequenceStatus.WAITING: "w",
    SequenceStatus.RUNNING: "r",
    SequenceStatus.SWAPPED: "s",
    SequenceStatus.FINISHED: "f",
}
Event = list[int | str]


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


class Recorder(Observer):
    """Frames of one run. Of scheduled runs it is an observer; others call `step`."""

    def __init__(
        self,
        name: str,
        about: str,
        manager: PagedKVCacheManager,
        groups: Iterable[SequenceGroup] = (),
        prefix_ids: Seq[int] = (),
    ) -> None:
        self.name, self.about, self.manager = name, about, manager
        self.groups = sorted(groups, key=lambda group: group.order)
        self.prefix_ids = tuple(prefix_ids)
        self.frames: list[dict] = []
        self.last: Moment | None = None
        self.fullest: Moment | None = None
        self._now: dict[int, Held] = {}
        self._status: dict[int, str] = {}
        self._samples: list[int] = []  # of a run without groups
        self._preempted: set[int] = set()

    # -- what is observed ---------------------------------------------------------------------

    def on_iteration(self, iteration: Iteration) -> None:
        """The tables as they stand after scheduling."""
        frame = {"i": iteration.index, "p": "s"}
        events, out = self._statuses(frame, iteration.start_s)
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
            events.append(["swap_out", group.group_id, len(blocks)])
        self._keep(frame, after, events, iteration.copies, f"iteration {iteration.index}")

    def on_completion(self, completion: Completion) -> None:
        """The tables once sequences have ended and beams have moved; no frame if neither did."""
        frame = {"i": self.frames[-1]["i"], "p": "c"}
        events, _ = self._statuses(frame, float("-inf"))
        moves = [["move", *pair] for moved in completion.reorders for pair in moved.items()]
        after = self._tables()
        if events or moves or after != self._now:
            self._keep(frame, after, events + moves, (), f"after iteration {frame['i']}")

    def step(
        self, text: str, copies: BlockPairs = (), forked: tuple[int, int] | None = None
    ) -> None:
        """A step of a run without scheduler: samples of one prompt."""
        after = self._tables()
        events = [["fork", *forked]] if forked else []
        self._samples += [seq_id for seq_id in after if seq_id not in self._samples]
        self._keep({"t": text}, after, events, copies, text)

    # -- what is kept -------------------------------------------------------------------------

    def to_json(self) -> dict:
        """The whole recording."""
        manager = self.manager
        return {
            "name": self.name,
            "about": self.about,
            "num_blocks": manager.num_blocks,
            "num_cpu_blocks": manager.num_cpu_blocks,
            "block_size": manager.block_size,
            "prefixes": list(self.prefix_ids),
            "groups": self._described(),
            "frames": self.frames,
        }

    def owners(self) -> dict[int, tuple[str, str]]:
        """Sequence -> (what its group is called, its kind); of a prefix too."""
        found = dict.fromkeys(self.prefix_ids, ("P", "prefix itself"))
        for group in self._described():
            found |= dict.fromkeys(group["seqs"], (group["name"], group["kind"]))
        return found

    def preemptions(self) -> list[int]:
        """The iterations that preempted a group."""
        names = ("swap_out", "recompute")
        return [f["i"] for f in self.frames if any(e[0] in names for e in f.get("e", ()))]

    def _described(self) -> list[dict]:
        if not self.groups:
            return [{"id": 0, "name": "A", "kind": "parallel", "seqs": self._samples}]
        return [
            {
                "id": g.group_id,
                "name": str(g.group_id),
                "kind": _kind(g),
                "seqs": [seq.seq_id for seq in g.seqs],
                "prompt": g.seqs[0].prompt_len,
                "output": g.seqs[0].output_len,
            }
            for g in self.groups
        ]

    # -- the parts ----------------------------------------------------------------------------

    def _statuses(self, frame: dict, now_s: float) -> tuple[list[Event], list[SequenceGroup]]:
        """Events of groups whose status changed, and those that were swapped out."""
        changed, events, out = [], [], []
        for group in self.groups:
            number = group.group_id
            old, new = self._status.get(number), _status(group)
            if old is None and group.arrival_s > now_s and new == "w":
                continue  # it is not here yet
            if new == old:
                continue
            if old is None:
                events.append(["arrive", number])
            if new == "r" and old == "s":
                moved = {b for s in group.unfinished() for b in self._cpu_blocks(s.seq_id)}
                events.append(["swap_in", number, len(moved)])
            elif new == "r":
                events.append(["admit", number, int(number in self._preempted)])
            elif new == "s":
                out.append(group)
            elif new == "w" and old == "r":
                events.append(["recompute", number])
            elif new == "f":
                events.append(["finish", number])
            if old == "r" and new in "ws":
                self._preempted.add(number)
            self._status[number] = new
            changed.append([number, new])
        if changed:
            frame["g"] = changed
        return events, out

    def _cpu_blocks(self, seq_id: int) -> tuple[int, ...]:
        held = self._now[seq_id]
        return held.blocks[held.num_prefix_blocks :]

    def _tables(self) -> dict[int, Held]:
        """All GPU tables as the manager has them, and what is known of those still swapped."""
        found = {}
        for seq_id in (*self.prefix_ids, *self.manager.running_ids):
            table = self.manager.block_table(seq_id)
            found[seq_id] = Held(tuple(table.blocks), table.num_tokens, table.num_prefix_blocks)
        for group in self.groups:
            if self._status.get(group.group_id) == "s":
                for seq in group.unfinished():
                    if seq.seq_id in self._now and self._now[seq.seq_id].swapped:
                        found[seq.seq_id] = self._now[seq.seq_id]
        return found

    def _keep(
        self,
        frame: dict,
        after: dict[int, Held],
        events: list[Event],
        copies: BlockPairs,
        title: str,
    ) -> None:
        """A frame of what differs from the one before."""
        before = self._now
        events += [["prefix", p] for p in self.prefix_ids if p in after and p not in before]
        changed, out = [], []
        for seq_id, held in after.items():
            old = before.get(seq_id)
            if held.swapped:
                if held != old:
                    kept = held.num_prefix_blocks
                    out.append([seq_id, kept, list(held.blocks[kept:])])
                continue
            keep = 0
            if old is not None:
                if not old.swapped and old.blocks == held.blocks:
                    continue  # tokens alone
                if frame.get("p") != "c":
                    new = range(len(old.blocks), len(held.blocks))
                    events += [["block", seq_id, index, held.blocks[index]] for index in new]
                there = old.blocks[: old.num_prefix_blocks] if old.swapped else old.blocks
                for one, other in zip(there, held.blocks):
                    if one != other:
                        break
                    keep += 1
            changed.append([seq_id, keep, list(held.blocks[keep:])])
        holder = {block: entry[0] for entry in reversed(changed) for block in entry[2]}
        events += [["copy", source, new, holder[new]] for source, new in copies]
        gone = [seq_id for seq_id in before if seq_id not in after]
        frame |= self._token_counts(after)
        named = {"d": changed, "o": out, "x": gone, "e": events}
        frame |= {name: value for name, value in named.items() if value}
        self.frames.append(frame)
        self._now = after
        self._consider(title)

    def _token_counts(self, after: dict[int, Held]) -> dict:
        """Whether the tables in GPU memory grew by a token, and those of which it is not true."""
        grow = {
            seq_id: held.num_tokens
            for seq_id, held in self._now.items()
            if not held.swapped and seq_id not in self.prefix_ids
        }
        running = {s: held.num_tokens for s, held in after.items() if not held.swapped}
        more = Counter(running[s] - tokens for s, tokens in grow.items() if s in running)
        known = {s: held.num_tokens for s, held in self._now.items()}
        all_grew = more[1] > more[0]
        if all_grew:
            known |= {seq_id: tokens + 1 for seq_id, tokens in grow.items()}
        others = [[s, tokens] for s, tokens in running.items() if known.get(s) != tokens]
        return ({"a": 1} if all_grew else {}) | ({"n": others} if others else {})

    def _consider(self, title: str) -> None:
        """Note the moment, also as the one that shows most if it does."""
        on_gpu = [h.blocks for h in self._now.values() if not h.swapped]
        references = sum(map(len, on_gpu))
        saved = references - len(set().union(*on_gpu))
        kinds = {_kind(g) for g in self.groups if self._status.get(g.group_id) == "r"}
        self.last = Moment(title, self._now, len(kinds), saved)
        if self.fullest is None or self.last.rank > self.fullest.rank:
            self.fullest = self.last


def _status(group: SequenceGroup) -> str:
    left = group.unfinished()
    return LETTERS[left[0].status if left else SequenceStatus.FINISHED]


def _kind(group: SequenceGroup) -> str:
    if group.prefix_id is not None:
        return "prefix"
    if group.beam_parents is not None:
        return "beam"
    return "parallel" if len(group.seqs) > 1 else "single"
