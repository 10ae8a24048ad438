"""Which kernels move and read the blocks of a run: plain torch's, or Triton's in place.

Reproduces: section 5, whose three fused kernels are indexed operations of torch here ("gather",
paged_attention.py) or Triton kernels ("triton", paged_attention_triton.py and block_kernels.py).

    kernel, why = choose_kernel("auto", device, num_heads, num_kv_heads, head_size)
    out, lse = attention_kernel(kernel)(q, k_pool, v_pool, block_tables, seq_lens)

Triton comes with torch on a GPU and may be missing elsewhere, so it is imported only if asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import paged_attention

GATHER, TRITON = "gather", "triton"
CHOICES = ("auto", GATHER, TRITON)


class KernelError(ValueError):
    """A kernel that was asked for by name and does not run on this device or model."""


def choose_kernel(
    asked: str, device: torch.device, num_heads: int, num_kv_heads: int, head_size: int
) -> tuple[str, str]:
    """GATHER or TRITON, and why not the latter ("" if nobody would expect it).

    `auto`: Triton on a CUDA device if it runs there, gathering elsewhere. Raises KernelError if
    TRITON was asked for and cannot be had.
    """
    assert asked in CHOICES
    if asked == GATHER:
        return GATHER, ""
    if asked == "auto" and device.type != "cuda":
        return GATHER, "triton needs a GPU"
    problem = _problem(device, num_heads // num_kv_heads, head_size)
    if problem is None:
        return TRITON, ""
    if asked == TRITON:
        raise KernelError(f"--kernel triton: {problem}; use --kernel gather")
    return GATHER, problem


def attention_kernel(kernel: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Decode attention over block tables: see paged_attention.paged_attention_kernel."""
    if kernel == GATHER:
        return paged_attention.paged_attention_kernel
    import paged_attention_triton

    return paged_attention_triton.paged_attention_kernel


def _problem(device: torch.device, group: int, head_size: int) -> str | None:
    """Why Triton's kernels cannot be used, in one line, or None."""
    try:
        import block_kernels
        import paged_attention_triton as module
    except ImportError as error:
        return f"{error}"
    if group > module.MAX_GROUP or head_size > module.MAX_HEAD_SIZE:
        return (
            f"{group} query heads for each K/V head, of size {head_size}: the kernel has "
            f"{module.MAX_GROUP} and {module.MAX_HEAD_SIZE} at most"
        )
    problem = block_kernels.problem_on(device)
    if problem is None:  # so it can launch something; now the kernel itself, at this size
        try:
            module.try_launch(device, group, head_size)
        except Exception as error:  # triton, the compiler and the driver each raise their own
            problem = f"{error}".partition("\n")[0]
    return None if problem is None else f"it does not run on {device}: {problem}"
