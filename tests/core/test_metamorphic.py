"""Regime item 6: the memory that a run gets changes nothing of what it computes.

The same requests are served from a pool so large that nobody is ever preempted, and then from tiny
pools that preempt by swap, by recompute or both; from blocks in other orders; from blocks of other
sizes; from contiguous memory. K and V are random and depend on a token's sequence and position
alone, queries too. The K and V that each sequence holds when it finishes, read through its table,
must be the same bits, and every attention output of its life the same to 1e-5 (a batch of other
width sums in another order).

See also test_stamped_cache.py (whose tokens each sequence holds) and test_paged_groups.py (swap out
and in, on tables).
"""

import random
from copy import deepcopy
from functools import cache
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from manager_tools import random_manager
from test_isolation import DEVICE, TINY, Attending, Bank, poisoned_pool
from test_stamped_cache import LIMITS, PREFIX_ID, PREFIX_LEN, requests_of

from kv_cache_manager import POLICIES, BaselineCacheManager
from paged_attention import GATHER, TRITON, pad_block_tables
from vllm_sim.serving.simulator import make_groups, simulate

pytestmark = pytest.mark.usefixtures("few_bytes")
LONGEST = 64  # no sequence has more tokens: its own numbers are LONGEST * id + position


class Recording(Attending):
    """Numbers tokens by sequence and position, and keeps all outputs and the last K and V."""

    def __init__(self, *args):
        super().__init__(*args)
        self.all_outputs, self.held = {}, {}
        self.moved = 0  # sequences that hold output of another: beams
        self.names = iter(range(10**4 * LONGEST))  # of the prefix

    def on_iteration(self, iteration):
        self.names = self.coming(iteration)
        super().on_iteration(iteration)
        assert next(self.names, None) is None, "tokens were announced that nobody wrote"

    def _new_tokens(self, count):
        names = list(islice(self.names, count))
        assert len(names) == count
        return names

    def coming(self, iteration):
        """The tokens of an iteration in the order in which they are made."""
        first = LONGEST * 10  # behind those of the prefix
        for group in iteration.prefills:
            seqs = group.unfinished()
            if seqs[0].seq_id not in self.tokens:
                start, end = seqs[0].prefix_len, seqs[0].context_len
                yield from (first + LONGEST * seqs[0].seq_id + at for at in range(start, end))
                continue
            for seq in seqs:
                start = len(self.tokens[seq.seq_id])
                yield from (first + LONGEST * seq.seq_id + p for p in range(start, seq.num_tokens))
        for group in iteration.decodes:
            for seq in group.unfinished():
                yield first + LONGEST * seq.seq_id + len(self.tokens[seq.seq_id])

    def attend(self, ids, layer):
        if isinstance(self.manager, BaselineCacheManager):
            return  # it has no block tables
        tables = pad_block_tables([self.manager.block_table(i).blocks for i in ids], DEVICE)
        lens = [self.manager.num_tokens(i) for i in ids]
        # The query of a sequence at a length: the K of the bank's other end, for both heads.
        rows = torch.tensor([-1 - LONGEST * i - n for i, n in zip(ids, lens)], device=DEVICE)
        q = self.stamps.rows[rows, 0].expand(-1, TINY.num_heads, -1).contiguous()
        k_pool, v_pool = self.cache.k_pool(layer), self.cache.v_pool(layer)
        lens_there = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        out, lse = self.kernel(q, k_pool, v_pool, tables, lens_there)
        for at, o, s in zip(zip(ids, lens), out.cpu(), lse.cpu()):
            found = torch.cat([o.flatten(), s])
            again = self.all_outputs.setdefault((*at, layer), found)  # where it was recomputed
            torch.testing.assert_close(found, again, rtol=0, atol=1e-5)

    def _verify(self, seq):
        super()._verify(seq)
        output = self.tokens[seq.seq_id][seq.context_len :]
        self.moved += any(token // LONGEST - 10 != seq.seq_id for token in output)
        slots = self.slots(seq.seq_id, 0, self.manager.num_tokens(seq.seq_id)).to(DEVICE)
        parts = [self.cache.read(layer, slots) for layer in range(self.cache.num_layers)]
        self.held[seq.seq_id] = torch.stack([part for pair in parts for part in pair]).cpu()


def serve(
    seed, num_blocks, size, mode="auto", cpu=0, order=None, kernel=GATHER, count=16, layers=2
):
    """(Recording, ServingResult) of a run; `mode` of preemption, or policy of contiguous memory."""
    setting, manager, pool = poisoned_pool(num_blocks, size, cpu, order, seed)
    prefix_ids = {PREFIX_LEN: PREFIX_ID}
    if mode in POLICIES:
        manager = BaselineCacheManager(num_blocks, size, policy=mode, max_len=48)
        mode, prefix_ids = "auto", {}
    recording = Recording(setting, manager, pool, kernel, Bank(seed), layers)
    recording.store_prefix(PREFIX_LEN, prefix_ids.get(PREFIX_LEN))
    requests = requests_of(seed, count)
    groups = make_groups(requests, prefix_ids=prefix_ids, seed=seed)
    result = simulate(groups, manager, LIMITS, preemption=mode, observers=[recording])
    assert recording.wrong == [] and len(recording.held) == sum(r.num_seqs for r in requests)
    return recording, result


@cache
def large(seed, count=16, layers=2):
    recording, result = serve(seed, 1000, 4, count=count, layers=layers)
    assert result.num_swaps == result.num_recomputations == 0
    return recording


def assert_same(recording, expected):
    assert recording.held.keys() == expected.held.keys()
    for seq_id, held in recording.held.items():
        assert torch.equal(held, expected.held[seq_id]), f"K and V of sequence {seq_id}"
    assert recording.all_outputs.keys() >= expected.all_outputs.keys()
    for at, found in expected.all_outputs.items():
        torch.testing.assert_close(recording.all_outputs[at], found, rtol=0, atol=1e-5)


SEEDS = range(2)


@pytest.mark.parametrize(
    ("mode", "cpu", "swaps", "recomputes"),
    [
        ("swap", 30, True, False),
        ("recompute", 0, False, True),
        ("swap", 4, True, True),
        ("auto", 30, True, True),
    ],
)
def test_a_tiny_pool_that_preempts_gives_the_same(mode, cpu, swaps, recomputes):
    counts = []
    for seed in SEEDS:
        recording, result = serve(seed, 30, 4, mode, cpu)
        counts.append((result.num_swaps, result.num_recomputations))
        assert_same(recording, large(seed))
    assert all(map(any, counts)), "a pool that did not preempt"
    assert tuple(map(any, zip(*counts))) == (swaps, recomputes)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_in_other_orders_give_the_same(seed):
    rng = random.Random(seed)
    for num_blocks, mode in ((1000, "auto"), (30, "swap"), (30, "recompute")):
        for order in (list(range(num_blocks))[::-1], rng.sample(range(num_blocks), num_blocks)):
            recording, _ = serve(seed, num_blocks, 4, mode, cpu=16, order=order)
            assert_same(recording, large(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_blocks_of_other_sizes_give_the_same(seed, size):
    for num_slots, mode in ((4000, "auto"), (144, "swap"), (144, "recompute")):
        num_blocks = max(-(-num_slots // size), 10)
        recording, _ = serve(seed, num_blocks, size, mode, cpu=num_blocks // 2)
        assert_same(recording, large(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_contiguous_memory_holds_the_same(seed):
    recording, _ = serve(seed, 256, 1, "pow2")
    expected = large(seed)
    assert recording.moved == expected.moved >= 5, "or nothing is shown of beams"
    assert recording.held.keys() == expected.held.keys()
    assert all(torch.equal(held, expected.held[i]) for i, held in recording.held.items())


def test_the_triton_kernel_gives_the_same_in_a_tiny_pool():
    pytest.importorskip("triton")
    recording, result = serve(0, 22, 4, "swap", cpu=22, kernel=TRITON, count=5, layers=1)
    assert result.num_swaps > 0
    assert_same(recording, large(0, 5, 1))


def test_what_differs_is_seen():
    """A bit of one K, an output, a sequence that is missing: the comparison is not blind."""
    recording, _ = serve(0, 30, 4, "swap", 30)
    assert_same(recording, large(0))
    for spoil in (
        lambda r: r.held[3][0, 0, 0, :1].add_(2**-20),
        lambda r: next(iter(r.all_outputs.values())).add_(1e-4),
        lambda r: r.held.pop(3),
        lambda r: r.all_outputs.popitem(),
    ):
        spoilt = SimpleNamespace(
            held=deepcopy(recording.held), all_outputs=deepcopy(recording.all_outputs)
        )
        spoil(spoilt)
        with pytest.raises(AssertionError):
            assert_same(spoilt, large(0))
    # Another seed is another run.
    with pytest.raises(AssertionError):
        assert_same(serve(1, 30, 4, "swap", 30)[0], large(0))


@pytest.mark.parametrize("seed", range(40))
def test_what_is_appended_and_taken_back_leaves_the_same_future(seed):
    """Where nothing was copied; a copy leaves a block of its own, and that alone."""
    manager, rng = random_manager(seed, num_blocks=40), random.Random(seed)
    for seq_id in manager.running_ids:
        before, length = manager.usage(), manager.num_tokens(seq_id)
        count = rng.randint(1, 9)
        if manager.blocks_for_append([seq_id]) + count > manager.num_free_blocks:
            continue
        futures = [manager.blocks_for_step(n) for n in (1, 2, 7)]
        copies = manager.append(seq_id, count)
        assert manager.truncate(seq_id, length) is not None
        manager.check_invariants()
        after = manager.usage()
        assert after.physical_blocks == before.physical_blocks + len(copies)
        assert (after.logical_tokens, after.logical_blocks) == (
            before.logical_tokens,
            before.logical_blocks,
        )
        if not copies:
            assert after == before
            assert [manager.blocks_for_step(n) for n in (1, 2, 7)] == futures
