"""One launch each: K and V written through a slot mapping, and blocks copied by a list of pairs.

What it is: the first and the third kernel of section 5 of the paper ("fused reshape and block
write", "fused block copy") in Triton. The block copy also gathers and scatters the blocks of a
swap (section 4.5). Plain torch needs a launch each for K and V, and a staging buffer for a copy.

How to use it: `PagedKVCache` of paged_attention.py does, on CUDA where triton is installed.
    write_slots(cache.pool[layer], slots, k, v)
    for part in ordered(pairs):
        copy_blocks(cache.pool, torch.tensor(part, device="cuda"))
With TRITON_INTERPRET=1 in the environment before the import they run on CPU tensors, slowly.

Shapes: L layers, N blocks, S slots per block, H_kv K/V heads, D head size, T tokens. The kernels
move bytes, whatever the dtype: as words of 8 bytes where sizes and strides allow, two in one access
of a thread. Rows need no power of two: a program takes BLOCK words of the concatenated rows,
wherever one ends. Block and slot numbers are not checked: that would wait for the device.
"""

import functools
import warnings

import torch
import triton
import triton.language as tl

from attention import check_shape

INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels below were decorated
MANY_WORDS = 1 << 19  # from here on there are programs enough for 4 accesses a thread
WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


@triton.jit
def _locate(ROW: tl.constexpr, BLOCK: tl.constexpr):
    """The rows and columns of this program's words: (BLOCK,) int64 and (BLOCK,) int32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    # One long division for the program; its words are within 32 bits of its first row.
    row = first // ROW
    words = (first - row * ROW).to(tl.int32) + tl.arange(0, BLOCK)
    # Vectors stay whole: ROW is a constant, so the compiler knows what divides these, and a mask
    # made of row numbers is the same for all words of a vector.
    return row + words // ROW, words % ROW


@triton.jit(do_not_specialize=["num_tokens", "value_rows"])
def _write_slots(
    pool, slots, k, v, num_tokens, value_rows,
    ROW: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pool: rows of ROW words, the values' from row value_rows on; strides of tokens in words."""
    token, column = _locate(ROW, BLOCK)
    live = token < num_tokens
    key = tl.load(k + token * K_STRIDE + column, mask=live)
    value = tl.load(v + token * V_STRIDE + column, mask=live)
    slot = tl.load(slots + token, mask=live, other=0)
    tl.store(pool + slot * ROW + column, key, mask=live)
    tl.store(pool + (value_rows + slot) * ROW + column, value, mask=live)


@triton.jit(
    do_not_specialize=["num_pairs", "from_part", "from_block", "to_part", "to_block"],
)
def _move_blocks(
    source, target, pairs, num_pairs, from_part, from_block, to_part, to_block,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, part) moves words of pairs; strides of parts and blocks in rows of ROW words."""
    pair, column = _locate(ROW, BLOCK)
    part = tl.program_id(1).to(tl.int64)
    live = pair < num_pairs
    old = tl.load(pairs + 2 * pair, mask=live, other=0)
    new = tl.load(pairs + 2 * pair + 1, mask=live, other=0)
    words = tl.load(source + (part * from_part + old * from_block) * ROW + column, mask=live)
    tl.store(target + (part * to_part + new * to_block) * ROW + column, words, mask=live)


@functools.cache
def problem_on(device):
    """Why triton cannot build and run a kernel, in one line, or None if it can.

    On the host it needs a C compiler and headers.
    """
    blocks = torch.zeros(1, 2, 8, device=device)
    try:
        move_blocks(blocks, blocks, torch.tensor([[0, 1]], device=device))
    except Exception as error:  # triton, the compiler and the driver each raise their own
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def works_on(device):
    """Whether triton can build and run a kernel; a warning says why not."""
    problem = problem_on(device)
    if problem is not None:
        message = f"triton does not run here, plain torch moves the blocks: {problem}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return problem is None


def write_slots(pool, slots, k, v):
    """Write K and V of T tokens into one layer, one launch (section 5, first kernel).

    pool: (2, N, S, H_kv, D), contiguous, keys first; slots: (T,) int64, all different; k, v:
    (T, H_kv, D) in pool's dtype, any strides (copied first if a token's heads are not adjacent).
    """
    assert pool.shape[0] == 2 and k.shape == v.shape == (len(slots), *pool.shape[3:])
    if not len(slots):
        return
    rows = pool.flatten(3).flatten(1, 2)  # (2, N * S, H_kv * D)
    k, v = (x.detach().flatten(1) for x in (k, v))  # (T, H_kv * D)
    # One value for all of a row (expand) has no stride there, and stays a view when flattened.
    k, v = (x if x.stride(1) == 1 else x.contiguous() for x in (k, v))
    rows, k, v = _as_words(rows, k, v)
    block = _block_words(k.numel())
    with torch.cuda.device_of(pool):  # triton launches on the current device
        _write_slots[(triton.cdiv(k.numel(), block),)](
            rows, slots.contiguous(), k, v, len(slots), rows.shape[1],
            ROW=rows.shape[2], K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), BLOCK=block,
        )  # fmt: skip


def copy_blocks(pool, pairs):
    """Copy blocks within a pool, all layers, K and V, one launch (section 5, third kernel).

    pool: (L, 2, N, S, H_kv, D), contiguous; pairs: (P, 2) int64 on its device, source and
    destination. No source may be another pair's destination: see `ordered`.
    """
    blocks = pool.flatten(3).flatten(0, 1)  # (L * 2, N, S * H_kv * D)
    move_blocks(blocks, blocks, pairs)


def move_blocks(source, target, pairs):
    """Copy source[:, a] to target[:, b] for each pair (a, b), one launch.

    source: (parts, N, W), target: (parts, M, W), of one dtype and device; W elements adjacent and
    other strides multiples of W, as in any transposition of whole blocks. pairs: (P, 2) int64 on
    that device, the destinations all different.
    """
    assert source.shape[0] == target.shape[0] and pairs.shape == (len(pairs), 2)
    width = source.shape[2]
    strides = [*source.stride()[:2], *target.stride()[:2]]
    check_shape(
        source.stride(2) == target.stride(2) == 1 and not any(x % width for x in strides),
        f"blocks of {width} elements do not lie whole at strides {strides}",
    )
    if not len(pairs):
        return
    strides = [stride // width for stride in strides]
    source, target = _as_words(source, target)
    row = source.shape[2]
    block = _block_words(len(pairs) * row * source.shape[0])
    with torch.cuda.device_of(source):
        _move_blocks[(triton.cdiv(len(pairs) * row, block), source.shape[0])](
            source, target, pairs.contiguous(), len(pairs), *strides, ROW=row, BLOCK=block
        )


def ordered(pairs):
    """Split (source, destination) pairs into lists, each safe for one launch of `copy_blocks`.

    Run in order they give what copying pair by pair gives: a list ends where the next pair's
    destination is read by a pair of that list, or its source is written by one.
    """
    parts, read, written = [[]], set(), set()
    for source, target in pairs:
        if target in read or source in written:
            parts.append([])
            read, written = set(), set()
        parts[-1].append((source, target))
        read.add(source)
        written.add(target)
    return parts if parts[0] else []


def _as_words(*tensors):
    """The tensors (..., W) as the widest integers that their rows and addresses allow."""
    for word in WORDS:
        size = word.itemsize
        if all(
            x.data_ptr() % size == x.shape[-1] * x.itemsize % size == 0
            and not any(stride * x.itemsize % size for stride in x.stride()[:-1])
            for x in tensors
        ):
            return [x.view(word) for x in tensors]
    raise AssertionError("a byte divides everything")


def _block_words(total):
    """Words of a program of 128 threads: 4 accesses of 16 bytes a thread, or 1 of little work."""
    return 1024 if total >= MANY_WORDS else 256
