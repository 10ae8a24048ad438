"""The paged KV cache on tensors, decode attention over its blocks, and the choice of its kernel.

What it is: the worker's side of the paper. A pool of equal blocks holds K and V (section 4.2);
tokens go to the slots that a block table names (4.3); blocks are copied for copy-on-write (4.4)
and moved to the host and back (4.5). The three fused kernels of section 5 are indexed operations
here: `write`, `paged_attention_kernel` (section 4.1, Eq. 4) and `copy_blocks`. On CUDA, where
triton is installed, those of paged_attention_triton.py take their place, one launch each.

How to use it: a manager decides, this obeys. It is given block numbers, never a manager.
    cache = PagedKVCache(num_blocks, block_size, num_kv_heads, head_size, num_layers=L)
    cache.write(layer, slot_mapping(table, start, num_tokens, block_size), k, v)
    kernel, why_not_triton = choose_kernel("auto", device, num_heads, num_kv_heads, head_size)
    tables = pad_block_tables([table_a, table_b])
    out, lse = attention_kernel(kernel)(q, cache.k_pool(layer), cache.v_pool(layer), tables, lens)

Shapes: B sequences, L layers, H query heads, H_kv K/V heads, D head size, N blocks, S slots per
block, T tokens. Slot number = block number * S + offset in the block.

Block and slot numbers in tensors are checked against the pool on a CPU only: on CUDA to look at
them would make the host wait for the device.
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable

import torch

from attention import (
    ShapeError,
    attention,
    check_lengths,
    check_shape,
    check_tensors,
    length_mask,
)

STAGING_BYTES = 256 << 20  # of device memory that a swap takes at a time, or one block if larger
GATHER, TRITON = "gather", "triton"  # the kernels
CHOICES = ("auto", GATHER, TRITON)


class BlockMapError(ValueError):
    """A block or slot number, or a map of them, that cannot be carried out; nothing changed."""


class DeviceMemoryError(RuntimeError):
    """A pool that does not fit in the memory that is available."""


class KernelError(ValueError):
    """A device or kernel that was asked for by name and is not there, or does not run here."""


class PagedKVCache:
    """K and V of all layers in N device blocks, and num_cpu_blocks host blocks for swapping."""

    def __init__(
        self,
        num_blocks,
        block_size,
        num_kv_heads,
        head_size,
        *,
        num_layers=1,
        num_cpu_blocks=0,
        dtype=None,
        device="cpu",
        poison=False,
        fused=None,
    ):
        """Allocate the pools, uninitialised; with poison, filled with NaN.

        dtype: float16 on CUDA and float32 on a CPU if None. fused: whether to move blocks with
        paged_attention_triton.py; None: on CUDA where triton runs. Raises ShapeError for a size
        that makes no sense or a device without kernels, DeviceMemoryError if the pools do not fit.
        """
        pinned = torch.device(device).type == "cuda"
        dtype = dtype or (torch.float16 if pinned else torch.float32)
        sizes = (num_layers, num_blocks, block_size, num_kv_heads, head_size)
        check_shape(
            all(hasattr(size, "__index__") for size in (*sizes, num_cpu_blocks))
            and min(sizes) >= 1
            and num_cpu_blocks >= 0
            and dtype.is_floating_point,
            f"no cache can have {sizes=}, {num_cpu_blocks=} and {dtype=}",
        )
        self._kernels = _block_kernels(torch.device(device), fused)
        self.fused = self._kernels is not None
        self.num_layers, self.num_blocks, self.block_size = sizes[:3]
        self.num_kv_heads, self.head_size = sizes[3:]
        self.num_cpu_blocks, self.dtype, self.poison = num_cpu_blocks, dtype, poison
        self.bytes_per_token = num_layers * 2 * num_kv_heads * head_size * dtype.itemsize
        self.bytes_per_block = self.bytes_per_token * block_size
        self.num_bytes = self.bytes_per_block * num_blocks  # of the device pool
        self.num_cpu_bytes = self.bytes_per_block * num_cpu_blocks

        check_device_memory(self.num_bytes + (0 if pinned else self.num_cpu_bytes), device)
        check_device_memory(self.num_cpu_bytes, "cpu")
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_size)
        self.pool = torch.empty(shape, dtype=dtype, device=device)  # (L, 2, N, S, H_kv, D)
        self.device = self.pool.device  # with its index: "cuda" has become "cuda:0"
        # The same for copies, which do not care what is inside a block: (L * 2, N, S * H_kv * D)
        self._blocks = self.pool.flatten(0, 1).flatten(2)
        self._host = HostPool(num_cpu_blocks, self.pool, self._kernels)
        _check_indexed(self._blocks[0, :1], read=not self.fused, poison=poison)
        if poison:
            self.pool.fill_(torch.nan)
            self.cpu_pool.fill_(torch.nan)

    @property
    def cpu_pool(self):
        """The host blocks (num_cpu_blocks, L, 2, S, H_kv, D); waits for the swaps so far."""
        return self._host.tensor

    def k_pool(self, layer):
        """The keys of a layer: a view (N, S, H_kv, D)."""
        return self.pool[layer, 0]

    def v_pool(self, layer):
        """The values of a layer: a view (N, S, H_kv, D)."""
        return self.pool[layer, 1]

    @torch.no_grad()
    def write(self, layer, slot_mapping, k, v):
        """Write T tokens: an indexed write each for K and V, or one launch (section 5, 1st kernel).

        slot_mapping: (T,) int64 slot numbers, all different (not checked: with a duplicate
        it is not defined which token wins); k, v: (T, H_kv, D) in the cache's dtype.
        Raises ShapeError, and BlockMapError for a slot outside the pool (CPU only).
        """
        check_tensors(k=k, v=v)
        slots = self._check_slots(slot_mapping)
        shape = (*slots.shape, self.num_kv_heads, self.head_size)
        for x in (k, v):
            check_shape(
                (x.shape, x.dtype, x.device) == (shape, self.dtype, self.device),
                f"need k, v (T, H_kv, D) = {shape} {self.dtype} on {self.device}, got "
                f"{tuple(x.shape)} {x.dtype} on {x.device}",
            )
        if self.fused:
            self._kernels.write_slots(self.pool[layer], slots, k, v)
            return
        for part, values in enumerate((k, v)):
            self._slots(layer, part).index_copy_(0, slots, values.flatten(1))

    def read(self, layer, slot_mapping):
        """K and V of T slots in the order of slot_mapping (T,): two copies (T, H_kv, D)."""
        slots = self._check_slots(slot_mapping)
        k, v = (self._slots(layer, part).index_select(0, slots) for part in (0, 1))
        return k.unflatten(1, self.pool.shape[4:]), v.unflatten(1, self.pool.shape[4:])

    def copy_blocks(self, pairs):
        """Copy blocks, all layers, K and V, in one call (section 5, third kernel).

        pairs: (source, destination) block numbers of an iteration. All sources are read
        before any destination is written. Raises BlockMapError before any change.
        """
        # A copy's destination has just come from the free list: nobody can mean to read it in
        # this iteration. So a source that an earlier pair writes (a chain) is a manager's error,
        # and ambiguous: copied in order it would give the new content, at once the old. A source
        # that a later pair writes was freed and given out again; both orders give the old.
        pairs = _checked_pairs(pairs, self.num_blocks, self.num_blocks, chains=False)
        if not pairs:
            return
        if not self.fused:
            sources, targets = upload(list(zip(*pairs)), self.device)
            self._blocks.index_copy_(1, targets, self._blocks.index_select(1, sources))
            return
        # In place a pair would race with another whose source it writes: so, in turn.
        parts = self._kernels.ordered(pairs)
        for part in upload(pairs, self.device).split([len(part) for part in parts]):
            self._kernels.copy_blocks(self.pool, part)

    def swap_out(self, pairs):
        """Copy device blocks to host blocks (section 4.5). pairs: (device, host) block numbers.

        One gather, then a transfer for each run of host blocks; on CUDA it does not wait for
        them. Raises BlockMapError before any change.
        """
        self._host.swap(_checked_pairs(pairs, self.num_blocks, self.num_cpu_blocks), out=True)

    def swap_in(self, pairs):
        """Copy host blocks to device blocks (section 4.5). pairs: (host, device) block numbers.

        A transfer for each run of host blocks, then one scatter; on CUDA it does not wait for
        them. Raises BlockMapError before any change.
        """
        pairs = _checked_pairs(pairs, self.num_cpu_blocks, self.num_blocks)
        self._host.swap([(block, host) for host, block in pairs], out=False)

    def move(self, swapped_out=(), freed=(), swapped_in=(), copies=()):
        """All that an iteration moves before it writes, in the one order that is right.

        (device, host) pairs out, freed device blocks, (host, device) pairs in, (source,
        destination) copies. What is swapped out is read before its blocks have new owners, poison
        is spread before anything is written, and a copy may start from a block just swapped in.
        Raises BlockMapError.
        """
        self.swap_out(swapped_out)
        self.poison_blocks(sorted({*freed, *(block for block, _ in swapped_out)}))
        self.swap_in(swapped_in)
        self.poison_blocks([host for host, _ in swapped_in], on_cpu=True)
        self.copy_blocks(copies)

    def poison_blocks(self, blocks, *, on_cpu=False):
        """Fill freed blocks with NaN, if poison is on: whoever still reads them will show it.

        blocks: device block numbers, or host block numbers if on_cpu. Raises BlockMapError.
        """
        blocks = list(map(operator.index, blocks))
        _check_range(blocks, self.num_cpu_blocks if on_cpu else self.num_blocks, "poisoned")
        if self.poison and blocks and on_cpu:
            self.cpu_pool.index_fill_(0, torch.tensor(blocks), torch.nan)
        elif self.poison and blocks:
            self._blocks.index_fill_(1, upload(blocks, self.device), torch.nan)

    def _slots(self, layer, part):
        """K (part 0) or V (part 1) of a layer: a view (N * S, H_kv * D)."""
        return self.pool[layer, part].flatten(0, 1).flatten(1)

    def _check_slots(self, slots):
        check_tensors(slot_mapping=slots)
        have, want = (slots.dim(), slots.dtype, slots.device), (1, torch.int64, self.device)
        check_shape(have == want, f"slot_mapping: (dim, dtype, device) is {have}, not {want}")
        _check_numbers(slots, self.num_blocks * self.block_size, "slot")
        return slots


def pad_block_tables(tables, device="cpu"):
    """Block tables of a batch as one tensor (B, max_blocks) int32.

    Padded with block 0, a real block that is safe to read: the lengths mask what it holds.
    """
    width = max(map(len, tables), default=0)
    rows = [[*table, *[0] * (width - len(table))] for table in tables]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(len(rows), width)


def slot_mapping(block_table, start, num_tokens, block_size, device="cpu"):
    """Slot numbers (num_tokens,) int64 of the positions start, start + 1, ... of one sequence.

    block_table: its block numbers in order. Raises BlockMapError if they hold fewer tokens.
    """
    room = len(block_table) * block_size
    if start < 0 or num_tokens < 0 or start + num_tokens > room:
        raise BlockMapError(f"tokens {start} to {start + num_tokens} do not fit {room} slots")
    first, end = start // block_size, -(-(start + num_tokens) // block_size)
    blocks = torch.tensor(block_table[first:end], dtype=torch.int64)
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
    return slots.narrow(0, start - first * block_size, num_tokens).to(device)


def check_device_memory(num_bytes, device):
    """Raise DeviceMemoryError if num_bytes are not available on device.

    CUDA: what the driver reports free and what torch holds but does not use. CPU: the
    kernel's MemAvailable; no check where there is no /proc/meminfo.
    """
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available = torch.cuda.mem_get_info(device)[0] + unused
    else:
        try:
            with open("/proc/meminfo", encoding="ascii") as lines:
                fields = dict(line.split(":") for line in lines)
            available = int(fields["MemAvailable"].split()[0]) * 1024  # the file counts in KiB
        except (OSError, KeyError):
            return
    if num_bytes > available:
        need, have = -(-100 * num_bytes >> 30) / 100, (100 * available >> 30) / 100  # never equal
        raise DeviceMemoryError(f"{device}: {need:,.2f} GiB needed, {have:,.2f} GiB available")


def _check_indexed(rows, read=True, poison=False):
    """Raise ShapeError unless torch can index such rows: of 8 bits it cannot on some devices."""
    at = torch.tensor([0], device=rows.device)
    try:
        rows = rows.index_select(0, at) if read else rows[:1].clone()
        if poison:
            rows.index_fill_(0, at, torch.nan)
    except NotImplementedError:
        raise ShapeError(f"blocks of {rows.dtype} cannot be indexed on {rows.device}") from None


def _check_numbers(numbers, end, what):
    """Raise BlockMapError unless 0 <= numbers < end; on CUDA do nothing."""
    if numbers.device.type == "cpu" and numbers.numel():
        low, high = map(int, numbers.aminmax())
        if low < 0 or high >= end:
            raise BlockMapError(f"{what}s from {low} to {high}: outside 0 to {end - 1}")


def _check_range(blocks, num_blocks, role):
    """Raise BlockMapError unless all blocks are in the pool; role names them in the message."""
    for block in blocks:
        if not 0 <= block < num_blocks:
            raise BlockMapError(f"{role} block {block} is outside a pool of {num_blocks} blocks")


def _checked_pairs(pairs, num_sources, num_targets, chains=True):
    """The pairs as a list of integers; chains: whether a source may be an earlier destination.

    Raises BlockMapError for a map with no one meaning.
    """
    pairs = [(operator.index(source), operator.index(target)) for source, target in pairs]
    written = set()
    for source, target in pairs:
        _check_range([source], num_sources, "source")
        _check_range([target], num_targets, "destination")
        if source in written and not chains:
            raise BlockMapError(f"block {source} is a source after being a destination")
        if target in written:
            raise BlockMapError(f"block {target} is a destination twice")
        written.add(target)
    return pairs


def _block_kernels(device, fused):
    """paged_attention_triton, or None if plain torch is to move the blocks; see PagedKVCache."""
    maybe = fused is None and device.type == "cuda" and importlib.util.find_spec("triton")
    if not fused and not maybe:
        return None
    import paged_attention_triton as kernels  # here and below alone: triton may be missing

    if fused is None:
        return kernels if kernels.works_on(device) else None
    usable = device.type == "cuda" or kernels.INTERPRETED
    check_shape(usable, f"no fused kernels run on {device}")
    return kernels


class HostPool:
    """num_blocks host blocks for a device pool (L, 2, N, S, H_kv, D); pinned if that is on CUDA."""

    def __init__(self, num_blocks, pool, kernels=None):
        """Allocate it, uninitialised. kernels: what moves blocks, see `_block_kernels`."""
        shape = (num_blocks, *pool.shape[:2], *pool.shape[3:])
        pinned = pool.device.type == "cuda" and num_blocks > 0
        self._pool = torch.empty(shape, dtype=pool.dtype, pin_memory=pinned)
        self._rows = self._pool.flatten(3).flatten(1, 2)  # (num_blocks, L * 2, S * H_kv * D)
        self._device_rows = pool.flatten(3).flatten(0, 1)  # (L * 2, N, S * H_kv * D)
        self._kernels = kernels
        self._moved = None  # a CUDA event: the last swap is done

    @property
    def tensor(self):
        """The host blocks (num_blocks, L, 2, S, H_kv, D), after waiting for all swaps so far.

        Swaps do not wait for their transfers, and the host waits for no stream by itself.
        """
        if self._moved is not None:
            self._moved.synchronize()
        return self._pool

    @torch.no_grad()
    def swap(self, pairs, out):
        """Copy blocks to the host (out) or to the device. pairs: (device, host) block numbers.

        On CUDA it waits for nothing: the stream orders it before what comes next. The caller has
        checked the pairs.
        """
        device = self._device_rows.device
        if device.type == "cpu" and self._kernels is None:  # both are here: nothing to stage
            for block, host in pairs:
                here, there = self._device_rows[:, block], self._rows[host]
                target, source = (there, here) if out else (here, there)
                target.copy_(source)
            return
        pairs = sorted(pairs, key=lambda pair: pair[1])  # for long runs of host blocks
        step = max(1, STAGING_BYTES // max(1, self._rows[:1].nbytes))
        for first in range(0, len(pairs), step):
            self._swap_staged(pairs[first : first + step], out)
        if pairs and device.type == "cuda":
            self._moved = torch.cuda.current_stream(device).record_event()

    def _swap_staged(self, pairs, out):
        """The same for pairs in the order of their host blocks, by way of device memory."""
        blocks, hosts = zip(*pairs)
        shape = (len(pairs), *self._rows.shape[1:])
        staged = self._rows.new_empty(shape, device=self._device_rows.device)
        if out:
            self._move(blocks, staged, out)
        for at, host, length in runs(hosts):
            here, there = staged[at : at + length], self._rows[host : host + length]
            target, source = (there, here) if out else (here, there)
            target.copy_(source, non_blocking=True)
        if not out:
            self._move(blocks, staged, out)

    def _move(self, blocks, staged, out):
        """Device blocks into staged (len(blocks), L * 2, S * H_kv * D) (out), or from there."""
        rows, staged = self._device_rows, staged.transpose(0, 1)
        if self._kernels is not None:
            pairs = [(block, at) if out else (at, block) for at, block in enumerate(blocks)]
            source, target = (rows, staged) if out else (staged, rows)
            self._kernels.move_blocks(source, target, upload(pairs, staged.device))
        elif out:
            staged.copy_(rows.index_select(1, upload(blocks, staged.device)))
        else:
            rows.index_copy_(1, upload(blocks, staged.device), staged)


def runs(numbers):
    """The runs of consecutive numbers in a list: (index of the first, the first, how many)."""
    starts = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    ends = [*starts[1:], len(numbers)]
    return [(start, numbers[start], end - start) for start, end in zip(starts, ends)]


def upload(numbers, device):
    """Integers as an int64 tensor on the device, without waiting for the device."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from pageable memory the transfer would block
    return tensor.to(device, non_blocking=True)


def gather_blocks(pool, block_tables):
    """The blocks of a batch, one indexed read: (B, max_blocks * S, H_kv, D).

    pool: (N, S, H_kv, D); block_tables: (B, max_blocks) int32 or int64 on the same device.
    Raises ShapeError, and BlockMapError for a block outside the pool (CPU only).
    """
    check_tensors(pool=pool, block_tables=block_tables)
    check_shape(pool.dim() == 4, f"pool must be (N, S, H_kv, D), not {tuple(pool.shape)}")
    good = block_tables.dim() == 2 and block_tables.dtype in (torch.int32, torch.int64)
    check_shape(good, "block_tables must be (B, max_blocks), int32 or int64")
    check_shape(block_tables.device == pool.device, f"block_tables must be on {pool.device}")
    _check_numbers(block_tables, pool.shape[0], "block")
    batch, max_blocks = block_tables.shape
    # As rows of one block each: index_select then copies whole blocks, not heads.
    if pool.itemsize == 1:
        _check_indexed(pool[:1].flatten(1))
    blocks = pool.flatten(1).index_select(0, block_tables.flatten())
    return blocks.view(batch, max_blocks * pool.shape[1], *pool.shape[2:])


def gather_bytes(pool, block_tables):
    """Extra bytes that gathering a batch needs: copies of K and of V, padded to max_blocks."""
    return 2 * block_tables.numel() * pool[0].numel() * pool.dtype.itemsize


def paged_attention_kernel(
    q, k_pool, v_pool, block_tables, seq_lens, scale=None, *, window=None, soft_cap=None
):
    """Decode attention over scattered blocks (paper, Eq. 4): gather them, then `attention`.

    q: (B, H, D), the newest token's queries; k_pool, v_pool: (N, S, H_kv, D); block_tables:
    (B, max_blocks) int32; seq_lens: (B,) integers, tokens in the cache, the newest included.
    window: attend to the newest so many of them; soft_cap: see `attention`.
    Returns out (B, H, D) in q's dtype and lse (B, H) float32; a sequence of length 0 gives
    0 and -inf. Raises ShapeError and, on a CPU, BlockMapError.
    """
    check_tensors(q=q, k_pool=k_pool, v_pool=v_pool, block_tables=block_tables)
    check_shape(q.dim() == 3, f"q must be (B, H, D), not {tuple(q.shape)}")
    check_lengths(seq_lens)
    check_shape(
        (k_pool.shape, k_pool.dtype) == (v_pool.shape, v_pool.dtype),
        f"the pools of K and V differ: {tuple(k_pool.shape)} {k_pool.dtype} and "
        f"{tuple(v_pool.shape)} {v_pool.dtype}",
    )
    check_shape(
        block_tables.shape[:1] == seq_lens.shape == q.shape[:1],
        f"B differs: q {tuple(q.shape)}, block_tables {tuple(block_tables.shape)}, "
        f"seq_lens {tuple(seq_lens.shape)}",
    )
    k, v = gather_blocks(k_pool, block_tables), gather_blocks(v_pool, block_tables)
    _check_numbers(seq_lens, k.shape[1] + 1, "sequence length")
    mask = length_mask(seq_lens, k.shape[1], window)
    out, lse = attention(q[:, None], k, v, mask, scale, soft_cap=soft_cap)
    return out[:, 0], lse[:, 0]


def choose_device(asked: str) -> torch.device:
    """`auto`: a CUDA device if there is one. Raises KernelError if `cuda` is asked for in vain."""
    cuda = torch.cuda.is_available()
    if asked == "cuda" and not cuda:
        raise KernelError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if cuda and asked != "cpu" else "cpu")


def choose_kernel(
    asked: str,
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
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
    """Decode attention over block tables: see paged_attention_kernel."""
    if kernel == GATHER:
        return paged_attention_kernel
    import paged_attention_triton

    return paged_attention_triton.paged_attention_kernel


def _problem(device: torch.device, group: int, head_size: int) -> str | None:
    """Why Triton's kernels cannot be used, in one line, or None."""
    try:
        import paged_attention_triton as module
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device.type != "cuda" and not module.INTERPRETED:
        return f"triton's kernels need a GPU, and this run is on {device}"
    try:
        module.try_launch(device, group, head_size)
    except Exception as error:  # triton, the compiler and the driver each raise their own
        told = f"{error}".partition("\n")[0] or type(error).__name__
        return f"it does not run on {device}: {told}"
    return None
