"""Regime item 3: no attention output ever holds another sequence's value, or a freed slot's.

Random sequences live and die in pools so small that they are preempted all the time: alone, as
samples, as beams, behind a shared prefix; swapped, recomputed; in blocks of 1 to 8 slots. Every
token has a K and V of its own, and what is freed is NaN at once. After every iteration the kernel
attends for every running sequence in every layer, and its output is compared with attention over
that sequence's own tokens, one beside the other, from a list that knows nothing of blocks.

Kernel gather must give the same bits. Kernel triton may differ by rounding, 1e-5: K and V lie
between -1 and 1 and 16 elements make a score, so the weights of two tokens differ by e**8 at most,
mostly by less than e; a foreign token among a hundred would be seen a hundred times over.

The slow runs take ISOLATION_LIFETIMES (environment) sequences, or 10,000; triton on a CPU 500:
    pytest -m slow tests/core/test_isolation.py
"""

import os
import random
import time
from functools import cache

import pytest
import test_stamped_cache as stamped
import torch
from test_stamped_cache import LIMITS, PREFIX_ID, PREFIX_LEN, no_copies

from attention import attention, length_mask
from kv_cache_manager import PagedKVCacheManager
from paged_attention import (
    GATHER,
    TRITON,
    BlockMapError,
    PagedKVCache,
    attention_kernel,
    pad_block_tables,
)
from vllm_sim import models
from vllm_sim.scenarios.setting import Setting
from vllm_sim.scenarios.stamped_cache import StampedCache, Stamps
from vllm_sim.serving.simulator import make_groups, simulate
from vllm_sim.workload.requests import Request

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
TINY = models.Model("tiny", "opt", 2, 32, 2, 1, 16, 100, 256)
TOKENS = 1 << 16  # different K and V in a run; no run has more tokens
LIFETIMES = int(os.environ.get("ISOLATION_LIFETIMES", "10000"))
BLOCK_SIZES = (1, 2, 3, 4, 8)
KINDS = ({}, *stamped.KINDS)


pytestmark = pytest.mark.usefixtures("few_bytes")


class Bank(Stamps):
    """K and V of each token by its number: random, no two alike, others in each layer."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        shape = (TOKENS, 2, TINY.num_kv_heads, TINY.head_size)
        self.rows = (2 * torch.rand(shape, generator=generator) - 1).to(DEVICE)

    def values(self, tokens, layer):
        assert tokens.numel() == 0 or int(tokens.max()) < TOKENS
        rows = self.rows[(tokens + layer * 7919) % TOKENS]
        return rows[..., 0, :, :], rows[..., 1, :, :]


class Attending(StampedCache):
    """Attends for every running sequence after every iteration, or one in `every`, until a foreign
    value is found."""

    every = 1

    def __init__(self, setting, manager, cache, kernel, bank, num_layers):
        super().__init__(setting, manager, cache)
        self.stamps = bank
        self.kernel, self.exact = attention_kernel(kernel), kernel == GATHER
        self.num_layers = num_layers  # that are attended to
        self.outputs, self.foreign, self.taken_back = 0, [], 0
        self.drawn = random.Random(setting.seed)
        self.queries = torch.Generator().manual_seed(setting.seed)

    def on_iteration(self, iteration):
        super().on_iteration(iteration)
        groups = (*iteration.prefills, *iteration.decodes)
        ids = [seq.seq_id for group in groups for seq in group.unfinished()]
        if ids and iteration.index % self.every == 0 and not self.foreign:
            for layer in range(self.num_layers):
                self.attend(ids, layer)
        for seq in [seq for group in groups for seq in group.unfinished()]:
            if seq.num_generated > 1 and self.drawn.random() < 0.1:
                self.take_back(seq.seq_id, seq.context_len)

    def take_back(self, seq_id, context_len):
        """Some of the tokens that it generated are forgotten and written again, as by assisted
        decoding: into blocks of its own, whoever shared the old ones."""
        length = self.manager.num_tokens(seq_id)
        keep = self.drawn.randrange(context_len, length)
        if self.manager.num_free_blocks < 3 or length - keep > 2 * self.manager.block_size:
            return
        self.cache.poison_blocks(self.manager.truncate(seq_id, keep))
        self.cache.copy_blocks(self.manager.append(seq_id, length - keep))
        slots = self.slots(seq_id, keep, length - keep)
        self.stamps.write(self.cache, slots, self.tokens[seq_id][keep:])
        self.taken_back += 1

    def attend(self, ids, layer):
        tables = pad_block_tables([self.manager.block_table(i).blocks for i in ids], DEVICE)
        lens = torch.tensor([self.manager.num_tokens(i) for i in ids], device=DEVICE)
        shape = (len(ids), TINY.num_heads, TINY.head_size)
        q = (2 * torch.rand(shape, generator=self.queries) - 1).to(DEVICE)
        out, lse = self.kernel(
            q, self.cache.k_pool(layer), self.cache.v_pool(layer), tables, lens.int()
        )
        # The same over each one's own tokens; as wide, so that sums are taken in the same order.
        own = [self.tokens[i] for i in ids]
        width = tables.shape[1] * self.cache.block_size
        numbers = torch.tensor([[*o, *[0] * (width - len(o))] for o in own], device=DEVICE)
        k, v = self.stamps.values(numbers, layer)
        want, want_lse = attention(q[:, None], k, v, length_mask(lens, width))
        for found, right in ((out, want[:, 0]), (lse, want_lse[:, 0])):
            same = found == right if self.exact else (found - right).abs() <= 1e-5
            for b in (~same.flatten(1).all(dim=1)).nonzero().flatten().tolist():
                self.foreign.append(ids[b])
        self.outputs += len(ids)


def requests_of(rng, count):
    return [
        Request(
            n, n / rng.randint(2, 8), rng.randint(1, 14), rng.randint(1, 14), **rng.choice(KINDS)
        )
        for n in range(count)
    ]


def poisoned_pool(num_blocks, size, cpu, order, seed):
    """(Setting, manager with the shared prefix, cache full of NaN) of two layers."""
    setting = Setting(TINY, DEVICE, 2, num_blocks, size, seed)
    manager = PagedKVCacheManager(num_blocks, size, num_cpu_blocks=cpu, free_order=order)
    manager.allocate_prefix(PREFIX_ID, PREFIX_LEN)
    cache = PagedKVCache(
        num_blocks,
        size,
        TINY.num_kv_heads,
        TINY.head_size,
        num_layers=2,
        num_cpu_blocks=cpu,
        dtype=torch.float32,
        device=DEVICE,
        poison=True,
        fused=False,
    )
    return setting, manager, cache


def live(seed, kernel, count=24, mode=None, num_layers=2, broken=None, every=1):
    """One pool and the lives of its sequences; returns (Attending, ServingResult)."""
    rng = random.Random(seed)
    size, mode = rng.choice(BLOCK_SIZES), mode or rng.choice(("auto", "swap", "recompute"))
    num_blocks = -(-110 // size) + rng.randint(2, 12)
    cpu = rng.choice((num_blocks, num_blocks // 4))
    order = rng.sample(range(num_blocks), num_blocks)
    setting, manager, cache = poisoned_pool(num_blocks, size, cpu, order, seed)
    attending = Attending(setting, manager, cache, kernel, Bank(seed % 7), num_layers)
    attending.every = every
    attending.store_prefix(PREFIX_LEN, PREFIX_ID)
    if broken is not None:
        broken(attending)
    groups = make_groups(requests_of(rng, count), prefix_ids={PREFIX_LEN: PREFIX_ID}, seed=seed)
    result = simulate(groups, manager, LIMITS, preemption=mode, observers=[attending])
    return attending, result


def live_on(lifetimes, kernel, figure, **options):
    """Pool after pool, until so many sequences have lived."""
    begin = time.process_time()
    names = "sequences", "pools", "outputs", "swaps", "recomputations", "copies", "taken_back"
    found = dict.fromkeys(names, 0)
    while found["sequences"] < lifetimes:
        seed = found["pools"]
        attending, result = live(seed, kernel, **options)
        assert attending.foreign == attending.wrong == [], f"seed {seed}"
        found["pools"] += 1
        found["sequences"] += attending.verified
        found["outputs"] += attending.outputs
        found["taken_back"] += attending.taken_back
        found["swaps"] += result.num_swaps
        found["recomputations"] += result.num_recomputations
        found["copies"] += result.num_copies
    assert all(found.values()) and found["outputs"] > 2 * found["sequences"]
    seconds = round(time.process_time() - begin, 1)
    figure(f"isolation, kernel {kernel} on {DEVICE.type}", **found, cpu_seconds=seconds)


@pytest.mark.parametrize("lifetimes", [500, pytest.param(LIFETIMES, marks=pytest.mark.slow)])
def test_the_gather_kernel_keeps_sequences_apart(figure, lifetimes):
    live_on(lifetimes, GATHER, figure)


def test_the_triton_kernel_keeps_sequences_apart(figure):
    pytest.importorskip("triton")
    few = {} if ON_CUDA else {"every": 2}  # the interpreter is slow
    live_on(500 if ON_CUDA else 60, TRITON, figure, count=12, num_layers=1, **few)


@pytest.mark.slow
def test_the_triton_kernel_keeps_many_sequences_apart(figure):
    pytest.importorskip("triton")
    asked = ON_CUDA or "ISOLATION_LIFETIMES" in os.environ
    lifetimes = LIFETIMES if asked else LIFETIMES // 20
    live_on(lifetimes, TRITON, figure, num_layers=2 if ON_CUDA else 1)


# ---- what is broken is found ----------------------------------------------------------------


def one_slot_too_many(attending):
    kernel = attending.kernel
    attending.kernel = lambda q, k, v, tables, lens: kernel(
        q, k, v, tables, (lens + 1).clamp(max=tables.shape[1] * k.shape[1])
    )


def one_slot_too_few(attending):
    kernel = attending.kernel
    attending.kernel = lambda q, k, v, tables, lens: kernel(q, k, v, tables, lens - 1)


def neighbours_table(attending):
    """One block of one sequence is its neighbour's."""
    kernel = attending.kernel

    def wrong(q, k, v, tables, lens):
        tables = tables.clone()
        tables[0, 0] = tables[-1, 0]
        return kernel(q, k, v, tables, lens)

    attending.kernel = wrong


IN_TABLES = (one_slot_too_many, one_slot_too_few, neighbours_table)
BREAKS = [(broken, mode) for mode, several in stamped.BREAKS.items() for broken in several]
BREAKS.remove((stamped.heads_swapped, "swap"))  # here all have one head
BREAKS += [(broken, "swap") for broken in IN_TABLES]


@cache
def sound(kernel, **options):
    """Nothing foreign is seen where nothing is broken."""
    return live(4, kernel, **options)[0].foreign == []


@pytest.mark.parametrize(("broken", "mode"), BREAKS)
def test_what_is_broken_is_seen_in_the_outputs(broken, mode):
    assert sound(GATHER, mode=mode)
    try:
        foreign = live(4, GATHER, mode=mode, broken=broken)[0].foreign
    except BlockMapError:
        assert broken in (stamped.copies_turned_round, stamped.a_block_freed_too_early)
    else:
        assert foreign


@pytest.mark.parametrize("broken", [one_slot_too_many, neighbours_table, no_copies])
def test_what_is_broken_is_seen_by_the_triton_kernel(broken):
    pytest.importorskip("triton")
    options = {"count": 8, "mode": "swap", "num_layers": 1}
    assert sound(TRITON, **options)
    assert live(4, TRITON, broken=broken, **options)[0].foreign


def test_a_shared_block_written_without_a_copy_is_seen_in_the_outputs(monkeypatch):
    monkeypatch.setattr(
        PagedKVCacheManager, "_tails", property(lambda m: {}, lambda *_: None), False
    )
    assert live(4, GATHER, mode="recompute")[0].foreign
