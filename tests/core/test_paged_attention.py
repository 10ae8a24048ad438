"""Regime item 8: paged_attention.py, where every byte lies, what is refused, contiguous bits.

And which kernel a run takes: the right one by default, a clear refusal by name.
"""

import io
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import (
    DEVICES,
    DTYPES,
    HEADS,
    assert_close,
    path,  # noqa: F401 (a fixture)
    random_qkv,
    refuses,
)

import paged_attention
from attention import ShapeError, attention, causal_mask, length_mask, merge_attention
from paged_attention import (
    GATHER,
    TRITON,
    BlockMapError,
    DeviceMemoryError,
    HostPool,
    KernelError,
    PagedKVCache,
    attention_kernel,
    check_device_memory,
    choose_kernel,
    gather_blocks,
    gather_bytes,
    pad_block_tables,
    paged_attention_kernel,
    runs,
    slot_mapping,
)

pytestmark = pytest.mark.usefixtures("few_bytes")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def scattered(lens, block_size, num_blocks, seed):
    """Block tables for sequences of these lengths, from a shuffled pool of num_blocks."""
    free = list(range(num_blocks))
    random.Random(seed).shuffle(free)
    return [[free.pop() for _ in range(-(-length // block_size))] for length in lens]


def fill(cache, tables, k, v, lens, layer=0):
    """Write the first lens[b] tokens of k, v (B, T, H_kv, D) where tables say."""
    for b, (table, length) in enumerate(zip(tables, lens)):
        slots = slot_mapping(table, 0, length, cache.block_size, device=cache.device)
        cache.write(layer, slots, k[b, :length], v[b, :length])


def paged(tables, q, k, v, lens, block_size, num_blocks=97, **options):
    """Decode over k and v written to a poisoned pool: (out, lse)."""
    cache = PagedKVCache(
        num_blocks, block_size, *k.shape[2:], dtype=k.dtype, device=k.device, poison=True
    )
    fill(cache, tables, k, v, lens)
    lengths = torch.tensor(lens, dtype=torch.int32, device=k.device)
    tables = pad_block_tables(tables, device=k.device)
    pools = cache.k_pool(0), cache.v_pool(0)
    return paged_attention_kernel(q, *pools, tables, lengths, **options)


def bits(x):
    """The bytes of a tensor: NaN equals itself."""
    return x.contiguous().view(torch.uint8)


def block_major(x):
    """Blocks of a device pool (L, 2, N, S, H_kv, D) as the host pool has them, N first, there."""
    return x.permute(2, 0, 1, 3, 4, 5).cpu()


def stamped(device="cpu", **options):
    """A cache of fp16 whose every element names its place: 7 and 4 blocks of 3 slots, 2 layers."""
    sizes = {"num_layers": 2, "num_cpu_blocks": 4, "dtype": torch.float16}
    cache = PagedKVCache(7, 3, 1, 2, device=device, **sizes, **options)
    cache.pool.copy_(torch.arange(cache.pool.numel()).view(cache.pool.shape))
    cache.cpu_pool.copy_(-1 - torch.arange(cache.cpu_pool.numel()).view(cache.cpu_pool.shape))
    return cache


# --- the kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_kernel_matches_the_oracle_over_random_tables_in_a_poisoned_pool(device, dtype, heads):
    for block_size in (1, 5, 16):
        lens = [1, max(1, block_size - 1), block_size, block_size + 1, 13, 31, 67]
        q, k, v = random_qkv((7, 1, heads[0], 64), (7, 67, heads[1], 64), dtype, device, seed=1)
        num_blocks = 2 * sum(-(-length // block_size) for length in lens)
        tables = scattered(lens, block_size, num_blocks, seed=block_size)
        out, lse = paged(tables, q[:, 0], k, v, lens, block_size, num_blocks)
        mask = length_mask(torch.tensor(lens, device=device), 67)
        assert_close((out[:, None], lse[:, None]), q, k, v, mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("block_size", [1, 2, 7, 8, 16, 32, 64, 128, 256])
@pytest.mark.usefixtures("path")
def test_kernel_gives_the_bits_of_contiguous_attention(device, dtype, head_size, block_size):
    lens = [1, 59, 33, 0]
    width = -(-59 // block_size) * block_size
    for heads in ((4, 4), (8, 2)):
        shapes = (4, 1, heads[0], head_size), (4, width, heads[1], head_size)
        q, k, v = random_qkv(*shapes, dtype, device, seed=block_size)
        tables = scattered(lens, block_size, 130, seed=head_size)
        result = paged(tables, q[:, 0], k, v, lens, block_size, num_blocks=130)
        mask = length_mask(torch.tensor(lens, device=device), width)
        dead = ~mask[:, 0, :, None, None]
        want = attention(q, k.masked_fill(dead, 0), v.masked_fill(dead, 0), mask)
        assert torch.equal(result[0], want[0][:, 0])
        assert torch.equal(result[1], want[1][:, 0])


@pytest.mark.parametrize("device", DEVICES)
def test_where_the_blocks_lie_does_not_matter(device):
    lens = [5, 64, 17]
    q, k, v = random_qkv((3, 1, 4, 64), (3, 64, 2, 64), torch.float16, device, seed=2)
    in_order = [[0], [1, 2, 3, 4], [5, 6]]
    want = paged(in_order, q[:, 0], k, v, lens, 16)
    for seed in range(4):
        result = paged(scattered(lens, 16, 97, seed), q[:, 0], k, v, lens, 16)
        assert all(map(torch.equal, result, want))


def test_kernel_passes_the_scale_on():
    cache = stamped()
    pools = cache.k_pool(0) / 64, cache.v_pool(0)
    arguments = torch.tensor([[6, 1]]), torch.tensor([5])
    q = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0)).half()
    result = paged_attention_kernel(q, *pools, *arguments, scale=0.25)
    want = attention(
        q[:, None], *(gather_blocks(pool, arguments[0])[:, :5] for pool in pools), scale=0.25
    )
    torch.testing.assert_close(result, (want[0][:, 0], want[1][:, 0]))
    assert not torch.allclose(result[1], paged_attention_kernel(q, *pools, *arguments)[1])


def test_kernel_passes_a_window_and_a_cap_on():
    lens = [5, 30, 17]
    q, k, v = random_qkv((3, 1, 4, 16), (3, 30, 2, 16), torch.float32, "cpu", seed=8)
    tables = scattered(lens, 4, 97, seed=1)
    for window, cap in ((7, None), (None, 0.5), (3, 0.5)):
        result = paged(tables, q[:, 0], k, v, lens, 4, window=window, soft_cap=cap)
        mask = length_mask(torch.tensor(lens), 30, window)
        assert_close([x[:, None] for x in result], q, k, v, mask, cap)


def test_a_block_shared_by_two_sequences_is_read_by_both():
    q, k, v = random_qkv((2, 1, 4, 16), (2, 7, 4, 16), torch.float32, "cpu", seed=3)
    k[1, :4], v[1, :4], q[1] = k[0, :4], v[0, :4], q[0]
    apart = paged([[5, 1], [2, 6]], q[:, 0], k, v, [7, 7], 4, num_blocks=8)
    shared = paged([[5, 1], [5, 6]], q[:, 0], k, v, [7, 7], 4, num_blocks=8)
    assert all(map(torch.equal, apart, shared))
    assert not torch.equal(shared[0][0], shared[0][1]), "the second blocks differ"


@pytest.mark.parametrize("device", DEVICES)
def test_partial_results_over_blocks_merge_to_the_whole(device):
    lens = [61, 5, 32]
    q, k, v = random_qkv((3, 1, 8, 64), (3, 61, 2, 64), torch.float32, device, seed=4)
    cache = PagedKVCache(40, 8, 2, 64, dtype=torch.float32, device=device, poison=True)
    tables = scattered(lens, 8, 40, seed=4)
    fill(cache, tables, k, v, lens)
    padded = pad_block_tables(tables, device=device)
    parts = []
    for first, last in ((0, 3), (3, 4), (4, 8)):
        part_lens = torch.tensor(lens, device=device) - first * 8
        part_lens = part_lens.clamp(0, (last - first) * 8)
        pools = cache.k_pool(0), cache.v_pool(0)
        parts.append(paged_attention_kernel(q[:, 0], *pools, padded[:, first:last], part_lens))
    out, lse = merge_attention(*zip(*parts))
    mask = length_mask(torch.tensor(lens, device=device), 61)
    assert_close((out[:, None], lse[:, None]), q, k, v, mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_then_decode_token_by_token_equals_one_causal_pass(device, dtype):
    prompt, length, layers = 7, 19, 2
    table = scattered([length], 4, 11, seed=5)[0]
    cache = PagedKVCache(11, 4, 2, 64, num_layers=layers, dtype=dtype, device=device, poison=True)
    for layer in range(layers):
        q, k, v = random_qkv((1, length, 4, 64), (1, length, 2, 64), dtype, device, seed=layer)
        slots = slot_mapping(table, 0, prompt, 4, device=device)
        cache.write(layer, slots, k[0, :prompt], v[0, :prompt])
        outs, lses = [], []
        for i in range(prompt, length):
            token = slice(i, i + 1)
            slot = slot_mapping(table, i, 1, 4, device=device)
            cache.write(layer, slot, k[0, token], v[0, token])
            tables = pad_block_tables([table[: i // 4 + 1]], device=device)
            seq_lens = torch.tensor([i + 1], device=device)
            pools = cache.k_pool(layer), cache.v_pool(layer)
            out, lse = paged_attention_kernel(q[:, i], *pools, tables, seq_lens)
            outs.append(out)
            lses.append(lse)
        mask = causal_mask(length - prompt, length, device=device)
        result = torch.stack(outs, dim=1), torch.stack(lses, dim=1)
        assert_close(result, q[:, prompt:], k, v, mask)


def test_kernel_refuses_what_does_not_fit():
    cache = PagedKVCache(4, 2, 2, 8)
    q, lens = torch.zeros(2, 4, 8), torch.tensor([6, 0])
    tables = torch.zeros(2, 3, dtype=torch.int32)
    pools = cache.k_pool(0), cache.v_pool(0)
    refused = [
        (q[0], *pools, tables, lens),
        (q, *pools, tables[:1], lens),
        (q, *pools, tables, lens[:1]),
        (q, *pools, tables[0], lens),
        (q, *pools, tables.float(), lens),
        (q, *pools, tables.to("meta"), lens),
        (q, pools[0][0], pools[1], tables, lens),
        (q[:, :3], *pools, tables, lens),
        (q.half(), *pools, tables, lens),
        (q, *pools, tables, lens.float()),
        (q, *pools, tables, lens > 0),
        (q, pools[0], pools[1][:3], tables, lens),
        (q, pools[0], pools[1].half(), tables, lens),
        (q.tolist(), *pools, tables, lens),
        (q, *pools, tables.tolist(), lens),
        (q, *pools, tables, lens.tolist()),
        (q, pools[0].tolist(), pools[1], tables, lens),
    ]
    refuses(ShapeError, paged_attention_kernel, refused)
    outside = [(tables - 1, lens), (tables + 4, lens), (tables, lens + 1), (tables, lens - 1)]
    refuses(BlockMapError, paged_attention_kernel, [(q, *pools, *bad) for bad in outside])


# --- the pool -------------------------------------------------------------------------------


def test_bytes_are_exact():
    cache = PagedKVCache(5, 3, 2, 8, num_layers=4, num_cpu_blocks=2, dtype=torch.float16)
    assert cache.pool.shape == (4, 2, 5, 3, 2, 8) and cache.cpu_pool.shape == (2, 4, 2, 3, 2, 8)
    assert cache.num_bytes == cache.pool.untyped_storage().nbytes() == 4 * 2 * 5 * 3 * 2 * 8 * 2
    assert cache.num_cpu_bytes == cache.cpu_pool.untyped_storage().nbytes()
    assert cache.bytes_per_block * 5 == cache.num_bytes
    assert cache.k_pool(3).shape == cache.v_pool(3).shape == (5, 3, 2, 8)
    # Section 3 of the paper: 2 x 5120 x 40 layers x 2 bytes = 800 KB per token of OPT-13B.
    opt_13b = PagedKVCache(2, 16, 40, 128, num_layers=40, dtype=torch.float16)
    assert opt_13b.bytes_per_token == 800 * 1024
    assert opt_13b.num_bytes == opt_13b.pool.untyped_storage().nbytes() == 2 * 16 * 800 * 1024


@pytest.mark.parametrize("device", DEVICES)
def test_defaults_by_device(device):
    cache = PagedKVCache(2, 2, 1, 4, device=device, num_cpu_blocks=1)
    on_cuda = device == "cuda"
    assert cache.dtype == cache.pool.dtype == (torch.float16 if on_cuda else torch.float32)
    assert cache.pool.device.type == device and cache.cpu_pool.device.type == "cpu"
    assert cache.cpu_pool.is_pinned() == on_cuda


def test_a_pool_that_makes_no_sense_or_does_not_fit_is_refused(monkeypatch):
    good = {"num_blocks": 2, "block_size": 2, "num_kv_heads": 1, "head_size": 4}
    none = dict.fromkeys(("num_blocks", "block_size", "num_layers"), 0)
    whole = {"num_blocks": 2.0, "head_size": 4.5, "num_cpu_blocks": -1, "dtype": torch.int8}
    for name, bad in [*none.items(), *whole.items()]:
        with pytest.raises(ShapeError):
            PagedKVCache(**good | {name: bad})
    check_device_memory(1, "cpu")
    asked = []
    monkeypatch.setattr(paged_attention, "check_device_memory", lambda *args: asked.append(args))
    cache = PagedKVCache(**good, num_cpu_blocks=3)
    # Both are on the host here; beside a GPU's pool the host's is asked for by itself.
    both = cache.num_bytes + cache.num_cpu_bytes
    assert asked == [(both, "cpu"), (cache.num_cpu_bytes, "cpu")]
    monkeypatch.undo()
    for sizes in ({"num_blocks": 1 << 50}, {"num_blocks": 1, "num_cpu_blocks": 1 << 50}):
        with pytest.raises(DeviceMemoryError, match=r"[0-9.,]+ GiB needed, [0-9.]+ GiB"):
            PagedKVCache(block_size=2, num_kv_heads=1, head_size=4, **sizes)


def test_a_machine_that_does_not_tell_its_memory(monkeypatch):
    check_device_memory(0, "cpu")
    with pytest.raises(DeviceMemoryError):
        check_device_memory(2**60, "cpu")

    def absent(*_, **__):
        raise FileNotFoundError("/proc/meminfo")

    for found in (absent, lambda *_, **__: io.StringIO("MemTotal: 5 kB\n")):
        monkeypatch.setattr(paged_attention, "open", found, raising=False)
        check_device_memory(2**60, "cpu")


def test_the_memory_of_a_machine_is_counted_in_kib(monkeypatch):
    there = lambda *_, **__: io.StringIO("MemTotal: 9 kB\nMemAvailable: 5 kB\n")  # noqa: E731
    monkeypatch.setattr(paged_attention, "open", there, raising=False)
    check_device_memory(5 * 1024, "cpu")
    with pytest.raises(DeviceMemoryError, match=r"cpu: 0\.01 GiB needed, 0\.00 GiB avail"):
        check_device_memory(5 * 1024 + 1, "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_stamps_written_through_tables_come_back(device):
    lens, layers, block_size = [1, 3, 4, 5, 13], 2, 4
    tables = scattered(lens, block_size, 31, seed=6)
    cache = PagedKVCache(
        31, block_size, 3, 8, num_layers=layers, dtype=torch.float16, device=device, poison=True
    )

    def stamp(b, position, layer, part):
        # Below 2048, where every integer is a float16, and different for each argument.
        return ((b * 13 + position) * layers + layer) * 2 + part + 1

    values = torch.tensor(
        [
            [[[stamp(b, i, layer, part) for i in range(13)] for b in range(5)] for part in (0, 1)]
            for layer in range(layers)
        ]
    )
    assert values.unique().numel() == values.numel() and values.max() < 2048
    values = values.to(device, torch.float16)[..., None, None].expand(-1, -1, -1, -1, 3, 8)
    for layer in range(layers):
        fill(cache, tables, *values[layer], lens, layer)
    for layer in range(layers):
        padded = pad_block_tables(tables, device=device)
        whole = [gather_blocks(pool, padded) for pool in (cache.k_pool(layer), cache.v_pool(layer))]
        for part in (0, 1):
            for b, length in enumerate(lens):
                want = values[layer, part, b, :length]
                slots = slot_mapping(tables[b], 0, length, block_size, device=device)
                assert torch.equal(cache.read(layer, slots)[part], want)
                assert torch.equal(whole[part][b, :length], want)
    filled = sum(lens) * layers * 2 * 3 * 8
    assert (~cache.pool.isnan()).sum() == filled, "nothing else was written"


@pytest.mark.parametrize("device", DEVICES)
def test_write_takes_strided_input_and_records_no_gradient(device):
    cache = stamped(device)
    k, v = (torch.randn(1, 4, 2, device=device).half().transpose(0, 1) for _ in (0, 1))
    slots = torch.tensor([20, 0, 7, 4], device=device)
    before = cache.pool.clone()
    cache.write(1, slots, k.requires_grad_(), v)
    assert not cache.pool.requires_grad
    assert all(map(torch.equal, cache.read(1, slots), (k, v)))
    before[1].view(2, 21, 1, 2)[:, slots] = torch.stack((k, v)).detach()
    assert torch.equal(cache.pool, before)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    cache.write(0, nothing, k[:0], v[:0])
    assert torch.equal(cache.pool, before)


def test_write_and_read_refuse_what_does_not_fit():
    cache = stamped()
    before = cache.pool.clone()
    slots, k = torch.tensor([0, 1]), torch.zeros(2, 1, 2, dtype=torch.float16)
    refused = [
        (slots, k, k[:1]),
        (slots, k[:1], k),
        (slots, k.float(), k),
        (slots, k, k.float()),
        (slots.int(), k, k),
        (slots[None], k[None], k[None]),
        (slots, k.to("meta"), k),
        (slots.to("meta"), k, k),
        (slots.tolist(), k, k),
        (slots, k.tolist(), k),
        (slots, k, k.tolist()),
    ]
    refuses(ShapeError, cache.write, [(0, *case) for case in refused])
    outside = [torch.tensor([0, 21]), torch.tensor([-1, 0])]
    refuses(BlockMapError, cache.write, [(0, slots, k, k) for slots in outside])
    refuses(BlockMapError, cache.read, [(0, slots) for slots in outside])
    assert torch.equal(cache.pool, before)


@pytest.mark.parametrize("device", DEVICES)
def test_gather_equals_a_loop_over_blocks_and_its_bytes_are_known(device):
    cache = stamped(device)
    tables = torch.tensor([[6, 0, 6], [2, 5, 1]], dtype=torch.int32, device=device)
    for pool in (pool(layer) for layer in (0, 1) for pool in (cache.k_pool, cache.v_pool)):
        got = gather_blocks(pool, tables)
        assert torch.equal(got, gather_blocks(pool, tables.long()))
        for b, table in enumerate(tables.tolist()):
            assert torch.equal(got[b], torch.cat([pool[block] for block in table]))
        assert gather_bytes(pool, tables) == 2 * got.nbytes, "of K and V"


# --- copies and swaps -----------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=7))
def test_copies_are_simultaneous_or_refused(pairs):
    cache = stamped()
    before = cache.pool.clone()
    targets = [target for _, target in pairs]
    chain = any(source in targets[:i] for i, (source, _) in enumerate(pairs))
    if chain or len(set(targets)) < len(targets):
        with pytest.raises(BlockMapError):
            cache.copy_blocks(pairs)
        assert torch.equal(cache.pool, before)
        return
    cache.copy_blocks(pairs)
    want = before.clone()
    for source, target in pairs:
        want[:, :, target] = before[:, :, source]
    assert torch.equal(cache.pool, want)


@pytest.mark.parametrize("device", DEVICES)
def test_copy_blocks_by_hand(device):
    cache = stamped(device)
    before = cache.pool.clone()
    cache.copy_blocks([(2, 5), (2, 0), (6, 2)])  # block 2 is read twice, then given out again
    assert torch.equal(cache.pool[:, :, [5, 0, 2]], before[:, :, [2, 2, 6]])
    assert torch.equal(cache.pool[:, :, [1, 3, 4, 6]], before[:, :, [1, 3, 4, 6]])


REFUSED = {
    "copy_blocks": [[(0, 7)], [(7, 0)], [(-1, 0)], [(0, -1)], [(0, 1), (2, 1)], [(0, 1), (1, 2)]],
    "swap_out": [[(0, 4)], [(7, 0)], [(-1, 0)], [(0, -1)], [(0, 1), (2, 1)]],
    "swap_in": [[(0, 7)], [(4, 0)], [(-1, 0)], [(0, -1)], [(0, 1), (2, 1)]],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", REFUSED)
def test_refused_maps_change_nothing_and_empty_ones_do_nothing(device, operation, fused=False):
    cache = stamped(device, fused=fused)
    before, cpu_before = cache.pool.clone(), cache.cpu_pool.clone()
    maps = [([(3, 3), *bad],) for bad in REFUSED[operation]]
    refuses(BlockMapError, getattr(cache, operation), maps)
    getattr(cache, operation)([])
    assert torch.equal(cache.pool, before) and torch.equal(cache.cpu_pool, cpu_before)


@pytest.mark.parametrize("device", DEVICES)
def test_swap_out_and_in_is_the_identity_though_the_blocks_are_reused(device):
    cache = stamped(device, poison=True)
    before, cpu_before = cache.pool.clone(), cache.cpu_pool.clone()
    cache.swap_out([(4, 0), (1, 3), (6, 2)])
    assert torch.equal(cache.pool, before), "sources stay as they are"
    assert torch.equal(cache.cpu_pool[[0, 3, 2]], block_major(before[:, :, [4, 1, 6]]))
    assert torch.equal(cache.cpu_pool[1], cpu_before[1])
    cache.poison_blocks([4, 1, 6])
    cache.copy_blocks([(0, 4), (2, 1)])  # others move in
    cache.swap_in([(3, 5), (0, 6), (2, 3)])
    assert torch.equal(cache.pool[:, :, [5, 6, 3]], before[:, :, [1, 4, 6]])
    assert torch.equal(cache.pool[:, :, [0, 2, 4, 1]], before[:, :, [0, 2, 0, 2]])


def test_block_numbers_of_the_two_pools_do_not_mix():
    cache = stamped()
    before, cpu_before = cache.pool.clone(), cache.cpu_pool.clone()
    cache.swap_in([(0, 1), (1, 2)])  # no chain: host block 1 is not device block 1
    assert torch.equal(block_major(cache.pool[:, :, [1, 2]]), cpu_before[[0, 1]])
    cache.swap_out([(4, 3), (3, 2), (3, 0)])  # one block may go to two places
    assert torch.equal(cache.cpu_pool[[3, 2, 0]], block_major(before[:, :, [4, 3, 3]]))


def test_a_cache_without_cpu_blocks_cannot_swap():
    cache = PagedKVCache(2, 2, 1, 4)
    for swap in (cache.swap_out, cache.swap_in):
        swap([])
        with pytest.raises(BlockMapError):
            swap([(0, 0)])


@pytest.mark.parametrize("out", [True, False])
def test_a_staged_swap_moves_what_a_swap_on_the_host_moves(out):
    """In plain torch on a CPU: the two ways are for the same K and V."""
    pairs = [(3, 1), (0, 2), (1, 0)]
    found = []
    for staged in (False, True):
        values = torch.arange(2 * 2 * 5 * 2 * 1 * 3, dtype=torch.float32)
        device = values.view(2, 2, 5, 2, 1, 3).clone()
        pool = HostPool(4, device)
        pool.tensor.fill_(-1.0)
        if staged:
            pool._swap_staged(sorted(pairs, key=lambda pair: pair[1]), out)
        else:
            pool.swap(pairs, out)
        found.append((device, pool.tensor))
    for ours, theirs in zip(*found):
        assert torch.equal(ours, theirs)


def test_runs_are_the_list_cut_where_it_does_not_count_on():
    assert runs([]) == []
    assert runs([4]) == [(0, 4, 1)]
    assert runs([1, 2, 3, 5, 6, 6, 9]) == [(0, 1, 3), (3, 5, 2), (5, 6, 1), (6, 9, 1)]


@pytest.mark.parametrize("device", DEVICES)
def test_poison(device):
    new = PagedKVCache(2, 2, 1, 4, num_cpu_blocks=1, device=device, poison=True)
    assert new.pool.isnan().all() and new.cpu_pool.isnan().all()
    cache = stamped(device, poison=True)
    cache.poison_blocks([3, 5])
    cache.poison_blocks([1], on_cpu=True)
    for pool, poisoned in ((cache.pool, [3, 5]), (cache.cpu_pool.movedim(0, 2), [1])):
        for block in range(pool.shape[2]):
            assert pool[:, :, block].isnan().all() == (block in poisoned)
            assert pool[:, :, block].isnan().any() == (block in poisoned)
    before = bits(cache.pool)
    refuses(BlockMapError, cache.poison_blocks, [([7],), ([-1],), ([0, 7],)])
    with pytest.raises(BlockMapError):
        cache.poison_blocks([4], on_cpu=True)
    cache.poison_blocks([])
    assert torch.equal(bits(cache.pool), before)
    clean = stamped(device)
    clean.poison_blocks([3, 5])
    assert not clean.pool.isnan().any()


# --- tables ---------------------------------------------------------------------------------


def test_the_moves_of_an_iteration_do_not_disturb_one_another():
    """Block 1 is swapped out and takes what comes in; block 2 is freed and taken by a copy of it;
    block 3 is freed, block 0 swapped out, and both are nobody's."""
    cache = PagedKVCache(6, 2, 1, 2, num_cpu_blocks=4, dtype=torch.float32, poison=True)
    for block in range(6):
        cache.pool[:, :, block] = block
    cache.cpu_pool[0] = 10.0
    cache.move([(1, 1), (5, 2), (0, 3)], [2, 3], [(0, 1)], [(1, 2), (4, 5)])
    device, host = (x[:, 0, 0, 0, 0, 0] for x in (cache.pool.movedim(2, 0), cache.cpu_pool))
    assert device.nan_to_num(-1.0).tolist() == [-1.0, 10.0, 10.0, -1.0, 4.0, 4.0]
    assert host.nan_to_num(-1.0).tolist() == [-1.0, 1.0, 5.0, 0.0]


def test_tables_are_padded_with_a_real_block():
    padded = pad_block_tables([[3], [], (5, 2, 4)])
    assert padded.dtype == torch.int32 and padded.tolist() == [[3, 0, 0], [0, 0, 0], [5, 2, 4]]
    assert pad_block_tables([]).shape == (0, 0) and pad_block_tables([[], []]).shape == (2, 0)


def test_slot_mapping():
    table = [7, 1, 3]
    all_slots = [block * 4 + offset for block in table for offset in range(4)]
    for start in range(13):
        for num_tokens in range(13 - start):
            slots = slot_mapping(table, start, num_tokens, 4)
            assert slots.dtype == torch.int64
            assert slots.tolist() == all_slots[start : start + num_tokens]
    outside = ((-1, 2), (0, 13), (12, 1), (3, -1))
    refuses(BlockMapError, slot_mapping, [(table, *tokens, 4) for tokens in outside])


# --- which kernel a run takes ---------------------------------------------------------------


@pytest.fixture
def problem(monkeypatch):
    """What is wrong with Triton: None, or a text, whatever this machine has."""
    found = {"text": None}
    monkeypatch.setattr(paged_attention, "_problem", lambda device, group, size: found["text"])
    return found


def test_auto_takes_triton_on_a_gpu_where_it_runs(problem):
    assert choose_kernel("auto", CUDA, 8, 2, 64) == (TRITON, "")
    assert choose_kernel("auto", CPU, 8, 2, 64) == (GATHER, "triton needs a GPU")
    problem["text"] = "no compiler"
    assert choose_kernel("auto", CUDA, 8, 2, 64) == (GATHER, "no compiler")


def test_a_kernel_by_name_is_taken_or_refused(problem):
    assert choose_kernel(GATHER, CUDA, 8, 2, 64) == (GATHER, "")
    assert choose_kernel(TRITON, CUDA, 8, 2, 64) == (TRITON, "")
    problem["text"] = "no compiler"
    with pytest.raises(KernelError, match="no compiler; use --kernel gather"):
        choose_kernel(TRITON, CUDA, 8, 2, 64)


def test_what_the_kernel_cannot_do_is_named():
    pytest.importorskip("triton", exc_type=ImportError)
    with pytest.raises(KernelError, match=r"heads of .* need 1 to 1024"):
        choose_kernel(TRITON, CUDA if torch.cuda.is_available() else CPU, 1, 1, 1025)


def test_without_triton_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "paged_attention_triton", None)
    with pytest.raises(KernelError, match="--kernel triton: triton cannot be imported"):
        choose_kernel(TRITON, CPU, 4, 4, 64)


def test_without_a_gpu_the_sentence_is_ours(monkeypatch):
    module = pytest.importorskip("paged_attention_triton", exc_type=ImportError)
    monkeypatch.setattr(module, "INTERPRETED", False)
    ours = "triton's kernels need a GPU, and this run is on cpu"
    with pytest.raises(KernelError, match=f"^--kernel triton: {ours}; use --kernel gather$"):
        choose_kernel(TRITON, CPU, 4, 4, 64)


def test_eight_bits_that_a_device_cannot_index_are_refused(monkeypatch):
    sizes = {"num_blocks": 2, "block_size": 2, "num_kv_heads": 1, "head_size": 4}
    with pytest.raises(ShapeError, match="float8_e4m3fn cannot be indexed on cpu"):
        PagedKVCache(**sizes, dtype=torch.float8_e4m3fn, poison=True)
    pool = torch.zeros(2, 2, 1, 4).to(torch.float8_e4m3fn)
    q, tables, lens = torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([1])
    for query in (q, q.to(pool.dtype)):
        with pytest.raises(ShapeError, match="float8_e4m3fn"):
            paged_attention_kernel(query, pool, pool, tables, lens)

    def no_kernel(*arguments):
        raise NotImplementedError

    monkeypatch.setattr(torch.Tensor, "index_select", no_kernel)
    with pytest.raises(ShapeError, match="cannot be indexed"):
        paged_attention_kernel(q, pool, pool, tables, lens)
    with pytest.raises(ShapeError, match="cannot be indexed"):
        PagedKVCache(**sizes, dtype=torch.float8_e4m3fn)


def test_a_kernel_that_cannot_be_launched_at_this_size_is_found_before_the_run(monkeypatch):
    module = pytest.importorskip("paged_attention_triton", exc_type=ImportError)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_kernel(TRITON, device, 8, 2, 64) == (TRITON, "")

    def too_much(device, group, head_size):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(module, "try_launch", too_much)
    told = f"it does not run on {device}: out of resource: shared memory"
    with pytest.raises(KernelError, match=f"{told}; use"):
        choose_kernel(TRITON, device, 8, 2, 64)
    assert choose_kernel("auto", device, 8, 2, 64)[1] in (told, "triton needs a GPU")


def test_each_name_has_its_kernel():
    assert attention_kernel(GATHER) is paged_attention.paged_attention_kernel
    module = pytest.importorskip("paged_attention_triton", exc_type=ImportError)
    assert attention_kernel(TRITON) is module.paged_attention_kernel
