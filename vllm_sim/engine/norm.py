"""A layer norm in one short launch.

Reproduces nothing of the paper: servers do so, as a decode step has two of them a layer, of a few
rows each. It is computed in float32, as torch's is, and has no gradient. Needs triton.

    y = normalize(x, weight, bias, eps)               # LayerNorm's
    y = normalize(x, weight, None, eps)               # RMSNorm's: no mean is taken off, no bias

Shapes: T tokens, E hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def normalize(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """x (..., T, E), weight and bias (E,), of one dtype; the result is like x."""
    x, size = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(size)
        warps = 16 if block > 8192 else 8
        arguments = x, weight, bias, out, eps, size, block, bias is not None
        with torch.cuda.device_of(x):  # triton launches on the current device
            _normalize[(x.numel() // size,)](*arguments, num_warps=warps)
    return out


@triton.jit
def _normalize(
    x, weight, bias, out, eps, E: tl.constexpr, BLOCK: tl.constexpr, CENTERED: tl.constexpr
):
    """A row of a program."""
    at = tl.arange(0, BLOCK)
    live = at < E
    row = tl.program_id(0).to(tl.int64) * E
    factor = tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
    read = tl.load(x + row + at, mask=live, other=0.0)
    found = read.to(tl.float32)
    if CENTERED:
        shift = tl.load(bias + at, mask=live, other=0.0).to(tl.float32)
        found = tl.where(live, found - tl.sum(found, axis=0) / E, 0.0)
    found = found * tl.rsqrt(tl.sum(found * found, axis=0) / E + eps)
    if CENTERED:
        found = found * factor + shift
    else:  # transformers rounds before it takes the weight
        found = found.to(read.dtype).to(tl.float32) * factor
    tl.store(out + row + at, found.to(read.dtype), mask=live)
