"""What an iteration may hold, what it does, and what follows it.

Reproduces: the scheduler's decision of section 4.5 as the workers are sent it (section 4.6): blocks
to swap and to copy, prompts to compute, sequences to extend. scheduler.py decides, latency.py and
stamped_cache.py carry out.

    iteration = scheduler.schedule()
    print(iteration.num_groups, iteration.copies)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kv_cache_manager import BaselineCacheManager, BlockPairs, PagedKVCacheManager
from sequence import SequenceGroup

Manager = PagedKVCacheManager | BaselineCacheManager


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
    num_decodes: int = 0  # sequences of `decodes`: each computes one token
    context_tokens: int = 0  # K/V that they read, each for itself, also where it is shared
    prompt_tokens: int = 0  # that `prefills` compute

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
