"""Sequences, their block tables, and the groups that are scheduled together.

Reproduces: section 4.2-4.3 (block table: physical block and number of filled slots, Fig. 6),
section 4.5 (the sequences of one request form a sequence group, preempted and resumed together).

    >>> table = BlockTable([7, 1], block_size=4, num_tokens=7)
    >>> table.entries()
    [(7, 4), (1, 3)]

Nothing here allocates: a manager (kv_cache_manager.py) decides which blocks a table holds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from enum import Enum
from numbers import Integral


class SequenceStatus(Enum):
    """Where a sequence stands (section 4.5)."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


# Looked up for every sequence that starts or ends: as names of the module they cost half.
RUNNING, FINISHED = SequenceStatus.RUNNING, SequenceStatus.FINISHED


def is_integer(value: object) -> bool:
    """Whether it is an integer of any kind, numpy's included; a bool is none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def check_count(what: str, value: int, least: int = 1) -> int:
    """An integer of any kind as Python's; ValueError if it is none (a bool) or below `least`."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{what} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_id(seq_id: int) -> int:
    """The id of a sequence as Python's integer; ValueError that names it if it is none."""
    if not is_integer(seq_id):
        raise ValueError(f"the id of a sequence must be an integer, got {seq_id!r}")
    return int(seq_id)


class Clock:
    """Steps taken by all running sequences of one manager together."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0


class BlockTable:
    """A sequence's map from logical block to physical block: a list of blocks and one number.

    A decode step gives every running sequence one more token. Counting that in each table would
    cost a write per token, so a running table counts with its manager's clock: its length is
    `offset + clock.now`. A swapped table or a prefix has no clock: its length is its offset.
    """

    __slots__ = ("block_size", "blocks", "clock", "num_prefix_blocks", "offset")

    def __init__(
        self,
        blocks: list[int],
        block_size: int,
        num_tokens: int,
        clock: Clock | None = None,
        num_prefix_blocks: int = 0,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.clock = clock
        self.offset = num_tokens if clock is None else num_tokens - clock.now
        # Leading blocks of a shared prefix: they belong to the provider and are never swapped.
        self.num_prefix_blocks = num_prefix_blocks

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V this table addresses."""
        clock = self.clock
        return self.offset if clock is None else self.offset + clock.now

    @property
    def unfilled(self) -> int:
        """Slots of the last block that hold no token yet (0 to S - 1)."""
        return len(self.blocks) * self.block_size - self.num_tokens

    @property
    def last_slot(self) -> int:
        """The slot number of its newest token."""
        return (self.blocks[-1] + 1) * self.block_size - self.unfilled - 1

    def entries(self) -> list[tuple[int, int]]:
        """(physical block, filled slots) of each logical block: the rows of Fig. 6."""
        filled = [self.block_size] * len(self.blocks)
        if filled:
            filled[-1] -= self.unfilled
        return list(zip(self.blocks, filled))

    def twin(self, clock: Clock | None, moved: Mapping[int, int] | None = None) -> BlockTable:
        """The same tokens, growing with `clock` or not at all, on the same blocks or where those
        behind a prefix have been moved to: {block: its new place}."""
        keep, blocks = self.num_prefix_blocks, self.blocks.copy()
        if moved is not None:
            blocks[keep:] = [moved[block] for block in blocks[keep:]]
        return BlockTable(blocks, self.block_size, self.num_tokens, clock, keep)

    def __repr__(self) -> str:
        return f"BlockTable({self.blocks}, num_tokens={self.num_tokens})"


class Sequence:
    """One sequence of a request: lengths in tokens, and where it stands.

    `prefix_len` tokens of a shared prefix (section 4.4) precede the `prompt_len` of its own, which
    may be 0 only behind a prefix.
    The last generated token is never fed back, so its K and V are never stored: a finished
    sequence has written prefix_len + prompt_len + output_len - 1 slots.

    A running sequence counts its tokens with the scheduler's clock, so that a decode step costs
    nothing here: `start` and `stop` are called when it begins and ceases to run.
    """

    __slots__ = ("_clock", "_offset", "output_len", "prefix_len", "prompt_len", "seq_id", "status")

    def __init__(
        self,
        seq_id: int,
        prompt_len: int,
        output_len: int,
        prefix_len: int = 0,
        num_generated: int = 0,
    ) -> None:
        self.seq_id = check_id(seq_id)
        self.prefix_len = check_count("prefix length", prefix_len, least=0)
        self.prompt_len = check_count("prompt length", prompt_len, least=int(not prefix_len))
        self.output_len = check_count("output length", output_len)
        self.status = SequenceStatus.WAITING
        self._clock: Clock | None = None
        # Tokens generated, less the clock's time while it runs.
        self._offset = check_count("number of tokens", num_generated, least=0)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        clock = self._clock
        return self._offset if clock is None else self._offset + clock.now

    @num_generated.setter
    def num_generated(self, count: int) -> None:
        assert self._clock is None, "the clock counts the tokens of a running sequence"
        self._offset = count

    def start(self, clock: Clock) -> None:
        """From now on it generates a token in every step of the clock."""
        assert self._clock is None, "a running sequence cannot start"
        self._clock = clock
        self._offset -= clock.now
        self.status = RUNNING

    def stop(self, status: SequenceStatus) -> None:
        """It ceases to run, for the reason that its new status gives."""
        assert self._clock is not None, "only a running sequence can stop"
        self._offset += self._clock.now
        self._clock = None
        self.status = status

    @property
    def context_len(self) -> int:
        """Prefix and prompt: the tokens there are before anything is generated."""
        return self.prefix_len + self.prompt_len

    @property
    def final_len(self) -> int:
        """Length once all output is generated: what a request is known to need, in tokens."""
        return self.context_len + self.output_len

    @property
    def num_tokens(self) -> int:
        """Prefix, prompt and generated tokens so far."""
        return self.context_len + self.num_generated


class BeamHistory(list):
    """A beam search: entry [t][i] is the beam that beam i continues after step t (Fig. 9).

    In most steps every beam continues itself; `next_move` finds those in which one does not.
    Groups of the same history may share it.
    """

    def __init__(self, parents: Iterable[list[int]] = ()) -> None:
        super().__init__(parents)
        self._moves: list[int] | None = None  # steps, once they are asked for

    def next_move(self, step: int) -> int | None:
        """The first step from `step` on in which a beam changes parents."""
        if self._moves is None:
            itself = list(range(len(self[0]))) if self else []
            self._moves = [step for step, parents in enumerate(self) if parents != itself]
        index = bisect_left(self._moves, step)
        return self._moves[index] if index < len(self._moves) else None


class SequenceGroup:
    """The sequences of one request; scheduled, preempted and resumed together (section 4.5).

    `beam_parents[i]` gives, for each beam, which beam it continues after step i (beam search);
    it is None for single requests and parallel sampling. `prefix_id` names a shared prefix.
    `order` is first come first served: by arrival, then by number.
    """

    def __init__(
        self,
        group_id: int,
        seqs: list[Sequence],
        arrival_s: float = 0.0,
        prefix_id: int | None = None,
        beam_parents: list[list[int]] | None = None,
    ) -> None:
        if len(seqs) != 1:
            if not seqs:
                raise ValueError(f"group {group_id} has no sequence")
            if len({seq.seq_id for seq in seqs}) < len(seqs):
                raise ValueError(f"group {group_id} names a sequence twice")
            if len({(seq.prefix_len, seq.prompt_len) for seq in seqs}) > 1:
                raise ValueError(f"the sequences of group {group_id} differ in their prompt")
            if beam_parents is not None and len({seq.output_len for seq in seqs}) > 1:
                raise ValueError(f"the beams of group {group_id} differ in their output length")
        self.group_id = group_id
        self.seqs = seqs
        self.arrival_s = arrival_s
        self.prefix_id = prefix_id
        if beam_parents is not None and not isinstance(beam_parents, BeamHistory):
            beam_parents = BeamHistory(beam_parents)
        self.beam_parents = beam_parents
        self.num_preemptions = 0
        self.order = (arrival_s, group_id)
        # While it runs: the step of the scheduler's clock after which something happens to it.
        self.event_step: int | None = None

    @property
    def own_prompt_len(self) -> int:
        """Prompt tokens the group stores itself: all of them, or those behind a shared prefix."""
        first = self.seqs[0]
        return first.context_len if self.prefix_id is None else first.prompt_len

    def unfinished(self) -> list[Sequence]:
        """The sequences that still have output to generate: only these are ever resumed."""
        return [seq for seq in self.seqs if seq.status is not FINISHED]

    def unfinished_ids(self) -> list[int]:
        """Their ids."""
        return [seq.seq_id for seq in self.unfinished()]

    @property
    def finished(self) -> bool:
        """True once no sequence is left to run."""
        return all(seq.status is FINISHED for seq in self.seqs)
