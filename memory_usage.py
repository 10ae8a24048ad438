"""Where every slot of KV-cache memory goes, for either manager.

Reproduces: the definitions of section 3.1 and Fig. 2 (reserved slots, internal fragmentation,
external fragmentation), split further so that no two kinds of loss are lumped together. At every
iteration, in slots and exactly:

    capacity = tokens + reserved + internal + rounding + padding + free

Fig. 2's 'external fragmentation & others' is rounding + padding + free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

BlockPairs = tuple[tuple[int, int], ...]
NO_COPIES: BlockPairs = ()


def check_count(what: str, value: int, least: int = 1) -> None:
    """ValueError unless `value` is an integer of at least `least` (a bool is not a count)."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} must be an integer of at least {least}, got {value!r}")


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """One moment's slots by part, and what sharing saves. All in slots unless named blocks."""

    capacity: int
    tokens: int  # hold a live token's K and V; a shared slot counts once
    free: int  # not allocated
    # Allocated, and this request will fill it later. As in the artifact that counts the last
    # token generated, whose K and V are in fact never stored.
    reserved: int = 0
    internal: int = 0  # allocated beyond what this request will ever use
    rounding: int = 0  # given by the allocator beyond what was asked for
    padding: int = 0  # unfilled slots of last blocks
    logical_tokens: int = 0  # what the running sequences think they hold
    logical_blocks: int = 0  # what they would take without sharing
    physical_blocks: int = 0  # blocks allocated

    PARTS: ClassVar = ("tokens", "reserved", "internal", "rounding", "padding", "free")

    def __post_init__(self) -> None:
        parts = [getattr(self, part) for part in self.PARTS]
        if min(parts) < 0 or sum(parts) != self.capacity:
            named = ", ".join(f"{p} {v}" for p, v in zip(self.PARTS, parts))
            raise AssertionError(f"slot identity broken: capacity {self.capacity} != {named}")

    @property
    def saved(self) -> float:
        """Share of blocks that sharing saves: (logical - physical) / logical (Fig. 15).

        Negative while blocks held for others (an unused shared prefix) outweigh what is saved.
        """
        if not self.logical_blocks:
            return 0.0
        return 1.0 - self.physical_blocks / self.logical_blocks

    def share(self, part: str) -> float:
        """A part as a share of the capacity (0 to 1), as in Fig. 2."""
        return getattr(self, part) / self.capacity

    @property
    def external_and_others(self) -> float:
        """Fig. 2's last part: rounding, padding and unallocated memory, as a share."""
        return (self.rounding + self.padding + self.free) / self.capacity
