"""A cache of blocks for transformers' `generate()`: the paper's section 4.4 on a real model.

    cache = PagedCache(model, num_blocks=256, width=4)
    model.generate(**inputs, num_beams=4, max_new_tokens=64, cache=cache)
    cache.usage().saved                 # the share of blocks that the beams do not take

Reproduces: section 4.3 (a block when it is needed), 4.4 (samples and beams fork from one prompt;
copy-on-write; a beam that goes on from another shares its blocks). Greedy decoding, sampling with
num_return_sequences, beam search, left padding, a prefill in chunks, a cache that is filled once
and then forked (`batch_repeat_interleave`), and assisted decoding (`crop`) are as with the
library's own cache.

Padding takes no slot: a row begins when its first token comes. Rows of one prompt (`width`) store
it once, and fork when they are first given a token each. A row that is finished goes on growing
until all are, as generate() feeds it padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from kv_cache_manager import (
    NO_COPIES,
    BlockPairs,
    MemoryUsage,
    OutOfBlocksError,
    PagedKVCacheManager,
)
from paged_attention import pad_block_tables, slot_mapping, upload
from sequence import check_count
from vllm_sim.engine.block_cache import BlockCache, Segment, Step, decode_part

SAME = 1e-3  # K of equal tokens, computed in different rows of a batch: relative difference


class PagedCache(BlockCache):
    """K and V of the rows of one batch, in blocks. Row r is sequence `seq_ids[r]` of `manager`."""

    def __init__(
        self,
        model: PreTrainedModel,
        num_blocks: int,
        block_size: int = 16,
        *,
        width: int = 1,
        kernel: str = "auto",
        poison: bool = False,
        on_step: Callable[[PagedCache], None] | None = None,
    ) -> None:
        """`width` consecutive rows have one prompt: num_beams or num_return_sequences.

        `poison` fills unused slots with NaN; `on_step` is called in each forward, once its blocks
        are there, and after beams have moved: `copies`, `forked` and `moved` say what happened, and
        `usage()` where the memory is. Raises UnsupportedModelError, KernelError, ValueError. A
        forward raises OutOfBlocksError, before a token is stored, if it has too few blocks.
        """
        self.width = check_count("width", width)
        manager = PagedKVCacheManager(num_blocks, block_size, watermark=0.0)
        super().__init__(model, manager, kernel, poison)
        self.num_copies = 0
        self._begin()
        self._on_step = on_step
        self.reset()

    # -- what transformers asks -------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen, padding included."""
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    @property
    def batch_size(self) -> int:
        return len(self.seq_ids) or -1

    @property
    def is_croppable(self) -> bool:
        return True

    def reset(self) -> None:
        """Forget all rows."""
        self._release(self.manager.running_ids)
        self.seq_ids: list[int] = []
        self._seen = 0
        self._next_id = 0
        self._forked = self.width == 1  # whether each row has a sequence of its own

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row r goes on from row beam_idx[r]: blocks change holders, nothing is copied."""
        parents = beam_idx.tolist()
        if not self._forked:  # those of one prompt are still one
            if any(row // self.width != p // self.width for row, p in enumerate(parents)):
                raise ValueError(f"width={self.width} is not the number of beams")
            return
        ids = self.seq_ids
        moved = {ids[row]: ids[p] for row, p in enumerate(parents) if row != p}
        if moved:
            self._begin()
            self.moved = moved
            self._forget(self.manager.reorder(moved))
            self._tell()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row; a negative number, or 0. ValueError otherwise."""
        tokens_to_remove = int(tokens_to_remove)  # some versions give a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop by a negative number of tokens, not {tokens_to_remove}")
        keep = {i: self.manager.num_tokens(i) + tokens_to_remove for i in self.manager.running_ids}
        for seq_id, num_tokens in keep.items():
            if num_tokens > 0:
                self._forget(self.manager.truncate(seq_id, num_tokens))
            else:
                self._release([seq_id])
        self._seen = max(0, self._seen + tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes so many forks of it: filled once, gone on from many times."""
        self._fork_rows()
        rows = [(seq_id, nth) for seq_id in self.seq_ids for nth in range(repeats)]
        self.seq_ids = [self._child(seq_id) if nth else seq_id for seq_id, nth in rows]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; one that is named twice is forked."""
        self._fork_rows()
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        chosen, before = [self.seq_ids[row] for row in indices.tolist()], self.seq_ids
        self.seq_ids = [
            self._child(seq_id) if seq_id in chosen[:row] else seq_id
            for row, seq_id in enumerate(chosen)
        ]
        running = {*self.manager.running_ids}.difference(chosen)
        self._release([seq_id for seq_id in before if seq_id in running])

    # -- where the memory is ----------------------------------------------------------------

    def usage(self) -> MemoryUsage:
        """Where every slot of the pool is, now."""
        return self.manager.usage()

    # -- one forward ------------------------------------------------------------------------

    def make_step(self, key: torch.Tensor, mask: torch.Tensor | None) -> Step:
        """Room for a forward's tokens. ValueError for rows that are not those of before."""
        batch, num_tokens = key.shape[0], key.shape[2]
        if not self.seq_ids:
            if batch % self.width:
                raise ValueError(f"{batch} rows are no multiple of width={self.width}")
            self.seq_ids = list(range(batch))
            self._next_id = batch
        if batch != len(self.seq_ids):
            raise ValueError(f"{batch} rows, and {len(self.seq_ids)} are in the cache")
        self._begin()
        self._check_mask(key, mask)
        running = {*self.manager.running_ids}
        leads = self.seq_ids[:: 1 if self._forked else self.width]
        if num_tokens == 1 and running.issuperset(leads):
            step = self._decode_step(key)
        else:
            step = self._prompt_step(key, mask)
        self._seen += num_tokens
        self._tell()
        return step

    def _check_mask(self, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        """ValueError for a mask that hides more than padding. In a step of one token of each row
        only on a CPU: a GPU would be waited for."""
        if mask is None:
            return
        batch, new = key.shape[0], key.shape[2]
        if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < new:
            told = tuple(mask.shape)
            raise ValueError(f"a mask of {told}: only padding can be masked (B, tokens)")
        if new == 1 and key.device.type != "cpu":
            return
        running = {*self.manager.running_ids}
        group = 1 if self._forked else self.width
        for row, count in enumerate(mask[:, :-new].sum(dim=1).tolist()):
            seq_id = self.seq_ids[row // group * group]
            held = self.manager.num_tokens(seq_id) if seq_id in running else 0
            if count != held:
                raise ValueError(
                    f"row {row} has {held} tokens, its mask shows {count}: only padding is masked"
                )

    def _begin(self) -> None:
        """Nothing has happened yet."""
        self.copies: BlockPairs = NO_COPIES
        self.forked: list[tuple[int, int]] = []  # (parent, child)
        self.moved: dict[int, int] = {}  # the beam that goes on from another: child -> parent

    def _tell(self) -> None:
        if self._on_step is not None:
            self._on_step(self)

    def _decode_step(self, key: torch.Tensor) -> Step:
        """One token for each row."""
        self._fork_rows()
        self._grow(1)
        tables = [self.manager.block_table(seq_id) for seq_id in self.seq_ids]
        ends = [table.last_slot for table in tables]
        lens = [table.num_tokens for table in tables]
        part = decode_part([table.blocks for table in tables], lens, key.device)
        return Step(upload(ends, key.device), None, *part)

    def _prompt_step(self, key: torch.Tensor, mask: torch.Tensor | None) -> Step:
        """Many tokens for each row, or its first ones behind padding."""
        batch, num_tokens = key.shape[0], key.shape[2]
        group = 1 if self._forked else self.width
        counts = _real_tokens(mask, batch, num_tokens)
        self._check_rows(key, counts, group)
        manager, size = self.manager, self.manager.block_size
        running = {*manager.running_ids}
        starting = {}
        for row, seq_id in enumerate(self.seq_ids):
            if seq_id in running and counts[row] < num_tokens:
                raise ValueError(f"row {row} has padding behind its first token")
            if row % group == 0 and seq_id not in running and counts[row]:
                starting[seq_id] = counts[row]
        self._grow(num_tokens, starting)
        slots, written, segments = [], [], []
        for row, count in enumerate(counts):
            if not count:
                continue
            table = manager.block_table(self.seq_ids[row // group * group])
            end, length = (row + 1) * num_tokens, table.num_tokens
            padded = pad_block_tables([table.blocks], key.device)
            segments.append(Segment(end - count, end, padded, length))
            if row % group == 0:
                slots.append(slot_mapping(table.blocks, length - count, count, size))
                written.append(torch.arange(end - count, end))
        none = torch.zeros(0, dtype=torch.int64)
        at, tokens = (torch.cat([none, *parts]).to(key.device) for parts in (slots, written))
        return Step(at, tokens, *decode_part([], [], key.device), tuple(segments))

    def _check_rows(self, key: torch.Tensor, counts: list[int], group: int) -> None:
        """ValueError unless each `group` rows have one prompt, as far as their K tell."""
        if group == 1:
            return
        rows = key.unflatten(0, (-1, group))  # (prompts, group, H_kv, T, D)
        apart = (rows - rows[:, :1]).abs()
        # By what tokens make of an element: a bias may be larger than all of that.
        spread = rows.amax((0, 1, 3), keepdim=True) - rows.amin((0, 1, 3), keepdim=True)
        least = rows.abs().max() * torch.finfo(rows.dtype).eps * 8
        same = all(counts[row] == counts[row // group * group] for row in range(len(counts)))
        if not same or not bool((apart <= SAME * spread + least).all()):
            raise ValueError(f"width={group}: some {group} rows in turn do not have one prompt")

    def _grow(self, num_tokens: int, starting: dict[int, int] | None = None) -> None:
        """So many tokens for each row in the cache, and the first of those that start."""
        manager, starting = self.manager, starting or {}
        need = manager.blocks_for_step(num_tokens)
        need += sum(map(manager.blocks_for, starting.values()))
        free = manager.num_free_blocks
        if need > free:
            raise OutOfBlocksError(f"a forward needs {need} blocks, {free} are free")
        self.copies = manager.append_all(num_tokens)
        for seq_id, count in starting.items():
            manager.allocate(seq_id, count)
        self.num_copies += len(self.copies)
        self.pool.copy_blocks(self.copies)

    def _fork_rows(self) -> None:
        """From now on each row is a sequence, and no more only the first of each prompt."""
        if self._forked:
            return
        self._forked = True
        running = {*self.manager.running_ids}
        for row, seq_id in enumerate(self.seq_ids):
            lead = self.seq_ids[row // self.width * self.width]
            if row % self.width and lead in running:
                self.manager.fork(lead, seq_id)
                self.forked.append((lead, seq_id))

    def _child(self, seq_id: int) -> int:
        """A new row that has what this one has."""
        child, self._next_id = self._next_id, self._next_id + 1
        if seq_id in self.manager.running_ids:
            self.manager.fork(seq_id, child)
        return child

    def _release(self, seq_ids: list[int]) -> None:
        for seq_id in seq_ids:
            self._forget(self.manager.free(seq_id))

    def _forget(self, freed: list[int]) -> None:
        if self.pool is not None:
            self.pool.poison_blocks(freed)


def _real_tokens(mask: torch.Tensor | None, batch: int, num_tokens: int) -> list[int]:
    """How many of each row's new tokens are no padding. ValueError if that is not on the left."""
    if mask is None:
        return [num_tokens] * batch
    new = mask[:, -num_tokens:].bool()
    if bool((new[:, 1:] < new[:, :-1]).any()):
        raise ValueError("padding must be on the left")
    return new.sum(dim=1).tolist()
