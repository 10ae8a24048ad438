"""The Triton kernels: attention over scattered blocks, block writes and block copies.

Reproduces the three fused kernels of section 5 of the paper. `paged_attention_kernel` (section
4.1, Eq. 4) reads the blocks where they lie and gathers nothing. It has what came after the paper:
grouped queries on tensor cores, several query tokens a sequence, and sequences cut into parts
(split-KV) whose results merge by their log-sum-exp, in the same launch. `write_slots` writes K and
V through a slot mapping and `copy_blocks` copies blocks by a list of pairs, in one launch each.
`move_blocks` also gathers and scatters the blocks of a swap (section 4.5).

How to use it: attention as in paged_attention.py, whose cache uses the others on CUDA by itself.
    plan = Plan(q, k_pool, v_pool, [17, 1200])                # once an iteration, for all layers
    out, lse = paged_attention_kernel(q, k_pool, v_pool, block_tables, seq_lens, plan=plan)
    out, lse = paged_attention_kernel(q, k_pool, v_pool, block_tables, seq_lens)    # without one
    write_slots(cache.pool[layer], slots, k, v)
    for part in ordered(pairs):
        copy_blocks(cache.pool, torch.tensor(part, device="cuda"))

Needs Triton, which comes with torch on a GPU. With TRITON_INTERPRET=1 in the environment before the
import, the kernels run on CPU tensors, slowly: for tests. Block and slot numbers are not checked,
as that would wait for the device.

Shapes: B sequences, L layers, H query heads, H_kv K/V heads, G = H / H_kv, D head size (D_V that of
V), N blocks, S slots per block, T tokens. How the attention is cut: an *item* is a few query tokens
of one sequence, QT at most (one in decoding); a *part* is an item and one K/V head (or, of a large
G, some of its query heads); its slots are read a *tile* at a time. The tiles of all parts, one
behind the other, are shared out evenly among as many programs as the GPU runs at once. The other
kernels move bytes, whatever the dtype: as words of 8 bytes where sizes and strides allow, two in
one access of a thread. Rows need no power of two: a program takes BLOCK words of the concatenated
rows, wherever one ends.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl

from attention import check_lengths, check_shape, check_tensors

INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels below were decorated
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234e38)  # where -inf - -inf, which is NaN, must not be
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALL_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)  # of the pools alone, with scales
MAX_HEAD_SIZE = 1024
RANGE, ITEM = 16, 8  # numbers that a range and an item have in a plan
UNPLANNED, LEAST_TILES = 2, 4  # ranges where there is no plan: times as many, and their tiles
PART_SLOTS = 64  # what a part costs beside its own slots, as so many
SHARED_SPARE = 2 << 10  # bytes of shared memory of a program beside its tiles and queries
REGISTERS, SCHEDULERS = 1 << 16, 4  # of a multiprocessor
MANY_WORDS = 1 << 19  # from here on there are programs enough for 4 accesses a thread
WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


@dataclass(frozen=True, slots=True)
class Tuning:
    """`tile` slots are read at a time; on a multiprocessor run `programs` programs at once."""

    tile: int
    num_warps: int
    num_stages: int
    programs: int

    def __post_init__(self) -> None:
        if self.tile < 16 or self.tile & (self.tile - 1) or self.num_stages < 1:
            raise ValueError(f"a tile is a power of two from 16, in at least one stage: {self}")
        if self.num_warps not in (1, 2, 4, 8) or self.programs < 1:
            raise ValueError(f"a program has 1, 2, 4 or 8 warps, and there is at least one: {self}")

    @property
    def registers(self) -> int:
        """Of a thread, at most, so that as many programs run at once."""
        warps = -(-self.num_warps * self.programs // SCHEDULERS)  # each has registers of its own
        return min(255, REGISTERS // SCHEDULERS // (32 * warps) // 8 * 8)

    def shared_bytes(self, num_rows: int, slot_bytes: int, row_bytes: int) -> int:
        """Of a multiprocessor: the tiles under way and the query rows, which some cards copy."""
        tiles = max(1, self.num_stages - 1) * self.tile * slot_bytes
        return self.programs * (tiles + 2 * num_rows * row_bytes + SHARED_SPARE)


@dataclass(frozen=True, slots=True)
class Card:
    """What a GPU is to this kernel: its memory, in bytes a second; its multiprocessors; its L2."""

    bandwidth: float
    multiprocessors: int
    cache_bytes: int

    def distance(self, other: Card) -> float:
        """How unlike two cards are: by factors, whatever their names."""
        mine, theirs = (
            (card.bandwidth, card.multiprocessors, card.cache_bytes) for card in (self, other)
        )
        # A driver that does not tell a number says 0.
        return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(mine, theirs))


# By a sweep of benchmarks/tune_attention.py on 2026-11-30 on one H200: each within 0.3 % of the
# best on every shape of its kind. For more K/V heads than MANY_HEADS; for as many and sequences of
# less than SHORT slots in the mean (256 was swept, and 1,000 up); for fewer heads; and for fewer
# where a program has less than LITTLE_WORK slots to read. The second and the last have one shape.
TUNINGS = {
    Card(4.9e12, 132, 60 << 20): (
        Tuning(16, 2, 3, 5),
        Tuning(16, 1, 2, 10),
        Tuning(16, 2, 4, 4),
        Tuning(32, 4, 3, 3),
    )
}
MANY_HEADS, SHORT, LITTLE_WORK = 16, 512, 750
WIDE_SLOT = 2048  # bytes of K and V of one head, from which on two warps spill registers


@functools.cache
def device_limits(device: torch.device) -> tuple[Card, int]:
    """What the card is, and bytes of shared memory that programs can have on a multiprocessor."""
    if device.type != "cuda":
        return Card(1e11, 1, 1 << 20), 1 << 20  # the interpreter's programs run one by one
    found = torch.cuda.get_device_properties(device)
    clock, width = found.memory_clock_rate * 1e3, found.memory_bus_width / 8
    card = Card(2 * clock * width, found.multi_processor_count, found.L2_cache_size)
    # All but a KiB that the driver keeps for itself.
    return card, found.shared_memory_per_multiprocessor - 1024


def choose_tuning(
    card: Card,
    shared_bytes: int,
    rows: Rows,
    num_slots: int,
    num_seqs: int,
    slot_bytes: int,
    row_bytes: int,
) -> Tuning:
    """That of the card most like this one, cut down to what its shared memory holds.

    num_slots: to read, of all heads and `num_seqs` sequences; slot_bytes: K and V of one head of
    one slot, padded; row_bytes: one query row. Many query rows (several tokens, or a wide group)
    and wide heads need more warps, for their registers, and fewer programs at once.
    """
    many, short, few, little = TUNINGS[min(TUNINGS, key=card.distance)]
    if rows.padded > 16:
        wide = rows.padded * slot_bytes > 16384
        chosen = Tuning(64 if wide else 32, 8 if wide else 4, 2, 1 if wide else 2)
    elif slot_bytes >= WIDE_SLOT:
        chosen = Tuning(16, 8 if slot_bytes >= 2 * WIDE_SLOT else 4, 3, 2)
    elif rows.num_heads > MANY_HEADS:
        in_short = num_slots < SHORT * num_seqs * rows.num_heads
        chosen = short if in_short and slot_bytes < WIDE_SLOT // 2 else many
    else:
        scarce = num_slots < LITTLE_WORK * few.programs * card.multiprocessors
        chosen = little if scarce else few

    def too_large(one: Tuning) -> bool:
        return one.shared_bytes(rows.padded, slot_bytes, row_bytes) > shared_bytes

    while too_large(chosen) and chosen.tile > 16:
        chosen = replace(chosen, tile=chosen.tile // 2)
    while too_large(chosen) and chosen.programs > 1:
        chosen = replace(chosen, programs=chosen.programs - 1)
    while too_large(chosen) and chosen.num_stages > 1:
        chosen = replace(chosen, num_stages=chosen.num_stages - 1)
    return chosen


@dataclass(frozen=True, slots=True)
class Rows:
    """Which query rows a program takes: `queries` tokens times `heads` query heads of a group.

    A program has a power of two of rows, at least 16, which is what a tensor core multiplies.
    """

    kv_heads: int  # H_kv
    group: int  # G
    heads: int
    queries: int

    @classmethod
    def of(cls, num_heads: int, kv_heads: int, value_size: int, most_queries: int) -> Rows:
        """For H query heads of V's size; a sequence has so many query tokens at most."""
        most = max(16, min(128, 16384 // triton.next_power_of_2(value_size)))  # by registers
        group = num_heads // kv_heads
        heads = min(group, most)
        if heads < group or most_queries <= 1:
            return cls(kv_heads, group, heads, 1)
        # As many as the padded rows hold: each number of them is a kernel to compile.
        padded = min(most, _padded(heads * most_queries))
        return cls(kv_heads, group, heads, padded // heads)

    @property
    def padded(self) -> int:
        return _padded(self.heads * self.queries)

    @property
    def num_heads(self) -> int:
        """K/V heads, each as often as programs share its group."""
        return self.kv_heads * -(-self.group // self.heads)


class Plan:
    """How a batch's slots are shared out among programs: made on the host, which knows the lengths.

    Made once an iteration and used by all layers. It says where the work is cut and not what it is:
    lengths that have changed since cost time, and give the same result. `update` writes a later
    iteration into the same tensor, cut into as many ranges: a CUDA graph, which can hold it, goes
    on launching that many. So make it with the largest lengths before a capture.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        seq_lens: Sequence[int],
        query_lens: Sequence[int] | None = None,
        *,
        window: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """For tensors like these, of paged_attention_kernel; the lengths are numbers.

        query_lens: the query tokens of each sequence, its newest; None: one each. Raises
        ShapeError.
        """
        self.device, self.window, self.one_each = q.device, window, query_lens is None
        queries = 1 if query_lens is None else max(query_lens, default=1)
        self.rows = Rows.of(q.shape[1], k_pool.shape[2], v_pool.shape[3], queries)
        read = sum(min(n, window or n) for n in map(int, seq_lens))
        num_slots = read * self.rows.num_heads
        self.tuning = tuning or _tuning_for(q, k_pool, v_pool, self.rows, num_slots, len(seq_lens))
        self.at_once = _ranges_at_once(q.device, self.tuning, self.rows)
        self.table = torch.empty(0, dtype=torch.int32, device=q.device)
        self.num_tokens = self.num_seqs = self.num_ranges = 0
        self.update(seq_lens, query_lens)

    def update(self, seq_lens: Sequence[int], query_lens: Sequence[int] | None = None) -> None:
        """The same for other lengths; of no more sequences and query tokens than at first if a
        graph holds the tensor."""
        lens = np.asarray(seq_lens, dtype=np.int64)
        counts = np.ones_like(lens) if query_lens is None else np.asarray(query_lens, np.int64)
        check_shape(
            lens.ndim == 1 and lens.shape == counts.shape and bool((counts >= 0).all()),
            f"need B lengths and B numbers of queries, got {lens.shape} and {counts.shape}",
        )
        check_shape(
            not self.one_each or bool((counts == 1).all()),
            "a plan made without query_lens is for one query token a sequence",
        )
        tuning = self.tuning
        self.num_ranges, cut = cut_evenly(
            *(lens, counts, self.num_ranges or self.at_once, tuning.tile),
            *(self.rows.queries, self.window, self.num_ranges),
        )
        self.num_seqs, self.num_tokens = len(lens), int(counts.sum())
        found = torch.from_numpy(cut)
        if self.device.type == "cuda":
            found = found.pin_memory()  # from pageable memory the transfer would wait
        if found.numel() > self.table.numel():
            # As many sequences and query tokens are at most so many items more, cut otherwise.
            room = found.numel() + ITEM * len(lens)
            self.table = torch.empty(room, dtype=torch.int32, device=self.device)
        self.table[: found.numel()].copy_(found, non_blocking=True)


def cut_points(tiles: np.ndarray, most: int, tile: int) -> np.ndarray:
    """Where ranges begin and end: (n + 1,), increasing, n <= most; tiles: of each item.

    A part costs something beside its tiles, so ranges with more parts have fewer; a cut one tile
    from an item's begin is moved there. Where all items are alike and equal parts of them are at
    least three quarters of the ranges, no range has two.
    """
    ends = np.cumsum(tiles)
    num_tiles = int(ends[-1])
    ranges = min(most, num_tiles)
    if tiles.min() == tiles.max():
        whole = ranges // len(tiles) * len(tiles)
        if 4 * whole >= 3 * ranges:
            return np.arange(whole + 1) * num_tiles // whole
    costs = np.cumsum(tiles + PART_SLOTS / tile)
    marks = np.arange(1, ranges) * (costs[-1] / ranges)
    at = np.searchsorted(costs, marks, side="right")
    own = tiles[at]
    inside = np.clip(np.rint(marks - (costs[at] - own)), 0, own).astype(np.int64)
    inside = np.where(inside <= 1, 0, np.where(inside >= own - 1, own, inside))
    return np.unique(np.concatenate([[0], ends[at] - own + inside, [num_tiles]]))


def cut_evenly(lens, counts, most, tile, queries, window, least=0):
    """How many ranges, and the numbers of a plan as `_attend` reads them, int32.

    lens, counts: (B,) int64, slots and query tokens of each sequence. Of `least` ranges some may be
    empty. Tiles are counted through all items, ranges and items each from 0.
    A range (16 numbers): its first item; of how many it has a part; its tiles, from and to; then
    the 8 of its first item. An item (8): its first tile; how many; how many tiles of its sequence
    come before them; the sequence; its first query token, in q; how many the sequence has from this
    one on; the first and the last range that have a part of it. Behind the last item comes one that
    is read and not used.
    """
    num_items = -(-counts // queries)
    if not num_items.any():
        return least, np.zeros((2 * least + 1) * ITEM, dtype=np.int32)
    seqs = np.repeat(np.arange(len(lens)), num_items)  # (items,)
    nth = np.arange(len(seqs)) - np.repeat(np.cumsum(num_items) - num_items, num_items)
    tokens = np.repeat(np.cumsum(counts) - counts, num_items) + nth * queries
    after = counts[seqs] - nth * queries
    end = lens[seqs] - after + np.minimum(queries, after)
    begin = np.zeros_like(end) if window is None else lens[seqs] - after + 1 - window
    first_tile = np.maximum(begin, 0) // tile
    tiles = np.maximum(-(-end // tile) - first_tile, 1)
    starts = np.cumsum(tiles) - tiles
    edges = cut_points(tiles, most, tile)
    check_shape(edges[-1] < 1 << 31, f"{edges[-1]} tiles are too many for one launch")
    first, last = (
        np.searchsorted(edges, at, side="right") - 1 for at in (starts, starts + tiles - 1)
    )
    items = np.stack([starts, tiles, first_tile, seqs, tokens, after, first, last], axis=1)
    first, last = (
        np.searchsorted(starts, at, side="right") - 1 for at in (edges[:-1], edges[1:] - 1)
    )
    heads = [first, last - first + 1, edges[:-1], edges[1:], *items[first].T]
    ranges = max(least, len(edges) - 1)
    table = np.zeros((2 * ranges + len(items) + 1, ITEM), dtype=np.int32)
    numbers = table[: 2 * ranges].reshape(-1, RANGE)
    numbers[: len(edges) - 1, : len(heads)] = np.stack(heads, axis=1)
    table[2 * ranges : -1] = items
    return ranges, table.ravel()


class Workspace:
    """Partial results of parts cut in two, kept from call to call so that nothing is cleared.

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

    def reserve(self, num_programs: int, rows: int, value_size: int, *, own: bool = False) -> None:
        """Room for two partial results of each program, of `rows` query rows each.

        own: of one call alone, so that it may be made while a graph is captured.
        """
        places = 2 * num_programs * rows
        sizes = places * value_size, places, num_programs
        have = self.out.numel(), self.lse.numel(), self.arrived.numel()
        if all(size <= room for size, room in zip(sizes, have)):
            return
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        check_shape(
            own or not capturing,  # a graph clears what it has made when it runs, and not before
            "the workspace is too small for this shape and cannot grow while a graph is captured",
        )
        self._before += [self.out, self.lse, self.arrived]
        # At least twice as large: so all that are kept are together no larger than the last.
        out, lse, arrived = (
            room if size <= room else max(size, 2 * room) for size, room in zip(sizes, have)
        )
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
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    plan: Plan | None = None,
    workspace: Workspace | None = None,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over scattered blocks (paper, Eq. 4), read where they lie.

    q: (B, H, D), the newest token's queries, or (T, H, D) of several tokens a sequence, its newest,
    one sequence behind the other, as the plan says; k_pool: (N, S, H_kv, D), v_pool: (N, S, H_kv,
    D_V), the last two dimensions dense, in q's dtype or in one of 8 bits, which k_scale and v_scale
    multiply; block_tables: (B, max_blocks) int32; seq_lens: (B,) integers, tokens in the cache, the
    newest included. window: a query attends to the newest so many tokens, its own included;
    soft_cap: see `attention`. plan: how the work is cut; without one it is cut by the table's
    width, for one query token a sequence. workspace: to keep from call to call; tuning: another
    than choose_tuning's, where there is no plan.
    Returns out (T, H, D_V) in q's dtype and lse (T, H) float32; a query with nothing to attend to
    gives 0 and -inf. Slots that no query of a sequence attends to are never read, nor what its
    table does not hold. Raises ShapeError. Block numbers are not checked: see paged_attention.py.
    """
    _check_inputs(q, k_pool, v_pool, block_tables, seq_lens, window, plan)
    _check_options(window, soft_cap)
    num_tokens, num_heads, head_size = q.shape
    block_size, num_kv_heads = k_pool.shape[1:3]
    value_size = v_pool.shape[3]
    out = q.new_empty(num_tokens, num_heads, value_size)
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    max_slots = block_tables.shape[1] * block_size
    if plan is None:
        rows = Rows.of(num_heads, num_kv_heads, value_size, 1)
        num_slots = num_tokens * min(max_slots, window or max_slots) * rows.num_heads
        tuning = tuning or _tuning_for(q, k_pool, v_pool, rows, num_slots, num_tokens)
        num_tiles = len(q) * max(1, -(-max_slots // tuning.tile))
        # Where some sequences are shorter than the table is wide, small ranges even that out.
        ranges = UNPLANNED * _ranges_at_once(q.device, tuning, rows)
        ranges = max(1, min(ranges, num_tiles // LEAST_TILES))
        table = seq_lens  # which is not read
    else:
        rows, tuning, ranges, table = plan.rows, plan.tuning, plan.num_ranges, plan.table
        num_tiles = 0  # the plan has it
    num_programs = ranges * rows.num_heads
    own = workspace is None
    workspace = workspace or Workspace(q.device)
    check_shape(workspace.device == q.device, f"the workspace is on {workspace.device}")
    workspace.reserve(num_programs, rows.heads * rows.queries, value_size, own=own)
    scale = head_size**-0.5 if scale is None else scale
    value_pad, rest_pad = _padded_sizes(head_size, value_size)
    arguments = q, k_pool, v_pool, block_tables, seq_lens, table, out, lse
    arguments += workspace.out, workspace.lse, workspace.arrived
    arguments += scale * k_scale, v_scale, soft_cap or 0.0, window or 0, num_tiles, max_slots
    arguments += *q.stride()[:2], *k_pool.stride()[:2], *v_pool.stride()[:2], block_tables.stride(0)
    with torch.cuda.device_of(q):  # triton launches on the current device
        _attend[(num_programs,)](
            *arguments,
            H_KV=num_kv_heads,
            G=rows.group,
            HG=rows.heads,
            QT=rows.queries,
            ROWS=rows.padded,
            D=head_size,
            D_V=value_size,
            D_PAD=value_pad,
            D_REST=rest_pad,
            S=block_size,
            TILE=tuning.tile,
            PLANNED=plan is not None,
            ONE_EACH=plan is None or plan.one_each,
            WINDOW=window is not None,
            CAP=soft_cap is not None,
            SAME=k_pool.stride() == v_pool.stride() and head_size == value_size,
            STAGES=tuning.num_stages,
            num_warps=tuning.num_warps,
            maxnreg=tuning.registers,
        )
    return out, lse


def try_launch(device: torch.device, group: int, head_size: int) -> None:
    """One small call in the dtype of a GPU's cache; raises what triton or the driver raises."""
    q = torch.zeros(1, group, head_size, dtype=torch.float16, device=device)
    pool = torch.zeros(1, 16, 1, head_size, dtype=torch.float16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    paged_attention_kernel(q, pool, pool, table, table[0] + 1)


def _ranges_at_once(device, tuning, rows) -> int:
    """How many ranges the programs that run at once can have."""
    card, _ = device_limits(device)
    return max(1, card.multiprocessors * tuning.programs // rows.num_heads)


def _tuning_for(q, k_pool, v_pool, rows, num_slots, num_seqs) -> Tuning:
    """`choose_tuning` for these tensors."""
    value, rest = _padded_sizes(q.shape[2], v_pool.shape[3])
    key = value + rest
    slot_bytes, row_bytes = (key + value) * k_pool.element_size(), key * q.element_size()
    found = choose_tuning(
        *device_limits(q.device), rows, num_slots, num_seqs, slot_bytes, row_bytes
    )
    # Tensor cores do not multiply float32 exactly: a larger tile spills registers.
    return replace(found, tile=16) if q.dtype == torch.float32 else found


def _padded(size: int) -> int:
    """A power of two, at least 16: what a tensor core multiplies."""
    return max(16, triton.next_power_of_2(size))


def _padded_sizes(head_size: int, value_size: int) -> tuple[int, int]:
    """The columns of V that a program reads, and of K as many and these beside them."""
    value = _padded(value_size)
    return value, _padded(head_size - value) if head_size > value else 0


def _check_options(window, soft_cap) -> None:
    """ShapeError unless a window and a cap make sense."""
    check_shape(
        window is None or (isinstance(window, int) and not isinstance(window, bool) and window > 0),
        f"a window is a number of tokens, at least 1, not {window}",
    )
    check_shape(
        soft_cap is None or (isinstance(soft_cap, int | float) and 0 < soft_cap < math.inf),
        f"a cap of scores is a number above 0, not {soft_cap}",
    )


def _check_inputs(q, k_pool, v_pool, block_tables, seq_lens, window, plan) -> None:
    """ShapeError unless the kernel can run on these."""
    check_tensors(q=q, k_pool=k_pool, v_pool=v_pool, block_tables=block_tables)
    check_lengths(seq_lens)
    check_shape(q.dim() == 3, f"q must be (T, H, D), not {tuple(q.shape)}")
    check_shape(
        k_pool.dim() == v_pool.dim() == 4
        and k_pool.shape[:3] == v_pool.shape[:3]
        and k_pool.shape[3] == q.shape[2],
        f"need pools (N, S, H_kv, D) with D = {q.shape[2]}, got {tuple(k_pool.shape)} and "
        f"{tuple(v_pool.shape)}",
    )
    num_kv_heads = k_pool.shape[2]
    check_shape(
        num_kv_heads > 0 and q.shape[1] % num_kv_heads == 0,
        f"{q.shape[1]} query heads are no multiple of {num_kv_heads} K/V heads",
    )
    sizes = q.shape[2], v_pool.shape[3]
    check_shape(
        min(sizes) > 0 and max(sizes) <= MAX_HEAD_SIZE,
        f"heads of {sizes}: need 1 to {MAX_HEAD_SIZE}",
    )
    check_shape(
        q.dtype in DTYPES
        and k_pool.dtype == v_pool.dtype
        and (k_pool.dtype == q.dtype or k_pool.dtype in SMALL_DTYPES),
        f"q must have a dtype of {DTYPES} and both pools the same or one of {SMALL_DTYPES}, not "
        f"{q.dtype}, {k_pool.dtype} and {v_pool.dtype}",
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
    batch = len(q) if plan is None else plan.num_seqs
    check_shape(
        block_tables.shape[:1] == seq_lens.shape == (batch,) and seq_lens.is_contiguous(),
        f"need (B,) integers; B differs: q {tuple(q.shape)}, "
        f"block_tables {tuple(block_tables.shape)}, seq_lens {tuple(seq_lens.shape)}",
    )
    check_shape(
        q.device == k_pool.device == v_pool.device == block_tables.device == seq_lens.device,
        "all tensors must be on one device",
    )
    if plan is not None:
        given = len(q), q.shape[1] // num_kv_heads, num_kv_heads, window, q.device
        made = plan.num_tokens, plan.rows.group, plan.rows.kv_heads, plan.window, plan.device
        check_shape(
            made == given,
            "the plan is for another (query tokens, group, K/V heads, window, device): "
            f"{made}, not {given}",
        )


def _steps(x, dim, stride) -> bool:
    """Whether neighbours along `dim` lie `stride` elements apart; one alone may lie anywhere."""
    return x.shape[dim] <= 1 or x.stride(dim) == stride


@triton.jit(do_not_specialize=["window", "num_tiles", "max_slots", "table_stride"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    lens_ptr,
    plan_ptr,
    out_ptr,
    lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    arrived_ptr,
    scale,
    v_scale,
    soft_cap,
    window,
    num_tiles,
    max_slots,
    q_stride_t,
    q_stride_h,
    k_stride_n,
    k_stride_s,
    v_stride_n,
    v_stride_s,
    table_stride,
    H_KV: tl.constexpr,
    G: tl.constexpr,
    HG: tl.constexpr,
    QT: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    D_PAD: tl.constexpr,
    D_REST: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    PLANNED: tl.constexpr,
    ONE_EACH: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SAME: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The tiles of one range, item by item, for one head; a plan's numbers: see cut_evenly."""
    RANGE: tl.constexpr = 16
    ITEM: tl.constexpr = 8
    HEAD_BLOCKS: tl.constexpr = (G + HG - 1) // HG
    HEADS: tl.constexpr = H_KV * HEAD_BLOCKS
    ONE_BLOCK: tl.constexpr = S % TILE == 0  # a tile lies in one block
    D_K: tl.constexpr = D if D < D_PAD else D_PAD  # of K, beside the rest
    # Heads run fastest: programs that run together read neighbouring bytes of the same slots.
    head = tl.program_id(0) % HEADS
    this_range = tl.program_id(0) // HEADS
    ranges = tl.num_programs(0) // HEADS
    if PLANNED:
        numbers = plan_ptr + this_range * RANGE
        item = tl.load(numbers)
        num_parts = tl.load(numbers + 1)
        range_start = tl.load(numbers + 2)
        range_end = tl.load(numbers + 3)
        start = tl.load(numbers + 4)
        first_tile = tl.load(numbers + 6)
        first_range = tl.load(numbers + 10)
        last_range = tl.load(numbers + 11)
        if not ONE_EACH:
            seq = tl.load(numbers + 7)
            token = tl.load(numbers + 8)
            after = tl.load(numbers + 9)
    else:
        least = num_tiles // ranges
        more = num_tiles - least * ranges  # so many ranges have one tile more
        range_start = this_range * least + tl.minimum(this_range, more)
        range_end = range_start + least + (this_range < more).to(tl.int32)
        tiles = tl.maximum(tl.cdiv(max_slots, TILE), 1)
        item = range_start // tiles
        num_parts = tl.cdiv(range_end, tiles) - item
        start = item * tiles
        first_tile = 0
        first_range = 0
        last_range = 0
    if ONE_EACH:  # an item is a sequence
        seq = item
        token = item
        after = 1
    kv_head = head // HEAD_BLOCKS
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, D_PAD)
    offsets = tl.arange(0, TILE)
    query = rows // HG
    for _ in tl.range(0, num_parts):
        # What does not depend on the length is read before it: from a cold cache each costs a
        # microsecond, and so they wait together.
        length = tl.load(lens_ptr + seq).to(tl.int32)
        of_group = head % HEAD_BLOCKS * HG + rows % HG
        row_live = (rows < QT * HG) & (query < after) & (of_group < G)
        q_row = (token + query).to(tl.int64) * q_stride_t
        q_row += (kv_head * G + of_group).to(tl.int64) * q_stride_h
        q_at = q_ptr + q_row[:, None]
        q_mask = row_live[:, None] & (cols < D_K)[None, :]
        q = tl.load(q_at + cols[None, :], mask=q_mask, other=0.0)
        if D_REST:
            rest = D_PAD + tl.arange(0, D_REST)
            q_rest = tl.load(
                q_at + rest[None, :], mask=row_live[:, None] & (rest < D)[None, :], other=0.0
            )
        table = tables_ptr + seq.to(tl.int64) * table_stride
        k_at = k_ptr + kv_head * D + cols[:, None]
        v_at = v_ptr + kv_head * D_V + cols[None, :]

        # Which tiles of the part are live, and which of them this program's. What the plan says
        # only cuts: the first program has all from the live begin on, the last all to the end.
        # No more than the table holds: of a longer one nobody has computed the rest.
        length = tl.minimum(length, max_slots)
        end = length - after + tl.minimum(after, QT)
        if WINDOW:
            begin = tl.maximum(length - after + 1 - window, 0)
        else:
            begin = 0
        if not PLANNED:  # of the ranges of a whole row of the table, those with live tiles
            live_first = tl.minimum(begin // TILE, tiles - 1)
            live_end = tl.minimum(tl.maximum(tl.cdiv(end, TILE), live_first + 1), tiles)
            first_range = _range_of(start + live_first, least, more)
            last_range = _range_of(start + live_end - 1, least, more)
        slot = (first_tile + tl.maximum(range_start - start, 0)) * TILE
        stop = (first_tile + range_end - start) * TILE  # where the item goes on in the next range
        if WINDOW:
            slot = tl.where(this_range == first_range, begin // TILE * TILE, slot)
        else:
            slot = tl.where(this_range == first_range, 0, slot)
        stop = tl.where(this_range == last_range, end, tl.minimum(stop, end))
        mine = (this_range >= first_range) & (this_range <= last_range)
        stop = tl.where(mine, stop, slot)

        if PLANNED:  # the next item's numbers are there when this one ends
            numbers = plan_ptr + ranges * RANGE + (item + 1) * ITEM
            next_start = tl.load(numbers)
            next_first_tile = tl.load(numbers + 2)
            next_first_range = tl.load(numbers + 6)
            next_last_range = tl.load(numbers + 7)
            if not ONE_EACH:
                next_seq = tl.load(numbers + 3)
                next_token = tl.load(numbers + 4)
                next_after = tl.load(numbers + 5)
        # Block numbers are read a tile ahead, so that K and V never wait for them; masked by the
        # table's width and not by the length.
        ahead = slot if ONE_BLOCK else slot + offsets
        block = tl.load(table + ahead // S, mask=ahead < max_slots, other=0)
        scale2 = scale * LOG2_E
        top = tl.full([ROWS], LOWEST, tl.float32)
        totals = tl.zeros([ROWS, TILE], tl.float32)  # of each column: added up behind the loop
        acc = tl.zeros([ROWS, D_PAD], tl.float32)
        for tile_slot in tl.range(slot, stop, TILE, num_stages=STAGES):
            slots = tile_slot + offsets
            live = slots < end
            if WINDOW:
                live = live & (slots >= begin)
            this = block.to(tl.int64)
            ahead = (tile_slot if ONE_BLOCK else slots) + TILE
            block = tl.load(table + ahead // S, mask=ahead < max_slots, other=0)
            inside = (tile_slot % S + offsets) if ONE_BLOCK else slots % S
            at = this * k_stride_n + inside * k_stride_s
            if D_K == D_PAD:
                k = tl.load(k_at + at[None, :], mask=live[None, :], other=0.0)  # (D, TILE)
            else:
                k_mask = live[None, :] & (cols < D_K)[:, None]
                k = tl.load(k_at + at[None, :], mask=k_mask, other=0.0)
            scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")  # (ROWS, TILE)
            if D_REST:
                k_rest = tl.load(
                    k_ptr + kv_head * D + rest[:, None] + at[None, :],
                    mask=live[None, :] & (rest < D)[:, None],
                    other=0.0,
                )
                scores = tl.dot(q_rest, k_rest.to(q.dtype), scores, input_precision="ieee")
            if CAP:
                # tanh(x) = 1 - 2 / (exp(2 x) + 1)
                x = scores * (scale / soft_cap)
                scores = (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)) * (soft_cap * LOG2_E)
            else:
                scores = scores * scale2
            seen = live[None, :]
            if QT > 1:
                position = length - after + query
                seen = seen & (slots[None, :] <= position[:, None])
                if WINDOW:
                    seen = seen & (slots[None, :] > (position - window)[:, None])
            scores = tl.where(seen, scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            fade = tl.exp2(top - new_top)
            weight = tl.exp2(scores - new_top[:, None])
            totals = totals * fade[:, None] + weight
            if not SAME:
                at = this * v_stride_n + inside * v_stride_s
            if D_V == D_PAD:
                v = tl.load(v_at + at[:, None], mask=live[:, None], other=0.0)  # (TILE, D_V)
            else:
                v_mask = live[:, None] & (cols < D_V)[None, :]
                v = tl.load(v_at + at[:, None], mask=v_mask, other=0.0)
            acc = tl.dot(
                weight.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee"
            )
            top = new_top
        if mine:
            total = tl.sum(totals, axis=1)
            some = total != 0.0  # not where there is no slot at all; a NaN stays one
            total = tl.where(some, total, 1.0)
            acc = acc * (v_scale / total)[:, None]
            lse2 = tl.where(some, top + tl.log2(total), -float("inf"))  # to base 2
            out_row = (token + query).to(tl.int64) * (H_KV * G) + kv_head * G + of_group
            out_mask = row_live[:, None] & (cols < D_V)[None, :]
            if first_range == last_range:
                tl.store(out_ptr + out_row[:, None] * D_V + cols[None, :], acc, mask=out_mask)
                tl.store(lse_ptr + out_row, lse2 / LOG2_E, mask=row_live)
            else:
                # A program's last part goes on in the next program, its first one came from the
                # one before: it has a place for each.
                place = this_range + tl.where(this_range == first_range, ranges, 0)
                place = (place * HEADS + head).to(tl.int64) * (QT * HG) + rows
                part_at = part_out_ptr + place[:, None] * D_V + cols[None, :]
                tl.store(part_at, acc, mask=out_mask)
                tl.store(part_lse_ptr + place, lse2, mask=row_live)
                # The last to arrive merges: what the others have stored is there by then.
                tl.debug_barrier()
                counter = arrived_ptr + first_range * HEADS + head
                others = last_range - first_range
                if tl.atomic_add(counter, 1, sem="acq_rel") == others:
                    _merge(
                        part_out_ptr,
                        part_lse_ptr,
                        out_ptr,
                        lse_ptr,
                        first_range * HEADS + head,
                        others + 1,
                        ranges * HEADS,
                        token.to(tl.int64) * (H_KV * G) + kv_head * G + head % HEAD_BLOCKS * HG,
                        tl.minimum(after, QT) * HG,
                        G - head % HEAD_BLOCKS * HG,
                        H_KV * G,
                        HG,
                        QT * HG,
                        HEADS,
                        D_V,
                        D_PAD,
                    )
                    tl.store(counter, 0)
        item += 1
        if PLANNED:
            start = next_start
            first_tile = next_first_tile
            first_range = next_first_range
            last_range = next_last_range
            if not ONE_EACH:
                seq = next_seq
                token = next_token
                after = next_after
        else:
            start += tiles
        if ONE_EACH:
            seq = item
            token = item


@triton.jit
def _range_of(tile, least, more):
    """Which range has this tile: the first `more` have one more than the others."""
    longer = more * (least + 1)
    return tl.where(
        tile < longer, tile // (least + 1), more + (tile - longer) // tl.maximum(least, 1)
    )


@triton.jit
def _merge(
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    first_place,
    num_parts,
    num_programs,
    first_row,
    live_rows,
    live_heads,
    H: tl.constexpr,
    HG: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    D_V: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Attention over all of a part from that of each program over its own (merge_attention).

    Row r is query r // HG and head r % HG from `first_row` on, of HG heads out of H.
    """
    ROWS: tl.constexpr = triton.next_power_of_2(NUM_ROWS)
    UNROLL: tl.constexpr = 16 if ROWS * D_PAD <= 512 else 8 if ROWS * D_PAD <= 1024 else 2
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, D_PAD)
    live = (rows < live_rows) & (rows % HG < live_heads)
    mask = live[:, None] & (cols < D_V)[None, :]
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    # Loads wait for no other step, so that several parts are under way at once; .cg: from the L2
    # cache, where other multiprocessors' stores are.
    for nth in tl.range(0, num_parts, loop_unroll_factor=UNROLL):
        place = first_place + tl.where(nth == 0, num_programs, nth * HEADS)
        at = place.to(tl.int64) * NUM_ROWS + rows
        lse2 = tl.load(part_lse_ptr + at, mask=live, other=-float("inf"), cache_modifier=".cg")
        out_at = part_out_ptr + at[:, None] * D_V + cols[None, :]
        out = tl.load(out_at, mask=mask, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, lse2)
        fade = tl.exp2(top - new_top)
        weight = tl.exp2(lse2 - new_top)
        total = total * fade + weight
        acc = acc * fade[:, None] + out * weight[:, None]
        top = new_top
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    at = first_row + (rows // HG) * H + rows % HG
    tl.store(out_ptr + at[:, None] * D_V + cols[None, :], acc / total[:, None], mask=mask)
    lse2 = tl.where(some, top + tl.log2(total), -float("inf"))
    tl.store(lse_ptr + at, lse2 / LOG2_E, mask=live)


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
