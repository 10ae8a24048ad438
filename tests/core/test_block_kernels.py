"""Regime item 8: Triton's block writes and copies, bit for bit against plain torch.

On a CUDA device; through Triton's interpreter where there is none (see conftest.py).
"""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import NEEDS_CUDA, refuses
from test_paged_attention import REFUSED, bits, block_major
from test_paged_attention import (
    test_refused_maps_change_nothing_and_empty_ones_do_nothing as refused_maps,
)

import paged_attention
from attention import ShapeError
from paged_attention import BlockMapError, PagedKVCache

kernels = pytest.importorskip("paged_attention_triton", reason="needs triton", exc_type=ImportError)

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * ON_CUDA  # its bytes move as fp16's
SIZES = [  # (N, S, H_kv, D, L)
    (7, 3, 1, 2, 2),
    (5, 1, 3, 5, 1),  # an odd row of H_kv * D
    (5, 16, 2, 64, 1),
    (4, 2, 5, 80, 3),
    (3, 7, 1, 1, 1),
    (3, 256, 1, 8, 1),
]


def drawn(shape, dtype, seed):
    """Random bytes as dtype, so NaN of every kind as well, drawn on the CPU."""
    rng = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=rng)
    return raw.to(torch.uint8).view(dtype).to(DEVICE)


def twins(sizes, dtype, seed, num_cpu_blocks=0):
    """Two caches with the same random bytes: by the kernels, and by plain torch."""
    *shape, layers = sizes
    options = {"num_layers": layers, "num_cpu_blocks": num_cpu_blocks, "dtype": dtype}
    both = [PagedKVCache(*shape, device=DEVICE, fused=fused, **options) for fused in (True, False)]
    for cache in both:
        cache.pool.copy_(drawn(cache.pool.shape, dtype, seed))
        if num_cpu_blocks:
            cache.cpu_pool.copy_(drawn(cache.cpu_pool.shape, dtype, seed + 1))
    return both


def same(a, b):
    pools = (a.pool, b.pool), (a.cpu_pool, b.cpu_pool)
    return all(torch.equal(bits(one), bits(other)) for one, other in pools)


# --- writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [0, 1 << 62])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_write_gives_the_bits_of_two_indexed_writes(monkeypatch, sizes, dtype, many):
    monkeypatch.setattr(kernels, "MANY_WORDS", many)  # programs of either size
    fused, plain = twins(sizes, dtype, seed=1)
    slots = sizes[0] * sizes[1]
    rng = random.Random(0)
    for seed, count in enumerate({0, 1, 2, slots // 2, slots}):
        where = torch.tensor(rng.sample(range(slots), count), dtype=torch.int64, device=DEVICE)
        k, v = (drawn((count, *sizes[2:4]), dtype, seed=10 * seed + part) for part in (0, 1))
        layer = rng.randrange(sizes[4])
        before = bits(fused.pool).clone()
        for cache in (fused, plain):
            cache.write(layer, where, k, v)
        assert same(fused, plain)
        assert torch.equal(bits(fused.pool), before) == (count == 0)


def test_a_write_takes_keys_and_values_as_a_projection_leaves_them():
    fused, plain = twins((6, 4, 2, 8, 2), torch.float16, seed=2)
    together = drawn((5, 3, 2, 8), torch.float16, seed=3)  # q, k and v of a token side by side
    apart = drawn((2, 5, 8), torch.float16, seed=4).transpose(0, 1)  # heads first: no rows
    one = drawn((1, 2, 8), torch.float16, seed=5).expand(5, 2, 8)
    column = drawn((5, 2, 9), torch.float16, seed=6)[..., 1:]  # no row whole
    slots = torch.tensor([3, 0, 23, 7, 8], device=DEVICE).repeat_interleave(2)[::2]
    assert not slots.is_contiguous()
    flat = drawn((5, 1, 1), torch.float16, seed=9).expand(5, 2, 8)  # one value for all of a token
    heads = drawn((5, 1, 8), torch.float16, seed=10).expand(5, 2, 8)
    inputs = [together[:, 1], together[:, 2], apart, one, column, flat, heads]
    for k, v in pairwise(inputs):
        for cache in (fused, plain):
            cache.write(1, slots, k, v)
        assert same(fused, plain)
    leaf = torch.ones(5, 2, 8, dtype=torch.float16, device=DEVICE, requires_grad=True)
    fused.write(0, slots, leaf, leaf)
    assert not fused.pool.requires_grad
    assert torch.equal(fused.read(0, slots)[1], leaf)


def test_rows_at_an_odd_address_are_moved_in_smaller_words():
    memory = drawn((2 * 3 * 2 * 4 + 1,), torch.float16, seed=7)
    pool = memory[1:].view(2, 3, 2, 1, 4)
    slots, k = torch.tensor([5, 2], device=DEVICE), drawn((2, 1, 4), torch.float16, seed=8)
    want = pool.clone()
    want.flatten(1, 2)[:, slots] = torch.stack((k, -k))
    kernels.write_slots(pool, slots, k, -k)
    assert torch.equal(bits(pool), bits(want))


def test_a_write_refuses_what_the_plain_one_refuses():
    fused, plain = twins((4, 2, 1, 6, 1), torch.float16, seed=11)
    slots, k = torch.tensor([0, 1], device=DEVICE), torch.zeros(2, 1, 6, device=DEVICE)
    half = k.half()
    cases = [(0, slots, k, half), (0, slots, half, half[:1])]
    cases += [(0, bad, half, half) for bad in (slots.int(), slots[:1], slots[None])]
    for cache in (fused, plain):
        refuses(ShapeError, cache.write, cases)
    if not ON_CUDA:
        with pytest.raises(BlockMapError):
            fused.write(0, torch.tensor([0, 8]), half, half)
    assert same(fused, plain)


# --- copying --------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [0, 1 << 62])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_copy_gives_the_bits_of_a_gather_and_a_scatter(monkeypatch, sizes, dtype, many):
    monkeypatch.setattr(kernels, "MANY_WORDS", many)
    fused, plain = twins(sizes, dtype, seed=12)
    rng = random.Random(sizes[0])
    for count in {0, 1, sizes[0] // 2, sizes[0] - 1}:
        blocks = list(range(sizes[0]))
        rng.shuffle(blocks)
        targets, sources = blocks[:count], blocks[count:]
        pairs = [(rng.choice(sources), target) for target in targets]
        for cache in (fused, plain):
            cache.copy_blocks(pairs)
        assert same(fused, plain)


@settings(max_examples=60 if ON_CUDA else 25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=7))
def test_hazards_are_copied_in_turn_and_chains_refused(pairs):
    fused, plain = twins((7, 1, 1, 3, 1), torch.float16, seed=13)
    found = []
    for cache in (fused, plain):
        try:
            cache.copy_blocks(pairs)
            found.append(None)
        except BlockMapError as error:
            found.append(str(error))
    assert found[0] == found[1]
    assert same(fused, plain)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=9))
def test_pairs_are_split_where_one_launch_would_race_and_nowhere_else(pairs):
    parts = kernels.ordered(pairs)
    assert [pair for part in parts for pair in part] == pairs and all(parts)
    for part in parts:
        for i, (source, target) in enumerate(part):
            others = part[:i] + part[i + 1 :]
            assert source not in {t for _, t in others}
            assert target not in {s for s, _ in others}
    for part, after in pairwise(parts):
        source, target = after[0]
        assert target in {s for s, _ in part} or source in {t for _, t in part}


def test_a_launch_for_each_part_and_one_where_nothing_is_read_and_then_written(monkeypatch):
    cache = twins((9, 1, 1, 4, 1), torch.float16, seed=14)[0]
    launches = []
    monkeypatch.setattr(kernels, "copy_blocks", lambda pool, pairs: launches.append(pairs.tolist()))
    cache.copy_blocks([(0, 1), (0, 2), (3, 4)])
    assert launches == [[[0, 1], [0, 2], [3, 4]]]
    launches.clear()
    cache.copy_blocks([(2, 5), (2, 0), (6, 2), (7, 8), (4, 6)])
    assert launches == [[[2, 5], [2, 0]], [[6, 2], [7, 8]], [[4, 6]]]
    launches.clear()
    cache.copy_blocks([])
    assert launches == []


def test_no_blocks_are_no_launch():
    blocks = torch.arange(16.0).view(1, 2, 8)
    kernels.move_blocks(blocks, blocks, torch.zeros(0, 2, dtype=torch.int64))
    assert torch.equal(blocks, torch.arange(16.0).view(1, 2, 8))


def test_blocks_that_do_not_lie_whole_are_refused():
    pool = torch.zeros(2, 4, 6, device=DEVICE)
    pairs = torch.tensor([[0, 1]], device=DEVICE)
    cases = (pool[:, :, ::2], pool[:, :, :4], pool.transpose(1, 2))
    refuses(ShapeError, kernels.move_blocks, [(bad, bad, pairs) for bad in cases])


# --- swapping -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("staged_blocks", [1, 2, 100])
def test_swaps_give_the_bits_of_the_plain_path(monkeypatch, sizes, dtype, staged_blocks):
    fused, plain = twins(sizes, dtype, seed=15, num_cpu_blocks=6)
    monkeypatch.setattr(paged_attention, "STAGING_BYTES", staged_blocks * fused.bytes_per_block)
    rng = random.Random(staged_blocks)
    for count in (1, min(5, sizes[0])):
        pairs = list(zip(rng.sample(range(sizes[0]), count), rng.sample(range(6), count)))
        back = list(zip([host for _, host in pairs], rng.sample(range(sizes[0]), count)))
        for cache in (fused, plain):
            cache.swap_out(pairs)
        assert same(fused, plain)
        moved = block_major(fused.pool)[[block for block, _ in pairs]]
        assert torch.equal(bits(fused.cpu_pool[[host for _, host in pairs]]), bits(moved))
        for cache in (fused, plain):
            cache.swap_in(back)
        assert same(fused, plain)


@pytest.mark.parametrize("operation", REFUSED)
def test_refused_maps_change_nothing(operation):
    refused_maps(DEVICE, operation, fused=True)


# --- the rest stays poisoned, and what needs a device -------------------------------------------


def test_nothing_else_is_touched_and_no_poison_gets_in():
    sizes = {"num_layers": 2, "num_cpu_blocks": 4, "dtype": torch.bfloat16}
    cache = PagedKVCache(8, 4, 3, 5, **sizes, device=DEVICE, poison=True, fused=True)
    k, v = (torch.rand(4, 3, 5, device=DEVICE).bfloat16() for _ in (0, 1))
    for layer in (0, 1):
        cache.write(layer, torch.arange(8, 12, device=DEVICE), k, v)  # block 2
    cache.copy_blocks([(2, 5)])
    cache.swap_out([(5, 3)])
    cache.poison_blocks([2, 5])
    cache.swap_in([(3, 0)])
    live = ~cache.pool.isnan()
    assert live[:, :, 0].all() and live.sum() == 2 * 2 * 4 * 3 * 5
    for layer in (0, 1):
        assert torch.equal(cache.k_pool(layer)[0], k) and torch.equal(cache.v_pool(layer)[0], v)
    assert (~cache.cpu_pool.isnan()).nonzero()[:, 0].unique().tolist() == [3]


def test_who_gets_the_kernels():
    sizes = {"num_blocks": 2, "block_size": 2, "num_kv_heads": 1, "head_size": 4}
    assert not PagedKVCache(**sizes).fused, "on a CPU only if asked for, through the interpreter"
    assert PagedKVCache(**sizes, device=DEVICE).fused == ON_CUDA
    assert not PagedKVCache(**sizes, device=DEVICE, fused=False).fused
    assert PagedKVCache(**sizes, device=DEVICE, fused=True).fused


def test_a_device_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ShapeError, match="no fused kernels run on cpu"):
        PagedKVCache(2, 2, 1, 4, fused=True)


@pytest.fixture
def asked_anew():
    """What is known of the device is forgotten before the test, and what the test made it after."""
    kernels.problem_on.cache_clear()
    yield
    kernels.problem_on.cache_clear()


def test_where_triton_cannot_run_plain_torch_moves_the_blocks(monkeypatch, asked_anew):
    assert kernels.works_on(torch.device(DEVICE))
    works = kernels.works_on
    cuda = torch.device("cuda")
    for answer, module in ((True, kernels), (False, None)):
        monkeypatch.setattr(kernels, "works_on", lambda device, answer=answer: answer)
        assert paged_attention._block_kernels(cuda, None) is module
        assert paged_attention._block_kernels(cuda, True) is kernels
        assert paged_attention._block_kernels(torch.device("cpu"), None) is None

    kernels.problem_on.cache_clear()

    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels, "move_blocks", no_compiler)
    with pytest.warns(RuntimeWarning, match="plain torch moves the blocks: Failed to find C"):
        assert not works(torch.device(DEVICE))


@pytest.mark.cuda
@NEEDS_CUDA
@pytest.mark.parametrize("heads", [(16, 128), (1, 2047)])  # words of 8 bytes, and of 2
def test_pools_beyond_2_to_the_31_elements(heads):
    """Parts of some 1.5 * 2**31 elements: V, and the end of K, lie beyond what 32 bits count."""
    blocks, size = 1200, 1311  # both the number of slots and a row of 2047 are odd
    need = 2 * blocks * size * heads[0] * heads[1] * 2
    if torch.cuda.mem_get_info()[0] < need + (4 << 30):
        pytest.skip(f"needs {need:,} bytes of device memory")
    cache = PagedKVCache(blocks, size, *heads, num_cpu_blocks=1, device="cuda", fused=True)
    assert cache.pool[0, 0].numel() > 1 << 31
    cache.pool.zero_()
    k, v = (drawn((size, *heads), torch.float16, seed) for seed in (16, 17))
    last = torch.arange((blocks - 1) * size, blocks * size, device="cuda")
    cache.write(0, last, k, v)
    for part, want in enumerate((k, v)):
        assert torch.equal(bits(cache.pool[0, part, -1]), bits(want))
    cache.copy_blocks([(blocks - 1, 1), (blocks - 1, blocks - 2)])
    cache.swap_out([(blocks - 2, 0)])
    cache.swap_in([(0, blocks - 3)])
    for part, want in enumerate((k, v)):
        for block in (1, blocks - 2, blocks - 3):
            assert torch.equal(bits(cache.pool[0, part, block]), bits(want))
        cache.pool[0, part, [1, blocks - 3, blocks - 2, blocks - 1]] = 0
        assert not cache.pool[0, part].view(torch.int16).any(), "the rest is untouched"


@pytest.mark.cuda
@NEEDS_CUDA
def test_swaps_do_not_wait_and_whoever_reads_the_host_does():
    fused = twins((64, 16, 40, 128, 4), torch.float16, seed=18, num_cpu_blocks=64)[0]
    pairs = [(block, (7 * block) % 64) for block in range(64)]
    want = block_major(fused.pool)
    fused.swap_out(pairs)  # compiles
    fused.swap_in([(host, block) for block, host in pairs])
    for _ in range(10):
        fused.cpu_pool.zero_()
        torch.cuda._sleep(20_000_000)  # cycles: the device is busy for a while
        fused.swap_out(pairs)
        assert not torch.cuda.current_stream().query(), "the swap waited for the device"
        assert torch.equal(bits(fused.cpu_pool[[host for _, host in pairs]]), bits(want))
        fused.pool.zero_()
        torch.cuda._sleep(20_000_000)
        fused.swap_in([(host, block) for block, host in pairs])
        fused.cpu_pool.zero_()  # waits until the transfers have read it
        assert torch.equal(bits(block_major(fused.pool)), bits(want))


@pytest.mark.cuda
@NEEDS_CUDA
def test_many_blocks_at_opt_13bs_layer_shape():
    fused, plain = twins((128, 16, 40, 128, 2), torch.float16, seed=19)
    rng = random.Random(20)
    for _ in range(40):
        blocks = rng.sample(range(128), 128)
        pairs = [(rng.choice(blocks[64:]), target) for target in blocks[:64]]
        slots = torch.tensor(rng.sample(range(128 * 16), 1000), device="cuda")
        k, v = (torch.randn(1000, 40, 128, device="cuda").half() for _ in (0, 1))
        for cache in (fused, plain):
            cache.copy_blocks(pairs)
            cache.write(1, slots, k, v)
        assert same(fused, plain)
