"""How paged_attention_triton.py cuts its work: tiles, parts of long sequences, warps.

Reproduces nothing: the paper's kernel gives each head of a sequence to one thread block (section
5). Splitting long sequences came later (split-KV).

    tuning = choose_tuning(batch * num_kv_heads, max_len, row_bytes, *device_limits(q.device))

An *item* is what one program computes: the G query heads of a K/V head over a part of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

MAX_SPLITS = 64  # parts of a sequence: its last program reads them all
MIN_CHUNK, MAX_CHUNK = 256, 4096  # slots of an item, where a sequence is split
SHARED_SPARE = 12 << 10  # bytes of shared memory beside the tiles


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is cut: `tile` slots are read at a time, `chunk` slots are an item at most."""

    tile: int
    chunk: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.tile < 16 or self.tile & (self.tile - 1) or self.chunk < 1 or self.num_stages < 1:
            raise ValueError(f"a tile is a power of two from 16, a chunk at least 1: {self}")


def choose_tuning(
    num_items: int, max_len: int, row_bytes: int, multiprocessors: int, shared_bytes: int
) -> Tuning:
    """A cut that suits an H100: chosen by trying others on shapes like bench_attention.py's.

    num_items: sequences times K/V heads; max_len: slots of the widest block table; row_bytes: of
    one head of one slot, padded to a power of two; shared_bytes: that a program can have.

    Up to two items for a multiprocessor are split into parts, two of which it then has. More are
    whole up to MAX_CHUNK, as every part costs a merge: up to four in three stages, beyond that
    in two, with small tiles where the table is short. Lengths are on the device, so it is not known
    whether many long items end together; large tiles, fewer at a time, lost least where they
    do not.
    """
    splits = 1
    if num_items <= 2 * multiprocessors:
        splits, shape = 2 * multiprocessors // max(1, num_items), (64, 4, 3)
    elif num_items <= 4 * multiprocessors:
        shape = (32, 4, 3)
    else:
        shape = (128, 8, 2) if max_len > 1536 else (32, 4, 2)
    tile, num_warps, num_stages = shape
    tile = max(16, tile * 256 // max(256, row_bytes))  # as many bytes, where rows are longer
    # K and V of all stages but one lie in shared memory, beside some that the kernel itself needs.
    while tile > 16 and 2 * (num_stages - 1) * tile * row_bytes + SHARED_SPARE > shared_bytes:
        tile //= 2
    splits = min(splits, -(-max_len // MIN_CHUNK))
    splits = max(1, splits, -(-max_len // MAX_CHUNK))
    chunk = -(-max_len // min(splits, MAX_SPLITS))
    return Tuning(tile, max(tile, -(-chunk // tile) * tile), num_warps, num_stages)


@lru_cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program can have on one."""
    if device.type != "cuda":
        return 1, 1 << 20  # the interpreter's programs run one after another
    found = torch.cuda.get_device_properties(device)
    # All but a KiB that the driver keeps for itself.
    return found.multi_processor_count, found.shared_memory_per_multiprocessor - 1024
