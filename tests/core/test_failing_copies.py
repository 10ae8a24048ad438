"""Regime item 5 for the tensors: a device copy or a swap that fails leaves everything consistent.

A map that cannot be carried out is refused before a byte moves. A transfer that fails on its way
(here: the k-th copy of a swap, for every k, or the copy or the write of an operation) leaves the
blocks that it reads as they were, so that the same map, made again, gives what it would have given
the first time; the manager's tables, which were changed first, describe just that.
"""

import importlib.util
from functools import partial

import pytest
import torch
from manager_tools import swapped_ids
from test_attention import refuses

import paged_attention
from kv_cache_manager import PagedKVCacheManager
from paged_attention import BlockMapError, PagedKVCache, slot_mapping
from vllm_sim.serving.simulator import Observer, make_groups, simulate
from vllm_sim.workload.requests import Request

kernels = None
if importlib.util.find_spec("triton"):
    import paged_attention_triton as kernels

SIZE, LAYERS = 4, 2


class TransferError(RuntimeError):
    pass


class Launches:
    """Stands for a Triton kernel: counts its launches, and the k-th fails before it starts."""

    def __init__(self, monkeypatch, name, k):
        self.calls, self.name, self.k = 0, name, k
        self.real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, self)

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.calls += 1
            if self.calls == self.k:
                raise TransferError(f"{self.name} {self.k}")
            return self.real[grid](*args, **options)

        return launch


class Flaky:
    """Counts calls of a tensor operation and fails at the k-th."""

    def __init__(self, monkeypatch, name, k):
        self.calls, real = 0, getattr(torch.Tensor, name)

        def call(tensor, *args, **options):
            self.calls += 1
            if self.calls == k:
                raise TransferError(f"{name} {k}")
            return real(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, call)


@pytest.fixture
def world():
    """Three samples of 7 tokens, and one sequence beside them."""
    return make_world(fused=False)


@pytest.fixture
def fused_world():
    """The same, with the blocks moved by Triton's kernels."""
    if kernels is None or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    return make_world(fused=True)


def make_world(fused):
    manager = PagedKVCacheManager(16, SIZE, num_cpu_blocks=16)
    pool = PagedKVCache(
        16, SIZE, 1, 8, num_layers=LAYERS, num_cpu_blocks=16, poison=True, fused=fused
    )
    contents = {}

    def write(seq_id, start, stamps):
        blocks = manager.block_table(seq_id).blocks
        slots = slot_mapping(blocks, start, len(stamps), SIZE)
        for layer in range(LAYERS):
            k = torch.tensor(stamps).float()[:, None, None].expand(-1, 1, 8) + 1000 * layer
            pool.write(layer, slots, k.contiguous(), k + 0.5)
        contents[seq_id] = contents.get(seq_id, [])[:start] + stamps

    manager.allocate(0, 7)
    write(0, 0, list(range(7)))
    for child in (1, 2):
        manager.fork(0, child)
        contents[child] = contents[0].copy()
    manager.allocate(3, 6)
    write(3, 0, list(range(50, 56)))
    return manager, pool, contents, write


def same(pool, before):
    """Whether the pool holds what it held, NaN included."""
    return torch.equal(pool.nan_to_num(-1), before.nan_to_num(-1))


def fails_once(monkeypatch, broken, name, call):
    """The first operation of that name fails, and so does `call`."""
    with monkeypatch.context() as patch, pytest.raises(TransferError):
        broken(patch, name, 1)
        call()


def check(manager, pool, contents):
    manager.check_invariants()
    for seq_id in manager.running_ids:
        expected = torch.tensor(contents[seq_id]).float()
        slots = slot_mapping(manager.block_table(seq_id).blocks, 0, len(expected), SIZE)
        for layer in range(LAYERS):
            k, v = pool.read(layer, slots)
            assert torch.equal(k[:, 0, 0], expected + 1000 * layer)
            assert torch.equal(v, k + 0.5)


def attempts(monkeypatch, name, call, fail=Flaky):
    """Run `call` failing at the 1st, 2nd, ... operation of that name, then whole; the failures."""
    k = 1
    while True:
        with monkeypatch.context() as patch:
            flaky = fail(patch, name, k)
            try:
                call()
            except TransferError:
                k += 1
                continue
            assert flaky.calls == k - 1
            return k - 1


def test_a_swap_that_fails_at_any_block_can_be_made_again(world, monkeypatch):
    manager, pool, contents, _ = world
    pairs = manager.swap_out([0, 1, 2])
    before = pool.pool.clone()
    fails = attempts(monkeypatch, "copy_", lambda: pool.swap_out(pairs))
    assert fails == len(pairs) == 2
    assert same(pool.pool, before), "the source was touched"
    check(manager, pool, contents)
    pool.poison_blocks([block for block, _ in pairs])
    manager.allocate(9, 4 * SIZE)  # what is free now is given to somebody else
    manager.free(9)
    back = manager.swap_in([0, 1, 2])
    held = pool.cpu_pool.clone()
    assert attempts(monkeypatch, "copy_", lambda: pool.swap_in(back)) == 2
    assert same(pool.cpu_pool, held)
    check(manager, pool, contents)


def test_a_staged_swap_that_fails_can_be_made_again(world, monkeypatch):
    """The way that a GPU's blocks take: gathered, transferred in runs, scattered."""
    manager, pool, contents, _ = world
    host = pool._host
    monkeypatch.setattr(paged_attention, "STAGING_BYTES", 1)  # a block at a time

    def swap(pairs, out):
        for pair in sorted(pairs, key=lambda pair: pair[1]):
            host._swap_staged([pair], out)

    pairs = manager.swap_out([0, 1, 2])
    assert attempts(monkeypatch, "copy_", lambda: swap(pairs, True)) >= len(pairs)
    check(manager, pool, contents)
    pool.poison_blocks([block for block, _ in pairs])
    back = [(block, host_block) for host_block, block in manager.swap_in([0, 1, 2])]
    assert attempts(monkeypatch, "copy_", lambda: swap(back, False)) >= len(pairs)
    check(manager, pool, contents)


def test_a_copy_on_write_that_fails_can_be_made_again(world, monkeypatch):
    manager, pool, contents, write = world
    copies = manager.append_all()
    assert len(copies) == 2
    before = pool.pool.clone()
    for name in ("index_select", "index_copy_"):
        fails_once(monkeypatch, Flaky, name, lambda: pool.copy_blocks(copies))
        assert same(pool.pool, before)
    pool.copy_blocks(copies)
    for seq_id in manager.running_ids:
        write(seq_id, len(contents[seq_id]), [100 + seq_id])
    check(manager, pool, contents)


def test_a_write_that_fails_between_k_and_v_can_be_made_again(world, monkeypatch):
    manager, pool, contents, write = world
    pool.copy_blocks(manager.append_all())
    for seq_id in manager.running_ids:
        tokens = [100 + seq_id]
        at = len(contents[seq_id])
        call = lambda i=seq_id, n=at, t=tokens: write(i, n, t)  # noqa: E731
        assert attempts(monkeypatch, "index_copy_", call) == 2 * LAYERS
    check(manager, pool, contents)


def test_a_map_that_cannot_be_carried_out_moves_no_byte(world):
    manager, pool, contents, _ = world
    before, held = pool.pool.clone(), pool.cpu_pool.clone()
    refuses(BlockMapError, pool.swap_out, [([(0, 0), (1, 16)],), ([(0, 3), (1, 3)],)])
    refuses(BlockMapError, pool.swap_in, [([(0, 5), (16, 6)],), ([(0, 5), (1, 5)],)])
    refuses(BlockMapError, pool.copy_blocks, [([(0, 9), (1, 16)],), ([(0, 9), (9, 10)],)])
    assert same(pool.pool, before)
    assert same(pool.cpu_pool, held)
    check(manager, pool, contents)


def test_a_preemption_that_cannot_swap_can_still_recompute(world, monkeypatch):
    """The transfer fails for good: the group is dropped, and admitted anew with its own tokens."""
    manager, pool, contents, write = world
    pairs = manager.swap_out([0, 1, 2])
    fails_once(monkeypatch, Flaky, "copy_", lambda: pool.swap_out(pairs))
    for seq_id in (0, 1, 2):
        manager.free(seq_id)
    assert manager.num_free_cpu_blocks == 16
    check(manager, pool, contents)
    manager.allocate(0, 7)
    write(0, 0, list(range(7)))
    check(manager, pool, contents)


def test_a_kernel_that_cannot_be_launched_can_be_launched_again(fused_world, monkeypatch):
    """Copy-on-write, writes, a swap out and in: each fails at each of its launches."""
    manager, pool, contents, write = fused_world
    fails = partial(attempts, monkeypatch, fail=Launches)
    copies = manager.append_all()
    before = pool.pool.clone()
    fails_once(monkeypatch, Launches, "_move_blocks", lambda: pool.copy_blocks(copies))
    assert same(pool.pool, before)
    assert fails("_move_blocks", lambda: pool.copy_blocks(copies)) >= 1
    for seq_id in manager.running_ids:
        tokens, at = [100 + seq_id], len(contents[seq_id])
        call = lambda i=seq_id, n=at, t=tokens: write(i, n, t)  # noqa: E731
        assert fails("_write_slots", call) == LAYERS
    check(manager, pool, contents)
    pairs = manager.swap_out([0, 1, 2])
    assert fails("_move_blocks", lambda: pool.swap_out(pairs)) == 1
    assert fails("copy_", lambda: pool.swap_out(pairs), fail=Flaky) >= 1
    check(manager, pool, contents)
    pool.poison_blocks([block for block, _ in pairs])
    back = manager.swap_in([0, 1, 2])
    assert fails("_move_blocks", lambda: pool.swap_in(back)) == 1
    check(manager, pool, contents)


class Breaking(Observer):
    """Carries nothing out: its n-th call fails, as a transfer might."""

    def __init__(self, manager, n):
        self.manager, self.left = manager, n

    def on_iteration(self, iteration):
        self.manager.check_invariants()
        self.left -= 1
        if self.left == 0:
            raise TransferError("in an iteration")

    on_completion = on_iteration


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_a_run_that_a_transfer_ends_leaves_a_manager_that_can_be_used(mode):
    """Wherever it ends: what was held can be freed, and then the pool is as at its start."""
    requests = [Request(n, n / 2, 5, 7, num_samples=1 + n % 2) for n in range(6)]
    n, whole = 0, False
    while not whole:
        n += 1
        manager = PagedKVCacheManager(12, SIZE, num_cpu_blocks=6, watermark=0.0)
        try:
            result = simulate(
                make_groups(requests), manager, preemption=mode, observers=[Breaking(manager, n)]
            )
            whole = True
        except TransferError:
            manager.check_invariants()
            for seq_id in [*manager.running_ids, *swapped_ids(manager)]:
                manager.free(seq_id)
        manager.check_invariants()
        assert (manager.num_free_blocks, manager.num_free_cpu_blocks) == (12, 6)
    assert n > 30 and result.num_swaps + result.num_recomputations > 0
