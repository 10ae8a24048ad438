"""Contiguous reservations over a buddy allocator: the systems the paper compares with.

Reproduces: section 3.1 (each request reserves contiguous slots for its whole possible length;
Fig. 3), section 6.1 (Orca's three variants, buddy allocation). How much a request reserves:

    max     the model's maximum length, 2048 tokens (FasterTransformer and Orca (Max))
    pow2    the prompt, and the output's true length rounded up to a power of two (Orca (Pow2))
    oracle  the prompt and the output's true length: an upper bound, not feasible (Orca (Oracle))

    >>> manager = BaselineCacheManager(num_blocks=983, block_size=16, policy="max")
    >>> manager.allocate(seq_id=0, num_tokens=50, final_len=50)     # 50 tokens in 2048 slots
    >>> manager.usage().internal
    1998
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from allocator import (
    BuddyAllocator,
    DuplicateSequenceError,
    OutOfBlocksError,
    RequestTooLargeError,
    ReservationError,
    UnknownSequenceError,
)
from memory_usage import NO_COPIES, BlockPairs, MemoryUsage, check_count
from sequence import SequenceGroup

POLICIES = ("max", "pow2", "oracle")
# (first source slot, first destination slot, number of slots): a copy between reservations.
SlotCopy = tuple[int, int, int]


@dataclass(slots=True, eq=False)
class Reservation:
    """A sequence's contiguous slots. `start_len` counts from the manager's clock at zero."""

    start_block: int
    num_blocks: int  # the buddy's chunk
    asked: int  # slots the policy asked for
    final_len: int  # tokens this sequence will hold once it is complete
    start_len: int


class BaselineCacheManager:
    """Contiguous allocation over an address space of `num_blocks` x `block_size` slots."""

    def __init__(
        self, num_blocks: int, block_size: int, *, policy: str = "max", max_len: int = 2048
    ) -> None:
        check_count("number of blocks", num_blocks)
        check_count("block size", block_size)
        check_count("maximum length", max_len)
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: choose one of {', '.join(POLICIES)}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.policy = policy
        self.max_len = max_len
        largest = -(-max_len // block_size)
        self._buddy = BuddyAllocator(num_blocks, 1 << (largest - 1).bit_length())
        self._held: dict[int, Reservation] = {}
        self._now = 0  # steps taken by all sequences together
        # (step at which it is full, a serial number, id, reservation): a heap, cleared lazily.
        self._full_at: list[tuple[int, int, int, Reservation]] = []
        self._serial = count()
        self._empty = BuddyAllocator(num_blocks, 1 << self._buddy.max_order)  # never taken from
        # Sums over the reservations, in slots.
        self._tokens = self._final = self._asked = self._given = 0

    # -- queries ----------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        return self._buddy.num_free

    @property
    def running_ids(self) -> list[int]:
        """Ids of the sequences that hold a reservation, in the order in which they came."""
        return list(self._held)

    def reservation(self, seq_id: int) -> Reservation:
        """The contiguous slots of a sequence; to be read, not written."""
        try:
            return self._held[seq_id]
        except KeyError:
            raise UnknownSequenceError(f"sequence {seq_id} has no reservation") from None

    def num_tokens(self, seq_id: int) -> int:
        """Tokens of the sequence that the cache holds."""
        return self.reservation(seq_id).start_len + self._now

    def start_slot(self, seq_id: int) -> int:
        """The slot of the sequence's first token; token p is at start_slot + p."""
        return self.reservation(seq_id).start_block * self.block_size

    def slots_to_ask(self, num_tokens: int, final_len: int, max_len: int | None = None) -> int:
        """Slots that the policy reserves for a prompt of `num_tokens` that ends at `final_len`.

        `max_len` is the request's own maximum if below the model's (Fig. 3's second request).
        Raises ReservationError if the final length exceeds it, ValueError for bad counts.
        """
        limit = self.max_len if max_len is None else max_len
        usual = type(num_tokens) is type(final_len) is int and max_len is None
        if not usual or not 0 < num_tokens <= final_len:
            check_count("number of tokens", num_tokens)
            check_count("maximum length", limit)
            check_count("final length", final_len, least=num_tokens)
        if final_len > limit or limit > self.max_len:
            raise ReservationError(
                f"a final length of {final_len} with a maximum of {limit}: "
                f"the model's maximum is {self.max_len}"
            )
        if self.policy == "max":
            return limit
        if self.policy == "pow2":
            output = max(1, final_len - num_tokens)
            return min(num_tokens + (1 << (output - 1).bit_length()), limit)
        return final_len

    # -- operations -------------------------------------------------------------------------

    def can_allocate(
        self, num_tokens: int, final_len: int, max_len: int | None = None, number: int = 1
    ) -> bool:
        """Whether `number` such sequences find a chunk each."""
        asked = self.slots_to_ask(num_tokens, final_len, max_len)
        return self._buddy.fits(-(-asked // self.block_size), number)

    def refused_by_fragmentation(self, num_tokens: int, final_len: int) -> bool:
        """Whether it does not fit although as many slots as it asks for are free."""
        asked = self.slots_to_ask(num_tokens, final_len)
        enough = asked <= self.num_free_blocks * self.block_size
        return enough and not self.can_allocate(num_tokens, final_len)

    def allocate(
        self, seq_id: int, num_tokens: int, final_len: int, max_len: int | None = None
    ) -> None:
        """Reserve contiguous slots for a new sequence of `num_tokens` tokens so far.

        `final_len` is its true final length: the oracle and the accounting know it. Raises
        OutOfBlocksError, DuplicateSequenceError, ReservationError, ValueError.
        """
        if seq_id in self._held:
            raise DuplicateSequenceError(f"sequence {seq_id} exists already")
        asked = self.slots_to_ask(num_tokens, final_len, max_len)
        blocks = -(-asked // self.block_size)
        if not self._buddy.fits(blocks):
            raise OutOfBlocksError(
                f"sequence {seq_id} asks for {blocks} contiguous blocks; of "
                f"{self.num_free_blocks} free ones no chunk is large enough"
            )
        self._reserve(seq_id, blocks, asked, num_tokens, final_len)

    def _reserve(
        self, seq_id: int, blocks: int, asked: int, num_tokens: int, final_len: int
    ) -> None:
        """Take the chunk; all has been checked."""
        start, size = self._buddy.take(blocks)
        start_len = num_tokens - self._now
        held = Reservation(start, size, asked, final_len, start_len)
        self._held[seq_id] = held
        self._note_full(seq_id, held)
        self._tokens += num_tokens
        self._final += final_len
        self._asked += asked
        self._given += size

    def require_fits(self, group: SequenceGroup) -> None:
        """RequestTooLargeError unless an empty pool has a chunk for each of its sequences."""
        try:
            asked = max([self.slots_to_ask(s.num_tokens, s.final_len) for s in group.seqs])
        except ReservationError as error:
            raise RequestTooLargeError(f"request {group.group_id}: {error}") from None
        if not self._empty.fits(-(-asked // self.block_size), len(group.seqs)):
            raise RequestTooLargeError(
                f"request {group.group_id} needs {len(group.seqs)} chunks for {asked} slots; "
                f"the pool of {self.num_blocks} blocks has not so many"
            )

    def can_admit(self, group: SequenceGroup) -> bool:
        """Whether every sequence of the group finds a chunk of its own: nothing is shared."""
        seqs = group.unfinished()
        longest = max(seqs, key=lambda seq: self.slots_to_ask(seq.num_tokens, seq.final_len))
        return self.can_allocate(longest.num_tokens, longest.final_len, number=len(seqs))

    def try_admit(self, group: SequenceGroup) -> BlockPairs | None:
        """`admit` if `can_admit`: never a copy, or None and nothing has changed."""
        if len(group.seqs) == 1:  # most requests: no detour
            seq = group.seqs[0]
            num_tokens, final_len = seq.num_tokens, seq.final_len
            asked = self.slots_to_ask(num_tokens, final_len)
            blocks = -(-asked // self.block_size)
            if not self._buddy.fits(blocks):
                return None
            if seq.seq_id in self._held:
                raise DuplicateSequenceError(f"sequence {seq.seq_id} exists already")
            self._reserve(seq.seq_id, blocks, asked, num_tokens, final_len)
            return NO_COPIES
        return self.admit(group) if self.can_admit(group) else None

    def admit(self, group: SequenceGroup) -> BlockPairs:
        """A reservation for each sequence of the group, or for none. Raises as allocate does."""
        if not self.can_admit(group):
            raise OutOfBlocksError(f"group {group.group_id} does not find a chunk per sequence")
        for seq in group.unfinished():
            if seq.seq_id in self._held:
                raise DuplicateSequenceError(f"sequence {seq.seq_id} exists already")
        for seq in group.unfinished():
            self.allocate(seq.seq_id, seq.num_tokens, seq.final_len)
        return NO_COPIES

    def can_append(self, seq_ids: list[int]) -> bool:
        """Whether each has a slot left: always, short of its final length."""
        return all(self.num_tokens(i) < self.reservation(i).final_len for i in seq_ids)

    def append(self, seq_id: int, num_tokens: int = 1) -> BlockPairs:
        """Use `num_tokens` more reserved slots of one sequence; there is never a copy.

        Raises ReservationError past its final length, UnknownSequenceError, ValueError.
        """
        check_count("number of tokens", num_tokens)
        held = self.reservation(seq_id)
        if held.start_len + self._now + num_tokens > held.final_len:
            raise ReservationError(f"sequence {seq_id} ends at {held.final_len} tokens")
        held.start_len += num_tokens
        self._note_full(seq_id, held)
        self._tokens += num_tokens
        return NO_COPIES

    def append_all(self, num_tokens: int = 1) -> BlockPairs:
        """Use `num_tokens` more slots of every sequence, or of none (ReservationError)."""
        check_count("number of tokens", num_tokens)
        if self._held and self._now + num_tokens > self._first_full():
            raise ReservationError(f"a step of {num_tokens} overruns a final length")
        self._now += num_tokens
        self._tokens += num_tokens * len(self._held)
        return NO_COPIES

    def _note_full(self, seq_id: int, held: Reservation) -> None:
        """Put the step at which it is full on the heap; whatever was noted before is void."""
        heap = self._full_at
        heappush(heap, (held.final_len - held.start_len, next(self._serial), seq_id, held))
        if len(heap) > 64 + 4 * len(self._held):  # mostly void, and no step has cleared them
            heap[:] = [
                (r.final_len - r.start_len, next(self._serial), i, r)
                for i, r in self._held.items()
            ]
            heapify(heap)

    def _first_full(self) -> int:
        """The step at which the first reservation is full."""
        heap = self._full_at
        while True:
            step, _, seq_id, held = heap[0]
            if self._held.get(seq_id) is held and step == held.final_len - held.start_len:
                return step
            heappop(heap)

    def free(self, seq_id: int) -> list[int]:
        """Give the reservation back; returns its blocks."""
        held = self.reservation(seq_id)
        del self._held[seq_id]
        self._tokens -= held.start_len + self._now
        self._final -= held.final_len
        self._asked -= held.asked
        self._given -= held.num_blocks
        self._buddy.give_back(held.start_block)
        return list(range(held.start_block, held.start_block + held.num_blocks))

    def reorder(self, parents: dict[int, int]) -> list[SlotCopy]:
        """Beam search without sharing: each child gets a copy of its parent's whole K/V.

        Returns (source slot, destination slot, count), to be made as if at once. All lengths
        must be equal, as those of beams are; ReservationError otherwise.
        """
        for child, parent in parents.items():
            if self.num_tokens(child) != self.num_tokens(parent):
                raise ReservationError(f"beams {child} and {parent} differ in length")
        return [
            (self.start_slot(parent), self.start_slot(child), self.num_tokens(parent))
            for child, parent in parents.items()
            if child != parent
        ]

    # -- accounting -------------------------------------------------------------------------

    def usage(self) -> MemoryUsage:
        """Where every slot of the address space is, now."""
        return MemoryUsage(
            capacity=self.num_blocks * self.block_size,
            tokens=self._tokens,
            reserved=self._final - self._tokens,
            internal=self._asked - self._final,
            rounding=self._given * self.block_size - self._asked,
            free=self.num_free_blocks * self.block_size,
            logical_tokens=self._tokens,
            logical_blocks=self._given,
            physical_blocks=self._given,
        )

    def check_invariants(self) -> None:
        """Recompute everything from the reservations alone; AssertionError at a difference."""
        self._buddy.check_invariants()
        chunks = {r.start_block: r.num_blocks for r in self._held.values()}
        assert len(chunks) == len(self._held), "two sequences hold the same chunk"
        assert chunks == {s: 1 << o for s, o in self._buddy.chunk_order.items()}, "chunk lost"
        held = self._held.values()
        lengths = [r.start_len + self._now for r in held]
        for length, r in zip(lengths, held):
            assert 0 < length <= r.final_len <= r.asked, "length, final length, slots asked for"
            assert r.asked <= r.num_blocks * self.block_size, "chunk smaller than asked for"
            least = -(-r.asked // self.block_size)
            assert r.num_blocks == 1 << (least - 1).bit_length(), "chunk not the next power of two"
        assert self._tokens == sum(lengths), "sum of tokens"
        assert self._final == sum(r.final_len for r in held), "sum of final lengths"
        assert self._asked == sum(r.asked for r in held), "sum of slots asked for"
        assert self._given == sum(r.num_blocks for r in held), "sum of blocks given"
        if held:
            first = min(r.final_len - r.start_len for r in held)
            assert self._first_full() == first, "the step at which the first reservation is full"
        used = self.num_blocks - self._buddy.num_free
        assert used == self._given, "free and reserved blocks partition the pool"
        self.usage()
