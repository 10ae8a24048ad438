"""The Triton kernels: decode attention over scattered blocks, block writes and block copies.

Reproduces the three fused kernels of section 5 of the paper. `paged_attention_kernel` (section
4.1, Eq. 4) reads the blocks where they lie and gathers nothing. It has what came after the paper:
grouped queries on tensor cores, and sequences split over thread blocks (split-KV) whose partial
results merge by their log-sum-exp. `write_slots` writes K and V through a slot mapping and
`copy_blocks` copies blocks by a list of pairs, in one launch each. `move_blocks` also gathers and
scatters the blocks of a swap (section 4.5).

How to use it: attention as in paged_attention.py, whose cache uses the others on CUDA by itself.
    out, lse = paged_attention_kernel(q, cache.k_pool(0), cache.v_pool(0), block_tables, seq_lens)
    write_slots(cache.pool[layer], slots, k, v)
    for part in ordered(pairs):
        copy_blocks(cache.pool, torch.tensor(part, device="cuda"))

Needs Triton, which comes with torch on a GPU. With TRITON_INTERPRET=1 in the environment before the
import, the kernels run on CPU tensors, slowly: for tests. Block and slot numbers are not checked,
as that would wait for the device.

Shapes: B sequences, L layers, H query heads, H_kv K/V heads, G = H / H_kv, D head size, N blocks,
S slots per block, T tokens, P splits. An *item* is what one program of the attention computes:
(sequence, split, K/V head). The other kernels move bytes, whatever the dtype: as words of 8 bytes
where sizes and strides allow, two in one access of a thread. Rows need no power of two: a program
takes BLOCK words of the concatenated rows, wherever one ends.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attention import check_lengths, check_shape, check_tensors

INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels below were decorated
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234e38)  # where -inf - -inf, which is NaN, must not be
MAX_GROUP = 16  # rows of one tensor-core product
MAX_HEAD_SIZE = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_SPLITS = 64  # parts of a sequence: its last program reads them all
MIN_CHUNK, MAX_CHUNK = 256, 4096  # slots of an item, where a sequence is split
SHARED_SPARE = 12 << 10  # bytes of shared memory beside the tiles
MANY_WORDS = 1 << 19  # from here on there are programs enough for 4 accesses a thread
WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


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


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program can have on one."""
    if device.type != "cuda":
        return 1, 1 << 20  # the interpreter's programs run one after another
    found = torch.cuda.get_device_properties(device)
    # All but a KiB that the driver keeps for itself.
    return found.multi_processor_count, found.shared_memory_per_multiprocessor - 1024


class Workspace:
    """Partial results of split sequences, kept from call to call so that nothing is cleared.

    Not to be shared by streams that run at the same time. A CUDA graph goes on using what it was
    captured with, so call once before a capture, with the largest shape: while one is captured
    the workspace does not grow (ShapeError). Without a workspace each call makes its own.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.out = torch.empty(0, device=device)
        self.lse = torch.empty(0, device=device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)  # all 0 between calls
        self.device = self.out.device  # with its index
        self._before: list[torch.Tensor] = []  # smaller ones, which a graph may still use

    def reserve(self, num_items: int, num_heads: int, group: int, head_size: int) -> None:
        """Room for `num_items` partial results of G query heads, and `num_heads` counters."""
        rows = num_items * group
        sizes = rows * head_size, rows, num_heads
        have = self.out.numel(), self.lse.numel(), self.arrived.numel()
        if all(size <= room for size, room in zip(sizes, have)):
            return
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        check_shape(
            not (capturing and self.lse.numel()),
            "the workspace is too small for this shape and cannot grow while a graph is captured",
        )
        self._before += [self.out, self.lse, self.arrived]
        out, lse, arrived = (max(size, room) for size, room in zip(sizes, have))
        self.out = torch.empty(out, device=self.device)
        self.lse = torch.empty(lse, device=self.device)
        self.arrived = torch.zeros(arrived, dtype=torch.int32, device=self.device)


def paged_attention_kernel(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float | None = None,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    workspace: Workspace | None = None,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention over scattered blocks (paper, Eq. 4), read where they lie.

    q: (B, H, D), the newest token's queries; k_pool, v_pool: (N, S, H_kv, D), the last two
    dimensions dense; block_tables: (B, max_blocks) int32; seq_lens: (B,) integers, tokens in
    the cache, the newest included. H / H_kv from 1 to 16, D up to 256.
    workspace: to keep from call to call; tuning: another cut than choose_tuning's.
    Returns out (B, H, D) in q's dtype and lse (B, H) float32; a sequence of length 0 gives
    0 and -inf. Slots at or beyond a sequence's length are never read, nor what its table does
    not hold; the work is cut by the table's width, so trim it to the longest sequence.
    Raises ShapeError, also for a window or a cap of the scores, which this kernel does not have.
    Block numbers are not checked: see paged_attention.py.
    """
    check_shape(window is None and soft_cap is None, "this kernel has no window and no soft cap")
    _check_inputs(q, k_pool, v_pool, block_tables, seq_lens)
    batch, num_heads, head_size = q.shape
    num_kv_heads, block_size = k_pool.shape[2], k_pool.shape[1]
    group = num_heads // num_kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    max_len = block_tables.shape[1] * block_size
    head_pad = max(16, triton.next_power_of_2(head_size))  # a tensor core multiplies no less
    if tuning is None:
        row_bytes = head_pad * q.element_size()
        tuning = choose_tuning(batch * num_kv_heads, max_len, row_bytes, *device_limits(q.device))
    num_splits = max(1, -(-max_len // tuning.chunk))
    workspace = workspace or Workspace(q.device)
    check_shape(workspace.device == q.device, f"the workspace is on {workspace.device}")
    num_items = batch * num_splits * num_kv_heads
    if num_splits > 1:
        workspace.reserve(num_items, batch * num_kv_heads, group, head_size)
    scale = head_size**-0.5 if scale is None else scale
    arguments = q, k_pool, v_pool, block_tables, seq_lens, out, lse
    arguments += workspace.out, workspace.lse, workspace.arrived
    arguments += scale, num_splits, tuning.chunk, max_len
    arguments += *q.stride()[:2], *k_pool.stride()[:2], *v_pool.stride()[:2], block_tables.stride(0)
    with torch.cuda.device_of(q):  # triton launches on the current device
        _decode[(num_items,)](
            *arguments,
            H_KV=num_kv_heads,
            G=group,
            D=head_size,
            S=block_size,
            D_PAD=head_pad,
            TILE=tuning.tile,
            SPLIT=num_splits > 1,
            SAME=k_pool.stride() == v_pool.stride(),
            STAGES=tuning.num_stages,
            num_warps=tuning.num_warps,
        )
    return out, lse


def try_launch(device: torch.device, group: int, head_size: int) -> None:
    """One small call in the dtype of a GPU's cache; raises what triton or the driver raises."""
    q = torch.zeros(1, group, head_size, dtype=torch.float16, device=device)
    pool = torch.zeros(1, 16, 1, head_size, dtype=torch.float16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    paged_attention_kernel(q, pool, pool, table, table[0] + 1)


def _check_inputs(q, k_pool, v_pool, block_tables, seq_lens) -> None:
    """ShapeError unless the kernel can run on these."""
    check_tensors(q=q, k_pool=k_pool, v_pool=v_pool, block_tables=block_tables)
    check_lengths(seq_lens)
    check_shape(q.dim() == 3, f"q must be (B, H, D), not {tuple(q.shape)}")
    check_shape(
        k_pool.dim() == 4 and k_pool.shape == v_pool.shape and k_pool.shape[3] == q.shape[2],
        f"need pools (N, S, H_kv, D) with D = {q.shape[2]}, got {tuple(k_pool.shape)} and "
        f"{tuple(v_pool.shape)}",
    )
    num_kv_heads = k_pool.shape[2]
    check_shape(
        num_kv_heads > 0
        and q.shape[1] % num_kv_heads == 0
        and q.shape[1] // num_kv_heads <= MAX_GROUP
        and q.shape[2] <= MAX_HEAD_SIZE,
        f"{q.shape[1]} query heads over {num_kv_heads} K/V heads of size {q.shape[2]}: need a "
        f"multiple, up to {MAX_GROUP}, and at most {MAX_HEAD_SIZE}",
    )
    check_shape(
        q.dtype == k_pool.dtype == v_pool.dtype and q.dtype in DTYPES,
        f"q and the pools must have one dtype of {DTYPES}, not {q.dtype}, {k_pool.dtype}",
    )
    for pool in (k_pool, v_pool):
        dense = _steps(pool, 2, pool.shape[3]) and _steps(pool, 3, 1)
        check_shape(dense, "the heads of a slot must be dense")
        span = pool.shape[1] * pool.stride(1)  # within a block the kernel counts with 32 bits
        check_shape(span < 1 << 31, f"a block spans {span} elements: need fewer than 2^31")
    check_shape(_steps(q, 2, 1), "the elements of a query must be dense")
    check_shape(
        block_tables.dim() == 2
        and block_tables.dtype in (torch.int32, torch.int64)
        and _steps(block_tables, 1, 1),
        "block_tables must be (B, max_blocks), int32 or int64, its rows dense",
    )
    check_shape(
        block_tables.shape[:1] == seq_lens.shape == q.shape[:1] and seq_lens.is_contiguous(),
        f"need (B,) integers; B differs: q {tuple(q.shape)}, "
        f"block_tables {tuple(block_tables.shape)}, seq_lens {tuple(seq_lens.shape)}",
    )
    check_shape(
        q.device == k_pool.device == v_pool.device == block_tables.device == seq_lens.device,
        "all tensors must be on one device",
    )


def _steps(x, dim, stride) -> bool:
    """Whether neighbours along `dim` lie `stride` elements apart; one alone may lie anywhere."""
    return x.shape[dim] <= 1 or x.stride(dim) == stride


@triton.jit(do_not_specialize=["num_splits", "chunk", "max_slots", "table_stride"])
def _decode(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    lens_ptr,
    out_ptr,
    lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    arrived_ptr,
    scale,
    num_splits,
    chunk,
    max_slots,
    q_stride_b,
    q_stride_h,
    k_stride_n,
    k_stride_s,
    v_stride_n,
    v_stride_s,
    table_stride,
    H_KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SAME: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One item: G query heads over the slots of one split of one sequence."""
    item = tl.program_id(0)
    # Heads run fastest: programs that run together read neighbouring bytes of the same slots.
    head = item % H_KV
    split = (item // H_KV) % num_splits
    seq = item // H_KV // num_splits
    first = split * chunk
    # What does not depend on the length is read before it: from a cold cache each costs a
    # microsecond, and so they wait together.
    rows = tl.arange(0, 16)  # the least that a tensor core multiplies
    cols = tl.arange(0, D_PAD)
    offsets = tl.arange(0, TILE)
    table = tables_ptr + seq.to(tl.int64) * table_stride
    q_at = q_ptr + seq.to(tl.int64) * q_stride_b + (head * G + rows)[:, None] * q_stride_h
    q_mask = (rows < G)[:, None] & (cols < D)[None, :]
    q = tl.load(q_at + cols[None, :], mask=q_mask, other=0.0)
    k_at = k_ptr + head * D + cols[:, None]
    v_at = v_ptr + head * D + cols[None, :]
    # Block numbers are read a tile ahead, so that K and V never wait for them; masked by the
    # table's width and not by the length.
    slots = first + offsets
    block = tl.load(table + slots // S, mask=slots < max_slots, other=0)
    # No more than the table holds: a longer one would wait for parts that nobody computes.
    seq_len = tl.minimum(tl.load(lens_ptr + seq).to(tl.int32), max_slots)
    end = tl.minimum(first + chunk, seq_len)
    if (first < end) | (split == 0):
        scale2 = scale * LOG2_E
        top = tl.full([16], LOWEST, tl.float32)
        total = tl.zeros([16], tl.float32)
        acc = tl.zeros([16, D_PAD], tl.float32)
        for start in tl.range(first, end, TILE, num_stages=STAGES):
            slots = start + offsets
            live = slots < end
            this = block.to(tl.int64)
            ahead = slots + TILE
            block = tl.load(table + ahead // S, mask=ahead < max_slots, other=0)
            if D == D_PAD:
                k_mask, v_mask = live[None, :], live[:, None]
            else:
                k_mask = live[None, :] & (cols < D)[:, None]
                v_mask = live[:, None] & (cols < D)[None, :]
            inside = slots % S
            at = this * k_stride_n + inside * k_stride_s
            k = tl.load(k_at + at[None, :], mask=k_mask, other=0.0)  # (D, TILE)
            scores = tl.dot(q, k, input_precision="ieee") * scale2  # (16, TILE)
            scores = tl.where(live[None, :], scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            fade = tl.exp2(top - new_top)
            weight = tl.exp2(scores - new_top[:, None])
            total = total * fade + tl.sum(weight, axis=1)
            if not SAME:
                at = this * v_stride_n + inside * v_stride_s
            v = tl.load(v_at + at[:, None], mask=v_mask, other=0.0)  # (TILE, D)
            acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            top = new_top
        some = total != 0.0  # not where there is no slot at all; a NaN stays one
        total = tl.where(some, total, 1.0)
        acc = acc / total[:, None]
        lse2 = tl.where(some, top + tl.log2(total), -float("inf"))  # to base 2
        first_row = (seq.to(tl.int64) * H_KV + head) * G
        num_parts = tl.cdiv(seq_len, chunk)
        if SPLIT and num_parts > 1:
            place = item.to(tl.int64) * G + rows
            tl.store(part_out_ptr + place[:, None] * D + cols[None, :], acc, mask=q_mask)
            tl.store(part_lse_ptr + place, lse2, mask=rows < G)
            # The last to arrive merges: what the others have stored is there by then.
            tl.debug_barrier()
            counter = arrived_ptr + seq * H_KV + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
                _merge(
                    part_out_ptr,
                    part_lse_ptr,
                    out_ptr,
                    lse_ptr,
                    seq * num_splits * H_KV + head,
                    first_row,
                    num_parts,
                    H_KV,
                    G,
                    D,
                    D_PAD,
                )
                tl.store(counter, 0)
        else:
            at = first_row + rows
            tl.store(out_ptr + at[:, None] * D + cols[None, :], acc, mask=q_mask)
            tl.store(lse_ptr + at, lse2 / LOG2_E, mask=rows < G)


@triton.jit
def _merge(
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    item,
    first_row,
    num_parts,
    H_KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Attention over a sequence from that over each of its parts (attention.merge_attention)."""
    ROWS: tl.constexpr = triton.next_power_of_2(G)
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, D_PAD)
    mask = (rows < G)[:, None] & (cols < D)[None, :]
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    # Loads wait for no other step, so that several parts are under way at once; .cg: from the L2
    # cache, where other multiprocessors' stores are.
    for part in tl.range(0, num_parts, loop_unroll_factor=8):
        place = (item + part * H_KV).to(tl.int64) * G + rows
        lse_at, out_at = part_lse_ptr + place, part_out_ptr + place[:, None] * D + cols[None, :]
        lse2 = tl.load(lse_at, mask=rows < G, other=-float("inf"), cache_modifier=".cg")
        out = tl.load(out_at, mask=mask, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, lse2)
        fade = tl.exp2(top - new_top)
        weight = tl.exp2(lse2 - new_top)
        total = total * fade + weight
        acc = acc * fade[:, None] + out * weight[:, None]
        top = new_top
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    at = first_row + rows
    tl.store(out_ptr + at[:, None] * D + cols[None, :], acc / total[:, None], mask=mask)
    lse2 = tl.where(some, top + tl.log2(total), -float("inf"))
    tl.store(lse_ptr + at, lse2 / LOG2_E, mask=rows < G)


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
    tensors = rows, slots.contiguous(), k, v
    sizes = {"ROW": rows.shape[2], "K_STRIDE": k.stride(0), "V_STRIDE": v.stride(0), "BLOCK": block}
    with torch.cuda.device_of(pool):  # triton launches on the current device
        _write_slots[(triton.cdiv(k.numel(), block),)](*tensors, len(slots), rows.shape[1], **sizes)


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


@functools.cache
def problem_on(device):
    """Why triton cannot build (it needs a C compiler) and run a kernel, in one line, or None."""
    blocks = torch.zeros(1, 2, 8, device=device)
    try:
        move_blocks(blocks, blocks, torch.tensor([[0, 1]], device=device))
    except Exception as error:  # triton, the compiler and the driver each raise their own
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def works_on(device):
    """Whether triton can build and run a kernel; a warning says why not."""
    if problem := problem_on(device):
        message = f"triton does not run here, plain torch moves the blocks: {problem}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return problem is None


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
    pool,
    slots,
    k,
    v,
    num_tokens,
    value_rows,
    ROW: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """pool: rows of ROW words, the values' from row value_rows on; strides of tokens in words."""
    token, column = _locate(ROW, BLOCK)
    live = token < num_tokens
    key = tl.load(k + token * K_STRIDE + column, mask=live)
    value = tl.load(v + token * V_STRIDE + column, mask=live)
    slot = tl.load(slots + token, mask=live, other=0)
    tl.store(pool + slot * ROW + column, key, mask=live)
    tl.store(pool + (value_rows + slot) * ROW + column, value, mask=live)


@triton.jit(do_not_specialize=["num_pairs", "from_part", "from_block", "to_part", "to_block"])
def _move_blocks(
    source,
    target,
    pairs,
    num_pairs,
    from_part,
    from_block,
    to_part,
    to_block,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i, part) moves words of pairs; strides of parts and blocks in rows of ROW words."""
    pair, column = _locate(ROW, BLOCK)
    part = tl.program_id(1).to(tl.int64)
    live = pair < num_pairs
    old = tl.load(pairs + 2 * pair, mask=live, other=0)
    new = tl.load(pairs + 2 * pair + 1, mask=live, other=0)
    words = tl.load(source + (part * from_part + old * from_block) * ROW + column, mask=live)
    tl.store(target + (part * to_part + new * to_block) * ROW + column, words, mask=live)
