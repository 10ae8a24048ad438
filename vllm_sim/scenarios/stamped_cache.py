"""K and V that tell whose they are, and an observer that keeps them in the cache of a run.

Reproduces nothing: it is how main.py proves that the bookkeeping of a run (paging, copy-on-write,
beam search, swapping, recomputation) leads every sequence to its own K and V. The observer does
on tensors what each iteration asks for, and keeps beside it, for each sequence, the plain list of
its tokens, which knows nothing of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kv_cache_manager import BaselineCacheManager, PagedKVCacheManager
from paged_attention import PagedKVCache, slot_mapping
from sequence import Sequence, SequenceGroup
from vllm_sim.scenarios.setting import Setting
from vllm_sim.serving.scheduler import Completion, Iteration, Manager
from vllm_sim.serving.simulator import Observer

PIECE = 48  # tokens written or read at once: larger buffers are not reused by malloc


class Stamps:
    """K and V as f(token, layer, k or v, head, element): every element is exact in fp16.

    Each token of a run has a number of its own. Even elements carry its lower ten bits, odd ones
    the next ten, and a random pattern for each layer, K or V, head and element is added, so a
    vector in the wrong place is found whichever part of it was misled.
    """

    BITS = 10  # two such parts and the pattern sum to less than 2048: exact in fp16

    def __init__(self, setting: Setting) -> None:
        m = setting.model
        rng = np.random.default_rng([setting.seed, 20])
        shape = (setting.num_layers, 2, m.num_kv_heads, m.head_size)
        pattern = torch.from_numpy(rng.integers(0, 1 << self.BITS, shape))
        self._pattern = pattern.to(setting.device, setting.dtype)
        self._odd = torch.arange(m.head_size, device=setting.device) % 2 == 1  # (D,)

    def values(self, tokens: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k, v), each (T, H_kv, D), of the tokens with these numbers, int64 (T,)."""
        assert tokens.ndim == 1
        pattern = self._pattern[layer]  # (2, H_kv, D)
        mask = (1 << self.BITS) - 1
        low, high = (tokens & mask)[:, None, None], ((tokens >> self.BITS) & mask)[:, None, None]
        number = torch.where(self._odd, high, low).to(pattern.dtype)  # (T, 1, D)
        return number + pattern[0], number + pattern[1]

    def write(self, cache: PagedKVCache, slots: torch.Tensor, tokens: list[int]) -> None:
        """Store tokens, by number, in slots (T,); in pieces, so that buffers are reused."""
        for at, numbers in _pieces(slots, tokens, cache.device):
            for layer in range(cache.num_layers):
                cache.write(layer, at, *self.values(numbers, layer))

    def held(self, cache: PagedKVCache, slots: torch.Tensor, tokens: list[int]) -> bool:
        """Whether slots (T,) hold these tokens, in every layer."""
        for at, numbers in _pieces(slots, tokens, cache.device):
            for layer in range(cache.num_layers):
                if not all(map(torch.equal, cache.read(layer, at), self.values(numbers, layer))):
                    return False
        return True


def _pieces(
    slots: torch.Tensor, tokens: list[int], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for first in range(0, len(tokens), PIECE):
        numbers = torch.tensor(tokens[first : first + PIECE], device=device)
        yield slots[first : first + PIECE].to(device), numbers


class StampedCache(Observer):
    """The tensors of one run. Give it to `simulate` as an observer.

    `verified` counts the finished sequences whose every K and V, in every layer, was found through
    the manager's tables to be its own; `wrong` names the others.
    """

    def __init__(self, setting: Setting, manager: Manager, cache: PagedKVCache) -> None:
        self.manager = manager
        self.cache = cache
        self.verified = 0
        self.tokens_verified = 0
        self.wrong: list[int] = []
        self.bytes_moved = 0  # copied inside the pool: copy-on-write, or beams without sharing
        self.stamps = Stamps(setting)
        self.tokens: dict[int, list[int]] = {}  # sequence -> numbers of its tokens
        self._prefix: list[int] = []
        self._next_token = 0

    def store_prefix(self, prefix_len: int, prefix_id: int | None) -> None:
        """Give the shared prefix its tokens, and write them once if the manager holds it.

        Where nothing is shared (`prefix_id` None) every sequence stores the same tokens itself.
        """
        self._prefix = self._new_tokens(prefix_len)
        if prefix_id is not None:
            self.stamps.write(self.cache, self.slots(prefix_id, 0, prefix_len), self._prefix)

    # -- what an iteration does to the tensors -----------------------------------------------

    def on_iteration(self, iteration: Iteration) -> None:
        cache = self.cache
        moves = iteration.swapped_out, iteration.freed, iteration.swapped_in, iteration.copies
        cache.move(*moves)
        self.bytes_moved += len(iteration.copies) * cache.bytes_per_block
        for group in iteration.prefills:
            for seq_id, start, tokens in self._prefill(group):
                self.stamps.write(self.cache, self.slots(seq_id, start, len(tokens)), tokens)
        ids = [seq.seq_id for group in iteration.decodes for seq in group.unfinished()]
        new = self._new_tokens(len(ids))
        self.stamps.write(
            self.cache, torch.tensor([self._last_slot(i) for i in ids], dtype=torch.int64), new
        )
        for seq_id, token in zip(ids, new):
            self.tokens[seq_id].append(token)
        for group in (*iteration.prefills, *iteration.decodes):
            for seq in group.unfinished():
                if seq.num_generated + 1 == seq.output_len:
                    self._verify(seq)

    def on_completion(self, completion: Completion) -> None:
        for moved, result in zip(completion.reorders, completion.moves):
            self.tokens |= {child: self.tokens[parent].copy() for child, parent in moved.items()}
            if isinstance(self.manager, BaselineCacheManager):
                self._copy_slots(result)
            else:
                self.cache.poison_blocks(result)
        if isinstance(self.manager, PagedKVCacheManager):
            self.cache.poison_blocks(completion.freed)
        for group in completion.finished:
            for seq in group.seqs:
                del self.tokens[seq.seq_id]

    # -- the parts ---------------------------------------------------------------------------

    def _new_tokens(self, count: int) -> list[int]:
        first, self._next_token = self._next_token, self._next_token + count
        return list(range(first, first + count))

    def _prefill(self, group: SequenceGroup) -> list[tuple[int, int, list[int]]]:
        """The writes of a prompt, or of all that a recomputed group had.

        A recomputed sequence is written whole: it may hold a copy of a prompt block of its own.
        """
        seqs = group.unfinished()
        shared = seqs[0].prefix_len if group.prefix_id is not None else 0
        if seqs[0].seq_id not in self.tokens:
            prompt = self._prefix[: seqs[0].prefix_len] + self._new_tokens(seqs[0].prompt_len)
            for seq in seqs:
                self.tokens[seq.seq_id] = prompt.copy()
            if isinstance(self.manager, PagedKVCacheManager):
                return [(seqs[0].seq_id, shared, prompt[shared:])]
        else:
            # The last token generated before was not stored yet: it is recomputed with the rest.
            for seq in seqs:
                tokens = self.tokens[seq.seq_id]
                tokens += self._new_tokens(seq.num_tokens - len(tokens))
        return [(seq.seq_id, shared, self.tokens[seq.seq_id][shared:]) for seq in seqs]

    def slots(self, seq_id: int, start: int, count: int) -> torch.Tensor:
        """Slot numbers of a range of a sequence's tokens, (count,) int64 on the host."""
        if isinstance(self.manager, BaselineCacheManager):
            first = self.manager.start_slot(seq_id) + start
            return torch.arange(first, first + count)
        blocks = self.manager.block_table(seq_id).blocks
        return slot_mapping(blocks, start, count, self.manager.block_size)

    def _last_slot(self, seq_id: int) -> int:
        """The slot of a sequence's newest token."""
        if isinstance(self.manager, BaselineCacheManager):
            return self.manager.start_slot(seq_id) + self.manager.num_tokens(seq_id) - 1
        return self.manager.block_table(seq_id).last_slot

    def _verify(self, seq: Sequence) -> None:
        """Read a sequence that is about to finish through its table, every layer."""
        expected = self.tokens[seq.seq_id]
        length = self.manager.num_tokens(seq.seq_id)
        right = length == len(expected) == seq.final_len - 1
        if right and self.stamps.held(self.cache, self.slots(seq.seq_id, 0, length), expected):
            self.verified += 1
            self.tokens_verified += length
        else:
            self.wrong.append(seq.seq_id)

    def _copy_slots(self, copies: list[tuple[int, int, int]]) -> None:
        """Beams without sharing: whole sequences copied, as if at once."""
        device = self.cache.device
        sources = torch.cat([torch.arange(s, s + n) for s, _, n in copies]).to(device)
        targets = torch.cat([torch.arange(d, d + n) for _, d, n in copies]).to(device)
        for layer in range(self.cache.num_layers):
            self.cache.write(layer, targets, *self.cache.read(layer, sources))
        self.bytes_moved += len(sources) * self.cache.bytes_per_token
