"""A kernel that does nothing but read: a plain limit for kernels whose cost is their input.

    us = cold_median_us(lambda: read_bytes(source, programs=4224, tile=8192), graph=True)

Used by bench_attention.py. The programs together walk over the memory from end to end, so at any
time they read neighbouring bytes, which suits the memory best.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def read_bytes(source: torch.Tensor, programs: int, tile: int) -> torch.Tensor:
    """Read all of `source` (n,), `tile` elements at a time; returns (programs,) sums of it."""
    sums = torch.empty(programs, dtype=torch.float32, device=source.device)
    _read[(programs,)](source, sums, source.numel(), TILE=tile, num_warps=4)
    return sums


@triton.jit
def _read(source_ptr, sums_ptr, count, TILE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * TILE
    offsets = tl.arange(0, TILE)
    acc = tl.zeros([TILE], tl.float32)
    for start in range(first, count, tl.num_programs(0).to(tl.int64) * TILE):
        at = start + offsets
        acc += tl.load(source_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(acc, axis=0))
