"""Our `BaselineCacheManager`: every call in every state.

Searches section 6.1 of the paper: reservations in contiguous chunks. What is free is worked out as
for the buddy allocator alone; what a policy asks for is section 6.1 written once more. Two states
are one if they differ only in the ids of sequences and in the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kv_cache_manager import (
    BaselineCacheManager,
    DuplicateSequenceError,
    OutOfBlocksError,
    Reservation,
    ReservationError,
    UnknownSequenceError,
)
from sequence import Sequence, SequenceGroup
from vllm_sim.conformance.adapter import NOTHING, Operation, Pass, Step, Tables
from vllm_sim.conformance.adapters.buddy import copied, free_of, free_runs, frozen, power_from

STRANGER = 10**6
REFUSED = {
    "OutOfBlocksError": "allocate admit",
    "ReservationError": "allocate append append_all reorder",
    "DuplicateSequenceError": "allocate admit",
    "UnknownSequenceError": "append free num_tokens reorder truncate",
    "ValueError": "append append_all truncate",
}


@dataclass(frozen=True)
class World:
    """A policy of Orca's, and how large all is."""

    policy: str
    num_blocks: int
    block_size: int
    max_len: int
    num_seqs: int

    def __str__(self) -> str:
        return (
            f"{self.policy}, {self.num_blocks} blocks of {self.block_size}, {self.num_seqs} "
            f"sequences of up to {self.max_len}"
        )


class ContiguousManager:
    """The adapter of the manager."""

    worlds: ClassVar = {
        "max": World("max", 13, 1, 4, 4),
        "pow2": World("pow2", 6, 2, 6, 3),
        "oracle": World("oracle", 13, 1, 4, 4),
        "large-max": World("max", 17, 1, 4, 4),
        "large-pow2": World("pow2", 17, 1, 4, 4),
        "large-oracle": World("oracle", 15, 1, 4, 4),
    }
    required = (
        *["allocate", "try_admit", "append", "append_all", "truncate", "reorder", "free"],
        *(
            f"{call}: {error}"
            for error, calls in REFUSED.items()
            for call in calls.split()
            if error != "OutOfBlocksError"
        ),  # a pool with room for all never runs dry
    )

    def start(self, world: World) -> None:
        self.world, self.last = world, 0
        sizes = world.num_blocks, world.block_size
        self.manager = BaselineCacheManager(*sizes, policy=world.policy, max_len=world.max_len)
        self.tokens: dict[int, tuple[int, ...]] = {}

    def __deepcopy__(self, _: dict) -> ContiguousManager:
        new, m = object.__new__(type(self)), object.__new__(BaselineCacheManager)
        new.world, new.last, new.manager, new.tokens = self.world, self.last, m, self.tokens.copy()
        m.__dict__ |= self.manager.__dict__
        m._buddy = copied(m._buddy)
        m._held = {
            i: Reservation(r.start_block, r.num_blocks, r.asked, r.final_len, r.start_len)
            for i, r in m._held.items()
        }
        return new

    def tables(self) -> Tables:
        return {
            i: (range(r.start_block, r.start_block + r.num_blocks), self.tokens[i])
            for i, r in self.manager._held.items()
        }

    def free(self) -> list[int]:
        return free_of(self.manager._buddy)

    def ref_counts(self) -> None:
        return None

    def cached(self) -> dict:
        return {}

    def key(self) -> tuple:
        m = self.manager
        held = sorted(
            (r.start_block, r.num_blocks, r.asked, r.final_len, r.start_len + m._now)
            for r in m._held.values()
        )
        return tuple(held), frozen(m._buddy), (m._tokens, m._final, m._asked)

    # -- what may be called -----------------------------------------------------------------

    def _asked(self, num_tokens: int, final: int, limit: int) -> int:
        """Section 6.1's three answers, in slots."""
        if self.world.policy == "max":
            return limit
        if self.world.policy == "oracle":
            return final
        return min(num_tokens + power_from(max(1, final - num_tokens)), limit)

    def _chunks(self, num_slots: int) -> tuple[int, int]:
        """How many chunks for so many slots are free, and how large they are."""
        size = power_from(-(-num_slots // self.world.block_size))
        if size not in self.runs:
            self.runs[size] = free_runs(self.manager._buddy, size)
        return self.runs[size], size

    def operations(self) -> list[Operation]:
        m, world = self.manager, self.world
        m.check_invariants()
        self.runs: dict[int, int] = {}  # by size
        lengths = {i: (len(self.tokens[i]), r.final_len) for i, r in m._held.items()}
        assert all(m.num_tokens(i) == length for i, (length, _) in lengths.items())
        usage, tokens = m.usage(), sum(length for length, _ in lengths.values())
        assert usage.tokens == usage.logical_tokens == tokens
        assert usage.reserved == sum(final for _, final in lengths.values()) - tokens
        unused = [i for i in range(world.num_seqs) if i not in m._held]
        found = [*self._admission(unused)] if unused else []
        for i, (length, final) in lengths.items():
            assert m.can_append([i]) == (length < final)
            for count in (1, 2):
                error = ReservationError if length + count > final else None
                found.append(Operation("append", (i, count), error, 0))
            for keep in range(1, length + 2):
                error = ValueError if keep > length else None
                found.append(Operation("truncate", (i, keep), error, 0))
            found.append(Operation("free", (i,), None, -m._held[i].num_blocks))
        for count in (1, 2):
            short = any(length + count > final for length, final in lengths.values())
            found.append(Operation("append_all", (count,), ReservationError if short else None, 0))
        for child, (length, _) in lengths.items():
            for parent, (other, _) in lengths.items():
                error = None if length == other else ReservationError
                found.append(Operation("reorder", (child, parent), error, 0))
        return found + [*self._illegal(lengths)]

    def _admission(self, unused: list[int]) -> Iterator[Operation]:
        m, most = self.manager, self.world.max_len
        whole = range(1, most + 1)
        kinds = [(tokens, final, None) for tokens in whole for final in whole if final >= tokens]
        for tokens, final, limit in kinds + [(1, 2, most - 1)] * (most > 2):
            asked = self._asked(tokens, final, limit or most)
            runs, size = self._chunks(asked)
            for number in (runs, runs + 1):
                assert m.can_allocate(tokens, final, limit, number) == (number <= runs)
            if limit is None:
                enough = asked <= m.num_free_blocks * self.world.block_size
                assert m.refused_by_fragmentation(tokens, final) == (enough and not runs)
            args, error = (unused[0], tokens, final, limit), None if runs else OutOfBlocksError
            yield Operation("allocate", args, error, size)
        if most > 2:
            yield Operation("allocate", (unused[0], 1, most, most - 1), ReservationError)
        for generated in ((0, 0), (0, 1)) if len(unused) > 1 else ():
            asked = [self._asked(1 + count, 3, most) for count in generated]
            # Cautious where they differ: a chunk of the larger size is asked for each.
            fits = self._chunks(max(asked))[0] >= 2
            args = tuple(unused[:2]), generated
            group = group_of(*args)
            assert m.can_admit(group) == fits
            if fits:
                takes = sum(self._chunks(slots)[1] for slots in asked)
                yield Operation("try_admit", args, None, takes)
            else:
                before = self.key()
                assert m.try_admit(group) is None and self.key() == before
                yield Operation("admit", args, OutOfBlocksError)

    def _illegal(self, lengths: dict) -> Iterator[Operation]:
        unknown = UnknownSequenceError
        yield Operation("append", (STRANGER, 1), unknown)
        yield Operation("free", (STRANGER,), unknown)
        yield Operation("num_tokens", (STRANGER,), unknown)
        yield Operation("truncate", (STRANGER, 1), unknown)
        yield Operation("append_all", (0,), ValueError)
        for i in list(lengths)[:1]:
            yield Operation("allocate", (i, 1, 1, None), DuplicateSequenceError)
            yield Operation("append", (i, 0), ValueError)
            yield Operation("reorder", (i, STRANGER), unknown)
            if self._chunks(self._asked(1, 2, self.world.max_len))[0] >= 2:
                yield Operation("admit", ((STRANGER, i), (0, 0), 1), DuplicateSequenceError)

    # -- what is called ---------------------------------------------------------------------

    def apply(self, operation: Operation) -> Step:
        (name, args, *_), m = operation, self.manager
        if name in ("admit", "try_admit"):
            group = group_of(*args)
            result = getattr(m, name)(group)
            assert result == ()
            return self._written({s.seq_id: (0, s.num_tokens, s.final_len) for s in group.seqs})
        if name == "reorder":
            child, parent = args
            copies = m.reorder({child: parent})
            self.tokens[child] = self.tokens[parent]
            pairs = [(a + at, b + at) for a, b, length in copies for at in range(length)]
            assert len(pairs) == len(self.tokens[parent]) * (child != parent), "not all are copied"
            return Step((pairs,))
        held = m._held.get(args[0])
        result = getattr(m, name)(*args)
        if name == "allocate":
            return self._written({args[0]: (0, args[1], args[2])}, args[3])
        if name in ("append", "append_all"):
            ids = args[:1] if name == "append" else m.running_ids
            return self._written({i: (len(self.tokens[i]), args[-1], None) for i in ids})
        if name == "truncate":
            self.tokens[args[0]] = self.tokens[args[0]][: args[1]]
        if name == "free":
            del self.tokens[args[0]]
            assert result == [*range(held.start_block, held.start_block + held.num_blocks)]
        return NOTHING

    def _written(self, new: dict[int, tuple], limit: int | None = None) -> Step:
        """{sequence: (from where, how many tokens, their final number if it is new)}"""
        passes = []
        for i, (start, count, final) in new.items():
            r = self.manager._held[i]
            if final is not None:
                assert r.asked == self._asked(count, final, limit or self.world.max_len)
                assert (r.final_len, r.start_block % r.num_blocks) == (final, 0)
            self.tokens[i] = self.tokens.get(i, ()) + (*range(self.last, self.last + count),)
            self.last += count
            first, length = r.start_block * self.world.block_size, len(self.tokens[i])
            passes.append(Pass(i, self.tokens[i], start, range(first, first + length)))
        return Step((), passes)


def group_of(ids: tuple, generated: tuple, output: int = 2) -> SequenceGroup:
    return SequenceGroup(0, [Sequence(i, 1, output, 0, n) for i, n in zip(ids, generated)])
